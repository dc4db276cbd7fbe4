//! Join a group with the new consumer protocol (KIP-848), and move a running group to it
//!
//! With `group.protocol=consumer` the broker assigns the partitions, and only partitions that move are stopped. To move a
//! running group, replace its members one by one: one group can have members of both protocols. At least once. A member
//! that stops commits first, so a replacement without errors repeats nothing.
//!
//! ```console
//! 1$ cargo lab run kafka_consumer_protocol group.protocol=classic
//! assigned: [0, 1, 2]
//! 2$ cargo lab run kafka_consumer_protocol
//! assigned: [..]
//! 1^C
//! ...
//! 2^C
//! ...
//! $ cargo lab run kafka_consumer_protocol session.timeout.ms=10000
//! [exit 1]
//! ```
//!
//! Notice:
//! - The client refuses `session.timeout.ms` and `partition.assignment.strategy`: the broker decides these.
//! - When the last member with the new protocol leaves, the group becomes classic again, and can repeat orders.
//! - It needs Kafka 4.0 and librdkafka 2.12. The client's default is still `classic`.
//!
//! Usage: kafka_consumer_protocol [SETTING=VALUE]... Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG.

use std::io::{Write, stdout};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use futures::{FutureExt, StreamExt, future};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext, Rebalance, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::{ClientConfig, ClientContext, Message};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;

const TOPIC: &str = "protocol-orders";
const GROUP: &str = "protocol-orders";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("group.protocol", "consumer") // The pattern: this is the only setting that it needs.
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "true")
        .set("topic.metadata.refresh.interval.ms", "10000") // finds a new topic
        .set("enable.auto.offset.store", "false"); // see kafka_consumer_group
    for arg in std::env::args().skip(1) {
        let (setting, value) = arg.split_once('=').context("usage: [SETTING=VALUE]...")?;
        config.set(setting, value);
    }
    let consumer: StreamConsumer<Printer> = config.create_with_context(Printer)?;
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

/// Works on one order after another. Ends with Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer<Printer>) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    let mut orders = consumer.stream().take_until(stop);
    while let Some(received) = orders.next().await {
        match received {
            Ok(order) => {
                let (partition, offset) = (order.partition(), order.offset());
                println!("partition {partition} offset {offset}: done"); // the work
                // Fails when the partition was lost: its new owner repeats the order.
                let _ = consumer.store_offset_from_message(&order);
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Prints the partitions that this member gets and loses. With the new protocol these are only the partitions that move.
struct Printer;

impl ClientContext for Printer {}

impl ConsumerContext for Printer {
    fn pre_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        let (word, list) = match rebalance {
            Rebalance::Assign(list) => ("assigned", list),
            Rebalance::Revoke(list) => ("revoked", list),
            Rebalance::Error(_) => return,
        };
        let partitions: Vec<_> = list.elements().iter().map(|at| at.partition()).collect();
        let _ = writeln!(stdout(), "{word}: {partitions:?}"); // `println!` panics on a closed pipe
    }
}

/// The client recovers from these errors by itself. Others, such as a missing permission, are final.
fn is_temporary(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    matches!(code, Some(AllBrokersDown | Resolve | OperationTimedOut))
        || matches!(code, Some(BrokerTransportFailure | UnknownTopicOrPartition))
}
