//! Consume as a Kafka group, with auto commit of finished work only
//!
//! The members of a group share the partitions of a topic. One member at a time reads a partition, in order. At least
//! once: every second the client commits finished orders. A crash repeats up to a second of work and loses nothing.
//!
//! ```console
//! 1$ cargo lab run kafka_consumer_group
//! assigned: [0, 1, 2]
//! 2$ cargo lab run kafka_async_producer
//! ...
//! 1:
//! topic group-orders partition [..] offset 0 key order-123: {"order_id":"order-123",[..]}
//! processed: partition [..] offset 0
//! 1^C
//! ```
//!
//! Notice:
//! - By default the client commits an order when the program receives it, and a crash can lose the order.
//! - When a member joins or leaves, all partitions are revoked and assigned again: see kafka_rebalance.
//! - The work cannot fail here: see kafka_manual_commit.
//!
//! Try: start four members: one gets no partition. Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG.

use std::io::{Write, stdout};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use futures::{FutureExt, StreamExt, future};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext, Rebalance, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::message::BorrowedMessage;
use rdkafka::{ClientConfig, ClientContext, Message};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

const TOPIC: &str = "group-orders";
const GROUP: &str = "order-processor-group";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: StreamConsumer<Printer> = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest") // the default, `latest`, skips records
        .set("auto.commit.interval.ms", "1000")
        .set("enable.auto.offset.store", "false") // the program stores them after the work
        .set("session.timeout.ms", "10000") // a crashed member keeps its partitions for this long
        .set("allow.auto.create.topics", "true")
        .set("topic.metadata.refresh.interval.ms", "10000") // finds a new topic
        .create_with_context(Printer)?;
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

/// The pattern: work on one order after another, and store the offset only after the work. Ends with Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer<Printer>) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    let mut orders = consumer.stream().take_until(stop);
    while let Some(received) = orders.next().await {
        match received {
            Ok(order) => {
                process(&order).await;
                // Fails when the partition was lost: its new owner repeats the order.
                let _ = consumer.store_offset_from_message(&order);
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The work. Keys and payloads can be any bytes.
async fn process(order: &BorrowedMessage<'_>) {
    let (topic, partition, offset) = (order.topic(), order.partition(), order.offset());
    let key = String::from_utf8_lossy(order.key().unwrap_or_default());
    let text = String::from_utf8_lossy(order.payload().unwrap_or_default());
    println!("topic {topic} partition {partition} offset {offset} key {key}: {text}");
    sleep(Duration::from_millis(100)).await;
    println!("processed: partition {partition} offset {offset}");
}

/// Prints the partitions of this member. `println!` would panic on a closed pipe, and a callback must not panic.
struct Printer;

impl ClientContext for Printer {}

impl ConsumerContext for Printer {
    fn pre_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Assign(list) = rebalance {
            let partitions: Vec<_> = list.elements().iter().map(|at| at.partition()).collect();
            let _ = writeln!(stdout(), "assigned: {partitions:?}");
        }
    }
}

/// The client recovers from these errors by itself. Others, such as a missing permission, are final.
fn is_temporary(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    matches!(code, Some(AllBrokersDown | Resolve | OperationTimedOut))
        || matches!(code, Some(BrokerTransportFailure | UnknownTopicOrPartition))
}
