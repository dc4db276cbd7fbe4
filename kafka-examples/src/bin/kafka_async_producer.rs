//! Produce to Kafka asynchronously, and know where each record ended up
//!
//! Sends orders as JSON under a key and awaits each delivery report. Idempotence lets the client retry without writing
//! a record twice or out of order; records with the same key stay in order, because they share a partition. A delivery
//! that fails by timeout may still have been written: sending it again gives at least once.
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
//! Notice: `order-123` went to the same partition both times. The key decides the partition, but only together with the
//! number of partitions and the hash function: add a partition, and the key's next record may land elsewhere, out of
//! order with those before it. librdkafka's default hash is not the Java client's; `murmur2_random` is.
//!
//! Try: send 4 orders, remove `partitioner`, send them again: `order-126` goes elsewhere. Send 9 orders while
//! `kafka_consumer_group` runs.
//!
//! Settings: KAFKA_BROKERS (localhost:9092); the first argument is the number of orders (1).
//! See also: kafka_consumer_group, order_pipeline.

use std::time::Duration;

use anyhow::Context;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde::Serialize;

const TOPIC: &str = "orders";
const PARTITIONS: i32 = 3;
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Order {
    order_id: String,
    user_id: String,
    /// In cents: a binary fraction cannot hold 0.10.
    amount: i64,
    status: &'static str,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let count: u32 = match std::env::args().nth(1) {
        Some(count) => count
            .parse()
            .context("the argument is the number of orders")?,
        None => 1,
    };

    create_topic(&brokers).await?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        // All in-sync replicas have the record before it counts as delivered.
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("compression.type", "lz4")
        // From `send` to the delivery report, retries included. The default is five minutes.
        .set("message.timeout.ms", "5000")
        .set("partitioner", "murmur2_random")
        .create()?;

    for number in 0..count {
        let order = Order {
            order_id: format!("order-{}", 123 + number),
            user_id: format!("user-{}", 1 + number % 3),
            amount: 4_999,
            status: "created",
        };
        let payload = serde_json::to_string(&order)?;
        let record = FutureRecord::to(TOPIC)
            .key(&order.order_id)
            .payload(&payload);
        // The timeout here is only about room in the client's send queue. Awaiting each report in turn is the
        // simplest correct form, and the slowest: every order costs a round trip.
        let delivery = producer
            .send(record, PATIENCE)
            .await
            .map_err(|(error, _)| error);
        let delivery = delivery.with_context(|| {
            format!(
                "{}: no delivery report from {brokers}, it may or may not be written",
                order.order_id
            )
        })?;
        println!(
            "{}: partition {} offset {}",
            order.order_id, delivery.partition, delivery.offset
        );
    }
    Ok(())
}

/// Left to the broker, the first record would create the topic with the broker's default, often a single partition.
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
    let topic = NewTopic::new(TOPIC, PARTITIONS, TopicReplication::Fixed(-1));
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin.create_topics([&topic], &options).await {
        Ok(results) => {
            for result in results {
                match result {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                    Err((topic, code)) => anyhow::bail!("cannot create topic {topic}: {code}"),
                }
            }
        }
        // Not every cluster lets its clients create topics; librdkafka's mock does not.
        Err(error) => eprintln!("leaving topic {TOPIC} to the broker: {error}"),
    }
    Ok(())
}
