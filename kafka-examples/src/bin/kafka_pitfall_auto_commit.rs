//! Pitfall: auto commit confirms orders that are not processed yet, and a crash loses them
//!
//! Two workers differ in one setting. Both read up to 100 orders ahead of the work, crash after half of the orders, and
//! are started again. The wrong one has the client's defaults and commits the orders that it has read: at most once. The
//! right one commits the orders that it has processed: at least once.
//!
//! ```console
//! $ cargo lab run kafka_pitfall_auto_commit
//! wrong: 250 orders sent, [..] lost, 0 handled again
//! right: 250 orders sent, 0 lost, [..] handled again
//! ```
//!
//! Notice:
//! - No error is reported, and the group's lag is zero at the end. Only the count shows the loss.
//! - By default (`enable.auto.offset.store`) the client stores an offset for the next commit when it hands out a record.
//! - When another member takes over the partition, its orders in work are handled again, and not lost.
//! - A worker here ends with the first error of the client: kafka_reconnect_consumer waits for the broker.
//!
//! Try: change READ_AHEAD, and count again. Store the offset before the work in the right worker.
//!
//! With several tasks per partition, this way to store offsets skips orders: kafka_parallel_consumer shows the cure.
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_manual_commit, kafka_idempotent_consumer.

use std::collections::BTreeSet;
use std::future::ready;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Message};
use tokio::process::Command;
use tokio::time::{sleep, timeout};

/// A topic for each worker, and a group of the same name.
const WRONG: &str = "pitfall-auto-commit-wrong";
const RIGHT: &str = "pitfall-auto-commit-right";
const ORDERS: usize = 250;
const READ_AHEAD: usize = 100;
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => {}
        // The program starts itself with these arguments, twice for each topic.
        ["worker", topic, last] => return worker(&brokers, topic, last.parse().ok()).await,
        _ => bail!("usage: kafka_pitfall_auto_commit"),
    }
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "30000")
        .create()?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(None, TIMEOUT);
    metadata.context(hint)?;
    let (wrong, right) = tokio::try_join!(count(&producer, WRONG), count(&producer, RIGHT))?;
    println!("wrong: {wrong}\nright: {right}");
    Ok(())
}

/// The pattern, in both forms. It prints the offset of each order, and ends after the order `last`, or crashes.
async fn worker(brokers: &str, topic: &str, last: Option<i64>) -> anyhow::Result<()> {
    let right = topic == RIGHT;
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", topic)
        .set("auto.offset.reset", "earliest")
        .set("auto.commit.interval.ms", "1000")
        // The second worker waits this long for the crashed one. By default, brokers refuse less.
        .set("session.timeout.ms", "6000")
        // The only difference: with true, the default, an order counts as done when it is handed out.
        .set("enable.auto.offset.store", (!right).to_string())
        .create()?;
    consumer.subscribe(&[topic])?;
    // Holds up to READ_AHEAD orders, as a queue or spawned tasks would.
    let mut orders = consumer.stream().map(ready).buffered(READ_AHEAD);
    let mut handled = 0;
    while let Some(received) = orders.next().await {
        let order = received?;
        sleep(Duration::from_millis(20)).await; // the work
        println!("{}", order.offset());
        handled += 1;
        if last.is_none() && handled == ORDERS / 2 {
            // As with SIGKILL: nothing more is committed, and the member does not leave the group.
            std::process::abort();
        }
        if right && let Err(error) = consumer.store_offset_from_message(&order) {
            // Another member has the partition now. It starts after the last commit, and repeats this order.
            let lost = error == KafkaError::StoreOffset(RDKafkaErrorCode::State);
            ensure!(lost, error);
            eprintln!("offset {}: partition lost, order repeated", order.offset());
        }
        if last.is_some_and(|last| order.offset() >= last) {
            break;
        }
    }
    // Here the consumer is dropped. It commits the stored offsets and leaves the group.
    Ok(())
}

/// Sends orders, runs a worker that crashes and a worker that finishes, and compares.
async fn count(producer: &FutureProducer, topic: &str) -> anyhow::Result<String> {
    let mut sent = Vec::new();
    for _ in 0..ORDERS {
        let record = FutureRecord::<(), str>::to(topic).payload("order");
        let at = producer.send(record.partition(0), TIMEOUT).await;
        sent.push(at.map_err(|(error, _)| error)?.offset);
    }
    let last = sent.last().map(i64::to_string).unwrap_or_default();
    let (mut total, mut different) = (0, BTreeSet::new());
    for last in ["crash", &last] {
        let mut worker = Command::new(std::env::current_exe()?);
        worker.args(["worker", topic, last]);
        worker.stderr(Stdio::inherit()).kill_on_drop(true);
        let ended = timeout(12 * TIMEOUT, worker.output()).await;
        let ended = ended.context("a worker has waited for its orders for too long")??;
        let status = ended.status;
        let crashed = last == "crash" && status.code().is_none();
        ensure!(crashed || status.success(), "a worker failed: {status}");
        let offsets = String::from_utf8(ended.stdout)?;
        let offsets = offsets.lines().flat_map(str::parse::<i64>);
        let handled: Vec<i64> = offsets.filter(|order| sent.contains(order)).collect();
        total += handled.len();
        different.extend(handled);
    }
    let (lost, again) = (sent.len() - different.len(), total - different.len());
    Ok(format!(
        "{ORDERS} orders sent, {lost} lost, {again} handled again"
    ))
}
