//! A compacted topic as a table: the latest value per key, and a tombstone deletes
//!
//! Reads all prices to the end of the topic that is known at the start, prints the table, and then prints each change.
//! Compaction keeps at least the last record of each key, forever. Older records of the key are removed later.
//! Every reader has the whole table: no group is joined, and nothing is committed.
//!
//! ```console
//! 1$ cargo lab run kafka_compacted_table
//! up to date: 0 keys, changes follow
//! 2$ cargo lab run kafka_send -k apple compacted-table.prices 100 120
//! ...
//! 1:
//! apple = 100
//! apple = 120
//! 2$ cargo lab run kafka_send -k apple -Z compacted-table.prices ''
//! ...
//! 1:
//! apple deleted
//! 1^C
//! ```
//!
//! Notice:
//! - A tombstone has a key and a null payload. An empty payload is an empty value, and deletes nothing.
//! - Compaction runs in the background, and never in the newest segment. Readers must expect old records.
//! - Tombstones are removed after `delete.retention.ms`, a day. A reader that is slower can miss a deletion.
//! - Only records of the same key are in order. A partition that is added later is not read before a restart.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_send, kafka_tail.

use std::collections::BTreeMap;
use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{Consumer, ConsumerContext, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;
use rdkafka::{ClientConfig, ClientContext, Message, Offset, TopicPartitionList};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

const TOPIC: &str = "compacted-table.prices";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers);
    let admin = config.create()?;
    let consumer: StreamConsumer<Errors> = config
        // The client wants a name here, although no group is joined and nothing is committed.
        .set("group.id", "kafka_compacted_table")
        .set("enable.auto.commit", "false")
        // The table is wrong when records are skipped, for example in a topic that was created again.
        .set("auto.offset.reset", "error")
        .set("enable.partition.eof", "true")
        .create_with_context(Errors)?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer.fetch_metadata(None, TIMEOUT).context(hint)?;
    create_topic(&admin).await;

    let worked = follow(&consumer).await;
    // With the broker down, the close can hang (librdkafka issue 3740): wait no longer than TIMEOUT.
    let (done, closed) = oneshot::channel();
    thread::spawn(move || {
        drop(consumer);
        done.send(())
    });
    let closed = timeout(TIMEOUT, closed).await;
    worked?;
    closed.context("not closed: no broker answers")??;
    Ok(())
}

/// The pattern: read to the end that is known at the start, show the table, then show each change.
async fn follow(consumer: &StreamConsumer<Errors>) -> anyhow::Result<()> {
    let deadline = Instant::now() + 4 * TIMEOUT;
    let mut unread = loop {
        match assign(consumer) {
            // A new topic is known to the broker a moment later.
            Err(_) if Instant::now() < deadline => sleep(TIMEOUT / 50).await,
            ends => break ends?,
        }
    };
    let (mut table, mut is_current) = (BTreeMap::new(), false);
    let mut stop = pin!(shutdown());
    loop {
        if unread.is_empty() && !is_current {
            is_current = true;
            for (key, price) in &table {
                println!("{key} = {price}");
            }
            println!("up to date: {} keys, changes follow", table.len());
        }
        let received = tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            received = consumer.recv() => received,
        };
        match received {
            Ok(record) => {
                if let Some(change) = apply(&mut table, &record).filter(|_| is_current) {
                    println!("{change}");
                }
                // The last record can be missing, for example when it marks the end of a transaction.
                unread.retain(|id, end| *id != record.partition() || record.offset() + 1 < *end);
            }
            Err(KafkaError::PartitionEOF(partition)) => {
                unread.remove(&partition);
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Reads all partitions from the beginning. Returns the ends of those that are not empty.
fn assign(consumer: &StreamConsumer<Errors>) -> anyhow::Result<BTreeMap<i32, i64>> {
    let metadata = consumer.fetch_metadata(Some(TOPIC), TIMEOUT)?;
    let (mut all, mut ends) = (TopicPartitionList::new(), BTreeMap::new());
    let topic = metadata.topics().first().context("no metadata")?;
    if let Some(error) = topic.error() {
        bail!("cannot read {TOPIC}: {}", RDKafkaErrorCode::from(error));
    }
    for partition in topic.partitions() {
        all.add_partition_offset(TOPIC, partition.id(), Offset::Beginning)?;
        let (start, end) = consumer.fetch_watermarks(TOPIC, partition.id(), TIMEOUT)?;
        if start < end {
            ends.insert(partition.id(), end);
        }
    }
    consumer.assign(&all)?;
    Ok(ends)
}

/// Changes the table, and says how. A malformed record changes nothing: the price before it stays.
fn apply(table: &mut BTreeMap<String, u64>, record: &BorrowedMessage<'_>) -> Option<String> {
    let text = |bytes| std::str::from_utf8(bytes).ok();
    let price = record.payload().map(|price| text(price)?.parse().ok());
    match (record.key().and_then(text), price) {
        (Some(key), None) => table.remove(key).map(|_| format!("{key} deleted")),
        (Some(key), Some(Some(price))) => {
            table.insert(key.to_owned(), price);
            Some(format!("{key} = {price}"))
        }
        _ => {
            let (partition, offset) = (record.partition(), record.offset());
            println!("partition {partition} offset {offset} skipped: it needs a key and a price");
            None
        }
    }
}

/// Creates the topic. Warns when it exists and is not compacted.
async fn create_topic(admin: &AdminClient<DefaultClientContext>) {
    let options = AdminOptions::new().request_timeout(Some(TIMEOUT));
    // -1 is the broker's default.
    let topic = NewTopic::new(TOPIC, -1, TopicReplication::Fixed(-1));
    let topic = topic.set("cleanup.policy", "compact");
    match admin.create_topics([&topic], &options).await.as_deref() {
        Ok([Ok(_)]) => return,
        Ok([Err((_, RDKafkaErrorCode::TopicAlreadyExists))]) => {}
        refused => eprintln!("{TOPIC} not created: {refused:?}"),
    }
    let topic = ResourceSpecifier::Topic(TOPIC);
    let found = admin.describe_configs([&topic], &options).await;
    let config = found.ok().and_then(|mut found| found.pop()?.ok());
    let policy = config.and_then(|config| config.get("cleanup.policy")?.value.clone());
    if policy.as_deref() != Some("compact") {
        eprintln!("cleanup.policy is {policy:?}: unless it is compact, prices are lost with time");
    }
}

/// The end of a partition is not an error, but the client would log it as one.
struct Errors;

impl ConsumerContext for Errors {}

impl ClientContext for Errors {
    fn error(&self, error: KafkaError, reason: &str) {
        if error.rdkafka_error_code() != Some(RDKafkaErrorCode::PartitionEOF) {
            tracing::error!("{reason}");
        }
    }
}

/// The client reconnects by itself after these errors. Other errors (authorization, configuration) do not heal by waiting.
fn is_temporary(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::*;
    matches!(
        error.rdkafka_error_code(),
        Some(AllBrokersDown | BrokerTransportFailure | OperationTimedOut | UnknownTopicOrPartition)
    )
}

/// Ctrl-C, or SIGTERM, which Docker, Kubernetes and systemd send.
async fn shutdown() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupt = tokio::signal::ctrl_c() => interrupt,
        _ = terminate.recv() => Ok(()),
    }
}
