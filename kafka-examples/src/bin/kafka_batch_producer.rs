//! Send many records to Kafka: the number of records in flight sets the rate
//!
//! At most 100 messages wait for their delivery report (the window). Then the program repeats this with other windows.
//! A message counts as sent when all in-sync replicas have it. With idempotence, a retry does not write it twice.
//!
//! ```console
//! $ cargo lab run kafka_batch_producer
//! window  100: sent 1000/1000 in [..] ms, [..] messages/s
//! window    1: sent 100/100 in [..] ms, [..] messages/s
//! window   10: sent 1000/1000 in [..] ms, [..] messages/s
//! window 1000: sent 1000/1000 in [..] ms, [..] messages/s
//! a queue of 50, waiting for room: sent 1000/1000
//! a queue of 50, not waiting: sent [..]/1000
//!   [..] times: Message production error: QueueFull (Local: Queue full)
//! ```
//!
//! Notice:
//! - A batch waits `linger.ms` for more messages. So a window of W sends at most W messages per 10 ms, unless a batch is
//!   full before that.
//! - The timeout of `send` limits only the wait for room in the client's queue. With 0, a full queue refuses.
//! - When the queue is full, `send` tries again every 100 ms. Keep the window smaller than the queue (100,000).
//!
//! Try: set `linger.ms` to 0, and then to 100. Settings: KAFKA_BROKERS (localhost:9092).
//! See also: kafka_async_producer (which failures are refusals), kafka_compression.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use futures::stream::{self, StreamExt};
use rdkafka::ClientConfig;
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};

const TOPIC: &str = "test-topic";
const MESSAGES: u32 = 1000;
/// The window and the number of messages of each run. With a window of 1, each message takes `linger.ms`.
const RUNS: [(usize, u32); 4] = [(100, 1000), (1, 100), (10, 1000), (1000, 1000)];
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", &brokers)
        .set("acks", "all")
        .set("enable.idempotence", "true")
        // A batch is sent after this time, or when it has this many bytes.
        .set("linger.ms", "10")
        .set("batch.size", "16384")
        .set("message.timeout.ms", "30000");
    let producer: FutureProducer = config.create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(Some(TOPIC), TIMEOUT);
    metadata.context(tip)?;
    // The first message opens the connection, which would slow down the first window.
    send_all(&producer, 0..1, 1, TIMEOUT).await;

    let mut next = 1;
    for (window, count) in RUNS {
        let begin = Instant::now();
        let (sent, failed) = send_all(&producer, next..next + count, window, TIMEOUT).await;
        let seconds = begin.elapsed().as_secs_f64();
        let (millis, rate) = (seconds * 1000.0, f64::from(sent) / seconds);
        println!("window {window:>4}: sent {sent}/{count} in {millis:.0} ms, {rate:.0} messages/s");
        ensure!(failed.is_empty(), "not sent: {failed:?}");
        next += count;
    }
    fill_the_queue(config, next).await
}

/// The pattern: keep `window` sends in flight. Returns the number of sent messages, and the failures by cause.
async fn send_all(
    producer: &FutureProducer,
    numbers: Range<u32>,
    window: usize,
    timeout: Duration,
) -> (u32, BTreeMap<String, u32>) {
    stream::iter(numbers)
        .map(async |number| {
            let (key, payload) = (format!("key-{number}"), format!("message-{number}"));
            let record = FutureRecord::to(TOPIC).key(&key).payload(&payload);
            producer.send(record, timeout).await
        })
        // Starts the next send as soon as any report arrives.
        .buffer_unordered(window)
        .fold((0, BTreeMap::new()), async |(sent, mut failed), report| {
            let Err((error, _)) = report else {
                return (sent + 1, failed);
            };
            *failed.entry(error.to_string()).or_default() += 1;
            (sent, failed)
        })
        .await
}

/// The window is wider than the client's queue.
async fn fill_the_queue(mut config: ClientConfig, next: u32) -> anyhow::Result<()> {
    config.set("queue.buffering.max.messages", "50");
    let producer: FutureProducer = config.create()?;
    let (sent, failed) = send_all(&producer, next..next + MESSAGES, 100, TIMEOUT).await;
    println!("a queue of 50, waiting for room: sent {sent}/{MESSAGES}");
    ensure!(failed.is_empty(), "not sent: {failed:?}");

    let next = next + MESSAGES;
    let (sent, failed) = send_all(&producer, next..next + MESSAGES, 100, Duration::ZERO).await;
    println!("a queue of 50, not waiting: sent {sent}/{MESSAGES}");
    for (cause, count) in failed {
        println!("  {count} times: {cause}");
    }
    Ok(())
}
