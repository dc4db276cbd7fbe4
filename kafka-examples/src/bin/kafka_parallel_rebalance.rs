//! Finish running records before a rebalance moves their partitions, so that a clean handover repeats nothing
//!
//! This adds a callback to kafka_parallel_consumer. When partitions are revoked, it waits until their records are done, and
//! stores their positions for the commit. So a clean handover repeats nothing and keeps the order of each key. At least
//! once: a crash, a refused commit or a record that takes longer than DRAIN repeats records.
//!
//! ```console
//! 1$ cargo lab run kafka_send -K : handover-orders ann:order-0 ben:order-1 ann:order-2
//! ...
//! 2$ cargo lab run kafka_parallel_rebalance
//! ...
//! partition [..] offset [..]: ann order-2 done
//! ...
//! 2^C
//! finishing: [0, 1, 2]
//! revoked: [0, 1, 2], lost: false, not done: 0
//! ```
//!
//! Notice:
//! - The group waits for this callback. DRAIN limits the wait, so one record cannot stop the group.
//! - The callback blocks its thread. Other threads of the runtime process the records.
//!
//! Try: start a second one while it processes the lines of a large file. Send 60000, an order of a minute. Settings:
//! KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_rebalance, kafka_parallel_consumer.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, RandomState};
use std::io::{Write, stderr, stdout};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use futures::{FutureExt, future};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext, Rebalance, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode::*};
use rdkafka::message::OwnedMessage;
use rdkafka::{ClientConfig, ClientContext, Message, TopicPartitionList};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

const TOPIC: &str = "handover-orders";
const GROUP: &str = "handover-orders";
/// Records that are received and not done.
const IN_FLIGHT: usize = 64;
/// Several keys share a slot, so a key sometimes waits for another key.
const SLOTS: usize = 16;
/// How long a rebalance waits for the running records.
const DRAIN: Duration = Duration::from_secs(10);
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: StreamConsumer<Offsets> = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "true")
        .set("topic.metadata.refresh.interval.ms", "10000") // finds a new topic
        .set("session.timeout.ms", "10000") // a crashed member keeps its partitions for this long
        .set("auto.commit.interval.ms", "1000")
        .set("enable.auto.offset.store", "false") // see kafka_consumer_group
        .create_with_context(Offsets::default())?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer.fetch_metadata(Some(TOPIC), TIMEOUT).context(tip)?;
    consumer.subscribe(&[TOPIC])?;

    // Dropped after the consumer, because the callback waits for these tasks.
    let mut tasks = JoinSet::new();
    let worked = work(&consumer, &mut tasks).await;
    // Commits and leaves the group. With the broker down, this can hang (librdkafka issue 3740).
    let (open, closed) = oneshot::channel::<()>();
    thread::spawn(move || drop((consumer, open)));
    let closed = timeout(DRAIN + TIMEOUT, closed).await;
    worked?;
    closed.map(drop).context("cannot close: no broker answers")
}

/// Processes up to IN_FLIGHT records at the same time. Ends with Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer<Offsets>, tasks: &mut JoinSet<i32>) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    let offsets = consumer.context();
    let mut turns: [Option<oneshot::Receiver<()>>; SLOTS] = Default::default();
    let hasher = RandomState::new();
    let slot = |key: &[u8]| hasher.hash_one(key) as usize % SLOTS;
    loop {
        tokio::select! {
            biased;
            _ = &mut stop => return Ok(()),
            Some(partition) = tasks.join_next() => offsets.store(consumer, &[partition?]),
            received = consumer.recv(), if tasks.len() < IN_FLIGHT => match received {
                Ok(order) => {
                    offsets.received(order.partition(), order.offset());
                    let (finished, next_turn) = oneshot::channel();
                    let turn = order.key().and_then(|key| turns[slot(key)].replace(next_turn));
                    tasks.spawn(in_turn(turn, order.detach(), offsets.clone(), finished));
                }
                Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
                Err(error) => return Err(error.into()),
            },
        }
    }
}

/// For each partition, the offsets that are received and not done, and the next offset to receive.
type Partitions = BTreeMap<i32, (BTreeSet<i64>, i64)>;

#[derive(Default)]
struct Offsets {
    map: Mutex<Partitions>,
    changed: Condvar,
}

impl ClientContext for Offsets {}

/// `println!` would panic on a closed pipe, and a callback must not panic.
impl ConsumerContext for Offsets {
    /// The pattern: wait until the records of the revoked partitions are done, and store their positions for the commit.
    fn pre_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        let Rebalance::Revoke(list) = rebalance else {
            return;
        };
        let all: Vec<_> = list.elements().iter().map(|at| at.partition()).collect();
        let _ = writeln!(stdout(), "finishing: {all:?}");
        let running = |map: &mut Partitions| -> usize {
            let moving = all.iter().filter_map(|at| map.get(at));
            moving.map(|(pending, _)| pending.len()).sum()
        };
        let wait = |map: &mut Partitions| running(map) > 0;
        drop(self.changed.wait_timeout_while(self.lock(), DRAIN, wait));
        let left = running(&mut self.lock());
        self.store(consumer, &all);
        self.lock().retain(|at, _| !all.contains(at));
        let lost = consumer.assignment_lost(); // too slow: the client does not commit
        let _ = writeln!(stdout(), "revoked: {all:?}, lost: {lost}, not done: {left}");
    }

    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        if let Err(error) = result {
            let _ = writeln!(stderr(), "not committed: {error}");
        }
    }
}

impl Offsets {
    fn received(&self, partition: i32, offset: i64) {
        let mut map = self.lock();
        let (pending, next) = map.entry(partition).or_default();
        pending.insert(offset);
        *next = offset + 1;
    }

    fn done(&self, partition: i32, offset: i64) {
        if let Some((pending, _)) = self.lock().get_mut(&partition) {
            pending.remove(&offset);
        }
        self.changed.notify_all();
    }

    /// Stores the lowest offset that is not done, for the next commit.
    fn store(&self, consumer: &impl Consumer<Self>, partitions: &[i32]) {
        for (at, (pending, next)) in self.lock().iter() {
            if partitions.contains(at) {
                // It adds 1, so give it the last offset that is done. Fails when the partition was lost.
                let _ = consumer.store_offset(TOPIC, *at, pending.first().unwrap_or(next) - 1);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Partitions> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Processes a record when the record before it in its slot is done, unless its partition was revoked.
async fn in_turn(
    turn: Option<oneshot::Receiver<()>>,
    order: OwnedMessage,
    offsets: Arc<Offsets>,
    _finished: oneshot::Sender<()>,
) -> i32 {
    if let Some(turn) = turn {
        let _ = turn.await; // until its task drops `_finished`
    }
    let (partition, offset) = (order.partition(), order.offset());
    let is_pending = |(pending, _): &(BTreeSet<i64>, i64)| pending.contains(&offset);
    if offsets.lock().get(&partition).is_some_and(is_pending) {
        process(&order).await;
        offsets.done(partition, offset);
    }
    partition
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
