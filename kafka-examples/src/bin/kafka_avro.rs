//! Avro with a schema registry: the schema changes, and old and new readers read the records of both versions
//!
//! Each record carries the id of the schema that wrote it. A reader gets that schema from the registry and converts the
//! record to its own schema: a new field has its default in old records, and an old reader does not see a new field.
//! With the compatibility BACKWARD, the registry refuses a new schema that cannot read records of the previous schema.
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
//! - BACKWARD means: update the readers first. The registry does not check whether old readers can read new records.
//! - A payload is a zero byte, 4 bytes of schema id, and Avro without field names. It cannot be read without the
//!   schema.
//! - A malformed record is reported and skipped. kafka_manual_commit writes such records to a dead-letter topic.
//!
//! Try: `cargo lab run kafka_send avro-orders hello`, and run this again. Settings: KAFKA_BROKERS (localhost:9092),
//! SCHEMA_REGISTRY_URL (http://localhost:8081/apis/ccompat/v7), RUST_LOG. See also: kafka_headers_schema.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::try_join;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
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
async fn main() -> Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let url = std::env::var("SCHEMA_REGISTRY_URL").unwrap_or_else(|_| REGISTRY.into());
    let mut config = ClientConfig::new();
    let producer: FutureProducer = config.set("bootstrap.servers", &brokers).create()?;
    let client = producer.client();
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    client.fetch_metadata(Some(TOPIC), TIMEOUT).context(tip)?;
    let registry = SrSettings::new_builder(url.clone())
        .set_timeout(TIMEOUT)
        .build()?;
    // Print no password, which would be before the `@`.
    let address = url.rsplit('@').next().unwrap_or_default();
    let tip =
        format!("no schema registry answers at {address}; `cargo lab up registry` starts one");
    // A schema that is already registered keeps its id.
    let old = post_schema(&registry, SUBJECT.into(), avro(OLD)).await;
    let old = old.context(tip)?;
    require_backward_compatibility(&url).await?;
    let order = OldOrder {
        id: "order-1",
        cents: 1250,
    };
    send(&producer, &registry, OLD, order).await?;
    let new = post_schema(&registry, SUBJECT.into(), avro(NEW)).await?;
    let order = NewOrder {
        id: "order-2",
        cents: 990,
        currency: "CHF",
    };
    send(&producer, &registry, NEW, order).await?;
    match post_schema(&registry, SUBJECT.into(), avro(INCOMPATIBLE)).await {
        Err(error) if error.error.contains("409") => {
            let reason = error.cause.unwrap_or_default();
            println!("a new field without a default is refused: {reason}");
        }
        other => bail!("a new field without a default is not refused, but {other:?}"),
    }
    read(config, &AvroDecoder::new(registry), [old.id, new.id]).await
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

/// By default the registry may accept every schema.
async fn require_backward_compatibility(url: &str) -> Result<()> {
    let client = reqwest::Client::builder().timeout(TIMEOUT).build()?;
    let request = client.put(format!("{url}/config/{SUBJECT}"));
    let request = request.header("content-type", "application/vnd.schemaregistry.v1+json");
    let body = json!({"compatibility": "BACKWARD"}).to_string();
    request.body(body).send().await?.error_for_status()?;
    Ok(())
}

/// Sends an order in Avro. The encoder writes the id of the schema in front of it.
async fn send(
    producer: &FutureProducer,
    registry: &SrSettings,
    schema: &str,
    order: impl Serialize + Debug,
) -> Result<()> {
    let schema = avro(schema);
    let subject = SubjectNameStrategy::TopicNameStrategyWithSchema(TOPIC.into(), false, schema);
    // An encoder keeps the first schema of a subject, so each schema needs its own. A service creates it only once.
    let encoder = AvroEncoder::new(registry.clone());
    let payload = encoder.encode_struct(&order, &subject).await?;
    let record = FutureRecord::to(TOPIC).key("customer-1").payload(&payload);
    let sent = producer.send(record, TIMEOUT).await;
    sent.map_err(|(error, _)| error).context("not confirmed")?;
    println!("sent: {order:?}");
    Ok(())
}

/// Reads the topic to its end, as an old and as a new reader.
async fn read(mut config: ClientConfig, decoder: &AvroDecoder, ids: [u32; 2]) -> Result<()> {
    let consumer: BaseConsumer = config
        .set("group.id", "kafka_avro") // required, although no group is joined
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .create()?;
    let topic = consumer.fetch_metadata(Some(TOPIC), TIMEOUT)?;
    let (mut all, mut ended) = (TopicPartitionList::new(), BTreeSet::new());
    for partition in topic.topics().iter().flat_map(|topic| topic.partitions()) {
        all.add_partition_offset(TOPIC, partition.id(), Offset::Beginning)?;
    }
    consumer.assign(&all)?;
    while ended.len() < all.count() {
        match consumer.poll(TIMEOUT).context("no answer for 5 seconds")? {
            Ok(record) => {
                let (partition, offset) = (record.partition(), record.offset());
                let at = format!("partition {partition} offset {offset}");
                let [old, new] = ids.map(|id| decode(decoder, record.payload(), id));
                match try_join!(old, new) {
                    Ok((old, new)) => println!("{at}: old reader {old}, new reader {new}"),
                    Err(error) if is_outage(&error) => return Err(error),
                    Err(error) => println!("{at} skipped: {}", error.root_cause()),
                }
            }
            Err(KafkaError::PartitionEOF(partition)) => drop(ended.insert(partition)),
            // Another address may answer.
            Err(KafkaError::MessageConsumption(AllBrokersDown | BrokerTransportFailure)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The pattern: decode with the schema of the writer, then convert to the schema of the reader.
async fn decode(decoder: &AvroDecoder, payload: Option<&[u8]>, reader: u32) -> Result<Value> {
    let order = decoder.decode(payload).await?.value;
    let reader = decoder.get_schema(reader).await?;
    Ok(order.resolve(&reader.parsed)?.try_into()?)
}

/// The registry failed. The record may be valid.
fn is_outage(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<SRCError>();
    error.is_some_and(|error| {
        error.retriable || (error.error.contains("HTTP") && !error.error.contains("404"))
    })
}
