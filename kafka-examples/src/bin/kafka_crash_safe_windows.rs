//! Crash-safe windows: counts and positions in one Kafka transaction
//!
//! Counts page views in windows of 5 seconds of event time, like kafka_window_aggregation. Although the process is killed
//! at any moment, readers with `read_committed` find each view counted once in `page-views.counts`. There, the last record
//! of a key is the count of a page in a window and a partition. A view that is too late or malformed is only printed.
//!
//! ```console
//! $ cargo lab run kafka_page_views 2026-01-01T12:00:00Z
//! ...
//! 1$ cargo lab run kafka_crash_safe_windows
//! partition 0: continues at offset 0
//! ...
//! partition [..] not counted: too late: /docs of 12:00:04, watermark 12:00:15
//! ...
//! 1^C
//! ...
//! ```
//!
//! Notice:
//! - The metadata of each committed offset says where the oldest open window begins. A restart reads from there to rebuild
//!   the open windows, without writing. A count is written at each view, not when its window closes.
//! - When a second instance starts, the broker fences the first, which ends at its next commit. A failed transaction ends
//!   the program, too. The next start continues: let systemd or Kubernetes restart it.
//! - A partition that is added to the topic is read after a restart. If retention deletes views too early, it is reported.
//! - The broker deletes positions with the topic, or 7 days after the last commit (`offsets.retention.minutes`). Then the
//!   views that are still in the topic are counted again from 1, under the same keys.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_page_views, kafka_exactly_once.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use futures::{FutureExt, StreamExt, future};
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::message::BorrowedMessage;
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use serde::Deserialize;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;

const VIEWS: &str = "page-views";
const COUNTS: &str = "page-views.counts";
const ID: &str = "crash-safe-windows";
const TIMEOUT: Duration = Duration::from_secs(5);
const BATCH: usize = 100;
const WINDOW: TimeDelta = TimeDelta::seconds(5);
const OUT_OF_ORDER: TimeDelta = TimeDelta::seconds(2);
const LATENESS: TimeDelta = TimeDelta::seconds(5);
const FUTURE: TimeDelta = TimeDelta::minutes(2);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers);
    let producer: FutureProducer = config.clone().set("transactional.id", ID).create()?;
    let consumer: StreamConsumer = config
        .set("group.id", ID) // its positions are stored under this name
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "error") // other values skip deleted views silently
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let topic = consumer.fetch_metadata(Some(VIEWS), TIMEOUT).context(tip)?;
    let mut all = TopicPartitionList::new();
    for partition in topic.topics().iter().flat_map(|topic| topic.partitions()) {
        all.add_partition(VIEWS, partition.id());
    }
    ensure!(all.count() > 0, "no topic {VIEWS}, or no permission");

    // Fences the previous instance and ends its transaction. After this, its positions are final.
    producer.init_transactions(6 * TIMEOUT)?;
    let partitions = assign(&consumer, all)?;
    let worked = work(&consumer, &producer, partitions).await;
    worked.map_err(|error| match producer.client().fatal_error() {
        Some((_, reason)) => anyhow!("the transaction is not written: {reason}"),
        None => error,
    })
}

/// Starts to read each partition at the oldest view in an open window.
fn assign(consumer: &StreamConsumer, mut all: TopicPartitionList) -> anyhow::Result<Partitions> {
    let mut partitions = Partitions::new();
    for position in consumer.committed_offsets(all.clone(), TIMEOUT)?.elements() {
        position.error()?;
        let id = position.partition();
        let (start, end) = consumer.fetch_watermarks(VIEWS, id, TIMEOUT)?;
        let next = match position.offset() {
            Offset::Offset(next) => next,
            _ => start,
        };
        ensure!(next <= end, "partition {id} ends at {end}, before {next}");
        println!("partition {id}: continues at offset {next}");
        let state = serde_json::from_str(position.metadata());
        let (oldest, mut watermark) = state.unwrap_or((next, DateTime::UNIX_EPOCH));
        if oldest < start {
            // Their windows could not be rebuilt, so close them.
            let lost = (start - next).max(0);
            println!("partition {id}: views before offset {start} are deleted, {lost} are LOST");
            watermark += OUT_OF_ORDER + WINDOW + LATENESS;
        }
        all.set_partition_offset(VIEWS, id, Offset::Offset(oldest.max(start)))?;
        let partition = partitions.entry(id).or_default();
        (partition.next, partition.watermark) = (next, watermark);
    }
    consumer.assign(&all)?;
    Ok(partitions)
}

/// Counts views and commits them in batches. Ends with Ctrl-C or SIGTERM.
async fn work(
    consumer: &StreamConsumer,
    producer: &FutureProducer,
    mut partitions: Partitions,
) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    // A batch has all views that are received already, but at most BATCH.
    let mut batches = consumer.stream().take_until(stop).ready_chunks(BATCH);
    while let Some(batch) = batches.next().await {
        let (mut counts, mut is_new) = (Vec::new(), false);
        for received in batch {
            match received {
                Ok(view) => {
                    let (id, offset) = (view.partition(), view.offset());
                    let partition = partitions.entry(id).or_default();
                    let counted = partition.count(&view);
                    if offset < partition.next {
                        continue; // it only rebuilds an open window
                    }
                    (partition.next, is_new) = (offset + 1, true);
                    match counted {
                        Ok(count) => counts.push((id, count)),
                        // Printed before the commit. So a crash can repeat the line, but not lose it.
                        Err(why) => println!("partition {id} offset {offset} not counted: {why}"),
                    }
                }
                Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
                Err(error) => return Err(error.into()),
            }
        }
        if is_new {
            commit(consumer, producer, &partitions, &counts).await?;
        }
        for (_, (window, page, views)) in counts {
            println!("window {} {page}: {views} views", window.time());
        }
    }
    Ok(())
}

/// The pattern: the counts and the positions are in one transaction.
async fn commit(
    consumer: &StreamConsumer,
    producer: &FutureProducer,
    partitions: &Partitions,
    counts: &[(i32, Count)],
) -> anyhow::Result<()> {
    producer.begin_transaction()?;
    for (id, (window, page, views)) in counts {
        let ms = window.timestamp_millis();
        // The last record of a key replaces the others, also in a compacted topic.
        let key = format!("{page} {ms} {id}");
        let count = json!({"page": page, "window_ms": ms, "partition": id, "views": views});
        let count = count.to_string();
        // A failed delivery makes the commit fail, so nothing waits for its report here.
        let sent = producer.send_result(FutureRecord::to(COUNTS).key(&key).payload(&count));
        sent.map_err(|(error, _)| error)?;
    }
    let mut positions = TopicPartitionList::new();
    for (id, partition) in partitions {
        let oldest = partition.windows.values().map(|(_, first)| *first).min();
        let state = (oldest.unwrap_or(partition.next), partition.watermark);
        let mut position = positions.add_partition(VIEWS, *id);
        position.set_offset(Offset::Offset(partition.next))?;
        position.set_metadata(serde_json::to_string(&state)?);
    }
    let group = consumer.group_metadata().context("no group")?;
    let producer = producer.clone();
    // In its own thread: after the death of a node, the first call can ignore its timeout (librdkafka issue 5456).
    let (done, committed) = oneshot::channel();
    thread::spawn(move || {
        let sent = producer.send_offsets_to_transaction(&positions, &group, 3 * TIMEOUT);
        done.send(sent.and_then(|()| producer.commit_transaction(3 * TIMEOUT)))
    });
    let committed = timeout(7 * TIMEOUT, committed).await;
    Ok(committed.context("the commit of the transaction hangs")???)
}

#[derive(Deserialize)]
struct View {
    page: String,
    #[serde(rename = "at_ms", with = "chrono::serde::ts_milliseconds")]
    at: DateTime<Utc>,
}

/// A window, a page, and its views.
type Count = (DateTime<Utc>, String, u64);
type Partitions = BTreeMap<i32, Partition>;

#[derive(Default)]
struct Partition {
    /// The position. Views before it are counted already, and only rebuild the open windows.
    next: i64,
    watermark: DateTime<Utc>,
    /// By window and page: the number of views, and the offset of the first of them.
    windows: BTreeMap<(DateTime<Utc>, String), (u64, i64)>,
}

impl Partition {
    /// Counts a view in the window of its own time. An error is the reason not to count it.
    fn count(&mut self, record: &BorrowedMessage<'_>) -> anyhow::Result<Count> {
        let View { page, at } = serde_json::from_slice(record.payload().unwrap_or_default())?;
        // Compared with the record's time, not with the clock, so that a restart decides the same.
        let sent = DateTime::from_timestamp_millis(record.timestamp().to_millis().unwrap_or(0));
        let valid = DateTime::UNIX_EPOCH..sent.unwrap_or_default() + FUTURE;
        ensure!(valid.contains(&at), "its time is {at}");
        ensure!(page.len() <= 1000, "its page is too long");
        let window = at.duration_trunc(WINDOW)?;
        let (time, mark) = (at.time(), self.watermark.time());
        let is_open = window + WINDOW + LATENESS > self.watermark;
        ensure!(is_open, "too late: {page} of {time}, watermark {mark}");
        self.watermark = self.watermark.max(at - OUT_OF_ORDER);
        let closed = self.watermark - LATENESS - WINDOW;
        self.windows.retain(|(window, _), _| *window > closed);
        let new = (0, record.offset());
        let (views, _) = self.windows.entry((window, page.clone())).or_insert(new);
        *views += 1;
        Ok((window, page, *views))
    }
}

/// The client recovers from these errors by itself. Others, such as a missing permission, are final.
fn is_temporary(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    matches!(code, Some(AllBrokersDown | Resolve | OperationTimedOut))
        || matches!(code, Some(BrokerTransportFailure | UnknownTopicOrPartition))
}
