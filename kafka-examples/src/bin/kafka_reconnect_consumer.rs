//! Reconnect: what a consumer does by itself while the broker is down, and which errors are final
//!
//! Receives readings while the broker is killed and restarted. The client reconnects by itself, joins its group again and
//! continues after its last commit (at least once). During the outage it returns errors: the program prints the first and
//! receives again.
//!
//! ```console
//! 1$ cargo lab run kafka_send -p 0 reconnect-readings before
//! ...
//! 2$ cargo lab run kafka_reconnect_consumer
//! partition 0 offset 0: before
//! 1$ cargo lab kill kafka
//! 2:
//! waiting for the broker: [..]
//! 1$ cargo lab restart kafka
//! 1$ cargo lab run kafka_send -p 0 reconnect-readings after
//! ...
//! 2:
//! receiving again
//! ...
//! partition 0 offset 1: after
//! 2^C
//! ```
//!
//! Notice:
//! - The program waits after the errors in `is_temporary`. Other errors, such as a missing permission, end it.
//! - The client logs the address that it cannot reach. Without the `tracing_subscriber` lines, nothing shows it.
//! - After an outage a reading can be received again, because its commit was lost.
//!
//! Try: `cargo lab pause kafka`: the connection stays, but the broker does not answer. Settings: KAFKA_BROKERS
//! (localhost:9092), RUST_LOG. See also: kafka_reconnect, kafka_failover, kafka_graceful_shutdown.

use std::mem::replace;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use futures::{FutureExt, StreamExt, future};
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::{ClientConfig, Message};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;

const TOPIC: &str = "reconnect-readings";
const GROUP: &str = "reconnect";
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
        .set("enable.auto.offset.store", "false") // see kafka_pitfall_auto_commit
        .set("allow.auto.create.topics", "true")
        .set("topic.metadata.refresh.interval.ms", "10000") // finds a new topic
        // The longest wait between two attempts to connect. The default is ten seconds.
        .set("reconnect.backoff.max.ms", "1000")
        // Without an answer for this long, a connection counts as lost. The default is a minute.
        .set("socket.timeout.ms", "10000")
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer.fetch_metadata(Some(TOPIC), TIMEOUT).context(tip)?;
    consumer.subscribe(&[TOPIC])?;

    let worked = receive(&consumer).await;
    // Commits and leaves the group. With the broker down, this can hang (librdkafka issue 3740).
    let (open, closed) = oneshot::channel::<()>();
    thread::spawn(move || drop((consumer, open)));
    let closed = timeout(TIMEOUT, closed).await;
    worked?;
    closed.map(drop).context("cannot close: no broker answers")
}

/// The pattern: receive again after each temporary error. Ends with Ctrl-C, SIGTERM or a final error.
async fn receive(consumer: &StreamConsumer) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    let mut readings = consumer.stream().take_until(stop);
    let mut connected = true;
    while let Some(received) = readings.next().await {
        match received {
            Ok(reading) => {
                if !replace(&mut connected, true) {
                    println!("receiving again");
                }
                let (partition, offset) = (reading.partition(), reading.offset());
                let text = String::from_utf8_lossy(reading.payload().unwrap_or_default());
                println!("partition {partition} offset {offset}: {text}"); // the work
                // Fails when the partition was lost: its new owner repeats the reading.
                let _ = consumer.store_offset_from_message(&reading);
            }
            // During an outage the client returns several errors per second. Print only the first.
            Err(error) if is_temporary(&error) => {
                if replace(&mut connected, false) {
                    println!("waiting for the broker: {error}");
                }
            }
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
        || matches!(code, Some(PollExceeded)) // the work was too slow: it joins the group again
}
