//! When a Kafka transaction is about to end. The tests of the scenarios use this file, too.

use anyhow::Result;
use compose::Broker;
use compose::harness::TIMEOUT;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};

/// Whether there are positions of a transaction that is open: they are the last that is sent before its end.
pub fn is_ending(kafka: &Broker) -> Result<bool> {
    const POSITIONS: &str = "__consumer_offsets";
    let reader = |isolation: &str| -> Result<BaseConsumer> {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", kafka.address());
        Ok(config.set("isolation.level", isolation).create()?)
    };
    let (all, stable) = (reader("read_uncommitted")?, reader("read_committed")?);
    let metadata = all.fetch_metadata(Some(POSITIONS), TIMEOUT)?;
    for partition in metadata.topics()[0].partitions() {
        // In this order: what is committed meanwhile looks less open, and not more.
        let (_, end) = all.fetch_watermarks(POSITIONS, partition.id(), TIMEOUT)?;
        let (_, settled) = stable.fetch_watermarks(POSITIONS, partition.id(), TIMEOUT)?;
        if settled < end {
            return Ok(true);
        }
    }
    Ok(false)
}
