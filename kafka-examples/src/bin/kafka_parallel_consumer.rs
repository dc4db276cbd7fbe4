//! Process many records at the same time, in order per key, and commit only up to the first that is not done
//!
//! In one member, records with the same key are processed one after another, other records at the same time. They finish out
//! of order. A commit says that all earlier records are done, so the program commits the lowest offset that is not done. At
//! least once: a crash, a stop or a rebalance repeats records from the last commit on, and loses nothing.
//!
//! ```console
//! 1$ cargo lab run kafka_send -K : parallel-orders ann:order-0 ben:order-1 ann:order-2
//! ...
//! 2$ cargo lab run kafka_parallel_consumer
//! ...
//! partition [..] offset [..]: ann order-2 done
//! ...
//! 2^C
//! ```
//!
//! Notice:
//! - The usual mistake is to commit each record when it is done: a commit of offset 9 also commits 5.
//! - `IN_FLIGHT` limits the records that are being processed. A slow key can fill it, and then all other keys wait.
//! - A slow record holds back the commit of its partition: a crash repeats all records after it.
//! - Here no record can fail. kafka_manual_commit shows what to do when one fails.
//!
//! Try: send the lines of a large file, `kill -9` the consumer, and start it again. Settings: KAFKA_BROKERS
//! (localhost:9092), RUST_LOG. See also: kafka_parallel_rebalance, which finishes its records before it gives them up.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, RandomState};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use futures::{FutureExt, future};
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
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
/// Several keys share a slot, so a key sometimes waits for another key.
const SLOTS: usize = 16;
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "true")
        .set("topic.metadata.refresh.interval.ms", "10000") // finds a new topic
        .set("session.timeout.ms", "10000") // a crashed member keeps its partitions for this long
        .set("auto.commit.interval.ms", "1000")
        .set("enable.auto.offset.store", "false") // see kafka_consumer_group
        .create()?;
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

/// Processes up to IN_FLIGHT records at the same time. Ends with Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    let (mut tasks, mut offsets) = (JoinSet::new(), Offsets::default());
    let mut turns: [Option<oneshot::Receiver<()>>; SLOTS] = Default::default();
    let hasher = RandomState::new();
    let slot = |key: &[u8]| hasher.hash_one(key) as usize % SLOTS;
    loop {
        tokio::select! {
            biased;
            _ = &mut stop => return Ok(()),
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

    /// Returns the new position, or `None` if an earlier record is not done.
    fn done(&mut self, partition: i32, offset: i64) -> Option<i64> {
        let (pending, next) = self.0.get_mut(&partition)?;
        let was_first = pending.first() == Some(&offset);
        pending.remove(&offset);
        // After a rebalance, `next` can be lower than old offsets that are still being processed.
        was_first.then(|| pending.first().map_or(*next, |first| *first.min(next)))
    }
}

/// Stores the position of the partition for the next commit.
fn store(consumer: &StreamConsumer, offsets: &mut Offsets, (partition, offset): (i32, i64)) {
    if let Some(next) = offsets.done(partition, offset) {
        // It adds 1, so give it the last offset that is done. Fails when the partition was lost.
        let _ = consumer.store_offset(TOPIC, partition, next - 1);
    }
}

/// Processes a record when the record before it in its slot is done.
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

/// The work. The payload is its duration in milliseconds. Any other payload takes 5 to 35 ms, so records overtake each other.
async fn process(order: &OwnedMessage) {
    let (partition, offset) = (order.partition(), order.offset());
    let key = String::from_utf8_lossy(order.key().unwrap_or_default());
    let text = String::from_utf8_lossy(order.payload().unwrap_or_default());
    let millis = text.parse().unwrap_or(5 + offset.unsigned_abs() * 7 % 31);
    sleep(Duration::from_millis(millis)).await;
    println!("partition {partition} offset {offset}: {key} {text} done");
}

/// The client recovers from these errors by itself. Others, such as a missing permission, are final.
fn is_temporary(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    matches!(code, Some(AllBrokersDown | Resolve | OperationTimedOut))
        || matches!(code, Some(BrokerTransportFailure | UnknownTopicOrPartition))
        || matches!(code, Some(PollExceeded)) // it joins the group again
}
