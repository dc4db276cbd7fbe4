//! A web service that writes to Kafka, with one producer for all requests
//!
//! `POST /orders` answers 202 with partition and offset when all in-sync replicas have the order. It answers 503
//! immediately if the queue is full, and after five seconds if the broker does not confirm the order. On Ctrl-C or
//! SIGTERM, the service answers the open requests, and then flushes the queue.
//!
//! ```console
//! $ PORT=0 cargo lab run kafka_web_service
//! listening on http://127.0.0.1:[..]
//! ^C
//! the queue is empty
//! ```
//!
//! Notice:
//! - A producer has connections, threads and a queue. Create one, and clone it: a clone is cheap.
//! - After 503 the order can be in the topic. The client sends it again with the same `order_id`, and the consumers
//!   ignore the second order: see kafka_idempotent_consumer.
//! - If a client closes its connection early, its order is still written. The flush at the end is for such orders.
//!
//! Try: `curl -i --json '{"order_id":"order-1","amount_cents":995}' localhost:8080/orders`; again with the broker
//! killed. Settings: KAFKA_BROKERS (localhost:9092), PORT (8080; 0 takes a free port), RUST_LOG. See also:
//! kafka_async_producer.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::Context;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Json, Router};
use futures::{FutureExt, future};
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const TOPIC: &str = "web-orders";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let port = std::env::var("PORT").unwrap_or_else(|_| "8080".into());
    let port: u16 = port.parse().context("PORT is not a port")?;
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("enable.idempotence", "true")
        // These two limit how long a request waits, and how many requests wait.
        .set("message.timeout.ms", TIMEOUT.as_millis().to_string())
        .set("queue.buffering.max.messages", "500")
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(Some(TOPIC), TIMEOUT);
    metadata.context(tip)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await;
    let listener = listener.with_context(|| format!("cannot listen at PORT {port}"))?;
    println!("listening on http://{}", listener.local_addr()?);

    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = CancellationToken::new();
    let route = post(create_order).with_state(producer.clone());
    let server = axum::serve(listener, Router::new().route("/orders", route))
        .with_graceful_shutdown(stop.clone().cancelled_owned());
    let server = tokio::spawn(server.into_future());
    future::select(interrupt.recv().boxed(), terminate.recv().boxed()).await;
    stop.cancel();
    if timeout(2 * TIMEOUT, server).await.is_err() {
        eprintln!("some requests did not end; their connections are closed");
    }
    // This blocks the thread. No request needs it now.
    let flushed = producer.flush(TIMEOUT);
    flushed.context("some orders may or may not be written")?;
    println!("the queue is empty");
    Ok(())
}

#[derive(Deserialize, Serialize)]
struct Order {
    order_id: String,
    amount_cents: u64,
}

/// The pattern: the answer waits for the delivery report, and each outcome has its own status.
async fn create_order(
    State(producer): State<FutureProducer>,
    Json(order): Json<Order>,
) -> (StatusCode, String) {
    let payload = json!(order).to_string();
    let record = FutureRecord::to(TOPIC).payload(&payload);
    let record = record.key(&order.order_id);
    // Do not wait for room in the queue. Tell the client immediately that the service is overloaded.
    let sent = producer.send(record, Duration::ZERO).await;
    match sent.map(|at| format!("partition {} offset {}", at.partition, at.offset)) {
        Ok(place) => (StatusCode::ACCEPTED, place),
        Err((error, _)) => {
            tracing::error!("{}: {error}", order.order_id);
            (status(&error), error.to_string())
        }
    }
}

/// 413: the order is too large. 500: the service or the broker is set up wrong. 503: try again.
fn status(error: &KafkaError) -> StatusCode {
    match error.rdkafka_error_code() {
        Some(MessageSizeTooLarge) => StatusCode::PAYLOAD_TOO_LARGE,
        // The client repeats temporary errors by itself, until `message.timeout.ms`.
        Some(QueueFull | MessageTimedOut) => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
