//! Show the records of a topic: partition, offset, key, headers, payload
//!
//! Reads all partitions, from the beginning or from another offset, without a group: nothing is committed, and no
//! consumer notices. Within a partition the records come in order.
//!
//! ```console
//! $ cargo lab run kafka_send -k user-1 -H source=web -H trace=7 tail-notes hello 'good bye'
//! ...
//! $ cargo lab run kafka_tail -e tail-notes
//! partition [..] offset 0, key user-1, headers source=web trace=7: hello
//! partition [..] offset 1, key user-1, headers source=web trace=7: good bye
//! $ cargo lab run kafka_tail -e -o -1 tail-notes
//! partition [..] offset 1, key user-1, headers source=web trace=7: good bye
//! ```
//!
//! Notice:
//! - Records of open and of aborted transactions are not shown (`isolation.level=read_committed`, the default).
//! - Bytes that are not UTF-8 are shown as `\xff`. A null payload is shown as `(null)`.
//! - A partition that is added later is not read: the list of partitions is taken once, at the start.
//!
//! Try: `cargo lab run kafka_tail __consumer_offsets`, where the broker keeps what groups commit.
//!
//! Usage: kafka_tail [-e] [-o OFFSET] TOPIC. OFFSET is beginning (the default), end, a number, or -N for the last N
//! records of each partition. With `-e` it ends at the end of the topic. Settings: KAFKA_BROKERS (localhost:9092).
//! See also: kafka_send, kafka_replay.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Headers};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;

const USAGE: &str = "usage: kafka_tail [-e] [-o beginning|end|OFFSET|-COUNT] TOPIC";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
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
        // The client wants a name here, although no group is joined and nothing is committed.
        .set("group.id", "kafka_tail")
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest")
        .set("enable.partition.eof", "true")
        .create()?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = consumer
        .fetch_metadata(Some(&topic), TIMEOUT)
        .context(hint)?;
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

    let shown = show(&consumer, ends.then_some(partitions.count())).await;
    // With the broker down, the close can hang (librdkafka issue 3740): wait no longer than TIMEOUT.
    let (done, closed) = oneshot::channel();
    thread::spawn(move || {
        drop(consumer);
        done.send(())
    });
    let closed = timeout(TIMEOUT, closed).await;
    shown?;
    closed.context("not closed: no broker answers")??;
    Ok(())
}

/// Prints records until Ctrl-C, or until this many partitions have been read to their end.
async fn show(consumer: &StreamConsumer, partitions: Option<usize>) -> anyhow::Result<()> {
    let mut ended = BTreeSet::new();
    let mut stop = pin!(shutdown());
    while partitions.is_none_or(|all| ended.len() < all) {
        let received = tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            received = consumer.recv() => received,
        };
        match received {
            Ok(record) => println!("{}", line(&record)),
            Err(KafkaError::PartitionEOF(partition)) => {
                ended.insert(partition);
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn line(record: &BorrowedMessage<'_>) -> String {
    let mut line = format!(
        "partition {} offset {}",
        record.partition(),
        record.offset()
    );
    if let Some(key) = record.key() {
        line += &format!(", key {}", text(key));
    }
    // The crate panics on a header name that is not UTF-8. Other clients can write such names.
    let headers = catch_unwind(AssertUnwindSafe(|| headers(record)));
    line += &headers.unwrap_or(", headers with a name that is not UTF-8".into());
    line + ": " + &record.payload().map_or("(null)".into(), text)
}

fn headers(record: &BorrowedMessage<'_>) -> String {
    let Some(headers) = record.headers() else {
        return String::new();
    };
    let pairs = headers
        .iter()
        .map(|header| format!(" {}={}", header.key, text(header.value.unwrap_or_default())));
    format!(", headers{}", pairs.collect::<String>())
}

/// UTF-8 as it is, other bytes escaped.
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

/// The client reconnects by itself after these errors. Other errors (authorization, configuration) do not heal by waiting.
fn is_temporary(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::*;
    matches!(
        error.rdkafka_error_code(),
        Some(AllBrokersDown | BrokerTransportFailure | OperationTimedOut | UnknownTopicOrPartition)
    )
}

/// Ctrl-C, or SIGTERM, which Docker, Kubernetes and systemd send.
async fn shutdown() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupt = tokio::signal::ctrl_c() => interrupt,
        _ = terminate.recv() => Ok(()),
    }
}
