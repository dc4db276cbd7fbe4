//! Commit by hand after the work, and never past an order that failed
//!
//! At least once, in order within a partition. A commit is a position: "all before this is done". An order that was
//! merely not committed is therefore skipped for good by the commit of any later one. So before the position passes a
//! failed order, that order must be in safe hands: here a dead-letter topic, or it blocks its partition (`--stop`).
//!
//! ```console
//! 1$ cargo lab run kafka_manual_commit send order-0 order-1 invalid-2 order-3 order-4 order-5
//! sent to partition 0 offset 0: order-0
//! sent to partition 1 offset 0: order-1
//! sent to partition 0 offset 1: invalid-2
//! ...
//! 1$ cargo lab run kafka_manual_commit --stop
//! ...
//! partition 0 offset 0: order-0 processed
//! partition 0 offset 0: committed 1
//! ...
//! partition 0 offset 1: invalid-2 failed: it says that it is invalid; partition 0 stops here
//! ...
//! 1^C
//! ...
//! left the group
//! 1$ cargo lab run kafka_manual_commit
//! ...
//! partition 0 offset 1: invalid-2 failed: it says that it is invalid; now in reliable-orders.dlq
//! partition 0 offset 1: committed 2
//! partition 0 offset 2: order-4 processed
//! partition 0 offset 2: committed 3
//! 1^C
//! ...
//! left the group
//! ```
//!
//! Notice: with `--stop`, partition 1 went on and partition 0 did not: `order-4` had to wait. Both answers are right;
//! which one depends on whether later orders may overtake a failed one. Each commit here waits for the broker, which is
//! the slowest way and the one whose errors cannot be missed: those of `CommitMode::Async` reach only `commit_callback`.
//!
//! Try: `cargo lab kill kafka_manual_commit` in the middle of many orders, and start it again: after ten seconds, in
//! which the group waits for the dead member, it goes on behind the last commit. Read the headers of the dead letters:
//! reason, topic, partition, offset. A crash between dead letter and commit leaves two of them.
//!
//! Settings: KAFKA_BROKERS (localhost:9092); the argument `send` writes the orders that follow it, `--stop` is above.
//! See also: kafka_pitfall_auto_commit, kafka_idempotent_consumer.

use std::pin::pin;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{CommitMode, Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedHeaders, BorrowedMessage, Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use tokio::sync::oneshot;
use tokio::time::timeout;

const TOPIC: &str = "reliable-orders";
const DEAD_LETTERS: &str = "reliable-orders.dlq";
const PARTITIONS: i32 = 2;
const GROUP: &str = "reliable-processor";
/// An order may be as large as the broker lets it be. With the headers of a dead letter it is larger still, and another
/// compression may have done better.
const LARGEST_DEAD_LETTER: &str = "10485760";
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    create_topics(&brokers).await?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("enable.idempotence", "true")
        // The broker's limit is for what is compressed, the client's for what is not: an order that was small enough
        // for the one can be too large for the other, and could not be buried.
        .set("compression.type", "zstd")
        .set("message.max.bytes", "1000000000")
        // Long enough for a broker to restart; the consumer's max.poll.interval.ms of five minutes allows it.
        .set("message.timeout.ms", "30000")
        .create()?;
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["send", ref orders @ ..] => send(&producer, orders).await,
        [] => consume(&brokers, &producer, false).await,
        ["--stop"] => consume(&brokers, &producer, true).await,
        _ => bail!("usage: kafka_manual_commit [--stop | send ORDER...]"),
    }
}

async fn send(producer: &FutureProducer, orders: &[&str]) -> anyhow::Result<()> {
    for (order, partition) in orders.iter().zip((0..PARTITIONS).cycle()) {
        // In turn, so that the partition of each is known in advance. Usually the key decides.
        let record = FutureRecord::to(TOPIC)
            .partition(partition)
            .key(*order)
            .payload(*order);
        let sent = producer.send(record, PATIENCE).await;
        let sent = sent
            .map_err(|(error, _)| error)
            .with_context(|| format!("{order}: no delivery report, it may or may not be sent"))?;
        println!(
            "sent to partition {} offset {}: {order}",
            sent.partition, sent.offset
        );
    }
    Ok(())
}

async fn consume(
    brokers: &str,
    producer: &FutureProducer,
    stop_at_poison: bool,
) -> anyhow::Result<()> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", GROUP)
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest")
        // A member that crashed keeps its partitions for this long.
        .set("session.timeout.ms", "10000")
        .create()?;
    consumer.subscribe(&[TOPIC])?;
    let consumer = Arc::new(consumer);
    let worked = work(&consumer, producer, stop_at_poison).await;
    leave(consumer);
    worked?;
    println!("left the group");
    Ok(())
}

/// Until Ctrl-C.
async fn work(
    consumer: &Arc<StreamConsumer>,
    producer: &FutureProducer,
    stop_at_poison: bool,
) -> anyhow::Result<()> {
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let received = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            received = consumer.recv() => received,
        };
        let order = match received {
            Ok(order) => order,
            Err(error @ KafkaError::MessageConsumptionFatal(_)) => bail!(error),
            // A lost connection, for example: the client tries again by itself, and says so each time.
            Err(error) => {
                eprintln!("waiting for the broker: {error}");
                continue;
            }
        };
        let (partition, offset) = (order.partition(), order.offset());
        let place = format!("partition {partition} offset {offset}");
        match process(order.payload()) {
            Ok(name) => println!("{place}: {name} processed"),
            Err(reason) if stop_at_poison => {
                block(consumer, &order)?;
                println!(
                    "{place}: {} failed: {reason}; partition {partition} stops here",
                    name(&order)
                );
                continue;
            }
            Err(reason) => {
                // If this fails the program ends, and the next one starts with the same order.
                bury(producer, &order, &reason)
                    .await
                    .with_context(|| format!("{place}: failed, and not dead-lettered either"))?;
                println!(
                    "{place}: {} failed: {reason}; now in {DEAD_LETTERS}",
                    name(&order)
                );
            }
        }
        match commit(consumer, &order).await {
            Ok(()) => println!("{place}: committed {}", offset + 1),
            // Whoever reads on from the last commit processes it again. The next commit covers it, too.
            Err(error) => println!("{place}: not committed: {error:#}"),
        }
    }
    Ok(())
}

/// Returns when the broker has the position behind the order.
///
/// With the broker gone, a synchronous commit may block until it is back (librdkafka 2.12), and Ctrl-C would not be heard.
/// Hence a thread that can be left behind; the end of the program would wait for one of tokio's.
async fn commit(consumer: &Arc<StreamConsumer>, order: &BorrowedMessage<'_>) -> anyhow::Result<()> {
    let mut position = TopicPartitionList::new();
    let next = Offset::Offset(order.offset() + 1);
    position.add_partition_offset(order.topic(), order.partition(), next)?;
    let consumer = Arc::clone(consumer);
    let (done, committed) = oneshot::channel();
    thread::spawn(move || {
        let committed = consumer.commit(&position, CommitMode::Sync);
        drop(consumer); // before the answer: `leave` has to have it alone
        done.send(committed)
    });
    let committed = timeout(PATIENCE, committed).await;
    Ok(committed.context("no broker answers")???)
}

/// Leaves the group: the others take over now and not after session.timeout.ms.
///
/// With the broker gone this takes as long as that time, and sometimes it never ends (librdkafka 2.12, its issue 3740).
/// Hence a thread that can be left behind.
fn leave(consumer: Arc<StreamConsumer>) {
    let (done, left) = mpsc::channel();
    thread::spawn(move || {
        // None: a commit waits for its answer, and has the consumer.
        let consumer = Arc::into_inner(consumer);
        let alone = consumer.is_some();
        drop(consumer);
        done.send(alone)
    });
    if left.recv_timeout(PATIENCE) != Ok(true) {
        eprintln!("left without a word to the group: no broker answers");
    }
}

/// The work. Bytes from a topic can be anything.
fn process(payload: Option<&[u8]>) -> Result<&str, String> {
    let order = payload.ok_or("it has no payload")?;
    let order = std::str::from_utf8(order).map_err(|error| error.to_string())?;
    if order.is_empty() {
        return Err("it is empty".into());
    }
    if order.contains("invalid") {
        return Err("it says that it is invalid".into());
    }
    Ok(order)
}

fn name(order: &BorrowedMessage<'_>) -> String {
    let text = String::from_utf8_lossy(order.payload().unwrap_or_default());
    text.chars().take(40).collect()
}

/// Keeps the partition at this order. The other partitions go on, and their commits do not touch this position.
///
/// Paused, and not merely seeked back: that would try again without end or rest. A restart or a rebalance tries again.
fn block(consumer: &StreamConsumer, order: &BorrowedMessage<'_>) -> anyhow::Result<()> {
    let mut at = TopicPartitionList::new();
    let here = Offset::Offset(order.offset());
    at.add_partition_offset(order.topic(), order.partition(), here)?;
    consumer.pause(&at)?;
    // What the client has fetched beyond it must not be handed out either.
    consumer.seek_partitions(at, PATIENCE)?;
    Ok(())
}

/// The record as it came, with where it came from and why it failed. Returns when the broker has it.
async fn bury(
    producer: &FutureProducer,
    order: &BorrowedMessage<'_>,
    reason: &str,
) -> anyhow::Result<()> {
    let (partition, offset) = (order.partition().to_string(), order.offset().to_string());
    let origin = [
        ("reason", reason),
        ("topic", order.topic()),
        ("partition", &partition),
        ("offset", &offset),
    ];
    let known = order.headers().map(BorrowedHeaders::detach);
    let headers = origin.into_iter().fold(
        known.unwrap_or_default(),
        |headers: OwnedHeaders, (key, value)| {
            headers.insert(Header {
                key,
                value: Some(value),
            })
        },
    );
    let record = FutureRecord::<[u8], [u8]> {
        key: order.key(),
        payload: order.payload(),
        ..FutureRecord::to(DEAD_LETTERS).headers(headers)
    };
    producer
        .send(record, PATIENCE)
        .await
        .map_err(|(error, _)| error)?;
    Ok(())
}

/// Left to the broker, the topics would be created by their first record, often with a single partition.
async fn create_topics(brokers: &str) -> anyhow::Result<()> {
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
    let orders = NewTopic::new(TOPIC, PARTITIONS, TopicReplication::Fixed(-1));
    let dead_letters = NewTopic::new(DEAD_LETTERS, 1, TopicReplication::Fixed(-1))
        .set("max.message.bytes", LARGEST_DEAD_LETTER);
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin
        .create_topics([&orders, &dead_letters], &options)
        .await
    {
        Ok(results) => {
            for result in results {
                match result {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                    Err((topic, code)) => bail!("cannot create topic {topic}: {code}"),
                }
            }
        }
        // Not every cluster lets its clients create topics; librdkafka's mock does not.
        Err(error) => eprintln!("leaving the topics to the broker: {error}"),
    }
    Ok(())
}
