//! Reconnect: what a consumer does by itself while the broker is down, and which errors are final
//!
//! Receives readings while the broker is killed and restarted. The client reconnects by itself, joins its group again and
//! continues where it was. During the outage `recv` returns errors. They are no reason to end: call it again.
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
//! connected again
//! ...
//! partition 0 offset 1: after
//! 2^C
//! left the group
//! ```
//!
//! Notice:
//! - Only the errors in `is_temporary` heal by waiting. Missing rights or a fenced member end the program.
//! - The client logs the address that it cannot reach. A program that installs no logger does not show it.
//! - After an outage a reading can be received again, because its commit is lost.
//!
//! Try: `cargo lab pause kafka`: the connection stays, but nothing answers.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_reconnect, kafka_failover, kafka_graceful_shutdown.

use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::{ClientConfig, Message};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;

const TOPIC: &str = "reconnect-readings";
const GROUP: &str = "reconnect";
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
        .set("allow.auto.create.topics", "true")
        // The longest wait between two attempts to connect. The default is ten seconds.
        .set("reconnect.backoff.max.ms", "1000")
        // Without an answer for this long, a connection counts as lost. The default is a minute.
        .set("socket.timeout.ms", "10000")
        .create()?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer
        .fetch_metadata(Some(TOPIC), TIMEOUT)
        .context(hint)?;
    consumer.subscribe(&[TOPIC])?;

    let received = receive(&consumer).await;
    // Leave the group, so that another member takes over at once. With the broker down, the close can hang
    // (librdkafka issue 3740): wait no longer than TIMEOUT.
    let (done, closed) = oneshot::channel();
    thread::spawn(move || {
        drop(consumer);
        done.send(())
    });
    let closed = timeout(TIMEOUT, closed).await;
    received?;
    closed.context("closed without leaving the group: no broker answers")??;
    println!("left the group");
    Ok(())
}

/// The pattern: calls `recv` again after each temporary error. Ends with Ctrl-C, SIGTERM, or a final error.
async fn receive(consumer: &StreamConsumer) -> anyhow::Result<()> {
    let mut stop = pin!(shutdown());
    let mut connected = true;
    loop {
        let received = tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            received = consumer.recv() => received,
        };
        match received {
            Ok(reading) => {
                if !std::mem::replace(&mut connected, true) {
                    println!("connected again");
                }
                println!(
                    "partition {} offset {}: {}",
                    reading.partition(),
                    reading.offset(),
                    String::from_utf8_lossy(reading.payload().unwrap_or_default())
                );
            }
            // An outage brings several errors in a second. The first says enough.
            Err(error) if is_temporary(&error) => {
                if std::mem::replace(&mut connected, false) {
                    println!("waiting for the broker: {error}");
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// The client reconnects by itself after these errors. Others, such as authorization, do not heal by waiting.
fn is_temporary(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::*;
    matches!(
        error.rdkafka_error_code(),
        Some(
            AllBrokersDown
                | BrokerTransportFailure
                | OperationTimedOut
                | Resolve
                | UnknownTopicOrPartition
        )
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
