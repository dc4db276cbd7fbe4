//! Each step can be repeated from any state, and a refusal is told.

use std::time::Duration;

use anyhow::Result;
use compose::harness::{Direction, Example, Finished, Proxy, TIMEOUT};
use compose::{Broker, Service};

use crate::administrator::{admin, create_topic};

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

    // An earlier run has ended after it had added a partition.
    create_topic(&kafka, "admin-demo", 3, &[]).await?;
    let again = run(&kafka)?.ok()?.stdout;
    for line in [
        "create: TopicAlreadyExists ",
        "grow to 3 partitions: InvalidPartitions ",
        "delete: done\n",
    ] {
        assert!(again.contains(line), "{line:?} is missing: {again}");
    }
    assert!(!again.contains("grow to 3 partitions: done"), "{again}");
    assert_eq!(topics(&kafka)?, Vec::<String>::new());
    Ok(())
}

/// The program loses the broker after it has added a partition, so the test sees what it has done.
#[tokio::test]
async fn partition_is_in_the_broker_and_a_lost_broker_ends_the_program() -> Result<()> {
    let (kafka, proxy) = Proxy::in_front_of(Service::Kafka)?;
    // Each answer takes so long that the test is faster than the next step.
    proxy.delay(Direction::ToClient, Duration::from_millis(300))?;
    let mut program = Example::new(env!("CARGO_BIN_EXE_kafka_admin"))
        .proxy(&proxy)
        .spawn()?;
    program.wait_for("grow to 3 partitions: done", TIMEOUT)?;
    proxy.black_hole()?;
    let ended = program.wait(Duration::from_secs(60))?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    let metadata = admin(&kafka)?.inner().fetch_metadata(None, TIMEOUT)?;
    let topic = metadata
        .topics()
        .iter()
        .find(|topic| topic.name() == "admin-demo");
    assert_eq!(topic.map(|topic| topic.partitions().len()), Some(3));
    Ok(())
}
