//! Replay a topic: from the beginning, from an offset or from a time, up to the end
//!
//! Records stay in a topic until their retention ends, and reading does not remove them. This reader joins no group and
//! commits nothing, so it disturbs no other consumer. It ends at the offsets that were the end when it started. Records
//! are in order within a partition, not across partitions.
//!
//! ```console
//! $ cargo lab run kafka_send -p 0 replay-readings '10 °C' '11 °C' '12 °C'
//! ...
//! $ cargo lab run kafka_replay offset 1
//! partition 0: offsets 0 to 3, reading from 1
//! ...
//! partition 0 offset 1, [..]: 11 °C
//! partition 0 offset 2, [..]: 12 °C
//! ```
//!
//! Notice:
//! - The broker turns a time into an offset: that of the first record of this time or later.
//! - The producer sets the time of a record. So older records can follow.
//! - An offset belongs to one partition. The same number in another partition is an unrelated record.
//!
//! Try: ask for offset 100. Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_offsets, kafka_tail.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use chrono::DateTime;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::metadata::Metadata;
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

const TOPIC: &str = "replay-readings";
const TIMEOUT: Duration = Duration::from_secs(5);
const USAGE: &str = "usage: kafka_replay [beginning | offset N | time 2026-01-01T12:00:00Z]";

fn main() -> Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (offset, time) = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] | ["beginning"] => (0, None),
        ["offset", offset] => (offset.parse().context(USAGE)?, None),
        ["time", time] => (0, Some(DateTime::parse_from_rfc3339(time).context(USAGE)?)),
        _ => bail!(USAGE),
    };
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", "kafka_replay") // required, although it joins no group
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "error") // other values skip deleted records silently
        .set("enable.partition.eof", "true")
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let topic = consumer.fetch_metadata(Some(TOPIC), TIMEOUT).context(tip)?;
    let wanted = match time {
        Some(time) => offsets(&consumer, &topic, Offset::Offset(time.timestamp_millis()))?,
        None => BTreeMap::new(),
    };
    let firsts = offsets(&consumer, &topic, Offset::Beginning)?;
    let ends = offsets(&consumer, &topic, Offset::End)?;
    let mut starts = TopicPartitionList::new();
    for (partition, first) in firsts {
        let end = ends[&partition];
        let from = *wanted.get(&partition).unwrap_or(&offset);
        let from = from.max(first).min(end);
        println!("partition {partition}: offsets {first} to {end}, reading from {from}");
        starts.add_partition_offset(TOPIC, partition, Offset::Offset(from))?;
    }
    // `seek` would fail here: it needs a partition that is being fetched.
    consumer.assign(&starts)?;
    replay(&consumer, ends)
}

/// Asks for one offset of each partition: the first, the end, or that of a time. The request has the time in its offset.
fn offsets(consumer: &BaseConsumer, topic: &Metadata, at: Offset) -> Result<BTreeMap<i32, i64>> {
    let mut list = TopicPartitionList::new();
    for partition in topic.topics().iter().flat_map(|topic| topic.partitions()) {
        list.add_partition_offset(TOPIC, partition.id(), at)?;
    }
    ensure!(list.count() > 0, "no topic {TOPIC}, or no permission");
    let mut found = BTreeMap::new();
    for answer in consumer.offsets_for_times(list, TIMEOUT)?.elements() {
        answer.error()?;
        // -1 when all records are before the time.
        let offset = answer.offset().to_raw().filter(|offset| *offset >= 0);
        found.insert(answer.partition(), offset.unwrap_or(i64::MAX));
    }
    Ok(found)
}

/// The pattern: read each partition up to the end that it had at the start.
fn replay(consumer: &BaseConsumer, mut ends: BTreeMap<i32, i64>) -> Result<()> {
    while !ends.is_empty() {
        match consumer.poll(TIMEOUT).context("no answer for 5 seconds")? {
            Ok(record) => {
                let (partition, offset) = (record.partition(), record.offset());
                let end = ends.get(&partition).copied().unwrap_or_default();
                if offset < end {
                    let time = record.timestamp().to_millis().unwrap_or_default();
                    let time = DateTime::from_timestamp_millis(time).unwrap_or_default();
                    let text = String::from_utf8_lossy(record.payload().unwrap_or(b"(null)"));
                    println!("partition {partition} offset {offset}, {time}: {text}");
                }
                if offset + 1 >= end {
                    ends.remove(&partition);
                }
            }
            // The last offsets can have no record, for example after a transaction or compaction.
            Err(KafkaError::PartitionEOF(partition)) => drop(ends.remove(&partition)),
            // Another address may answer.
            Err(KafkaError::MessageConsumption(AllBrokersDown | BrokerTransportFailure)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
