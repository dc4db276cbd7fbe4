//! Read Kafka events whose schema grows: versions in headers, and an old consumer that meets new events
//!
//! The version of an event travels in a header, so a consumer can decide before it parses. A new minor version adds
//! fields: this consumer, written for 1.1, ignores those it doesn't know and fills in those that 1.0 lacks. A new major
//! version means something else, and what does not parse means nothing: both go to a dead-letter topic as they came,
//! with the reason. At least once: an event's offset is stored once it was handled or the broker has its dead letter.
//!
//! ```console
//! 1$ cargo lab run kafka_headers_schema
//! waiting for events; Ctrl-C ends it
//! 2$ cargo lab run kafka_headers_schema send
//! sent: order.placed 1.0
//! sent: order.placed 1.1
//! sent: order.placed 1.2
//! sent: order.placed 2.0
//! sent: order.placed 1.1, without its amount
//! sent: no version at all
//! sent: order.placed 1.1, without a payload
//! 1:
//! ...
//! offset 0, version 1.0: order-1 for 4999 cents, EUR
//! offset 1, version 1.1: order-2 for 4999 cents, USD
//! offset 2, version 1.2: order-3 for 4999 cents, JPY
//! offset 3 -> schema-events.dlq: version 2.0, and this consumer understands 1.x
//! offset 4 -> schema-events.dlq: missing field `amount` at line 1 column 22
//! offset 5 -> schema-events.dlq: no header schema-version
//! offset 6 -> schema-events.dlq: no payload
//! 1^C
//! handled 3, dead letters 4
//! ```
//!
//! Notice: the rules that let old and new run side by side are the producer's to keep. Add only fields that a reader
//! can do without; never change what a field means or its type; never reuse a name. Whatever breaks this is a new major
//! version, and goes to a new topic or waits until all consumers have learned it. Then the dead letters are replayed.
//!
//! Notice too: `#[serde(deny_unknown_fields)]` would turn every addition into a breaking change, and a missing
//! `#[serde(default)]` turns every old event into an error.
//!
//! Try: write 3.x of the event, and first a consumer that reads 2.0 and 1.x both.
//!
//! Settings: KAFKA_BROKERS (localhost:9092); `send` as the argument sends the events.
//! See also: kafka_retry_dlq, kafka_dlq_replay.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{CommitMode, Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Header, Headers, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message};
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};

const TOPIC: &str = "schema-events";
const DEAD_LETTERS: &str = "schema-events.dlq";
const GROUP: &str = "schema-reader";
const PATIENCE: Duration = Duration::from_secs(5);
/// Time for the last commit.
const LEAVING: Duration = Duration::from_secs(15);
/// The name of the header, and the major version that this program was written for.
const VERSION: &str = "schema-version";
const MAJOR: u32 = 1;
/// What a record may hold at most. A dead letter carries more than its original, the reason and the origin, and another
/// compression may have done better.
const RECORD_BYTES: &str = "1048576";
const LETTER_BYTES: &str = "4194304";

/// The event as of version 1.1.
#[derive(Deserialize)]
struct OrderPlaced {
    order_id: String,
    amount: i64,
    /// New in 1.1. Until then there was only one.
    #[serde(default = "euro")]
    currency: String,
}

fn euro() -> String {
    "EUR".into()
}

#[tokio::main]
async fn main() -> Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let argument = std::env::args().nth(1);
    create_topics(&brokers).await?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("acks", "all")
        .set("enable.idempotence", "true")
        // Long enough for a broker to restart.
        .set("message.timeout.ms", "30000")
        // The broker's limit is for what is compressed, the client's for what is not: an event that was small enough
        // for the one can be too large for the other, and would end this program again and again.
        .set("compression.type", "zstd")
        .set("message.max.bytes", "1000000000")
        .create()?;
    match argument.as_deref() {
        None => consume(&brokers, &producer).await,
        Some("send") => send(&producer).await,
        Some(other) => bail!("the argument is `send` or nothing, and not {other}"),
    }
}

async fn send(producer: &FutureProducer) -> Result<()> {
    let events = [
        (
            "order.placed 1.0",
            Some("1.0"),
            Some(r#"{"order_id":"order-1","amount":4999}"#),
        ),
        (
            "order.placed 1.1",
            Some("1.1"),
            Some(r#"{"order_id":"order-2","amount":4999,"currency":"USD"}"#),
        ),
        (
            "order.placed 1.2",
            Some("1.2"),
            Some(r#"{"order_id":"order-3","amount":4999,"currency":"JPY","gift":true}"#),
        ),
        // The same name, another meaning: read as 1.x, it would charge a hundredth.
        (
            "order.placed 2.0",
            Some("2.0"),
            Some(r#"{"order_id":"order-4","amount":{"units":49,"nanos":990000000}}"#),
        ),
        (
            "order.placed 1.1, without its amount",
            Some("1.1"),
            Some(r#"{"order_id":"order-5"}"#),
        ),
        (
            "no version at all",
            None,
            Some(r#"{"order_id":"order-6","amount":4999}"#),
        ),
        ("order.placed 1.1, without a payload", Some("1.1"), None),
    ];
    for (what, version, payload) in events {
        let mut headers = OwnedHeaders::new().insert(Header {
            key: "event-type",
            value: Some("order.placed"),
        });
        if version.is_some() {
            headers = headers.insert(Header {
                key: VERSION,
                value: version,
            });
        }
        // One key, hence one partition: they arrive in this order.
        let mut record = FutureRecord::<str, str>::to(TOPIC)
            .key("user-1")
            .headers(headers);
        record.payload = payload;
        let delivery = producer
            .send(record, PATIENCE)
            .await
            .map_err(|(error, _)| error);
        delivery.with_context(|| format!("{what}: no delivery report"))?;
        println!("sent: {what}");
    }
    Ok(())
}

async fn consume(brokers: &str, producer: &FutureProducer) -> Result<()> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "true")
        // Auto commit commits what is stored, and that is up to us.
        .set("enable.auto.offset.store", "false")
        .set("session.timeout.ms", "10000")
        .set("socket.timeout.ms", "5000")
        .create()?;
    consumer.subscribe(&[TOPIC])?;
    let handled = handle(&consumer, producer).await;
    let left = leave(consumer);
    let (handled, letters) = handled?;
    left?;
    println!("handled {handled}, dead letters {letters}");
    Ok(())
}

/// Until Ctrl-C; returns how many events were handled, and how many became dead letters.
async fn handle(consumer: &StreamConsumer, producer: &FutureProducer) -> Result<(u32, u32)> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for Ctrl-C")?;
    println!("waiting for events; Ctrl-C ends it");

    let (mut handled, mut letters) = (0, 0);
    loop {
        let received = tokio::select! {
            _ = interrupt.recv() => break,
            received = consumer.recv() => received,
        };
        let message = match received {
            Ok(message) => message,
            Err(error @ KafkaError::MessageConsumptionFatal(_)) => bail!(error),
            Err(error) => {
                eprintln!("waiting for the broker: {error}");
                continue;
            }
        };
        let offset = message.offset();
        match parse(&message) {
            Ok((version, event)) => {
                let OrderPlaced {
                    order_id,
                    amount,
                    currency,
                } = event;
                println!(
                    "offset {offset}, version {version}: {order_id} for {amount} cents, {currency}"
                );
                handled += 1;
            }
            Err(reason) => {
                let reason = format!("{reason:#}");
                // If this fails, the program ends with the offset not stored: the event comes again.
                dead_letter(producer, &message, &reason).await?;
                println!("offset {offset} -> {DEAD_LETTERS}: {reason}");
                letters += 1;
            }
        }
        consumer.store_offset_from_message(&message)?;
    }
    Ok((handled, letters))
}

/// Commits what is done and leaves the group: the others take over now and not after session.timeout.ms.
///
/// With the broker gone, either takes as long as that time, and sometimes never ends (librdkafka 2.12; see its issue 3740
/// for the close). Hence a thread that can be left behind.
fn leave(consumer: StreamConsumer) -> anyhow::Result<()> {
    let (done, answers) = mpsc::channel();
    thread::spawn(move || {
        done.send(consumer.commit_consumer_state(CommitMode::Sync))?;
        drop(consumer);
        done.send(Ok(()))
    });
    let committed = answers.recv_timeout(LEAVING);
    if committed.is_err() || answers.recv_timeout(PATIENCE).is_err() {
        eprintln!("left without a word to the group: no broker answers");
    }
    match committed {
        // No offset: all was committed already.
        Ok(Ok(()) | Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset))) => Ok(()),
        Ok(Err(error)) => bail!("the last events will be handled again: {error}"),
        Err(_) => bail!("the last events will be handled again, unless the commit has arrived"),
    }
}

/// The version and the event, or why there is none that this program understands.
fn parse(message: &BorrowedMessage<'_>) -> Result<(String, OrderPlaced)> {
    let version = header(message, VERSION)?.context("no header schema-version")?;
    let major = version
        .split('.')
        .next()
        .and_then(|major| major.parse().ok());
    match major {
        Some(MAJOR) => {}
        Some(_) => bail!("version {version}, and this consumer understands {MAJOR}.x"),
        None => bail!("{version:?} is no version"),
    }
    let payload = message.payload().context("no payload")?;
    Ok((version, serde_json::from_slice(payload)?))
}

/// A header's value as text. A name may occur more than once; the last one counts.
fn header(message: &BorrowedMessage<'_>, name: &str) -> Result<Option<String>> {
    let Some(headers) = message.headers() else {
        return Ok(None);
    };
    // The crate panics on a header whose name is not UTF-8, which any other client can write.
    let last = catch_unwind(AssertUnwindSafe(|| {
        headers.iter().filter(|header| header.key == name).last()
    }));
    let Ok(last) = last else {
        bail!("the name of a header is not UTF-8");
    };
    let Some(value) = last.and_then(|header| header.value) else {
        return Ok(None);
    };
    let text = std::str::from_utf8(value).with_context(|| format!("header {name}"))?;
    Ok(Some(text.to_owned()))
}

/// Writes an event as it came, with the reason and the place where it was.
async fn dead_letter(
    producer: &FutureProducer,
    message: &BorrowedMessage<'_>,
    reason: &str,
) -> Result<()> {
    let (topic, partition, offset) = (message.topic(), message.partition(), message.offset());
    let origin = format!("{topic}/{partition}/{offset}");
    // A copy of all headers, also of those that cannot be read here.
    let headers = message
        .headers()
        .map_or_else(OwnedHeaders::new, |headers| headers.detach())
        .insert(Header {
            key: "dlq-reason",
            value: Some(reason),
        })
        .insert(Header {
            key: "dlq-origin",
            value: Some(&origin),
        });
    let mut record = FutureRecord::<[u8], [u8]>::to(DEAD_LETTERS).headers(headers);
    record.key = message.key();
    record.payload = message.payload();
    let delivery = producer
        .send(record, PATIENCE)
        .await
        .map_err(|(error, _)| error);
    delivery.with_context(|| {
        format!("{origin} is bad ({reason}) and its dead letter was not delivered")
    })?;
    Ok(())
}

/// Left to the broker, the topics would have its limits, and a large event would not fit among the dead letters.
async fn create_topics(brokers: &str) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    // It blocks, but nothing else runs yet.
    admin
        .inner()
        .fetch_metadata(None, PATIENCE)
        .with_context(|| {
            format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one")
        })?;
    // -1 is the broker's default replication factor.
    let topics = [(TOPIC, RECORD_BYTES), (DEAD_LETTERS, LETTER_BYTES)].map(|(name, bytes)| {
        NewTopic::new(name, 1, TopicReplication::Fixed(-1)).set("max.message.bytes", bytes)
    });
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin.create_topics(&topics, &options).await {
        Ok(results) => {
            for result in results {
                match result {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                    Err((topic, code)) => bail!("cannot create topic {topic}: {code}"),
                }
            }
        }
        // Not every cluster lets its clients create topics; librdkafka's mock does not.
        Err(error) => eprintln!("leaving the topics to the broker: {error}"),
    }
    Ok(())
}
