//! Consumer lag: how many records each group has not read yet, with a warning above 10,000
//!
//! The lag of a partition is its end minus the offset that the group has committed. Both come from the broker. So the
//! lag is right for a group without members. If the group has never committed a partition, all its records are unread.
//!
//! ```console
//! 1$ cargo lab run kafka_send -p 0 lag-demo a b c
//! ...
//! 1$ cargo lab run kafka_offsets lag-group lag-demo beginning
//! ...
//! 2$ LAG_INTERVAL=1 LAG_THRESHOLD=2 cargo lab run kafka_lag_monitor
//! WARNING: lag-group on lag-demo: lag 3
//! 1$ cargo lab run kafka_offsets lag-group lag-demo end
//! ...
//! 2:
//! lag-group on lag-demo: lag 0
//! 2^C
//! ```
//!
//! Notice:
//! - Records that were deleted before the group read them are not in the lag. kafka_offsets shows such offsets as expired.
//! - The broker knows a group when it has members or has committed. Topics without a commit are not shown.
//! - Lag counts offsets. A compacted topic, or a topic written by transactions, has fewer records.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), LAG_THRESHOLD (10000) per group and topic, LAG_INTERVAL (10) in seconds,
//! RUST_LOG. See also: kafka_offsets, kafka_metrics.

use std::collections::BTreeMap;
use std::io::{Write, stdout};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaResult;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

const TIMEOUT: Duration = Duration::from_secs(5);

/// By group and topic: whether the group has committed, and the lag.
type Lags = BTreeMap<(String, String), (bool, u64)>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let threshold = setting("LAG_THRESHOLD", 10_000)?;
    let interval = Duration::from_secs(setting("LAG_INTERVAL", 10)?.max(1));

    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    // The client blocks, so it has its own thread. It joins no group, so it need not be closed.
    let (failed, failure) = oneshot::channel();
    thread::spawn(move || failed.send(watch(threshold, interval)));
    tokio::select! {
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
        failure = failure => failure?,
    }
}

/// Prints a line for each lag that has changed.
fn watch(threshold: u64, interval: Duration) -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let client = client(&brokers, "kafka_lag_monitor")?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    client.fetch_metadata(None, TIMEOUT).context(tip)?;
    let mut known = Lags::new();
    loop {
        match lags(&brokers, &client) {
            Ok(lags) if lags.is_empty() => {
                eprintln!("no group has committed, or DESCRIBE is not permitted")
            }
            Ok(lags) => {
                for (place, lag) in lags {
                    let level = if lag.1 > threshold { "WARNING: " } else { "" };
                    let line = format!("{level}{} on {}: lag {}", place.0, place.1, lag.1);
                    if known.insert(place, lag) != Some(lag) {
                        writeln!(stdout(), "{line}")?;
                    }
                }
            }
            Err(error) => eprintln!("lag unknown: {error}"),
        }
        thread::sleep(interval);
    }
}

/// The pattern: the committed offsets of each group, then the bounds of all partitions.
fn lags(brokers: &str, client: &BaseConsumer) -> KafkaResult<Lags> {
    let mut lags = Lags::new();
    let partitions = partitions(client)?;
    if partitions.count() == 0 {
        return Ok(lags);
    }
    let mut committed = Vec::new();
    for group in client.fetch_group_list(None, TIMEOUT)?.groups() {
        let name = group.name();
        // A client can ask for the offsets of its own group only. It does not join the group.
        let client = self::client(brokers, name)?;
        let offsets = client.committed_offsets(partitions.clone(), TIMEOUT);
        match offsets.and_then(|offsets| raw(&offsets)) {
            Ok(offsets) => committed.push((name.to_owned(), offsets)),
            Err(error) => eprintln!("lag of {name} unknown: {error}"),
        }
    }
    // Read the ends after the committed offsets. Otherwise a commit can be after the end.
    let starts = bounds(client, &partitions, Offset::Beginning)?;
    let ends = bounds(client, &partitions, Offset::End)?;
    for (group, offsets) in committed {
        // All lists have the same order.
        for (number, at) in partitions.elements().iter().enumerate() {
            let (start, end, offset) = (starts[number], ends[number], offsets[number]);
            let place = (group.clone(), at.topic().to_owned());
            let (has_committed, lag) = lags.entry(place).or_default();
            *has_committed |= offset >= 0;
            *lag += match offset {
                offset if (start..=end).contains(&offset) => end.abs_diff(offset),
                _ => end.abs_diff(start), // with `auto.offset.reset=earliest`, it is read from the start
            };
        }
    }
    lags.retain(|_, (has_committed, _)| *has_committed);
    Ok(lags)
}

/// All partitions. A partition without a leader has no known end, so its topic is left out.
fn partitions(client: &BaseConsumer) -> KafkaResult<TopicPartitionList> {
    let mut all = TopicPartitionList::new();
    for topic in client.fetch_metadata(None, TIMEOUT)?.topics() {
        let (name, partitions) = (topic.name(), topic.partitions());
        if let Some(down) = partitions.iter().find(|partition| partition.leader() < 0) {
            eprintln!("{name}: lag unknown, partition {} has no leader", down.id());
        } else if !name.starts_with("__") {
            for partition in partitions {
                all.add_partition(name, partition.id());
            }
        }
    }
    Ok(all)
}

/// The first offsets or the ends, in one request for all partitions of a broker.
fn bounds(client: &BaseConsumer, all: &TopicPartitionList, at: Offset) -> KafkaResult<Vec<i64>> {
    let mut asked = all.clone();
    asked.set_all_offsets(at)?;
    raw(&client.offsets_for_times(asked, TIMEOUT)?)
}

/// The offsets as numbers. A partition without a committed offset has a negative number.
fn raw(all: &TopicPartitionList) -> KafkaResult<Vec<i64>> {
    let mut offsets = Vec::new();
    for at in all.elements() {
        at.error()?;
        offsets.push(at.offset().to_raw().unwrap_or(-1));
    }
    Ok(offsets)
}

fn client(brokers: &str, group: &str) -> KafkaResult<BaseConsumer> {
    ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .set("isolation.level", "read_uncommitted") // records of open transactions are unread, too
        .create()
}

fn setting(name: &str, default: u64) -> anyhow::Result<u64> {
    let text = std::env::var(name).unwrap_or_else(|_| default.to_string());
    text.parse()
        .with_context(|| format!("{name} is {text:?}, not a whole number"))
}
