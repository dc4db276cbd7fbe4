//! Compare Kafka's compression codecs on the same orders: bytes, ratio, time
//!
//! Sends the same 5000 JSON orders with each codec and level, each time to a topic of its own, and measures what goes
//! to the broker, which stores the batches as they come. The consumer needs no setting: each batch says how it was
//! compressed.
//!
//! ```console
//! $ cargo lab run kafka_compression
//! 5000 orders, 2[..] bytes each on average
//! codec              bytes  ratio       time
//! none         [..]    1.0 [..] ms
//! lz4              [..]    3.[..] ms
//! lz4 12           [..] ms
//! snappy           [..]    3.[..] ms
//! gzip 1           [..] ms
//! gzip 6           [..] ms
//! gzip 9           [..] ms
//! zstd 1           [..] ms
//! zstd 3           [..] ms
//! zstd 12          [..] ms
//! zstd, alone      [..]    0.7 [..] ms
//! read back: 5000 orders from each of 11 topics, all the same
//! ```
//!
//! Notice: it is the batch that is compressed, and not the message. In the last row every message is a batch of its own:
//! zstd finds nothing to share between orders, and each pays for a batch header and a request.
//!
//! Notice too: on these orders zstd needs half of what lz4 needs, and its level 3 more than its level 1: measure, don't
//! guess. Higher levels cost much and give little. They mean something else for each codec, and nothing for snappy.
//! zstd is the `zstd` feature of the crate: a consumer that was built without it cannot read such a topic. The topic's
//! own setting `compression.type`, if it is not `producer`, makes the broker compress again.
//!
//! Try: `cargo run --release --bin kafka_compression`. Replace the order by what your own messages look like: the ratio
//! is theirs, not the codec's.
//!
//! Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_batch_producer.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::stream::{self, StreamExt, TryStreamExt};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, ClientContext, Message, Offset, Statistics, TopicPartitionList};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::timeout;

const ORDERS: usize = 5_000;
const PATIENCE: Duration = Duration::from_secs(5);

/// What is compared: a name, the codec, its level (-1 is the codec's default), and whether messages share batches.
const ROWS: [(&str, &str, i32, bool); 11] = [
    ("none", "none", -1, true),
    ("lz4", "lz4", -1, true),
    ("lz4 12", "lz4", 12, true),
    ("snappy", "snappy", -1, true),
    ("gzip 1", "gzip", 1, true),
    ("gzip 6", "gzip", 6, true),
    ("gzip 9", "gzip", 9, true),
    ("zstd 1", "zstd", 1, true),
    ("zstd 3", "zstd", 3, true),
    ("zstd 12", "zstd", 12, true),
    ("zstd, alone", "zstd", 3, false),
];

#[tokio::main]
async fn main() -> Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    create_topics(&brokers).await?;
    let orders: Vec<String> = (0..ORDERS).map(order).collect();
    let plain: usize = orders.iter().map(String::len).sum();
    println!(
        "{ORDERS} orders, {} bytes each on average",
        plain / orders.len()
    );

    println!(
        "{:<12} {:>11} {:>6} {:>10}",
        "codec", "bytes", "ratio", "time"
    );
    let mut uncompressed = None;
    let mut starts = Vec::new();
    for (name, codec, level, together) in ROWS {
        let (start, bytes, time) = send(&brokers, &topic(name), codec, level, together, &orders)
            .await
            .with_context(|| format!("{name}: not all orders were delivered to {brokers}"))?;
        starts.push(start);
        // Per mille, as a ratio of integers.
        let ratio = *uncompressed.get_or_insert(bytes) * 10 / bytes;
        println!(
            "{name:<12} {bytes:>11} {:>6} {:>7} ms",
            format!("{}.{}", ratio / 10, ratio % 10),
            time.as_millis()
        );
    }

    for ((name, ..), start) in ROWS.into_iter().zip(starts) {
        let read = read(&brokers, &topic(name), start, orders.len()).await?;
        ensure!(read == orders, "{name}: what was read is not what was sent");
    }
    println!(
        "read back: {ORDERS} orders from each of {} topics, all the same",
        ROWS.len()
    );
    Ok(())
}

fn topic(name: &str) -> String {
    format!("compression-{}", name.replace(", ", "-").replace(' ', "-"))
}

/// An order as a shop might write it. Names repeat, identifiers don't; a payload of zeros would flatter every codec.
fn order(number: usize) -> String {
    const CITIES: [&str; 6] = ["Aarhus", "Bologna", "Cádiz", "Dresden", "Espoo", "Funchal"];
    const GOODS: [&str; 5] = ["teapot", "lamp", "notebook", "umbrella", "headphones"];
    // Scrambled, but the same in every run and for every codec.
    let hash = |salt: u64| {
        let mixed = (number as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ salt;
        let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed ^ (mixed >> 32)
    };
    let pick = |from: &[&'static str], salt| from[hash(salt) as usize % from.len()];
    serde_json::json!({
        "order_id": format!("{:016x}{:016x}", hash(1), hash(2)),
        "user_id": format!("user-{}", hash(3) % 5_000),
        "placed_at": 1_767_268_800_000_u64 + number as u64 * 137 + hash(4) % 137,
        "status": "created",
        "address": { "city": pick(&CITIES, 5), "street": format!("Long Street {}", hash(6) % 200) },
        "items": [{ "sku": pick(&GOODS, 7), "quantity": 1 + hash(8) % 4, "cents": 99 + hash(9) % 90_000 }],
        "currency": "EUR",
    })
    .to_string()
}

/// Passes on what the client counts.
struct Meter(UnboundedSender<Statistics>);

impl ClientContext for Meter {
    fn stats(&self, statistics: Statistics) {
        let _ = self.0.send(statistics); // nobody asks any more
    }
}

/// Sends all orders; the offset of the first, the bytes that went to the broker for them, and how long it took.
async fn send(
    brokers: &str,
    topic: &str,
    codec: &str,
    level: i32,
    together: bool,
    orders: &[String],
) -> Result<(i64, i64, Duration)> {
    let (sender, mut statistics) = unbounded_channel();
    let producer: FutureProducer<Meter> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("compression.type", codec)
        .set("compression.level", level.to_string())
        // Time for a batch to fill; it is sent when it holds a million bytes, or that many messages.
        .set("linger.ms", "50")
        .set("batch.num.messages", if together { "10000" } else { "1" })
        .set("statistics.interval.ms", "50")
        .create_with_context(Meter(sender))?;
    let deliver = async |payload: &str| {
        let record = FutureRecord::<str, str>::to(topic).payload(payload);
        let delivery = producer.send(record, PATIENCE).await;
        delivery.map_err(|(error, _)| error)
    };
    // A first record, so that connecting and finding the partition's leader are not in the measurement.
    let start = deliver("begin").await?.offset + 1;
    let before = settled(&mut statistics).await?;

    let begin = Instant::now();
    stream::iter(orders)
        .map(|order| deliver(order))
        .buffer_unordered(orders.len())
        .try_for_each(|_| async { Ok(()) })
        .await?;
    let time = begin.elapsed();
    Ok((start, settled(&mut statistics).await? - before, time))
}

/// The bytes sent so far, counted after now.
async fn settled(statistics: &mut UnboundedReceiver<Statistics>) -> Result<i64> {
    // Those that are waiting are old. One that was being made just now may be; the next one after it is not.
    while statistics.try_recv().is_ok() {}
    let mut bytes = None;
    for _ in 0..2 {
        let next = timeout(PATIENCE, statistics.recv()).await;
        bytes = next.context("the client gives no statistics")?;
    }
    Ok(bytes.context("the client is gone")?.tx_bytes)
}

async fn read(brokers: &str, topic: &str, start: i64, count: usize) -> Result<Vec<String>> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // Needed, though nothing is subscribed or committed.
        .set("group.id", "compression")
        .set("enable.auto.commit", "false")
        .create()?;
    let mut from = TopicPartitionList::new();
    from.add_partition_offset(topic, 0, Offset::Offset(start))?;
    consumer.assign(&from)?;
    let mut orders = Vec::with_capacity(count);
    while orders.len() < count {
        let message = timeout(PATIENCE, consumer.recv()).await;
        match message.with_context(|| format!("{topic}: nothing more to read"))? {
            Ok(message) => {
                let payload = message.payload().unwrap_or_default();
                orders.push(String::from_utf8_lossy(payload).into_owned());
            }
            Err(error @ KafkaError::MessageConsumptionFatal(_)) => return Err(error.into()),
            Err(error) => eprintln!("waiting for the broker: {error}"),
        }
    }
    Ok(orders)
}

/// One topic per row, with one partition: all orders can share batches.
async fn create_topics(brokers: &str) -> Result<()> {
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
    let names: Vec<String> = ROWS.iter().map(|(name, ..)| topic(name)).collect();
    // -1 is the broker's default replication factor.
    let topics = names
        .iter()
        .map(|name| NewTopic::new(name, 1, TopicReplication::Fixed(-1)));
    let topics: Vec<NewTopic<'_>> = topics.collect();
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin.create_topics(&topics, &options).await {
        Ok(results) => {
            for result in results {
                match result {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                    Err((topic, code)) => anyhow::bail!("cannot create topic {topic}: {code}"),
                }
            }
        }
        // Not every cluster lets its clients create topics; librdkafka's mock does not.
        Err(error) => eprintln!("leaving the topics to the broker: {error}"),
    }
    Ok(())
}
