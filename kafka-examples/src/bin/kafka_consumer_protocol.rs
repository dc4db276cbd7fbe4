//! Join a group with the new consumer protocol (KIP-848), and move a running group to it
//!
//! With `group.protocol=consumer` the broker assigns the partitions, and only those that move stop. A running group is
//! moved by replacing its members one by one: both protocols can share a group. At least once; a member commits before it
//! gives up a partition, so the move repeats nothing.
//!
//! ```console
//! 1$ cargo lab run kafka_consumer_protocol group.protocol=classic
//! assigned: 0 1 2
//! 2$ cargo lab run kafka_consumer_protocol
//! assigned: [..]
//! 1^C
//! ...
//! left the group
//! 2^C
//! ...
//! left the group
//! $ cargo lab run kafka_consumer_protocol session.timeout.ms=10000
//! [exit 1]
//! ```
//!
//! Notice:
//! - The client refuses `session.timeout.ms` and `heartbeat.interval.ms`: they are set on the broker
//!   (`group.consumer.session.timeout.ms`). `group.remote.assignor` replaces `partition.assignment.strategy`.
//! - When the last new member leaves, the group is classic again, and classic members repeat orders since the last commit.
//! - It needs Kafka 4.0 and librdkafka 2.12. The client's default is still `classic`.
//!
//! Try: `group.remote.assignor=range`. `kill -9` a member: the broker waits 45 seconds, and the client cannot change that.
//!
//! Usage: kafka_consumer_protocol [SETTING=VALUE]... Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG.
//! See also: kafka_consumer_group, kafka_rebalance.

use std::io::{self, Write};
use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext, Rebalance, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::{ClientConfig, ClientContext, Message};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;

const USAGE: &str = "usage: kafka_consumer_protocol [SETTING=VALUE]...";
const TOPIC: &str = "protocol-orders";
const GROUP: &str = "protocol-orders";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        // The pattern.
        .set("group.protocol", "consumer")
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "true")
        // Commit what `work` stores: every five seconds, before a partition is revoked, and at the end.
        .set("enable.auto.offset.store", "false");
    for arg in std::env::args().skip(1) {
        let (setting, value) = arg.split_once('=').context(USAGE)?;
        config.set(setting, value);
    }
    let consumer: StreamConsumer<Narrator> = config.create_with_context(Narrator)?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer
        .fetch_metadata(Some(TOPIC), TIMEOUT)
        .context(hint)?;
    consumer.subscribe(&[TOPIC])?;

    let worked = work(&consumer).await;
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

/// Works on one order after another, until Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer<Narrator>) -> anyhow::Result<()> {
    let mut stop = pin!(shutdown());
    loop {
        let received = tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            received = consumer.recv() => received,
        };
        match received {
            Ok(order) => {
                let (partition, offset) = (order.partition(), order.offset());
                println!("partition {partition} offset {offset}: done"); // the work
                if let Err(error) = consumer.store_offset_from_message(&order) {
                    eprintln!("partition {partition} was lost, its orders are repeated: {error}");
                }
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Prints what the broker gives to this member and takes from it: with the new protocol only the partitions that move.
struct Narrator;

impl ClientContext for Narrator {}

impl ConsumerContext for Narrator {
    fn pre_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        let (word, list) = match rebalance {
            Rebalance::Assign(list) => ("assigned:", list),
            Rebalance::Revoke(list) if consumer.assignment_lost() => ("lost:", list),
            Rebalance::Revoke(list) => ("revoked:", list),
            Rebalance::Error(_) => return,
        };
        if list.count() == 0 {
            return;
        }
        let partitions = list.elements();
        let partitions = partitions.iter().map(|at| format!(" {}", at.partition()));
        // `println!` panics when standard output is closed, and a callback must not panic.
        let _ = writeln!(io::stdout(), "{word}{}", partitions.collect::<String>());
    }
}

/// The client reconnects by itself after these errors. Others, such as authorization, do not heal by waiting.
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
