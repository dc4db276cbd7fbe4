//! Metrics: what a consumer tells Prometheus about its work and its lag
//!
//! It counts the orders and the failures, measures the time per order, and reports the lag of its partitions. The
//! names are those of the OpenTelemetry conventions (1.43.0) and of the usual lag exporters. An order that takes longer
//! than a second is logged.
//!
//! ```console
//! 1$ METRICS_PORT=0 cargo lab run kafka_metrics
//! metrics: http://127.0.0.1:[..]/metrics
//! 2$ cargo lab run kafka_send -k order-1 metered-orders 20 soon
//! ...
//! 1:
//! offset 0: 20 ms of work done
//! offset 1: failed: invalid digit found in string
//! 1^C
//! left the group
//! ```
//!
//! Notice:
//! - `messaging_process_duration_seconds_count` counts orders; those that failed have the label `error_type`.
//! - A partition that another member has taken over counts as 0 here: the sum over all members is the lag.
//! - A program that is down reports nothing while its lag grows: kafka_lag_monitor asks the broker.
//! - A failed order is skipped: kafka_retry_dlq keeps it.
//!
//! Try: `curl` the address. Send 1500. Start two members, stop one, and compare their lag.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), METRICS_PORT (9464; 0 takes a free port), RUST_LOG. See also: kafka_tracing.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::pin::pin;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use metrics::{Unit, counter, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::PrometheusBuilder;
use rdkafka::consumer::{CommitMode, Consumer, ConsumerContext, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::{ClientConfig, ClientContext, Message, Statistics};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

const TOPIC: &str = "metered-orders";
const GROUP: &str = "metered-orders";
const SLOW: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let port = std::env::var("METRICS_PORT").unwrap_or_else(|_| "9464".into());
    let port = port.parse().context("METRICS_PORT is not a port")?;
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: StreamConsumer<Lag> = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "true")
        // How often the client calls `stats`.
        .set("statistics.interval.ms", "1000")
        .create_with_context(Lag)?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer
        .fetch_metadata(Some(TOPIC), TIMEOUT)
        .context(hint)?;
    let address = serve_metrics(port).with_context(|| {
        format!("cannot serve metrics at port {port}; METRICS_PORT chooses another port")
    })?;
    println!("metrics: http://{address}/metrics");
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

/// Works on one order after another, until Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer<Lag>) -> anyhow::Result<()> {
    let mut stop = pin!(shutdown());
    loop {
        // `stop` is polled first, so that its handlers are installed before any work starts. It never interrupts an order.
        let received = tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            received = consumer.recv() => received,
        };
        match received {
            Ok(order) => {
                let outcome = measured(order.payload()).await;
                println!("offset {}: {outcome}", order.offset());
                consumer.commit_message(&order, CommitMode::Async)?;
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The pattern: counts an order when it arrives, and measures it when it is done, with the kind of its failure.
async fn measured(payload: Option<&[u8]>) -> String {
    // Few values per label: each combination is a time series. So no order id and no error text.
    let mut labels = vec![
        ("messaging.system", "kafka"),
        ("messaging.operation.name", "process"),
        ("messaging.destination.name", TOPIC),
        ("messaging.consumer.group.name", GROUP),
    ];
    counter!("messaging.client.consumed.messages", &labels).increment(1);
    let begin = Instant::now();
    let result = process(payload).await;
    let took = begin.elapsed();
    if result.is_err() {
        labels.push(("error.type", "invalid_order"));
    }
    histogram!("messaging.process.duration", &labels).record(took);
    if took > SLOW {
        tracing::error!("an order took {took:?}, more than {SLOW:?}");
    }
    result.unwrap_or_else(|error| format!("failed: {error}"))
}

/// The work. Simulated: an order says how many milliseconds it takes.
async fn process(payload: Option<&[u8]>) -> anyhow::Result<String> {
    let work = std::str::from_utf8(payload.unwrap_or_default())?.parse()?;
    ensure!(work <= 10_000, "{work} ms is too long");
    sleep(Duration::from_millis(work)).await;
    Ok(format!("{work} ms of work done"))
}

/// Reports the lag that the client knows of.
struct Lag;

impl ConsumerContext for Lag {}

impl ClientContext for Lag {
    fn stats(&self, statistics: Statistics) {
        for (name, topic) in statistics.topics {
            for (partition, state) in topic.partitions {
                if partition < 0 {
                    continue; // Not a partition: the client keeps records there whose partition is unknown.
                }
                let lag = match state.fetch_state.as_str() {
                    // The client remembers the lag of a partition that it has lost.
                    "none" | "stopping" | "stopped" => 0,
                    _ if state.consumer_lag >= 0 => state.consumer_lag,
                    // Nothing is committed yet: all records are unread.
                    _ if state.lo_offset >= 0 => state.ls_offset - state.lo_offset,
                    _ => continue,
                };
                let labels = [
                    ("consumergroup", GROUP.to_owned()),
                    ("topic", name.clone()),
                    ("partition", partition.to_string()),
                ];
                gauge!("kafka_consumergroup_lag", &labels).set(lag as f64);
            }
        }
    }
}

/// Serves on this machine only: metrics tell much, and need no login.
fn serve_metrics(port: u16) -> anyhow::Result<SocketAddr> {
    // With port 0 the exporter does not tell its port, so one is chosen here.
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?.local_addr()?;
    PrometheusBuilder::new()
        .with_http_listener(address)
        // `messaging.process.duration` becomes `messaging_process_duration_seconds`.
        .with_recommended_naming(true)
        .set_buckets(&[
            0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
        ])?
        .install()?;
    describe_histogram!(
        "messaging.process.duration",
        Unit::Seconds,
        "Time per order"
    );
    Ok(address)
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
