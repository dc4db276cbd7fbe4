//! Topics that match the pattern are read, also those that are created, extended or deleted meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT};
use rdkafka::admin::{AdminOptions, NewPartitions};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::administrator::{admin, create_topic};
use crate::shared;

/// Well below five minutes, the default interval.
const SOON: Duration = Duration::from_secs(30);

fn reader(kafka: &Broker) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_pattern_subscription"))
        .broker(kafka)
        .spawn()
}

fn config(kafka: &Broker) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.address());
    config
}

async fn send(kafka: &Broker, topic: &str, partition: i32, payload: &[u8]) -> Result<()> {
    let producer: FutureProducer = config(kafka).create()?;
    let record = FutureRecord::<(), [u8]>::to(topic).partition(partition);
    let sent = producer.send(record.payload(payload), TIMEOUT).await;
    sent.map_err(|(error, _)| error)?;
    Ok(())
}

/// A position that outlived its topic would hide the records of the next topic of that name.
fn await_commit(kafka: &Broker, topic: &str, position: i64) -> Result<()> {
    let observer: BaseConsumer = config(kafka).set("group.id", "pattern-reader").create()?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let mut list = TopicPartitionList::new();
        list.add_partition(topic, 0);
        let list = observer.committed_offsets(list, TIMEOUT)?;
        if list.elements()[0].offset() == Offset::Offset(position) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "not committed");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[tokio::test]
async fn topic_created_later_is_read_from_its_beginning_and_others_are_not_read() -> Result<()> {
    let kafka = shared::kafka(&["kafka_pattern_subscription"])?;
    let mut reader = reader(&kafka)?;
    reader.wait_for("waiting: ", TIMEOUT)?;
    for topic in ["eventsXother", "my.events.other", "events.first"] {
        create_topic(&kafka, topic, 1, &[]).await?;
        send(&kafka, topic, 0, b"before").await?;
    }
    reader.wait_for("events.first partition 0 offset 0: before", SOON)?;
    create_topic(&kafka, "events.second", 5, &[]).await?;
    send(&kafka, "events.second", 4, b"\xff").await?;
    reader.wait_for("events.second partition 4 offset 0: \u{fffd}", SOON)?;
    reader.terminate()?;
    let said = reader.wait(TIMEOUT)?.ok()?.stdout;
    assert!(!said.contains("other"), "{said}");
    Ok(())
}

#[tokio::test]
async fn added_partition_is_read_from_its_beginning() -> Result<()> {
    let kafka = shared::kafka(&["kafka_pattern_subscription"])?;
    create_topic(&kafka, "events.grows", 1, &[]).await?;
    let mut reader = reader(&kafka)?;
    reader.wait_for("assigned: events.grows/0", TIMEOUT)?;
    let more = NewPartitions::new("events.grows", 2);
    let extended = admin(&kafka)?
        .create_partitions([&more], &AdminOptions::new())
        .await?;
    assert_eq!(extended, [Ok("events.grows".to_owned())]);
    // The broker may need a moment until it has a leader for the partition.
    send(&kafka, "events.grows", 1, b"early").await?;
    reader.wait_for("events.grows partition 1 offset 0: early", SOON)?;
    reader.interrupt()?;
    reader.wait(TIMEOUT)?.ok()?;
    Ok(())
}

#[tokio::test]
async fn deleted_topic_leaves_the_subscription_and_is_read_again_when_it_is_back() -> Result<()> {
    let kafka = shared::kafka(&["kafka_pattern_subscription"])?;
    for topic in ["events.goes", "events.stays"] {
        create_topic(&kafka, topic, 1, &[]).await?;
        send(&kafka, topic, 0, b"first").await?;
    }
    let mut reader = reader(&kafka)?;
    for _ in 0..2 {
        reader.wait_for("partition 0 offset 0: first", TIMEOUT)?;
    }
    await_commit(&kafka, "events.goes", 1)?;
    let deleted = admin(&kafka)?
        .delete_topics(&["events.goes"], &AdminOptions::new())
        .await?;
    let code: Vec<Result<_, RDKafkaErrorCode>> = deleted
        .into_iter()
        .map(|one| one.map_err(|(_, code)| code))
        .collect();
    assert_eq!(code, [Ok("events.goes".to_owned())]);
    let line = "assigned: events.stays/0";
    reader.wait_for_line(|said| said == line, line, SOON)?;
    send(&kafka, "events.stays", 0, b"second").await?;
    reader.wait_for("events.stays partition 0 offset 1: second", SOON)?;

    create_topic(&kafka, "events.goes", 1, &[]).await?;
    send(&kafka, "events.goes", 0, b"again").await?;
    reader.wait_for("events.goes partition 0 offset 0: again", SOON)?;
    reader.interrupt()?;
    reader.wait(TIMEOUT)?.ok()?;
    Ok(())
}
