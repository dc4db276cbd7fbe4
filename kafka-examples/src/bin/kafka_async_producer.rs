//! Send records to Kafka and await their delivery reports
//!
//! A report says where the record is: its partition and offset. All in-sync replicas have it then (`acks=all`).
//! Idempotence lets the client retry without writing a record twice or out of order. Records with the same key stay in
//! order, because they share a partition.
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
//! - librdkafka's default hash is not the Java client's. `murmur2_random` is.
//! - After a timeout the record may be written or not. Sending it again is at least once.
//! - Each order waits for the report of the one before, a round trip. kafka_batch_producer is faster.
//!
//! Try: send 9 orders while `kafka_consumer_group` runs. Stop the broker after the first of 100000 orders.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG; the first argument is the number of orders (1).
//! See also: kafka_consumer_group, kafka_send.

use std::time::Duration;

use anyhow::{Context, bail};
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use serde::Serialize;

const TOPIC: &str = "group-orders";
const TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Order {
    order_id: String,
    user_id: String,
    /// An integer: a binary fraction cannot hold 0.10.
    amount_cents: u64,
    status: &'static str,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs which address fails, and why.
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let count: u32 = match std::env::args().nth(1) {
        Some(count) => count
            .parse()
            .context("the argument is the number of orders")?,
        None => 1,
    };
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
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(Some(TOPIC), TIMEOUT);
    metadata.context(hint)?;
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

/// Sends one order and waits for its delivery report.
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

/// Whether the record is certainly not in the topic. A timeout or a lost connection does not tell.
fn is_definite(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::*;
    !matches!(
        error.rdkafka_error_code(),
        Some(
            MessageTimedOut
                | RequestTimedOut
                | BrokerTransportFailure
                | NetworkException
                | NotEnoughReplicasAfterAppend
                | PurgeInflight
        )
    )
}
