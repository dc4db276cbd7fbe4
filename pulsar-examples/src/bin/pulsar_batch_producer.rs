//! Batches, window and compression: what a producer's settings do to its rate, side by side
//!
//! Sends the same orders in nine ways and prints for each the rate, the number of entries that the broker stored, and
//! the bytes that one order took. Every receipt is awaited, so each line is a rate of orders that are stored.
//!
//! ```console
//! $ ORDERS=2000 cargo lab run pulsar_batch_producer
//! 2000 orders of 1 KB
//! single, one at a time         : [..] orders/s, 200 entries, 10[..] bytes each
//! single, 1000 in flight        : [..] orders/s, 2000 entries, 10[..] bytes each
//! batches of 100, 1000 in flight: [..] orders/s, [..] entries, 10[..] bytes each
//! batches of 1000, 5000 in f.   : [..] orders/s, [..] entries, 10[..] bytes each
//! the same, of 64 KB at most    : [..] orders/s, [..] entries, 10[..] bytes each
//! the same, 100 in flight, 10 ms: [..] orders/s, [..] entries, 10[..] bytes each
//! the same, 100 in flight, 50 ms: [..] orders/s, [..] entries, 10[..] bytes each
//! the same, LZ4                 : [..] orders/s, [..] entries, [..] bytes each
//! the same, Zstd                : [..] orders/s, [..] entries, [..] bytes each
//! ```
//!
//! Notice: this client sends one batch of a producer and waits for its receipt before it sends the next. So the size of
//! a batch, and not the number of sends in flight, bounds the rate. A batch is sent when it has `batch_size` messages
//! or `batch_byte_size` bytes; only with a `batch_timeout` does it also go after a time. A window that is smaller than
//! a batch never fills one: then the timeout is the rate. Without one, a part of a batch stays in the client for ever,
//! and who awaits its receipt does too. `close` throws an unsent batch away: `send_batch` first. In a batch, the delay
//! of a delayed message is dropped, and the keys no longer steer Key_Shared.
//!
//! Try: ORDERS=50000. Take out `batch_timeout` and the `send_batch` before the last receipts: it stands still.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650), PULSAR_ADMIN_URL (http://localhost:8080), ORDERS (10000).
//! See also: pulsar_producer, pulsar_key_shared, pulsar_delayed_delivery.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use anyhow::Context;
use pulsar::compression::{Compression, CompressionLz4, CompressionZstd};
use pulsar::producer::SendFuture;
use pulsar::{ProducerOptions, Pulsar, TokioExecutor};
use serde_json::Value;
use tokio::time::timeout;

const TOPIC: &str = "public/default/batch-orders";
const PATIENCE: Duration = Duration::from_secs(5);
/// For the admin interface.
const ANSWER: Duration = Duration::from_secs(30);
const MB: usize = 1 << 20;
/// For a receipt: with a full window, it waits behind all that were sent before.
const RECEIPT: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let admin =
        std::env::var("PULSAR_ADMIN_URL").unwrap_or_else(|_| "http://localhost:8080".into());
    let orders: usize = match std::env::var("ORDERS") {
        Ok(text) => text.parse().context("ORDERS is a number of orders")?,
        Err(_) => 10_000,
    };
    println!("{orders} orders of 1 KB");
    let lz4 = || Some(Compression::Lz4(CompressionLz4::default()));
    let zstd = || Some(Compression::Zstd(CompressionZstd::default()));
    let ways = [
        ("single, one at a time         ", 1, MB, 10, 1, None),
        ("single, 1000 in flight        ", 1, MB, 10, 1000, None),
        ("batches of 100, 1000 in flight", 100, MB, 10, 1000, None),
        ("batches of 1000, 5000 in f.   ", 1000, MB, 10, 5000, None),
        (
            "the same, of 64 KB at most    ",
            1000,
            MB / 16,
            10,
            5000,
            None,
        ),
        ("the same, 100 in flight, 10 ms", 1000, MB, 10, 100, None),
        ("the same, 100 in flight, 50 ms", 1000, MB, 50, 100, None),
        ("the same, LZ4                 ", 1000, MB, 10, 5000, lz4()),
        ("the same, Zstd                ", 1000, MB, 10, 5000, zstd()),
    ];
    for (number, way) in ways.into_iter().enumerate() {
        let (name, batch, bytes, millis, window, compression) = way;
        let options = ProducerOptions {
            batch_size: Some(batch),
            batch_byte_size: Some(bytes),
            // Without it, the last part of a batch would never be sent by itself.
            batch_timeout: (batch > 1).then_some(Duration::from_millis(millis)),
            compression,
            // Otherwise a send fails as soon as a hundred are under way.
            block_queue_if_full: true,
            ..ProducerOptions::default()
        };
        let topic = format!("{TOPIC}-{number}");
        // One at a time is too slow for all of them.
        let count = if window == 1 { orders.min(200) } else { orders };
        let started = Instant::now();
        let entries = produce(&pulsar, &topic, options, count, window).await?;
        let rate = count as f64 / started.elapsed().as_secs_f64();
        let bytes = bytes_per_order(&admin, &topic).await?;
        println!("{name}: {rate:.0} orders/s, {entries} entries, {bytes:.0} bytes each");
    }
    Ok(())
}

/// Sends `count` orders with at most `window` unconfirmed; returns how many entries they became.
async fn produce(
    pulsar: &Pulsar<TokioExecutor>,
    topic: &str,
    options: ProducerOptions,
    count: usize,
    window: usize,
) -> anyhow::Result<usize> {
    let batching = options.batch_timeout.is_some();
    let topic = format!("persistent://{topic}");
    let mut producer = pulsar
        .producer()
        .with_topic(topic)
        .with_options(options)
        .build()
        .await?;
    let mut waiting = VecDeque::new();
    let mut entries = BTreeSet::new();
    for number in 0..count {
        if waiting.len() == window {
            entries.insert(receipt(waiting.pop_front()).await?);
        }
        waiting.push_back(producer.send_non_blocking(order(number)).await?);
    }
    if batching {
        producer.send_batch().await?;
    }
    while !waiting.is_empty() {
        entries.insert(receipt(waiting.pop_front()).await?);
    }
    producer.close().await?;
    Ok(entries.len())
}

/// The entry in which an order is stored; those of one batch share it.
async fn receipt(sent: Option<SendFuture>) -> anyhow::Result<(u64, u64)> {
    let sent = sent.context("nothing was sent")?;
    let receipt = timeout(RECEIPT, sent)
        .await
        .context("no receipt: the order may or may not be stored")??;
    let place = receipt
        .message_id
        .context("a receipt without a message id")?;
    Ok((place.ledger_id, place.entry_id))
}

fn order(number: usize) -> String {
    let items = r#"{"sku":"book","cents":4999,"count":1},"#.repeat(26);
    format!(r#"{{"order_id":"order-{number:06}","items":[{items}null]}}"#)
}

async fn bytes_per_order(admin: &str, topic: &str) -> anyhow::Result<f64> {
    let url = format!("{admin}/admin/v2/persistent/{topic}/stats");
    let answer = reqwest::Client::new()
        .get(&url)
        .timeout(ANSWER)
        .send()
        .await
        .with_context(|| format!("cannot ask {url}"))?;
    let stats: Value = answer.error_for_status()?.json().await?;
    let count = |name: &str| {
        stats[name]
            .as_f64()
            .with_context(|| format!("{url} has no {name}"))
    };
    Ok(count("bytesInCounter")? / count("msgInCounter")?)
}

/// Left alone, the client retries for more than a minute, in silence.
async fn connect(address: &str) -> anyhow::Result<Pulsar<TokioExecutor>> {
    let client = Pulsar::builder(address, TokioExecutor).build();
    let connected = timeout(PATIENCE, client).await;
    Ok(connected.with_context(|| {
        format!("no Pulsar broker answers at {address}; `cargo lab up pulsar` starts one")
    })??)
}
