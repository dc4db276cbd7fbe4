//! Headers: metadata beside the payload, and one trace from publisher to subscriber
//!
//! Publishes three orders with a content type, an id and tags in their headers, and with the W3C `traceparent` of the
//! publisher's span: what the subscriber does becomes a part of the same trace. Core NATS, at most once; JetStream
//! stores headers with the message.
//!
//! ```console
//! 1$ cargo lab run nats_headers
//! waiting for orders
//! 2$ cargo lab run nats_headers send
//! trace [..] span [..] parent none: send headers.orders, producer, [..]
//! ...
//! 1:
//! order-1: application/json, tags new, gift
//! trace [..] span [..] parent [..]: charge, internal, [..]
//!  INFO order-1: handled
//! trace [..] span [..] parent [..]: process headers.orders, consumer, [..]
//! ...
//!  WARN order-2: took [..] ms, more than 1000 ms
//! ...
//! ERROR order-3: not an order: [..]
//! trace [..] span [..] parent [..]: process headers.orders, consumer, [..]error.type=invalid_order
//! 1^C
//! stopped
//! ```
//!
//! Notice: each `process` names the publisher's span as its parent, in another program. A header that is missing or
//! broken begins a new trace: the sender's tracing must never be able to stop an order. Names of headers are
//! case-sensitive in NATS: `Traceparent` is another header than `traceparent`. A name may occur again and again: `get`
//! gives the first value, `get_all` all. Names that begin with `Nats-` are orders to the server, `Nats-Msg-Id` for
//! example.
//!
//! Try: SLOW_MS=10. Publish with another client and no headers. Payload and headers together may be 1 MB, the server's
//! `max_payload`.
//!
//! Settings: NATS_URL (nats://localhost:4222); SLOW_MS (1000), above which an order is warned of; the argument `send`
//! sends three orders. See also: nats_publish, kafka_tracing.

use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use async_nats::{Client, HeaderMap, Message};
use futures::StreamExt;
use opentelemetry::InstrumentationScope;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::{SpanId, TracerProvider};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};
use tracing::field::Empty;
use tracing::{Instrument, Span, error, info, info_span, instrument, warn};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};

const SUBJECT: &str = "headers.orders";
/// Where the names of spans and attributes below come from. The conventions on messaging are not stable yet, so the
/// version belongs to the names.
const CONVENTIONS: &str = "https://opentelemetry.io/schemas/1.43.0";
/// Whoever sends an order decides how long it takes: only up to this.
const LONGEST_MS: u64 = 10_000;
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Serialize, Deserialize)]
struct Order {
    /// How long it takes to charge it: what a real one does not tell.
    work_ms: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let traces = start_tracing()?;
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    let ended = match std::env::args().nth(1).as_deref() {
        None => receive(&client).await,
        Some("send") => send(&client).await,
        Some(_) => bail!("usage: nats_headers [send]"),
    };
    traces.shutdown()?;
    ended
}

/// Spans go to the exporter, events (`info!` and the like) to standard output.
fn start_tracing() -> anyhow::Result<SdkTracerProvider> {
    let traces = SdkTracerProvider::builder()
        .with_simple_exporter(OneLine)
        .build();
    let scope = InstrumentationScope::builder("nats_headers")
        .with_schema_url(CONVENTIONS)
        .build();
    let spans = tracing_opentelemetry::layer()
        .with_tracer(traces.tracer_with_scope(scope))
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false);
    let events = tracing_subscriber::fmt::layer()
        .without_time()
        .with_target(false)
        .with_ansi(false)
        .with_filter(filter_fn(|metadata| metadata.is_event()));
    let all = tracing_subscriber::registry()
        .with(LevelFilter::INFO)
        // The client writes events of its own.
        .with(filter_fn(|metadata| {
            metadata.target().starts_with("nats_headers")
        }))
        .with(spans)
        .with(events);
    tracing::subscriber::set_global_default(all)?;
    Ok(traces)
}

/// Prints a line for each span that has ended. The crate opentelemetry-otlp has one that sends them to a collector.
#[derive(Debug)]
struct OneLine;

impl SpanExporter for OneLine {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        for span in batch {
            let parent = match span.parent_span_id {
                SpanId::INVALID => "none".into(),
                parent => parent.to_string(),
            };
            let took = span.end_time.duration_since(span.start_time);
            let attributes = span.attributes.iter();
            let attributes: Vec<String> = attributes
                .map(|one| format!("{}={}", one.key, one.value))
                .collect();
            println!(
                "trace {} span {} parent {parent}: {}, {}, {} ms, {}",
                span.span_context.trace_id(),
                span.span_context.span_id(),
                span.name,
                format!("{:?}", span.span_kind).to_lowercase(),
                took.unwrap_or_default().as_millis(),
                attributes.join(" ")
            );
        }
        Ok(())
    }
}

async fn send(client: &Client) -> anyhow::Result<()> {
    for (id, payload) in [
        ("order-1", serde_json::to_vec(&Order { work_ms: 20 })?),
        ("order-2", serde_json::to_vec(&Order { work_ms: 1200 })?),
        ("order-3", b"{".to_vec()),
    ] {
        let span = info_span!(
            "send",
            otel.name = format!("send {SUBJECT}"),
            otel.kind = "producer",
            messaging.system = "nats",
            messaging.operation.name = "send",
            messaging.operation.type = "send",
            messaging.destination.name = SUBJECT,
            messaging.message.id = id,
        );
        let mut headers = HeaderMap::new();
        headers.insert("Content-Type", "application/json");
        headers.insert("Order-Id", id);
        headers.append("Tag", "new");
        headers.append("Tag", "gift");
        TraceContextPropagator::new().inject_context(&span.context(), &mut Outgoing(&mut headers));
        let sent = async {
            client
                .publish_with_headers(SUBJECT, headers, payload.into())
                .await?;
            timeout(PATIENCE, client.flush()).await??;
            anyhow::Ok(())
        };
        let sent = sent.instrument(span).await;
        sent.with_context(|| format!("{id}: it may not be sent"))?;
    }
    Ok(())
}

/// Writes the trace context into a message's headers.
struct Outgoing<'a>(&'a mut HeaderMap);

impl Injector for Outgoing<'_> {
    fn set(&mut self, key: &str, value: String) {
        // `tracestate` belongs to the vendors of tracing systems, and is mostly empty.
        if !value.is_empty() {
            self.0.insert(key, value);
        }
    }
}

/// Reads the trace context from a message's headers.
struct Incoming<'a>(Option<&'a HeaderMap>);

impl Extractor for Incoming<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        // Who passes a message on may append its own: the last is the nearest cause.
        self.0?.get_last(key).map(|value| value.as_str())
    }

    fn keys(&self) -> Vec<&str> {
        let headers = self.0.into_iter().flat_map(HeaderMap::iter);
        headers.map(|(name, _)| name.as_ref()).collect()
    }
}

async fn receive(client: &Client) -> anyhow::Result<()> {
    let slow = std::env::var("SLOW_MS").unwrap_or_else(|_| "1000".into());
    let slow = Duration::from_millis(
        slow.parse()
            .context("SLOW_MS is a number of milliseconds")?,
    );
    let mut orders = client.subscribe(SUBJECT).await?;
    // The server reads in order, so its "no responders" means that it has read the subscription, too.
    let _ = client.request(client.new_inbox(), "".into()).await;
    println!("waiting for orders");
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            order = orders.next() => {
                process(&order.context("the client closed the subscription")?, slow).await;
            }
        }
    }
    // What is here is still worked off. Without a server there would be no end to it.
    orders.drain().await?;
    loop {
        match timeout(PATIENCE, orders.next()).await {
            Ok(Some(order)) => process(&order, slow).await,
            Ok(None) => break,
            Err(_) => bail!("the server is away: what it still had for this program is lost"),
        }
    }
    println!("stopped");
    Ok(())
}

/// All that is done for one message, as one span. A failure ends in the span.
async fn process(message: &Message, slow: Duration) {
    let headers = message.headers.as_ref();
    let header = |name| headers.and_then(|headers| headers.get(name));
    let id = header("Order-Id").map_or("order without id", |id| id.as_str());
    let content_type = header("Content-Type").map_or("no type", |value| value.as_str());
    let tags = headers.map(|headers| headers.get_all("Tag").map(|tag| tag.as_str()).collect());
    let tags: Vec<&str> = tags.unwrap_or_default();
    println!("{id}: {content_type}, tags {}", tags.join(", "));

    let span = info_span!(
        "process",
        otel.name = format!("process {SUBJECT}"),
        otel.kind = "consumer",
        otel.status_code = Empty,
        messaging.system = "nats",
        messaging.operation.name = "process",
        messaging.operation.type = "process",
        messaging.destination.name = SUBJECT,
        messaging.message.id = id,
        error.type = Empty,
    );
    let parent = TraceContextPropagator::new().extract(&Incoming(headers));
    // Before the span is entered: after that its parent is fixed.
    if let Err(error) = span.set_parent(parent) {
        warn!("{id}: this span stands alone: {error}");
    }
    async {
        let begun = Instant::now();
        match handle(&message.payload).await {
            Ok(()) => info!("{id}: handled"),
            Err(reason) => {
                error!("{id}: not an order: {reason}");
                Span::current().record("otel.status_code", "error");
                Span::current().record("error.type", "invalid_order");
            }
        }
        let took = begun.elapsed();
        if took > slow {
            let (took, slow) = (took.as_millis(), slow.as_millis());
            warn!("{id}: took {took} ms, more than {slow} ms");
        }
    }
    .instrument(span)
    .await;
}

async fn handle(payload: &[u8]) -> anyhow::Result<()> {
    let order: Order = serde_json::from_slice(payload)?;
    let asked = order.work_ms;
    ensure!(asked <= LONGEST_MS, "{asked} ms of work are too many");
    charge(&order).await;
    Ok(())
}

/// Whatever runs inside of a span and is instrumented, is part of the trace.
#[instrument(skip_all)]
async fn charge(order: &Order) {
    sleep(Duration::from_millis(order.work_ms)).await;
}
