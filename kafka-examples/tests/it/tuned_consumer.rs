//! Work that exceeds max.poll.interval.ms costs the partition, is reported, and is not committed; slow work that does
//! not exceed it costs nothing.

use std::time::{Duration, Instant};

use anyhow::Result;
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::shared;

fn consumer(kafka: &Broker, limit: &str, jobs: &[&str]) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_tuned_consumer"))
        .env("MAX_POLL_INTERVAL_MS", limit)
        .args(jobs)
        .broker(kafka)
        .spawn()
}

fn judge(kafka: &Broker) -> Result<BaseConsumer> {
    Ok(ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "tuned-consumer")
        .create()?)
}

fn members(judge: &BaseConsumer) -> Result<usize> {
    let groups = judge.fetch_group_list(Some("tuned-consumer"), TIMEOUT)?;
    Ok(groups
        .groups()
        .first()
        .map_or(0, |group| group.members().len()))
}

fn committed(judge: &BaseConsumer) -> Result<Offset> {
    let mut asked = TopicPartitionList::new();
    asked.add_partition("tuned-jobs", 0);
    let list = judge.committed_offsets(asked, TIMEOUT)?;
    Ok(list.elements()[0].offset())
}

#[test]
fn too_long_is_out_of_the_group_and_the_job_moves_to_another() -> Result<()> {
    let kafka = shared::kafka(&["kafka_tuned_consumer"])?;
    let judge = judge(&kafka)?;
    let mut first = consumer(&kafka, "12000", &["10", "25000"])?;
    first.wait_for("offset 1: 25000 ms of work", TIMEOUT)?;
    assert_eq!(members(&judge)?, 1, "not yet too late");
    first.wait_for("offset 1: still working after 9600 ms", TIMEOUT)?;
    let deadline = Instant::now() + TIMEOUT;
    while members(&judge)? > 0 {
        assert!(Instant::now() < deadline, "it is still a member");
        std::thread::sleep(Duration::from_millis(100));
    }
    // It is busy, and neither dead nor told yet.
    assert!(!first.lines().iter().any(|line| line.contains("too late")));

    // Its job goes to another member while it still works on it.
    let mut second = consumer(&kafka, "300000", &[])?;
    second.wait_for("offset 1: 25000 ms of work", TIMEOUT)?;
    assert!(!first.lines().iter().any(|line| line.contains("too late")));
    first.wait_for("offset 1: done, but too late", TIMEOUT)?;
    first.wait_for("out of the group: ", TIMEOUT)?;
    assert_eq!(
        committed(&judge)?,
        Offset::Offset(1),
        "late work is not committed"
    );
    second.wait_for("offset 1: done", TIMEOUT)?;
    second.interrupt()?;
    second.wait(TIMEOUT)?.ok()?;
    // Longer than the session timeout of ten seconds, and yet it was a member to the end.
    assert_eq!(committed(&judge)?, Offset::Offset(2));
    first.interrupt()?;
    first.wait(TIMEOUT)?.ok()?;
    Ok(())
}

#[tokio::test]
async fn what_is_no_job_is_reported_and_passed_over() -> Result<()> {
    let kafka = shared::kafka(&["kafka_tuned_consumer"])?;
    let mut consumer = consumer(&kafka, "300000", &["1"])?;
    consumer.wait_for("offset 0: done", TIMEOUT)?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let endless = u64::MAX.to_string();
    let bad = [
        None,
        Some(&b""[..]),
        Some(b"\xff"),
        Some(b"-1"),
        Some(endless.as_bytes()),
    ];
    for payload in bad.into_iter().chain([Some(&b"1"[..])]) {
        let mut record = FutureRecord::<[u8], [u8]>::to("tuned-jobs");
        record.payload = payload;
        let sent = producer.send(record, TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
    }
    consumer.wait_for("offset 6: done", TIMEOUT)?;
    consumer.interrupt()?;
    let ended = consumer.wait(TIMEOUT)?.ok()?;
    assert_eq!(ended.stdout.matches("not a job, skipped").count(), 5);
    assert_eq!(committed(&judge(&kafka)?)?, Offset::Offset(7));
    Ok(())
}
