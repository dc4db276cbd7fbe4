//! Tracing: one trace from producer to consumer, carried by the record's headers, and metrics beside it
//!
//! A trace that ends at the producer does not say why an order took ten seconds. So the producer writes the W3C
//! `traceparent` of its span into the record's headers, and what the consumer does becomes a part of the same trace.
//! Time per record, failures and lag are metrics that Prometheus can fetch; handling that takes too long is warned of.
//!
//! ```console
//! 1$ METRICS_PORT=0 cargo lab run kafka_tracing
//! metrics: http://127.0.0.1:[..]/metrics
//! waiting for orders
//! 2$ cargo lab run kafka_tracing send
//! trace [..] span [..] parent none: send traced-orders, producer, [..] ms, [..]messaging.kafka.message.key=order-1[..]
//! ...
//! 1:
//! ...
//! trace [..] span [..] parent [..]: charge, internal, [..]
//!  INFO order-1: handled
//! trace [..] span [..] parent [..]: process traced-orders, consumer, [..] ms, [..]messaging.kafka.message.key=order-1
//! ...
//!  WARN order-2: took [..] ms, more than 1000 ms
//! ...
//! ERROR order-3: not an order: [..]
//! trace [..] span [..] parent [..]: process traced-orders, consumer, [..] ms, [..]error.type=invalid_order
//! 1^C
//! left the group
//! ```
//!
//! Notice: each `process` names the producer's span as its parent, in another program. A span for a whole batch has many
//! causes, and gets a link to each (`add_link`) instead of one parent. A header that is missing or broken begins a new
//! trace: the sender's tracing must never be able to stop an order. The metrics are kept in the program and go with it,
//! which suits a consumer; the short life of `send` would end before anybody had fetched them.
//!
//! Try: `curl` the address of the metrics. SLOW_MS=10. To send the spans to a collector, replace `OneLine` by the
//! exporter of the crate opentelemetry-otlp, and `with_simple_exporter`, which makes each span wait, by
//! `with_batch_exporter`: `shutdown` at the end of `main` then sends what is left.
//!
//! Settings: KAFKA_BROKERS (localhost:9092); METRICS_PORT (9464; 0 takes any that is free); SLOW_MS (1000); the argument
//! `send` sends three orders. See also: kafka_lag_monitor, kafka_headers_schema.

use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use metrics::{
    Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use metrics_exporter_prometheus::PrometheusBuilder;
use opentelemetry::InstrumentationScope;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::{SpanId, TracerProvider};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{
    BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance, StreamConsumer,
};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Header, Headers, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, ClientContext, Message, Statistics};
use serde::{Deserialize, Serialize};
use tracing::field::Empty;
use tracing::{Instrument, Span, error, info, info_span, instrument, warn};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};

const TOPIC: &str = "traced-orders";
const GROUP: &str = "traced-orders";
/// Where the names of spans, attributes and metrics below come from. The conventions on messaging are not stable yet, so
/// the version belongs to the names: 1.45 has renamed some of these.
const CONVENTIONS: &str = "https://opentelemetry.io/schemas/1.43.0";
/// In seconds, as the conventions advise for durations.
const BUCKETS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
];
const LONGEST_MS: u64 = 10_000;
const PATIENCE: Duration = Duration::from_secs(5);
/// Time for the last commit.
const LEAVING: Duration = Duration::from_secs(15);

#[derive(Serialize, Deserialize)]
struct Order {
    order_id: String,
    /// How long it takes to charge it: what a real one does not tell.
    work_ms: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let traces = start_tracing()?;
    create_topic(&brokers).await?;
    let ended = match std::env::args().nth(1).as_deref() {
        None => consume(&brokers).await,
        Some("send") => send(&brokers).await,
        Some(_) => bail!("usage: kafka_tracing [send]"),
    };
    traces.shutdown()?;
    ended
}

/// Spans go to the exporter, events (`info!` and the like) to standard output.
fn start_tracing() -> anyhow::Result<SdkTracerProvider> {
    let traces = SdkTracerProvider::builder()
        .with_simple_exporter(OneLine)
        .build();
    let scope = InstrumentationScope::builder("kafka_tracing")
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

async fn send(brokers: &str) -> anyhow::Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
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
            otel.name = format!("send {TOPIC}"),
            otel.kind = "producer",
            otel.status_code = Empty,
            messaging.system = "kafka",
            messaging.operation.name = "send",
            messaging.operation.type = "send",
            messaging.destination.name = TOPIC,
            messaging.destination.partition.id = Empty,
            messaging.kafka.offset = Empty,
            messaging.kafka.message.key = key,
            error.type = Empty,
        );
        let mut headers = Outgoing(OwnedHeaders::new());
        TraceContextPropagator::new().inject_context(&span.context(), &mut headers);
        let record = FutureRecord::to(TOPIC)
            .key(key)
            .payload(&payload)
            .headers(headers.0);
        match producer
            .send(record, PATIENCE)
            .instrument(span.clone())
            .await
        {
            Ok(delivery) => {
                span.record(
                    "messaging.destination.partition.id",
                    delivery.partition.to_string(),
                );
                span.record("messaging.kafka.offset", delivery.offset);
            }
            Err((error, _)) => {
                span.record("otel.status_code", "error");
                span.record("error.type", format!("{:?}", error.rdkafka_error_code()));
                return Err(error).with_context(|| {
                    format!("{key}: no delivery report from {brokers}, it may or may not be sent")
                });
            }
        }
    }
    Ok(())
}

/// Writes the trace context into a record's headers.
struct Outgoing(OwnedHeaders);

impl Injector for Outgoing {
    fn set(&mut self, key: &str, value: String) {
        // `tracestate` belongs to the vendors of tracing systems, and is mostly empty.
        if !value.is_empty() {
            let headers = std::mem::replace(&mut self.0, OwnedHeaders::new());
            let value = Some(&value);
            self.0 = headers.insert(Header { key, value });
        }
    }
}

/// Reads the trace context from a record's headers.
struct Incoming<'a>(Vec<Header<'a, &'a [u8]>>);

impl<'a> Incoming<'a> {
    fn of(record: &'a BorrowedMessage<'_>) -> Incoming<'a> {
        let headers = record.headers();
        let read = AssertUnwindSafe(|| headers.into_iter().flat_map(Headers::iter).collect());
        // The crate panics on a header whose name is not UTF-8, which any other client can write: a broken context.
        Incoming(catch_unwind(read).unwrap_or_default())
    }
}

impl Extractor for Incoming<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        // A key may occur again and again. Who passes a record on appends, so the last is the nearest cause.
        let header = self.0.iter().rfind(|header| header.key == key)?;
        std::str::from_utf8(header.value?).ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.iter().map(|header| header.key).collect()
    }
}

async fn consume(brokers: &str) -> anyhow::Result<()> {
    let port = setting("METRICS_PORT", 9464)?;
    let slow = Duration::from_millis(setting("SLOW_MS", 1000)?);
    let port = u16::try_from(port).context("METRICS_PORT is a port, 0 to 65535")?;
    println!("metrics: http://{}/metrics", serve_metrics(port)?);
    let consumer: StreamConsumer<Observer> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "true")
        // Commit what was handled, and not what was merely read.
        .set("enable.auto.offset.store", "false")
        .set("session.timeout.ms", "10000")
        .set("socket.timeout.ms", "5000")
        // How often the client tells how it is doing, the lag among it.
        .set("statistics.interval.ms", "1000")
        .create_with_context(Observer)?;
    consumer.subscribe(&[TOPIC])?;
    let worked = work(&consumer, slow).await;
    let left = leave(consumer);
    worked?;
    left?;
    println!("left the group");
    Ok(())
}

/// Until Ctrl-C.
async fn work(consumer: &StreamConsumer<Observer>, slow: Duration) -> anyhow::Result<()> {
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let received = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            received = consumer.recv() => received,
        };
        match received {
            Ok(record) => {
                process(&record, slow).await;
                consumer.store_offset_from_message(&record)?;
            }
            Err(error @ KafkaError::MessageConsumptionFatal(_)) => bail!(error),
            // A lost connection, for example: the client tries again by itself, and says so each time.
            Err(error) => eprintln!("waiting for the broker: {error}"),
        }
    }
    Ok(())
}

/// Commits what is done and leaves the group: the others take over now and not after session.timeout.ms.
///
/// With the broker gone, either takes as long as that time, and sometimes never ends (librdkafka 2.12; see its issue 3740
/// for the close). Hence a thread that can be left behind.
fn leave(consumer: StreamConsumer<Observer>) -> anyhow::Result<()> {
    let (done, answers) = mpsc::channel();
    thread::spawn(move || {
        done.send(consumer.commit_consumer_state(CommitMode::Sync))?;
        drop(consumer);
        done.send(Ok(()))
    });
    let committed = answers.recv_timeout(LEAVING);
    if committed.is_err() || answers.recv_timeout(PATIENCE).is_err() {
        eprintln!("left without a word to the group: no broker answers");
    }
    match committed {
        // No offset: all was committed already.
        Ok(Ok(()) | Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset))) => Ok(()),
        Ok(Err(error)) => bail!("the last orders will be read again: {error}"),
        Err(_) => bail!("the last orders will be read again, unless the commit has arrived"),
    }
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
    describe_counter!("messaging.client.consumed.messages", "Records received");
    describe_histogram!(
        "messaging.process.duration",
        Unit::Seconds,
        "Time to handle a record"
    );
    describe_gauge!("kafka_consumergroup_lag", "Records behind the end");
    Ok(address)
}

/// All that is done for one record, as one span. A failure ends in the span and in the metrics.
async fn process(record: &BorrowedMessage<'_>, slow: Duration) {
    let key = String::from_utf8_lossy(record.key().unwrap_or_default()).into_owned();
    let span = info_span!(
        "process",
        otel.name = format!("process {TOPIC}"),
        otel.kind = "consumer",
        otel.status_code = Empty,
        messaging.system = "kafka",
        messaging.operation.name = "process",
        messaging.operation.type = "process",
        messaging.destination.name = TOPIC,
        // A number here, and a string by the conventions, which speak for all brokers.
        messaging.destination.partition.id = record.partition().to_string(),
        messaging.consumer.group.name = GROUP,
        messaging.kafka.offset = record.offset(),
        messaging.kafka.message.key = key,
        error.type = Empty,
    );
    let parent = TraceContextPropagator::new().extract(&Incoming::of(record));
    // Before the span is entered: after that its parent is fixed.
    if let Err(error) = span.set_parent(parent) {
        warn!("{key}: this span stands alone: {error}");
    }
    let labels = [
        ("messaging.system", "kafka"),
        ("messaging.operation.name", "process"),
        ("messaging.destination.name", TOPIC),
        ("messaging.consumer.group.name", GROUP),
    ];
    counter!("messaging.client.consumed.messages", &labels).increment(1);
    async {
        let begun = Instant::now();
        let result = handle(record.payload()).await;
        let took = begun.elapsed();
        let error = match &result {
            Ok(()) => {
                info!("{key}: handled");
                ""
            }
            // It would fail for ever. It stays in the log, at the place that the span names.
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
    }
    .instrument(span)
    .await;
}

async fn handle(payload: Option<&[u8]>) -> anyhow::Result<()> {
    let order: Order = serde_json::from_slice(payload.context("it has no payload")?)?;
    let work = order.work_ms;
    // Ctrl-C waits for it, too.
    ensure!(work <= LONGEST_MS, "{work} ms of work is beyond all reason");
    charge(&order).await;
    Ok(())
}

/// Whatever runs inside of a span and is instrumented, is part of the trace.
#[instrument(skip_all)]
async fn charge(order: &Order) {
    tokio::time::sleep(Duration::from_millis(order.work_ms)).await;
}

struct Observer;

impl ClientContext for Observer {
    fn stats(&self, statistics: Statistics) {
        for (topic, statistics) in statistics.topics {
            for (partition, statistics) in statistics.partitions {
                // Below zero is "not known": not ours, or nothing committed yet.
                if let Ok(lag) = u32::try_from(statistics.consumer_lag) {
                    let labels = [
                        ("consumergroup", GROUP.to_owned()),
                        ("topic", topic.clone()),
                        ("partition", partition.to_string()),
                    ];
                    gauge!("kafka_consumergroup_lag", &labels).set(lag);
                }
            }
        }
    }
}

impl ConsumerContext for Observer {
    fn post_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Assign(list) = rebalance
            && list.count() > 0
        {
            // `println!` would panic on a closed pipe, in the middle of a rebalance.
            let _ = writeln!(io::stdout(), "waiting for orders");
        }
    }
}

/// Left to the broker, the topic would be created by the first record, with the broker's settings.
async fn create_topic(brokers: &str) -> anyhow::Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    // It blocks, but nothing else runs yet.
    admin
        .inner()
        .fetch_metadata(None, PATIENCE)
        .with_context(|| {
            format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one")
        })?;
    // -1 is the broker's default replication factor. One partition, so that the output is in order.
    let topic = NewTopic::new(TOPIC, 1, TopicReplication::Fixed(-1));
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin.create_topics([&topic], &options).await {
        Ok(results) => {
            for result in results {
                match result {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                    Err((topic, code)) => bail!("cannot create topic {topic}: {code}"),
                }
            }
        }
        // Not every cluster lets its clients create topics; librdkafka's mock does not.
        Err(error) => eprintln!("leaving topic {TOPIC} to the broker: {error}"),
    }
    Ok(())
}
