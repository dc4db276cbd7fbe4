//! Pitfall: auto commit confirms work that is not done, and a crash loses it
//!
//! Two programs that differ in one setting, each killed with SIGKILL in the middle of its work and started again. Both
//! read ahead of the work, as soon as there is a queue or a spawned task in between. The wrong one, with the client's
//! defaults, commits what it has read: at most once. The right one commits what it has done: at least once.
//!
//! ```console
//! $ cargo lab run kafka_pitfall_auto_commit
//! wrong: SIGKILL after [..] orders, and started again
//! wrong: sent 100, handled [..], lost [..], duplicated 0
//! right: SIGKILL after [..] orders, and started again
//! right: sent 100, handled 100, lost 0, duplicated [..]
//! ```
//!
//! Notice: no error is reported anywhere, and the group's lag is zero: nothing but a count shows the loss. By default
//! (`enable.auto.offset.store`) the position to be committed moves on when a record is handed to the program. A loop
//! that does the work before it asks for the next record loses less, the one in hand, but loses it just as silently.
//! The few that were handled twice are the price of not losing any.
//!
//! Try: make the queue longer, and more is lost. Store the offset before the work in the right one.
//!
//! Settings: KAFKA_BROKERS (localhost:9092). The program starts itself as `worker` for the part that is killed.
//! See also: kafka_consumer_group, kafka_manual_commit, kafka_idempotent_consumer.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{CommitMode, Consumer, ConsumerContext, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::OwnedMessage;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, ClientContext, Message, TopicPartitionList};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

/// A topic for each, and a group of the same name.
const WRONG: &str = "pitfall-auto-commit-wrong";
const RIGHT: &str = "pitfall-auto-commit-right";
const ORDERS: i64 = 100;
const QUEUE: usize = 16;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => {
            create_topics(&brokers).await?;
            compare(&brokers, "wrong", WRONG).await?;
            compare(&brokers, "right", RIGHT).await
        }
        ["worker", topic, last] => worker(&brokers, topic, last.parse()?).await,
        _ => bail!("usage: kafka_pitfall_auto_commit"),
    }
}

/// One order's life: sent, handled by a worker that is killed, or by the one that follows it.
async fn compare(brokers: &str, way: &str, topic: &str) -> anyhow::Result<()> {
    let sent = send(brokers, topic).await?;
    let last = sent.end - 1;
    let mut handled: BTreeMap<i64, u32> = BTreeMap::new();

    let (mut first, mut lines) = start(topic, last)?;
    let (mut count, mut since_commit) = (0, None);
    // In mid-work: well after the start, and between two commits.
    while count < 30 || !since_commit.is_some_and(|orders| (3..30).contains(&orders)) {
        let line = next_line(&mut lines)
            .await?
            .context("the worker ended before it was killed")?;
        if line == "committed" {
            since_commit = Some(0);
        } else if note(&mut handled, &line, &sent)? {
            count += 1;
            since_commit = since_commit.map(|orders| orders + 1);
        }
    }
    first.kill().await?; // SIGKILL: nothing of it can react
    // What it had printed before it died counts, too.
    while let Some(line) = next_line(&mut lines).await? {
        count += u32::from(note(&mut handled, &line, &sent)?);
    }
    println!("{way}: SIGKILL after {count} orders, and started again");

    let (mut second, mut lines) = start(topic, last)?;
    while let Some(line) = next_line(&mut lines).await? {
        note(&mut handled, &line, &sent)?;
    }
    let status = second.wait().await?;
    if !status.success() {
        bail!("the second worker failed: {status}");
    }
    println!(
        "{way}: sent {ORDERS}, handled {}, lost {}, duplicated {}",
        handled.len(),
        ORDERS as usize - handled.len(),
        handled.values().map(|times| times - 1).sum::<u32>()
    );
    Ok(())
}

/// Returns the offsets, which serve as the orders' numbers: the topic keeps those of earlier runs.
async fn send(brokers: &str, topic: &str) -> anyhow::Result<std::ops::Range<i64>> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    let mut first = None;
    for _ in 0..ORDERS {
        let record = FutureRecord::<str, str>::to(topic)
            .partition(0)
            .payload("order");
        let sent = producer
            .send(record, PATIENCE)
            .await
            .map_err(|(error, _)| error)?;
        first.get_or_insert(sent.offset);
    }
    let first = first.context("nothing was sent")?;
    Ok(first..first + ORDERS)
}

fn start(topic: &str, last: i64) -> anyhow::Result<(Child, Lines<BufReader<ChildStdout>>)> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["worker", topic, &last.to_string()])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let stdout = child.stdout.take().context("its output is not piped")?;
    Ok((child, BufReader::new(stdout).lines()))
}

async fn next_line(lines: &mut Lines<BufReader<ChildStdout>>) -> anyhow::Result<Option<String>> {
    let line = timeout(Duration::from_secs(30), lines.next_line()).await;
    Ok(line.context("the worker has been silent for 30 seconds")??)
}

/// Whether the line tells of an order of this run.
fn note(
    handled: &mut BTreeMap<i64, u32>,
    line: &str,
    sent: &std::ops::Range<i64>,
) -> anyhow::Result<bool> {
    let Some(order) = line.strip_prefix("handled ") else {
        return Ok(false);
    };
    let order = order.parse()?;
    if sent.contains(&order) {
        *handled.entry(order).or_default() += 1;
    }
    Ok(sent.contains(&order))
}

/// The part that readers copy, in both forms. It ends after the order `last`.
async fn worker(brokers: &str, topic: &str, last: i64) -> anyhow::Result<()> {
    let right = topic == RIGHT;
    let consumer: StreamConsumer<Narrator> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", topic)
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "true")
        // Long enough for some work between two commits. The default of 5000 makes the loss rarer, and larger.
        .set("auto.commit.interval.ms", "1000")
        // This is all the difference: true, the default, stores an offset when its record is handed out.
        .set(
            "enable.auto.offset.store",
            if right { "false" } else { "true" },
        )
        // A known member that comes back takes its place at once, without a wait for session.timeout.ms.
        .set("group.instance.id", "worker")
        .create_with_context(Narrator)?;
    consumer.subscribe(&[topic])?;
    let consumer = Arc::new(consumer);

    let (queue, mut orders) = mpsc::channel::<OwnedMessage>(QUEUE);
    let reader = tokio::spawn({
        let consumer = consumer.clone();
        async move {
            loop {
                match consumer.recv().await {
                    Ok(order) => {
                        if queue.send(order.detach()).await.is_err() {
                            return Ok(());
                        }
                    }
                    Err(error @ KafkaError::MessageConsumptionFatal(_)) => return Err(error),
                    Err(error) => eprintln!("waiting for the broker: {error}"),
                }
            }
        }
    });
    while let Some(order) = orders.recv().await {
        sleep(Duration::from_millis(20)).await; // the work
        println!("handled {}", order.offset());
        if right {
            // Orders are done in the order in which they were read. With several workers that would not be so, and
            // this line would skip what is still in work: see kafka_parallel_consumer.
            consumer.store_offset(order.topic(), order.partition(), order.offset())?;
        }
        if order.offset() >= last {
            return match consumer.commit_consumer_state(CommitMode::Sync) {
                // The background commit may have been there first.
                Ok(()) | Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => Ok(()),
                Err(error) => Err(error.into()),
            };
        }
    }
    // The queue is closed, thus the reader has ended.
    Ok(reader.await??)
}

struct Narrator;

impl ClientContext for Narrator {}

impl ConsumerContext for Narrator {
    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        match result {
            Ok(()) => println!("committed"),
            Err(error) => eprintln!("commit failed: {error}"),
        }
    }
}

/// One partition each: its order lets the worker know when it has seen all.
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
    let topics = [WRONG, RIGHT].map(|topic| NewTopic::new(topic, 1, TopicReplication::Fixed(-1)));
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin.create_topics(&topics, &options).await {
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
