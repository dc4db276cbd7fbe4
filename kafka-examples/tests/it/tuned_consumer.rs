//! Work that exceeds max.poll.interval.ms costs the partition, is reported, and is not committed. Slow work that does not
//! exceed it costs nothing.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::shared;

const TOPIC: &str = "tuned-jobs";

fn consumer(kafka: &Broker, limit: &str) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_tuned_consumer"))
        .env("MAX_POLL_INTERVAL_MS", limit)
        .broker(kafka)
        .spawn()
}

async fn send(kafka: &Broker, payload: Option<&[u8]>) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let mut record = FutureRecord::<[u8], [u8]>::to(TOPIC).partition(0);
    record.payload = payload;
    let sent = producer.send(record, TIMEOUT).await;
    sent.map_err(|(error, _)| error)?;
    Ok(())
}

fn observer(kafka: &Broker) -> Result<BaseConsumer> {
    Ok(ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "tuned-consumer")
        .create()?)
}

fn members(observer: &BaseConsumer) -> Result<usize> {
    let groups = observer.fetch_group_list(Some("tuned-consumer"), TIMEOUT)?;
    let group = groups.groups().first();
    Ok(group.map_or(0, |group| group.members().len()))
}

fn await_members(observer: &BaseConsumer, count: usize) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while members(observer)? != count {
        ensure!(Instant::now() < deadline, "there are not {count} members");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn committed(observer: &BaseConsumer) -> Result<Offset> {
    let mut asked = TopicPartitionList::new();
    asked.add_partition(TOPIC, 0);
    let list = observer.committed_offsets(asked, TIMEOUT)?;
    Ok(list.elements()[0].offset())
}

#[tokio::test]
async fn work_that_is_too_long_costs_the_partition_and_the_job_moves_to_another_member()
-> Result<()> {
    let kafka = shared::kafka(&["kafka_tuned_consumer"])?;
    let observer = observer(&kafka)?;
    send(&kafka, Some(b"10")).await?;
    send(&kafka, Some(b"20000")).await?;
    let mut first = consumer(&kafka, "10000")?;
    first.wait_for("offset 0: 10 ms of work done", TIMEOUT)?;
    assert_eq!(members(&observer)?, 1, "it is not yet too late");
    await_members(&observer, 0)?;
    let is_too_late = |line: &String| line.contains("too late");
    // It is busy: it is alive, and does not know yet.
    assert!(!first.lines().iter().any(is_too_late));

    // Its job goes to another member while it still works on it.
    let mut second = consumer(&kafka, "300000")?;
    await_members(&observer, 1)?;
    assert!(!first.lines().iter().any(is_too_late));
    first.wait_for("offset 1: done too late", TIMEOUT)?;
    // It joins the group again by itself.
    first.wait_for("waiting: Message consumption error: PollExceeded", TIMEOUT)?;
    assert_eq!(
        committed(&observer)?,
        Offset::Offset(1),
        "late work was committed"
    );
    // The job takes longer than the session timeout of ten seconds, and the second one is a member to the end.
    second.wait_for("offset 1: 20000 ms of work done", TIMEOUT)?;
    await_members(&observer, 2)?;
    first.terminate()?;
    second.terminate()?;
    let warned = first.wait(TIMEOUT)?.ok()?.stderr;
    assert!(warned.contains("MAXPOLL"), "{warned}");
    let kept = second.wait(TIMEOUT)?.ok()?.stderr;
    assert!(!kept.contains("MAXPOLL"), "{kept}");
    assert_eq!(committed(&observer)?, Offset::Offset(2));
    Ok(())
}

#[tokio::test]
async fn malformed_job_takes_no_time_and_is_committed() -> Result<()> {
    let kafka = shared::kafka(&["kafka_tuned_consumer"])?;
    let endless = u64::MAX.to_string();
    let bad = [
        None,
        Some(&b""[..]),
        Some(b"\xff"),
        Some(b"-1"),
        Some(endless.as_bytes()),
    ];
    for payload in bad.into_iter().chain([Some(&b"1"[..])]) {
        send(&kafka, payload).await?;
    }
    let mut consumer = consumer(&kafka, "300000")?;
    consumer.wait_for("offset 5: 1 ms of work done", TIMEOUT)?;
    consumer.interrupt()?;
    let ended = consumer.wait(TIMEOUT)?.ok()?;
    assert_eq!(ended.stdout.matches(": 0 ms of work done").count(), 5);
    assert_eq!(committed(&observer(&kafka)?)?, Offset::Offset(6));
    Ok(())
}

#[test]
fn a_limit_that_the_client_refuses_ends_the_program() -> Result<()> {
    for limit in ["9999", "soon", ""] {
        let refused = Example::new(env!("CARGO_BIN_EXE_kafka_tuned_consumer"))
            .env("MAX_POLL_INTERVAL_MS", limit)
            .env("KAFKA_BROKERS", "127.0.0.1:1")
            .spawn()?
            .wait(TIMEOUT)?;
        assert_eq!(refused.code(), 1);
        let named = refused.stderr.contains("max.poll.interval.ms");
        assert!(named, "{limit}: {}", refused.stderr);
    }
    Ok(())
}
