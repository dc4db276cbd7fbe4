//! Sent messages are in the topic once, refused ones are not, and the window sets the rate.

use std::collections::HashMap;

use anyhow::{Context, Result};
use compose::Broker;
use compose::harness::{Example, TIMEOUT};
use rdkafka::Message;

use crate::administrator::create_topic;
use crate::reader::read;
use crate::shared;

/// How many times each payload is in the topic.
fn read_all(kafka: &Broker, topic: &str) -> Result<HashMap<String, u32>> {
    let mut found = HashMap::new();
    for record in read(kafka, topic, "read_committed")? {
        let text = std::str::from_utf8(record.payload().context("no payload")?)?;
        *found.entry(text.to_owned()).or_default() += 1;
    }
    Ok(found)
}

#[test]
fn sent_messages_are_in_the_topic_once_and_the_window_sets_the_rate() -> Result<()> {
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
        } else if let Some(rest) = line.strip_prefix("a queue of 50, not waiting: sent ") {
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

    let found = read_all(&kafka, "test-topic")?;
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

#[tokio::test]
async fn refusal_by_the_broker_is_an_error_with_its_cause() -> Result<()> {
    let kafka = shared::kafka(&["kafka_batch_producer"])?;
    create_topic(&kafka, "test-topic", 2, &[("max.message.bytes", "50")]).await?;
    let producer = Example::new(env!("CARGO_BIN_EXE_kafka_batch_producer"));
    let ended = producer.broker(&kafka).spawn()?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    assert!(
        ended.stderr.contains("MessageSizeTooLarge"),
        "{}",
        ended.stderr
    );
    assert_eq!(read_all(&kafka, "test-topic")?.len(), 0);
    Ok(())
}
