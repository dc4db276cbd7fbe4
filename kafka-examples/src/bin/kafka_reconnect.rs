//! Reconnect: what a producer does by itself while the broker is down, and which errors are final
//!
//! Sends a tick every 200 ms while the broker is killed and restarted. The client reconnects by itself. Ticks wait in
//! its queue for up to a minute (`message.timeout.ms`). With idempotence, a retry does not write a tick twice or out of
//! order. So an outage that ends in time loses, repeats and reorders nothing.
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
//! every tick is confirmed
//! ```
//!
//! Notice:
//! - A tick that is not confirmed in time can be in the topic or be lost. Then the program ends with status 1, as it does if
//!   ticks are still not confirmed five seconds after the signal.
//! - Every other delivery error ends the program: the client does not try again after it.
//!
//! Try: keep the broker down for more than a minute. Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG.
//! See also: kafka_reconnect_consumer, kafka_failover, kafka_send.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use futures::{FutureExt, StreamExt, TryStreamExt, future, stream};
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

const TOPIC: &str = "reconnect-ticks";
const PAUSE: Duration = Duration::from_millis(200);
const MAX_WAITING: usize = 1000;
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
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
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(Some(TOPIC), TIMEOUT);
    metadata.context(tip)?;
    let missing = send_ticks(&producer).await?;
    ensure!(missing == 0, "{missing} ticks were not confirmed in time");
    println!("every tick is confirmed");
    Ok(())
}

/// Sends a tick every 200 ms, until Ctrl-C or SIGTERM. Returns how many were not confirmed in time.
async fn send_ticks(producer: &FutureProducer) -> anyhow::Result<u32> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    let stop = stop.map(drop).shared();
    let ticks = stream::iter(0..).then(async |number| {
        sleep(PAUSE).await;
        let waiting = producer.in_flight_count();
        if waiting > 0 && waiting % 10 == 0 {
            println!("waiting: {waiting} ticks are not confirmed yet");
        }
        number
    });
    let sent = ticks
        .take_until(stop.clone())
        .map(|number| send(producer, number))
        .buffered(MAX_WAITING);
    tokio::select! {
        missing = sent.try_fold(0, async |sum, missing| Ok(sum + missing)) => missing,
        () = stop.then(|()| sleep(TIMEOUT)) => {
            bail!("{} ticks are not confirmed", producer.in_flight_count())
        }
    }
}

/// The pattern: put a tick into the client's queue, whether the broker is up or not, and await its delivery report.
/// Returns 1 if it was not confirmed in time.
async fn send(producer: &FutureProducer, number: u32) -> anyhow::Result<u32> {
    let payload = number.to_string();
    // One key, so one partition: the ticks stay in order.
    let record = FutureRecord::to(TOPIC).key("tick").payload(&payload);
    match producer.send(record, Duration::ZERO).await {
        Ok(_) => {
            println!("confirmed: tick {number}");
            Ok(0)
        }
        Err((KafkaError::MessageProduction(RDKafkaErrorCode::MessageTimedOut), _)) => {
            println!("not confirmed in time: tick {number}");
            Ok(1)
        }
        Err((error, _)) => Err(error).with_context(|| format!("tick {number}")),
    }
}
