//! Metrics: what a consumer tells Prometheus about its work and its lag
//!
//! It counts orders and failures, measures the time per order, and reports the lag of its partitions. The names follow the
//! OpenTelemetry conventions (1.43.0) and the usual lag exporters. An order of more than a second is logged.
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
//! ```
//!
//! Notice:
//! - A partition that moved to another member has lag 0 here. The lag of the group is the sum over all members.
//! - A program that is down reports nothing while its lag grows: kafka_lag_monitor asks the broker.
//!
//! Try: `curl` the address. Send 1500. Start two members and compare their lag. Settings: KAFKA_BROKERS (localhost:9092),
//! METRICS_PORT (9464; 0 takes a free port), RUST_LOG. See also: kafka_tracing.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures::{FutureExt, StreamExt, future};
use metrics::{counter, gauge, histogram};
use metrics_exporter_prometheus::PrometheusBuilder;
use rdkafka::consumer::{CommitMode, Consumer, ConsumerContext, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
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
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let port = std::env::var("METRICS_PORT").unwrap_or_else(|_| "9464".into());
    let port = port.parse().context("METRICS_PORT is not a port")?;
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: StreamConsumer<Lag> = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "true")
        .set("topic.metadata.refresh.interval.ms", "10000") // finds a new topic
        .set("statistics.interval.ms", "1000") // how often the client calls `stats`
        .create_with_context(Lag)?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer.fetch_metadata(Some(TOPIC), TIMEOUT).context(tip)?;
    let tip = format!("cannot serve metrics at port {port}; METRICS_PORT chooses another port");
    let address = serve_metrics(port).context(tip)?;
    println!("metrics: http://{address}/metrics");
    consumer.subscribe(&[TOPIC])?;

    let worked = work(&consumer).await;
    // Commits and leaves the group. With the broker down, this can hang (librdkafka issue 3740).
    let (open, closed) = oneshot::channel::<()>();
    thread::spawn(move || drop((consumer, open)));
    let closed = timeout(TIMEOUT, closed).await;
    worked?;
    closed.map(drop).context("cannot close: no broker answers")
}

/// Works on one order after another. Ends with Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer<Lag>) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    let mut orders = consumer.stream().take_until(stop);
    while let Some(received) = orders.next().await {
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
    Ok(())
}

/// The pattern: counts an order when it arrives, and measures it when it is done, with the kind of its failure.
async fn measured(payload: Option<&[u8]>) -> String {
    // Few values per label: each combination is a time series. So no order id and no error text.
    let mut labels = vec![
        ("messaging_system", "kafka"),
        ("messaging_operation_name", "process"),
        ("messaging_destination_name", TOPIC),
        ("messaging_consumer_group_name", GROUP),
    ];
    counter!("messaging_client_consumed_messages_total", &labels).increment(1);
    let begin = Instant::now();
    let result = process(payload).await;
    let took = begin.elapsed();
    if result.is_err() {
        labels.push(("error_type", "invalid_order"));
    }
    histogram!("messaging_process_duration_seconds", &labels).record(took);
    if took > SLOW {
        tracing::error!("an order took {took:?}, more than {SLOW:?}");
    }
    result.unwrap_or_else(|error| format!("failed: {error}"))
}

/// The work. The payload is its duration in milliseconds. A failed order is skipped: kafka_retry_dlq keeps it.
async fn process(payload: Option<&[u8]>) -> anyhow::Result<String> {
    let millis: u16 = std::str::from_utf8(payload.unwrap_or_default())?.parse()?;
    sleep(Duration::from_millis(millis.into())).await;
    Ok(format!("{millis} ms of work done"))
}

/// Reports the lag that the client knows of.
struct Lag;

impl ConsumerContext for Lag {}

impl ClientContext for Lag {
    fn stats(&self, statistics: Statistics) {
        for (name, topic) in statistics.topics {
            for (partition, state) in topic.partitions {
                let lag = match state.fetch_state.as_str() {
                    _ if partition < 0 => continue, // -1 holds records without a partition
                    // The client still reports the old lag of a lost partition.
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

/// Serves on this machine only: metrics contain internal details, and no login protects them.
fn serve_metrics(port: u16) -> anyhow::Result<SocketAddr> {
    // The exporter does not report the port that it chose, so choose it here.
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?.local_addr()?;
    PrometheusBuilder::new()
        .with_http_listener(address)
        .set_buckets(&[0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0])?
        .install()?;
    Ok(address)
}

/// The client recovers from these errors by itself. Others, such as a missing permission, are final.
fn is_temporary(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    matches!(code, Some(AllBrokersDown | Resolve | OperationTimedOut))
        || matches!(code, Some(BrokerTransportFailure | UnknownTopicOrPartition))
}
