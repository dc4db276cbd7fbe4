//! Consume as a Kafka group, with auto commit that never runs ahead of the work
//!
//! Members of a group share a topic's partitions, and each partition is read in order by one member at a time. At least
//! once: offsets are committed in the background, but only those of finished work, so a crash repeats up to a second of
//! work and loses none.
//!
//! ```console
//! 1$ cargo lab run kafka_consumer_group
//! assigned: [0, 1, 2]
//! 2$ cargo lab run kafka_async_producer
//! order-123: partition [..]
//! 1:
//! topic orders partition [..] offset 0 key order-123: {"order_id":"order-123",[..]}
//! processed: order-123 of user-1, 4999 cents
//! committed: partition [..] up to 1
//! ...
//! 2$ cargo lab run kafka_consumer_group
//! assigned: [[..]]
//! 1:
//! ...
//! revoked: [[..]]
//! 2^C
//! revoked: [[..]]
//! left the group; orders processed: 0
//! 1:
//! assigned: [[..]]
//! 1^C
//! revoked: [[..], [..], [..]]
//! ...
//! left the group; orders processed: 1
//! ```
//!
//! Notice: a commit is a position, the offset of the next record to read. By default that position moves on when a
//! record is handed to the program, and the background commit does not wait for the work: a crash after the commit
//! loses what was in work. With `enable.auto.offset.store` off, it moves when the program says so, after the work.
//!
//! Notice too: when the second member came, one partition moved to it and the other two went on undisturbed, as the
//! strategy is cooperative. When it left, the partition came back at once, because it said that it was leaving.
//!
//! Try: run it in four terminals, and see one stay idle, as there are three partitions.
//! `cargo lab kill kafka_consumer_group` while it works through 100 orders, and start it again: after ten seconds, in
//! which the group still waits for the dead member, the last few orders are processed twice and none is missing.
//!
//! Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_async_producer, order_pipeline.

use std::io::{self, Write};
use std::pin::pin;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{
    BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance, StreamConsumer,
};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;
use rdkafka::{ClientConfig, ClientContext, Message, Offset, TopicPartitionList};
use serde::Deserialize;
use tokio::time::sleep;

const TOPIC: &str = "orders";
const PARTITIONS: i32 = 3;
const GROUP: &str = "order-processor-group";
const PATIENCE: Duration = Duration::from_secs(5);
/// Time for the last commit.
const LEAVING: Duration = Duration::from_secs(15);

#[derive(Deserialize)]
struct Order {
    order_id: String,
    user_id: String,
    amount: i64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    create_topic(&brokers).await?;
    let consumer: StreamConsumer<Narrator> = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        // Where to start if the group has no position yet. The default, latest, skips what is already there.
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "true")
        .set("auto.commit.interval.ms", "1000")
        // Auto commit commits what is stored. This leaves the storing to us.
        .set("enable.auto.offset.store", "false")
        // In a rebalance, an owner gives up only the partitions that move.
        .set("partition.assignment.strategy", "cooperative-sticky")
        // A member that crashed keeps its partitions for this long. The default is 45 seconds.
        .set("session.timeout.ms", "10000")
        // Bounds the last commit if the brokers are gone by then. The default is a minute.
        .set("socket.timeout.ms", "5000")
        .create_with_context(Narrator)?;
    consumer.subscribe(&[TOPIC])?;
    let worked = work(&consumer).await;
    let left = leave(consumer);
    let processed = worked?;
    left?;
    println!("left the group; orders processed: {processed}");
    Ok(())
}

/// Returns how many orders were processed until Ctrl-C.
async fn work(consumer: &StreamConsumer<Narrator>) -> anyhow::Result<u32> {
    let mut processed = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let received = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            received = consumer.recv() => received,
        };
        match received {
            Ok(message) => {
                // Outside the select: Ctrl-C does not interrupt an order in hand.
                processed += u32::from(process(&message).await);
                consumer.store_offset_from_message(&message)?;
            }
            Err(error @ KafkaError::MessageConsumptionFatal(_)) => bail!(error),
            // A lost connection, for example: the client tries again by itself, and says so each time.
            Err(error) => eprintln!("waiting for the broker: {error}"),
        }
    }
    Ok(processed)
}

/// Works on one record; false if it is not an order.
///
/// Such a record is reported and passed over: it would fail for ever, and the orders behind it on its partition would
/// wait for ever. It is not lost: it stays in the log, at the offset that was printed, until its retention ends.
async fn process(message: &BorrowedMessage<'_>) -> bool {
    let (topic, partition, offset) = (message.topic(), message.partition(), message.offset());
    let payload = message.payload().unwrap_or_default();
    let key = String::from_utf8_lossy(message.key().unwrap_or_default());
    let text = String::from_utf8_lossy(payload);
    println!("topic {topic} partition {partition} offset {offset} key {key}: {text}");
    match serde_json::from_slice::<Order>(payload) {
        Ok(order) => {
            sleep(Duration::from_millis(100)).await; // the work
            let Order {
                order_id,
                user_id,
                amount,
            } = order;
            println!("processed: {order_id} of {user_id}, {amount} cents");
            true
        }
        Err(error) => {
            println!("not an order, skipped: partition {partition} offset {offset}: {error}");
            false
        }
    }
}

/// Commits what is done and leaves the group: the others take over now and not after session.timeout.ms.
///
/// With the broker gone, either takes as long as that time, and sometimes never ends (librdkafka 2.12; see its issue 3740
/// for the close). Hence a thread that can be left behind.
fn leave(consumer: StreamConsumer<Narrator>) -> anyhow::Result<()> {
    let (done, answers) = mpsc::channel();
    thread::spawn(move || {
        done.send(consumer.commit_consumer_state(CommitMode::Sync))?;
        drop(consumer);
        done.send(Ok(()))
    });
    let committed = answers.recv_timeout(LEAVING);
    if committed.is_err() || answers.recv_timeout(PATIENCE).is_err() {
        eprintln!("left without a word to the group: no broker answers");
    }
    match committed {
        // No offset: all was committed already.
        Ok(Ok(()) | Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset))) => Ok(()),
        Ok(Err(error)) => bail!("the last orders will be processed again: {error}"),
        Err(_) => bail!("the last orders will be processed again, unless the commit has arrived"),
    }
}

/// Prints what the group does to this member. All of this is called from `recv`, thus never during the work.
struct Narrator;

impl ClientContext for Narrator {}

impl ConsumerContext for Narrator {
    fn pre_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        match rebalance {
            Rebalance::Assign(list) if list.count() > 0 => {
                say(&format!("assigned: {:?}", partitions(list)))
            }
            Rebalance::Revoke(list) if list.count() > 0 => {
                say(&format!("revoked: {:?}", partitions(list)))
            }
            Rebalance::Error(error) => {
                let _ = writeln!(io::stderr(), "rebalance failed: {error}");
            }
            Rebalance::Assign(_) | Rebalance::Revoke(_) => {}
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, offsets: &TopicPartitionList) {
        if let Err(error) = result {
            let _ = writeln!(io::stderr(), "commit failed, work may be repeated: {error}");
            return;
        }
        for entry in offsets.elements() {
            if let Offset::Offset(next) = entry.offset() {
                say(&format!(
                    "committed: partition {} up to {next}",
                    entry.partition()
                ));
            }
        }
    }
}

/// For callbacks. On a closed pipe `println!` panics, and a consumer whose rebalance was broken off is never closed.
fn say(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}

fn partitions(list: &TopicPartitionList) -> Vec<i32> {
    list.elements()
        .iter()
        .map(|entry| entry.partition())
        .collect()
}

/// Left to the broker, the topic would be created by the first record, often with a single partition to share.
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
                    Err((topic, code)) => bail!("cannot create topic {topic}: {code}"),
                }
            }
        }
        // Not every cluster lets its clients create topics; librdkafka's mock does not.
        Err(error) => eprintln!("leaving topic {TOPIC} to the broker: {error}"),
    }
    Ok(())
}
