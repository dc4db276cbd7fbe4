//! Avro with a schema registry: the schema changes, and old and new readers read all records
//!
//! Each record carries the id of the schema that wrote it. A reader gets that schema from the registry and converts the
//! record to its own schema: a new field has its default in old records, and an old reader does not see a new field.
//! The registry refuses a schema that cannot read the records of the schema before it (compatibility BACKWARD).
//!
//! ```console
//! $ cargo lab run kafka_avro
//! sent: OldOrder { id: "order-1", cents: 1250 }
//! sent: NewOrder { id: "order-2", cents: 990, currency: "CHF" }
//! a new field without a default is refused: [..]
//! partition [..]: old reader {"cents":1250,"id":"order-1"}, new reader {"cents":1250,"currency":"EUR","id":"order-1"}
//! partition [..]: old reader {"cents":990,"id":"order-2"}, new reader {"cents":990,"currency":"CHF","id":"order-2"}
//! ```
//!
//! Notice:
//! - BACKWARD means: update the readers first. Whether an old reader can read new records is not checked.
//! - A payload is a zero byte, 4 bytes of schema id, and Avro without field names: useless without the registry.
//! - A malformed record is reported and skipped. kafka_manual_commit writes such records to a dead-letter topic.
//!
//! Try: `cargo lab run kafka_send avro-orders hello`, and run this example again.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), SCHEMA_REGISTRY_URL (http://localhost:8081/apis/ccompat/v7).
//! See also: kafka_headers_schema.

use std::fmt::Debug;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use futures::try_join;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use schema_registry_converter::async_impl::avro::{AvroDecoder, AvroEncoder};
use schema_registry_converter::async_impl::schema_registry::{SrSettings, post_schema};
use schema_registry_converter::error::SRCError;
use schema_registry_converter::schema_registry_common::{
    SchemaType, SubjectNameStrategy, SuppliedSchema,
};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::timeout;

const TOPIC: &str = "avro-orders";
/// The registry keeps the versions of a schema under a subject: the topic and `key` or `value`.
const SUBJECT: &str = "avro-orders-value";
const REGISTRY: &str = "http://localhost:8081/apis/ccompat/v7";
const TIMEOUT: Duration = Duration::from_secs(5);
const OLD: &str = r#"{"type": "record", "name": "Order", "fields": [
    {"name": "id", "type": "string"}, {"name": "cents", "type": "long"}]}"#;
const NEW: &str = r#"{"type": "record", "name": "Order", "fields": [
    {"name": "id", "type": "string"}, {"name": "cents", "type": "long"},
    {"name": "currency", "type": "string", "default": "EUR"}]}"#;
/// The new field has no default, so old orders have no value for it.
const INCOMPATIBLE: &str = r#"{"type": "record", "name": "Order", "fields": [
    {"name": "id", "type": "string"}, {"name": "cents", "type": "long"},
    {"name": "customer", "type": "string"}]}"#;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let url = std::env::var("SCHEMA_REGISTRY_URL").unwrap_or_else(|_| REGISTRY.into());
    let mut config = ClientConfig::new();
    let producer: FutureProducer = config.set("bootstrap.servers", &brokers).create()?;
    let client = producer.client();
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    client.fetch_metadata(Some(TOPIC), TIMEOUT).context(hint)?;
    let mut registry = SrSettings::new_builder(url.clone());
    let registry = registry.set_timeout(TIMEOUT).build()?;
    let old_id = register(&registry, OLD).await.with_context(|| {
        // Without a password, which would be before the `@`.
        let address = url.rsplit('@').next().unwrap_or_default();
        format!("no schema registry answers at {address}; `cargo lab up registry` starts one")
    })?;
    set_compatibility(&url, "BACKWARD").await?;
    let order = OldOrder {
        id: "order-1",
        cents: 1250,
    };
    send(&producer, &registry, OLD, order).await?;
    let new_id = register(&registry, NEW).await?;
    let order = NewOrder {
        id: "order-2",
        cents: 990,
        currency: "CHF",
    };
    send(&producer, &registry, NEW, order).await?;
    match register(&registry, INCOMPATIBLE).await {
        Err(error) if error.error.contains("409") => {
            let reason = error.cause.unwrap_or_default();
            println!("a new field without a default is refused: {reason}");
        }
        other => bail!("a new field without a default is not refused, but {other:?}"),
    }
    read(&mut config, &registry, old_id, new_id).await
}

#[derive(Debug, Serialize)]
struct OldOrder {
    id: &'static str,
    cents: i64,
}

#[derive(Debug, Serialize)]
struct NewOrder {
    id: &'static str,
    cents: i64,
    currency: &'static str,
}

fn avro(schema: &str) -> SuppliedSchema {
    SuppliedSchema::new(None, SchemaType::Avro, schema.into())
}

/// Returns the id of the schema. A schema that is already registered keeps its id.
async fn register(registry: &SrSettings, schema: &str) -> Result<u32, SRCError> {
    let registered = post_schema(registry, SUBJECT.into(), avro(schema)).await?;
    Ok(registered.id)
}

/// The default can be no check at all.
async fn set_compatibility(url: &str, level: &str) -> anyhow::Result<()> {
    let client = reqwest::Client::builder().timeout(TIMEOUT).build()?;
    let request = client.put(format!("{url}/config/{SUBJECT}"));
    let request = request.header("content-type", "application/vnd.schemaregistry.v1+json");
    let body = json!({"compatibility": level}).to_string();
    let status = request.body(body).send().await?.status();
    ensure!(
        status.is_success(),
        "the registry does not set the compatibility: {status}"
    );
    Ok(())
}

/// Sends an order in Avro. The encoder writes the id of the schema in front of it.
async fn send(
    producer: &FutureProducer,
    registry: &SrSettings,
    schema: &str,
    order: impl Serialize + Debug,
) -> anyhow::Result<()> {
    let line = format!("sent: {order:?}");
    let subject =
        SubjectNameStrategy::TopicNameStrategyWithSchema(TOPIC.into(), false, avro(schema));
    // An encoder keeps the first schema of a subject, so each schema has its own encoder.
    let encoder = AvroEncoder::new(registry.clone());
    let payload = encoder.encode_struct(order, &subject).await?;
    let record = FutureRecord::to(TOPIC).key("customer-1").payload(&payload);
    let sent = producer.send(record, TIMEOUT).await;
    sent.map_err(|(error, _)| error)
        .context("the order may or may not be written")?;
    println!("{line}");
    Ok(())
}

/// Reads the topic to the end that is known at the start, as an old and as a new reader.
async fn read(
    config: &mut ClientConfig,
    registry: &SrSettings,
    old: u32,
    new: u32,
) -> anyhow::Result<()> {
    // The client wants a name here, although no group is joined and nothing is committed.
    let config = config.set("group.id", "kafka_avro");
    let consumer: StreamConsumer = config.set("enable.auto.commit", "false").create()?;
    let metadata = consumer.fetch_metadata(Some(TOPIC), TIMEOUT)?;
    let topic = metadata.topics().first().context("no metadata")?;
    let (mut partitions, mut records) = (TopicPartitionList::new(), 0);
    for id in topic.partitions().iter().map(|partition| partition.id()) {
        let (start, end) = consumer.fetch_watermarks(TOPIC, id, TIMEOUT)?;
        partitions.add_partition_offset(TOPIC, id, Offset::Offset(start))?;
        records += end - start;
    }
    consumer.assign(&partitions)?;
    let decoder = AvroDecoder::new(registry.clone());
    for _ in 0..records {
        let record = timeout(TIMEOUT, consumer.recv()).await;
        let record = record.context("the rest of the topic does not arrive")??;
        let at = format!(
            "partition {} offset {}",
            record.partition(),
            record.offset()
        );
        let old = decode(&decoder, record.payload(), old);
        match try_join!(old, decode(&decoder, record.payload(), new)) {
            Ok((old, new)) => println!("{at}: old reader {old}, new reader {new}"),
            Err(error) if is_outage(&error) => return Err(error),
            Err(error) => println!("{at} skipped: {}", error.root_cause()),
        }
    }
    Ok(())
}

/// The pattern: decode with the schema of the writer, then convert to the schema of the reader.
async fn decode(
    decoder: &AvroDecoder,
    payload: Option<&[u8]>,
    reader: u32,
) -> anyhow::Result<Value> {
    let order = decoder.decode(payload).await?.value;
    let reader = decoder.get_schema(reader).await?;
    Ok(order.resolve(&reader.parsed)?.try_into()?)
}

/// The registry does not answer, or refuses. The record can be good.
fn is_outage(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<SRCError>();
    error.is_some_and(|error| {
        error.retriable || (error.error.contains("HTTP") && !error.error.contains("404"))
    })
}
