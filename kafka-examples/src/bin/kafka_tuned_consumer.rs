//! Tune a Kafka consumer: each setting with its reason, and what happens when work takes too long
//!
//! A member shows that it lives by heartbeats, which a thread of the client sends however busy the program is; and that
//! it gets on by asking for the next record within `max.poll.interval.ms`. If it fails to, the group gives its partitions
//! to others, and its work will be done again: at least once. The program hears of it when it next asks. This one warns
//! in time, notices the loss, and does not store the position of work that no longer counts.
//!
//! ```console
//! $ MAX_POLL_INTERVAL_MS=6000 cargo lab run kafka_tuned_consumer 10 10000 20
//! sent 3 jobs
//! assigned: [0]
//! offset 0: 10 ms of work, [..] ms after it was sent
//! offset 0: done
//! offset 1: 10000 ms of work, [..] ms after it was sent
//! offset 1: still working after 4800 ms; at 6000 ms the group gives its partition away
//! offset 1: done, but too late: the partition is lost, and so is the position
//! out of the group: [..]PollExceeded[..]
//! revoked: [0]
//! assigned: [0]
//! offset 1: 10000 ms of work, [..] ms after it was sent
//! offset 1: done before, and now its position counts
//! offset 2: 20 ms of work, [..] ms after it was sent
//! offset 2: done
//! ^C
//! revoked: [0]
//! jobs done: 3
//! ```
//!
//! Notice: it was lucky to get its own job back, and to remember it. With a second member, that one has it, and both do
//! the work. Without the error's line, which many programs write to a log nobody set up, all that shows is a consumer
//! that does everything twice, or never gets past a job at all.
//!
//! Notice too: a job that is alone takes up to half a second to arrive. That is `fetch.min.bytes` waiting for more.
//!
//! Try: run a second one without arguments, beside the first. Send a job of 12000 ms with the default of five minutes: no
//! heartbeat is missed. For work that can be longer than any limit: pause the partition, work in another task, and go
//! on asking; see kafka_parallel_consumer.
//!
//! Settings: KAFKA_BROKERS (localhost:9092); MAX_POLL_INTERVAL_MS (300000; at least 6000); the arguments are jobs to
//! send first, in milliseconds of work. See also: kafka_consumer_group, kafka_idempotent_consumer.

use std::io::{self, Write};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{
    BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance, StreamConsumer,
};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Timestamp};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, ClientContext, Message, TopicPartitionList};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};

const TOPIC: &str = "tuned-jobs";
const PARTITIONS: i32 = 1;
const GROUP: &str = "tuned-consumer";
/// No job is longer, for Ctrl-C waits for it, too.
const LONGEST_MS: u64 = 60_000;
const PATIENCE: Duration = Duration::from_secs(5);
/// Time for the last commit.
const LEAVING: Duration = Duration::from_secs(15);

#[tokio::main]
async fn main() -> Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let limit: u32 = match std::env::var("MAX_POLL_INTERVAL_MS") {
        Ok(limit) => limit.parse().context("MAX_POLL_INTERVAL_MS is a number")?,
        Err(_) => 300_000,
    };
    // The client wants it to be no shorter than the session timeout, and brokers want 6 seconds of that.
    ensure!(limit >= 6000, "MAX_POLL_INTERVAL_MS is at least 6000");
    let jobs: Vec<u64> = std::env::args()
        .skip(1)
        .map(|job| millis(&job))
        .collect::<Result<_>>()
        .context("the arguments are jobs, in milliseconds of work")?;
    create_topic(&brokers).await?;
    if !jobs.is_empty() {
        send(&brokers, &jobs).await?;
    }

    let consumer: StreamConsumer<Narrator> = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        // Where a new group begins, and one whose position retention has deleted. The default, `latest`, skips all that
        // is there by then.
        .set("auto.offset.reset", "earliest")
        // Every five seconds, in the background: a commit for each job would cost a round trip to the broker.
        .set("enable.auto.commit", "true")
        // Of what was stored below, when the job is done. The default stores it when the job is handed out.
        .set("enable.auto.offset.store", "false")
        // A member that is not heard of for this long is dead, and others take over. Shorter notices a crash sooner,
        // but also takes a pause of the network or of a virtual machine for one. The default is 45 seconds.
        .set("session.timeout.ms", limit.min(10_000).to_string())
        // Two may get lost before the third is too late.
        .set(
            "heartbeat.interval.ms",
            limit.min(10_000).div_ceil(4).to_string(),
        )
        // The longest that one record may take, and all that the client hands out at once is one. A dead lock is
        // noticed after that time, so it is no use to set it to hours.
        .set("max.poll.interval.ms", limit.to_string())
        // Let the broker gather this much before it answers: fewer requests. The default, 1, is right where every
        // millisecond counts.
        .set("fetch.min.bytes", "1024")
        // But no longer than this. `fetch.max.wait.ms` is the Java client's name for it; here it is an error.
        .set("fetch.wait.max.ms", "500")
        // The client reads ahead: up to this many records or kilobytes per partition. The defaults are 100 000 and
        // 64 MB, and for many partitions they are all of the memory. What was read ahead is not yet consumed.
        .set("queued.min.messages", "1000")
        .set("queued.max.messages.kbytes", "16384")
        // A member that joins or leaves takes away only what moves. The default, `range,roundrobin`, stops all of them.
        .set("partition.assignment.strategy", "cooperative-sticky")
        // Bounds the last commit if the brokers are gone by then. The default is a minute.
        .set("socket.timeout.ms", "5000")
        .create_with_context(Narrator)?;
    consumer.subscribe(&[TOPIC])?;
    let done = work(&consumer, Duration::from_millis(limit.into())).await;
    let left = leave(consumer);
    let done = done?;
    left?;
    println!("jobs done: {done}");
    Ok(())
}

/// Until Ctrl-C; returns how many jobs were done. `limit` is max.poll.interval.ms.
async fn work(consumer: &StreamConsumer<Narrator>, limit: Duration) -> anyhow::Result<u32> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for Ctrl-C")?;
    let mut done = 0;
    // The last job that was done and not stored. It is gone when the program is; kafka_idempotent_consumer keeps it.
    let mut late = None;
    loop {
        let received = tokio::select! {
            _ = interrupt.recv() => break,
            received = consumer.recv() => received,
        };
        let message = match received {
            Ok(message) => message,
            Err(error @ KafkaError::MessageConsumptionFatal(_)) => bail!(error),
            // After this error the client joins the group again, by itself, as soon as it is asked for more.
            Err(error @ KafkaError::MessageConsumption(RDKafkaErrorCode::PollExceeded)) => {
                println!("out of the group: {error}");
                continue;
            }
            Err(error) => {
                eprintln!("waiting for the broker: {error}");
                continue;
            }
        };
        let (partition, offset) = (message.partition(), message.offset());
        let Some(work) = job(&message) else {
            // Reported, and passed over: it stays in the log.
            consumer.store_offset_from_message(&message)?;
            continue;
        };
        if late == Some((partition, offset)) {
            println!("offset {offset}: done before, and now its position counts");
            consumer.store_offset_from_message(&message)?;
            continue;
        }
        perform(offset, work, limit).await;
        done += 1;
        // True from when the client has found out until the loss was handled, which happens in `recv`.
        if consumer.assignment_lost() {
            println!(
                "offset {offset}: done, but too late: the partition is lost, and so is the position"
            );
            late = Some((partition, offset));
        } else {
            println!("offset {offset}: done");
            consumer.store_offset_from_message(&message)?;
        }
    }
    Ok(done)
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
        Ok(Err(error)) => bail!("the last jobs will be done again: {error}"),
        Err(_) => bail!("the last jobs will be done again, unless the commit has arrived"),
    }
}

/// How long the work takes, if it is a job.
fn job(message: &BorrowedMessage<'_>) -> Option<Duration> {
    let offset = message.offset();
    let text = String::from_utf8_lossy(message.payload().unwrap_or_default());
    match millis(&text) {
        Ok(millis) => {
            let now = Timestamp::now().to_millis();
            let sent = message.timestamp().to_millis();
            let age = now.zip(sent).map_or(0, |(now, sent)| now - sent);
            println!("offset {offset}: {millis} ms of work, {age} ms after it was sent");
            Some(Duration::from_millis(millis))
        }
        Err(error) => {
            println!("offset {offset}: not a job, skipped: {text:?}: {error}");
            None
        }
    }
}

fn millis(job: &str) -> Result<u64> {
    let millis = job.parse()?;
    ensure!(millis <= LONGEST_MS, "more than {LONGEST_MS}");
    Ok(millis)
}

/// Does the work, and warns while there is still time to do something about it.
async fn perform(offset: i64, work: Duration, limit: Duration) {
    let early = limit.mul_f64(0.8);
    let mut working = std::pin::pin!(sleep(work)); // the work
    if timeout(early, &mut working).await.is_err() {
        println!(
            "offset {offset}: still working after {} ms; at {} ms the group gives its partition away",
            early.as_millis(),
            limit.as_millis()
        );
        working.await;
    }
}

/// Prints what the group does to this member.
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

async fn send(brokers: &str, jobs: &[u64]) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    for job in jobs {
        let job = job.to_string();
        let record = FutureRecord::<str, str>::to(TOPIC).payload(&job);
        let delivery = producer
            .send(record, PATIENCE)
            .await
            .map_err(|(error, _)| error);
        delivery.with_context(|| format!("job {job}: no delivery report from {brokers}"))?;
    }
    println!("sent {} jobs", jobs.len());
    Ok(())
}

/// Left to the broker, the first record would create the topic with the broker's default, often a single partition.
async fn create_topic(brokers: &str) -> Result<()> {
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
