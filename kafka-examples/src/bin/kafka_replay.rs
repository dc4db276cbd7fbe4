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
//! read 2 records
//! $ cargo lab run kafka_replay time 2100-01-01T00:00:00Z
//! ...
//! read 0 records
//! ```
//!
//! Notice:
//! - The broker turns a time into an offset: that of the first record that is not older.
//! - The producer sets the time of a record. So the times can be out of order, and older records can follow.
//! - An offset belongs to one partition: the same number in another partition is an unrelated record.
//! - Deleted records are skipped: the first lines show where reading begins.
//!
//! Try: ask for offset 100. The lesson ends with the first error: kafka_reconnect_consumer waits for the broker.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_tail, kafka_admin.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use chrono::DateTime;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::metadata::Metadata;
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

const TOPIC: &str = "replay-readings";
const TIMEOUT: Duration = Duration::from_secs(5);
const USAGE: &str = "usage: kafka_replay [beginning | offset N | time 2026-01-01T12:00:00Z]";

fn main() -> Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
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
        // The client wants a name here, although no group is joined and nothing is committed.
        .set("group.id", "kafka_replay")
        .set("enable.auto.commit", "false")
        // When records are deleted before they are read, this is an error and not a silent gap.
        .set("auto.offset.reset", "error")
        .set("enable.partition.eof", "true")
        .create()?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let topic = consumer
        .fetch_metadata(Some(TOPIC), TIMEOUT)
        .context(hint)?;
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
    let count = replay(&consumer, ends)?;
    println!("read {count} records");
    Ok(())
}

/// Asks for one offset of each partition: the first, the end, or with a time in the place of the offset.
fn offsets(consumer: &BaseConsumer, topic: &Metadata, at: Offset) -> Result<BTreeMap<i32, i64>> {
    let mut list = TopicPartitionList::new();
    for partition in topic.topics().iter().flat_map(|topic| topic.partitions()) {
        list.add_partition_offset(TOPIC, partition.id(), at)?;
    }
    ensure!(list.count() > 0, "there is no topic {TOPIC}");
    let mut found = BTreeMap::new();
    for answer in consumer.offsets_for_times(list, TIMEOUT)?.elements() {
        answer.error()?;
        // -1 when all records are older than the time.
        let offset = answer.offset().to_raw().filter(|offset| *offset >= 0);
        found.insert(answer.partition(), offset.unwrap_or(i64::MAX));
    }
    Ok(found)
}

/// Prints the records of each partition up to its end, and returns their number.
fn replay(consumer: &BaseConsumer, mut ends: BTreeMap<i32, i64>) -> Result<usize> {
    let mut count = 0;
    while !ends.is_empty() {
        match consumer.poll(TIMEOUT).transpose() {
            Ok(None) => {}
            Ok(Some(record)) => {
                let (partition, offset) = (record.partition(), record.offset());
                let end = ends.get(&partition).copied().unwrap_or_default();
                if offset < end {
                    count += 1;
                    let time = record.timestamp().to_millis().unwrap_or_default();
                    let time = DateTime::from_timestamp_millis(time).unwrap_or_default();
                    let text = String::from_utf8_lossy(record.payload().unwrap_or(b"(null)"));
                    println!("partition {partition} offset {offset}, {time}: {text}");
                }
                if offset + 1 >= end {
                    ends.remove(&partition);
                }
            }
            // There can be offsets without a record before the end: those of transactions' ends and of compacted records.
            Err(KafkaError::PartitionEOF(partition)) => {
                ends.remove(&partition);
            }
            Err(KafkaError::MessageConsumption(RDKafkaErrorCode::AutoOffsetReset)) => {
                bail!("records were deleted before they were read");
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(count)
}
