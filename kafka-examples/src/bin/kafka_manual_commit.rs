//! Commit by hand, after the work, and never past an order that failed
//!
//! At least once, in order within a partition. A commit is a position: it says that all orders before it are done. If
//! order 5 fails and order 6 is committed, the group does not get order 5 again. So a failed order is written to a
//! dead-letter topic first, and only then committed.
//!
//! ```console
//! 1$ cargo lab run kafka_send -p 0 reliable-orders order-0 invalid-1 order-2
//! ...
//! 2$ cargo lab run kafka_manual_commit
//! partition 0 offset 0: order-0 processed
//! partition 0 offset 1: dead-lettered: invalid
//! partition 0 offset 2: order-2 processed
//! 2^C
//! 1$ cargo lab run kafka_tail -e reliable-orders.dlq
//! partition [..] offset 0, headers reason=invalid origin=reliable-orders/0/1: invalid-1
//! ```
//!
//! Notice:
//! - A crash (try `kill -9`) repeats the last orders. A crash between dead letter and commit doubles the dead letter.
//! - Here every failure is treated as a bad message. kafka_retry_dlq retries after an outage.
//! - If the dead letter cannot be written, or is too large for its topic, the program ends before the commit.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_pitfall_auto_commit, kafka_graceful_shutdown.

use std::io::{Write, stderr};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use futures::{FutureExt, StreamExt, future};
use rdkafka::consumer::{CommitMode, Consumer, ConsumerContext, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode::*};
use rdkafka::message::{BorrowedMessage, Header};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, ClientContext, Message, TopicPartitionList};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;

const TOPIC: &str = "reliable-orders";
const DEAD_LETTERS: &str = "reliable-orders.dlq";
const GROUP: &str = "reliable-processor";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        // The client checks the size before compression, the broker after it. So allow any size here.
        .set("compression.type", "zstd")
        .set("message.max.bytes", "1000000000")
        .set("message.timeout.ms", "30000")
        .create()?;
    let consumer: StreamConsumer<Commits> = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest") // the default, `latest`, skips records
        .set("allow.auto.create.topics", "true")
        .set("topic.metadata.refresh.interval.ms", "10000") // finds a new topic
        .create_with_context(Commits)?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer.fetch_metadata(Some(TOPIC), TIMEOUT).context(tip)?;
    consumer.subscribe(&[TOPIC])?;

    let worked = work(&consumer, &producer).await;
    // Commits and leaves the group. With the broker down, this can hang (librdkafka issue 3740).
    let (open, closed) = oneshot::channel::<()>();
    thread::spawn(move || drop((consumer, open)));
    let closed = timeout(TIMEOUT, closed).await;
    worked?;
    closed.map(drop).context("cannot close: no broker answers")
}

/// The pattern: work, or dead-letter an order that failed, and only then commit. Ends with Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer<Commits>, producer: &FutureProducer) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    let mut orders = consumer.stream().take_until(stop);
    while let Some(received) = orders.next().await {
        match received {
            Ok(order) => {
                let (partition, offset) = (order.partition(), order.offset());
                let outcome = match process(order.payload()) {
                    Ok(text) => format!("{text} processed"),
                    Err(reason) => dead_letter(producer, &order, reason).await?,
                };
                println!("partition {partition} offset {offset}: {outcome}");
                // Commits offset + 1, the next offset to read. `commit_callback` gets the result later.
                consumer.commit_message(&order, CommitMode::Async)?;
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The work. A payload can be any bytes.
fn process(payload: Option<&[u8]>) -> Result<&str, String> {
    match std::str::from_utf8(payload.unwrap_or_default()) {
        Ok(text) if text.is_empty() || text.contains("invalid") => Err("invalid".into()),
        Ok(text) => Ok(text),
        Err(error) => Err(error.to_string()),
    }
}

/// Copies the order to the dead-letter topic, with its origin and the reason in headers.
async fn dead_letter(
    producer: &FutureProducer,
    order: &BorrowedMessage<'_>,
    reason: String,
) -> anyhow::Result<String> {
    let origin = format!("{TOPIC}/{}/{}", order.partition(), order.offset());
    let mut headers = order.headers().map(|all| all.detach()).unwrap_or_default();
    for (key, value) in [("reason", &reason), ("origin", &origin)] {
        let value = Some(value);
        headers = headers.insert(Header { key, value });
    }
    let mut letter = FutureRecord::<[u8], [u8]>::to(DEAD_LETTERS).headers(headers);
    (letter.key, letter.payload) = (order.key(), order.payload());
    let sent = producer.send(letter, TIMEOUT).await;
    sent.map_err(|(error, _)| error)
        .with_context(|| format!("cannot dead-letter {origin}; a restart repeats it"))?;
    Ok(format!("dead-lettered: {reason}"))
}

/// Prints a commit that failed. `eprintln!` panics if stderr is closed, and a callback must not panic.
struct Commits;

impl ClientContext for Commits {}
impl ConsumerContext for Commits {
    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        if let Err(error) = result {
            let _ = writeln!(stderr(), "not committed: {error}");
        }
    }
}

/// The client recovers from these errors by itself. Others, such as a missing permission, are final.
fn is_temporary(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    matches!(code, Some(AllBrokersDown | Resolve | OperationTimedOut))
        || matches!(code, Some(BrokerTransportFailure | UnknownTopicOrPartition))
}
