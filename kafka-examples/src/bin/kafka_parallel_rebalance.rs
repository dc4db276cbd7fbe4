//! Finish the records in work before a rebalance takes them away, so that a clean handover repeats nothing
//!
//! This adds a callback to kafka_parallel_consumer: when partitions are revoked, it waits until their records in work are
//! done, and stores their positions. So a handover repeats nothing and keeps the order of each key. At least once: a crash,
//! or a record that takes longer than DRAIN, repeats records.
//!
//! ```console
//! 1$ cargo lab run kafka_send -K : handover-orders ann:order-0 ben:order-1 ann:order-2
//! ...
//! 2$ cargo lab run kafka_parallel_rebalance
//! ...
//! partition [..] offset [..]: ann order-2 done
//! ...
//! 2^C
//! ...
//! revoked: [0, 1, 2], in work: [..], repeated: 0
//! left the group
//! ```
//!
//! Notice:
//! - The whole group waits for the callback: at most DRAIN, or one record could stop the group.
//! - The callback blocks its thread. The records are worked on by other threads of the runtime.
//!
//! Try: start a second one while it works on the lines of a large file, and look for a line that is done twice.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_rebalance, kafka_parallel_consumer.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::io::{self, Write};
use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext, Rebalance, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
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
/// Keys share these, so that a key sometimes waits for another one.
const SLOTS: usize = 16;
/// How long a rebalance waits for the records in work.
const DRAIN: Duration = Duration::from_secs(20);
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: StreamConsumer<Offsets> = ClientConfig::new()
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
        .create_with_context(Offsets::default())?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer
        .fetch_metadata(Some(TOPIC), TIMEOUT)
        .context(hint)?;
    consumer.subscribe(&[TOPIC])?;

    // It lives longer than the consumer: the tasks continue while the callback waits for them.
    let mut tasks = JoinSet::new();
    let worked = work(&consumer, &mut tasks).await;
    // Leave the group, so that another member takes over at once. With the broker down, the close can hang
    // (librdkafka issue 3740): wait no longer.
    let (done, closed) = oneshot::channel();
    thread::spawn(move || {
        drop(consumer);
        done.send(())
    });
    let closed = timeout(DRAIN + TIMEOUT, closed).await;
    worked?;
    closed.context("closed without leaving the group: no broker answers")??;
    println!("left the group");
    Ok(())
}

/// Works on up to IN_FLIGHT records at once, until Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer<Offsets>, tasks: &mut JoinSet<i32>) -> anyhow::Result<()> {
    let offsets = consumer.context();
    let mut turns: [Option<oneshot::Receiver<()>>; SLOTS] = Default::default();
    let mut stop = pin!(shutdown());
    loop {
        tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
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

impl ConsumerContext for Offsets {
    /// The pattern: wait until the revoked partitions have no record in work, and store their positions for the commit.
    fn pre_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        let Rebalance::Revoke(list) = rebalance else {
            return;
        };
        let revoked: Vec<i32> = list.elements().iter().map(|at| at.partition()).collect();
        let in_work = |map: &mut Partitions| -> usize {
            let moving = revoked.iter().filter_map(|at| map.get(at));
            moving.map(|(pending, _)| pending.len()).sum()
        };
        let before = in_work(&mut self.lock());
        let is_busy = |map: &mut Partitions| in_work(map) > 0;
        drop(self.changed.wait_timeout_while(self.lock(), DRAIN, is_busy));
        let left = in_work(&mut self.lock());
        self.store(consumer, &revoked);
        self.lock().retain(|at, _| !revoked.contains(at));
        // Lost: the member was too slow, and the client commits nothing.
        let word = ["revoked", "lost"][usize::from(consumer.assignment_lost())];
        // `println!` would panic when standard output is closed.
        let _ = writeln!(
            io::stdout(),
            "{word}: {revoked:?}, in work: {before}, repeated: {left}"
        );
    }

    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        if let Err(error) = result {
            let _ = writeln!(io::stderr(), "not committed, will be repeated: {error}");
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
        let map = self.lock();
        for (at, (pending, next)) in map.iter().filter(|(at, _)| partitions.contains(at)) {
            // The client adds 1: it wants the offset of the last record that is done.
            let last = pending.first().unwrap_or(next) - 1;
            if let Err(error) = consumer.store_offset(TOPIC, *at, last) {
                let _ = writeln!(io::stderr(), "partition {at}: not stored: {error}");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Partitions> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Works on a record when the record before it in its slot is done, unless its partition was revoked.
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
