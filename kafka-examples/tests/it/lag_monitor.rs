//! The lag is right for a group without members, a partition that was never committed, and expired offsets.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use compose::harness::{Example, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::producer::{BaseProducer, BaseRecord, FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::administrator::admin;
use crate::shared;

fn monitor(kafka: &Broker) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_lag_monitor"))
        .env("LAG_INTERVAL", "1")
        .env("LAG_THRESHOLD", "70")
        .broker(kafka)
        .spawn()
}

/// Commits for a group that has no member.
fn commit(kafka: &Broker, partition: i32, position: i64) -> Result<()> {
    let client: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "sleepers")
        .create()?;
    let mut list = TopicPartitionList::new();
    list.add_partition_offset("work", partition, Offset::Offset(position))?;
    // A broker that has just started may not have taken over its groups yet.
    let deadline = Instant::now() + TIMEOUT;
    while let Err(error) = client.commit(&list, CommitMode::Sync) {
        let passing = matches!(
            error.rdkafka_error_code(),
            Some(RDKafkaErrorCode::NotCoordinator | RDKafkaErrorCode::CoordinatorLoadInProgress)
        );
        ensure!(
            passing && Instant::now() < deadline,
            "cannot commit: {error}"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

async fn produce(kafka: &Broker, partition: i32, count: u32) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    for _ in 0..count {
        let record = FutureRecord::<str, str>::to("work")
            .partition(partition)
            .payload("x");
        producer
            .send(record, TIMEOUT)
            .await
            .map_err(|(error, _)| error)?;
    }
    Ok(())
}

async fn topic_of_two(kafka: &Broker) -> Result<()> {
    let topic = NewTopic::new("work", 2, TopicReplication::Fixed(1));
    admin(kafka)?
        .create_topics([&topic], &AdminOptions::new())
        .await?;
    produce(kafka, 0, 50).await?;
    produce(kafka, 1, 30).await
}

#[tokio::test]
async fn lag_is_right_without_members_and_commits_and_through_an_outage() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    topic_of_two(&kafka).await?;
    // A topic that the group does not read, between the others in any order.
    let other = NewTopic::new("a-other", 5, TopicReplication::Fixed(1));
    admin(&kafka)?
        .create_topics([&other], &AdminOptions::new())
        .await?;
    commit(&kafka, 0, 5)?;

    let mut monitor = monitor(&kafka)?;
    monitor.wait_for("WARNING: sleepers on work: lag 75", TIMEOUT)?;
    commit(&kafka, 0, 10)?;
    monitor.wait_for("sleepers on work: lag 70", TIMEOUT)?;
    produce(&kafka, 1, 1).await?;
    monitor.wait_for("WARNING: sleepers on work: lag 71", TIMEOUT)?;

    kafka.kill(1)?;
    monitor.wait_for("lag unknown: ", TIMEOUT)?;
    kafka.restart(1)?;
    commit(&kafka, 1, 31)?;
    monitor.wait_for("sleepers on work: lag 40", TIMEOUT)?;
    monitor.terminate()?;
    let ended = monitor.wait(TIMEOUT)?.ok()?;
    let lines: Vec<&str> = ended.stdout.lines().collect();
    let expected = [
        "WARNING: sleepers on work: lag 75",
        "sleepers on work: lag 70",
        "WARNING: sleepers on work: lag 71",
        "sleepers on work: lag 40",
    ];
    assert_eq!(lines, expected);
    Ok(())
}

#[tokio::test]
async fn records_that_are_deleted_unread_are_not_lag() -> Result<()> {
    let kafka = shared::kafka(&["kafka_lag_monitor"])?;
    topic_of_two(&kafka).await?;
    commit(&kafka, 0, 5)?;
    let mut monitor = monitor(&kafka)?;
    monitor.wait_for("sleepers on work: lag 75", TIMEOUT)?;
    let mut before = TopicPartitionList::new();
    before.add_partition_offset("work", 0, Offset::Offset(20))?;
    admin(&kafka)?
        .delete_records(&before, &AdminOptions::new())
        .await?;
    monitor.wait_for("sleepers on work: lag 60", TIMEOUT)?;
    // An offset past the end, as after a topic was deleted and created again: all is unread.
    commit(&kafka, 0, 500)?;
    produce(&kafka, 0, 1).await?;
    monitor.wait_for("sleepers on work: lag 61", TIMEOUT)?;
    monitor.interrupt()?;
    monitor.wait(TIMEOUT)?.ok()?;
    Ok(())
}

#[tokio::test]
async fn records_of_an_open_transaction_are_lag() -> Result<()> {
    let kafka = shared::kafka(&["kafka_lag_monitor"])?;
    topic_of_two(&kafka).await?;
    commit(&kafka, 0, 5)?;
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("transactional.id", "lag-test")
        .create()?;
    producer.init_transactions(TIMEOUT)?;
    producer.begin_transaction()?;
    let record = BaseRecord::<str, str>::to("work").partition(1).payload("x");
    producer.send(record).map_err(|(error, _)| error)?;
    producer.flush(TIMEOUT)?;
    let mut monitor = monitor(&kafka)?;
    monitor.wait_for("WARNING: sleepers on work: lag 76", TIMEOUT)?;
    producer.abort_transaction(TIMEOUT)?;
    Ok(())
}

#[tokio::test]
async fn topic_without_a_leader_hides_no_other_topic() -> Result<()> {
    let kafka = Broker::private_cluster(Service::Kafka, 3)?;
    let work = NewTopic::new("work", 2, TopicReplication::Variable(&[&[1], &[1]]));
    let lost = NewTopic::new("lost", 2, TopicReplication::Variable(&[&[1], &[2]]));
    admin(&kafka)?
        .create_topics([&work, &lost], &AdminOptions::new())
        .await?;
    produce(&kafka, 0, 5).await?;
    produce(&kafka, 1, 80).await?;
    commit(&kafka, 0, 1)?;
    let mut monitor = monitor(&kafka)?;
    monitor.wait_for("WARNING: sleepers on work: lag 84", TIMEOUT)?;
    kafka.kill(2)?;
    monitor.wait_for("lost: lag unknown, partition 1 has no leader", TIMEOUT)?;
    produce(&kafka, 0, 1).await?;
    monitor.wait_for("WARNING: sleepers on work: lag 85", TIMEOUT)?;
    monitor.interrupt()?;
    monitor.wait(TIMEOUT)?.ok()?;
    Ok(())
}

#[test]
fn unusable_setting_is_refused() -> Result<()> {
    for (name, value) in [("LAG_THRESHOLD", "many"), ("LAG_INTERVAL", "-1")] {
        let ended = Example::new(env!("CARGO_BIN_EXE_kafka_lag_monitor"))
            .env(name, value)
            .spawn()?
            .wait(TIMEOUT)?;
        assert_eq!(ended.code(), 1);
        let reason = format!("Error: {name} is {value:?}, not a whole number");
        assert!(ended.stderr.starts_with(&reason), "{}", ended.stderr);
    }
    Ok(())
}
