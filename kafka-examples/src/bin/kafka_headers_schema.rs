//! Read Kafka events whose schema grows: the version in a header, and an old consumer that meets new events
//!
//! The version is in a header, so the reader decides before it parses. A new minor version adds fields. This reader was
//! written for 1.1: it ignores unknown fields, and uses a default for a field that is missing, as in 1.0. A new major
//! version has another meaning: the reader does not parse it. It prints each event that it cannot read, with the reason.
//!
//! ```console
//! $ cargo lab run kafka_send -p 0 -H schema-version=1.0 schema-events '{"order_id":"a","amount":4999}'
//! ...
//! $ cargo lab run kafka_send -p 0 -H schema-version=1.2 schema-events '{"order_id":"b","amount":1,"currency":"JPY","n":1}'
//! ...
//! $ cargo lab run kafka_send -p 0 -H schema-version=2.0 schema-events '{"order_id":"c","amount":{"units":49}}'
//! ...
//! $ cargo lab run kafka_headers_schema
//! partition 0 offset 0: version 1.0: OrderPlaced { order_id: "a", amount: 4999, currency: "EUR" }
//! partition 0 offset 1: version 1.2: OrderPlaced { order_id: "b", amount: 1, currency: "JPY" }
//! partition 0 offset 2 not read: version 2.0, this reader knows 1.x
//! ```
//!
//! Notice:
//! - Rules for the producer: add only optional fields. Never change a meaning, and never reuse a name.
//! - `deny_unknown_fields` would make each new field a breaking change. A missing `default` would refuse each old event.
//! - The program reads the whole topic, and ends. A service keeps an event that it cannot read: see kafka_manual_commit.
//!
//! Try: read 2.0 as well as 1.x. Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_avro.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::message::{BorrowedMessage, Header, Headers};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use serde::Deserialize;

const TOPIC: &str = "schema-events";
const VERSION_HEADER: &str = "schema-version";
const TIMEOUT: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", "kafka_headers_schema") // required, although it joins no group
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "error") // the default, `latest`, skips events
        .set("enable.partition.eof", "true")
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let topic = consumer.fetch_metadata(Some(TOPIC), TIMEOUT).context(tip)?;
    let mut all = TopicPartitionList::new();
    for partition in topic.topics().iter().flat_map(|topic| topic.partitions()) {
        all.add_partition_offset(TOPIC, partition.id(), Offset::Beginning)?;
    }
    ensure!(all.count() > 0, "no topic {TOPIC}, or no permission");
    consumer.assign(&all)?;

    let mut ended = BTreeSet::new();
    while ended.len() < all.count() {
        match consumer.poll(TIMEOUT).context("no answer for 5 seconds")? {
            Ok(event) => show(&event),
            Err(KafkaError::PartitionEOF(partition)) => drop(ended.insert(partition)),
            // Another address may answer.
            Err(KafkaError::MessageConsumption(AllBrokersDown | BrokerTransportFailure)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn show(event: &BorrowedMessage<'_>) {
    let at = format!("partition {} offset {}", event.partition(), event.offset());
    match parse(event) {
        Ok((version, order)) => println!("{at}: version {version}: {order:?}"),
        Err(error) => println!("{at} not read: {error:#}"),
    }
}

/// The event in version 1.1.
#[derive(Debug, Deserialize)]
#[expect(dead_code, reason = "printed only")]
struct OrderPlaced {
    order_id: String,
    amount: i64,
    /// New in 1.1. Before that all amounts were in euros.
    #[serde(default = "euro")]
    currency: String,
}

fn euro() -> String {
    "EUR".into()
}

/// The pattern: the version decides whether the payload is parsed.
fn parse(event: &BorrowedMessage<'_>) -> anyhow::Result<(String, OrderPlaced)> {
    let version = version(event)?.context("no header schema-version")?;
    let is_known = version.split('.').next() == Some("1");
    ensure!(is_known, "version {version}, this reader knows 1.x");
    let order = serde_json::from_slice(event.payload().context("no payload")?)?;
    Ok((version, order))
}

/// A header can occur more than once: the last counts.
fn version(event: &BorrowedMessage<'_>) -> anyhow::Result<Option<String>> {
    // rdkafka panics if a header name is not UTF-8, and other clients can write such names. (Not with `panic = "abort"`.)
    let last = catch_unwind(AssertUnwindSafe(|| {
        let version = |header: &Header<'_, &[u8]>| header.key == VERSION_HEADER;
        event.headers()?.iter().filter(version).last()?.value
    }));
    let last = last.map_err(|_| anyhow!("the name of a header is not UTF-8"))?;
    let last = last.map(|value| String::from_utf8(value.to_vec()));
    Ok(last.transpose()?)
}
