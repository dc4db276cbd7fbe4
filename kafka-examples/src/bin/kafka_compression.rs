//! Compare Kafka's compression codecs on the same orders: bytes, ratio, time
//!
//! Sends the same 5000 JSON orders with each codec and level, each time to a topic of its own. It counts the bytes that go
//! to the broker, which stores the batches unchanged. A consumer needs no setting: each batch names its codec.
//!
//! ```console
//! $ cargo lab run kafka_compression
//! 5000 orders, 2[..] bytes each on average
//! codec              bytes  ratio       time
//! none         [..]    1.0 [..] ms
//! lz4          [..]    3.[..] ms
//! ...
//! zstd 3       [..] ms
//! zstd 12      [..] ms
//! zstd, alone  [..]    0.[..] ms
//! ```
//!
//! Notice:
//! - A batch is compressed, not a message. In the last row each message is a batch of its own: zstd finds nothing to
//!   share between orders, and each order pays for a batch header and a request.
//! - Here zstd needs half of the bytes of lz4. Higher levels cost much time and save little. snappy ignores the level.
//! - zstd is the feature `zstd` of the crate `rdkafka`. A consumer built without it cannot read such a topic.
//! - A topic with its own `compression.type`, other than `producer`, makes the broker compress again.
//!
//! Try: `cargo run --release --bin kafka_compression`. Replace `order` by a message of yours, which has another ratio.
//!
//! Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_batch_producer.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::stream::{self, StreamExt, TryStreamExt};
use rdkafka::error::KafkaResult;
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, ClientContext, Statistics};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::timeout;

const ORDERS: u64 = 5_000;
const TIMEOUT: Duration = Duration::from_secs(5);

/// A name, the codec, its level (-1 is the codec's default), and how many messages share a batch.
type Row = (&'static str, &'static str, &'static str, &'static str);

const ROWS: [Row; 11] = [
    ("none", "none", "-1", "10000"),
    ("lz4", "lz4", "-1", "10000"),
    ("lz4 12", "lz4", "12", "10000"),
    ("snappy", "snappy", "-1", "10000"),
    ("gzip 1", "gzip", "1", "10000"),
    ("gzip 6", "gzip", "6", "10000"),
    ("gzip 9", "gzip", "9", "10000"),
    ("zstd 1", "zstd", "1", "10000"),
    ("zstd 3", "zstd", "3", "10000"),
    ("zstd 12", "zstd", "12", "10000"),
    ("zstd, alone", "zstd", "3", "1"),
];

#[tokio::main]
async fn main() -> Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let orders: Vec<String> = (0..ORDERS).map(order).collect();
    let average = orders.iter().map(String::len).sum::<usize>() / orders.len();
    let mut uncompressed = None;
    for row in ROWS {
        let name = row.0;
        let (sender, statistics) = unbounded_channel();
        let producer = producer(&brokers, row, Meter(sender))?;
        let topic = format!("compression-{}", name.replace(", ", "-").replace(' ', "-"));
        let (bytes, time) = send(&producer, &topic, &orders, statistics)
            .await
            .with_context(|| format!("{name}: not all orders are in topic {topic}"))?;
        if uncompressed.is_none() {
            println!("{ORDERS} orders, {average} bytes each on average");
            println!("codec              bytes  ratio       time");
        }
        let ratio = *uncompressed.get_or_insert(bytes) as f64 / bytes as f64;
        let millis = time.as_millis();
        println!("{name:<12} {bytes:>11} {ratio:>6.1} {millis:>7} ms");
    }
    Ok(())
}

/// The pattern: the settings that decide how well a codec works.
fn producer(brokers: &str, row: Row, meter: Meter) -> Result<FutureProducer<Meter>> {
    let (_, codec, level, batch) = row;
    let producer: FutureProducer<Meter> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("compression.type", codec)
        .set("compression.level", level)
        // A batch is sent after this time, or when it has a million bytes, or this many messages.
        .set("linger.ms", "50")
        .set("batch.num.messages", batch)
        .set("statistics.interval.ms", "50")
        .create_with_context(meter)?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(None, TIMEOUT);
    metadata.context(hint)?;
    Ok(producer)
}

/// Sends all orders. Returns the bytes that went to the broker for them, and the time.
async fn send(
    producer: &FutureProducer<Meter>,
    topic: &str,
    orders: &[String],
    mut statistics: UnboundedReceiver<Statistics>,
) -> Result<(i64, Duration)> {
    let deliver = async |payload: &str| -> KafkaResult<()> {
        // All to one partition, or batches would be smaller.
        let record = FutureRecord::<(), str>::to(topic).partition(0);
        let sent = producer.send(record.payload(payload), TIMEOUT).await;
        sent.map(drop).map_err(|(error, _)| error)
    };
    // A first record, so that connecting is not in the measurement.
    deliver("begin").await?;
    let before = bytes_sent(&mut statistics).await?;
    let begin = Instant::now();
    stream::iter(orders)
        .map(|order| deliver(order))
        .buffer_unordered(orders.len())
        .try_for_each(|()| async { Ok(()) })
        .await?;
    let time = begin.elapsed();
    Ok((bytes_sent(&mut statistics).await? - before, time))
}

/// The bytes sent so far.
async fn bytes_sent(statistics: &mut UnboundedReceiver<Statistics>) -> Result<i64> {
    while statistics.try_recv().is_ok() {}
    // The next statistics can be from a moment ago. Those after them are not.
    timeout(TIMEOUT, statistics.recv()).await?;
    let statistics = timeout(TIMEOUT, statistics.recv()).await?;
    Ok(statistics.context("the client has ended")?.tx_bytes)
}

/// Passes on the client's statistics.
struct Meter(UnboundedSender<Statistics>);

impl ClientContext for Meter {
    fn stats(&self, statistics: Statistics) {
        let _ = self.0.send(statistics); // fails when the row is done
    }
}

/// An order of a shop. Names repeat and ids do not. A payload of zeros would flatter every codec.
fn order(number: u64) -> String {
    // The same orders in every run.
    let mut random = fastrand::Rng::with_seed(number);
    let city = ["Aarhus", "Bologna", "Cádiz", "Dresden", "Espoo", "Funchal"][random.usize(..6)];
    let sku = ["teapot", "lamp", "notebook", "umbrella", "headphones"][random.usize(..5)];
    serde_json::json!({
        "order_id": format!("{:032x}", random.u128(..)),
        "user_id": format!("user-{}", random.u32(..5_000)),
        "placed_at": 1_767_268_800_000_u64 + number * 137 + random.u64(..137),
        "status": "created",
        "address": { "city": city, "street": format!("Long Street {}", random.u32(..200)) },
        "items": [{ "sku": sku, "quantity": random.u32(1..5), "amount_cents": random.u32(99..90_000) }],
        "currency": "EUR",
    })
    .to_string()
}
