//! Hand over cleanly in a rebalance: commit on revoke, so that work is not repeated
//!
//! A commit for each order is slow, so this consumer commits after every hundred. When the group takes partitions from it,
//! it first commits what it has done there, and the next member continues from that offset. At least once: a rebalance or
//! Ctrl-C repeats nothing, a crash repeats up to a hundred orders.
//!
//! ```console
//! 1$ cargo lab run kafka_rebalance
//! assigned: 0 1 2
//! 2$ cargo lab run kafka_send -p 0 rebalance-orders order-0 order-1
//! ...
//! 1:
//! partition 0 offset 0: done
//! partition 0 offset 1: done
//! 1^C
//! revoked: 0 1 2
//! left the group
//! ```
//!
//! Notice:
//! - The callback runs inside `recv`, so never in the middle of an order, and once more when the consumer is closed.
//! - A member that is too slow for the group loses its partitions without this call: it is too late to commit.
//! - The default assignors revoke all partitions. `cooperative-sticky` revokes only those that move; a group cannot mix them.
//! - There is no `group.instance.id`: two replicas with the same one would fence each other.
//!
//! Try: start a second one while orders arrive. Remove the commit in `pre_rebalance`, and look for orders done twice.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_consumer_group, kafka_parallel_rebalance.

use std::io::{self, Write};
use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use rdkafka::consumer::{
    BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance, StreamConsumer,
};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::{ClientConfig, ClientContext, Message, Offset, TopicPartitionList};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

const TOPIC: &str = "rebalance-orders";
const GROUP: &str = "rebalance-orders";
const COMMIT_EVERY: u32 = 100;
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: StreamConsumer<Handover> = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "true")
        // A member that was killed is noticed after ten seconds. The default is 45.
        .set("session.timeout.ms", "10000")
        // `true` would commit on revoke, too, and every five seconds: kafka_consumer_group does that.
        .set("enable.auto.commit", "false")
        // The default stores an offset when its record is received.
        .set("enable.auto.offset.store", "false")
        .create_with_context(Handover)?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer
        .fetch_metadata(Some(TOPIC), TIMEOUT)
        .context(hint)?;
    consumer.subscribe(&[TOPIC])?;

    let worked = work(&consumer).await;
    // Leave the group, so that another member takes over at once. With the broker down, the commit and the close can hang
    // (librdkafka issue 3740): wait no longer than TIMEOUT.
    let (done, closed) = oneshot::channel();
    thread::spawn(move || {
        // No callback runs for a commit that the close sends.
        let committed = consumer.commit_consumer_state(CommitMode::Sync);
        drop(consumer);
        done.send(committed)
    });
    let closed = timeout(TIMEOUT, closed).await;
    worked?;
    match closed.context("closed without leaving the group: no broker answers")?? {
        Ok(()) | Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => {}
        Err(error) => return Err(error).context("the last orders will be repeated"),
    }
    println!("left the group");
    Ok(())
}

/// Works on one order after another, until Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer<Handover>) -> anyhow::Result<()> {
    let mut stop = pin!(shutdown());
    let mut uncommitted = 0;
    loop {
        let received = tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            received = consumer.recv() => received,
        };
        match received {
            Ok(order) => {
                sleep(Duration::from_millis(2)).await; // the work
                println!(
                    "partition {} offset {}: done",
                    order.partition(),
                    order.offset()
                );
                // The next commit includes it. An error says that the partition was lost: its order is repeated.
                if let Err(error) = consumer.store_offset_from_message(&order) {
                    eprintln!("not stored: {error}");
                }
                uncommitted += 1;
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
        if uncommitted == COMMIT_EVERY {
            consumer.commit_consumer_state(CommitMode::Async)?;
            uncommitted = 0;
        }
    }
}

struct Handover;

impl ClientContext for Handover {}

impl ConsumerContext for Handover {
    /// The pattern: commit what is done, before the group gives the partitions to other members.
    fn pre_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        match rebalance {
            Rebalance::Assign(list) => say("assigned", list),
            Rebalance::Revoke(list) if consumer.assignment_lost() => say("lost", list),
            Rebalance::Revoke(list) => {
                say("revoked", list);
                // It is sent before the partitions are given up. `commit_callback` gets the result.
                if let Err(error) = consumer.commit_consumer_state(CommitMode::Async) {
                    let _ = writeln!(io::stderr(), "not committed: {error}");
                }
            }
            Rebalance::Error(error) => drop(writeln!(io::stderr(), "rebalance failed: {error}")),
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, offsets: &TopicPartitionList) {
        match result {
            Ok(()) => say("committed", offsets),
            Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => {} // nothing new
            Err(error) => {
                let _ = writeln!(io::stderr(), "not committed, will be repeated: {error}");
            }
        }
    }
}

/// For callbacks: `println!` panics when standard output is closed, and a callback must not panic.
fn say(what: &str, list: &TopicPartitionList) {
    let mut line = format!("{what}:");
    for at in list.elements() {
        line += &match at.offset() {
            Offset::Offset(next) => format!(" {} at {next}", at.partition()),
            _ => format!(" {}", at.partition()),
        };
    }
    let _ = writeln!(io::stdout(), "{line}");
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
