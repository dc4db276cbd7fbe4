//! Tracing: one trace from producer to consumer, carried by the message's properties, and metrics beside it
//!
//! A trace that ends at the producer does not say why an order took ten seconds. So the producer writes the W3C
//! `traceparent` of its span into the message's properties, and what the consumer does becomes a part of the same
//! trace. Time per message and failures are metrics that Prometheus can fetch; handling that takes too long is warned
//! of.
//!
//! ```console
//! 1$ METRICS_PORT=0 cargo lab run pulsar_tracing
//! metrics: http://127.0.0.1:[..]/metrics
//! waiting for orders
//! 2$ cargo lab run pulsar_tracing send
//! trace [..] span [..] parent none: send traced-orders, producer, [..] ms, [..]messaging.pulsar.message.key=order-1[..]
//! ...
//! 1:
//! trace [..] span [..] parent [..]: charge, internal, [..]
//!  INFO order-1: handled
//! trace [..] span [..] parent [..]: process traced-orders, consumer, [..] ms, [..]messaging.pulsar.message.key=order-1
//! ...
//!  WARN order-2: took [..] ms, more than 1000 ms
//! ...
//! ERROR order-3: not an order: [..]
//! trace [..] span [..] parent [..]: process traced-orders, consumer, [..] ms, [..]error.type=invalid_order
//! 1^C
//! closed
//! ```
//!
//! Notice: each `process` names the producer's span as its parent, in another program. Properties are text, and a
//! property that is missing or broken begins a new trace: the sender's tracing must never be able to stop an order. A
//! message that comes again has the same parent, and a second span. The client has a feature `telemetry` of its own; it
//! traces the client's inside, and carries nothing over the wire.
//!
//! Try: `curl` the address of the metrics. SLOW_MS=10. To send the spans to a collector, replace `OneLine` by the
//! exporter of the crate opentelemetry-otlp, and `with_simple_exporter`, which makes each span wait, by
//! `with_batch_exporter`: `shutdown` at the end of `main` then sends what is left.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650); METRICS_PORT (9464; 0 takes any that is free); SLOW_MS (1000);
//! the argument `send` sends three orders. See also: pulsar_backlog_monitor, kafka_tracing.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use futures::{FutureExt, StreamExt, TryStreamExt};
use metrics::{Unit, counter, describe_counter, describe_histogram, histogram};
use metrics_exporter_prometheus::PrometheusBuilder;
use opentelemetry::InstrumentationScope;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{SpanId, TracerProvider};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use pulsar::consumer::{InitialPosition, Message};
use pulsar::message::proto::KeyValue;
use pulsar::{Consumer, ConsumerOptions, Producer, Pulsar, SubType, TokioExecutor};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use tracing::field::Empty;
use tracing::{Instrument, Span, error, info, info_span, instrument, warn};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};

const TOPIC: &str = "persistent://public/default/traced-orders";
const NAME: &str = "traced-orders";
const SUBSCRIPTION: &str = "traced-orders";
/// Where the names of spans, attributes and metrics below come from. The conventions on messaging are not stable yet,
/// so the version belongs to the names: 1.45 has renamed some of these.
const CONVENTIONS: &str = "https://opentelemetry.io/schemas/1.43.0";
/// In seconds, as the conventions advise for durations.
const BUCKETS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
];
const PATIENCE: Duration = Duration::from_secs(5);
/// What a message says is to be doubted: one number could hold up all behind it.
const LONGEST_WORK_MS: u64 = 10_000;

#[derive(Serialize, Deserialize)]
struct Order {
    order_id: String,
    /// How long it takes to charge it: what a real one does not tell.
    work_ms: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let traces = start_tracing()?;
    let ended = match std::env::args().nth(1).as_deref() {
        None => consume(&pulsar, &address).await,
        Some("send") => send(&pulsar).await,
        Some(_) => bail!("usage: pulsar_tracing [send]"),
    };
    traces.shutdown()?;
    ended
}

/// Spans go to the exporter, events (`info!` and the like) to standard output.
fn start_tracing() -> anyhow::Result<SdkTracerProvider> {
    let traces = SdkTracerProvider::builder()
        .with_simple_exporter(OneLine)
        .build();
    let scope = InstrumentationScope::builder("pulsar_tracing")
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
    let all = tracing_subscriber::registry()
        .with(LevelFilter::INFO)
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

async fn send(pulsar: &Pulsar<TokioExecutor>) -> anyhow::Result<()> {
    let mut producer = pulsar.producer().with_topic(TOPIC).build().await?;
    let order = |order_id: &str, work_ms| {
        serde_json::to_string(&Order {
            order_id: order_id.into(),
            work_ms,
        })
    };
    for (key, payload) in [
        ("order-1", order("order-1", 20)?),
        ("order-2", order("order-2", 1200)?),
        ("order-3", "{".into()),
    ] {
        // Name, kind and what is known before the request. `otel.` fields are instructions to the layer.
        let span = info_span!(
            "send",
            otel.name = format!("send {NAME}"),
            otel.kind = "producer",
            otel.status_code = Empty,
            messaging.system = "pulsar",
            messaging.operation.name = "send",
            messaging.operation.type = "send",
            messaging.destination.name = TOPIC,
            messaging.message.id = Empty,
            messaging.pulsar.message.key = key,
            error.type = Empty,
        );
        // A map of texts is a carrier as it is. `tracestate` belongs to the vendors of tracing systems, and is mostly
        // empty.
        let mut properties = HashMap::new();
        TraceContextPropagator::new().inject_context(&span.context(), &mut properties);
        properties.retain(|_, value| !value.is_empty());
        let message = pulsar::producer::Message {
            payload: payload.into(),
            partition_key: Some(key.into()),
            properties,
            ..Default::default()
        };
        match stored(&mut producer, message)
            .instrument(span.clone())
            .await
        {
            Ok(place) => drop(span.record("messaging.message.id", place)),
            Err(error) => {
                span.record("otel.status_code", "error");
                span.record("error.type", "no_receipt");
                return Err(error).with_context(|| format!("{key}: it may or may not be stored"));
            }
        }
    }
    Ok(producer.close().await?)
}

/// Where it is stored, by the receipt.
async fn stored(
    producer: &mut Producer<TokioExecutor>,
    message: pulsar::producer::Message,
) -> anyhow::Result<String> {
    let receipt = producer.send_non_blocking(message).await?;
    let receipt = timeout(PATIENCE, receipt).await.context("no receipt")??;
    let place = receipt
        .message_id
        .context("a receipt without a message id")?;
    Ok(format!("{}:{}", place.ledger_id, place.entry_id))
}

/// Reads the trace context from a message's properties.
struct Incoming<'a>(&'a [KeyValue]);

impl Extractor for Incoming<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        let mut all = self.0.iter();
        all.find(|property| property.key == key)
            .map(|property| property.value.as_str())
    }

    fn keys(&self) -> Vec<&str> {
        self.0
            .iter()
            .map(|property| property.key.as_str())
            .collect()
    }
}

async fn consume(pulsar: &Pulsar<TokioExecutor>, address: &str) -> anyhow::Result<()> {
    let port = setting("METRICS_PORT", 9464)?;
    let slow = Duration::from_millis(setting("SLOW_MS", 1000)?);
    let port = u16::try_from(port).context("METRICS_PORT is a port, 0 to 65535")?;
    println!("metrics: http://{}/metrics", serve_metrics(port)?);
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(20);
    let mut consumer: Consumer<Vec<u8>, _> = pulsar
        .consumer()
        .with_topic(TOPIC)
        .with_subscription(SUBSCRIPTION)
        .with_subscription_type(SubType::Failover)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(10)
        .with_options(options)
        .build()
        .await?;
    println!("waiting for orders");
    let mut kept = false;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let message = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            message = consumer.try_next() => message?.with_context(|| format!("lost the connection to {address}"))?,
        };
        kept |= !process(&message, slow).await;
        // What is not an order stays in the backlog, and with it the batch that it came in.
        if last_of_batch(&message) && !std::mem::take(&mut kept) {
            consumer.ack(&message).await?;
        }
    }
    close(consumer).await?;
    println!("closed");
    Ok(())
}

/// To the broker a batch is one entry, and the ack of one of its messages is the ack of all: only the last may be
/// acknowledged. A message that came alone is the last.
fn last_of_batch<T>(message: &pulsar::consumer::Message<T>) -> bool {
    let index = message.message_id().batch_index.unwrap_or_default();
    let size = message.message_id.batch_size;
    size.is_none_or(|size| index + 1 >= size)
}

/// Gives back what was fetched ahead: while its queue is full, the client's close waits for the client itself. A batch
/// comes whole, however small the queue is: its rest is taken, and if there is yet another, all is tried again.
async fn close(mut consumer: Consumer<Vec<u8>, TokioExecutor>) -> anyhow::Result<()> {
    let closed = async {
        loop {
            let mut whole = true;
            while let Some(Ok(message)) = match whole {
                true => consumer.next().now_or_never().flatten(),
                false => consumer.next().await,
            } {
                whole = last_of_batch(&message);
            }
            if let Ok(closed) = timeout(PATIENCE / 10, consumer.close()).await {
                return closed;
            }
        }
    };
    timeout(PATIENCE, closed)
        .await
        .context("the last acks may not have arrived: no answer to the close")??;
    Ok(())
}

fn setting(name: &str, default: u64) -> anyhow::Result<u64> {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{name} is {text:?}, not a whole number")),
        Err(_) => Ok(default),
    }
}

/// For this machine only: metrics tell much, and ask nobody who he is.
fn serve_metrics(port: u16) -> anyhow::Result<SocketAddr> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let in_use = || format!("cannot serve metrics at {address}; METRICS_PORT chooses another port");
    // The exporter would not say which port it was given for 0.
    let address = TcpListener::bind(address)
        .and_then(|probe| probe.local_addr())
        .with_context(in_use)?;
    PrometheusBuilder::new()
        .with_http_listener(address)
        // `messaging.process.duration` becomes `messaging_process_duration_seconds`.
        .with_recommended_naming(true)
        .set_buckets(&BUCKETS)?
        .install()
        .with_context(in_use)?;
    describe_counter!("messaging.client.consumed.messages", "Messages received");
    describe_histogram!(
        "messaging.process.duration",
        Unit::Seconds,
        "Time to handle a message"
    );
    Ok(address)
}

/// All that is done for one message, as one span. A failure ends in the span and in the metrics.
async fn process(message: &Message<Vec<u8>>, slow: Duration) -> bool {
    let key = message.key().unwrap_or_default();
    let place = message.message_id();
    let span = info_span!(
        "process",
        otel.name = format!("process {NAME}"),
        otel.kind = "consumer",
        otel.status_code = Empty,
        messaging.system = "pulsar",
        messaging.operation.name = "process",
        messaging.operation.type = "process",
        messaging.destination.name = message.topic,
        messaging.destination.subscription.name = SUBSCRIPTION,
        messaging.message.id = format!("{}:{}", place.ledger_id, place.entry_id),
        messaging.pulsar.message.key = key,
        error.type = Empty,
    );
    let parent = TraceContextPropagator::new().extract(&Incoming(&message.metadata().properties));
    // Before the span is entered: after that its parent is fixed.
    if let Err(error) = span.set_parent(parent) {
        warn!("{key}: this span stands alone: {error}");
    }
    let labels = [
        ("messaging.system", "pulsar"),
        ("messaging.operation.name", "process"),
        ("messaging.destination.name", NAME),
        ("messaging.destination.subscription.name", SUBSCRIPTION),
    ];
    counter!("messaging.client.consumed.messages", &labels).increment(1);
    async {
        let begun = Instant::now();
        let result = handle(&message.payload.data).await;
        let took = begun.elapsed();
        let error = match &result {
            Ok(()) => {
                info!("{key}: handled");
                ""
            }
            Err(reason) => {
                error!("{key}: not an order: {reason}");
                Span::current().record("otel.status_code", "error");
                Span::current().record("error.type", "invalid_order");
                "invalid_order"
            }
        };
        if took > slow {
            let (took, slow) = (took.as_millis(), slow.as_millis());
            warn!("{key}: took {took} ms, more than {slow} ms");
        }
        let labels = labels.into_iter().chain([("error.type", error)]);
        let labels: Vec<_> = labels.filter(|(_, value)| !value.is_empty()).collect();
        histogram!("messaging.process.duration", &labels).record(took);
        result.is_ok()
    }
    .instrument(span)
    .await
}

async fn handle(payload: &[u8]) -> anyhow::Result<()> {
    let order: Order = serde_json::from_slice(payload)?;
    ensure!(
        order.work_ms <= LONGEST_WORK_MS,
        "{} ms of work are beyond all reason",
        order.work_ms
    );
    charge(&order).await;
    Ok(())
}

/// Whatever runs inside of a span and is instrumented, is part of the trace.
#[instrument(skip_all)]
async fn charge(order: &Order) {
    tokio::time::sleep(Duration::from_millis(order.work_ms)).await;
}

/// Left alone, the client retries for more than a minute, in silence.
async fn connect(address: &str) -> anyhow::Result<Pulsar<TokioExecutor>> {
    let client = Pulsar::builder(address, TokioExecutor).build();
    let connected = timeout(PATIENCE, client).await;
    Ok(connected.with_context(|| {
        format!("no Pulsar broker answers at {address}; `cargo lab up pulsar` starts one")
    })??)
}
