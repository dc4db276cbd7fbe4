//! The record is where the producer says it is, and a refusal is not called an outage.

use std::time::Duration;

use anyhow::{Context, Result};
use compose::Service;
use compose::harness::{Example, Proxy, TIMEOUT};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use crate::administrator::create_topic;
use crate::shared;

const TOPIC: &str = "group-orders";

fn producer() -> Example {
    Example::new(env!("CARGO_BIN_EXE_kafka_async_producer"))
}

#[test]
fn each_record_is_at_the_printed_partition_and_offset() -> Result<()> {
    let kafka = shared::kafka(&["kafka_async_producer"])?;
    let producer = producer().args(["7"]).broker(&kafka);
    let ended = producer.spawn()?.wait(TIMEOUT)?.ok()?;
    assert_eq!(ended.stdout.lines().count(), 7);

    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "reader")
        .set("enable.auto.commit", "false")
        .create()?;
    for (line, number) in ended.stdout.lines().zip(123..) {
        let (order, place) = line.split_once(": partition ").context("no partition")?;
        let (partition, offset) = place.split_once(" offset ").context("no offset")?;
        let (partition, offset) = (partition.parse()?, offset.parse()?);
        assert_eq!(order, format!("order-{number}"));

        let mut at = TopicPartitionList::new();
        at.add_partition_offset(TOPIC, partition, Offset::Offset(offset))?;
        reader.assign(&at)?;
        // `poll` may also return early, without a record, when it has handled some other event.
        let mut polls = std::iter::repeat_with(|| reader.poll(Duration::from_secs(1))).take(30);
        let record = polls
            .find_map(|record| record)
            .context("no record there")??;
        assert_eq!((record.partition(), record.offset()), (partition, offset));
        assert_eq!(record.key(), Some(order.as_bytes()));
        let payload: serde_json::Value = serde_json::from_slice(record.payload().unwrap())?;
        assert_eq!(payload["order_id"], order);
        assert_eq!(payload["amount_cents"], 4_999, "an integer of cents");
    }
    // By the Java client's hash; librdkafka's own would say 2.
    let stdout = ended.stdout;
    assert!(stdout.contains("order-126: partition 1 "), "{stdout}");
    Ok(())
}

#[tokio::test]
async fn too_large_record_is_refused() -> Result<()> {
    let kafka = shared::kafka(&["kafka_async_producer"])?;
    create_topic(&kafka, TOPIC, 1, &[("max.message.bytes", "50")]).await?;
    let ended = producer().broker(&kafka).spawn()?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    let refused = "order-123 is refused: Message production error: MessageSizeTooLarge";
    assert!(ended.stderr.contains(refused), "{}", ended.stderr);
    assert!(!ended.stderr.contains("may or may not"), "{}", ended.stderr);
    Ok(())
}

/// The broker is there, but it tells its clients to connect to a port where nothing listens.
#[test]
fn failing_advertised_address_is_named() -> Result<()> {
    let (kafka, proxy) = Proxy::in_front_of(Service::Kafka)?;
    let properties = std::fs::read_to_string(kafka.folder().join("node-1/server.properties"))?;
    let mut listeners = properties
        .lines()
        .filter(|line| line.contains("listeners="));
    let (_, listener) = listeners
        .find_map(|line| line.split_once("PROXIED://"))
        .context("no listener that advertises the proxy")?;
    proxy.cut()?;
    let ended = producer()
        .env("KAFKA_BROKERS", listener)
        .spawn()?
        .wait(TIMEOUT)?;
    let stderr = ended.stderr.as_str();
    assert_eq!(ended.code(), 1, "{stderr}");
    let failing = format!("Connect to ipv4#{} failed", proxy.address());
    assert!(stderr.contains(&failing), "{stderr}");
    assert!(
        stderr.contains("order-123 may or may not be written"),
        "{stderr}"
    );
    let all_down = stderr
        .lines()
        .filter(|line| line.contains("AllBrokersDown"));
    // In five seconds.
    assert!(all_down.count() <= 15, "{stderr}");
    Ok(())
}
