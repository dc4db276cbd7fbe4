//! Tracing: one trace from the producer to the consumer, carried by the record's headers
//!
//! The producer writes the W3C `traceparent` of its span into the record, and the consumer's span takes it as its
//! parent. So one trace shows where an order spent its time. If the header is missing or broken, a new trace begins: a
//! broken header never stops an order. The program sends order-2, reads partition 0 up to it, and ends.
//!
//! ```console
//! $ cargo lab run kafka_send -p 0 -H traceparent=00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01 traced-orders order-1
//! ...
//! $ cargo lab run kafka_tracing
//! trace [..] span [..] parent 0000000000000000: send traced-orders, Producer, [..]
//! trace 4bf92f3577b34da6a3ce929d0e0e4736 span [..] parent [..]: charge, Internal
//! trace 4bf92f3577b34da6a3ce929d0e0e4736 span [..] parent 00f067aa0ba902b7: process traced-orders, Consumer, [..]
//! order-1 charged
//! ...
//! order-2 charged
//! ```
//!
//! Notice:
//! - A span for a batch has many causes. Use a link for each of them (`add_link`), and no parent.
//! - An order that fails is marked in its span and skipped: kafka_retry_dlq keeps such orders.
//! - For a collector, use the exporter of opentelemetry-otlp instead of `OneLine`, and `with_batch_exporter`.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_metrics, kafka_headers_schema.

use std::collections::HashMap;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use anyhow::{Context, ensure};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::message::{BorrowedMessage, Header, Headers, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use tracing::field::Empty;
use tracing::{Instrument, info_span, instrument};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use tracing_subscriber::prelude::*;

const TOPIC: &str = "traced-orders";
const PARTITION: i32 = 0;
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let traces = start_tracing();
    let worked = work().await;
    let exported = traces.shutdown(); // a batch exporter sends its last spans now
    worked?;
    exported.context("the last spans are not exported")
}

/// Sends an order, and works on all orders up to this one.
async fn work() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers);
    let producer: FutureProducer = config.clone().set("message.timeout.ms", "30000").create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(Some(TOPIC), TIMEOUT);
    metadata.context(tip)?;
    let last = send(&producer, "order-2").await?;

    let consumer: BaseConsumer = config
        .set("group.id", "kafka_tracing") // required, although it joins no group
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "error") // the default, `latest`, skips orders
        .create()?;
    let mut start = TopicPartitionList::new();
    start.add_partition_offset(TOPIC, PARTITION, Offset::Beginning)?;
    consumer.assign(&start)?;
    let mut offset = -1;
    while offset < last {
        match consumer.poll(TIMEOUT).context("no answer for 5 seconds")? {
            Ok(order) => {
                println!("{}", process(&order).await);
                offset = order.offset();
            }
            // Another address may answer.
            Err(KafkaError::MessageConsumption(AllBrokersDown | BrokerTransportFailure)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The producer's half of the pattern: the context of its span goes into the record's headers. Returns the offset.
async fn send(producer: &FutureProducer, order: &str) -> anyhow::Result<i64> {
    // The tracing layer reads the fields `otel.*`. The other names are those of the OpenTelemetry conventions 1.43.0.
    let span = info_span!(
        "send", otel.name = format!("send {TOPIC}"), otel.kind = "producer", messaging.system = "kafka",
        messaging.operation.name = "send", messaging.operation.type = "send", messaging.destination.name = TOPIC,
    );
    let mut context = HashMap::new();
    TraceContextPropagator::new().inject_context(&span.context(), &mut context);
    let mut headers = OwnedHeaders::new();
    // Leave out an empty `tracestate`.
    for (key, value) in context.iter().filter(|(_, value)| !value.is_empty()) {
        let value = Some(value);
        headers = headers.insert(Header { key, value });
    }
    let record = FutureRecord::<str, _>::to(TOPIC).payload(order);
    let record = record.partition(PARTITION).headers(headers);
    let sent = producer.send(record, TIMEOUT).instrument(span).await;
    let sent = sent.map_err(|(error, _)| error);
    Ok(sent.context("the order is not confirmed")?.offset)
}

/// The consumer's half of the pattern: the producer's span is the parent of the span for the work.
async fn process(record: &BorrowedMessage<'_>) -> String {
    let span = info_span!(
        "process", otel.name = format!("process {TOPIC}"), otel.kind = "consumer", otel.status_code = Empty,
        messaging.system = "kafka", messaging.operation.name = "process", messaging.operation.type = "process",
        messaging.destination.name = TOPIC, messaging.destination.partition.id = record.partition().to_string(),
        messaging.kafka.offset = record.offset(), error.type = Empty,
    );
    let parent = TraceContextPropagator::new().extract(&context(record));
    // Set the parent before the span is entered. Later it cannot change.
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

/// The headers of a record as text. If a name occurs again, the last header counts.
fn context(record: &BorrowedMessage<'_>) -> HashMap<String, String> {
    let texts = AssertUnwindSafe(|| {
        let mut texts = HashMap::new();
        for header in record.headers().into_iter().flat_map(Headers::iter) {
            let value = String::from_utf8_lossy(header.value.unwrap_or_default());
            texts.insert(header.key.to_owned(), value.into_owned());
        }
        texts
    });
    // rdkafka panics if a header name is not UTF-8, and other clients can write such names.
    catch_unwind(texts).unwrap_or_default()
}

/// The work. An instrumented function that runs inside a span belongs to the same trace.
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
            let _ = writeln!(std::io::stdout(), "{line}"); // `println!` panics on a closed pipe
        }
        Ok(())
    }
}
