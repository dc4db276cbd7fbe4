//! Tracing: one trace from publisher to consumer, carried by the message's headers
//!
//! A trace that ends at the publisher does not say why an order took ten seconds. So the publisher writes the W3C
//! `traceparent` of its span into the headers of the message, and what the consumer does becomes a part of the same
//! trace. At least once: a redelivered order appears as a second `process` of the same trace.
//!
//! ```console
//! 1$ cargo lab run rabbitmq_tracing
//! waiting for orders; Ctrl-C to stop
//! 2$ cargo lab run rabbitmq_tracing send
//! trace [..] span [..] parent none: send traced-orders, producer, [..] ms, [..]messaging.message.id=order-1[..]
//! ...
//! 1:
//! ...
//! trace [..] span [..] parent [..]: charge, internal, [..]
//!  INFO order-1: handled
//! trace [..] span [..] parent [..]: process traced-orders, consumer, [..] ms, [..]messaging.message.id=order-1[..]
//! ...
//!  WARN order-2: took [..] ms, more than 1000 ms
//! ...
//! ERROR order-3: not an order, rejected: [..]
//! trace [..] span [..] parent [..]: process traced-orders, consumer, [..] ms, [..]error.type=invalid_order
//! 1^C
//! stopped
//! ```
//!
//! Notice: each `process` names the publisher's span as its parent, in another program. AMQP headers are a table with
//! typed values: `traceparent` is a text there, and anything else under that name is passed over. A header that is
//! missing or broken begins a new trace: the sender's tracing must never be able to stop an order. A span for a whole
//! batch has many causes, and gets a link to each (`add_link`) instead of one parent.
//!
//! Try: SLOW_MS=10. Kill the consumer in the middle of order-2 and start it again: two spans of one trace. To send the
//! spans to a collector, replace `OneLine` by the exporter of the crate opentelemetry-otlp, and `with_simple_exporter`,
//! which makes each span wait, by `with_batch_exporter`: `shutdown` at the end of `main` then sends what is left.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); SLOW_MS (1000); the argument `send`
//! sends three orders. See also: kafka_tracing, which has metrics, too; rabbitmq_queue_monitor.

use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    BasicRejectOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use opentelemetry::InstrumentationScope;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::{SpanId, TracerProvider};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use tracing::field::Empty;
use tracing::{Instrument, Span, error, info, info_span, instrument, warn};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::{Targets, filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};

const QUEUE: &str = "traced-orders";
const REJECTED: &str = "traced-orders.rejected";
/// Where the names of spans and attributes below come from. The conventions on messaging are not stable yet, so the
/// version belongs to the names.
const CONVENTIONS: &str = "https://opentelemetry.io/schemas/1.43.0";
/// What would keep the others waiting for longer is rejected.
const LONGEST_MS: u64 = 60_000;
const PERSISTENT: u8 = 2;
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Serialize, Deserialize)]
struct Order {
    order_id: String,
    /// How long it takes to charge it: what a real one does not tell.
    work_ms: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let slow = std::env::var("SLOW_MS").unwrap_or_else(|_| "1000".into());
    let slow = Duration::from_millis(slow.parse().context("SLOW_MS is a whole number")?);
    let command = std::env::args().nth(1);
    let connection = connect(&addr).await?;
    let channel = connection.create_channel().await?;
    declare_queues(&channel).await?;
    let traces = start_tracing()?;
    let ended = match command.as_deref() {
        None => consume(&channel, slow).await,
        Some("send") => send(&channel).await,
        Some(_) => bail!("usage: rabbitmq_tracing [send]"),
    };
    traces.shutdown()?;
    ended?;
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close; what was done last may come back")??;
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_tracing".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

async fn declare_queues(channel: &Channel) -> lapin::Result<()> {
    let durable = QueueDeclareOptions::durable();
    channel
        .queue_declare(REJECTED.into(), durable, FieldTable::default())
        .await?;
    let mut orders = FieldTable::default();
    let mut set = |key: &str, value: &str| {
        orders.insert(key.into(), AMQPValue::LongString(value.into()));
    };
    set("x-dead-letter-exchange", "");
    set("x-dead-letter-routing-key", REJECTED);
    channel.queue_declare(QUEUE.into(), durable, orders).await?;
    Ok(())
}

/// Spans go to the exporter, events (`info!` and the like) to standard output.
fn start_tracing() -> anyhow::Result<SdkTracerProvider> {
    let traces = SdkTracerProvider::builder()
        .with_simple_exporter(OneLine)
        .build();
    let scope = InstrumentationScope::builder("rabbitmq_tracing")
        .with_schema_url(CONVENTIONS)
        .build();
    let spans = tracing_opentelemetry::layer()
        .with_tracer(traces.tracer_with_scope(scope))
        // Fewer attributes, so that a line shows those that matter here.
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false);
    let events = tracing_subscriber::fmt::layer()
        .without_time()
        .with_target(false)
        .with_ansi(false)
        .with_filter(filter_fn(|metadata| metadata.is_event()));
    // lapin has spans and events of its own.
    let ours = Targets::new().with_target(module_path!(), tracing::Level::INFO);
    let all = tracing_subscriber::registry()
        .with(ours)
        .with(spans)
        .with(events);
    tracing::subscriber::set_global_default(all)?;
    Ok(traces)
}

/// Prints a line for each span that has ended.
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

async fn send(channel: &Channel) -> anyhow::Result<()> {
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let order = |order_id: &str, work_ms| {
        serde_json::to_string(&Order {
            order_id: order_id.into(),
            work_ms,
        })
    };
    for (id, body) in [
        ("order-1", order("order-1", 20)?),
        ("order-2", order("order-2", 1200)?),
        ("order-3", "{".into()),
    ] {
        // Name, kind and what is known before the request. `otel.` fields are instructions to the layer.
        let span = info_span!(
            "send",
            otel.name = format!("send {QUEUE}"),
            otel.kind = "producer",
            otel.status_code = Empty,
            messaging.system = "rabbitmq",
            messaging.operation.name = "send",
            messaging.operation.type = "send",
            messaging.destination.name = QUEUE,
            messaging.rabbitmq.destination.routing_key = QUEUE,
            messaging.message.id = id,
            error.type = Empty,
        );
        let mut headers = Outgoing(FieldTable::default());
        TraceContextPropagator::new().inject_context(&span.context(), &mut headers);
        let properties = BasicProperties::default()
            .with_message_id(id.into())
            .with_headers(headers.0);
        // The span lasts until the confirm.
        let sent = publish(channel, &body, properties);
        if let Err(error) = sent.instrument(span.clone()).await {
            span.record("otel.status_code", "error");
            span.record("error.type", "not_confirmed");
            return Err(error.context(format!("{id}: it may or may not be sent")));
        }
    }
    Ok(())
}

async fn publish(channel: &Channel, body: &str, properties: BasicProperties) -> anyhow::Result<()> {
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let properties = properties.with_delivery_mode(PERSISTENT);
    let publish = channel.basic_publish(
        "".into(),
        QUEUE.into(),
        options,
        body.as_bytes(),
        properties,
    );
    let confirmation = timeout(PATIENCE, async { publish.await?.await }).await;
    let confirmation = confirmation.context("no confirm in time")??;
    ensure!(confirmation == Confirmation::Ack(None), "no queue took it");
    Ok(())
}

/// Writes the trace context into a message's headers.
struct Outgoing(FieldTable);

impl Injector for Outgoing {
    fn set(&mut self, key: &str, value: String) {
        // `tracestate` belongs to the vendors of tracing systems, and is mostly empty.
        if !value.is_empty() {
            self.0
                .insert(key.into(), AMQPValue::LongString(value.into()));
        }
    }
}

/// Reads the trace context from a message's headers.
struct Incoming<'a>(Option<&'a FieldTable>);

impl Extractor for Incoming<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match self.0?.inner().get(key)? {
            AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok(),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        let tables = self.0.into_iter();
        tables
            .flat_map(|table| table.inner().keys())
            .map(|key| key.as_str())
            .collect()
    }
}

async fn consume(channel: &Channel, slow: Duration) -> anyhow::Result<()> {
    channel.basic_qos(1, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let mut deliveries = channel
        .basic_consume(QUEUE.into(), "".into(), options, FieldTable::default())
        .await?;
    println!("waiting for orders; Ctrl-C to stop");
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let delivery = tokio::select! {
            // In this order, so that Ctrl-C is also heard of during the first one.
            biased;
            signal = &mut stop => break signal?,
            delivery = deliveries.next() => delivery
                .context("the broker cancelled the consumer; was the queue deleted?")?
                .context("lost the connection")?,
        };
        let handled = process(&delivery, slow).await;
        let settled = if handled {
            timeout(PATIENCE, delivery.ack(BasicAckOptions::default())).await
        } else {
            let options = BasicRejectOptions { requeue: false };
            timeout(PATIENCE, delivery.reject(options)).await
        };
        // Without a limit it may wait for ever: lapin forgets an ack that is under way when the connection is lost.
        let settled = settled.unwrap_or(Ok(false))?;
        ensure!(settled, "lost the connection; the order comes again");
    }
    let cancel = channel.basic_cancel(deliveries.tag(), BasicCancelOptions::default());
    timeout(PATIENCE, cancel)
        .await
        .context("the broker does not answer the cancel")??;
    println!("stopped");
    Ok(())
}

/// All that is done for one message, as one span. Whether it was an order.
async fn process(delivery: &Delivery, slow: Duration) -> bool {
    let id = delivery.properties.message_id().as_ref();
    let id = id.map_or_else(|| "unnamed".to_owned(), ToString::to_string);
    let span = info_span!(
        "process",
        otel.name = format!("process {QUEUE}"),
        otel.kind = "consumer",
        otel.status_code = Empty,
        messaging.system = "rabbitmq",
        messaging.operation.name = "process",
        messaging.operation.type = "process",
        messaging.destination.name = QUEUE,
        messaging.rabbitmq.message.delivery_tag = delivery.delivery_tag,
        messaging.message.id = id,
        error.type = Empty,
    );
    let headers = Incoming(delivery.properties.headers().as_ref());
    let parent = TraceContextPropagator::new().extract(&headers);
    // Before the span is entered: after that its parent is fixed.
    if let Err(error) = span.set_parent(parent) {
        warn!("{id}: this span stands alone: {error}");
    }
    async {
        let begun = Instant::now();
        let result = handle(&delivery.data).await;
        let took = begun.elapsed();
        match &result {
            Ok(()) => info!("{id}: handled"),
            Err(reason) => {
                error!("{id}: not an order, rejected: {reason}");
                Span::current().record("otel.status_code", "error");
                Span::current().record("error.type", "invalid_order");
            }
        }
        if took > slow {
            let (took, slow) = (took.as_millis(), slow.as_millis());
            warn!("{id}: took {took} ms, more than {slow} ms");
        }
        result.is_ok()
    }
    .instrument(span)
    .await
}

async fn handle(body: &[u8]) -> anyhow::Result<()> {
    let order: Order = serde_json::from_slice(body)?;
    let longest = LONGEST_MS;
    ensure!(order.work_ms <= longest, "it takes more than {longest} ms");
    charge(&order).await;
    Ok(())
}

/// Whatever runs inside of a span and is instrumented, is part of the trace.
#[instrument(skip_all)]
async fn charge(order: &Order) {
    tokio::time::sleep(Duration::from_millis(order.work_ms)).await;
}
