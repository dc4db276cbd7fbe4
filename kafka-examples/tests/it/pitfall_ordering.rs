//! Without a key out of order, with a key in order, and for the reason that is given.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use compose::harness::{Example, TIMEOUT};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use crate::shared;

#[test]
fn only_the_key_keeps_a_users_events_in_order() -> Result<()> {
    let kafka = shared::kafka(&["kafka_pitfall_ordering"])?;
    for _ in 0..2 {
        let ended = Example::new(env!("CARGO_BIN_EXE_kafka_pitfall_ordering"))
            .broker(&kafka)
            .spawn()?
            .wait(TIMEOUT)?
            .ok()?;
        let wrong: Vec<u32> = ended
            .stdout
            .lines()
            .filter_map(|line| line.split_once("}, ")?.1.split(' ').next()?.parse().ok())
            .collect();
        assert_eq!(wrong.len(), 6, "{}", ended.stdout);
        assert!(
            wrong[..3].iter().all(|pairs| *pairs > 0),
            "{}",
            ended.stdout
        );
        assert_eq!(wrong[3..], [0, 0, 0], "{}", ended.stdout);
    }

    // What lies on the broker: 120 events without and with key, twice.
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "reader")
        .set("enable.auto.commit", "false")
        .create()?;
    let mut all = TopicPartitionList::new();
    for partition in 0..3 {
        all.add_partition_offset("pitfall-ordering", partition, Offset::Beginning)?;
    }
    reader.assign(&all)?;
    let mut keyed: BTreeMap<String, Vec<(i32, u32)>> = BTreeMap::new();
    let (mut keyless, mut count) = (BTreeSet::new(), 0);
    let deadline = std::time::Instant::now() + TIMEOUT;
    while count < 480 {
        ensure!(std::time::Instant::now() < deadline, "only {count} events");
        let Some(record) = reader.poll(Duration::from_secs(1)).transpose()? else {
            continue;
        };
        count += 1;
        let payload = String::from_utf8_lossy(record.payload().unwrap_or_default());
        let (user, number) = payload.split_once(' ').context("no event")?;
        match record.key() {
            Some(key) => {
                assert_eq!(key, user.as_bytes());
                let events = keyed.entry(user.to_owned()).or_default();
                events.push((record.partition(), number.parse()?));
            }
            None => {
                keyless.insert(record.partition());
            }
        }
    }
    assert!(keyless.len() > 1, "{keyless:?}");
    for (user, events) in keyed {
        let expected: Vec<_> = (0..40)
            .chain(0..40)
            .map(|number| (events[0].0, number))
            .collect();
        assert_eq!(events, expected, "{user}");
    }
    Ok(())
}
