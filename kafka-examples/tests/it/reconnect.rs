//! An outage of the broker loses, doubles and reorders nothing; what is given up at the end is said to be.

use std::time::Duration;

use anyhow::{Context, Result};
use compose::harness::{Example, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use crate::shared;

fn ticks(kafka: &Broker) -> Result<Running> {
    let mut ticks = Example::new(env!("CARGO_BIN_EXE_kafka_reconnect"))
        .broker(kafka)
        .spawn()?;
    ticks.wait_for("received: tick 5", TIMEOUT)?;
    Ok(ticks)
}

/// What is in the log, in its order.
fn log(kafka: &Broker) -> Result<Vec<u32>> {
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "judge")
        .create()?;
    let (_, end) = reader.fetch_watermarks("reconnect-ticks", 0, TIMEOUT)?;
    let mut all = TopicPartitionList::new();
    all.add_partition_offset("reconnect-ticks", 0, Offset::Beginning)?;
    reader.assign(&all)?;
    (0..end)
        .map(|_| {
            let mut polls = std::iter::repeat_with(|| reader.poll(Duration::from_secs(1)));
            let record = polls.by_ref().take(30).find_map(|record| record);
            let record = record.context("fewer records than the log says")??;
            let text = std::str::from_utf8(record.payload().context("no payload")?)?;
            Ok(text.parse()?)
        })
        .collect()
}

#[test]
fn an_outage_loses_doubles_and_reorders_nothing() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let mut ticks = ticks(&kafka)?;
    for _ in 0..2 {
        kafka.kill(1)?;
        ticks.wait_for("the broker is away", TIMEOUT)?;
        ticks.wait_for("waiting: ", TIMEOUT)?;
        kafka.restart(1)?;
        ticks.wait_for("the broker is back", TIMEOUT)?;
    }
    ticks.interrupt()?;
    let ended = ticks.wait(TIMEOUT)?.ok()?;
    let log = log(&kafka)?;
    let expected: Vec<u32> = (0..u32::try_from(log.len())?).collect();
    assert_eq!(log, expected);
    let sent = log.len();
    let last = format!(
        "ticks sent {sent}, delivered {sent}, failed 0, received {sent}, missing 0, repeated 0\n"
    );
    assert!(ended.stdout.ends_with(&last), "{last}{}", ended.stdout);
    Ok(())
}

#[test]
fn ticks_given_up_while_the_broker_is_away_are_an_error() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let mut ticks = ticks(&kafka)?;
    kafka.kill(1)?;
    ticks.wait_for("the broker is away", TIMEOUT)?;
    ticks.wait_for("waiting: ", TIMEOUT)?;
    ticks.interrupt()?;
    let ended = ticks.wait(Duration::from_secs(20))?;
    assert_eq!(ended.code(), 1, "{}", ended.stderr);
    let gone = "ticks were still waiting for the broker when this was stopped";
    assert!(ended.stderr.contains(gone), "{}", ended.stderr);
    // One may have been written, and not read again, when the broker went. The error says so, too.
    let unread = ended.stderr.contains("ticks were delivered, but not read");
    let all_read = ended.stdout.contains(", missing 0, ");
    assert!(unread != all_read, "{}{}", ended.stdout, ended.stderr);
    assert!(ended.stdout.contains(", repeated 0\n"), "{}", ended.stdout);
    Ok(())
}

#[test]
fn the_name_of_a_member_can_be_taken_over_again_and_again() -> Result<()> {
    let kafka = shared::kafka(&["kafka_reconnect"])?;
    for _ in 0..2 {
        let ended = Example::new(env!("CARGO_BIN_EXE_kafka_reconnect"))
            .args(["fatal"])
            .broker(&kafka)
            .spawn()?
            .wait(TIMEOUT)?
            .ok()?;
        assert!(
            ended.stdout.contains("FencedInstanceId"),
            "{}",
            ended.stdout
        );
    }
    // Of all four, the group knows one: the last to take the name.
    let judge: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let groups = judge.fetch_group_list(Some("reconnect-fatal"), TIMEOUT)?;
    let group = groups.groups().first().context("no such group")?;
    assert!(group.members().len() <= 1, "{}", group.members().len());
    Ok(())
}
