//! Work on many records at once, in order per key, and commit only what is done without a gap
//!
//! A partition is read by one member, but it may work on several of its records at once. Records with the same key go
//! to the same lane, which keeps their order. They finish out of order, so the position is the lowest offset that is
//! not done: at least once, and a crash loses nothing that was still in work.
//!
//! ```console
//! 1$ cargo lab run kafka_parallel_consumer send 200
//! sent: 200 orders of 20 users
//! 1$ cargo lab run kafka_parallel_consumer
//! assigned: [0, 1]
//! ...
//! done: partition [..] offset [..] user-[..] order-199
//! ...
//! 1^C
//! ...
//! handing over [0, 1]: committed {[..]}
//! left the group; orders done: [..]
//! ```
//!
//! Notice: to commit each record when its own work is done is the usual mistake. The commit of offset 9 says that 5 is
//! done, too, and if 5 is still in work when the program dies, it is lost. Both bounds matter: LANES limits how
//! much is done at once, and each lane's queue how much is read ahead. A lane whose queue is full stops the reading:
//! this is the price of order, for one busy key holds up the others. A rebalance first finishes every order that lies
//! before the last one that has begun, also those in the queues: a position before an order that is done would repeat
//! it. What lies behind is left to the next owner.
//!
//! Try: LANES=1 against LANES=16 with `send 2000`. `cargo lab kill kafka_parallel_consumer` in the middle, start it
//! again, and look for a gap.
//!
//! Settings: KAFKA_BROKERS (localhost:9092); LANES (8); the arguments `send N` write orders.
//! See also: kafka_rebalance, kafka_pitfall_ordering, kafka_pitfall_auto_commit.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{
    BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance, StreamConsumer,
};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::OwnedMessage;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, ClientContext, Message, Offset, TopicPartitionList};
use tokio::sync::mpsc;
use tokio::time::{interval, sleep};

const TOPIC: &str = "parallel-orders";
const PARTITIONS: i32 = 2;
const GROUP: &str = "parallel-orders";
const QUEUE: usize = 16;
const PATIENCE: Duration = Duration::from_secs(5);
/// Time for the work in hand, and for the last commit.
const LEAVING: Duration = Duration::from_secs(40);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    create_topic(&brokers).await?;
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => consume(&brokers).await,
        ["send", count] => {
            send(
                &brokers,
                count.parse().context("N is the number of orders")?,
            )
            .await
        }
        _ => bail!("usage: kafka_parallel_consumer [send N]"),
    }
}

async fn send(brokers: &str, count: u32) -> anyhow::Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // Without it, a retry of one order could be overtaken by the next.
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    let mut deliveries = Vec::new();
    for number in 0..count {
        let (user, order) = (format!("user-{}", number % 20), format!("order-{number}"));
        let record = FutureRecord::to(TOPIC).key(&user).payload(&order);
        deliveries.push(producer.send_result(record).map_err(|(error, _)| error)?);
    }
    for delivery in deliveries {
        let report = delivery.await?.map_err(|(error, _)| error);
        report.with_context(|| format!("an order has no delivery report from {brokers}"))?;
    }
    println!("sent: {count} orders of 20 users");
    Ok(())
}

async fn consume(brokers: &str) -> anyhow::Result<()> {
    let lanes: u64 = match std::env::var("LANES") {
        Ok(lanes) => lanes.parse().context("LANES is a number of lanes")?,
        Err(_) => 8,
    };
    let lanes = lanes.clamp(1, 1000);
    let consumer: StreamConsumer<Ledger> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "false")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("session.timeout.ms", "10000")
        // Bounds the last commit if the brokers are gone by then.
        .set("socket.timeout.ms", "5000")
        .create_with_context(Ledger::default())?;
    consumer.subscribe(&[TOPIC])?;
    let ledger = consumer.context().clone();
    let worked = read(&consumer, lanes).await;
    // Revokes all partitions: finishes what is in work, and commits.
    tokio::task::block_in_place(|| leave(consumer));
    worked?;
    println!("left the group; orders done: {}", ledger.pages().total);
    Ok(())
}

/// Until Ctrl-C.
async fn read(consumer: &StreamConsumer<Ledger>, lanes: u64) -> anyhow::Result<()> {
    let ledger = consumer.context();
    let queues: Vec<_> = (0..lanes).map(|_| lane()).collect();

    let mut commit = interval(Duration::from_secs(1));
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let received = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            _ = commit.tick() => {
                let positions = list(&ledger.pages().positions(|_| true))?;
                if positions.count() > 0 {
                    // Nobody waits for it: if it fails, the next one covers it. `commit_callback` tells.
                    consumer.commit(&positions, CommitMode::Async)?;
                }
                continue;
            }
            received = consumer.recv() => received,
        };
        match received {
            Ok(order) => {
                // Without a key there is no order to keep: any lane will do.
                let mut hasher = DefaultHasher::new();
                match order.key() {
                    Some(key) => key.hash(&mut hasher),
                    None => order.offset().hash(&mut hasher),
                }
                let queue = &queues[usize::try_from(hasher.finish() % lanes)?];
                let owner = ledger.pages().received(order.partition(), order.offset());
                let job = Job {
                    owner,
                    order: order.detach(),
                    ledger: ledger.clone(),
                };
                if queue.send(job).await.is_err() {
                    bail!("a lane has died");
                }
            }
            Err(error @ KafkaError::MessageConsumptionFatal(_)) => bail!(error),
            // A lost connection, for example: the client tries again by itself, and says so each time.
            Err(error) => eprintln!("waiting for the broker: {error}"),
        }
    }
    Ok(())
}

/// Leaves the group: the others take over now and not after session.timeout.ms.
///
/// With the broker gone this takes as long as that time, and sometimes it never ends (librdkafka 2.12, its issue 3740).
/// Hence a thread that can be left behind.
fn leave(consumer: StreamConsumer<Ledger>) {
    let (done, left) = std::sync::mpsc::channel();
    thread::spawn(move || {
        drop(consumer);
        done.send(())
    });
    if left.recv_timeout(LEAVING).is_err() {
        eprintln!("left without a word to the group: no broker answers");
    }
}

struct Job {
    order: OwnedMessage,
    owner: u64,
    ledger: Arc<Ledger>,
}

/// Works on one record after the other. It ends when the sender is dropped.
fn lane() -> mpsc::Sender<Job> {
    let (sender, mut jobs) = mpsc::channel::<Job>(QUEUE);
    tokio::spawn(async move {
        while let Some(job) = jobs.recv().await {
            let (partition, offset) = (job.order.partition(), job.order.offset());
            if job.ledger.pages().begin(partition, job.owner, offset) {
                work(&job.order).await;
                job.ledger.pages().done(partition, job.owner, offset);
            }
        }
    });
    sender
}

/// A job can also end because its work, or that of a job before it in the lane, has panicked. A rebalance must not wait
/// for such a job. Its record is not done.
impl Drop for Job {
    fn drop(&mut self) {
        let (partition, offset) = (self.order.partition(), self.order.offset());
        self.ledger.pages().end(partition, self.owner, offset);
        self.ledger.ended.notify_all();
    }
}

async fn work(order: &OwnedMessage) {
    let place = format!("partition {} offset {}", order.partition(), order.offset());
    // Takes 5 to 35 ms, so that orders overtake each other.
    sleep(Duration::from_millis(
        5 + order.offset().unsigned_abs() * 7 % 31,
    ))
    .await;
    let key = String::from_utf8_lossy(order.key().unwrap_or_default());
    match order.payload().map(std::str::from_utf8) {
        Some(Ok(text)) if !text.is_empty() => println!("done: {place} {key} {text}"),
        // It would fail for ever. It stays in the log, at the place that is printed.
        _ => println!("not an order, skipped: {place}"),
    }
}

/// Who works on what.
#[derive(Default)]
struct Ledger {
    pages: Mutex<Pages>,
    ended: Condvar,
}

impl Ledger {
    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct Pages {
    open: BTreeMap<i32, Page>,
    last_owner: u64,
    total: u64,
}

/// One partition, from its assignment to its revocation.
struct Page {
    /// Tells records of this time from those of an earlier one, which may still wait in a lane.
    owner: u64,
    /// Received and not done.
    pending: BTreeSet<i64>,
    /// Waiting or in work: pending, too, unless it was just done.
    jobs: BTreeSet<i64>,
    next: i64,
    /// The highest offset of which the work has begun.
    begun: i64,
    /// Being revoked: nothing begins any more behind that offset.
    closing: bool,
}

impl Pages {
    fn received(&mut self, partition: i32, offset: i64) -> u64 {
        let page = self.open.entry(partition).or_insert_with(|| {
            self.last_owner += 1;
            Page {
                owner: self.last_owner,
                pending: BTreeSet::new(),
                jobs: BTreeSet::new(),
                next: offset,
                begun: -1,
                closing: false,
            }
        });
        page.pending.insert(offset);
        page.jobs.insert(offset);
        page.next = page.next.max(offset + 1);
        page.owner
    }

    fn page(&mut self, partition: i32, owner: u64) -> Option<&mut Page> {
        let page = self.open.get_mut(&partition)?;
        (page.owner == owner).then_some(page)
    }

    /// Whether the record is still ours to work on.
    fn begin(&mut self, partition: i32, owner: u64, offset: i64) -> bool {
        match self.page(partition, owner) {
            Some(page) if !page.closing || offset < page.begun => {
                page.begun = page.begun.max(offset);
                true
            }
            _ => false,
        }
    }

    fn done(&mut self, partition: i32, owner: u64, offset: i64) {
        self.total += 1;
        if let Some(page) = self.page(partition, owner) {
            page.pending.remove(&offset);
        }
    }

    fn end(&mut self, partition: i32, owner: u64, offset: i64) {
        if let Some(page) = self.page(partition, owner) {
            page.jobs.remove(&offset);
        }
    }

    /// The contiguous prefix: all before the first offset that is not done.
    fn positions(&self, of: impl Fn(i32) -> bool) -> BTreeMap<i32, i64> {
        let position = |page: &Page| page.pending.first().copied().unwrap_or(page.next);
        let pages = self.open.iter().filter(|(partition, _)| of(**partition));
        pages
            .map(|(partition, page)| (*partition, position(page)))
            .collect()
    }
}

fn list(positions: &BTreeMap<i32, i64>) -> KafkaResult<TopicPartitionList> {
    let mut list = TopicPartitionList::new();
    for (partition, next) in positions {
        list.add_partition_offset(TOPIC, *partition, Offset::Offset(*next))?;
    }
    Ok(list)
}

impl ClientContext for Ledger {}

impl ConsumerContext for Ledger {
    /// Called from `recv`, thus while the lanes go on.
    fn pre_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        let (list_of, revoked) = match rebalance {
            Rebalance::Assign(list) => (list, false),
            Rebalance::Revoke(list) => (list, true),
            Rebalance::Error(error) => {
                let _ = writeln!(io::stderr(), "rebalance failed: {error}");
                return;
            }
        };
        let moving: Vec<i32> = list_of.elements().iter().map(|at| at.partition()).collect();
        if moving.is_empty() {
            return;
        }
        if !revoked {
            return say(&format!("assigned: {moving:?}"));
        }
        let mut pages = self.pages();
        for (_, page) in pages
            .open
            .iter_mut()
            .filter(|(partition, _)| moving.contains(partition))
        {
            page.closing = true;
        }
        let busy = |pages: &mut Pages| {
            let mut moving = moving
                .iter()
                .filter_map(|partition| pages.open.get(partition));
            moving.any(|page| page.jobs.range(..=page.begun).next().is_some())
        };
        // Not for ever: the whole group waits for it. What is not done by then, and all behind it, is done again.
        let (mut pages, waited) = self
            .ended
            .wait_timeout_while(pages, 4 * PATIENCE, busy)
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            say(&format!(
                "giving up on what is still in work of {moving:?}: it will be repeated"
            ));
        }
        let positions = pages.positions(|partition| moving.contains(&partition));
        pages
            .open
            .retain(|partition, _| !moving.contains(partition));
        drop(pages);
        if consumer.assignment_lost() {
            return say(&format!(
                "lost {moving:?}: too slow for the group, work may be repeated"
            ));
        }
        if positions.is_empty() {
            return say(&format!("handing over {moving:?}: nothing was done"));
        }
        match list(&positions).and_then(|list| consumer.commit(&list, CommitMode::Sync)) {
            Ok(()) => say(&format!("handing over {moving:?}: committed {positions:?}")),
            Err(error) => say(&format!(
                "handing over {moving:?}: work may be repeated: {error}"
            )),
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        if let Err(error) = result {
            let _ = writeln!(io::stderr(), "commit failed: {error}");
        }
    }
}

/// For callbacks. On a closed pipe `println!` panics, and a consumer whose rebalance was broken off is never closed.
fn say(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}

/// Left to the broker, the topic would be created by the first record, with the broker's settings.
async fn create_topic(brokers: &str) -> anyhow::Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    // It blocks, but nothing else runs yet.
    admin
        .inner()
        .fetch_metadata(None, PATIENCE)
        .with_context(|| {
            format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one")
        })?;
    // -1 is the broker's default replication factor.
    let topic = NewTopic::new(TOPIC, PARTITIONS, TopicReplication::Fixed(-1));
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin.create_topics([&topic], &options).await {
        Ok(results) => {
            for result in results {
                match result {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                    Err((topic, code)) => bail!("cannot create topic {topic}: {code}"),
                }
            }
        }
        // Not every cluster lets its clients create topics; librdkafka's mock does not.
        Err(error) => eprintln!("leaving topic {TOPIC} to the broker: {error}"),
    }
    Ok(())
}
