//! Event-time windows in memory: views per page in tumbling windows of 5 seconds
//!
//! A view counts in the window in which it happened, not in which it arrives. The watermark of a partition is its
//! latest event time minus 2 seconds. When it reaches the end of a window, the counts are printed. Until it is 5
//! seconds after the end, more views correct a count. After that, a view is too late: it is reported and not counted.
//!
//! ```console
//! $ cargo lab run kafka_page_views 2026-01-01T12:00:00Z
//! ...
//! $ cargo lab run kafka_window_aggregation
//! ...
//! window 12:00:00 /docs: 4 views, corrected
//! ...
//! [..] not counted: too late: /docs of 12:00:04, watermark 12:00:15
//! ...
//! ```
//!
//! Notice:
//! - Only a later view in the same partition closes a window. The windows that are open at the end are not printed.
//! - A wrong clock closes windows too early. A view that is more than 2 minutes ahead of this computer is not counted.
//! - The program reads the whole topic, and ends. kafka_crash_safe_windows runs until Ctrl-C and survives a crash.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_page_views.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, ensure};
use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use serde::Deserialize;

const TOPIC: &str = "page-views";
const TIMEOUT: Duration = Duration::from_secs(5);
const WINDOW: TimeDelta = TimeDelta::seconds(5);
const OUT_OF_ORDER: TimeDelta = TimeDelta::seconds(2);
const LATENESS: TimeDelta = TimeDelta::seconds(5);
const FUTURE: TimeDelta = TimeDelta::minutes(2);

fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", "kafka_window_aggregation") // required, although it joins no group
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "error") // the default, `latest`, skips views
        .set("enable.partition.eof", "true")
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let topic = consumer.fetch_metadata(Some(TOPIC), TIMEOUT).context(tip)?;
    let mut all = TopicPartitionList::new();
    for partition in topic.topics().iter().flat_map(|topic| topic.partitions()) {
        all.add_partition_offset(TOPIC, partition.id(), Offset::Beginning)?;
    }
    ensure!(all.count() > 0, "no topic {TOPIC}, or no permission");
    consumer.assign(&all)?;

    let (mut partitions, mut ended) = (BTreeMap::<i32, Partition>::new(), BTreeSet::new());
    while ended.len() < all.count() {
        match consumer.poll(TIMEOUT).context("no answer for 5 seconds")? {
            Ok(record) => {
                let (partition, offset) = (record.partition(), record.offset());
                let windows = partitions.entry(partition).or_default();
                if let Err(reason) = windows.count(record.payload()) {
                    println!("partition {partition} offset {offset} not counted: {reason}");
                }
            }
            Err(KafkaError::PartitionEOF(partition)) => drop(ended.insert(partition)),
            // Another address may answer.
            Err(KafkaError::MessageConsumption(AllBrokersDown | BrokerTransportFailure)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct View {
    page: String,
    #[serde(rename = "at_ms", with = "chrono::serde::ts_milliseconds")]
    at: DateTime<Utc>,
}

#[derive(Default)]
struct Partition {
    watermark: DateTime<Utc>,
    windows: BTreeMap<(DateTime<Utc>, String), u64>, // by start and page: the views
}

impl Partition {
    /// The pattern: a view counts in the window of its own time, and its time moves the watermark.
    fn count(&mut self, payload: Option<&[u8]>) -> anyhow::Result<()> {
        let View { page, at } = serde_json::from_slice(payload.unwrap_or_default())?;
        ensure!(at < Utc::now() + FUTURE, "its time is {at}");
        let start = at.duration_trunc(WINDOW)?;
        let before = self.watermark;
        let (time, mark) = (at.time(), before.time());
        let is_open = start + WINDOW + LATENESS > before;
        ensure!(is_open, "too late: {page} of {time}, watermark {mark}");
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
        Ok(())
    }
}
