//! The offsets of a stopped group are moved to where the broker says, and records are deleted before an offset.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use compose::Broker;
use compose::harness::{Example, Finished, TIMEOUT};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::administrator::create_topic;
use crate::reader::positions;
use crate::shared;

const TOPIC: &str = "moved";
const GROUP: &str = "mover";
/// 2026-01-01T12:00:00Z in milliseconds.
const NOON: i64 = 1_767_268_800_000;

fn run(kafka: &Broker, action: &[&str]) -> Result<Finished> {
    Example::new(env!("CARGO_BIN_EXE_kafka_offsets"))
        .args([&[GROUP, TOPIC], action].concat())
        .broker(kafka)
        .spawn()?
        .wait(TIMEOUT)
}

fn client(kafka: &Broker) -> Result<BaseConsumer> {
    Ok(ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", GROUP)
        .create()?)
}

/// What the group has committed; -1 is nothing.
fn committed(kafka: &Broker) -> Result<Vec<i64>> {
    let positions = positions(kafka, GROUP, TOPIC)?.into_values();
    Ok(positions.map(|next| next.unwrap_or(-1)).collect())
}

/// Three partitions with four records, one record and none. One record a minute, from noon.
async fn topic(kafka: &Broker) -> Result<()> {
    create_topic(kafka, TOPIC, 3, &[("retention.ms", "-1")]).await?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    for (partition, minute) in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)] {
        let record = FutureRecord::<(), str>::to(TOPIC)
            .partition(partition)
            .timestamp(NOON + minute * 60_000)
            .payload("x");
        let sent = producer.send(record, TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
    }
    Ok(())
}

#[tokio::test]
async fn offsets_are_moved_in_all_partitions() -> Result<()> {
    let kafka = shared::kafka(&["kafka_offsets"])?;
    topic(&kafka).await?;
    let shown = run(&kafka, &[])?.ok()?.stdout;
    assert_eq!(
        shown,
        "group mover: unknown\n\
         partition 0: records 0 to 4, nothing committed: auto.offset.reset applies\n\
         partition 1: records 0 to 1, nothing committed: auto.offset.reset applies\n\
         partition 2: records 0 to 0, nothing committed: auto.offset.reset applies\n"
    );
    assert_eq!(committed(&kafka)?, [-1, -1, -1], "showing has committed");
    for (to, expected) in [
        ("beginning", [0, 0, 0]),
        ("end", [4, 1, 0]),
        // Between two records, at a record, after all records, and with another time zone.
        ("2026-01-01T12:01:30Z", [2, 1, 0]),
        ("2026-01-01T12:03:00Z", [3, 1, 0]),
        ("2100-01-01T00:00:00Z", [4, 1, 0]),
        ("2026-01-01T13:00:00+01:00", [0, 0, 0]),
    ] {
        let moved = run(&kafka, &[to])?.ok()?.stdout;
        assert_eq!(committed(&kafka)?, expected, "{to}");
        let lag = 4 - expected[0];
        let line = format!(
            "partition 0: records 0 to 4, committed {}, lag {lag}\n",
            expected[0]
        );
        ensure!(moved.contains(&line), "{moved}");
        ensure!(
            moved.starts_with("group mover: Empty, 0 members\n"),
            "{moved}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn offsets_of_a_group_with_members_are_not_moved() -> Result<()> {
    let kafka = shared::kafka(&["kafka_offsets"])?;
    topic(&kafka).await?;
    run(&kafka, &["end"])?.ok()?;
    let member = client(&kafka)?;
    member.subscribe(&[TOPIC])?;
    let deadline = Instant::now() + TIMEOUT;
    while member.assignment()?.count() == 0 {
        ensure!(Instant::now() < deadline, "no partition is assigned");
        let _ = member.poll(Duration::from_millis(100));
    }
    let shown = run(&kafka, &[])?.ok()?.stdout;
    ensure!(
        shown.starts_with("group mover: Stable, 1 members\n"),
        "{shown}"
    );
    let refused = run(&kafka, &["beginning"])?;
    assert_eq!(refused.code(), 1);
    let reason = "if the group has members, stop them first";
    ensure!(refused.stderr.contains(reason), "{}", refused.stderr);
    assert_eq!(refused.stdout, "");
    assert_eq!(committed(&kafka)?, [4, 1, 0]);
    drop(member);
    run(&kafka, &["beginning"])?.ok()?;
    assert_eq!(committed(&kafka)?, [0, 0, 0]);
    Ok(())
}

#[tokio::test]
async fn records_are_deleted_before_the_offset_and_offsets_expire() -> Result<()> {
    let kafka = shared::kafka(&["kafka_offsets"])?;
    topic(&kafka).await?;
    run(&kafka, &["beginning"])?.ok()?;
    let bounds = || {
        client(&kafka)?
            .fetch_watermarks(TOPIC, 0, TIMEOUT)
            .map_err(anyhow::Error::from)
    };
    let shown = run(&kafka, &["delete", "0", "2"])?.ok()?.stdout;
    assert_eq!(bounds()?, (2, 4));
    let expired = "partition 0: records 2 to 4, committed 0 has expired: auto.offset.reset applies";
    ensure!(shown.contains(expired), "{shown}");
    ensure!(
        shown.contains("partition 1: records 0 to 1, committed 0, lag 1"),
        "{shown}"
    );

    for refused in [["delete", "0", "5"], ["delete", "9", "1"]] {
        let ended = run(&kafka, &refused)?;
        assert_eq!(ended.code(), 1, "{}", ended.stdout);
        ensure!(
            ended.stderr.contains("no record is deleted"),
            "{}",
            ended.stderr
        );
    }
    // -1 would be the end of the partition.
    let ended = run(&kafka, &["delete", "0", "-1"])?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    assert_eq!(bounds()?, (2, 4));
    run(&kafka, &["delete", "0", "4"])?.ok()?;
    assert_eq!(bounds()?, (4, 4));

    let mut list = TopicPartitionList::new();
    list.add_partition_offset(TOPIC, 1, Offset::Offset(500))?;
    client(&kafka)?.commit(&list, CommitMode::Sync)?;
    let shown = run(&kafka, &[])?.ok()?.stdout;
    ensure!(shown.contains("committed 500 is past the end"), "{shown}");
    Ok(())
}

#[test]
fn wrong_arguments_and_a_missing_topic_are_refused() -> Result<()> {
    let kafka = shared::kafka(&["kafka_offsets"])?;
    for wrong in [
        vec!["noon"],
        vec!["delete"],
        vec!["delete", "zero", "1"],
        vec!["delete", "0", "end"],
        vec!["beginning", "now"],
    ] {
        let ended = run(&kafka, &wrong)?;
        assert_eq!(ended.code(), 1, "{wrong:?}");
        ensure!(
            ended.stderr.starts_with("Error: usage: "),
            "{}",
            ended.stderr
        );
    }
    let ended = run(&kafka, &[])?;
    assert_eq!(ended.code(), 1);
    let reason = "Error: no topic moved, or no permission";
    ensure!(ended.stderr.starts_with(reason), "{}", ended.stderr);
    Ok(())
}
