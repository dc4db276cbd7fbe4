//! Produce many records to Kafka, and see that the window in flight sets the rate
//!
//! Sends 1000 messages with at most 100 unreported at a time, then does it again with other windows. A message counts
//! as sent when all in-sync replicas have it; idempotence keeps retries from writing it twice. What could not be sent is
//! counted by cause, and makes the program fail.
//!
//! ```console
//! $ cargo lab run kafka_batch_producer
//! window  100: sent 1000/1000 in [..] ms, [..] messages/s
//! window    1: sent 100/100 in [..] ms, [..] messages/s
//! window   10: sent 1000/1000 in [..] ms, [..] messages/s
//! window 1000: sent 1000/1000 in [..] ms, [..] messages/s
//! a queue of 50, waiting for room: sent 1000/1000
//! a queue of 50, timeout 0: sent [..]/1000
//!   [..] times: Message production error: QueueFull (Local: Queue full)
//! ```
//!
//! Notice: a batch waits `linger.ms` for company, so each message takes at least those 10 ms, and a window of W messages
//! cannot pass more than W per 10 ms: about 100 messages/s one by one, 10 000/s with a hundred in flight. `batch.size`
//! never mattered: ten milliseconds' worth of these messages do not fill 16 KB. A wider window is the faster program;
//! a shorter linger helps only where the window is narrow.
//!
//! Notice too: the timeout of `send` is about room in the client's own queue. At 0, a full queue refuses the message at
//! once. Above 0 `send` looks again every 100 ms, which is slow: keep the window smaller than the queue instead.
//!
//! Try: set `linger.ms` to 0, then to 100. Set the window of 1000 to 100 000, with as many messages.
//!
//! Settings: KAFKA_BROKERS (localhost:9092).
//! See also: kafka_async_producer, kafka_compression, kafka_reconnect.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use futures::stream::{self, StreamExt};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::producer::{FutureProducer, FutureRecord};

const TOPIC: &str = "test-topic";
const PARTITIONS: i32 = 3;
const MESSAGES: u32 = 1000;
const WINDOW: usize = 100;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    create_topic(&brokers).await?;
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", &brokers)
        .set("acks", "all")
        .set("enable.idempotence", "true")
        // How long a batch waits for more, and the bytes at which it does not wait.
        .set("linger.ms", "10")
        .set("batch.size", "16384")
        .set("message.timeout.ms", "30000");
    let producer: FutureProducer = config.create()?;
    // The first record opens the connection; without it, the first window would pay for that.
    send_all(&producer, 0..1, 1, PATIENCE).await;

    let mut next = 1;
    let mut complete = true;
    // One at a time, a thousand messages would take ten seconds: a hundred show it as well.
    for (window, count) in [
        (WINDOW, MESSAGES),
        (1, 100),
        (10, MESSAGES),
        (1000, MESSAGES),
    ] {
        let begin = Instant::now();
        let outcome = send_all(&producer, next..next + count, window, PATIENCE).await;
        let seconds = begin.elapsed().as_secs_f64();
        let (sent, millis) = (outcome.sent, seconds * 1000.0);
        let rate = f64::from(sent) / seconds;
        println!("window {window:>4}: sent {sent}/{count} in {millis:.0} ms, {rate:.0} messages/s");
        complete &= outcome.report();
        next += count;
    }

    // A window wider than the client's queue, which by default holds 100 000 messages.
    config.set("queue.buffering.max.messages", "50");
    let narrow: FutureProducer = config.create()?;
    let outcome = send_all(&narrow, next..next + MESSAGES, WINDOW, PATIENCE).await;
    println!(
        "a queue of 50, waiting for room: sent {}/{MESSAGES}",
        outcome.sent
    );
    complete &= outcome.report();
    next += MESSAGES;
    let outcome = send_all(&narrow, next..next + MESSAGES, WINDOW, Duration::ZERO).await;
    println!("a queue of 50, timeout 0: sent {}/{MESSAGES}", outcome.sent);
    outcome.report(); // refused on purpose

    ensure!(complete, "{brokers} did not confirm all messages");
    Ok(())
}

/// What became of a series of messages.
#[derive(Default)]
struct Outcome {
    sent: u32,
    failed: BTreeMap<String, u32>,
}

impl Outcome {
    /// Prints the causes of failure; true if there were none.
    fn report(&self) -> bool {
        for (error, count) in &self.failed {
            println!("  {count} times: {error}");
        }
        self.failed.is_empty()
    }
}

/// Sends a message per number, each with its own key, and waits for all reports.
async fn send_all(
    producer: &FutureProducer,
    numbers: Range<u32>,
    window: usize,
    patience: Duration,
) -> Outcome {
    stream::iter(numbers)
        .map(async |number| {
            let (key, payload) = (format!("key-{number}"), format!("message-{number}"));
            let record = FutureRecord::to(TOPIC).key(&key).payload(&payload);
            producer.send(record, patience).await
        })
        // Starts the next send as soon as any of those in flight is reported, in whatever order.
        .buffer_unordered(window)
        .fold(Outcome::default(), async |mut outcome, delivery| {
            match delivery {
                Ok(_) => outcome.sent += 1,
                Err((error, _)) => *outcome.failed.entry(error.to_string()).or_default() += 1,
            }
            outcome
        })
        .await
}

/// Left to the broker, the first record would create the topic with the broker's default, often a single partition.
async fn create_topic(brokers: &str) -> anyhow::Result<()> {
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
    let topic = NewTopic::new(TOPIC, PARTITIONS, TopicReplication::Fixed(-1));
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin.create_topics([&topic], &options).await {
        Ok(results) => {
            for result in results {
                match result {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                    Err((topic, code)) => anyhow::bail!("cannot create topic {topic}: {code}"),
                }
            }
        }
        // Not every cluster lets its clients create topics; librdkafka's mock does not.
        Err(error) => eprintln!("leaving topic {TOPIC} to the broker: {error}"),
    }
    Ok(())
}
