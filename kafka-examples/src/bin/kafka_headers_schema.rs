//! Read Kafka events whose schema grows: the version in a header, and an old consumer that meets new events
//!
//! The version is in a header, so the consumer decides before it parses. A new minor version adds fields. This consumer,
//! written for 1.1, ignores fields that it does not know, and fills in those that 1.0 lacks. A new major version has
//! another meaning: it is dead-lettered unchanged, like a malformed event, and only then committed (at least once).
//!
//! ```console
//! 1$ cargo lab run kafka_send -p 0 -H schema-version=1.0 schema-events '{"order_id":"a","amount":4999}'
//! ...
//! 1$ cargo lab run kafka_send -p 0 -H schema-version=1.2 schema-events '{"order_id":"b","amount":1,"currency":"JPY","n":1}'
//! ...
//! 1$ cargo lab run kafka_send -p 0 -H schema-version=2.0 schema-events '{"order_id":"c","amount":{"units":49}}'
//! ...
//! 2$ cargo lab run kafka_headers_schema
//! partition 0 offset 0: version 1.0: a for 4999 cents, EUR
//! partition 0 offset 1: version 1.2: b for 1 cents, JPY
//! partition 0 offset 2: dead-lettered: version 2.0, this consumer reads 1.x
//! 2^C
//! left the group
//! ```
//!
//! Notice:
//! - Rules for the producer: add only fields that a reader can do without, never change a meaning, never reuse a name.
//! - A new major version needs another topic, or consumers that read both. After that, send the dead letters again.
//! - `deny_unknown_fields` would make each new field a breaking change. A missing `default` would refuse each old event.
//! - Every failure counts as poison here: kafka_retry_dlq tells an outage apart.
//!
//! Try: read 2.0 as well as 1.x. Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_manual_commit.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedHeaders, BorrowedMessage, Header, Headers, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message};
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;

const TOPIC: &str = "schema-events";
const DEAD_LETTERS: &str = "schema-events.dlq";
const GROUP: &str = "schema-reader";
const VERSION_HEADER: &str = "schema-version";
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
    let consumer: StreamConsumer = config
        .set("group.id", GROUP)
        // Stored offsets are committed every 5 s, and at the end.
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "true")
        .create()?;
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

async fn work(consumer: &StreamConsumer, producer: &FutureProducer) -> anyhow::Result<()> {
    let mut stop = pin!(shutdown());
    loop {
        let received = tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            received = consumer.recv() => received,
        };
        match received {
            Ok(event) => handle(consumer, producer, &event).await?,
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
}

async fn handle(
    consumer: &StreamConsumer,
    producer: &FutureProducer,
    event: &BorrowedMessage<'_>,
) -> anyhow::Result<()> {
    let outcome = match parse(event) {
        Ok((version, order)) => {
            let OrderPlaced {
                order_id,
                amount,
                currency,
            } = order;
            format!("version {version}: {order_id} for {amount} cents, {currency}")
        }
        Err(error) => {
            let reason: String = format!("{error:#}").chars().take(200).collect();
            dead_letter(producer, event, &reason).await?;
            format!("dead-lettered: {reason}")
        }
    };
    println!(
        "partition {} offset {}: {outcome}",
        event.partition(),
        event.offset()
    );
    if let Err(error) = consumer.store_offset_from_message(event) {
        println!("partition lost, the event is delivered again: {error}");
    }
    Ok(())
}

/// The event as of version 1.1.
#[derive(Deserialize)]
struct OrderPlaced {
    order_id: String,
    amount: i64,
    /// New in 1.1. Before that all amounts were in euros.
    #[serde(default = "euro")]
    currency: String,
}

fn euro() -> String {
    "EUR".into()
}

/// The pattern: the version decides whether the payload is parsed.
fn parse(event: &BorrowedMessage<'_>) -> anyhow::Result<(String, OrderPlaced)> {
    let version = version(event)?.context("no header schema-version")?;
    let major = version.split('.').next();
    ensure!(
        major == Some("1"),
        "version {version}, this consumer reads 1.x"
    );
    let order = serde_json::from_slice(event.payload().context("no payload")?)?;
    Ok((version, order))
}

/// A header can occur more than once: the last counts.
fn version(event: &BorrowedMessage<'_>) -> anyhow::Result<Option<String>> {
    // The crate panics on a name that is not UTF-8. Other clients can write such names.
    let last = catch_unwind(AssertUnwindSafe(|| {
        let version = |header: &Header<'_, &[u8]>| header.key == VERSION_HEADER;
        event.headers()?.iter().filter(version).last()?.value
    }));
    let last = last.map_err(|_| anyhow!("the name of a header is not UTF-8"))?;
    Ok(last
        .map(|value| String::from_utf8(value.to_vec()))
        .transpose()?)
}

/// Copies the event to the dead-letter topic, with its origin and the reason in headers.
async fn dead_letter(
    producer: &FutureProducer,
    event: &BorrowedMessage<'_>,
    reason: &str,
) -> anyhow::Result<()> {
    let origin = format!("{TOPIC}/{}/{}", event.partition(), event.offset());
    let mut headers = event
        .headers()
        .map_or_else(OwnedHeaders::new, BorrowedHeaders::detach);
    for (key, value) in [("reason", reason), ("origin", &origin)] {
        let value = Some(value);
        headers = headers.insert(Header { key, value });
    }
    let mut record = FutureRecord::<[u8], [u8]>::to(DEAD_LETTERS).headers(headers.clone());
    (record.key, record.payload) = (event.key(), event.payload());
    let mut sent = producer.send(record, TIMEOUT).await;
    if let Err((KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge), _)) = sent {
        // The headers have made it larger than the topic allows. Its origin says where the payload is.
        let mut record = FutureRecord::<[u8], [u8]>::to(DEAD_LETTERS).headers(headers);
        record.key = event.key();
        sent = producer.send(record, TIMEOUT).await;
    }
    sent.map_err(|(error, _)| error).with_context(|| {
        format!("cannot dead-letter {origin}; it is read again after a restart")
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

/// Ctrl-C, or SIGTERM, which Docker, Kubernetes and systemd send.
async fn shutdown() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupt = tokio::signal::ctrl_c() => interrupt,
        _ = terminate.recv() => Ok(()),
    }
}
