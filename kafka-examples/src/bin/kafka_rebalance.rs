//! Hand over cleanly in a rebalance: commit on revoke, so that work is not repeated
//!
//! A commit for each order is slow, so this consumer commits after every hundred orders, and when its partitions are
//! revoked. At least once: a crash repeats the orders since the last commit, a rebalance or a stop only if its commit fails.
//!
//! ```console
//! 1$ cargo lab run kafka_rebalance
//! assigned: [0, 1, 2]
//! 2$ cargo lab run kafka_send -p 0 rebalance-orders order-0 order-1
//! ...
//! 1:
//! partition 0 offset 0: done
//! partition 0 offset 1: done
//! 1^C
//! revoked: [0, 1, 2]
//! ```
//!
//! Notice:
//! - The callback runs inside `next`, so never during the work. It runs once more when the consumer is closed.
//! - The default assignors revoke all partitions, `cooperative-sticky` only those that move. A group cannot mix them.
//! - A member that was too slow has already lost its partitions to others. Then it is too late to commit.
//!
//! Try: start a second one while orders arrive. Remove the commit in `pre_rebalance`, and look for orders done twice.
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_consumer_group, kafka_parallel_rebalance.

use std::io::{Write, stderr, stdout};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use futures::{FutureExt, StreamExt, future};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::consumer::{Rebalance, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode::*};
use rdkafka::{ClientConfig, ClientContext, Message, TopicPartitionList};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;

const TOPIC: &str = "rebalance-orders";
const GROUP: &str = "rebalance-orders";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: StreamConsumer<Handover> = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "true")
        .set("topic.metadata.refresh.interval.ms", "10000") // finds a new topic
        .set("session.timeout.ms", "10000") // a crashed member keeps its partitions for this long
        .set("enable.auto.commit", "false") // `true` also commits on revoke: see kafka_consumer_group
        .set("enable.auto.offset.store", "false")
        .create_with_context(Handover)?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer.fetch_metadata(Some(TOPIC), TIMEOUT).context(tip)?;
    consumer.subscribe(&[TOPIC])?;

    let worked = work(&consumer).await;
    // Commits and leaves the group. With the broker down, this can hang (librdkafka issue 3740).
    let (open, closed) = oneshot::channel::<()>();
    thread::spawn(move || drop((consumer, open)));
    let closed = timeout(TIMEOUT, closed).await;
    worked?;
    closed.map(drop).context("cannot close: no broker answers")
}

/// Works on one order after another, and commits after every hundred. Ends with Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer<Handover>) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    let mut orders = consumer.stream().take_until(stop);
    let mut done = 0_u64;
    while let Some(received) = orders.next().await {
        match received {
            Ok(order) => {
                let (partition, offset) = (order.partition(), order.offset());
                println!("partition {partition} offset {offset}: done"); // the work
                // Fails when the partition was lost: its new owner repeats the order.
                let _ = consumer.store_offset_from_message(&order);
                done += 1;
                if done.is_multiple_of(100) {
                    consumer.commit_consumer_state(CommitMode::Async)?;
                }
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

struct Handover;

impl ClientContext for Handover {}

impl ConsumerContext for Handover {
    /// The pattern: commit the orders that are done, before the group gives the partitions to other members.
    fn pre_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        match rebalance {
            Rebalance::Assign(list) => say("assigned", list),
            Rebalance::Revoke(list) if consumer.assignment_lost() => say("lost to others", list),
            Rebalance::Revoke(list) => {
                say("revoked", list);
                // It is sent before the partitions move. `commit_callback` gets the result, except during the close.
                let _ = consumer.commit_consumer_state(CommitMode::Async);
            }
            Rebalance::Error(_) => {} // the log has it
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        match result {
            Ok(()) | Err(KafkaError::ConsumerCommit(NoOffset)) => {} // nothing new was done
            Err(error) => drop(writeln!(stderr(), "not committed: {error}")),
        }
    }
}

/// Prints partitions. `println!` would panic on a closed pipe, and a callback must not panic.
fn say(what: &str, list: &TopicPartitionList) {
    let partitions: Vec<_> = list.elements().iter().map(|at| at.partition()).collect();
    let _ = writeln!(stdout(), "{what}: {partitions:?}");
}

/// The client recovers from these errors by itself. Others, such as a missing permission, are final.
fn is_temporary(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    matches!(code, Some(AllBrokersDown | Resolve | OperationTimedOut))
        || matches!(code, Some(BrokerTransportFailure | UnknownTopicOrPartition))
}
