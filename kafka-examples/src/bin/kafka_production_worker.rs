//! A worker to start a service from: typed messages, retries, dead letters, metrics, a clean end
//!
//! Write your message type and your action below the line "yours from here". At least once, and in no order: a record is
//! committed when `handle` returned `Done`, or when a copy of it is in a retry topic (`Retry`, without a limit) or in the
//! dead-letter topic (`Dead`, malformed, or a panic in `handle`).
//!
//! ```console
//! $ cargo lab run kafka_send worker-orders '{"order_id":1,"amount_cents":500}' '{"order_id":"two"}'
//! ...
//! $ RECEIPTS=/nowhere cargo lab run kafka_production_worker
//! ...
//! worker-orders.retry-1s/[..]: retry No such file or directory (os error 2)
//! ...
//! ^C
//! ```
//!
//! Notice:
//! - A crash repeats the orders of the last second and the orders that are being handled. A rebalance repeats only these.
//! - Each of the four topics has 16 orders in work. If one waits for a minute, it is retried; the orders after them wait.
//! - It ends if the broker refuses a copy. Create its topics first, also the last one, `worker-orders.dlq`.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), METRICS_PORT (none), RECEIPTS (.), RUST_LOG. See also: kafka_retry_dlq.

use std::time::{Duration, Instant};

use Outcome::{Dead, Done, Retry};
use anyhow::Context;
use futures::{FutureExt, StreamExt, TryStreamExt, future};
use metrics::{counter, gauge, histogram};
use metrics_exporter_prometheus::PrometheusBuilder;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode::*};
use rdkafka::message::{BorrowedMessage as Record, Header, Timestamp};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};
use tracing::{Instrument, info_span};

/// How long a record waits in the topic with this suffix. After the last topic, the next is the last topic again.
const DELAYS_MS: [u64; 4] = [0, 1000, 10_000, 60_000];
const SUFFIXES: [&str; 4] = ["", ".retry-1s", ".retry-10s", ".retry-60s"];
const CONCURRENCY: usize = 16;
const HANDLE_LIMIT: Duration = Duration::from_secs(60);
const TIMEOUT: Duration = Duration::from_secs(5);

enum Outcome {
    Done,
    /// Something outside failed, for example a server is down.
    Retry(String),
    /// The message itself is wrong, so no attempt can succeed.
    Dead(String),
}

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let ended = runtime.block_on(run());
    runtime.shutdown_background(); // does not wait for a blocking call in `handle` that hangs
    ended
}

async fn run() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    if let Ok(port) = std::env::var("METRICS_PORT") {
        let port: u16 = port.parse().context("METRICS_PORT is a port")?;
        let exporter = PrometheusBuilder::new().with_http_listener(([127, 0, 0, 1], port));
        exporter.set_buckets(&[0.01, 0.1, 1.0, 10.0])?.install()?;
    }
    let workers = workers()?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    let stop = stop.map(drop).shared();
    let running = workers.iter().map(|worker| worker.run(stop.clone()));
    let worked = future::try_join_all(running).await;
    // Commits and leaves the groups. With the broker down, this can hang (librdkafka issue 3740).
    let (open, closed) = tokio::sync::oneshot::channel::<()>();
    std::thread::spawn(move || drop((workers, open)));
    let closed = timeout(TIMEOUT, closed).await;
    worked?;
    closed.map(drop).context("cannot close: no broker answers")
}

/// Reads one of the topics, in its own group: a record that waits delays only the rebalance of its own topic.
struct Worker {
    stage: usize,
    consumer: StreamConsumer,
    producer: FutureProducer,
}

impl Worker {
    /// The pattern: handles CONCURRENCY records at the same time, and stores their offsets in order, so that the committed
    /// position never passes a record that is not done. After Ctrl-C or SIGTERM it has TIMEOUT to finish these records.
    async fn run(&self, stop: impl Future<Output = ()> + Clone) -> KafkaResult<()> {
        let late = stop.clone().then(|()| sleep(TIMEOUT));
        let records = self.consumer.stream();
        records
            .inspect_err(|error| eprintln!("{TOPIC}{}: {error}", SUFFIXES[self.stage]))
            .filter(|received| future::ready(!received.as_ref().is_err_and(is_temporary)))
            .and_then(|record| self.until_due(record))
            .take_until(stop)
            .map_ok(|record| self.work(record))
            .try_buffered(CONCURRENCY)
            .take_until(late)
            // This fails when the partition was lost. Then its new owner repeats the record.
            .map_ok(|record| self.consumer.store_offset_from_message(&record).ok())
            .try_for_each(|_| future::ready(Ok(())))
            .await
    }

    /// Waits until a record of a retry topic is due. The records after it in its partition are due later.
    async fn until_due<'a>(&self, record: Record<'a>) -> KafkaResult<Record<'a>> {
        let millis = |time: Timestamp| time.to_millis().unwrap_or(0);
        let age = millis(Timestamp::now()).saturating_sub(millis(record.timestamp()));
        let left = DELAYS_MS[self.stage].saturating_sub(age.max(0).unsigned_abs());
        if left > 0 {
            sleep(Duration::from_millis(left)).await;
        }
        gauge!("worker_lag_seconds", "topic" => record.topic().to_owned()).set(age as f64 / 1000.0);
        Ok(record)
    }

    /// A record is done when `handle` says so, or when a copy of it is in another topic.
    async fn work<'a>(&self, record: Record<'a>) -> KafkaResult<Record<'a>> {
        let (topic, partition, offset) = (record.topic(), record.partition(), record.offset());
        let place = format!("{topic}/{partition}/{offset}");
        let next = SUFFIXES[(self.stage + 1).min(SUFFIXES.len() - 1)];
        let (outcome, to, reason) = match attempt(record.payload(), &place).await {
            Done => ("done", None, String::new()),
            Retry(reason) => ("retry", Some(next), reason),
            Dead(reason) => ("dead", Some(".dlq"), reason),
        };
        if let Some(to) = to {
            self.copy(&record, &place, to, &reason).await?;
        }
        counter!("worker_messages_total", "outcome" => outcome).increment(1);
        println!("{}", format!("{place}: {outcome} {reason}").trim_end());
        Ok(record)
    }

    /// Writes a copy to another topic, and waits for the broker without a limit. An error means that it refused the copy.
    async fn copy(&self, record: &Record<'_>, place: &str, to: &str, why: &str) -> KafkaResult<()> {
        let topic = format!("{TOPIC}{to}");
        let mut headers = record.headers().map(|all| all.detach()).unwrap_or_default();
        if to == ".dlq" {
            let why: String = why.chars().take(200).collect();
            for (key, value) in [("origin", place), ("reason", &why)] {
                let value = Some(value);
                headers = headers.insert(Header { key, value });
            }
        }
        let mut copy = FutureRecord::<[u8], [u8]>::to(&topic).headers(headers.clone());
        (copy.key, copy.payload) = (record.key(), record.payload());
        let mut sent = self.producer.send(copy, TIMEOUT).await;
        let too_large = KafkaError::MessageProduction(MessageSizeTooLarge);
        if to == ".dlq" && sent.as_ref().is_err_and(|(error, _)| *error == too_large) {
            // With the new headers it is too large. `origin` says where the key and the payload are.
            let copy = FutureRecord::<[u8], [u8]>::to(&topic).headers(headers);
            sent = self.producer.send(copy, TIMEOUT).await;
        }
        let sent = sent.map(drop).map_err(|(error, _)| error);
        sent.inspect_err(|error| eprintln!("cannot write {place} to {topic}: {error}"))
    }
}

/// Calls `handle` in its own task, so that a panic does not end the worker.
async fn attempt(payload: Option<&[u8]>, place: &str) -> Outcome {
    let handling = match serde_json::from_slice(payload.unwrap_or_default()).map(handle) {
        Ok(handling) => timeout(HANDLE_LIMIT, handling).instrument(info_span!("handle", place)),
        Err(error) => return Dead(format!("malformed: {error}")),
    };
    let started = Instant::now();
    let ended = tokio::spawn(handling).await;
    histogram!("worker_message_seconds").record(started.elapsed());
    match ended {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) => Retry(format!("not done within {HANDLE_LIMIT:?}")),
        Err(panic) => Dead(panic.to_string()),
    }
}

fn workers() -> anyhow::Result<Vec<Worker>> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let absent = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    let producer: FutureProducer = config
        .clone()
        .set("message.timeout.ms", "0")
        // The client checks the size before compression, the broker after it.
        .set("compression.type", "zstd")
        .set("message.max.bytes", "1000000000")
        .create()?;
    config
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "true")
        .set("topic.metadata.refresh.interval.ms", "10000") // finds a new topic
        .set("enable.auto.offset.store", "false")
        .set("auto.commit.interval.ms", "1000")
        // Must be longer than the longest delay and the longest outage while a copy waits.
        .set("max.poll.interval.ms", "3600000");
    let workers = SUFFIXES.iter().enumerate().map(|(stage, suffix)| {
        let (topic, producer) = (format!("{TOPIC}{suffix}"), producer.clone());
        config.set("group.id", format!("{GROUP}{suffix}"));
        let consumer: StreamConsumer = config.create()?;
        let metadata = consumer.fetch_metadata(Some(&topic), TIMEOUT);
        metadata.with_context(|| absent.clone())?;
        consumer.subscribe(&[&topic])?;
        Ok(Worker {
            stage,
            consumer,
            producer,
        })
    });
    workers.collect()
}

/// The client recovers from these errors by itself. Others, such as a missing permission, are final.
fn is_temporary(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    matches!(code, Some(AllBrokersDown | Resolve | OperationTimedOut))
        || matches!(code, Some(BrokerTransportFailure | UnknownTopicOrPartition))
        || matches!(code, Some(PollExceeded))
}

// ---- yours from here ----
const TOPIC: &str = "worker-orders";
const GROUP: &str = "order-worker";

#[derive(serde::Deserialize)]
struct Order {
    order_id: u64,
    amount_cents: u64,
}

/// Can be called twice with the same order, also at the same time.
async fn handle(order: Order) -> Outcome {
    if order.amount_cents == 0 {
        return Dead("nothing to pay".into());
    }
    // A receipt stands for a mail, a row in a database, a call of an API.
    let folder = std::env::var("RECEIPTS").unwrap_or_else(|_| ".".into());
    let receipt = format!("{folder}/receipt-{}.txt", order.order_id);
    match tokio::fs::write(receipt, order.amount_cents.to_string()).await {
        Ok(()) => Done,
        Err(error) => Retry(error.to_string()),
    }
}
