//! The settings of a topic are kept when one of them is changed.

use std::time::Duration;

use anyhow::{Context, Result};
use compose::harness::{Direction, Example, Proxy, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::admin::{AdminOptions, ResourceSpecifier};

use crate::administrator::{admin, create_topic};
use crate::shared;

const TOPIC: &str = "topic-config-demo";

fn example() -> Example {
    Example::new(env!("CARGO_BIN_EXE_kafka_topic_config"))
}

async fn setting(kafka: &Broker, name: &str) -> Result<Option<String>> {
    let topic = [ResourceSpecifier::Topic(TOPIC)];
    let described = admin(kafka)?
        .describe_configs(&topic, &AdminOptions::new())
        .await?;
    let described = described.into_iter().next().context("no answer")?;
    let topic = described.map_err(|code| anyhow::anyhow!("{code}"))?;
    let entry = topic.get(name).context("no such setting")?;
    Ok(entry.value.clone())
}

#[tokio::test]
async fn settings_of_an_existing_topic_are_kept_and_a_run_can_be_repeated() -> Result<()> {
    let kafka = shared::kafka(&["kafka_topic_config"])?;
    create_topic(&kafka, TOPIC, 2, &[("retention.ms", "7200000")]).await?;
    let ended = example().broker(&kafka).spawn()?.wait(TIMEOUT)?.ok()?;
    for line in [
        "before: {\"retention.ms\": \"7200000\"}\n",
        "alone: {\"max.message.bytes\": \"2000000\"}\n",
        "all settings: {\"max.message.bytes\": \"2000000\", \"retention.ms\": \"7200000\"}\n",
    ] {
        assert!(ended.stdout.contains(line), "{line}: {}", ended.stdout);
    }
    assert!(ended.stderr.contains("not created: TopicAlreadyExists"));
    example().broker(&kafka).spawn()?.wait(TIMEOUT)?.ok()?;
    for (name, value) in [
        ("max.message.bytes", "2000000"),
        ("retention.ms", "7200000"),
    ] {
        let found = setting(&kafka, name).await?;
        assert_eq!(found.as_deref(), Some(value), "{name}");
    }
    Ok(())
}

/// The program loses the broker after the first change, so the test sees what a change with one setting does.
#[tokio::test]
async fn change_with_one_setting_resets_the_others_and_a_lost_broker_ends_the_program() -> Result<()>
{
    let (kafka, proxy) = Proxy::in_front_of(Service::Kafka)?;
    create_topic(&kafka, TOPIC, 1, &[("retention.ms", "7200000")]).await?;
    // Each answer takes so long that the test is faster than the next step.
    proxy.delay(Direction::ToClient, Duration::from_millis(300))?;
    let mut program = example().proxy(&proxy).spawn()?;
    program.wait_for("before: ", TIMEOUT)?;
    proxy.swallow(Direction::ToClient)?;
    let ended = program.wait(Duration::from_secs(60))?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    let found = setting(&kafka, "max.message.bytes").await?;
    assert_eq!(found.as_deref(), Some("2000000"));
    let found = setting(&kafka, "retention.ms").await?;
    assert_eq!(found.as_deref(), Some("604800000"), "not the default");
    Ok(())
}
