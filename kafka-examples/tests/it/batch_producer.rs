//! What is counted as sent is there once, what was refused is not, and the window sets the rate.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result};
use compose::Broker;
use compose::harness::{Example, TIMEOUT};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use crate::shared;

fn read_all(kafka: &Broker, topic: &str, partitions: i32) -> Result<HashMap<String, u32>> {
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "reader")
        .create()?;
    let mut all = TopicPartitionList::new();
    let mut expected = 0;
    for partition in 0..partitions {
        let (low, high) = reader.fetch_watermarks(topic, partition, TIMEOUT)?;
        expected += high - low;
        all.add_partition_offset(topic, partition, Offset::Beginning)?;
    }
    reader.assign(&all)?;
    let mut found = HashMap::new();
    for _ in 0..expected {
        let mut polls = std::iter::repeat_with(|| reader.poll(Duration::from_secs(1))).take(30);
        let record = polls
            .find_map(|record| record)
            .context("fewer records than the log says")??;
        let text = std::str::from_utf8(record.payload().context("no payload")?)?;
        *found.entry(text.to_owned()).or_default() += 1;
    }
    Ok(found)
}

#[test]
fn what_is_sent_is_there_once_and_the_window_sets_the_rate() -> Result<()> {
    let kafka = shared::kafka(&["kafka_batch_producer"])?;
    let producer = Example::new(env!("CARGO_BIN_EXE_kafka_batch_producer"));
    let ended = producer.broker(&kafka).spawn()?.wait(TIMEOUT)?.ok()?;

    let mut rates = HashMap::new();
    let mut refused_run = 0;
    for line in ended.stdout.lines() {
        if let Some(rest) = line.strip_prefix("window ") {
            let (window, rest) = rest.split_once(": sent ").context("no count")?;
            let rate = rest
                .split_whitespace()
                .rev()
                .nth(1)
                .context("no rate")?
                .parse::<f64>()?;
            rates.insert(window.trim().parse::<u32>()?, rate);
        } else if let Some(rest) = line.strip_prefix("a queue of 50, timeout 0: sent ") {
            refused_run = rest
                .split_once('/')
                .context("no total")?
                .0
                .parse::<usize>()?;
        }
    }
    // A window of W passes at most W per linger of 10 ms, whatever the machine.
    assert!(rates[&1] <= 100.0 && rates[&10] <= 1_000.0, "{rates:?}");
    // Not always 50 at first: the last reports of the run before may still take room.
    assert!((1..1000).contains(&refused_run), "{refused_run}");

    let found = read_all(&kafka, "test-topic", 3)?;
    let repeated: Vec<_> = found.iter().filter(|(_, count)| **count > 1).collect();
    assert!(repeated.is_empty(), "{repeated:?}");
    for number in 0..4_101 {
        assert!(
            found.contains_key(&format!("message-{number}")),
            "message-{number} was counted as sent"
        );
    }
    assert_eq!(found.len(), 4_101 + refused_run);
    Ok(())
}
