//! Send records to Kafka and await their delivery reports
//!
//! A report gives the partition and the offset of the record. It comes when all in-sync replicas have the record
//! (`acks=all`). With idempotence, a retry of the client does not write a record twice or out of order. Records with
//! the same key stay in order, because they share a partition.
//!
//! ```console
//! $ cargo lab run kafka_async_producer
//! order-123: partition [..] offset 0
//! $ cargo lab run kafka_async_producer 3
//! order-123: partition [..] offset 1
//! order-124: partition [..] offset [..]
//! order-125: partition [..] offset [..]
//! ```
//!
//! Notice:
//! - `order-123` goes to the same partition both times. When partitions are added, it can go to another.
//! - librdkafka and the Java client hash keys differently. `murmur2_random` is the Java client's hash.
//! - After a timeout the record may be written or not. If you send it again, it can be in the topic twice.
//!
//! Try: stop the broker after the first of 100000 orders. Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG; the first
//! argument is the number of orders (1). See also: kafka_batch_producer (faster), kafka_consumer_group, kafka_send.

use std::time::Duration;

use anyhow::{Context, bail};
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use serde::Serialize;

const TOPIC: &str = "group-orders";
const TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Order {
    order_id: String,
    user_id: String,
    /// In cents: an `f64` cannot hold 0.10 exactly.
    amount_cents: u64,
    status: &'static str,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs which address fails, and why
    let count = std::env::args().nth(1).unwrap_or("1".into());
    let count: u32 = count
        .parse()
        .context("usage: kafka_async_producer [ORDERS]")?;
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("compression.type", "lz4")
        // From `send` to the delivery report, retries included. The default is five minutes.
        .set("message.timeout.ms", "5000")
        .set("partitioner", "murmur2_random")
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(Some(TOPIC), TIMEOUT);
    metadata.context(tip)?;
    for number in 0..count {
        let order = Order {
            order_id: format!("order-{}", 123 + number),
            user_id: format!("user-{}", 1 + number % 3),
            amount_cents: 4_999,
            status: "created",
        };
        send(&producer, &order).await?;
    }
    Ok(())
}

/// The pattern: send one order and await its delivery report.
async fn send(producer: &FutureProducer, order: &Order) -> anyhow::Result<()> {
    let (id, payload) = (&order.order_id, serde_json::to_string(order)?);
    let record = FutureRecord::to(TOPIC).key(id).payload(&payload);
    // TIMEOUT bounds only the wait for room in the client's queue.
    match producer.send(record, TIMEOUT).await {
        Ok(at) => println!("{id}: partition {} offset {}", at.partition, at.offset),
        Err((error, _)) if is_definite(&error) => bail!("{id} is refused: {error}"),
        Err((error, _)) => bail!("{id} may or may not be written: {error}"),
    }
    Ok(())
}

/// True if the client or the broker refused the record. After every other error, the record can be in the topic.
fn is_definite(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    matches!(code, Some(MessageSizeTooLarge | TopicAuthorizationFailed))
        || matches!(code, Some(InvalidRecord | ClusterAuthorizationFailed))
        || matches!(code, Some(InvalidTopic | UnknownTopic | QueueFull))
        || matches!(code, Some(UnknownPartition | UnknownTopicOrPartition))
}
