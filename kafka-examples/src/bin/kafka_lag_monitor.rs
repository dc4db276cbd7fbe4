//! Consumer lag: how many records each group has not read yet, with a warning above 10,000
//!
//! The lag of a partition is its end minus the offset that the group has committed. Both come from the broker, so the
//! lag is right for a group without members, and for a partition that the group has never committed: there, all records
//! are unread. One request asks for all partitions of a broker.
//!
//! ```console
//! 1$ cargo lab run kafka_send -p 0 lag-demo a b c
//! ...
//! 1$ cargo lab run kafka_offsets lag-group lag-demo beginning
//! ...
//! 2$ LAG_INTERVAL=1 LAG_THRESHOLD=2 cargo lab run kafka_lag_monitor
//! WARNING: lag-group on lag-demo: lag 3, 0 lost
//! 1$ cargo lab run kafka_offsets lag-group lag-demo end
//! ...
//! 2:
//! lag-group on lag-demo: lag 0, 0 lost
//! 2^C
//! ```
//!
//! Notice:
//! - Records that retention deleted before the group read them are not in the lag: they are counted as lost.
//! - The broker knows a group when it has members or has committed. Topics without a commit are not shown.
//! - Lag counts offsets. A compacted topic, or a topic written by transactions, has fewer records.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), LAG_THRESHOLD (10000) per group and topic, LAG_INTERVAL (10) in seconds,
//! RUST_LOG. See also: kafka_offsets, kafka_metrics.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::{Write, stdout};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaResult;
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let threshold = setting("LAG_THRESHOLD", 10_000)?;
    let interval = Duration::from_secs(setting("LAG_INTERVAL", 10)?.max(1));
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let client = client(&brokers, "kafka_lag_monitor")?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    client.fetch_metadata(None, TIMEOUT).context(hint)?;

    // The client blocks, so it has a thread of its own. It joins no group: there is nothing to leave.
    let (failed, failure) = oneshot::channel();
    thread::spawn(move || failed.send(watch(&brokers, &client, threshold, interval)));
    tokio::select! {
        biased;
        signal = shutdown() => Ok(signal?),
        failure = failure => failure?,
    }
}

/// Prints a line for each lag that has changed.
fn watch(
    brokers: &str,
    client: &BaseConsumer,
    threshold: u64,
    interval: Duration,
) -> anyhow::Result<()> {
    let (mut groups, mut known) = (BTreeMap::new(), BTreeMap::new());
    loop {
        match lags(brokers, client, &mut groups) {
            Ok(lags) if lags.is_empty() => {
                eprintln!("no group has committed, or DESCRIBE is not permitted")
            }
            Ok(lags) => {
                for (place @ (group, topic), lag) in &lags {
                    let Lag { unread, lost, .. } = lag;
                    let level = if *unread > threshold { "WARNING: " } else { "" };
                    if known.get(place) != Some(lag) {
                        writeln!(
                            stdout(),
                            "{level}{group} on {topic}: lag {unread}, {lost} lost"
                        )?;
                    }
                }
                // A lag that is unknown now stays known as it was.
                known.extend(lags);
            }
            Err(error) => eprintln!("lag unknown: {error}"),
        }
        thread::sleep(interval);
    }
}

/// The pattern: the committed offsets of each group, then the bounds of all partitions.
fn lags(
    brokers: &str,
    client: &BaseConsumer,
    groups: &mut BTreeMap<String, BaseConsumer>,
) -> KafkaResult<BTreeMap<(String, String), Lag>> {
    let mut lags: BTreeMap<_, Lag> = BTreeMap::new();
    let partitions = partitions(client)?;
    let mut committed = Vec::new();
    for group in client.fetch_group_list(None, TIMEOUT)?.groups() {
        // A client can ask for the offsets of its own group only. It does not join the group.
        let client = match groups.entry(group.name().to_owned()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(self::client(brokers, group.name())?),
        };
        match client.committed_offsets(partitions.clone(), TIMEOUT) {
            Ok(offsets) => committed.push((group.name().to_owned(), offsets)),
            Err(error) => eprintln!("lag of {} unknown: {error}", group.name()),
        }
    }
    // After the committed offsets: otherwise a group that reads meanwhile could be past the end.
    let (mut starts, mut ends) = (partitions.clone(), partitions);
    starts.set_all_offsets(Offset::Beginning)?;
    ends.set_all_offsets(Offset::End)?;
    if !committed.is_empty() {
        starts = client.offsets_for_times(starts, TIMEOUT)?;
        ends = client.offsets_for_times(ends, TIMEOUT)?;
    }
    for (group, offsets) in committed {
        // All lists have the same order.
        let bounds = starts.elements().into_iter().zip(ends.elements());
        for (offset, (start, end)) in offsets.elements().iter().zip(bounds) {
            let lag = lags.entry((group.clone(), offset.topic().to_owned()));
            lag.or_default().add([offset, &start, &end]);
        }
    }
    lags.retain(|_, lag| lag.committed);
    Ok(lags)
}

/// All partitions. A partition without a leader has no known end, so its topic is left out.
fn partitions(client: &BaseConsumer) -> KafkaResult<TopicPartitionList> {
    let mut all = TopicPartitionList::new();
    let metadata = client.fetch_metadata(None, TIMEOUT)?;
    let topics = metadata.topics().iter();
    for topic in topics.filter(|topic| !topic.name().starts_with("__")) {
        let partitions = topic.partitions();
        match partitions.iter().find(|partition| partition.leader() < 0) {
            Some(down) => eprintln!(
                "lag on {} unknown: partition {} has no leader",
                topic.name(),
                down.id()
            ),
            None => partitions.iter().for_each(|partition| {
                all.add_partition(topic.name(), partition.id());
            }),
        }
    }
    Ok(all)
}

/// Of a group on a topic.
#[derive(Clone, Copy, Default, PartialEq)]
struct Lag {
    /// On at least one partition.
    committed: bool,
    unread: u64,
    lost: u64,
}

impl Lag {
    fn add(&mut self, offsets: [&TopicPartitionListElem<'_>; 3]) {
        let [committed, start, end] = offsets.map(|at| at.offset().to_raw().unwrap_or(0));
        // Invalid if nothing is committed, which is a negative number.
        self.committed |= committed >= 0;
        // With `auto.offset.reset=earliest`, a consumer starts at the beginning if its offset is not in the partition.
        let next = if (start..=end).contains(&committed) {
            committed
        } else {
            start
        };
        self.unread += end.abs_diff(next);
        if (0..start).contains(&committed) {
            self.lost += start.abs_diff(committed);
        }
    }
}

fn client(brokers: &str, group: &str) -> KafkaResult<BaseConsumer> {
    ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        // Records of open transactions are unread, too.
        .set("isolation.level", "read_uncommitted")
        .create()
}

fn setting(name: &str, default: u64) -> anyhow::Result<u64> {
    let text = std::env::var(name).unwrap_or_else(|_| default.to_string());
    text.parse()
        .with_context(|| format!("{name} is {text:?}, not a whole number"))
}

/// Ctrl-C, or SIGTERM, which Docker, Kubernetes and systemd send.
async fn shutdown() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupt = tokio::signal::ctrl_c() => interrupt,
        _ = terminate.recv() => Ok(()),
    }
}
