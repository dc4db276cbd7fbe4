//! Pitfall: auto commit confirms orders that are not processed yet, and a crash loses them
//!
//! Two workers read up to 100 orders ahead of the work, crash after half of the orders, and are started again. The
//! wrong one commits the orders that it has read: at most once. The right one turns `enable.auto.offset.store` off and
//! stores the offset of an order after its work. So it commits the orders that it has processed: at least once.
//!
//! ```console
//! $ cargo lab run kafka_pitfall_auto_commit
//! wrong: 250 orders: [..] lost, 0 repeated
//! right: 250 orders: 0 lost, [..] repeated
//! ```
//!
//! Notice:
//! - No error is reported, and both groups have committed all orders at the end. Only the count shows the loss.
//! - With several tasks per partition, this stores offsets too early. kafka_parallel_consumer shows how to do it.
//!
//! Try: change READ_AHEAD, and count again. Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG.
//! See also: kafka_manual_commit, kafka_idempotent_consumer.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::{StreamExt, future};
use rdkafka::consumer::{Consumer, StreamConsumer};
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
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    // The program starts itself with these arguments, twice for each topic.
    if let [topic, last] = &args[..] {
        return worker(&brokers, topic, last.parse().ok()).await;
    }
    ensure!(args.is_empty(), "usage: kafka_pitfall_auto_commit");
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("message.timeout.ms", "30000")
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(None, TIMEOUT);
    metadata.context(tip)?;
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
        // After the crash, the second worker waits this long for the partition. It is the broker's minimum.
        .set("session.timeout.ms", "6000")
        // With true, the default, the client stores the offset of an order when it returns the order.
        .set("enable.auto.offset.store", (!right).to_string())
        .create()?;
    consumer.subscribe(&[topic])?;
    // Holds up to READ_AHEAD orders, as a queue or spawned tasks would.
    let mut orders = consumer.stream().map(future::ready).buffered(READ_AHEAD);
    for handled in 1.. {
        let order = orders.next().await.context("the stream has ended")??;
        sleep(Duration::from_millis(20)).await; // the work
        println!("{}", order.offset());
        if right && let Err(error) = consumer.store_offset_from_message(&order) {
            eprintln!("partition lost, order repeated: {error}"); // by its new owner
        }
        match last {
            // Like SIGKILL: it commits nothing more, and does not leave the group.
            None if handled == ORDERS / 2 => std::process::abort(),
            Some(last) if order.offset() >= last => break,
            _ => {}
        }
    }
    Ok(()) // the consumer is dropped: it commits the stored offsets and leaves the group
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
    let mut handled = Vec::new();
    for last in ["crash", &last] {
        let mut worker = Command::new(std::env::current_exe()?);
        worker.args([topic, last]).kill_on_drop(true);
        let ended = timeout(12 * TIMEOUT, worker.stderr(Stdio::inherit()).output()).await;
        let ended = ended.context("a worker has waited for its orders for too long")??;
        let crashed = last == "crash" && ended.status.code().is_none();
        ensure!(crashed || ended.status.success(), "a worker failed");
        let offsets = String::from_utf8(ended.stdout)?;
        let offsets = offsets.lines().flat_map(str::parse::<i64>);
        handled.extend(offsets.filter(|order| sent.contains(order)));
    }
    let different = handled.iter().collect::<BTreeSet<_>>().len();
    let (lost, repeated) = (ORDERS - different, handled.len() - different);
    Ok(format!("{ORDERS} orders: {lost} lost, {repeated} repeated"))
}
