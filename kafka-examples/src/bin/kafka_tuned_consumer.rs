//! Tune a consumer: each setting with its reason, and what happens when work takes too long
//!
//! The client sends heartbeats by itself. The program must also ask for the next record within `max.poll.interval.ms`. If
//! it does not, the client leaves the group, and another member repeats the work (at least once). The program gets an error
//! when it asks again, and joins the group again.
//!
//! ```console
//! 1$ MAX_POLL_INTERVAL_MS=10000 cargo lab run kafka_tuned_consumer
//! 2$ cargo lab run kafka_send -p 0 tuned-jobs 10 13000
//! ...
//! 1:
//! offset 0: 10 ms of work done
//! offset 1: done too late, another member repeats it
//! waiting: [..]PollExceeded[..]
//! 1^C
//! ```
//!
//! Notice:
//! - One member repeats the job forever, and the client logs a warning (MAXPOLL). A second member without
//!   MAX_POLL_INTERVAL_MS finishes it.
//! - For longer work: pause the partition and poll while a task works, or write the job to a database and commit.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), MAX_POLL_INTERVAL_MS (300000; at least 10000), RUST_LOG.

use std::thread;
use std::time::Duration;

use anyhow::Context;
use futures::{FutureExt, StreamExt, future};
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::{ClientConfig, Message};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

const TOPIC: &str = "tuned-jobs";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("warn,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client warns when it leaves the group
    let limit = std::env::var("MAX_POLL_INTERVAL_MS").unwrap_or_else(|_| "300000".into());
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: StreamConsumer = tuned(&limit).set("bootstrap.servers", &brokers).create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer.fetch_metadata(Some(TOPIC), TIMEOUT).context(tip)?;
    consumer.subscribe(&[TOPIC])?;

    let worked = work(&consumer).await;
    // Commits and leaves the group. With the broker down, this can hang (librdkafka issue 3740).
    let (open, closed) = oneshot::channel::<()>();
    thread::spawn(move || drop((consumer, open)));
    let closed = timeout(TIMEOUT, closed).await;
    worked?;
    closed.map(drop).context("cannot close: no broker answers")
}

/// The pattern: each setting has a reason. Remove a setting that you cannot explain: the defaults are good.
fn tuned(limit: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("group.id", "tuned-consumer")
        .set("allow.auto.create.topics", "true")
        .set("topic.metadata.refresh.interval.ms", "10000") // finds a new topic
        // Where a group without a valid offset starts. The default, `latest`, skips records.
        .set("auto.offset.reset", "earliest")
        // Auto commit commits the stored offsets. The program stores them after the work.
        .set("enable.auto.offset.store", "false")
        // A member that is silent for this long is dead. With a shorter time, a slow network looks like a crash.
        .set("session.timeout.ms", "10000")
        // A third of the session timeout or less: two heartbeats can get lost. The default is 3 seconds.
        .set("heartbeat.interval.ms", "2000")
        // The longest time that one record can take. It must not be less than the session timeout.
        .set("max.poll.interval.ms", limit)
        // The broker waits for this many bytes: fewer requests. The default, 1, is right where milliseconds count.
        .set("fetch.min.bytes", "1024")
        .set("fetch.wait.max.ms", "500") // but no longer than this; the Java client says `fetch.max.wait.ms`
        // The client reads ahead up to this many kilobytes. The default, 64 MB, is much for a small container.
        .set("queued.max.messages.kbytes", "16384");
    config
}

/// Works on one job after another. Ends with Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    let mut jobs = consumer.stream().take_until(stop);
    while let Some(received) = jobs.next().await {
        match received {
            Ok(job) => {
                // The work. The payload is its duration in milliseconds, up to 65535. Any other payload takes none.
                let payload = String::from_utf8_lossy(job.payload().unwrap_or_default());
                let (offset, millis) = (job.offset(), payload.parse::<u16>().unwrap_or(0));
                sleep(Duration::from_millis(millis.into())).await;
                if consumer.assignment_lost() {
                    println!("offset {offset}: done too late, another member repeats it");
                } else {
                    println!("offset {offset}: {millis} ms of work done");
                }
                // The client does not commit it when the partition was lost.
                let _ = consumer.store_offset_from_message(&job);
            }
            Err(error) if is_temporary(&error) => println!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The client recovers from these errors by itself. Others, such as a missing permission, are final.
fn is_temporary(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    matches!(code, Some(AllBrokersDown | Resolve | OperationTimedOut))
        || matches!(code, Some(BrokerTransportFailure | UnknownTopicOrPartition))
        || matches!(code, Some(PollExceeded)) // it joins the group again
}
