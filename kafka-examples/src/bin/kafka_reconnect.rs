//! Reconnect: what a producer does by itself while the broker is down, and which errors are final
//!
//! Sends a tick every 200 ms while the broker is killed and restarted. The client reconnects by itself. Ticks wait in its
//! queue for up to a minute (`message.timeout.ms`), and idempotence keeps retries from writing a tick twice or in another
//! order. So an outage of less than a minute loses, repeats and reorders nothing.
//!
//! ```console
//! 1$ cargo lab run kafka_reconnect
//! confirmed: tick 0
//! 2$ cargo lab kill kafka
//! 1:
//! ...
//! waiting: [..] ticks are not confirmed yet
//! 2$ cargo lab restart kafka
//! 1:
//! ...
//! confirmed: tick [..]
//! 1^C
//! ...
//! all ticks are confirmed
//! ```
//!
//! Notice:
//! - "not confirmed in time" is not a failure: the tick can be in the topic, and only its confirmation is lost.
//! - Every other error of a delivery is final: sending the tick again would end in the same way.
//! - The client logs the address that it cannot reach. A program that installs no logger does not show it.
//!
//! Try: keep the broker down for more than a minute. `cargo lab pause kafka`: the connection stays, but nothing answers.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_reconnect_consumer, kafka_failover, kafka_send.

use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::stream::{FuturesOrdered, StreamExt};
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::interval;

const TOPIC: &str = "reconnect-ticks";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("enable.idempotence", "true")
        // How long a tick may wait. The default is five minutes.
        .set("message.timeout.ms", "60000")
        // The longest wait between two attempts to connect. The default is ten seconds.
        .set("reconnect.backoff.max.ms", "1000")
        // Without an answer for this long, a connection counts as lost. The default is a minute.
        .set("socket.timeout.ms", "10000")
        .create()?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(Some(TOPIC), TIMEOUT);
    metadata.context(hint)?;

    let sent = send_ticks(&producer).await;
    // `flush` blocks until the queue is empty, or for TIMEOUT.
    let (done, flushed) = oneshot::channel();
    thread::spawn(move || {
        let _ = producer.flush(TIMEOUT);
        done.send(producer.in_flight_count())
    });
    let waiting = flushed.await;
    sent?;
    let waiting = waiting?;
    ensure!(
        waiting == 0,
        "{waiting} ticks are not confirmed, and are given up"
    );
    println!("all ticks are confirmed");
    Ok(())
}

/// Puts a tick into the queue every 200 ms, whether the broker is up or not, and prints the delivery reports. Ends with
/// Ctrl-C, SIGTERM, or a final error.
async fn send_ticks(producer: &FutureProducer) -> anyhow::Result<()> {
    let mut stop = pin!(shutdown());
    let mut clock = interval(Duration::from_millis(200));
    let mut reports = FuturesOrdered::new();
    let mut next = 0;
    loop {
        tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            _ = clock.tick() => {
                let (number, payload) = (next, next.to_string());
                // One key, so one partition: the ticks stay in order.
                let record = FutureRecord::to(TOPIC).key("tick").payload(&payload);
                let report = producer.send_result(record).map_err(|(error, _)| error);
                let report = report.with_context(|| format!("tick {number} is refused"))?;
                reports.push_back(async move { (number, report.await) });
                next += 1;
                if reports.len() % 10 == 0 {
                    println!("waiting: {} ticks are not confirmed yet", reports.len());
                }
            }
            Some((number, report)) = reports.next() => match report? {
                Ok(_) => println!("confirmed: tick {number}"),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::MessageTimedOut), _)) => {
                    println!("not confirmed in time: tick {number}");
                }
                Err((error, _)) => {
                    return Err(error).with_context(|| format!("tick {number} is refused"));
                }
            },
        }
    }
}

/// Ctrl-C, or SIGTERM, which Docker, Kubernetes and systemd send.
async fn shutdown() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupt = tokio::signal::ctrl_c() => interrupt,
        _ = terminate.recv() => Ok(()),
    }
}
