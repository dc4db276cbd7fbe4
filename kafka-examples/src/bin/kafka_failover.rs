//! Failover: nodes of a cluster are killed, and no confirmed order is lost
//!
//! Sends an order every 200 ms to a partition with copies on three nodes, and shows its leader. With `acks=all` an order is
//! confirmed when all in-sync copies have it, so each of them can become the leader without a loss. When the leader dies,
//! another node is elected within seconds, and the client finds it by itself. A consumer does the same.
//!
//! ```console
//! 1$ cargo lab run kafka_failover
//! ...
//! confirmed: order 0
//! 2$ cargo lab kill kafka.2
//! 1:
//! ...
//! leader: node [..], in sync: [..], [..]
//! ...
//! confirmed: order [..]
//! 1^C
//! ...
//! all orders are confirmed
//! ```
//!
//! Notice:
//! - With fewer in-sync copies than `min.insync.replicas` (2 here) the leader refuses to write: NotEnoughReplicas.
//! - The client tries again until `message.timeout.ms`, five minutes. The program sees only the delay.
//! - Two dead nodes of three also leave the controllers without a majority: no leader can be elected.
//!
//! Try: `cargo lab kill kafka.3` as well, and restart one of them. Run `kafka_tail failover-orders` at the same time.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG; `cargo lab up kafka --nodes 3`. See also: kafka_reconnect.

use std::io::Write;
use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::stream::{FuturesOrdered, StreamExt};
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::interval;

const TOPIC: &str = "failover-orders";
const PARTITION: i32 = 0;
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("acks", "all")
        // Retries after a failover write nothing twice and keep the order.
        .set("enable.idempotence", "true")
        .set("reconnect.backoff.max.ms", "1000")
        .create()?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(Some(TOPIC), TIMEOUT);
    metadata.context(hint)?;
    // A thread of its own, because `fetch_metadata` blocks.
    let observer = producer.clone();
    thread::spawn(move || show_leader(&observer));

    let sent = send_orders(&producer).await;
    // `flush` blocks until the queue is empty, or for TIMEOUT.
    let (done, flushed) = oneshot::channel();
    thread::spawn(move || {
        let _ = producer.flush(TIMEOUT);
        done.send(producer.in_flight_count())
    });
    let waiting = flushed.await;
    sent?;
    let waiting = waiting?;
    ensure!(
        waiting == 0,
        "{waiting} orders are not confirmed, and are given up"
    );
    println!("all orders are confirmed");
    Ok(())
}

/// Prints the leader of the partition and its in-sync copies whenever they change.
fn show_leader(producer: &FutureProducer) {
    let mut shown = String::new();
    loop {
        if let Ok(metadata) = producer.client().fetch_metadata(Some(TOPIC), TIMEOUT)
            && let Some(topic) = metadata.topics().first()
            && let Some(partition) = topic.partitions().iter().find(|it| it.id() == PARTITION)
            && partition.leader() >= 0
        {
            let mut in_sync = partition.isr().to_vec();
            in_sync.sort_unstable();
            let line = format!("leader: node {}, in sync: {in_sync:?}", partition.leader());
            if line != shown {
                // `println!` panics when standard output is closed, and a detached thread must not panic.
                let _ = writeln!(std::io::stdout(), "{line}");
                shown = line;
            }
        }
        thread::sleep(Duration::from_millis(200));
    }
}

/// The pattern: an order counts only when its delivery report says that it is written. Ends with Ctrl-C, SIGTERM, or a
/// final error.
async fn send_orders(producer: &FutureProducer) -> anyhow::Result<()> {
    let mut stop = pin!(shutdown());
    let mut clock = interval(Duration::from_millis(200));
    let mut reports = FuturesOrdered::new();
    let mut next = 0;
    loop {
        tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            _ = clock.tick() => {
                let (number, payload) = (next, format!("order {next}"));
                let record = FutureRecord::<(), _>::to(TOPIC).partition(PARTITION).payload(&payload);
                let report = producer.send_result(record).map_err(|(error, _)| error);
                let report = report.with_context(|| format!("order {number} is refused"))?;
                reports.push_back(async move { (number, report.await) });
                next += 1;
                if reports.len() % 10 == 0 {
                    println!("waiting: {} orders are not confirmed yet", reports.len());
                }
            }
            Some((number, report)) = reports.next() => match report? {
                Ok(_) => println!("confirmed: order {number}"),
                // It can be in the topic, and only its confirmation is lost.
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::MessageTimedOut), _)) => {
                    println!("not confirmed in time: order {number}");
                }
                Err((error, _)) => {
                    return Err(error).with_context(|| format!("order {number} is refused"));
                }
            },
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
