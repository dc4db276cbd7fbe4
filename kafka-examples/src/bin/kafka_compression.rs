//! Compare Kafka's compression codecs on the same orders: bytes, ratio, time
//!
//! Sends the same 5000 JSON orders with each codec and level, each time to another topic. It counts the bytes that go
//! to the broker, which stores the batches unchanged. A consumer needs no setting: each batch names its codec.
//!
//! ```console
//! $ cargo lab run kafka_compression
//! codec  level   batch      bytes  ratio       time
//! none      -1   10000 [..]    1.0 [..] ms
//! lz4       -1   10000 [..]    3.[..] ms
//! ...
//! zstd       3       1 [..]    0.[..] ms
//! ```
//!
//! Notice:
//! - A batch is compressed, not a message. In the last row each message is one batch: zstd cannot use what the orders
//!   have in common, and each order has its own batch header and request.
//! - Here zstd needs fewer bytes than lz4, and level 12 fewer than level 3. snappy ignores the level.
//! - zstd is a feature of the crate `rdkafka`. A consumer built without it cannot read such a topic.
//! - If the topic sets a `compression.type` other than `producer`, the broker compresses again.
//!
//! Try: replace `order` with your message. Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_batch_producer.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::future;
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, ClientContext, Statistics};
use tokio::sync::watch;
use tokio::time::timeout;

const ORDERS: u64 = 5_000;
const TIMEOUT: Duration = Duration::from_secs(5);

/// A codec, its level (-1 is the codec's default), and the largest number of messages in a batch.
const ROWS: [[&str; 3]; 8] = [
    ["none", "-1", "10000"],
    ["lz4", "-1", "10000"],
    ["lz4", "12", "10000"],
    ["snappy", "-1", "10000"],
    ["gzip", "6", "10000"],
    ["zstd", "3", "10000"],
    ["zstd", "12", "10000"],
    ["zstd", "3", "1"],
];

#[tokio::main]
async fn main() -> Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let orders: Vec<String> = (0..ORDERS).map(order).collect();
    let mut uncompressed = None;
    for row in ROWS {
        let (bytes, time) = send(&brokers, row, &orders).await?;
        if uncompressed.is_none() {
            println!("codec  level   batch      bytes  ratio       time");
        }
        let ratio = *uncompressed.get_or_insert(bytes) as f64 / bytes as f64;
        let ([codec, level, batch], time) = (row, time.as_millis());
        println!("{codec:<6} {level:>5} {batch:>7} {bytes:>10} {ratio:>6.1} {time:>7} ms");
    }
    Ok(())
}

/// The pattern: all settings that matter for compression. Returns the bytes that went to the broker for all orders, and the
/// time.
async fn send(brokers: &str, row: [&str; 3], orders: &[String]) -> Result<(i64, Duration)> {
    let (meter, mut bytes) = watch::channel(0);
    let [codec, level, batch] = row;
    let producer: FutureProducer<Meter> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("compression.type", codec)
        .set("compression.level", level)
        // A batch is sent after this time, or when it has a million bytes, or this many messages.
        .set("linger.ms", "50")
        .set("batch.num.messages", batch)
        .set("statistics.interval.ms", "50")
        .create_with_context(Meter(meter))?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(None, TIMEOUT);
    metadata.context(tip)?;
    let topic = format!("compression-{codec}-{level}-{batch}");
    // A first record, so that connecting is not in the measurement.
    deliver(&producer, &topic, "begin").await?;
    let before = latest(&mut bytes).await?;
    let begin = Instant::now();
    let sent = orders.iter().map(|order| deliver(&producer, &topic, order));
    future::try_join_all(sent).await?;
    let time = begin.elapsed();
    Ok((latest(&mut bytes).await? - before, time))
}

async fn deliver(producer: &FutureProducer<Meter>, topic: &str, order: &str) -> Result<()> {
    // Send all orders to one partition. Otherwise the batches are smaller.
    let record = FutureRecord::<(), str>::to(topic).partition(0);
    let sent = producer.send(record.payload(order), TIMEOUT).await;
    let sent = sent.map_err(|(error, _)| error);
    sent.with_context(|| format!("not all orders are in topic {topic}"))?;
    Ok(())
}

/// The client's count of sent bytes. Skips two statistics: they can be older than this call.
async fn latest(bytes: &mut watch::Receiver<i64>) -> Result<i64> {
    for _ in 0..3 {
        timeout(TIMEOUT, bytes.changed()).await??;
    }
    Ok(*bytes.borrow())
}

struct Meter(watch::Sender<i64>);

impl ClientContext for Meter {
    fn stats(&self, statistics: Statistics) {
        self.0.send_replace(statistics.tx_bytes);
    }
}

/// An order of a shop. Names repeat, order ids do not. A payload of zeros would make every codec look too good.
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
