//! A reader that shares no code with the examples.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use compose::Broker;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::OwnedMessage;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

const SOON: Duration = Duration::from_secs(60);

/// All that a reader with this isolation sees, in the order of each partition.
pub fn read(kafka: &Broker, topic: &str, isolation: &str) -> Result<Vec<OwnedMessage>> {
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "reader")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("isolation.level", isolation)
        .create()?;
    let metadata = reader.fetch_metadata(Some(topic), SOON)?;
    let partitions = metadata.topics()[0].partitions().len();
    let mut all = TopicPartitionList::new();
    for partition in 0..i32::try_from(partitions)? {
        all.add_partition_offset(topic, partition, Offset::Beginning)?;
    }
    reader.assign(&all)?;
    let (mut records, mut ends) = (Vec::new(), BTreeSet::new());
    let deadline = Instant::now() + SOON;
    while ends.len() < partitions {
        ensure!(Instant::now() < deadline, "cannot read {topic} to its end");
        match reader.poll(Duration::from_secs(1)) {
            Some(Ok(record)) => records.push(record.detach()),
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                ends.insert(partition);
            }
            Some(Err(error)) => return Err(error.into()),
            None => {}
        }
    }
    Ok(records)
}
