//! Each step can be repeated from any state, and a refusal is told.

use std::time::Duration;

use anyhow::Result;
use compose::harness::{Direction, Example, Finished, Proxy, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::admin::{AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};

use crate::administrator::admin;

fn run(kafka: &Broker) -> Result<Finished> {
    Example::new(env!("CARGO_BIN_EXE_kafka_admin"))
        .broker(kafka)
        .spawn()?
        .wait(TIMEOUT)
}

fn topics(kafka: &Broker) -> Result<Vec<String>> {
    let metadata = admin(kafka)?.inner().fetch_metadata(None, TIMEOUT)?;
    let names = metadata.topics().iter().map(|topic| topic.name());
    Ok(names
        .filter(|name| !name.starts_with("__"))
        .map(str::to_owned)
        .collect())
}

#[tokio::test]
async fn it_can_be_repeated_from_any_state() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let first = run(&kafka)?.ok()?.stdout;
    assert_eq!(topics(&kafka)?, Vec::<String>::new(), "a topic is left");
    assert_eq!(run(&kafka)?.ok()?.stdout, first);

    // An earlier run has ended after it had added a partition. The topic has a setting of its own.
    let topic = NewTopic::new("admin-demo", 3, TopicReplication::Fixed(1));
    let topic = topic.set("retention.ms", "7200000");
    let admin = admin(&kafka)?;
    let created = admin.create_topics([&topic], &AdminOptions::new()).await?;
    assert!(created[0].is_ok(), "{created:?}");
    let again = run(&kafka)?.ok()?.stdout;
    for line in [
        "create: TopicAlreadyExists ",
        "describe: 3 partitions, retention.ms=7200000\n",
        "with all settings: 3 partitions, max.message.bytes=2000000, retention.ms=7200000\n",
        "grow to 3 partitions: InvalidPartitions ",
        "delete: done\n",
    ] {
        assert!(again.contains(line), "{line:?} is missing: {again}");
    }
    assert_eq!(topics(&kafka)?, Vec::<String>::new());
    Ok(())
}

/// The program loses the broker after it has altered the topic, so the test sees what it has done.
#[tokio::test]
async fn settings_are_in_the_broker_and_a_lost_broker_ends_the_program() -> Result<()> {
    let (kafka, proxy) = Proxy::in_front_of(Service::Kafka)?;
    let topic = NewTopic::new("admin-demo", 6, TopicReplication::Fixed(1));
    let topic = topic.set("retention.ms", "7200000");
    let admin = admin(&kafka)?;
    admin.create_topics([&topic], &AdminOptions::new()).await?;
    // Each answer takes so long that the test is faster than the next step.
    proxy.delay(Direction::ToClient, Duration::from_millis(300))?;
    let mut program = Example::new(env!("CARGO_BIN_EXE_kafka_admin"))
        .proxy(&proxy)
        .spawn()?;
    for _ in 0..2 {
        program.wait_for("alter with all settings: 6 partitions", TIMEOUT)?;
    }
    proxy.black_hole()?;
    let ended = program.wait(Duration::from_secs(60))?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);

    let about = [ResourceSpecifier::Topic("admin-demo")];
    let described = admin.describe_configs(&about, &AdminOptions::new()).await?;
    let described = described.into_iter().next().unwrap().unwrap();
    for (name, value) in [
        ("max.message.bytes", "2000000"),
        ("retention.ms", "7200000"),
    ] {
        let found = described.get(name).unwrap().value.as_deref();
        assert_eq!(found, Some(value), "{name}");
    }
    Ok(())
}
