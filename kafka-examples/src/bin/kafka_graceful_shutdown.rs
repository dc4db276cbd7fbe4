//! Stop a Kafka consumer: finish the current task, commit it, leave the group
//!
//! After Ctrl-C or SIGTERM it receives no more tasks. It finishes its task, commits, and leaves the group. So after a clean
//! stop no finished task is repeated, and the other members take over without waiting for `session.timeout.ms`.
//! Each step has a time limit. The exit status is 1 if a step failed.
//!
//! ```console
//! 1$ cargo lab run kafka_send -p 0 shutdown-tasks 3
//! ...
//! 2$ cargo lab run kafka_graceful_shutdown
//! offset 0: 3 seconds of work
//! 2^C
//! finishing one task; press Ctrl-C again to abandon it
//! offset 0: done
//! committed
//! left the group
//! ```
//!
//! Notice:
//! - The limits add up to 25 seconds. Kubernetes sends SIGKILL after 30 seconds, Docker after 10: use `docker stop -t 30`.
//! - An abandoned task is not committed: it is repeated, so its effects must be idempotent.
//! - With the broker down, commit and close can hang (librdkafka issue 3740). So a separate thread does both.
//! - `process` must not block its thread: a signal is seen only while it awaits. The runtime also waits for
//!   `spawn_blocking` at its end, without a limit: kafka_production_worker avoids this.
//!
//! Try: send 60 and press Ctrl-C twice. Stop the broker during the work, and press Ctrl-C. Settings: KAFKA_BROKERS
//! (localhost:9092), RUST_LOG. See also: kafka_consumer_group, kafka_idempotent_consumer.

use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use rdkafka::consumer::{CommitMode, Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::message::BorrowedMessage;
use rdkafka::{ClientConfig, Message};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

const TOPIC: &str = "shutdown-tasks";
const GROUP: &str = "shutdown-workers";
/// The limit for the current task.
const FINISH: Duration = Duration::from_secs(15);
/// The limit for the last commit and the close.
const LEAVE: Duration = Duration::from_secs(10);
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.offset.store", "false") // see kafka_consumer_group
        .set("allow.auto.create.topics", "true")
        .set("topic.metadata.refresh.interval.ms", "10000") // finds a new topic
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer.fetch_metadata(Some(TOPIC), TIMEOUT).context(tip)?;
    consumer.subscribe(&[TOPIC])?;

    let worked = work(&consumer).await;
    worked.and(leave(consumer).await) // leaves the group after an error, too
}

/// The pattern, part one: after a signal, receive no more tasks and finish the current one.
async fn work(consumer: &StreamConsumer) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut stop = async || {
        tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
    };
    loop {
        let received = tokio::select! {
            biased;
            () = stop() => return Ok(()),
            received = consumer.recv() => received,
        };
        match received {
            Ok(task) => {
                let mut working = pin!(process(&task));
                tokio::select! {
                    () = &mut working => store(consumer, &task),
                    () = stop() => {
                        finish(working, stop()).await?;
                        store(consumer, &task);
                        return Ok(());
                    }
                }
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits for the task, but no longer than FINISH, and only until a second signal.
async fn finish(task: impl Future, signal: impl Future) -> anyhow::Result<()> {
    println!("finishing one task; press Ctrl-C again to abandon it");
    tokio::select! {
        _ = task => Ok(()),
        _ = signal => bail!("abandoned the task: it will be repeated"),
        () = sleep(FINISH) => bail!("abandoned the task after {FINISH:?}: it will be repeated"),
    }
}

/// The next commit includes this task.
fn store(consumer: &StreamConsumer, task: &BorrowedMessage<'_>) {
    if let Err(error) = consumer.store_offset_from_message(task) {
        eprintln!("not committed, the new owner of the partition repeats the task: {error}");
    }
}

/// The pattern, part two: commit, and close the consumer, which leaves the group.
async fn leave(consumer: StreamConsumer) -> anyhow::Result<()> {
    let (left, answer) = oneshot::channel();
    thread::spawn(move || {
        let committed = consumer.commit_consumer_state(CommitMode::Sync);
        // The close reports no error. So ask whether a broker answers just before it.
        let answered = consumer.fetch_metadata(None, TIMEOUT).map(drop);
        drop(consumer);
        let _ = left.send((committed, answered));
    });
    let reason = "no broker answers: the last tasks may be repeated";
    let (committed, answered) = timeout(LEAVE, answer).await.context(reason)??;
    match committed {
        Ok(()) => println!("committed"),
        Err(KafkaError::ConsumerCommit(NoOffset)) => println!("nothing to commit"),
        Err(error) => bail!("not committed, the last tasks may be repeated: {error}"),
    }
    answered.context("no broker answers: the group was perhaps not left")?;
    println!("left the group");
    Ok(())
}

/// The work. The payload is its duration in seconds; any other payload takes one second.
async fn process(task: &BorrowedMessage<'_>) {
    let payload = String::from_utf8_lossy(task.payload().unwrap_or_default());
    let seconds = payload.parse().unwrap_or(1);
    println!("offset {}: {seconds} seconds of work", task.offset());
    sleep(Duration::from_secs(seconds)).await;
    println!("offset {}: done", task.offset());
}

/// The client recovers from these errors by itself. Others, such as a missing permission, are final.
fn is_temporary(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    matches!(code, Some(AllBrokersDown | Resolve | OperationTimedOut))
        || matches!(code, Some(BrokerTransportFailure | UnknownTopicOrPartition))
        || matches!(code, Some(PollExceeded)) // it joins the group again
}
