//! The numbers are the broker's, also for a group without members and a partition without a commit.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use compose::harness::{Example, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::shared;

fn monitor(kafka: &Broker, args: &[&str]) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_lag_monitor"))
        .args(args)
        .env("LAG_INTERVAL", "1")
        .env("LAG_THRESHOLD", "70")
        .broker(kafka)
        .spawn()
}

/// In the name of the group, of which nobody is a member.
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

fn admin(kafka: &Broker) -> Result<AdminClient<DefaultClientContext>> {
    Ok(ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?)
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
async fn it_is_right_without_members_and_without_a_commit_and_through_an_outage() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    topic_of_two(&kafka).await?;
    commit(&kafka, 0, 5)?;

    let mut monitor = monitor(&kafka, &[])?;
    monitor.wait_for("sleepers work/0: position 5, end 50, lag 45", TIMEOUT)?;
    monitor.wait_for("sleepers work/1: never committed, end 30, lag 30", TIMEOUT)?;
    monitor.wait_for(
        "WARNING: sleepers is 75 behind on work, over the threshold of 70",
        TIMEOUT,
    )?;
    commit(&kafka, 0, 10)?;
    monitor.wait_for("sleepers work/0: position 10, end 50, lag 40", TIMEOUT)?;
    monitor.wait_for("recovered: sleepers is 70 behind on work", TIMEOUT)?;
    produce(&kafka, 1, 1).await?;
    monitor.wait_for("WARNING: sleepers is 71 behind on work", TIMEOUT)?;

    // A group that the broker does not list, as for a moment after its start, has not recovered.
    admin(&kafka)?
        .delete_groups(&["sleepers"], &AdminOptions::new())
        .await?;
    monitor.wait_for("gone: sleepers has no position on work/1", TIMEOUT)?;
    commit(&kafka, 0, 10)?;
    monitor.wait_for("sleepers work/0: position 10, end 50, lag 40", TIMEOUT)?;

    kafka.kill(1)?;
    monitor.wait_for("lag unknown: ", TIMEOUT)?;
    kafka.restart(1)?;
    commit(&kafka, 1, 31)?;
    monitor.wait_for("sleepers work/1: position 31, end 31, lag 0", TIMEOUT)?;
    monitor.wait_for("recovered: sleepers is 40 behind on work", TIMEOUT)?;
    monitor.interrupt()?;
    let ended = monitor.wait(TIMEOUT)?.ok()?;
    assert_eq!(
        ended.stdout.matches("WARNING").count(),
        2,
        "{}",
        ended.stdout
    );
    Ok(())
}

#[tokio::test]
async fn what_retention_deleted_unread_is_lost_and_not_lag() -> Result<()> {
    let kafka = shared::kafka(&["kafka_lag_monitor"])?;
    topic_of_two(&kafka).await?;
    let mut monitor = monitor(&kafka, &["sleepers", "work"])?;
    // Known by name only.
    monitor.wait_for("sleepers work/0: never committed, end 50, lag 50", TIMEOUT)?;
    commit(&kafka, 0, 5)?;
    monitor.wait_for("sleepers work/0: position 5, end 50, lag 45", TIMEOUT)?;
    let mut before = TopicPartitionList::new();
    before.add_partition_offset("work", 0, Offset::Offset(20))?;
    admin(&kafka)?
        .delete_records(&before, &AdminOptions::new())
        .await?;
    monitor.wait_for("sleepers work/0: position 5, end 50, lag 30", TIMEOUT)?;
    monitor.wait_for(
        "LOST: sleepers work/0: retention deleted 15 offsets unread",
        TIMEOUT,
    )?;
    monitor.interrupt()?;
    monitor.wait(TIMEOUT)?.ok()?;
    Ok(())
}

#[tokio::test]
async fn a_partition_without_a_leader_hides_no_other() -> Result<()> {
    let kafka = Broker::private_cluster(Service::Kafka, 3)?;
    let topic = NewTopic::new("work", 2, TopicReplication::Variable(&[&[1], &[2]]));
    admin(&kafka)?
        .create_topics([&topic], &AdminOptions::new())
        .await?;
    produce(&kafka, 0, 5).await?;
    produce(&kafka, 1, 80).await?;
    commit(&kafka, 0, 1)?;
    let mut monitor = monitor(&kafka, &[])?;
    monitor.wait_for("WARNING: sleepers is 84 behind on work", TIMEOUT)?;
    kafka.kill(2)?;
    monitor.wait_for("lag of sleepers on work/1 unknown: ", TIMEOUT)?;
    produce(&kafka, 0, 1).await?;
    monitor.wait_for("sleepers work/0: position 1, end 6, lag 5", TIMEOUT)?;
    monitor.interrupt()?;
    let ended = monitor.wait(TIMEOUT)?.ok()?;
    // Nor has it recovered.
    for no in ["recovered", "gone"] {
        assert!(!ended.stdout.contains(no), "{}", ended.stdout);
    }
    Ok(())
}
