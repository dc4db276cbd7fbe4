//! Tracing: one trace from the producer to the consumer, carried by the record's headers
//!
//! The producer writes the W3C `traceparent` of its span into the record, and the consumer's span takes it as its
//! parent. So one trace shows where an order spent its time. If the header is missing or broken, a new trace begins:
//! the tracing of another program never stops an order.
//!
//! ```console
//! 1$ cargo lab run kafka_tracing
//! trace [..] span [..] parent 0000000000000000: send traced-orders, Producer, [..]
//! trace [..] span [..] parent [..]: charge, Internal
//! trace [..] span [..] parent [..]: process traced-orders, Consumer, [..]
//! order-1 charged
//! 2$ cargo lab run kafka_send -H traceparent=00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01 traced-orders order-2
//! ...
//! 1:
//! trace 4bf92f3577b34da6a3ce929d0e0e4736 span [..] parent [..]: charge, Internal
//! trace 4bf92f3577b34da6a3ce929d0e0e4736 span [..] parent 00f067aa0ba902b7: process traced-orders, Consumer, [..]
//! order-2 charged
//! 1^C
//! left the group
//! ```
//!
//! Notice:
//! - A span for a whole batch has many causes: give it a link to each (`add_link`) instead of one parent.
//! - An order that fails is marked in its span and skipped: kafka_retry_dlq keeps such orders.
//!
//! Try: send an empty order. To use a collector, replace `OneLine` by the exporter of opentelemetry-otlp, and
//! `with_simple_exporter`, which makes each span wait, by `with_batch_exporter`.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_metrics, kafka_headers_schema.

use std::collections::HashMap;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use rdkafka::consumer::{CommitMode, Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Header, Headers, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Message};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::field::Empty;
use tracing::{Instrument, info_span, instrument};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use tracing_subscriber::prelude::*;

const TOPIC: &str = "traced-orders";
const GROUP: &str = "traced-orders";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let traces = start_tracing();
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers);
    let producer: FutureProducer = config
        .clone()
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "30000")
        .create()?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(Some(TOPIC), TIMEOUT);
    metadata.context(hint)?;
    send(&producer, "order-1").await?;

    let consumer: StreamConsumer = config
        .set("group.id", GROUP)
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest")
        .create()?;
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
    // A batch exporter sends its last spans now.
    traces.shutdown()?;
    worked?;
    closed.context("closed without leaving the group: no broker answers")??;
    println!("left the group");
    Ok(())
}

/// The producer's half of the pattern: the context of its span goes into the record's headers.
async fn send(producer: &FutureProducer, order: &str) -> anyhow::Result<()> {
    // `otel.*` is for the layer. The other names are those of the OpenTelemetry conventions 1.43.0.
    let span = info_span!(
        "send", otel.name = format!("send {TOPIC}"), otel.kind = "producer", messaging.system = "kafka",
        messaging.operation.name = "send", messaging.operation.type = "send", messaging.destination.name = TOPIC,
    );
    let mut context = HashMap::new();
    TraceContextPropagator::new().inject_context(&span.context(), &mut context);
    let mut headers = OwnedHeaders::new();
    // An empty `tracestate` stays out.
    for (key, value) in context.iter().filter(|(_, value)| !value.is_empty()) {
        let value = Some(value);
        headers = headers.insert(Header { key, value });
    }
    let record = FutureRecord::<str, _>::to(TOPIC).payload(order);
    let sent = producer.send(record.headers(headers), TIMEOUT);
    let sent = sent.instrument(span).await.map_err(|(error, _)| error);
    sent.context("the order is not confirmed")?;
    Ok(())
}

/// Works on one order after another, until Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer) -> anyhow::Result<()> {
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
                println!("{}", process(&order).await);
                consumer.commit_message(&order, CommitMode::Async)?;
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The consumer's half of the pattern: the producer's span is the parent of the span for the work.
async fn process(record: &BorrowedMessage<'_>) -> String {
    let span = info_span!(
        "process", otel.name = format!("process {TOPIC}"), otel.kind = "consumer", otel.status_code = Empty,
        messaging.system = "kafka", messaging.operation.name = "process", messaging.operation.type = "process",
        messaging.destination.name = TOPIC, messaging.destination.partition.id = record.partition().to_string(),
        messaging.kafka.offset = record.offset(), messaging.consumer.group.name = GROUP, error.type = Empty,
    );
    let parent = TraceContextPropagator::new().extract(&context(record));
    // Before the span is entered: afterwards its parent is fixed.
    if let Err(error) = span.set_parent(parent) {
        eprintln!("the span has no parent: {error}");
    }
    let charged = charge(record.payload()).instrument(span.clone()).await;
    charged.unwrap_or_else(|reason| {
        span.record("otel.status_code", "error");
        span.record("error.type", "invalid_order");
        format!("not an order: {reason}")
    })
}

/// The headers of a record that are text.
fn context(record: &BorrowedMessage<'_>) -> HashMap<String, String> {
    let headers = record.headers();
    // A program that forwards a record appends its own context: `collect` keeps the last.
    let texts = || {
        let headers = headers.into_iter().flat_map(Headers::iter);
        let text = |value: &[u8]| String::from_utf8(value.to_vec()).ok();
        headers
            .filter_map(|header| Some((header.key.to_owned(), text(header.value?)?)))
            .collect()
    };
    // rdkafka panics on a header name that is not UTF-8, and another client can write one.
    catch_unwind(AssertUnwindSafe(texts)).unwrap_or_default()
}

/// The work. What is instrumented and runs inside a span is part of its trace.
#[instrument(skip_all)]
async fn charge(payload: Option<&[u8]>) -> anyhow::Result<String> {
    let order = std::str::from_utf8(payload.unwrap_or_default())?;
    ensure!(!order.is_empty(), "it is empty");
    Ok(format!("{order} charged"))
}

/// Sends spans to `OneLine`, and librdkafka's log to standard error.
fn start_tracing() -> SdkTracerProvider {
    let traces = SdkTracerProvider::builder()
        .with_simple_exporter(OneLine)
        .build();
    let spans = tracing_opentelemetry::layer().with_tracer(traces.tracer("kafka_tracing"));
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    tracing_subscriber::registry()
        .with(spans.with_filter(LevelFilter::INFO))
        .with(log.with_filter(EnvFilter::new(filter)))
        .init();
    traces
}

/// Prints a line for each span that has ended.
#[derive(Debug)]
struct OneLine;

impl SpanExporter for OneLine {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        for span in batch {
            let (trace, own) = (span.span_context.trace_id(), span.span_context.span_id());
            let (parent, name, kind) = (span.parent_span_id, span.name, span.span_kind);
            let mut line = format!("trace {trace} span {own} parent {parent}: {name}, {kind:?}");
            for attribute in span.attributes {
                // Others are added by the layer, such as the line of the source.
                if let Some("messaging" | "error") = attribute.key.as_str().split('.').next() {
                    line += &format!(", {}={}", attribute.key, attribute.value);
                }
            }
            // `println!` panics when standard output is closed.
            let _ = writeln!(std::io::stdout(), "{line}");
        }
        Ok(())
    }
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
