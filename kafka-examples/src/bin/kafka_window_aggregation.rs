//! Windows: views per page in tumbling windows of 5 seconds of event time, right over crashes and late events
//!
//! A view counts for the window in which it happened, whenever it arrives. A window's count is written when the
//! watermark has passed its end, corrected by what comes within the allowed lateness, and then given up. What is later
//! still, no view at all, or of one page too many, goes to a topic of its own. Counts, open windows and positions are
//! one Kafka transaction: exactly once in `page-views.counts`, for readers with `read_committed`. Each partition counts
//! for itself: a page whose views are in several, for want of a key, has a count from each, and their sum is right.
//!
//! ```console
//! 1$ cargo lab run kafka_page_views 2026-01-01T12:00:00Z
//! sent: 183 page views [..]
//! 1$ cargo lab run kafka_window_aggregation
//! partition 0: from offset 0, 0 windows open
//! partition 1: from offset 0, 0 windows open
//! ...
//! window 12:00:00 /docs: 3 views
//! ...
//! window 12:00:00 /docs: 4 views, corrected
//! ...
//! too late: /docs of 12:00:04, the watermark is at 12:00:15
//! ...
//! window 12:00:55 [..]: [..] views
//! ...
//! 1^C
//! stopped; [..] counts, [..] corrections, [..] rejected
//! 1$ cargo lab run kafka_window_aggregation
//! partition 0: from offset [..], [..] open
//! partition 1: from offset [..], [..] open
//! 1^C
//! ...
//! ```
//!
//! Notice: windows like these are often called sliding. These tumble: they do not overlap, and each view is in one. To
//! count by the clock of the consumer instead gives other numbers after each restart, and counts a backlog as one big
//! peak. To keep the open window in memory alone and commit the offsets loses it when the program dies. And late events,
//! which vanish in most examples, are counted here and kept: `page-views.rejected`, with the reason in the headers.
//! The watermark is the latest time seen in a partition, less 2 seconds. A partition that was read to its end, and in
//! which nothing arrives for IDLE_MS, takes over the watermark of the furthest one: otherwise its last windows would
//! stay open for as long as nobody views its pages. If all are quiet, they do stay open, for no time passes in which
//! anything happens. A partition that waits to be read is not quiet: its backlog would be too late for that watermark.
//!
//! Try: `cargo lab kill kafka_window_aggregation` at any moment, start it again, compare the last count of each window.
//! Run kafka_page_views twice.
//!
//! Settings: KAFKA_BROKERS (localhost:9092); IDLE_MS (10000); BATCH (100) records or 200 ms make a transaction.
//! See also: kafka_page_views, kafka_exactly_once, kafka_compacted_table.

use std::collections::{BTreeMap, BTreeSet};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use chrono::{DateTime, Utc};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

const VIEWS: &str = "page-views";
const COUNTS: &str = "page-views.counts";
const REJECTED: &str = "page-views.rejected";
/// Per partition the newest snapshot of its open windows and its position.
const STATE: &str = "page-views.state";
const PARTITIONS: i32 = 2;
/// It reads all partitions by itself. A second program with this id takes over, and fences the first one off.
const ID: &str = "window-aggregation";
const WINDOW_MS: i64 = 5_000;
/// How far a view may be overtaken and still be in the first count of its window.
const OUT_OF_ORDER_MS: i64 = 2_000;
/// For how long after its end, by the watermark, a window is still corrected.
const LATENESS_MS: i64 = 5_000;
/// A view from further in the future has a wrong clock: it would close all windows at once.
const FUTURE_MS: i64 = 3_600_000;
/// Of what a partition has in open windows, for it has to fit into a snapshot: the bytes of the pages, and for each a
/// count. In JSON a page may grow to six times its length.
const MOST_BYTES: usize = 1_000_000;
const COUNT_BYTES: usize = 32;
/// For rejected views, which may be as large as the broker lets them be, and get headers; and for snapshots.
const LARGEST: &str = "10485760";
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Deserialize)]
struct View {
    page: String,
    at_ms: i64,
}

/// All that is known of one partition.
#[derive(Default, Serialize, Deserialize)]
struct Task {
    /// The offset of the next record.
    next: i64,
    watermark: i64,
    /// By their start, the views of each page.
    windows: BTreeMap<i64, BTreeMap<String, u64>>,
    /// What they take of `MOST_BYTES`.
    #[serde(default)]
    bytes: usize,
}

/// What a transaction has to write and, once that is committed, to tell.
enum Fact {
    Count {
        partition: i32,
        start: i64,
        page: String,
        views: u64,
        corrected: bool,
    },
    Rejected {
        record: OwnedMessage,
        reason: String,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let idle = Duration::from_millis(setting("IDLE_MS", 10_000)?);
    // Below the 100,000 that fit into the producer's queue.
    let batch = usize::try_from(setting("BATCH", 100)?)?.clamp(1, 10_000);
    create_topics(&brokers).await?;
    // The calls of a transaction block, so the work has a thread of its own.
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let mut worker = tokio::task::spawn_blocking(move || work(&brokers, batch, idle, &stopped));
    tokio::select! {
        ended = &mut worker => ended?,
        signal = tokio::signal::ctrl_c() => {
            signal?;
            stop.cancel();
            worker.await?
        }
    }
}

fn setting(name: &str, default: u64) -> anyhow::Result<u64> {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{name} is {text:?}, not a whole number")),
        Err(_) => Ok(default),
    }
}

impl Task {
    fn take(&mut self, record: &OwnedMessage, facts: &mut Vec<Fact>) {
        self.next = record.offset() + 1;
        let rejected = |reason| Fact::Rejected {
            record: record.clone(),
            reason,
        };
        let View { page, at_ms } = match read(record.payload()) {
            Ok(view) => view,
            Err(reason) => return facts.push(rejected(format!("not a page view: {reason}"))),
        };
        let start = at_ms.div_euclid(WINDOW_MS) * WINDOW_MS;
        let end = start + WINDOW_MS;
        if end + LATENESS_MS <= self.watermark {
            let (page, at, mark) = (short(&page), time(at_ms), time(self.watermark));
            let reason = format!("too late: {page} of {at}, the watermark is at {mark}");
            return facts.push(rejected(reason));
        }
        let pages = self.windows.get(&start);
        let new = !pages.is_some_and(|pages| pages.contains_key(&page));
        let needed = if new { page.len() + COUNT_BYTES } else { 0 };
        if self.bytes + needed > MOST_BYTES {
            let reason = format!(
                "no room: too many pages in open windows for {}",
                short(&page)
            );
            facts.push(rejected(reason));
        } else {
            self.bytes += needed;
            let pages = self.windows.entry(start).or_default();
            let views = pages.entry(page.clone()).or_default();
            *views += 1;
            if end <= self.watermark {
                facts.push(Fact::Count {
                    partition: record.partition(),
                    start,
                    page,
                    views: *views,
                    corrected: true,
                });
            }
        }
        // Without room, too: nothing else will ever close a window, and make some.
        self.advance(record.partition(), at_ms - OUT_OF_ORDER_MS, facts);
    }

    /// Moves the watermark: the first counts of the windows that it passes, and the end of those that are over.
    fn advance(&mut self, partition: i32, watermark: i64, facts: &mut Vec<Fact>) {
        if watermark <= self.watermark {
            return;
        }
        for (start, pages) in &self.windows {
            let end = start + WINDOW_MS;
            if self.watermark < end && end <= watermark {
                facts.extend(pages.iter().map(|(page, views)| Fact::Count {
                    partition,
                    start: *start,
                    page: page.clone(),
                    views: *views,
                    corrected: false,
                }));
            }
        }
        self.watermark = watermark;
        self.windows.retain(|start, pages| {
            let open = start + WINDOW_MS + LATENESS_MS > watermark;
            if !open {
                let bytes: usize = pages.keys().map(|page| page.len() + COUNT_BYTES).sum();
                self.bytes = self.bytes.saturating_sub(bytes);
            }
            open
        });
    }
}

/// Bytes from a topic can be anything.
fn read(payload: Option<&[u8]>) -> Result<View, String> {
    let payload = payload.ok_or("it has no payload")?;
    let view: View = serde_json::from_slice(payload).map_err(|error| error.to_string())?;
    let latest = Utc::now().timestamp_millis() + FUTURE_MS;
    if !(0..=latest).contains(&view.at_ms) {
        return Err(format!("its time is {}: a wrong clock", view.at_ms));
    }
    if view.page.is_empty() || view.page.len() > 1000 {
        return Err("its page is empty or too long".into());
    }
    Ok(view)
}

fn short(page: &str) -> String {
    page.chars().take(40).collect()
}

fn time(ms: i64) -> String {
    let time = DateTime::from_timestamp_millis(ms).unwrap_or_default();
    time.format("%H:%M:%S").to_string()
}

/// Begins again after every error but one. All that matters is in Kafka.
fn work(
    brokers: &str,
    batch: usize,
    idle: Duration,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let mut told = Told::default();
    while !stop.is_cancelled() {
        let Err(error) = session(brokers, batch, idle, stop, &mut told) else {
            break;
        };
        if is_fenced(&error) {
            return Err(error).context(
                "fenced off: another program has taken over, or the broker gave up on the transaction of this \
                 one; nothing that was in work here has been written",
            );
        }
        eprintln!("beginning again from what is committed: {error:#}");
        sleep(Duration::from_millis(500));
    }
    println!(
        "stopped; {} counts, {} corrections, {} rejected",
        told.counts, told.corrections, told.rejected
    );
    Ok(())
}

#[derive(Default)]
struct Told {
    counts: u32,
    corrections: u32,
    rejected: u32,
}

type Transactions = ThreadedProducer<DefaultProducerContext>;

fn session(
    brokers: &str,
    batch: usize,
    idle: Duration,
    stop: &CancellationToken,
    told: &mut Told,
) -> anyhow::Result<()> {
    let producer: Transactions = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("transactional.id", ID)
        .set("transaction.timeout.ms", "15000")
        .set("message.timeout.ms", "15000")
        // The broker's limit is for what is compressed, the client's for what is not: a view that was small enough for
        // the one can be too large for the other, and would never be rejected.
        .set("compression.type", "zstd")
        .set("message.max.bytes", "1000000000")
        .set("linger.ms", "0")
        .create()?;
    // Fences off who was here before, and aborts what that one left open. Only then is the state final.
    producer.init_transactions(PATIENCE)?;
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("group.id", ID)
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        .set("socket.timeout.ms", "5000");
    let mut tasks = restore(&config)?;
    let consumer: BaseConsumer = config
        .set("enable.partition.eof", "true")
        // Where the position is no more, the default would skip all that there is, and say nothing.
        .set("auto.offset.reset", "error")
        .create()?;
    let mut from = TopicPartitionList::new();
    for (partition, task) in &mut tasks {
        let (start, end) = consumer.fetch_watermarks(VIEWS, *partition, PATIENCE)?;
        if task.next < start {
            let lost = start - task.next;
            println!(
                "partition {partition}: LOST {lost} offsets, deleted before they were counted"
            );
            task.next = start;
        }
        // To read a new topic from its start would add it to the counts of the old one.
        let next = task.next;
        ensure!(
            next <= end,
            "partition {partition} ends at {end}, before {next}: not the topic that {STATE} is of"
        );
        from.add_partition_offset(VIEWS, *partition, Offset::Offset(task.next))?;
        let (next, open) = (task.next, task.windows.len());
        println!("partition {partition}: from offset {next}, {open} windows open");
    }
    // Assigned, and not subscribed: the transactional id, and no group, sees to it that only one is at work.
    consumer.assign(&from)?;

    // Since when there is nothing more to read in a partition.
    let mut quiet = BTreeMap::new();
    while !stop.is_cancelled() {
        let records = gather(&consumer, batch, &mut quiet)?;
        let (mut facts, mut changed) = (Vec::new(), BTreeSet::new());
        for record in &records {
            let partition = record.partition();
            let task = tasks.get_mut(&partition).context("not assigned")?;
            task.take(record, &mut facts);
            changed.insert(partition);
        }
        let furthest = tasks.values().map(|task| task.watermark).max().unwrap_or(0);
        for (partition, task) in &mut tasks {
            let since: Option<&Instant> = quiet.get(partition);
            let idle = since.is_some_and(|since| since.elapsed() >= idle);
            // After a full batch, its next views may wait in the client's queue, behind those of another partition.
            if idle && records.len() < batch && task.watermark < furthest {
                task.advance(*partition, furthest, &mut facts);
                changed.insert(*partition);
            }
        }
        if changed.is_empty() {
            continue;
        }
        let written = write(&producer, &consumer, &tasks, &changed, &facts);
        written.map_err(|error| match producer.client().fatal_error() {
            // After a fatal error every call says only that there was one.
            Some((code, _)) => error.context(KafkaError::Global(code)),
            None => error,
        })?;
        facts.iter().for_each(|fact| told.tell(fact));
    }
    Ok(())
}

/// The newest snapshot of each partition, from the compacted topic.
fn restore(config: &ClientConfig) -> anyhow::Result<BTreeMap<i32, Task>> {
    let reader: BaseConsumer = config
        .clone()
        .set("enable.partition.eof", "true")
        .create()?;
    let mut all = TopicPartitionList::new();
    let mut tasks = BTreeMap::new();
    for partition in 0..PARTITIONS {
        all.add_partition_offset(STATE, partition, Offset::Beginning)?;
        tasks.insert(partition, Task::default());
    }
    reader.assign(&all)?;
    let mut ends = BTreeSet::new();
    let mut deadline = Instant::now() + 2 * PATIENCE;
    while ends.len() < tasks.len() {
        match reader.poll(Duration::from_millis(100)) {
            Some(Ok(record)) => {
                let snapshot = record.payload().context("a snapshot has no payload")?;
                let task = serde_json::from_slice(snapshot).context("not a snapshot")?;
                tasks.insert(record.partition(), task);
                deadline = Instant::now() + 2 * PATIENCE;
            }
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                ends.insert(partition);
            }
            Some(Err(error)) => eprintln!("waiting for the broker: {error}"),
            None => {}
        }
        if Instant::now() > deadline {
            bail!("cannot read {STATE} to its end");
        }
    }
    Ok(tasks)
}

/// Up to `batch` records, as many as come within 200 ms of the first; none if it is quiet.
fn gather(
    consumer: &BaseConsumer,
    batch: usize,
    quiet: &mut BTreeMap<i32, Instant>,
) -> anyhow::Result<Vec<OwnedMessage>> {
    let mut records = Vec::new();
    let mut deadline = Instant::now() + Duration::from_millis(100);
    while records.len() < batch {
        match consumer.poll(deadline.saturating_duration_since(Instant::now())) {
            Some(Ok(record)) => {
                if records.is_empty() {
                    deadline = Instant::now() + Duration::from_millis(200);
                }
                quiet.remove(&record.partition());
                records.push(record.detach());
            }
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                quiet.insert(partition, Instant::now());
            }
            Some(Err(
                error @ (KafkaError::MessageConsumptionFatal(_)
                | KafkaError::MessageConsumption(RDKafkaErrorCode::AutoOffsetReset)),
            )) => bail!(error),
            // A lost connection, for example: the client tries again by itself.
            Some(Err(error)) => eprintln!("waiting for the broker: {error}"),
            None => break,
        }
    }
    Ok(records)
}

/// The pattern: what is told, what is remembered and how far it has got, in one transaction.
fn write(
    producer: &Transactions,
    consumer: &BaseConsumer,
    tasks: &BTreeMap<i32, Task>,
    changed: &BTreeSet<i32>,
    facts: &[Fact],
) -> anyhow::Result<()> {
    producer.begin_transaction()?;
    for fact in facts {
        match fact {
            Fact::Count {
                partition,
                start,
                page,
                views,
                ..
            } => {
                // So that a corrected count replaces the first one, and none that is another partition's.
                let key = format!("{page} {start} {partition}");
                let count = serde_json::json!({
                    "page": page, "window_ms": start, "partition": partition, "views": views,
                });
                let count = count.to_string();
                let record = BaseRecord::to(COUNTS).key(&key).payload(&count);
                producer.send(record).map_err(|(error, _)| error)?;
            }
            Fact::Rejected { record, reason } => reject(producer, record, reason)?,
        }
    }
    let mut positions = TopicPartitionList::new();
    for partition in changed {
        // All of it: what is open is small. With many pages, write only what has changed, under its own key.
        let snapshot = serde_json::to_string(&tasks[partition])?;
        let record = BaseRecord::to(STATE)
            .partition(*partition)
            .key("snapshot")
            .payload(&snapshot);
        producer.send(record).map_err(|(error, _)| error)?;
        let next = Offset::Offset(tasks[partition].next);
        positions.add_partition_offset(VIEWS, *partition, next)?;
    }
    // The snapshot has the position, too, and that one is used. This is for whoever watches the lag.
    let group = consumer.group_metadata().context("no group")?;
    producer.send_offsets_to_transaction(&positions, &group, PATIENCE)?;
    // The commit would wait for the delivery reports, too, but in steps of 100 ms.
    let deadline = Instant::now() + PATIENCE;
    while producer.in_flight_count() > 0 && Instant::now() < deadline {
        sleep(Duration::from_millis(1));
    }
    // A record that was not delivered makes this fail.
    producer.commit_transaction(PATIENCE)?;
    Ok(())
}

/// The record as it came, with where it came from and why it was not counted.
fn reject(producer: &Transactions, record: &OwnedMessage, reason: &str) -> anyhow::Result<()> {
    let (partition, offset) = (record.partition().to_string(), record.offset().to_string());
    let origin = [
        ("reason", reason),
        ("topic", record.topic()),
        ("partition", &partition),
        ("offset", &offset),
    ];
    let known = record.headers().cloned().unwrap_or_else(OwnedHeaders::new);
    let headers = origin.into_iter().fold(known, |headers, (key, value)| {
        headers.insert(Header {
            key,
            value: Some(value),
        })
    });
    let mut rejected = BaseRecord::<[u8], [u8]>::to(REJECTED).headers(headers);
    (rejected.key, rejected.payload) = (record.key(), record.payload());
    producer.send(rejected).map_err(|(error, _)| error)?;
    Ok(())
}

impl Told {
    fn tell(&mut self, fact: &Fact) {
        match fact {
            Fact::Count {
                start,
                page,
                views,
                corrected,
                ..
            } => {
                let (start, page) = (time(*start), short(page));
                if *corrected {
                    self.corrections += 1;
                    println!("window {start} {page}: {views} views, corrected");
                } else {
                    self.counts += 1;
                    println!("window {start} {page}: {views} views");
                }
            }
            Fact::Rejected { reason, .. } => {
                self.rejected += 1;
                println!("{reason}");
            }
        }
    }
}

/// The broker has a newer user of this id.
fn is_fenced(error: &anyhow::Error) -> bool {
    use RDKafkaErrorCode::{Fenced, InvalidProducerEpoch, ProducerFenced};
    let code = match error.downcast_ref() {
        Some(KafkaError::Transaction(error)) => Some(error.code()),
        Some(error) => error.rdkafka_error_code(),
        None => None,
    };
    matches!(code, Some(Fenced | InvalidProducerEpoch | ProducerFenced))
}

/// Left to the broker, the topics would be created by their first record, with the broker's settings.
async fn create_topics(brokers: &str) -> anyhow::Result<()> {
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
    let topic = |name| NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(-1));
    let topics = [
        topic(VIEWS),
        // The last count of a window is the right one.
        topic(COUNTS).set("cleanup.policy", "compact"),
        topic(REJECTED).set("max.message.bytes", LARGEST),
        topic(STATE)
            .set("cleanup.policy", "compact")
            .set("max.message.bytes", LARGEST),
    ];
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin.create_topics(&topics, &options).await {
        Ok(results) => {
            for result in results {
                match result {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                    Err((topic, code)) => bail!("cannot create topic {topic}: {code}"),
                }
            }
        }
        // Not every cluster lets its clients create topics; librdkafka's mock does not.
        Err(error) => eprintln!("leaving the topics to the broker: {error}"),
    }
    Ok(())
}
