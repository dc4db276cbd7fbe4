//! The record is where the producer says it is.

use std::time::Duration;

use anyhow::{Context, Result};
use compose::harness::{Example, TIMEOUT};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use crate::shared;

#[test]
fn each_record_is_at_the_printed_partition_and_offset() -> Result<()> {
    let kafka = shared::kafka(&["kafka_async_producer"])?;
    let producer = Example::new(env!("CARGO_BIN_EXE_kafka_async_producer"));
    let ended = producer
        .args(["7"])
        .broker(&kafka)
        .spawn()?
        .wait(TIMEOUT)?
        .ok()?;
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
        at.add_partition_offset("orders", partition, Offset::Offset(offset))?;
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
        assert_eq!(payload["amount"], 4_999, "an integer of cents");
    }
    // By the Java client's hash; librdkafka's own would say 2.
    let stdout = ended.stdout;
    assert!(stdout.contains("order-126: partition 1 "), "{stdout}");
    Ok(())
}
