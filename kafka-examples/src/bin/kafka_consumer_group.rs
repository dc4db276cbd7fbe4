//! Consume as a Kafka group, with auto commit of finished work only
//!
//! The members of a group share the partitions of a topic. One member at a time reads a partition, in order. At least
//! once: the client commits in the background, every second, but only finished orders. After a crash the group repeats
//! up to a second of work and loses nothing.
//!
//! ```console
//! 1$ cargo lab run kafka_consumer_group
//! assigned: [0, 1, 2]
//! 2$ cargo lab run kafka_async_producer
//! ...
//! 1:
//! topic group-orders partition [..] offset 0 key order-123: {"order_id":"order-123",[..]}
//! processed: partition [..] offset 0
//! committed: partition [..] up to 1
//! 2$ cargo lab run kafka_consumer_group
//! assigned: [[..]]
//! 1^C
//! ...
//! left the group
//! 2^C
//! ...
//! ```
//!
//! Notice:
//! - By default the position moves when a record is handed to the program, so a crash can lose it.
//! - When a member joins or leaves, all partitions are revoked and assigned again: see kafka_rebalance.
//! - An added partition is found after `topic.metadata.refresh.interval.ms`: see kafka_pattern_subscription.
//! - The work cannot fail here: see kafka_manual_commit.
//!
//! Try: run four of them: one stays idle. Stop one with `kill -9`: after ten seconds another repeats its last orders.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_async_producer, kafka_graceful_shutdown.

use std::io::{Write, stderr, stdout};
use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext, Rebalance, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;
use rdkafka::{ClientConfig, ClientContext, Message, Offset, TopicPartitionList};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

const TOPIC: &str = "group-orders";
const GROUP: &str = "order-processor-group";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: StreamConsumer<Printer> = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        // Where to start if the group has no position yet. The default, latest, skips the records already there.
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "true")
        .set("auto.commit.interval.ms", "1000")
        // Auto commit commits the stored offsets. The program stores them itself.
        .set("enable.auto.offset.store", "false")
        // A crashed member keeps its partitions for this long. The default is 45 seconds.
        .set("session.timeout.ms", "10000")
        .set("allow.auto.create.topics", "true")
        .create_with_context(Printer)?;
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

/// The pattern: work on one order after another, and store the offset only after the work.
async fn work(consumer: &StreamConsumer<Printer>) -> anyhow::Result<()> {
    let mut stop = pin!(shutdown());
    loop {
        // `stop` is polled first, so that its handlers are installed before any work starts. It never interrupts an order.
        let received = tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            received = consumer.recv() => received,
        };
        match received {
            Ok(message) => {
                process(&message).await;
                match consumer.store_offset_from_message(&message) {
                    // The partition was lost during the work: its new owner repeats this order.
                    Err(KafkaError::StoreOffset(RDKafkaErrorCode::State)) => {
                        eprintln!("not committed: partition {} is lost", message.partition());
                    }
                    stored => stored?,
                }
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Work of 100 ms. Keys and payloads can be any bytes.
async fn process(message: &BorrowedMessage<'_>) {
    let (topic, partition, offset) = (message.topic(), message.partition(), message.offset());
    let key = String::from_utf8_lossy(message.key().unwrap_or_default());
    let text = String::from_utf8_lossy(message.payload().unwrap_or_default());
    println!("topic {topic} partition {partition} offset {offset} key {key}: {text}");
    sleep(Duration::from_millis(100)).await;
    println!("processed: partition {partition} offset {offset}");
}

/// Prints the group's decisions. The callbacks are called from `recv`, so never during the work. They write without
/// `println!`, which panics on a closed pipe.
struct Printer;

impl ClientContext for Printer {}

impl ConsumerContext for Printer {
    fn pre_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        let _ = match rebalance {
            Rebalance::Assign(list) => writeln!(stdout(), "assigned: {:?}", partitions(list)),
            Rebalance::Revoke(list) => writeln!(stdout(), "revoked: {:?}", partitions(list)),
            Rebalance::Error(error) => writeln!(stderr(), "rebalance failed: {error}"),
        };
    }

    fn commit_callback(&self, result: KafkaResult<()>, offsets: &TopicPartitionList) {
        if let Err(error) = result {
            let _ = writeln!(stderr(), "commit failed, orders may be repeated: {error}");
            return;
        }
        for entry in offsets.elements() {
            if let (partition, Offset::Offset(next)) = (entry.partition(), entry.offset()) {
                let _ = writeln!(stdout(), "committed: partition {partition} up to {next}");
            }
        }
    }
}

fn partitions(list: &TopicPartitionList) -> Vec<i32> {
    let entries = list.elements();
    entries.iter().map(|entry| entry.partition()).collect()
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
