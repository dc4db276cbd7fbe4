//! Event-time windows in memory: views per page in tumbling windows of 5 seconds
//!
//! A view counts in the window in which it happened, not in which it arrives. The watermark of a partition is its
//! latest event time minus 2 seconds. A window's counts are printed when the watermark passes its end. A view that is
//! at most 5 seconds later corrects the count. A view that is too late is reported and not counted.
//!
//! No offsets are committed. After a crash or a rebalance, a partition is read from its beginning: no view is lost, but
//! all windows are counted and printed again. kafka_crash_safe_windows continues where it was.
//!
//! ```console
//! $ cargo lab run kafka_page_views 2026-01-01T12:00:00Z
//! ...
//! 1$ cargo lab run kafka_window_aggregation
//! ...
//! window 12:00:00 /docs: 3 views
//! ...
//! window 12:00:00 /docs: 4 views, corrected
//! ...
//! too late: /docs of 12:00:04, the watermark is at 12:00:15
//! ...
//! 1^C
//! ...
//! ```
//!
//! Notice:
//! - Only a later view in the same partition closes a window. All views of a page are in one partition (key = page).
//! - A view from the far future is not counted: it would close all windows.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_page_views, kafka_crash_safe_windows.

use std::collections::BTreeMap;
use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;
use rdkafka::{ClientConfig, Message};
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;

const TOPIC: &str = "page-views";
const GROUP: &str = "window-aggregation";
const TIMEOUT: Duration = Duration::from_secs(5);
const WINDOW: TimeDelta = TimeDelta::seconds(5);
/// A view can arrive this much later than a younger view, and is still in the first count of its window.
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
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "true")
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

/// Counts one view after another, until Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer) -> anyhow::Result<()> {
    let mut partitions: BTreeMap<i32, Partition> = BTreeMap::new();
    let mut stop = pin!(shutdown());
    loop {
        let received = tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            received = consumer.recv() => received,
        };
        match received {
            Ok(record) => {
                let partition = partitions.entry(record.partition()).or_default();
                if let Err(reason) = partition.take(&record) {
                    let (partition, offset) = (record.partition(), record.offset());
                    println!("partition {partition} offset {offset} not counted: {reason}");
                }
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
}

#[derive(Deserialize)]
struct View {
    page: String,
    #[serde(rename = "at_ms", with = "chrono::serde::ts_milliseconds")]
    at: DateTime<Utc>,
}

#[derive(Default)]
struct Partition {
    next: i64,
    watermark: DateTime<Utc>,
    /// The start of a window and a page, and the views of this page.
    windows: BTreeMap<(DateTime<Utc>, String), u64>,
}

impl Partition {
    /// Bytes from a topic can be anything.
    fn take(&mut self, record: &BorrowedMessage<'_>) -> anyhow::Result<()> {
        if record.offset() < self.next {
            // The partition was lost in a rebalance and assigned again. It is read from its beginning.
            *self = Partition::default();
        }
        self.next = record.offset() + 1;
        let view: View = serde_json::from_slice(record.payload().unwrap_or_default())?;
        let valid = DateTime::UNIX_EPOCH..Utc::now() + FUTURE;
        ensure!(valid.contains(&view.at), "its time is {}", view.at);
        self.count(view);
        Ok(())
    }

    /// The pattern: a view counts in the window of its own time, and its time moves the watermark.
    fn count(&mut self, View { page, at }: View) {
        let start = at.duration_trunc(WINDOW).unwrap_or(at);
        let before = self.watermark;
        if start + WINDOW + LATENESS <= before {
            let (at, watermark) = (at.format("%T"), before.format("%T"));
            return println!("too late: {page} of {at}, the watermark is at {watermark}");
        }
        let views = self.windows.entry((start, page.clone())).or_default();
        *views += 1;
        if start + WINDOW <= before {
            println!("window {} {page}: {views} views, corrected", start.time());
        }
        self.watermark = before.max(at - OUT_OF_ORDER);
        for ((start, page), views) in &self.windows {
            if (before < *start + WINDOW) && (*start + WINDOW <= self.watermark) {
                println!("window {} {page}: {views} views", start.time());
            }
        }
        let closed = self.watermark - LATENESS - WINDOW;
        self.windows.retain(|(start, _), _| *start > closed);
    }
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
