//! Subscribe to all topics that match a pattern, also those created later
//!
//! The client compares its pattern with the list of topics from time to time. A new topic joins the subscription, and the
//! program reads it from its beginning. A deleted topic leaves the subscription; the others are still read. At least
//! once: a crash repeats up to five seconds of work.
//!
//! ```console
//! 1$ cargo lab run kafka_send events.user hello
//! sent to partition [..]
//! 2$ cargo lab run kafka_pattern_subscription
//! assigned: events.user/0 events.user/1 events.user/2
//! events.user partition [..] offset 0: hello
//! 1$ cargo lab run kafka_send events.order created
//! sent to partition [..]
//! 2:
//! ...
//! assigned: events.order/0 [..] events.user/2
//! events.order partition [..] offset 0: created
//! 2^C
//! ```
//!
//! Notice:
//! - The client finds a new topic or partition after `topic.metadata.refresh.interval.ms`: by default five minutes.
//! - Only a name that begins with `^` is a pattern. A dot in the pattern stands for any character, so it is escaped.
//! - The broker shows only topics for which the client has permission (Describe). Others do not match, without an error.
//!
//! Try: start it before the first topic exists. Delete a topic while it runs. Settings: KAFKA_BROKERS (localhost:9092),
//! RUST_LOG. See also: kafka_consumer_group, kafka_admin.

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

/// The pattern: all topics whose names begin with `events.`.
const TOPICS: &str = r"^events\..*";
const GROUP: &str = "pattern-reader";
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
        // The default, `latest`, skips the records that are written before the topic is found.
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.offset.store", "false") // see kafka_consumer_group
        // Each refresh asks for all topics. In a large cluster every two seconds is too often.
        .set("topic.metadata.refresh.interval.ms", "2000")
        .create_with_context(Printer)?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer.fetch_metadata(None, TIMEOUT).context(tip)?;
    consumer.subscribe(&[TOPICS])?;

    let worked = work(&consumer).await;
    // Commits and leaves the group. With the broker down, this can hang (librdkafka issue 3740).
    let (open, closed) = oneshot::channel::<()>();
    thread::spawn(move || drop((consumer, open)));
    let closed = timeout(TIMEOUT, closed).await;
    worked?;
    closed.map(drop).context("cannot close: no broker answers")
}

/// Prints one event after another. Ends with Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer<Printer>) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    let mut events = consumer.stream().take_until(stop);
    while let Some(received) = events.next().await {
        match received {
            Ok(event) => {
                let (topic, partition, offset) = (event.topic(), event.partition(), event.offset());
                let text = String::from_utf8_lossy(event.payload().unwrap_or_default());
                println!("{topic} partition {partition} offset {offset}: {text}"); // the work
                // Fails when the partition was lost: its new owner repeats the event.
                let _ = consumer.store_offset_from_message(&event);
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Prints the partitions of this member. `println!` would panic on a closed pipe, and a callback must not panic.
struct Printer;

impl ClientContext for Printer {}

impl ConsumerContext for Printer {
    fn pre_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Assign(list) = rebalance {
            let mut line = "assigned:".to_owned();
            for at in list.elements() {
                line += &format!(" {}/{}", at.topic(), at.partition());
            }
            let _ = writeln!(stdout(), "{line}");
        }
    }
}

/// The client recovers from these errors by itself. Others, such as a missing permission, are final.
fn is_temporary(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    matches!(code, Some(AllBrokersDown | Resolve | OperationTimedOut))
        || matches!(code, Some(BrokerTransportFailure | UnknownTopicOrPartition))
}
