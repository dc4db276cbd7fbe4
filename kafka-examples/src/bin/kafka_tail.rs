//! Show the records of a topic: partition, offset, key, headers, payload
//!
//! Reads all partitions without a group. It commits nothing and affects no consumer. Within a partition the records
//! come in order.
//!
//! ```console
//! $ cargo lab run kafka_send -k user-1 -H source=web -H trace=7 tail-notes hello 'good bye'
//! ...
//! $ cargo lab run kafka_tail -e tail-notes
//! partition [..] offset 0, key user-1, headers source=web trace=7: hello
//! partition [..] offset 1, key user-1, headers source=web trace=7: good bye
//! ```
//!
//! Notice:
//! - Records of aborted transactions, and records after an open one, are not shown (`isolation.level=read_committed`).
//! - The list of partitions is read once, at the start. A partition that is added later is not read.
//!
//! Usage: kafka_tail [-e] [-o OFFSET] TOPIC. OFFSET is beginning (the default), end, a number (outside the topic it
//! means the beginning), or -N for the last N offsets of each partition. With `-e` it ends at the end of the topic.
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_send, kafka_replay.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use anyhow::{Context, bail};
use futures::{FutureExt, StreamExt, future};
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode, RDKafkaErrorCode::*};
use rdkafka::message::{BorrowedMessage, Headers};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use tokio::signal::unix::{SignalKind, signal};

const USAGE: &str = "usage: kafka_tail [-e] [-o beginning|end|OFFSET|-COUNT] TOPIC";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let (mut start, mut ends, mut topic) = (Offset::Beginning, false, None);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "-e" => ends = true,
            "-o" => start = offset(&args.next().context(USAGE)?)?,
            _ if arg.starts_with('-') || topic.is_some() => bail!(USAGE),
            _ => topic = Some(arg),
        }
    }
    let topic = topic.context(USAGE)?;
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", "kafka_tail") // required, although this program joins no group
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest")
        .set("enable.partition.eof", "true")
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = consumer
        .fetch_metadata(Some(&topic), TIMEOUT)
        .context(tip)?;
    let mut partitions = TopicPartitionList::new();
    for found in metadata.topics() {
        if let Some(error) = found.error() {
            bail!("cannot read {topic}: {}", RDKafkaErrorCode::from(error));
        }
        for partition in found.partitions() {
            partitions.add_partition_offset(&topic, partition.id(), start)?;
        }
    }
    consumer.assign(&partitions)?;
    show(&consumer, ends.then_some(partitions.count())).await
}

/// Prints records until Ctrl-C or SIGTERM, or until this many partitions have been read to their end.
async fn show(consumer: &StreamConsumer, partitions: Option<usize>) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    let mut records = consumer.stream().take_until(stop);
    let mut ended = BTreeSet::new();
    while let Some(received) = records.next().await {
        match received {
            Ok(record) => println!("{}", line(&record)),
            Err(KafkaError::PartitionEOF(partition)) => {
                ended.insert(partition);
                if partitions == Some(ended.len()) {
                    break;
                }
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn line(record: &BorrowedMessage<'_>) -> String {
    let (partition, offset) = (record.partition(), record.offset());
    let mut line = format!("partition {partition} offset {offset}");
    if let Some(key) = record.key() {
        line += &format!(", key {}", text(key));
    }
    // rdkafka panics if a header name is not UTF-8, and other clients can write such names.
    let headers = catch_unwind(AssertUnwindSafe(|| {
        let all = record.headers()?.iter();
        let pairs = all.map(|it| format!(" {}={}", it.key, text(it.value.unwrap_or_default())));
        Some(format!(", headers{}", pairs.collect::<String>()))
    }));
    let unreadable = ", headers with a name that is not UTF-8".to_owned();
    line += &headers.unwrap_or(Some(unreadable)).unwrap_or_default();
    line + ": " + &record.payload().map_or("(null)".into(), text)
}

/// Escapes bytes that are not UTF-8. Control characters are not escaped.
fn text(bytes: &[u8]) -> String {
    std::str::from_utf8(bytes).map_or_else(|_| bytes.escape_ascii().to_string(), str::to_owned)
}

fn offset(text: &str) -> anyhow::Result<Offset> {
    Ok(match text {
        "beginning" => Offset::Beginning,
        "end" => Offset::End,
        number => match number.parse::<i64>().context(USAGE)? {
            last if last < 0 => Offset::OffsetTail(-last),
            offset => Offset::Offset(offset),
        },
    })
}

/// The client recovers from these errors by itself. Others, such as a missing permission, are final.
fn is_temporary(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    matches!(code, Some(AllBrokersDown | Resolve | OperationTimedOut))
        || matches!(code, Some(BrokerTransportFailure | UnknownTopicOrPartition))
}
