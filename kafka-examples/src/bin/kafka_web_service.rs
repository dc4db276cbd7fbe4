//! A web service that writes to Kafka, with one producer for all requests
//!
//! `POST /orders` answers 202 with partition and offset once all in-sync replicas have the order. It answers 503 if the
//! queue is full, at once, and if the broker does not confirm the order within five seconds. On Ctrl-C and SIGTERM, it
//! answers the requests that it has, and then flushes the queue.
//!
//! ```console
//! $ PORT=0 cargo lab run kafka_web_service
//! listening on http://127.0.0.1:[..]
//! ^C
//! the queue is empty
//! ```
//!
//! Notice:
//! - A producer has connections, threads and a queue: create one, and clone it, which is cheap.
//! - After 503 the order can be in the topic. The client sends it again with the same `order_id`, and consumers ignore
//!   the second: kafka_idempotent_consumer.
//! - 400 is for an order that is not valid, 413 for an order that is too large, 500 for another refusal by the broker.
//! - If a client closes its connection, its order is still written: the flush at the end is for those.
//!
//! Try: `curl -i -d '{"order_id":"order-1","amount_cents":995}' localhost:8080/orders`; again with the broker killed.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), PORT (8080; 0 takes a free port), RUST_LOG. See also: kafka_async_producer.

use std::future::IntoFuture;
use std::net::Ipv4Addr;
use std::pin::pin;
use std::time::Duration;

use anyhow::Context;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Json, Router};
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const TOPIC: &str = "web-orders";
const MAX_BODY: usize = 64 * 1024;
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let port = std::env::var("PORT").unwrap_or_else(|_| "8080".into());
    let port: u16 = port.parse().context("PORT is not a port")?;
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("enable.idempotence", "true")
        // The longest wait of a request, and the most requests that wait.
        .set("message.timeout.ms", TIMEOUT.as_millis().to_string())
        .set("queue.buffering.max.messages", "500")
        .create()?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(Some(TOPIC), TIMEOUT);
    metadata.context(hint)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await;
    let listener = listener
        .with_context(|| format!("cannot listen at port {port}; PORT chooses another port"))?;
    println!("listening on http://{}", listener.local_addr()?);

    let orders = Router::new()
        .route("/orders", post(create_order))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(producer.clone());
    serve(listener, orders).await?;
    // Blocks, but no request is left.
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

/// The pattern: the answer waits for the delivery report, and each outcome has its status.
async fn create_order(
    State(producer): State<FutureProducer>,
    body: Bytes,
) -> (StatusCode, Json<Value>) {
    let refused = |status, reason: String| (status, Json(json!({ "error": reason })));
    let order: Order = match serde_json::from_slice(&body) {
        Ok(order) => order,
        Err(reason) => return refused(StatusCode::BAD_REQUEST, reason.to_string()),
    };
    let payload = json!(order).to_string();
    let record = FutureRecord::to(TOPIC)
        .key(&order.order_id)
        .payload(&payload);
    // Without a wait for room in the queue: a client learns at once that the service is overloaded.
    match producer.send(record, Duration::ZERO).await {
        Ok(at) => {
            let place = json!({ "partition": at.partition, "offset": at.offset });
            (StatusCode::ACCEPTED, Json(place))
        }
        Err((error, _)) => {
            tracing::error!("{}: {error}", order.order_id);
            refused(status(&error), error.to_string())
        }
    }
}

/// Whether the client should try again (503), or the order (413) or the service (500) has to change first.
fn status(error: &KafkaError) -> StatusCode {
    use RDKafkaErrorCode::*;
    match error.rdkafka_error_code() {
        Some(MessageSizeTooLarge) => StatusCode::PAYLOAD_TOO_LARGE,
        Some(
            QueueFull
            | MessageTimedOut
            | RequestTimedOut
            | BrokerTransportFailure
            | NetworkException
            | NotEnoughReplicas
            | NotEnoughReplicasAfterAppend
            | AllBrokersDown,
        ) => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Serves until Ctrl-C or SIGTERM, and then answers the requests that are there. A client that does not finish its request
/// delays the end by no more than two TIMEOUTs.
async fn serve(listener: TcpListener, app: Router) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let server = axum::serve(listener, app).with_graceful_shutdown(stop.clone().cancelled_owned());
    let mut server = pin!(server.into_future());
    tokio::select! {
        biased;
        signal = shutdown() => signal?,
        ended = &mut server => return Ok(ended?),
    }
    stop.cancel();
    match timeout(2 * TIMEOUT, server).await {
        Ok(ended) => Ok(ended?),
        Err(_) => {
            eprintln!("closed connections whose requests did not end");
            Ok(())
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
