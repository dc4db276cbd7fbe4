//! Replay a Kafka topic: from the beginning, from an offset, from a time, up to the end
//!
//! Reading does not consume: records stay until their retention ends, and whoever knows an offset can read from there
//! again. This reader belongs to no group and commits nothing, so it disturbs nobody. It stops at what was the end when
//! it started; records keep their order within a partition, not across partitions.
//!
//! ```console
//! $ cargo lab run kafka_replay
//! wrote 12 readings, one for each minute from 12:00 on, as there were none
//! partition 0: [0, 6), reading from 0
//! partition 1: [0, 6), reading from 0
//! ...
//! 2026-01-01T12:10:00Z partition 0 offset 5: 10 °C
//! ...
//! read 12 records
//! $ cargo lab run kafka_replay time 2026-01-01T12:09:30Z
//! partition 0: [0, 6), reading from 5
//! partition 1: [0, 6), reading from 5
//! ...
//! read 2 records
//! $ cargo lab run kafka_replay offset 4
//! partition 0: [0, 6), reading from 4
//! partition 1: [0, 6), reading from 4
//! ...
//! read 4 records
//! ```
//!
//! Notice: a time is turned into an offset by the broker, which looks for the first record that is not older. The time
//! of a record is what its producer says, unless the topic has `message.timestamp.type=LogAppendTime`; records may thus
//! be out of order in time, and "from 12:10 on" may include some that are older. An offset is a position in one
//! partition: the same number in another is unrelated.
//!
//! Notice too: the start is given with `assign`. `seek` only works on a partition that is already being fetched, and
//! fails with `Erroneous state` right after `subscribe` or `assign`.
//!
//! Try: ask for an offset of 100, or for a time in the future. Delete the first records (`kafka-delete-records.sh`)
//! and ask for offset 0: reading begins at the first that is left.
//!
//! Settings: KAFKA_BROKERS (localhost:9092); arguments: `beginning` (the default), `offset N`, or `time` and a time in
//! RFC 3339 as above. See also: kafka_consumer_group, kafka_admin.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use chrono::{DateTime, SecondsFormat};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use tokio::time::sleep;

const TOPIC: &str = "replay-readings";
const PARTITIONS: i32 = 2;
const READINGS: i64 = 12;
/// 2026-01-01T12:00:00Z in milliseconds.
const NOON: i64 = 1_767_268_800_000;
const PATIENCE: Duration = Duration::from_secs(5);

enum Start {
    Beginning,
    Offset(i64),
    /// In milliseconds since 1970.
    Time(i64),
}

#[tokio::main]
async fn main() -> Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let start = match arguments.as_slice() {
        [] | ["beginning"] => Start::Beginning,
        ["offset", offset] => Start::Offset(offset.parse().context("after `offset`, a number")?),
        ["time", time] => Start::Time(
            DateTime::parse_from_rfc3339(time)
                .context("after `time`, one like 2026-01-01T12:09:30Z")?
                .timestamp_millis(),
        ),
        _ => bail!("the arguments are `beginning`, `offset N` or `time 2026-01-01T12:09:30Z`"),
    };
    create_topic(&brokers).await?;

    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        // The client insists on a name, but as nothing is subscribed or committed, there is no such group.
        .set("group.id", "replay")
        .set("enable.auto.commit", "false")
        // Should the record at the start have been deleted by now, say so rather than read from elsewhere.
        .set("auto.offset.reset", "error")
        // A partition says when it has been read to its end.
        .set("enable.partition.eof", "true")
        .create()?;
    if ranges(&consumer)
        .await?
        .values()
        .all(|(low, high)| low == high)
    {
        fill(&brokers).await?;
    }

    let ranges = ranges(&consumer).await?;
    let mut starts = TopicPartitionList::new();
    // Where to stop, for each partition that still has records to read.
    let mut ends = BTreeMap::new();
    for (partition, (low, high)) in ranges {
        let from = match start {
            Start::Beginning => low,
            Start::Offset(offset) => offset.clamp(low, high),
            Start::Time(time) => offset_at(&consumer, partition, time)?.unwrap_or(high),
        };
        if from < high {
            println!("partition {partition}: [{low}, {high}), reading from {from}");
            starts.add_partition_offset(TOPIC, partition, Offset::Offset(from))?;
            ends.insert(partition, high);
        } else {
            println!("partition {partition}: [{low}, {high}), nothing to read");
        }
    }
    consumer.assign(&starts)?;

    let mut count = 0;
    let mut stop = std::pin::pin!(tokio::signal::ctrl_c());
    while !ends.is_empty() {
        let received = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => {
                signal?;
                println!("interrupted");
                break;
            }
            received = consumer.recv() => received,
        };
        let message = match received {
            Ok(message) => message,
            // The last offsets before the end need not hold records: the markers that end transactions take offsets
            // too, and compaction leaves gaps.
            Err(KafkaError::PartitionEOF(partition)) => {
                ends.remove(&partition);
                continue;
            }
            Err(
                error @ (KafkaError::MessageConsumptionFatal(_)
                | KafkaError::MessageConsumption(RDKafkaErrorCode::AutoOffsetReset)),
            ) => bail!("cannot go on reading: {error}"),
            // The client reconnects by itself, and says so each time.
            Err(error) => {
                eprintln!("waiting for the broker: {error}");
                continue;
            }
        };
        let (partition, offset) = (message.partition(), message.offset());
        let Some(end) = ends.get(&partition).copied() else {
            continue; // written after the start
        };
        if offset < end {
            count += 1;
            let time = message.timestamp().to_millis();
            let time = time.and_then(DateTime::from_timestamp_millis).map_or_else(
                || "no time".into(),
                |time| time.to_rfc3339_opts(SecondsFormat::Secs, true),
            );
            let text = message
                .payload()
                .map_or_else(|| "no payload".into(), String::from_utf8_lossy);
            println!("{time} partition {partition} offset {offset}: {text}");
        }
        if offset + 1 >= end {
            ends.remove(&partition);
        }
    }
    println!("read {count} records");
    Ok(())
}

/// For each partition the offset of the first record that is left, and the one that the next record will get.
async fn ranges(consumer: &StreamConsumer) -> Result<BTreeMap<i32, (i64, i64)>> {
    let deadline = Instant::now() + PATIENCE;
    let mut ranges = BTreeMap::new();
    for partition in 0..PARTITIONS {
        loop {
            match consumer.fetch_watermarks(TOPIC, partition, PATIENCE) {
                Ok(range) => {
                    ranges.insert(partition, range);
                    break;
                }
                // A topic can be created before its leaders know that they are. Nothing tells when they do.
                Err(_) if Instant::now() < deadline => sleep(Duration::from_millis(50)).await,
                Err(error) => bail!("{TOPIC}, partition {partition}: {error}"),
            }
        }
    }
    Ok(ranges)
}

/// The first record at or after a time; none if all are older.
fn offset_at(consumer: &StreamConsumer, partition: i32, time: i64) -> Result<Option<i64>> {
    let mut times = TopicPartitionList::new();
    // The question is asked with the time in the place of the offset.
    times.add_partition_offset(TOPIC, partition, Offset::Offset(time))?;
    let offsets = consumer.offsets_for_times(times, PATIENCE)?;
    let found = offsets
        .find_partition(TOPIC, partition)
        .context("no answer")?;
    found.error()?;
    Ok(match found.offset() {
        Offset::Offset(offset) => Some(offset),
        _ => None,
    })
}

/// Writes readings to replay, with the times at which they were taken.
async fn fill(brokers: &str) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    for minute in 0..READINGS {
        let reading = format!("{minute} °C");
        let record = FutureRecord::<str, str>::to(TOPIC)
            .partition(i32::from(minute % 2 == 1))
            .timestamp(NOON + minute * 60_000)
            .payload(&reading);
        let delivery = producer
            .send(record, PATIENCE)
            .await
            .map_err(|(error, _)| error);
        delivery.with_context(|| format!("reading {minute} was not delivered to {brokers}"))?;
    }
    println!("wrote {READINGS} readings, one for each minute from 12:00 on, as there were none");
    Ok(())
}

/// Keeps what is older than a week, too: by default, retention goes by the times of the records.
async fn create_topic(brokers: &str) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    // It blocks, but nothing else runs yet.
    admin
        .inner()
        .fetch_metadata(None, PATIENCE)
        .with_context(|| {
            format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one")
        })?;
    // -1 is the broker's default replication factor.
    let topic =
        NewTopic::new(TOPIC, PARTITIONS, TopicReplication::Fixed(-1)).set("retention.ms", "-1");
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin.create_topics([&topic], &options).await {
        Ok(results) => {
            for result in results {
                match result {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                    Err((topic, code)) => bail!("cannot create topic {topic}: {code}"),
                }
            }
        }
        // Not every cluster lets its clients create topics; librdkafka's mock does not.
        Err(error) => eprintln!("leaving topic {TOPIC} to the broker: {error}"),
    }
    Ok(())
}
