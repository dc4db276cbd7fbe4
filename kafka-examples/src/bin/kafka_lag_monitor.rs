//! Consumer lag: how far each group is behind, with a warning before the backlog hurts
//!
//! Lag is the end of a partition minus the position its group has committed. Both are asked of the broker, so it is
//! right for a group without members, and for a partition on which the group has never committed: there, all that the
//! partition holds is still to be read. It prints what changes, warns above a threshold, and says when it is over.
//!
//! ```console
//! 1$ cargo lab run kafka_async_producer
//! order-123: [..]
//! 1$ cargo lab run kafka_consumer_group
//! ...
//! committed: [..]
//! 1^C
//! ...
//! 1$ cargo lab run kafka_async_producer 20
//! ...
//! order-142: [..]
//! 2$ LAG_INTERVAL=1 LAG_THRESHOLD=10 cargo lab run kafka_lag_monitor
//! watching all groups every 1 s, threshold 10
//! ...
//! order-processor-group orders/[..]: never committed, end [..], lag [..]
//! ...
//! WARNING: order-processor-group is 20 behind on orders, over the threshold of 10
//! 1$ cargo lab run kafka_consumer_group
//! ...
//! processed: order-142 [..]
//! ...
//! 2:
//! ...
//! recovered: order-processor-group is [..] behind on orders
//! ...
//! 1^C
//! ...
//! 2^C
//! ```
//!
//! Notice: lag counts offsets. On a compacted topic, or one written by transactions, that is more than there are
//! records. A group's own `statistics` say nothing while it has no members, which is when its lag matters most. If
//! retention has deleted what a group had not read yet, that is reported as lost: no lag will ever show it. A group
//! that has never committed anywhere is not known to the broker; name it with its topics to watch it from the start.
//!
//! Try: `kafka_lag_monitor GROUP TOPIC` for a group that does not exist yet, and start it.
//!
//! Settings: KAFKA_BROKERS (localhost:9092); LAG_THRESHOLD (10000) per group and topic; LAG_INTERVAL (10) in seconds;
//! the arguments are a group, and topics that it reads. See also: kafka_consumer_group, kafka_pitfall_auto_commit.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use anyhow::{Context, Result};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaResult;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tokio::time::{MissedTickBehavior, interval};

/// A client wants a name even for questions that concern no group.
const NO_GROUP: &str = "kafka_lag_monitor";
const PATIENCE: Duration = Duration::from_secs(5);

/// Of one partition, for one group.
#[derive(Clone, Copy, PartialEq)]
struct Backlog {
    /// None: never committed.
    position: Option<i64>,
    start: i64,
    end: i64,
}

impl Backlog {
    /// Without a position, or with one that retention has overtaken, reading goes on at the start. That holds for
    /// `auto.offset.reset=earliest`; with `latest` all of this would be skipped, which is worse than a lag.
    fn lag(&self) -> i64 {
        let next = self.position.unwrap_or(self.start).max(self.start);
        (self.end - next).max(0)
    }

    fn lost(&self) -> i64 {
        self.position
            .map_or(0, |position| (self.start - position).max(0))
    }
}

/// A group, a topic and a partition.
type Place = (String, String, i32);
type Lags = BTreeMap<Place, Backlog>;
type Position = (Place, KafkaResult<Option<i64>>);

#[tokio::main]
async fn main() -> Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let threshold = setting("LAG_THRESHOLD", 10_000)?;
    let seconds = setting("LAG_INTERVAL", 10)?.max(1);
    let mut arguments = std::env::args().skip(1);
    let mut monitor = Monitor {
        brokers: brokers.clone(),
        group: arguments.next(),
        topics: arguments.collect(),
        clients: HashMap::new(),
    };
    let first = monitor.group.clone().unwrap_or(NO_GROUP.into());
    monitor
        .client(&first)?
        .fetch_metadata(None, PATIENCE)
        .with_context(|| {
            format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one")
        })?;

    let mut stop = std::pin::pin!(tokio::signal::ctrl_c());
    let mut tick = interval(Duration::from_secs(seconds.unsigned_abs()));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut before, mut warned) = (Lags::new(), BTreeSet::new());
    let whom = monitor.group.as_deref().unwrap_or("all groups");
    let mut greeting = Some(format!(
        "watching {whom} every {seconds} s, threshold {threshold}"
    ));
    loop {
        tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            _ = tick.tick() => {}
        }
        if let Some(greeting) = greeting.take() {
            println!("{greeting}");
        }
        // The client blocks; this gives other tasks their thread.
        match tokio::task::block_in_place(|| monitor.read(&before)) {
            Ok(now) => {
                report(&before, &now);
                alarm(&now, threshold, &mut warned);
                before = now;
            }
            // Not knowing the lag is no reason to end, nor to say that it is zero.
            Err(error) => eprintln!("lag unknown: {error:#}"),
        }
    }
}

fn setting(name: &str, default: i64) -> Result<i64> {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{name} is {text:?}, not a whole number")),
        Err(_) => Ok(default),
    }
}

struct Monitor {
    brokers: String,
    group: Option<String>,
    topics: HashSet<String>,
    /// Positions are asked for in the name of a group, thus one client for each. None of them joins its group.
    clients: HashMap<String, BaseConsumer>,
}

impl Monitor {
    fn client(&mut self, group: &str) -> Result<&BaseConsumer> {
        if !self.clients.contains_key(group) {
            let client = ClientConfig::new()
                .set("bootstrap.servers", &self.brokers)
                .set("group.id", group)
                // The end of the log, not of what is committed: records of an open transaction are backlog, too.
                .set("isolation.level", "read_uncommitted")
                .create()?;
            self.clients.insert(group.to_owned(), client);
        }
        self.clients.get(group).context("just inserted")
    }

    /// What cannot be known of one group or partition is reported, and taken to be as it was `before`.
    fn read(&mut self, before: &Lags) -> Result<Lags> {
        let chosen = self.group.clone();
        let any = self.client(chosen.as_deref().unwrap_or(NO_GROUP))?;
        let mut all = TopicPartitionList::new();
        for topic in any.fetch_metadata(None, PATIENCE)?.topics() {
            if !topic.name().starts_with("__") {
                for partition in topic.partitions() {
                    all.add_partition(topic.name(), partition.id());
                }
            }
        }
        let groups = match chosen {
            Some(group) => BTreeSet::from([group]),
            None => {
                let list = any.fetch_group_list(None, PATIENCE)?;
                let listed = list.groups().iter().map(|group| group.name().to_owned());
                // Whoever has just taken over from a broker that died lists none of its groups for a moment.
                let known = before.keys().map(|(group, ..)| group.clone());
                listed.chain(known).collect()
            }
        };
        // Each has threads and connections.
        self.clients
            .retain(|name, _| name == NO_GROUP || groups.contains(name));

        let mut lags = Lags::new();
        let mut positions = Vec::new();
        for group in groups {
            match self.positions(&group, &all) {
                Ok(found) => positions.extend(found),
                Err(error) => {
                    eprintln!("lag of {group} unknown: {error:#}");
                    let same = before.iter().filter(|((of, ..), _)| *of == group);
                    lags.extend(same.map(|(at, backlog)| (at.clone(), *backlog)));
                }
            }
        }

        // After the positions: the other way round, a group that reads meanwhile could be ahead of the end.
        let mut watermarks = HashMap::new();
        let any = self.clients.values().next().context("there is a client")?;
        for (at, position) in positions {
            let (group, topic, partition) = &at;
            let known = watermarks
                .entry((topic.clone(), *partition))
                .or_insert_with(|| any.fetch_watermarks(topic, *partition, PATIENCE));
            let backlog = known.clone().and_then(|(start, end)| {
                Ok(Backlog {
                    position: position?,
                    start,
                    end,
                })
            });
            let backlog = match backlog {
                Ok(backlog) => Some(backlog),
                Err(error) => {
                    eprintln!("lag of {group} on {topic}/{partition} unknown: {error}");
                    before.get(&at).copied()
                }
            };
            lags.extend(backlog.map(|backlog| (at, backlog)));
        }
        Ok(lags)
    }

    /// Of all partitions of the topics that the group reads; None where it has never committed.
    fn positions(&mut self, group: &str, all: &TopicPartitionList) -> Result<Vec<Position>> {
        let wanted = self.topics.clone();
        let committed = self
            .client(group)?
            .committed_offsets(all.clone(), PATIENCE)?;
        let committed = committed.elements();
        // A group reads a topic if it has ever committed on any of its partitions.
        let read: HashSet<&str> = committed
            .iter()
            .filter(|at| matches!(at.offset(), Offset::Offset(_)) || wanted.contains(at.topic()))
            .map(|at| at.topic())
            .collect();
        let committed = committed.iter().filter(|at| read.contains(at.topic()));
        let position = |offset| match offset {
            Offset::Offset(position) => Some(position),
            _ => None,
        };
        Ok(committed
            .map(|at| {
                let place = (group.to_owned(), at.topic().to_owned(), at.partition());
                (place, at.error().map(|()| position(at.offset())))
            })
            .collect())
    }
}

/// One line per partition whose backlog has changed, and one per partition of which nothing is known any more: the
/// group was deleted, or its positions have expired.
fn report(before: &Lags, now: &Lags) {
    for (group, topic, partition) in before.keys().filter(|at| !now.contains_key(at)) {
        println!("gone: {group} has no position on {topic}/{partition}");
    }
    for (at @ (group, topic, partition), backlog) in now {
        if before.get(at) == Some(backlog) {
            continue;
        }
        let position = match backlog.position {
            Some(position) => format!("position {position}"),
            None => "never committed".into(),
        };
        println!(
            "{group} {topic}/{partition}: {position}, end {}, lag {}",
            backlog.end,
            backlog.lag()
        );
        let (lost, known) = (backlog.lost(), before.get(at).map_or(0, Backlog::lost));
        if lost > known {
            println!("LOST: {group} {topic}/{partition}: retention deleted {lost} offsets unread");
        }
    }
}

/// Per group and topic: says when the sum passes the threshold, and when it is back. In between it is silent. A group
/// that is gone has not recovered, so its warning stands until it is seen again.
fn alarm(now: &Lags, threshold: i64, warned: &mut BTreeSet<(String, String)>) {
    let mut sums: BTreeMap<(String, String), i64> = BTreeMap::new();
    for ((group, topic, _), backlog) in now {
        *sums.entry((group.clone(), topic.clone())).or_default() += backlog.lag();
    }
    for (of @ (group, topic), lag) in &sums {
        if *lag > threshold && warned.insert(of.clone()) {
            println!(
                "WARNING: {group} is {lag} behind on {topic}, over the threshold of {threshold}"
            );
        } else if *lag <= threshold && warned.remove(of) {
            println!("recovered: {group} is {lag} behind on {topic}");
        }
    }
}
