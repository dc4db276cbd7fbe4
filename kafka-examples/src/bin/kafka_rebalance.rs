//! Hand over cleanly in a rebalance: commit on revoke, so that nothing done is done again
//!
//! Committing every order is slow, so this consumer commits every hundred. When the group takes a partition away, it
//! first commits what it has done there, and the next owner starts exactly behind it. At least once; a rebalance or a
//! clean end repeats nothing, a crash repeats up to a hundred orders.
//!
//! ```console
//! 1$ cargo lab run kafka_rebalance
//! assigned: [0, 1, 2, 3]
//! 3$ cargo lab run kafka_rebalance send 1500
//! 1:
//! done: [..]
//! 2$ cargo lab run kafka_rebalance
//! assigned: [[..]]
//! done: [..]
//! 1:
//! ...
//! handing over [[..]]: committed {[..]}
//! ...
//! 1^C
//! ...
//! handing over [[..]]: committed {[..]}
//! left the group; orders done: [..]
//! 2:
//! ...
//! assigned: [[..]]
//! ...
//! 3:
//! sent: 1500 orders
//! 2^C
//! ...
//! handing over [0, 1, 2, 3]: committed {[..]}
//! left the group; orders done: [..]
//! ```
//!
//! Notice: the callback runs inside of `recv` and never in the middle of an order; what was in hand is done by then. It
//! runs once more when the consumer is dropped, which is why the end needs no commit of its own. A member that was too
//! slow (session.timeout.ms, max.poll.interval.ms) is told that its partitions are lost, not revoked: it is too late to
//! commit, and that work is repeated. With `cooperative-sticky`, only the partitions that move stop for a moment.
//!
//! Try: `kafka_rebalance --careless` in both terminals: no commit on revoke, and the second one repeats what the first
//! had done. SIGSTOP one for 15 seconds, then SIGCONT.
//!
//! Settings: KAFKA_BROKERS (localhost:9092); the arguments `send N` write orders, `--careless` is above.
//! See also: kafka_consumer_group, kafka_manual_commit, kafka_parallel_consumer.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::pin::pin;
use std::sync::mpsc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{
    BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance, StreamConsumer,
};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, ClientContext, Message, Offset, TopicPartitionList};
use tokio::time::sleep;

const TOPIC: &str = "rebalance-orders";
const PARTITIONS: i32 = 4;
const GROUP: &str = "rebalance-orders";
const COMMIT_EVERY: u32 = 100;
const PATIENCE: Duration = Duration::from_secs(5);
/// Time for the last commit.
const LEAVING: Duration = Duration::from_secs(15);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    create_topic(&brokers).await?;
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => consume(&brokers, true).await,
        ["--careless"] => consume(&brokers, false).await,
        ["send", count] => {
            send(
                &brokers,
                count.parse().context("N is the number of orders")?,
            )
            .await
        }
        _ => bail!("usage: kafka_rebalance [--careless | send N]"),
    }
}

async fn send(brokers: &str, count: u32) -> anyhow::Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    let mut reports = Vec::new();
    for (number, partition) in (0..count).zip((0..PARTITIONS).cycle()) {
        let order = format!("order-{number}");
        // In turn, for an even share. Usually the key decides.
        let record = FutureRecord::<str, str>::to(TOPIC)
            .partition(partition)
            .payload(&order);
        // It only enters the queue here; awaiting each report would make the flow as slow as the broker's answers.
        let queued = producer.send_result(record).map_err(|(error, _)| error);
        reports.push(queued.with_context(|| format!("{order}: not sent"))?);
        // A steady flow of somewhat less than 200 orders in a second, on all partitions.
        sleep(Duration::from_millis(5)).await;
    }
    for (number, report) in reports.into_iter().enumerate() {
        let delivered = report.await?.map_err(|(error, _)| error);
        delivered.with_context(|| format!("order-{number}: no delivery report from {brokers}"))?;
    }
    println!("sent: {count} orders");
    Ok(())
}

async fn consume(brokers: &str, careful: bool) -> anyhow::Result<()> {
    let handover = Handover {
        careful,
        done: Mutex::default(),
    };
    let consumer: StreamConsumer<Handover> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        // With auto commit and stored offsets, librdkafka itself commits on revoke: see kafka_consumer_group.
        .set("enable.auto.commit", "false")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("session.timeout.ms", "10000")
        // Bounds the last commit if the brokers are gone by then.
        .set("socket.timeout.ms", "5000")
        .create_with_context(handover)?;
    consumer.subscribe(&[TOPIC])?;
    let orders = work(&consumer).await;
    // Revokes all partitions, and with that commits.
    tokio::task::block_in_place(|| leave(consumer));
    println!("left the group; orders done: {}", orders?);
    Ok(())
}

/// Until Ctrl-C; returns how many orders were done.
async fn work(consumer: &StreamConsumer<Handover>) -> anyhow::Result<u32> {
    let mut orders = 0;
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
        sleep(Duration::from_millis(2)).await; // the work
        println!(
            "done: partition {} offset {}",
            order.partition(),
            order.offset()
        );
        consumer
            .context()
            .done()
            .insert(order.partition(), order.offset() + 1);
        orders += 1;
        if orders % COMMIT_EVERY == 0 {
            let positions = positions(&consumer.context().done())?;
            // Nobody waits for it: if it fails, the next one covers it. `commit_callback` tells.
            consumer.commit(&positions, CommitMode::Async)?;
        }
    }
    Ok(orders)
}

/// Leaves the group: the others take over now and not after session.timeout.ms.
///
/// With the broker gone this takes as long as that time, and sometimes it never ends (librdkafka 2.12, its issue 3740).
/// Hence a thread that can be left behind.
fn leave(consumer: StreamConsumer<Handover>) {
    let (done, left) = mpsc::channel();
    thread::spawn(move || {
        drop(consumer);
        done.send(())
    });
    if left.recv_timeout(LEAVING).is_err() {
        eprintln!("left without a word to the group: no broker answers");
    }
}

struct Handover {
    careful: bool,
    /// The next offset of each partition that is ours and on which work was done.
    done: Mutex<BTreeMap<i32, i64>>,
}

impl Handover {
    fn done(&self) -> MutexGuard<'_, BTreeMap<i32, i64>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn positions(done: &BTreeMap<i32, i64>) -> KafkaResult<TopicPartitionList> {
    let mut positions = TopicPartitionList::new();
    for (partition, next) in done {
        positions.add_partition_offset(TOPIC, *partition, Offset::Offset(*next))?;
    }
    Ok(positions)
}

impl ClientContext for Handover {}

impl ConsumerContext for Handover {
    fn pre_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        let (list, revoked) = match rebalance {
            Rebalance::Assign(list) => (list, false),
            Rebalance::Revoke(list) => (list, true),
            Rebalance::Error(error) => {
                let _ = writeln!(io::stderr(), "rebalance failed: {error}");
                return;
            }
        };
        let partitions: Vec<i32> = list.elements().iter().map(|at| at.partition()).collect();
        if partitions.is_empty() {
            return;
        }
        if !revoked {
            return say(&format!("assigned: {partitions:?}"));
        }
        let mut done = self.done();
        let moving: BTreeMap<i32, i64> = partitions
            .iter()
            .filter_map(|partition| Some((*partition, done.remove(partition)?)))
            .collect();
        if consumer.assignment_lost() {
            say(&format!(
                "lost {partitions:?}: too slow for the group, {moving:?} may be repeated"
            ));
        } else if !self.careful || moving.is_empty() {
            say(&format!("handing over {partitions:?}: nothing committed"));
        } else {
            // Synchronous: once this callback returns, the partitions are gone.
            let commit = positions(&moving)
                .and_then(|positions| consumer.commit(&positions, CommitMode::Sync));
            match commit {
                Ok(()) => say(&format!(
                    "handing over {partitions:?}: committed {moving:?}"
                )),
                Err(error) => {
                    say(&format!(
                        "handing over {partitions:?}: {moving:?} may be repeated: {error}"
                    ));
                }
            }
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        if let Err(error) = result {
            let _ = writeln!(io::stderr(), "commit failed: {error}");
        }
    }
}

/// For callbacks. On a closed pipe `println!` panics, and a consumer whose rebalance was broken off is never closed.
fn say(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
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
