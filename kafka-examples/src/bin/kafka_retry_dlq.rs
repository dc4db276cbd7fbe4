//! Retry later without blocking: a topic per delay, exponential backoff with jitter, then the dead-letter topic
//!
//! A payment that fails moves to a retry topic and waits there, while other payments are handled. After five attempts,
//! or at once if no attempt can help, it moves to the dead-letter topic. At least once: a record is committed after it
//! was paid, or after its copy was written. The order of payments is lost.
//!
//! ```console
//! $ cargo lab run kafka_send -p 0 retry-dlq.payments '{"fails":0}' '{"fails":2}' '{'
//! ...
//! $ cargo lab run kafka_retry_dlq
//! {"fails":0}: paid at attempt 1
//! {"fails":2}: attempt 1 failed: the bank does not answer; moved to retry-dlq.payments.retry-1
//! {: attempt 1 failed: EOF while parsing an object[..]; moved to retry-dlq.payments.dlq
//! {"fails":2}: attempt 2 failed: the bank does not answer; moved to retry-dlq.payments.retry-2
//! {"fails":2}: paid at attempt 3
//! ^C
//! left the group
//! ```
//!
//! Notice:
//! - To sleep in place would block the partition, and beyond `max.poll.interval.ms` it would cost the membership.
//! - The timestamp of a record in a retry topic says when it is due: at most an hour ahead, by the broker's default.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_dlq_replay, kafka_production_worker.

use std::pin::pin;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Header, Timestamp};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{interval, timeout};

/// The topic of each attempt, and the dead-letter topic.
const TOPICS: [&str; 6] = [
    "retry-dlq.payments",
    "retry-dlq.payments.retry-1",
    "retry-dlq.payments.retry-2",
    "retry-dlq.payments.retry-3",
    "retry-dlq.payments.retry-4",
    "retry-dlq.payments.dlq",
];
const DEAD_LETTERS: usize = TOPICS.len() - 1;
const GROUP: &str = "retry-dlq.payer";
/// Before attempt 2. It doubles with each attempt, up to the maximum.
const FIRST_DELAY_MS: i64 = 100;
const MAX_DELAY_MS: i64 = 500;
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let (consumer, producer) = clients(&brokers)?;
    for topic in TOPICS {
        // Creates a topic that is missing, if that is allowed.
        let metadata = consumer.fetch_metadata(Some(topic), TIMEOUT);
        metadata.with_context(|| {
            format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one")
        })?;
    }
    consumer.subscribe(&TOPICS[..DEAD_LETTERS])?;

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

/// Handles one record after another, until Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer, producer: &FutureProducer) -> anyhow::Result<()> {
    let mut paused: Vec<(Instant, TopicPartitionList)> = Vec::new();
    let mut tick = interval(Duration::from_millis(50));
    let mut stop = pin!(shutdown());
    loop {
        let received = tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            _ = tick.tick() => {
                paused.retain(|(due, at)| Instant::now() < *due || consumer.resume(at).is_err());
                continue;
            }
            received = consumer.recv() => received,
        };
        match received {
            Ok(record) => match put_back(consumer, &record) {
                Some(until) => paused.push(until),
                None => {
                    handle(&record, producer).await?;
                    // It fails when the partition was lost: its next owner handles the record again.
                    let _ = consumer.store_offset_from_message(&record);
                }
            },
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The pattern: a record that is not due is put back, and its partition is paused until then. The polling continues: other
/// partitions are handled, and the group sees that this member is alive.
fn put_back(
    consumer: &StreamConsumer,
    record: &BorrowedMessage<'_>,
) -> Option<(Instant, TopicPartitionList)> {
    let (topic, partition, offset) = (record.topic(), record.partition(), record.offset());
    let left = record.timestamp().to_millis()?.saturating_sub(now());
    // More than MAX_DELAY_MS: the clock that has set the timestamp is wrong.
    if topic == TOPICS[0] || !(1..=MAX_DELAY_MS).contains(&left) {
        return None;
    }
    let mut list = TopicPartitionList::new();
    list.add_partition(topic, partition);
    // If one of these fails, the record is handled too early, which harms nothing.
    let sought = consumer.seek(topic, partition, Offset::Offset(offset), TIMEOUT);
    sought.and_then(|()| consumer.pause(&list)).ok()?;
    let left = Duration::from_millis(left.unsigned_abs());
    Some((Instant::now() + left, list))
}

/// Pays, or moves the payment to the topic of its next attempt or to the dead-letter topic.
async fn handle(record: &BorrowedMessage<'_>, producer: &FutureProducer) -> anyhow::Result<()> {
    let stage = TOPICS.iter().position(|topic| *topic == record.topic());
    let attempt = stage.unwrap_or(0) + 1;
    let name = String::from_utf8_lossy(record.payload().unwrap_or_default());
    let name: String = name.chars().take(40).collect();
    let Err((next, reason)) = pay(record.payload(), attempt) else {
        println!("{name}: paid at attempt {attempt}");
        return Ok(());
    };
    let moved = copy(record, next, &reason, producer).await;
    moved.with_context(|| format!("cannot write to {}", TOPICS[next]))?;
    let next = TOPICS[next];
    println!("{name}: attempt {attempt} failed: {reason}; moved to {next}");
    Ok(())
}

/// The work. Simulated: a real payment has no field `fails`. An error names the next topic and the reason.
fn pay(payload: Option<&[u8]>, attempt: usize) -> Result<(), (usize, String)> {
    #[derive(Deserialize)]
    struct Payment {
        fails: usize,
    }
    match serde_json::from_slice::<Payment>(payload.unwrap_or_default()) {
        Ok(payment) if payment.fails < attempt => Ok(()),
        Ok(_) => Err((attempt, "the bank does not answer".into())),
        // No attempt can succeed.
        Err(error) => Err((DEAD_LETTERS, error.to_string().chars().take(200).collect())),
    }
}

/// Writes a copy, and returns when all in-sync replicas have it.
async fn copy(
    record: &BorrowedMessage<'_>,
    next: usize,
    reason: &str,
    producer: &FutureProducer,
) -> KafkaResult<()> {
    let (topic, partition, offset) = (record.topic(), record.partition(), record.offset());
    let origin = format!("{topic}/{partition}/{offset}");
    let origin = (topic == TOPICS[0]).then_some(("origin", &*origin));
    let reason = (next == DEAD_LETTERS).then_some(("reason", reason));
    let mut headers = record.headers().map(|all| all.detach()).unwrap_or_default();
    for (key, value) in origin.into_iter().chain(reason) {
        let value = Some(value);
        headers = headers.insert(Header { key, value });
    }
    let mut copy = FutureRecord::<[u8], [u8]>::to(TOPICS[next]).headers(headers.clone());
    (copy.key, copy.payload) = (record.key(), record.payload());
    if next < DEAD_LETTERS {
        let delay = MAX_DELAY_MS.min(FIRST_DELAY_MS << (next - 1));
        // Without jitter, all payments that failed together would be tried again together.
        copy.timestamp = Some(now() + fastrand::i64(delay / 2..=delay));
    }
    let mut sent = producer.send(copy, TIMEOUT).await;
    let too_large = KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge);
    if sent.as_ref().is_err_and(|(error, _)| *error == too_large) {
        // The headers have made it too large. `origin` says where key and payload are.
        let copy = FutureRecord::<[u8], [u8]>::to(TOPICS[DEAD_LETTERS]);
        sent = producer.send(copy.headers(headers), TIMEOUT).await;
    }
    sent.map(drop).map_err(|(error, _)| error)
}

fn now() -> i64 {
    Timestamp::now().to_millis().unwrap_or(0)
}

fn clients(brokers: &str) -> KafkaResult<(StreamConsumer, FutureProducer)> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    let producer = config
        .clone()
        .set("message.timeout.ms", "30000")
        // The client checks the size before it compresses, the broker afterwards.
        .set("compression.type", "zstd")
        .set("message.max.bytes", "1000000000")
        .create()?;
    let consumer = config
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "true")
        // Topics that were not there at the start are noticed after this time.
        .set("topic.metadata.refresh.interval.ms", "1000")
        .set("enable.auto.offset.store", "false")
        .set("auto.commit.interval.ms", "1000")
        // Each pause drops the records that were read ahead: read less ahead.
        .set("queued.max.messages.kbytes", "1024")
        .create()?;
    Ok((consumer, producer))
}

/// The client reconnects by itself after these errors. Others (authorization, group protocol) do not heal by waiting.
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
