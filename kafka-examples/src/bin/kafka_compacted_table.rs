//! A compacted topic is a table: the latest value per key, and a tombstone deletes
//!
//! Sets and deletes prices, and rebuilds the table by reading the topic from its beginning. Compaction keeps at least
//! the latest record of each key, for ever and in order; older ones go sooner or later. This is what event sourcing and
//! CQRS read their views from, and what Kafka's own offsets are kept in. Any number of readers can have the whole table.
//!
//! ```console
//! $ cargo lab run kafka_compacted_table set apple 100
//! apple = 100 at 0
//! $ cargo lab run kafka_compacted_table set pear 250
//! pear = 250 at 1
//! $ cargo lab run kafka_compacted_table set apple 120
//! apple = 120 at 2
//! 1$ cargo lab run kafka_compacted_table
//! apple = 120
//! pear = 250
//! up to date: 2 keys from 3 records; changes follow
//! 2$ cargo lab run kafka_compacted_table delete pear
//! pear deleted at 3
//! 1:
//! pear deleted
//! 1^C
//! 1 keys
//! ```
//!
//! Notice: a tombstone is a record with a key and a null payload; an empty payload is an empty value. A table is up to
//! date when it has read to where the topic ended at the start: until then, it may show what has long been deleted.
//! Compaction runs in the background and never touches the newest segment, so readers must always expect old records.
//! Tombstones go too, after `delete.retention.ms`: a reader that falls further behind may never hear of the deletion
//! and has to start from the beginning.
//!
//! The log of all events is a topic of its own, without compaction: here, the price before the last one is gone.
//!
//! Try: read it in two terminals; set the same key from many processes. `kafka_compacted_table fill 100000` sets ten
//! keys again and again: wait half a minute, read the table, and see how few records are left to read.
//!
//! Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_async_producer.

use std::collections::{BTreeMap, VecDeque};
use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;
use rdkafka::producer::{DeliveryFuture, FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

const TOPIC: &str = "compacted-table.prices";
/// With more, a key's records would still be in order, but not those of different keys.
const PARTITIONS: i32 = 1;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    create_topic(&brokers).await?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [] => read(&brokers).await,
        ["set", key, price] => {
            let price: u64 = price.parse().context("the price is a number of cents")?;
            let offset = write(&brokers, key, Some(&price.to_string())).await?;
            println!("{key} = {price} at {offset}");
            Ok(())
        }
        ["delete", key] => {
            let offset = write(&brokers, key, None).await?;
            println!("{key} deleted at {offset}");
            Ok(())
        }
        ["fill", count] => fill(&brokers, count.parse().context("how many records?")?).await,
        _ => bail!("usage: kafka_compacted_table [set KEY CENTS | delete KEY | fill COUNT]"),
    }
}

/// Sets the key, or deletes it; returns the offset.
async fn write(brokers: &str, key: &str, value: Option<&str>) -> anyhow::Result<i64> {
    let producer = producer(brokers)?;
    let mut record = FutureRecord::to(TOPIC).key(key);
    // No payload is null. `payload("")` would be an empty value, and delete nothing.
    record.payload = value;
    let delivery = producer.send(record, PATIENCE).await;
    let delivery = delivery
        .map_err(|(error, _)| error)
        .with_context(|| format!("{key}: no delivery report, it may or may not be written"))?;
    Ok(delivery.offset)
}

fn producer(brokers: &str) -> anyhow::Result<FutureProducer> {
    Ok(ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // A retry must not put an old value behind a newer one.
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "10000")
        .create()?)
}

/// Prints the table as it is, then every change, until Ctrl-C.
async fn read(brokers: &str) -> anyhow::Result<()> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // Nothing is shared and nothing committed: each reader wants all of it, every time. librdkafka wants a name.
        .set("group.id", "compacted-table.reader")
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest")
        .set("enable.partition.eof", "true")
        .create()?;
    let mut all = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        all.add_partition_offset(TOPIC, partition, Offset::Beginning)?;
    }
    consumer.assign(&all)?;

    let mut table = BTreeMap::new();
    let (mut records, mut unread) = (0, PARTITIONS);
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let received = tokio::select! {
            biased;
            signal = &mut stop => break signal?,
            received = consumer.recv() => received,
        };
        match received {
            Ok(record) => {
                records += 1;
                if let Some(change) = apply(&mut table, &record)
                    && unread == 0
                {
                    println!("{change}");
                }
            }
            // Reported whenever a partition's end is reached; only the first time it is news.
            Err(KafkaError::PartitionEOF(_)) if unread > 0 => {
                unread -= 1;
                if unread == 0 {
                    for (key, price) in &table {
                        println!("{key} = {price}");
                    }
                    let keys = table.len();
                    println!("up to date: {keys} keys from {records} records; changes follow");
                }
            }
            Err(KafkaError::PartitionEOF(_)) => {}
            Err(error @ KafkaError::MessageConsumptionFatal(_)) => bail!(error),
            Err(error) => eprintln!("waiting for the broker: {error}"),
        }
    }
    println!("{} keys", table.len());
    Ok(())
}

/// Says what has changed. A record that makes no sense changes nothing: the price before it stays.
fn apply(table: &mut BTreeMap<String, u64>, record: &BorrowedMessage<'_>) -> Option<String> {
    let at = record.offset();
    // The broker refuses records without a key here; the topic may have been another's before.
    let Some(Ok(key)) = record.key().map(std::str::from_utf8) else {
        println!("offset {at} skipped: the key is missing or not UTF-8");
        return None;
    };
    let Some(payload) = record.payload() else {
        return table.remove(key).map(|_| format!("{key} deleted"));
    };
    let price = std::str::from_utf8(payload).ok().map(str::parse);
    let Some(Ok(price)) = price else {
        println!("offset {at} skipped: not a price of {key}");
        return None;
    };
    table.insert(key.to_owned(), price);
    Some(format!("{key} = {price}"))
}

/// Sets ten keys over and over: work for the compaction.
async fn fill(brokers: &str, count: u64) -> anyhow::Result<()> {
    let producer = producer(brokers)?;
    let mut reports = VecDeque::new();
    for number in 0..count {
        let (key, price) = (format!("key-{}", number % 10), number.to_string());
        let record = FutureRecord::to(TOPIC).key(&key).payload(&price);
        reports.push_back(producer.send_result(record).map_err(|(error, _)| error)?);
        // Well below the 100,000 that fit into the producer's queue.
        if reports.len() > 10_000
            && let Some(oldest) = reports.pop_front()
        {
            written(oldest).await?;
        }
    }
    for report in reports {
        written(report).await?;
    }
    println!("filled: {count} records");
    Ok(())
}

/// Only its report tells that a record was written. To empty the queue (`flush`) succeeds when all were refused, too.
async fn written(report: DeliveryFuture) -> anyhow::Result<()> {
    let delivery = report.await?.map_err(|(error, _)| error);
    delivery.context("not all records were written")?;
    Ok(())
}

async fn create_topic(brokers: &str) -> anyhow::Result<()> {
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
    let topic = NewTopic::new(TOPIC, PARTITIONS, TopicReplication::Fixed(-1))
        .set("cleanup.policy", "compact")
        // So that one sees it work: a new segment every few seconds, compacted when a tenth of it is old.
        // The defaults are a week or a gigabyte, and a half.
        .set("segment.ms", "5000")
        .set("min.cleanable.dirty.ratio", "0.1")
        // How long a reader has to hear of a deletion. The default is a day.
        .set("delete.retention.ms", "86400000");
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin.create_topics(&[topic], &options).await {
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
