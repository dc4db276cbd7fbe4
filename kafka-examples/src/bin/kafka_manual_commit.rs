//! Commit by hand, after the work, and never past an order that failed
//!
//! At least once, in order within a partition. A commit is a position: it says that everything before it is done. If
//! order 5 fails and order 6 is committed, order 5 is never delivered again. So a failed order is written to a
//! dead-letter topic first, and only then committed.
//!
//! ```console
//! 1$ cargo lab run kafka_send -p 0 reliable-orders order-0 invalid-1 order-2
//! ...
//! 2$ cargo lab run kafka_manual_commit
//! partition 0 offset 0: order-0 processed
//! partition 0 offset 1: invalid-1 dead-lettered: it says that it is invalid
//! partition 0 offset 2: order-2 processed
//! 2^C
//! left the group
//! 1$ cargo lab run kafka_tail -e reliable-orders.dlq
//! partition [..] offset 0, headers reason=it says that it is invalid origin=reliable-orders/0/1: invalid-1
//! ```
//!
//! Notice:
//! - A commit is sent after each order. Its answer comes later, to `commit_callback`; without it a failure is silent.
//! - A crash repeats the last orders. A crash between dead letter and commit writes the dead letter twice.
//! - Every failure counts as poison here: kafka_retry_dlq tells an outage apart and tries again.
//!
//! Try: `kill -9` the consumer while it works, and start it again. `RUST_LOG=debug` shows what the client does.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_pitfall_auto_commit, kafka_graceful_shutdown.

use std::io::Write;
use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use rdkafka::consumer::{CommitMode, Consumer, ConsumerContext, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedHeaders, BorrowedMessage, Header, OwnedHeaders};
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
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers);
    let producer: FutureProducer = config
        .clone()
        .set("enable.idempotence", "true")
        // The client checks this before it compresses, the broker afterwards: what could be read can be written.
        .set("compression.type", "zstd")
        .set("message.max.bytes", "1000000000")
        .set("message.timeout.ms", "30000")
        .create()?;
    let consumer: StreamConsumer<Commits> = config
        .set("group.id", GROUP)
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "true")
        .create_with_context(Commits)?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer
        .fetch_metadata(Some(TOPIC), TIMEOUT)
        .context(hint)?;
    consumer.subscribe(&[TOPIC])?;

    let worked = work(&consumer, &producer).await;
    // Leave the group, so that another member takes over at once. With the broker down, the close can hang
    // (librdkafka issue 3740): wait no longer than TIMEOUT.
    let (done, closed) = oneshot::channel();
    thread::spawn(move || {
        drop(consumer);
        done.send(())
    });
    let closed = timeout(TIMEOUT, closed).await;
    worked?;
    closed.context("closed without leaving the group: no broker answers")??;
    println!("left the group");
    Ok(())
}

/// Works on one order after another, until Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer<Commits>, producer: &FutureProducer) -> anyhow::Result<()> {
    let mut stop = pin!(shutdown());
    loop {
        // `stop` is polled first, so that its handlers are installed before any work starts. It never interrupts an order.
        let received = tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            received = consumer.recv() => received,
        };
        match received {
            Ok(order) => handle(consumer, producer, &order).await?,
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The pattern: work, or dead-letter an order that failed, and only then commit.
async fn handle(
    consumer: &StreamConsumer<Commits>,
    producer: &FutureProducer,
    order: &BorrowedMessage<'_>,
) -> anyhow::Result<()> {
    let name: String = String::from_utf8_lossy(order.payload().unwrap_or_default())
        .chars()
        .take(40)
        .collect();
    let outcome = match process(order.payload()) {
        Ok(()) => "processed".to_owned(),
        Err(reason) => {
            dead_letter(producer, order, &reason).await?;
            format!("dead-lettered: {reason}")
        }
    };
    println!(
        "partition {} offset {}: {name} {outcome}",
        order.partition(),
        order.offset()
    );
    // Commits offset + 1, the next offset to read.
    consumer.commit_message(order, CommitMode::Async)?;
    Ok(())
}

/// The work. Bytes from a topic can be anything.
fn process(payload: Option<&[u8]>) -> Result<(), String> {
    let order =
        std::str::from_utf8(payload.unwrap_or_default()).map_err(|error| error.to_string())?;
    match order {
        "" => Err("it is empty".into()),
        order if order.contains("invalid") => Err("it says that it is invalid".into()),
        _ => Ok(()),
    }
}

/// Copies the record to the dead-letter topic, with its origin and the reason in headers.
async fn dead_letter(
    producer: &FutureProducer,
    order: &BorrowedMessage<'_>,
    reason: &str,
) -> anyhow::Result<()> {
    let origin = format!("{}/{}/{}", order.topic(), order.partition(), order.offset());
    let mut headers = order
        .headers()
        .map_or_else(OwnedHeaders::new, BorrowedHeaders::detach);
    for (key, value) in [("reason", reason), ("origin", &origin)] {
        let value = Some(value);
        headers = headers.insert(Header { key, value });
    }
    let mut record = FutureRecord::<[u8], [u8]>::to(DEAD_LETTERS).headers(headers.clone());
    (record.key, record.payload) = (order.key(), order.payload());
    let mut sent = producer.send(record, TIMEOUT).await;
    if let Err((KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge), _)) = sent {
        // The headers have made it larger than the topic allows. Its origin says where the payload is.
        let record = FutureRecord::<[u8], [u8]>::to(DEAD_LETTERS).headers(headers);
        sent = producer.send(record, TIMEOUT).await;
    }
    sent.map_err(|(error, _)| error).with_context(|| {
        format!("cannot dead-letter {origin}; it is processed again after a restart")
    })?;
    Ok(())
}

/// The client reconnects by itself after these errors. Others, such as authorization, do not heal by waiting.
fn is_temporary(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::*;
    matches!(
        error.rdkafka_error_code(),
        Some(AllBrokersDown | BrokerTransportFailure | OperationTimedOut | UnknownTopicOrPartition)
    )
}

/// Learns how each commit ended.
struct Commits;

impl ClientContext for Commits {}

impl ConsumerContext for Commits {
    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        if let Err(error) = result {
            // `eprintln!` panics when standard error is closed, and a callback must not panic.
            let _ = writeln!(
                std::io::stderr(),
                "not committed, will be repeated after a restart: {error}"
            );
        }
    }
}

/// Ctrl-C, or SIGTERM, which Docker, Kubernetes and systemd send.
async fn shutdown() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupt = tokio::signal::ctrl_c() => interrupt,
        _ = terminate.recv() => Ok(()),
    }
}
