//! Stop a Kafka consumer: finish the task in hand, commit it, leave the group
//!
//! After Ctrl-C or SIGTERM it receives no more tasks. It finishes its task, commits, and leaves the group. So no task is
//! repeated or lost, and another member takes over at once, and not after `session.timeout.ms`. Each step has a time limit.
//! The exit status is 1 if a step failed.
//!
//! ```console
//! 1$ cargo lab run kafka_send -p 0 shutdown-tasks 3
//! ...
//! 2$ cargo lab run kafka_graceful_shutdown
//! offset 0: 3 seconds of work
//! 2^C
//! finishing one task; a second Ctrl-C gives it up
//! offset 0: done
//! committed
//! left the group
//! ```
//!
//! Notice:
//! - The limits add up to 25 seconds. Kubernetes sends SIGKILL 30 seconds after SIGTERM, Docker after 10.
//! - A task that is given up is not committed: another member repeats it. So its effects must be idempotent.
//! - With the broker down, commit and close can hang (librdkafka issue 3740). So a thread of its own does both. The
//!   program ends without it. With `spawn_blocking`, the runtime would wait for it.
//! - Records that the client has fetched but not handed out are not committed.
//!
//! Try: send 60 and press Ctrl-C twice. Stop the broker during the work, and press Ctrl-C.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_consumer_group, kafka_idempotent_consumer.

use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use rdkafka::consumer::{CommitMode, Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;
use rdkafka::{ClientConfig, Message};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

const TOPIC: &str = "shutdown-tasks";
const GROUP: &str = "shutdown-workers";
/// For the task in hand.
const FINISH: Duration = Duration::from_secs(15);
/// For the last commit, and again for the close.
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        // Commits in the background, but only what the program has stored after the work.
        .set("enable.auto.commit", "true")
        .set("enable.auto.offset.store", "false")
        .set("allow.auto.create.topics", "true")
        .create()?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer
        .fetch_metadata(Some(TOPIC), TIMEOUT)
        .context(hint)?;
    consumer.subscribe(&[TOPIC])?;

    let worked = work(&consumer).await;
    // After an error, too.
    let left = leave(consumer).await;
    worked?;
    left
}

/// The pattern, part one: a signal stops the receiving at once, and the task in hand is finished.
async fn work(consumer: &StreamConsumer) -> anyhow::Result<()> {
    let mut stop = pin!(shutdown());
    loop {
        // `stop` is polled first, so that its handlers are installed before any work starts.
        let received = tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            received = consumer.recv() => received,
        };
        let task = match received {
            Ok(task) => task,
            Err(error) if is_temporary(&error) => {
                eprintln!("waiting: {error}");
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let mut working = pin!(process(&task));
        tokio::select! {
            () = &mut working => store(consumer, &task)?,
            signal = &mut stop => {
                signal?;
                finish(working).await?;
                return store(consumer, &task);
            }
        }
    }
}

/// The next commit includes this task.
fn store(consumer: &StreamConsumer, task: &BorrowedMessage<'_>) -> anyhow::Result<()> {
    match consumer.store_offset_from_message(task) {
        Err(KafkaError::StoreOffset(RDKafkaErrorCode::State)) => {
            // The new owner of the partition repeats the task.
            eprintln!("not committed: partition {} is lost", task.partition());
            Ok(())
        }
        stored => Ok(stored?),
    }
}

/// Waits for the task, but no longer than FINISH, and only until a second signal.
async fn finish(task: impl Future<Output = ()>) -> anyhow::Result<()> {
    println!("finishing one task; a second Ctrl-C gives it up");
    tokio::select! {
        () = task => Ok(()),
        () = sleep(FINISH) => bail!("gave up the task after {FINISH:?}: it will be repeated"),
        signal = shutdown() => {
            signal?;
            bail!("gave up the task: it will be repeated")
        }
    }
}

/// The pattern, part two: commit, and close the consumer, which leaves the group.
async fn leave(consumer: StreamConsumer) -> anyhow::Result<()> {
    let (commit_done, committed) = oneshot::channel();
    let (close_done, closed) = oneshot::channel();
    thread::spawn(move || {
        let _ = commit_done.send(consumer.commit_consumer_state(CommitMode::Sync));
        // The close does not report whether a broker heard it.
        let answered = consumer.fetch_metadata(None, TIMEOUT).map(drop);
        drop(consumer);
        close_done.send(answered)
    });
    let committed = timeout(TIMEOUT, committed).await;
    let closed = timeout(TIMEOUT, closed).await;
    match committed.context("not committed, the last tasks will be repeated: no answer")?? {
        // No offset: everything was committed already.
        Ok(()) | Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => {}
        Err(error) => bail!("not committed, the last tasks will be repeated: {error}"),
    }
    println!("committed");
    let closed = closed
        .context("the close hangs")
        .and_then(|answered| Ok(answered??));
    closed.context("closed without leaving the group: no broker answers")?;
    println!("left the group");
    Ok(())
}

/// The work: its payload is a number of seconds.
async fn process(task: &BorrowedMessage<'_>) {
    let payload = std::str::from_utf8(task.payload().unwrap_or_default()).unwrap_or_default();
    let seconds = payload.parse().unwrap_or(1);
    println!("offset {}: {seconds} seconds of work", task.offset());
    sleep(Duration::from_secs(seconds)).await;
    println!("offset {}: done", task.offset());
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
