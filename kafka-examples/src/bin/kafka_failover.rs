//! Failover: nodes of a cluster are killed, and no confirmed order is lost
//!
//! Sends one order after another to a partition with copies on three nodes, and shows its leader. With `acks=all` an
//! order is confirmed when all in-sync copies have it, so each of them can become the leader without a loss. When the
//! leader dies, another node is elected, and the client finds it by itself. The program sees only a delay.
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
//! - With fewer in-sync copies than `min.insync.replicas` (2 here) the leader refuses to write: NotEnoughReplicas. The
//!   client tries again until `message.timeout.ms`, five minutes.
//! - If two of three nodes are dead, the controllers have no majority and cannot elect a leader.
//!
//! Try: `cargo lab kill kafka.3` as well, and restart one of them. Settings: KAFKA_BROKERS
//! (localhost:9092), RUST_LOG; `cargo lab up kafka --nodes 3`. See also: kafka_reconnect.

use std::io::Write;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use futures::{FutureExt, StreamExt, TryStreamExt, future, stream};
use rdkafka::ClientConfig;
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

const TOPIC: &str = "failover-orders";
const PARTITION: i32 = 0;
const PAUSE: Duration = Duration::from_millis(200);
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("acks", "all")
        // Retries after a failover write nothing twice and keep the order.
        .set("enable.idempotence", "true")
        .set("reconnect.backoff.max.ms", "1000")
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(Some(TOPIC), TIMEOUT);
    metadata.context(tip)?;
    // In its own thread, because `fetch_metadata` blocks.
    let observer = producer.clone();
    thread::spawn(move || show_leader(&observer));

    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    let stop = stop.map(drop).shared();
    // After a signal the report of the last order is awaited.
    let orders = stream::iter(0..).take_until(stop.clone());
    let sent = orders.then(|number| send(&producer, number));
    tokio::select! {
        sent = sent.try_collect::<()>() => sent?,
        () = stop.then(|()| sleep(TIMEOUT)) => bail!("the last order may or may not be written"),
    }
    println!("all orders are confirmed");
    Ok(())
}

/// The pattern: an order counts only when its delivery report says that it is written.
async fn send(producer: &FutureProducer, number: u32) -> anyhow::Result<()> {
    let payload = format!("order {number}");
    let record = FutureRecord::<(), _>::to(TOPIC).partition(PARTITION);
    let sent = producer.send(record.payload(&payload), TIMEOUT).await;
    let sent = sent.map_err(|(error, _)| error);
    sent.with_context(|| format!("order {number} is not confirmed, but can be written"))?;
    println!("confirmed: order {number}");
    sleep(PAUSE).await;
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
        thread::sleep(PAUSE);
    }
}
