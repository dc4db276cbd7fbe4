//! Retry later without blocking: a topic per delay, exponential backoff with jitter, then the dead-letter topic
//!
//! A payment that fails moves to a retry topic and waits there, while other payments are handled. After five attempts
//! it moves to the dead-letter topic. A malformed payment moves there immediately. At least once: a record is committed
//! after it was paid, or after its copy was written. The order of payments is lost.
//!
//! ```console
//! $ cargo lab run kafka_send -p 0 retry-dlq.payments '{"fails":0}' '{"fails":1}' '{'
//! ...
//! $ cargo lab run kafka_retry_dlq
//! {"fails":0}: paid at attempt 1
//! {"fails":1}: attempt 1 failed: the bank does not answer; moved to retry-dlq.payments.retry-1
//! {: attempt 1 failed: EOF while parsing an object[..]; moved to retry-dlq.payments.dlq
//! {"fails":1}: paid at attempt 2
//! ^C
//! ```
//!
//! Notice:
//! - A sleep would block the partition. A sleep beyond `max.poll.interval.ms` would remove the member from the group.
//! - In a retry topic, the timestamp is the time of the next attempt. By default the broker allows an hour ahead.
//! - A copy that the broker refuses as too large moves to the dead-letter topic, without key and payload.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_dlq_replay, kafka_production_worker.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures::{FutureExt, future};
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode::*};
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
/// A partition, and the time at which it is resumed.
type Paused = (Instant, TopicPartitionList);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let (consumer, producer) = clients(&brokers)?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    for topic in TOPICS {
        // Creates a topic that is missing, if that is allowed.
        let metadata = consumer.fetch_metadata(Some(topic), TIMEOUT);
        metadata.context(tip.clone())?;
    }
    consumer.subscribe(&TOPICS[..DEAD_LETTERS])?;

    let worked = work(&consumer, &producer).await;
    // Commits and leaves the group. With the broker down, this can hang (librdkafka issue 3740).
    let (open, closed) = oneshot::channel::<()>();
    thread::spawn(move || drop((consumer, open)));
    let closed = timeout(TIMEOUT, closed).await;
    worked?;
    closed.map(drop).context("cannot close: no broker answers")
}

/// Handles one record after another. Ends with Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer, producer: &FutureProducer) -> anyhow::Result<()> {
    let mut paused: Vec<Paused> = Vec::new();
    let mut tick = interval(Duration::from_millis(50));
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    loop {
        let received = tokio::select! {
            biased;
            _ = &mut stop => return Ok(()),
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
                    // Fails when the partition was lost: its new owner handles the record again.
                    let _ = consumer.store_offset_from_message(&record);
                }
            },
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The pattern: a record that is not due is put back, and its partition is paused until then. Polling continues, so
/// other partitions are handled, and the group keeps this member.
fn put_back(consumer: &StreamConsumer, record: &BorrowedMessage<'_>) -> Option<Paused> {
    let (topic, partition, offset) = (record.topic(), record.partition(), record.offset());
    let left = record.timestamp().to_millis()?.saturating_sub(now());
    // More than MAX_DELAY_MS: the clock of the producer is wrong.
    if topic == TOPICS[0] || !(1..=MAX_DELAY_MS).contains(&left) {
        return None;
    }
    let mut list = TopicPartitionList::new();
    list.add_partition(topic, partition);
    // If a call fails, the record is handled early, and perhaps twice.
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
    let Err((mut next, reason)) = pay(record.payload(), attempt) else {
        println!("{name}: paid at attempt {attempt}");
        return Ok(());
    };
    let mut moved = copy(record, next, &reason, true, producer).await;
    if moved == Err(KafkaError::MessageProduction(MessageSizeTooLarge)) {
        // The header `origin` says where key and payload are.
        next = DEAD_LETTERS;
        moved = copy(record, next, &reason, false, producer).await;
    }
    let next = TOPICS[next];
    moved.with_context(|| format!("cannot write to {next}"))?;
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
    whole: bool,
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
    let mut copy = FutureRecord::<[u8], [u8]>::to(TOPICS[next]).headers(headers);
    copy.key = record.key().filter(|_| whole);
    copy.payload = record.payload().filter(|_| whole);
    if next < DEAD_LETTERS {
        let delay = MAX_DELAY_MS.min(FIRST_DELAY_MS << (next - 1));
        // Without jitter, all payments that failed together would be tried again together.
        copy.timestamp = Some(now() + fastrand::i64(delay / 2..=delay));
    }
    let sent = producer.send(copy, TIMEOUT).await;
    sent.map(drop).map_err(|(error, _)| error)
}

fn now() -> i64 {
    Timestamp::now().to_millis().unwrap_or(0)
}

fn clients(brokers: &str) -> KafkaResult<(StreamConsumer, FutureProducer)> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("message.timeout.ms", "30000")
        // The client checks the size before compression, the broker after it. So allow any size here.
        .set("compression.type", "zstd")
        .set("message.max.bytes", "1000000000")
        .create()?;
    let consumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "true")
        // Finds topics that are created later.
        .set("topic.metadata.refresh.interval.ms", "1000")
        .set("enable.auto.offset.store", "false")
        .set("auto.commit.interval.ms", "1000")
        // Each pause discards prefetched records, so prefetch less.
        .set("queued.max.messages.kbytes", "1024")
        .create()?;
    Ok((consumer, producer))
}

/// The client recovers from these errors by itself. Others, such as a missing permission, are final.
fn is_temporary(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    matches!(code, Some(AllBrokersDown | Resolve | OperationTimedOut))
        || matches!(code, Some(BrokerTransportFailure | UnknownTopicOrPartition))
}
