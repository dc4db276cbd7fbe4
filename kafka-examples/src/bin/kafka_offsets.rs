//! Show the offsets of a group, move them while the group is stopped, and delete records
//!
//! A committed offset is the next record that the group reads. Moving it makes the group read records again, or skip
//! records. The broker refuses this while the group has members, because they would overwrite it with their next
//! commit.
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
//! - A time becomes the offset of the first record that is not older; without such a record it becomes the end.
//!
//! Try: start a consumer of the group and move its offsets. `delete 0 end` deletes all records of partition 0.
//!
//! Usage: kafka_offsets GROUP TOPIC [beginning | end | TIME | delete PARTITION OFFSET]. TIME is in RFC 3339, such as
//! 2026-01-01T12:00:00Z. Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_replay, kafka_lag_monitor.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use chrono::DateTime;
use futures::executor::block_on;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::RDKafkaErrorCode::{self, *};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

const USAGE: &str =
    "usage: kafka_offsets GROUP TOPIC [beginning | end | TIME | delete PARTITION OFFSET]";
const TIMEOUT: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (group, topic, action) = match args[..] {
        [group, topic] => (group, topic, Action::Show),
        [group, topic, to] => (group, topic, Action::Move(target(to)?)),
        [group, topic, "delete", partition, before] => {
            let partition = partition.parse().context(USAGE)?;
            (group, topic, Action::Delete(partition, offset(before)?))
        }
        _ => bail!(USAGE),
    };
    let (group, topic) = (group.to_owned(), topic.to_owned());
    // If the broker goes down meanwhile, a commit and a close can hang (librdkafka issue 3740): wait no longer than this.
    let (done, result) = mpsc::channel();
    thread::spawn(move || done.send(run(&group, &topic, action)));
    let result = result.recv_timeout(6 * TIMEOUT);
    result.context("the broker does not answer any more")?
}

enum Action {
    Show,
    Move(Offset),
    Delete(i32, Offset),
}

fn run(group: &str, topic: &str, action: Action) -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers);
    // This client asks and commits for the group, and does not join it.
    let client: BaseConsumer = config.clone().set("group.id", group).create()?;
    let metadata = client.fetch_metadata(Some(topic), TIMEOUT);
    let metadata = metadata.with_context(|| {
        format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one")
    })?;
    let mut partitions = TopicPartitionList::new();
    for metadata in metadata.topics() {
        if let Some(error) = metadata.error() {
            bail!("{topic}: {}", RDKafkaErrorCode::from(error));
        }
        for partition in metadata.partitions() {
            partitions.add_partition(topic, partition.id());
        }
    }
    match action {
        Action::Show => {}
        Action::Move(to) => move_offsets(&client, &partitions, to)
            .with_context(|| format!("the offsets of {group} stay as they are"))?,
        Action::Delete(partition, before) => delete_records(&config, topic, partition, before)?,
    }
    show(&client, group, &partitions)
}

/// The pattern: a commit by a client that is not a member. The broker accepts it only while the group is empty.
fn move_offsets(
    client: &BaseConsumer,
    partitions: &TopicPartitionList,
    to: Offset,
) -> anyhow::Result<()> {
    let offsets = resolve(client, partitions, to)?;
    for end in resolve(client, partitions, Offset::End)?.elements() {
        // No record is as young as this time.
        let found = offsets.find_partition(end.topic(), end.partition());
        if let Some(mut found) = found.filter(|found| found.offset() == Offset::End) {
            found.set_offset(end.offset())?;
        }
    }
    let committed = when_loaded(|| client.commit(&offsets, CommitMode::Sync));
    committed.map_err(|error| match error.rdkafka_error_code() {
        Some(UnknownMemberId | RebalanceInProgress | IllegalGeneration) => {
            anyhow!(
                "it has members: stop them first (a killed member leaves after its session timeout)"
            )
        }
        _ => error.into(),
    })
}

/// Repeats a request while the broker loads the offsets of its groups, which it does after its start.
fn when_loaded<T>(request: impl Fn() -> KafkaResult<T>) -> KafkaResult<T> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let answer = request();
        let code = answer
            .as_ref()
            .err()
            .and_then(KafkaError::rdkafka_error_code);
        let loading = matches!(code, Some(NotCoordinator | CoordinatorLoadInProgress));
        if !loading || Instant::now() > deadline {
            return answer;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Deletes the records of a partition before an offset, for all groups.
fn delete_records(
    config: &ClientConfig,
    topic: &str,
    partition: i32,
    before: Offset,
) -> anyhow::Result<()> {
    let admin: AdminClient<DefaultClientContext> = config.create()?;
    let mut records = TopicPartitionList::new();
    records.add_partition_offset(topic, partition, before)?;
    let options = AdminOptions::new().request_timeout(Some(TIMEOUT));
    let deleted = block_on(admin.delete_records(&records, &options));
    let deleted = deleted.and_then(|list| list.elements().iter().try_for_each(|at| at.error()));
    deleted.context("no record is deleted")
}

fn show(client: &BaseConsumer, group: &str, partitions: &TopicPartitionList) -> anyhow::Result<()> {
    match client.fetch_group_list(Some(group), TIMEOUT)?.groups() {
        [] => println!("group {group}: unknown"),
        [group, ..] => {
            let (name, state, members) = (group.name(), group.state(), group.members().len());
            println!("group {name}: {state}, {members} members");
        }
    }
    let committed = when_loaded(|| client.committed_offsets(partitions.clone(), TIMEOUT))?;
    let starts = resolve(client, partitions, Offset::Beginning)?;
    let ends = resolve(client, partitions, Offset::End)?;
    let bounds = starts.elements().into_iter().zip(ends.elements());
    for (committed, (start, end)) in committed.elements().iter().zip(bounds) {
        let raw = |offset: Offset| offset.to_raw().unwrap_or(-1);
        let (start, end) = (raw(start.offset()), raw(end.offset()));
        let state = match raw(committed.offset()) {
            at if at < 0 => "nothing committed: auto.offset.reset applies".into(),
            at if at < start => format!("committed {at} has expired: auto.offset.reset applies"),
            at if at > end => format!("committed {at} is past the end: auto.offset.reset applies"),
            at => format!("committed {at}, lag {}", end - at),
        };
        println!(
            "partition {}: records {start} to {end}, {state}",
            committed.partition()
        );
    }
    Ok(())
}

/// The offset of a bound or of a time in each partition, by one request.
fn resolve(
    client: &BaseConsumer,
    partitions: &TopicPartitionList,
    to: Offset,
) -> KafkaResult<TopicPartitionList> {
    let mut asked = partitions.clone();
    asked.set_all_offsets(to)?;
    client.offsets_for_times(asked, TIMEOUT)
}

fn target(text: &str) -> anyhow::Result<Offset> {
    Ok(match text {
        "beginning" => Offset::Beginning,
        "end" => Offset::End,
        // In the request, a time stands in the place of the offset.
        time => Offset::Offset(
            DateTime::parse_from_rfc3339(time)
                .context(USAGE)?
                .timestamp_millis(),
        ),
    })
}

fn offset(text: &str) -> anyhow::Result<Offset> {
    if text == "end" {
        return Ok(Offset::End);
    }
    let offset = text.parse().context(USAGE)?;
    ensure!(offset >= 0, USAGE);
    Ok(Offset::Offset(offset))
}
