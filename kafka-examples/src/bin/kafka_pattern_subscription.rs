//! Subscribe to all topics that match a pattern, also those created later
//!
//! The client compares its pattern with the list of topics from time to time. A new topic joins the subscription then,
//! and is read from its beginning. A deleted topic leaves it, and the others are read further. At least once.
//!
//! ```console
//! 1$ cargo lab run kafka_send events.user hello
//! sent to partition [..]
//! 2$ cargo lab run kafka_pattern_subscription
//! assigned: events.user[0, 1, 2]
//! events.user partition [..] offset 0: hello
//! 1$ cargo lab run kafka_send events.order created
//! sent to partition [..]
//! 2:
//! ...
//! assigned: events.order[0, 1, 2] events.user[0, 1, 2]
//! events.order partition [..] offset 0: created
//! 2^C
//! left the group
//! ```
//!
//! Notice:
//! - A new topic, or an added partition, is found after `topic.metadata.refresh.interval.ms`: five minutes by default.
//! - The default of `auto.offset.reset`, latest, would skip the records written before the topic is found.
//! - Only a name that begins with `^` is a pattern. A dot in the pattern stands for any character, so it is escaped.
//! - The broker shows only topics for which the client has permission (Describe). Others never match, silently.
//!
//! Try: start it before the first topic exists. Delete a topic while it runs.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_consumer_group, kafka_admin.

use std::collections::BTreeMap;
use std::io::{Write, stdout};
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

const TOPICS: &str = r"^events\..*";
const GROUP: &str = "pattern-reader";
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
        .set("auto.offset.reset", "earliest")
        // Stored after the work: see kafka_consumer_group.
        .set("enable.auto.offset.store", "false")
        // Each refresh asks for all topics. In a large cluster every two seconds is too often.
        .set("topic.metadata.refresh.interval.ms", "2000")
        .create_with_context(Printer)?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer.fetch_metadata(None, TIMEOUT).context(hint)?;
    consumer.subscribe(&[TOPICS])?;

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

/// Prints records, until Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer<Printer>) -> anyhow::Result<()> {
    let mut stop = pin!(shutdown());
    loop {
        let received = tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            received = consumer.recv() => received,
        };
        match received {
            Ok(event) => {
                let (topic, partition) = (event.topic(), event.partition());
                let text = String::from_utf8_lossy(event.payload().unwrap_or_default());
                let offset = event.offset();
                println!("{topic} partition {partition} offset {offset}: {text}");
                match consumer.store_offset_from_message(&event) {
                    Err(KafkaError::StoreOffset(RDKafkaErrorCode::State)) => {
                        eprintln!("not committed: {topic} partition {partition} is lost");
                    }
                    stored => stored?,
                }
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Prints which topics and partitions this member reads.
struct Printer;

impl ClientContext for Printer {}

impl ConsumerContext for Printer {
    fn post_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Assign(list) = rebalance {
            let mut topics = BTreeMap::<_, Vec<_>>::new();
            let entries = list.elements();
            for entry in &entries {
                let partitions = topics.entry(entry.topic()).or_default();
                partitions.push(entry.partition());
            }
            let topics = topics.iter().map(|(topic, all)| format!(" {topic}{all:?}"));
            let _ = writeln!(stdout(), "assigned:{}", topics.collect::<String>());
        }
    }
}

/// The client reconnects by itself after these errors. Other errors (authorization, group protocol, configuration) do not
/// heal by waiting. A deleted topic is unknown.
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
