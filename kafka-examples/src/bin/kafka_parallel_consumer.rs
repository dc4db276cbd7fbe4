//! Work on many records at once, in order per key, and commit only what is done without a gap
//!
//! At least once. Records with the same key are worked on one after another, other records at the same time. They finish
//! out of order, and a commit is a position: all before it is done. So the position is the lowest offset that is
//! not done. A crash or a rebalance loses nothing; it repeats records from there on.
//!
//! ```console
//! 1$ cargo lab run kafka_send -K : parallel-orders ann:order-0 ben:order-1 ann:order-2
//! ...
//! 2$ cargo lab run kafka_parallel_consumer
//! ...
//! partition [..] offset [..]: ann order-2 done
//! ...
//! 2^C
//! left the group
//! ```
//!
//! Notice:
//! - To commit each record when it is done is the usual mistake: the commit of offset 9 says that 5 is done, too.
//! - `IN_FLIGHT` bounds the memory and the records that are repeated. When it is reached, one slow key stops all others.
//! - A rebalance repeats the records in work: kafka_parallel_rebalance finishes them first.
//! - Every record counts as done: kafka_manual_commit dead-letters an order that fails.
//!
//! Try: send the lines of a large file, `kill -9` the consumer in the middle, and start it again.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_pitfall_ordering, kafka_pitfall_auto_commit.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::OwnedMessage;
use rdkafka::{ClientConfig, Message};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

const TOPIC: &str = "parallel-orders";
const GROUP: &str = "parallel-orders";
/// Records that are received and not done.
const IN_FLIGHT: usize = 64;
/// Keys share these, so that a key sometimes waits for another one.
const SLOTS: usize = 16;
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "true")
        // A member that was killed is noticed after ten seconds. The default is 45.
        .set("session.timeout.ms", "10000")
        // Commits the stored offsets every second, before a rebalance, and when the consumer is closed.
        .set("auto.commit.interval.ms", "1000")
        // The default stores an offset when its record is received.
        .set("enable.auto.offset.store", "false")
        .create()?;
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

/// Works on up to IN_FLIGHT records at once, until Ctrl-C or SIGTERM. Then it finishes them, within TIMEOUT.
async fn work(consumer: &StreamConsumer) -> anyhow::Result<()> {
    let (mut tasks, mut offsets) = (JoinSet::new(), Offsets::default());
    let mut turns: [Option<oneshot::Receiver<()>>; SLOTS] = Default::default();
    let mut stop = pin!(shutdown());
    loop {
        tokio::select! {
            biased;
            signal = &mut stop => break signal?,
            Some(done) = tasks.join_next() => store(consumer, &mut offsets, done?),
            received = consumer.recv(), if tasks.len() < IN_FLIGHT => match received {
                Ok(order) => {
                    offsets.received(order.partition(), order.offset());
                    let (finished, next_turn) = oneshot::channel();
                    // A record without a key waits for no other.
                    let turn = order.key().and_then(|key| turns[slot(key)].replace(next_turn));
                    tasks.spawn(in_turn(turn, order.detach(), finished));
                }
                Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
                Err(error) => return Err(error.into()),
            },
        }
    }
    let finish = async {
        while let Some(done) = tasks.join_next().await {
            store(consumer, &mut offsets, done?);
        }
        anyhow::Ok(())
    };
    let finished = timeout(TIMEOUT, finish).await;
    finished.context("some records are still in work; they are repeated")?
}

/// The pattern: for each partition, the offsets that are received and not done, and the next offset to receive.
#[derive(Default)]
struct Offsets(BTreeMap<i32, (BTreeSet<i64>, i64)>);

impl Offsets {
    fn received(&mut self, partition: i32, offset: i64) {
        let (pending, next) = self.0.entry(partition).or_default();
        pending.insert(offset);
        *next = offset + 1;
    }

    /// Returns the lowest offset that is not done, unless a record before this one is not done.
    fn done(&mut self, partition: i32, offset: i64) -> Option<i64> {
        let (pending, next) = self.0.get_mut(&partition)?;
        let was_first = pending.first() == Some(&offset);
        pending.remove(&offset);
        // After a rebalance, `next` can be lower than offsets that are still in work from before it.
        was_first.then(|| pending.first().map_or(*next, |first| *first.min(next)))
    }
}

/// Stores the position of the partition for the next commit.
fn store(consumer: &StreamConsumer, offsets: &mut Offsets, (partition, offset): (i32, i64)) {
    if let Some(next) = offsets.done(partition, offset)
        // The client adds 1: it wants the offset of the last record that is done.
        && let Err(error) = consumer.store_offset(TOPIC, partition, next - 1)
    {
        // The partition was revoked.
        eprintln!("partition {partition} offset {offset} will be repeated: {error}");
    }
}

/// Works on a record when the record before it in its slot is done.
async fn in_turn(
    turn: Option<oneshot::Receiver<()>>,
    order: OwnedMessage,
    _finished: oneshot::Sender<()>,
) -> (i32, i64) {
    if let Some(turn) = turn {
        let _ = turn.await; // until its task drops `_finished`
    }
    process(&order).await;
    (order.partition(), order.offset())
}

/// The work: 5 to 35 ms, so that records overtake each other.
async fn process(order: &OwnedMessage) {
    let (partition, offset) = (order.partition(), order.offset());
    sleep(Duration::from_millis(5 + offset.unsigned_abs() * 7 % 31)).await;
    let key = String::from_utf8_lossy(order.key().unwrap_or_default());
    let text = String::from_utf8_lossy(order.payload().unwrap_or_default());
    println!("partition {partition} offset {offset}: {key} {text} done");
}

fn slot(key: &[u8]) -> usize {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(key) as usize % SLOTS
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
