//! Without a key out of order, with a key in order, and for the reason that the header gives.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use compose::harness::{Example, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::Message;

use crate::administrator::{create_topic, tool};
use crate::reader::read;
use crate::shared;

/// For each user the number of late events: three without a key, three with a key.
fn run(kafka: &Broker) -> Result<Vec<u32>> {
    let ended = Example::new(env!("CARGO_BIN_EXE_kafka_pitfall_ordering"))
        .broker(kafka)
        .spawn()?
        .wait(TIMEOUT)?
        .ok()?;
    let lines = ended.stdout.lines();
    let late: Vec<u32> = lines
        .filter_map(|line| line.split_once(": ")?.1.split(' ').next()?.parse().ok())
        .collect();
    assert_eq!(late.len(), 6, "{}", ended.stdout);
    Ok(late)
}

/// The broker creates the topic with three partitions at the first run. The other topic has more.
#[tokio::test]
async fn only_the_key_keeps_the_events_of_a_user_in_order() -> Result<()> {
    for partitions in [3, 7] {
        let kafka = shared::kafka(&["kafka_pitfall_ordering"])?;
        if partitions != 3 {
            create_topic(&kafka, "pitfall-ordering", partitions, &[]).await?;
        }
        for _ in 0..2 {
            let late = run(&kafka)?;
            assert!(late[..3].iter().all(|late| *late > 0), "{late:?}");
            assert_eq!(late[3..], [0, 0, 0]);
        }

        // The broker has 120 events without and 120 with a key, twice.
        let records = read(&kafka, "pitfall-ordering", "read_committed")?;
        assert_eq!(records.len(), 480);
        let mut keyed: BTreeMap<String, Vec<(i32, u32)>> = BTreeMap::new();
        let mut keyless = BTreeSet::new();
        for record in records {
            let payload = String::from_utf8_lossy(record.payload().unwrap_or_default());
            let (user, number) = payload.split_once(' ').context("not an event")?;
            let Some(key) = record.key() else {
                keyless.insert(record.partition());
                continue;
            };
            assert_eq!(key, user.as_bytes());
            let events = keyed.entry(user.to_owned()).or_default();
            events.push((record.partition(), number.parse()?));
        }
        assert!(keyless.len() > 1, "{keyless:?}");
        assert!(*keyless.last().context("none")? < partitions);
        if partitions == 7 {
            assert!(
                keyless.len() > 3,
                "the added partitions are not used: {keyless:?}"
            );
        }
        for (user, events) in keyed {
            let numbers = (0..40).chain(0..40);
            let expected: Vec<_> = numbers.map(|number| (events[0].0, number)).collect();
            assert_eq!(events, expected, "{user}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn in_a_topic_with_one_partition_everything_is_in_order() -> Result<()> {
    let kafka = shared::kafka(&["kafka_pitfall_ordering"])?;
    create_topic(&kafka, "pitfall-ordering", 1, &[]).await?;
    assert_eq!(run(&kafka)?, [0; 6]);
    Ok(())
}

/// An administrator has created the topics, with more partitions than the broker's default.
#[test]
fn examples_work_without_the_right_to_create_topics() -> Result<()> {
    let kafka = Broker::secure(Service::Kafka)?;
    for topic in [
        "pitfall-ordering",
        "pitfall-auto-commit-wrong",
        "pitfall-auto-commit-right",
    ] {
        let create = ["--create", "--topic", topic, "--partitions", "5"];
        tool(&kafka, "TopicCommand", &create)?;
    }
    let late = run(&kafka)?;
    assert!(late[..3].iter().all(|late| *late > 0), "{late:?}");
    assert_eq!(late[3..], [0, 0, 0]);
    Example::new(env!("CARGO_BIN_EXE_kafka_pitfall_auto_commit"))
        .broker(&kafka)
        .spawn()?
        .wait(TIMEOUT)?
        .ok()?;
    // It creates no topic, and does not need the right for it.
    let replay = Example::new(env!("CARGO_BIN_EXE_kafka_replay"))
        .broker(&kafka)
        .spawn()?
        .wait(TIMEOUT)?;
    assert!(
        replay.stderr.contains("no topic replay-readings"),
        "{}",
        replay.stderr
    );
    Ok(())
}
