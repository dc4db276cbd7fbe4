//! A replay reads exactly the range that it was asked for, ends, and leaves no trace.

use std::time::Instant;

use anyhow::{Result, ensure};
use compose::harness::{Example, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions};
use rdkafka::client::DefaultClientContext;
use rdkafka::producer::{BaseProducer, BaseRecord, FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::administrator::{admin, create_topic};
use crate::reader;
use crate::shared;

const TOPIC: &str = "replay-readings";
/// 2026-01-01T12:00:00Z in milliseconds.
const NOON: i64 = 1_767_268_800_000;

fn start(kafka: &Broker, args: &[&str]) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_replay"))
        .args(args)
        .broker(kafka)
        .spawn()
}

/// The records that a replay printed, without the lines about the partitions.
fn replay(kafka: &Broker, args: &[&str]) -> Result<Vec<String>> {
    let ended = start(kafka, args)?.wait(TIMEOUT)?.ok()?;
    let (bounds, records): (Vec<_>, Vec<_>) =
        { ended.stdout.lines().map(str::to_owned) }.partition(|line| line.contains("reading from"));
    ensure!(bounds.len() >= 2, "{bounds:?}");
    Ok(records)
}

fn config(kafka: &Broker) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.address());
    config
}

/// A reading for each minute from noon on, in turn to two partitions.
async fn fill(kafka: &Broker) -> Result<AdminClient<DefaultClientContext>> {
    create_topic(kafka, TOPIC, 2, &[("retention.ms", "-1")]).await?;
    let producer: FutureProducer = config(kafka).create()?;
    for minute in 0..12 {
        let reading = format!("{minute} °C");
        let record = FutureRecord::<str, str>::to(TOPIC)
            .partition(minute % 2)
            .timestamp(NOON + i64::from(minute) * 60_000)
            .payload(&reading);
        let sent = producer.send(record, TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
    }
    admin(kafka)
}

#[tokio::test]
async fn reads_exactly_the_range_and_survives_odd_records() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let admin = fill(&kafka).await?;
    assert_eq!(replay(&kafka, &[])?.len(), 12);
    // A second time: reading has moved nothing.
    assert_eq!(replay(&kafka, &["beginning"])?.len(), 12);

    // A time between records, one that a record has, and one after the last.
    let between = replay(&kafka, &["time", "2026-01-01T12:09:30Z"])?;
    assert_eq!(between.len(), 2, "{between:?}");
    for minute in [10, 11] {
        let expected = format!(", 2026-01-01 12:{minute}:00 UTC: {minute} °C");
        assert!(
            between.iter().any(|line| line.ends_with(&expected)),
            "{between:?}"
        );
    }
    let exact = replay(&kafka, &["time", "2026-01-01T12:09:00Z"])?;
    assert_eq!(exact.len(), 3, "{exact:?}");
    let future = replay(&kafka, &["time", "2100-01-01T00:00:00Z"])?;
    assert!(future.is_empty(), "{future:?}");
    let past_the_end = replay(&kafka, &["offset", "100"])?;
    assert!(past_the_end.is_empty(), "{past_the_end:?}");

    // A null payload, and bytes that are not text.
    let producer: FutureProducer = config(&kafka).create()?;
    let empty = FutureRecord::<[u8], [u8]>::to(TOPIC).partition(0);
    let binary = FutureRecord::<[u8], [u8]>::to(TOPIC)
        .partition(0)
        .payload(&[0xff, 0xfe]);
    for record in [empty, binary] {
        let sent = producer.send(record, TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
    }
    let odd = replay(&kafka, &["offset", "6"])?;
    assert_eq!(odd.len(), 2, "{odd:?}");
    assert!(odd[0].starts_with("partition 0 offset 6, ") && odd[0].ends_with(": (null)"));
    assert!(odd[1].starts_with("partition 0 offset 7, "), "{odd:?}");

    // The first records are deleted: reading from 0 begins at the first that is left, and the program says so.
    let mut before = TopicPartitionList::new();
    before.add_partition_offset(TOPIC, 0, Offset::Offset(5))?;
    admin.delete_records(&before, &AdminOptions::new()).await?;
    let left = replay(&kafka, &["offset", "0"])?;
    assert_eq!(left.len(), 3 + 6, "{left:?}");
    let said = start(&kafka, &[])?.wait(TIMEOUT)?.ok()?.stdout;
    let said_so = said.contains("partition 0: offsets 5 to 8, reading from 5");
    assert!(said_so, "{said}");

    // Partitions that were added later are read, too.
    let more = NewPartitions::new(TOPIC, 6);
    admin
        .create_partitions([&more], &AdminOptions::new())
        .await?;
    let record = || {
        FutureRecord::<(), _>::to(TOPIC)
            .payload("added")
            .partition(5)
    };
    // A producer learns of the new partitions with its next metadata; a new one asks for it.
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let producer: FutureProducer = config(&kafka).create()?;
        match producer.send(record(), TIMEOUT).await {
            Ok(_) => break,
            Err((error, _)) => ensure!(Instant::now() < deadline, "{error}"),
        }
    }
    let added = replay(&kafka, &[])?;
    assert!(added.len() == 10 && added.iter().any(|line| line.ends_with(": added")));

    // Neither a group nor an offset is left.
    let groups = admin.inner().fetch_group_list(None, TIMEOUT)?;
    let names: Vec<&str> = groups.groups().iter().map(|group| group.name()).collect();
    assert!(names.is_empty(), "{names:?}");
    Ok(())
}

#[tokio::test]
async fn ends_where_a_transaction_ends() -> Result<()> {
    let kafka = shared::kafka(&["kafka_replay"])?;
    fill(&kafka).await?;
    // Its end marker has the last offset, and is not a record.
    let producer: BaseProducer = config(&kafka)
        .set("transactional.id", "replay-test")
        .create()?;
    producer.init_transactions(TIMEOUT)?;
    producer.begin_transaction()?;
    let record = BaseRecord::<str, str>::to(TOPIC)
        .partition(1)
        .payload("committed");
    producer.send(record).map_err(|(error, _)| error)?;
    producer.commit_transaction(TIMEOUT)?;
    reader::await_markers(&kafka, TOPIC)?;
    let lines = replay(&kafka, &["offset", "6"])?;
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].ends_with(": committed"), "{lines:?}");
    Ok(())
}

/// Enough records that the client has not fetched all of them when it prints the first.
async fn fill_with(kafka: &Broker, records: usize) -> Result<AdminClient<DefaultClientContext>> {
    let producer: BaseProducer = config(kafka).create()?;
    let payload = "x".repeat(1000);
    for _ in 0..records {
        while producer
            .send(
                BaseRecord::<(), _>::to(TOPIC)
                    .partition(0)
                    .payload(&payload),
            )
            .is_err()
        {
            producer.poll(TIMEOUT / 1000);
        }
    }
    producer.flush(TIMEOUT)?;
    Ok(config(kafka).create()?)
}

#[tokio::test]
async fn records_that_are_deleted_before_they_are_read_are_an_error() -> Result<()> {
    let kafka = shared::kafka(&["kafka_replay"])?;
    let admin = fill_with(&kafka, 200_000).await?;
    let mut reading = start(&kafka, &[])?;
    reading.wait_for("offset 10, ", TIMEOUT)?;
    reading.pause()?;
    let mut all = TopicPartitionList::new();
    all.add_partition_offset(TOPIC, 0, Offset::Offset(199_999))?;
    admin.delete_records(&all, &AdminOptions::new()).await?;
    reading.resume()?;
    let ended = reading.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}", ended.stderr);
    assert!(ended.stderr.contains("AutoOffsetReset"), "{}", ended.stderr);
    Ok(())
}

/// New records do not keep it from ending.
#[tokio::test]
async fn ends_at_the_offset_that_was_the_end_at_its_start() -> Result<()> {
    let kafka = shared::kafka(&["kafka_replay"])?;
    fill_with(&kafka, 1000).await?;
    let mut reading = start(&kafka, &[])?;
    reading.wait_for("reading from", TIMEOUT)?;
    reading.pause()?;
    fill_with(&kafka, 1000).await?;
    reading.resume()?;
    let ended = reading.wait(TIMEOUT)?.ok()?;
    let records = ended
        .stdout
        .lines()
        .filter(|line| line.contains(" offset "));
    assert_eq!(records.count(), 1000);
    Ok(())
}

#[test]
fn a_topic_that_does_not_exist_and_wrong_arguments_are_errors() -> Result<()> {
    let kafka = shared::kafka(&["kafka_replay"])?;
    let ended = start(&kafka, &[])?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    assert!(
        ended
            .stderr
            .contains("no topic replay-readings, or no permission")
    );
    for args in [&["offset", "x"][..], &["time", "noon"], &["end"]] {
        let ended = start(&kafka, args)?.wait(TIMEOUT)?;
        assert_eq!(ended.code(), 1);
        assert!(ended.stderr.contains("usage: "), "{}", ended.stderr);
    }
    Ok(())
}
