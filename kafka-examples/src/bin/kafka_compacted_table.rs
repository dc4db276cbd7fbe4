//! A compacted topic as a table: the latest value per key, and a tombstone deletes
//!
//! Reads all prices from the beginning to the end of the topic, and prints the table. Compaction keeps at least the last
//! record of each key, forever. It removes older records of the key later. Each reader has the whole table: it joins no
//! group and commits nothing. A service continues to read, and so learns each change.
//!
//! ```console
//! $ cargo lab run kafka_compacted_table
//! 0 keys, the topic is new
//! $ cargo lab run kafka_send -k apple compacted-table.prices 100 120
//! ...
//! $ cargo lab run kafka_compacted_table
//! apple = 120
//! 1 keys
//! $ cargo lab run kafka_send -k apple -Z compacted-table.prices ''
//! ...
//! $ cargo lab run kafka_compacted_table
//! 0 keys
//! ```
//!
//! Notice:
//! - A tombstone has a key and a null payload. An empty payload is an empty value, and deletes nothing.
//! - Compaction runs in the background, and never in the newest segment. Readers must expect old records.
//! - Tombstones are removed after `delete.retention.ms`, a day. A reader that needs longer can miss a deletion.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_send, kafka_tail.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, ensure};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::message::BorrowedMessage;
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

const TOPIC: &str = "compacted-table.prices";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    let admin = config.set("bootstrap.servers", &brokers).create()?;
    let consumer: BaseConsumer = config
        .set("group.id", "kafka_compacted_table") // required, although it joins no group
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "error") // the default, `latest`, skips prices
        .set("enable.partition.eof", "true")
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer.fetch_metadata(None, TIMEOUT).context(tip)?;
    if create_topic(&admin).await {
        println!("0 keys, the topic is new");
        return Ok(());
    }
    let topic = consumer.fetch_metadata(Some(TOPIC), TIMEOUT)?;
    let mut all = TopicPartitionList::new();
    for partition in topic.topics().iter().flat_map(|topic| topic.partitions()) {
        all.add_partition_offset(TOPIC, partition.id(), Offset::Beginning)?;
    }
    ensure!(all.count() > 0, "no topic {TOPIC}, or no permission");
    consumer.assign(&all)?;

    let (mut table, mut ended) = (BTreeMap::new(), BTreeSet::new());
    while ended.len() < all.count() {
        match consumer.poll(TIMEOUT).context("no answer for 5 seconds")? {
            Ok(record) => apply(&mut table, &record),
            Err(KafkaError::PartitionEOF(partition)) => drop(ended.insert(partition)),
            // Another address may answer.
            Err(KafkaError::MessageConsumption(AllBrokersDown | BrokerTransportFailure)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for (key, price) in &table {
        println!("{key} = {price}");
    }
    println!("{} keys", table.len());
    Ok(())
}

/// The pattern: a value replaces the value before it, and a tombstone deletes it. A malformed record changes nothing.
fn apply(table: &mut BTreeMap<String, u64>, record: &BorrowedMessage<'_>) {
    let text = |bytes| std::str::from_utf8(bytes).ok();
    let price = record.payload().map(|price| text(price)?.parse().ok());
    match (record.key().and_then(text), price) {
        (Some(key), None) => drop(table.remove(key)),
        (Some(key), Some(Some(price))) => drop(table.insert(key.to_owned(), price)),
        _ => {
            let (partition, offset) = (record.partition(), record.offset());
            println!("partition {partition} offset {offset} skipped: it needs a key and a price");
        }
    }
}

/// True if it has created the topic. Warns when the topic exists and is not compacted.
async fn create_topic(admin: &AdminClient<DefaultClientContext>) -> bool {
    let options = AdminOptions::new().request_timeout(Some(TIMEOUT));
    // -1 is the broker's default.
    let topic = NewTopic::new(TOPIC, -1, TopicReplication::Fixed(-1));
    let topic = topic.set("cleanup.policy", "compact");
    match admin.create_topics([&topic], &options).await.as_deref() {
        Ok([Ok(_)]) => return true,
        Ok([Err((_, TopicAlreadyExists))]) => {}
        refused => eprintln!("{TOPIC} not created: {refused:?}"),
    }
    let topic = ResourceSpecifier::Topic(TOPIC);
    let found = admin.describe_configs([&topic], &options).await;
    let config = found.ok().and_then(|mut found| found.pop()?.ok());
    let policy = config.and_then(|config| config.get("cleanup.policy")?.value.clone());
    if policy.as_deref() != Some("compact") {
        eprintln!("cleanup.policy is {policy:?}, not compact: old prices will be deleted");
    }
    false
}
