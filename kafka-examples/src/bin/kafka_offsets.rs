//! Show the offsets of a group, move them while the group is stopped, and delete records
//!
//! A committed offset is the next record that the group reads. If you move it, the group reads records again or skips
//! records. The broker refuses this while the group has members, because their next commit would overwrite it.
//!
//! ```console
//! $ cargo lab run kafka_send -p 0 offsets-demo a b c d
//! ...
//! $ cargo lab run kafka_offsets offsets-group offsets-demo beginning
//! group offsets-group: Empty, 0 members
//! partition 0: records 0 to 4, committed 0, lag 4
//! ...
//! $ cargo lab run kafka_offsets offsets-group offsets-demo delete 0 2
//! group offsets-group: Empty, 0 members
//! partition 0: records 2 to 4, committed 0 has expired: auto.offset.reset applies
//! ...
//! ```
//!
//! Notice:
//! - An offset expires when its record is deleted, or when the group is empty for `offsets.retention.minutes` (7 days).
//! - Then a consumer starts at its `auto.offset.reset`. The default `latest` skips the records that are there.
//! - A time means the first record of this time or later, or the end if there is none.
//!
//! Usage: kafka_offsets GROUP TOPIC [beginning | end | TIME | delete PARTITION OFFSET]. TIME is in RFC 3339, such as
//! 2026-01-01T12:00:00Z. Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_replay, kafka_lag_monitor.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use chrono::DateTime;
use futures::executor::block_on;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::{KafkaResult, RDKafkaErrorCode::*};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

const USAGE: &str =
    "usage: kafka_offsets GROUP TOPIC [beginning | end | TIME | delete PARTITION OFFSET]";
const TIMEOUT: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    // If the broker stops now, a commit or a close can hang (librdkafka issue 3740).
    let (done, result) = mpsc::channel();
    thread::spawn(move || done.send(run(&args)));
    let result = result.recv_timeout(6 * TIMEOUT);
    result.context("the broker stopped answering")?
}

enum Action {
    Show,
    Move(Offset),
    Delete(i32, i64),
}

fn run(args: &[String]) -> anyhow::Result<()> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (group, topic, action) = match args[..] {
        [group, topic] => (group, topic, Action::Show),
        [group, topic, to] => (group, topic, Action::Move(target(to)?)),
        [group, topic, "delete", partition, before] => {
            let partition = partition.parse().context(USAGE)?;
            let before = before.parse().context(USAGE)?;
            (group, topic, Action::Delete(partition, before))
        }
        _ => bail!(USAGE),
    };
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers);
    // This client asks and commits for the group, and does not join it.
    let client: BaseConsumer = config.clone().set("group.id", group).create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let found = client.fetch_metadata(Some(topic), TIMEOUT).context(tip)?;
    let mut all = TopicPartitionList::new();
    for partition in found.topics().iter().flat_map(|topic| topic.partitions()) {
        all.add_partition(topic, partition.id());
    }
    ensure!(all.count() > 0, "no topic {topic}, or no permission");
    match action {
        Action::Show => {}
        Action::Move(to) => move_offsets(&client, &all, to)?,
        Action::Delete(partition, before) => delete(&config, topic, partition, before)?,
    }
    show(&client, group, &all)
}

/// The pattern: a commit by a client that is not a member. The broker accepts it only while the group is empty.
fn move_offsets(client: &BaseConsumer, all: &TopicPartitionList, to: Offset) -> anyhow::Result<()> {
    let offsets = resolve(client, all, to)?;
    for end in resolve(client, all, Offset::End)?.elements() {
        // All records are before this time.
        let found = offsets.find_partition(end.topic(), end.partition());
        if let Some(mut found) = found.filter(|found| found.offset() == Offset::End) {
            found.set_offset(end.offset())?;
        }
    }
    let moved = when_loaded(|| client.commit(&offsets, CommitMode::Sync));
    // A killed member leaves the group after its session timeout.
    moved.context("no offset is moved; if the group has members, stop them first")
}

/// Deletes the records of a partition before an offset, for all groups.
fn delete(config: &ClientConfig, topic: &str, partition: i32, before: i64) -> anyhow::Result<()> {
    let admin: AdminClient<DefaultClientContext> = config.create()?;
    let mut records = TopicPartitionList::new();
    records.add_partition_offset(topic, partition, Offset::Offset(before))?;
    let options = AdminOptions::new().request_timeout(Some(TIMEOUT));
    let deleted = block_on(admin.delete_records(&records, &options));
    let deleted = deleted.and_then(|list| list.elements().iter().try_for_each(|at| at.error()));
    deleted.context("no record is deleted")
}

fn show(client: &BaseConsumer, group: &str, all: &TopicPartitionList) -> anyhow::Result<()> {
    match client.fetch_group_list(Some(group), TIMEOUT)?.groups() {
        [] => println!("group {group}: unknown"),
        [group, ..] => {
            let (name, state, members) = (group.name(), group.state(), group.members().len());
            println!("group {name}: {state}, {members} members");
        }
    }
    let committed = when_loaded(|| client.committed_offsets(all.clone(), TIMEOUT))?;
    let starts = resolve(client, all, Offset::Beginning)?;
    let ends = resolve(client, all, Offset::End)?;
    let bounds = starts.elements().into_iter().zip(ends.elements());
    for (committed, (start, end)) in committed.elements().iter().zip(bounds) {
        let id = committed.partition();
        let raw = |at: Offset| at.to_raw().unwrap_or(-1);
        let (start, end) = (raw(start.offset()), raw(end.offset()));
        let state = match raw(committed.offset()) {
            at if at < 0 => "nothing committed: auto.offset.reset applies".into(),
            at if at < start => format!("committed {at} has expired: auto.offset.reset applies"),
            at if at > end => format!("committed {at} is past the end: auto.offset.reset applies"),
            at => format!("committed {at}, lag {}", end - at),
        };
        println!("partition {id}: records {start} to {end}, {state}");
    }
    Ok(())
}

/// Asks for the first offset, the end, or the offset of a time in all partitions, in one request.
fn resolve(
    client: &BaseConsumer,
    all: &TopicPartitionList,
    to: Offset,
) -> KafkaResult<TopicPartitionList> {
    let mut asked = all.clone();
    asked.set_all_offsets(to)?;
    client.offsets_for_times(asked, TIMEOUT)
}

fn target(text: &str) -> anyhow::Result<Offset> {
    match text {
        "beginning" => Ok(Offset::Beginning),
        "end" => Ok(Offset::End),
        time => {
            let time = DateTime::parse_from_rfc3339(time).context(USAGE)?;
            Ok(Offset::Offset(time.timestamp_millis())) // a request has the time in its offset field
        }
    }
}

/// Repeats a request while the broker loads the offsets of its groups, for example after its start.
fn when_loaded<T>(request: impl Fn() -> KafkaResult<T>) -> KafkaResult<T> {
    let is_loading = |code| matches!(code, Some(NotCoordinator | CoordinatorLoadInProgress));
    let deadline = Instant::now() + TIMEOUT;
    loop {
        match request() {
            Err(error) if is_loading(error.rdkafka_error_code()) && Instant::now() < deadline => {
                thread::sleep(TIMEOUT / 50);
            }
            answer => return answer,
        }
    }
}
