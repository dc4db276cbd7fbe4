//! Tune a consumer: each setting with its reason, and what happens when work takes too long
//!
//! A member shows that its process is alive by heartbeats, which a thread of the client sends. It shows that it makes
//! progress by asking for the next record within `max.poll.interval.ms`. If it does not, it is out of the group, another
//! member gets the partition and repeats the work: at least once. The program learns it when it asks again.
//!
//! ```console
//! 1$ MAX_POLL_INTERVAL_MS=6000 cargo lab run kafka_tuned_consumer
//! 2$ cargo lab run kafka_send -p 0 tuned-jobs 10 9000
//! ...
//! 1:
//! partition 0 offset 0: done, 10 ms of work
//! partition 0 offset 1: done too late: another member repeats it
//! out of the group: [..]PollExceeded[..]
//! partition 0 offset 1: done too late: another member repeats it
//! 1^C
//! ...
//! left the group
//! ```
//!
//! Notice:
//! - Here the consumer is alone, gets its own job back, and never gets past it. Only the warnings of the client tell.
//! - For longer work: pause the partition and poll while a task works, or write the job to a database and commit.
//! - Settings that are not here have good defaults. Remove a setting that you cannot explain.
//!
//! Try: start a second member without MAX_POLL_INTERVAL_MS: it does the job of 9000 ms, and keeps it.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), MAX_POLL_INTERVAL_MS (300000; at least 6000), RUST_LOG.
//! See also: kafka_consumer_group, kafka_parallel_consumer.

use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;
use rdkafka::{ClientConfig, Message};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

const TOPIC: &str = "tuned-jobs";
const GROUP: &str = "tuned-consumer";
/// Ctrl-C waits for a job, so no job is longer.
const LONGEST_MS: u64 = 60_000;
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // Shows the client's warnings: without them a member that leaves its group again and again is silent.
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let limit = std::env::var("MAX_POLL_INTERVAL_MS").unwrap_or_else(|_| "300000".into());
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer = tuned(&brokers, &limit)?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer
        .fetch_metadata(Some(TOPIC), TIMEOUT)
        .context(hint)?;
    consumer.subscribe(&[TOPIC])?;

    let worked = work(&consumer).await;
    // Leave the group, so that another member takes over at once. With the broker down, the close can hang
    // (librdkafka issue 3740): wait no longer than TIMEOUT.
    let (done, closed) = oneshot::channel();
    thread::spawn(move || {
        drop(consumer);
        done.send(())
    });
    let closed = timeout(TIMEOUT, closed).await;
    worked?;
    closed.context("closed without leaving the group: no broker answers")??;
    println!("left the group");
    Ok(())
}

/// The pattern: each setting has a reason.
fn tuned(brokers: &str, limit: &str) -> anyhow::Result<StreamConsumer> {
    let millis: u32 = limit.parse().context("MAX_POLL_INTERVAL_MS is a number")?;
    // The client wants no less than the session timeout, and the broker at least six seconds of that.
    ensure!(millis >= 6000, "MAX_POLL_INTERVAL_MS is at least 6000");
    let consumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", GROUP)
        .set("allow.auto.create.topics", "true")
        // Where a new group begins, and one whose position retention has deleted. The default, `latest`, skips records.
        .set("auto.offset.reset", "earliest")
        // Commits in the background: a commit for each job would cost a request. The default is 5 seconds.
        .set("auto.commit.interval.ms", "1000")
        // Commit what `store_offset_from_message` stores when the job is done. The default stores it on receipt.
        .set("enable.auto.offset.store", "false")
        // A member that is silent for this long is dead, and others take over. A shorter time notices a crash sooner,
        // but also takes a slow network for one. The default is 45 seconds.
        .set("session.timeout.ms", millis.min(10_000).to_string())
        // A third of the session timeout or less: two heartbeats can get lost. The default is 3 seconds.
        .set("heartbeat.interval.ms", "2000")
        // The longest time that one record can take. A program that hangs is noticed after this time.
        .set("max.poll.interval.ms", limit)
        // The broker waits for this many bytes: fewer requests. The default, 1, is right where milliseconds count.
        .set("fetch.min.bytes", "1024")
        // But no longer than this. The Java client calls it `fetch.max.wait.ms`, which is an error here.
        .set("fetch.wait.max.ms", "500")
        // The client reads ahead until it has this many kilobytes or records: for the whole consumer, whatever the number
        // of partitions (a queue made by `split_partition_queue` has its own limit). The defaults, 64 MB and 100,000
        // records, are much memory for a small container. A fetch that is under way can exceed the limit.
        .set("queued.max.messages.kbytes", "16384")
        .set("queued.min.messages", "1000")
        // How long the client waits when that limit is reached. With a small limit, the default of 1000 would show as
        // pauses of a second.
        .set("fetch.queue.backoff.ms", "100")
        .create()?;
    Ok(consumer)
}

/// Works on one job after another, until Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer) -> anyhow::Result<()> {
    let mut stop = pin!(shutdown());
    loop {
        let received = tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            received = consumer.recv() => received,
        };
        match received {
            Ok(job) => handle(consumer, &job).await,
            // The client joins the group again, by itself, when it is asked for the next record.
            Err(error @ KafkaError::MessageConsumption(RDKafkaErrorCode::PollExceeded)) => {
                println!("out of the group: {error}");
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The payload of a job says how many milliseconds of work it is.
async fn handle(consumer: &StreamConsumer, job: &BorrowedMessage<'_>) {
    let at = format!("partition {} offset {}", job.partition(), job.offset());
    let payload = std::str::from_utf8(job.payload().unwrap_or_default());
    let millis = payload.ok().and_then(|text| text.parse().ok());
    match millis.filter(|millis| *millis <= LONGEST_MS) {
        Some(millis) => {
            sleep(Duration::from_millis(millis)).await;
            if consumer.assignment_lost() {
                println!("{at}: done too late: another member repeats it");
            } else {
                println!("{at}: done, {millis} ms of work");
            }
        }
        None => println!("{at}: not a job, skipped"),
    }
    // The client does not commit it when the partition is lost.
    if let Err(error) = consumer.store_offset_from_message(job) {
        eprintln!("{at}: not stored, will be repeated: {error}");
    }
}

/// The client reconnects by itself after these errors. Others, such as authorization, do not heal by waiting.
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
