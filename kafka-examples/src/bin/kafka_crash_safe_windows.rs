//! Crash-safe windows: counts and positions in one Kafka transaction
//!
//! Counts page views in windows of 5 seconds of event time, like kafka_window_aggregation. After a crash at any moment,
//! readers with `read_committed` find each view counted once in `page-views.counts`, where the last record of a key is
//! the count. Or they find it once in `page-views.rejected`, because it was too late or not a view.
//!
//! ```console
//! $ cargo lab run kafka_page_views 2026-01-01T12:00:00Z
//! ...
//! 1$ cargo lab run kafka_crash_safe_windows
//! partition 0: continues at offset 0
//! ...
//! rejected: too late: /docs of 12:00:04, the watermark is at 12:00:15
//! ...
//! 1^C
//! ...
//! ```
//!
//! Notice:
//! - A position is stored with the offset of the oldest view in an open window. A restart reads from there, and rebuilds
//!   the open windows without writing. The new count is written after each view, so no view waits for the next one.
//! - The broker fences the first instance when a second one starts (`transactional.id`). It ends then.
//! - A failed transaction ends the program. The next start continues: let systemd or Kubernetes restart it.
//! - The broker deletes positions with the topic, or after 7 days without a commit (`offsets.retention.minutes`). Then
//!   all views in the topic are counted again, under the same keys.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_page_views, kafka_exactly_once.

use std::collections::BTreeMap;
use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedHeaders, BorrowedMessage, Header, OwnedHeaders};
use rdkafka::producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use serde::Deserialize;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{Instant, interval, timeout, timeout_at};

const VIEWS: &str = "page-views";
const COUNTS: &str = "page-views.counts";
const REJECTED: &str = "page-views.rejected";
const ID: &str = "crash-safe-windows";
const TIMEOUT: Duration = Duration::from_secs(5);
/// A transaction ends after this many views or this time.
const BATCH: usize = 100;
const BATCH_TIME: Duration = Duration::from_millis(200);
/// A larger payload is not copied to REJECTED. A copy that is too large for the topic would fail the transaction.
const MAX_COPY: usize = 500_000;
const WINDOW: TimeDelta = TimeDelta::seconds(5);
const OUT_OF_ORDER: TimeDelta = TimeDelta::seconds(2);
const LATENESS: TimeDelta = TimeDelta::seconds(5);
const FUTURE: TimeDelta = TimeDelta::hours(1);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers);
    let producer: FutureProducer = config.clone().set("transactional.id", ID).create()?;
    let consumer: StreamConsumer = config
        .set("group.id", ID)
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        // Another reset would skip deleted views silently.
        .set("auto.offset.reset", "error")
        .set("allow.auto.create.topics", "true")
        .create()?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer
        .fetch_metadata(Some(VIEWS), TIMEOUT)
        .context(hint)?;

    let worked = work(&consumer, &producer).await;
    // With the broker down, the close can hang (librdkafka issue 3740): wait no longer than TIMEOUT.
    let (done, closed) = oneshot::channel();
    thread::spawn(move || {
        drop((consumer, producer));
        done.send(())
    });
    let closed = timeout(TIMEOUT, closed).await;
    worked?;
    closed.context("not closed: no broker answers")??;
    println!("stopped");
    Ok(())
}

/// Reads views and commits batches of them, until Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer, producer: &FutureProducer) -> anyhow::Result<()> {
    // Fences the instance before this one, and ends its transaction. Its positions are final only then.
    producer.init_transactions(6 * TIMEOUT)?;
    producer.begin_transaction()?;
    let (mut partitions, mut sent) = (BTreeMap::new(), Vec::new());
    let (mut stop, mut refresh) = (pin!(shutdown()), interval(TIMEOUT));
    let mut deadline = Instant::now() + BATCH_TIME;
    loop {
        let received = tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            _ = refresh.tick() => {
                assign_new(consumer, &mut partitions)?;
                continue;
            }
            received = timeout_at(deadline, consumer.recv()) => received,
        };
        match received {
            Ok(Ok(view)) => {
                let partition = partitions.entry(view.partition()).or_default();
                let counted = partition.count(&view);
                if view.offset() >= partition.next {
                    partition.next = view.offset() + 1;
                    sent.push(send(producer, &view, counted)?);
                }
            }
            Ok(Err(error)) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => {}
        }
        if sent.len() == BATCH || Instant::now() >= deadline {
            let done = commit(consumer, producer, &partitions, &mut sent).await;
            done.map_err(|error| match producer.client().fatal_error() {
                Some((_, reason)) => anyhow!("the transaction is not written: {reason}"),
                None => error,
            })?;
            deadline = Instant::now() + BATCH_TIME;
        }
    }
}

/// The pattern: counts, rejected views and positions are in one transaction.
async fn commit(
    consumer: &StreamConsumer,
    producer: &FutureProducer,
    partitions: &BTreeMap<i32, Partition>,
    sent: &mut Vec<(DeliveryFuture, String)>,
) -> anyhow::Result<()> {
    if sent.is_empty() {
        return Ok(());
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
    producer.send_offsets_to_transaction(&positions, &group, 6 * TIMEOUT)?;
    let mut lines = Vec::new();
    for (report, line) in sent.drain(..) {
        report.await?.map_err(|(error, _)| error)?;
        lines.push(line);
    }
    producer.commit_transaction(6 * TIMEOUT)?;
    println!("{}", lines.join("\n"));
    producer.begin_transaction()?;
    Ok(())
}

/// The partitions of the topic that it does not read yet.
fn new_partitions(
    consumer: &StreamConsumer,
    known: &BTreeMap<i32, Partition>,
) -> anyhow::Result<TopicPartitionList> {
    use RDKafkaErrorCode::*;
    let metadata = consumer.fetch_metadata(Some(VIEWS), TIMEOUT)?;
    let topic = metadata.topics().first().context("no metadata")?;
    match topic.error().map(RDKafkaErrorCode::from) {
        None => {}
        Some(error @ (UnknownTopicOrPartition | LeaderNotAvailable)) => {
            eprintln!("waiting for {VIEWS}: {error}");
        }
        Some(error) => bail!("cannot read {VIEWS}: {error}"),
    }
    let mut new = TopicPartitionList::new();
    for partition in topic.partitions() {
        if !known.contains_key(&partition.id()) {
            new.add_partition(VIEWS, partition.id());
        }
    }
    Ok(new)
}

/// Reads the new partitions, each from the oldest view in an open window.
fn assign_new(
    consumer: &StreamConsumer,
    partitions: &mut BTreeMap<i32, Partition>,
) -> anyhow::Result<()> {
    let mut new = new_partitions(consumer, partitions)?;
    for position in consumer.committed_offsets(new.clone(), TIMEOUT)?.elements() {
        let id = position.partition();
        let (start, end) = consumer.fetch_watermarks(VIEWS, id, TIMEOUT)?;
        let next = match position.offset() {
            Offset::Offset(next) => next,
            _ => start,
        };
        ensure!(
            next <= end,
            "partition {id} ends at {end}, before the position {next}"
        );
        println!("partition {id}: continues at offset {next}");
        let state = serde_json::from_str(position.metadata());
        let (oldest, mut watermark) = state.unwrap_or((next, DateTime::UNIX_EPOCH));
        if oldest < start {
            println!(
                "partition {id}: offsets {oldest} to {start} are LOST, its windows are closed"
            );
            watermark += OUT_OF_ORDER + WINDOW + LATENESS;
        }
        new.set_partition_offset(VIEWS, id, Offset::Offset(oldest.max(start)))?;
        let partition = partitions.entry(id).or_default();
        (partition.next, partition.watermark) = (next, watermark);
    }
    consumer.incremental_assign(&new)?;
    Ok(())
}

#[derive(Deserialize)]
struct View {
    page: String,
    #[serde(rename = "at_ms", with = "chrono::serde::ts_milliseconds")]
    at: DateTime<Utc>,
}

/// A window, a page, and its views.
type Count = (DateTime<Utc>, String, u64);

#[derive(Default)]
struct Partition {
    /// The position. Views before it are counted already, and only rebuild the open windows.
    next: i64,
    watermark: DateTime<Utc>,
    /// By window and page: the number of views, and the offset of the first of them.
    windows: BTreeMap<(DateTime<Utc>, String), (u64, i64)>,
}

impl Partition {
    /// Counts a view in the window of its own time. An error is the reason to reject it.
    fn count(&mut self, record: &BorrowedMessage<'_>) -> anyhow::Result<Count> {
        let View { page, at } = serde_json::from_slice(record.payload().unwrap_or_default())?;
        // Compared with the time of the record and not with the clock, so that a restart decides the same.
        let sent = DateTime::from_timestamp_millis(record.timestamp().to_millis().unwrap_or(0));
        let valid = DateTime::UNIX_EPOCH..sent.unwrap_or_default() + FUTURE;
        ensure!(valid.contains(&at), "its time is {at}");
        ensure!(page.len() <= 1000, "its page is too long");
        let window = at.duration_trunc(WINDOW)?;
        let (time, mark) = (at.format("%T"), self.watermark.format("%T"));
        let is_open = window + WINDOW + LATENESS > self.watermark;
        ensure!(
            is_open,
            "too late: {page} of {time}, the watermark is at {mark}"
        );
        self.watermark = self.watermark.max(at - OUT_OF_ORDER);
        let closed = self.watermark - LATENESS - WINDOW;
        self.windows.retain(|(window, _), _| *window > closed);
        let new = (0, record.offset());
        let (views, _) = self.windows.entry((window, page.clone())).or_insert(new);
        *views += 1;
        Ok((window, page, *views))
    }
}

/// Sends the new count, or the rejected record with its origin and the reason in headers.
fn send(
    producer: &FutureProducer,
    record: &BorrowedMessage<'_>,
    counted: anyhow::Result<Count>,
) -> anyhow::Result<(DeliveryFuture, String)> {
    let (id, offset) = (record.partition(), record.offset());
    let mut headers = record
        .headers()
        .map_or_else(OwnedHeaders::new, BorrowedHeaders::detach);
    match counted {
        Ok((window, page, views)) => {
            let ms = window.timestamp_millis();
            // The last record of a key replaces the others, also in a compacted topic.
            let key = format!("{page} {ms} {id}");
            let count = json!({"page": page, "window_ms": ms, "partition": id, "views": views});
            let count = count.to_string();
            let sent = producer.send_result(FutureRecord::to(COUNTS).key(&key).payload(&count));
            let line = format!("window {} {page}: {views} views", window.time());
            Ok((sent.map_err(|(error, _)| error)?, line))
        }
        Err(reason) => {
            let reason: String = reason.to_string().chars().take(200).collect();
            let origin = format!("{VIEWS}/{id}/{offset}");
            for (key, value) in [("reason", &reason), ("origin", &origin)] {
                let value = Some(value);
                headers = headers.insert(Header { key, value });
            }
            let mut copy = FutureRecord::<[u8], [u8]>::to(REJECTED).headers(headers);
            copy.key = record.key();
            copy.payload = record.payload().filter(|payload| payload.len() <= MAX_COPY);
            let sent = producer.send_result(copy).map_err(|(error, _)| error)?;
            Ok((sent, format!("rejected: {reason}")))
        }
    }
}

/// The client reconnects by itself after these errors. Other errors (authorization, configuration) do not heal by waiting.
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
