//! The trace of the producer continues in the consumer, and no header stops an order.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use compose::Broker;
use compose::harness::{Example, Finished, TIMEOUT, produce_kafka_record};
use rdkafka::message::{Header, Headers, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message};

use crate::reader;
use crate::shared;

const TOPIC: &str = "traced-orders";

/// Runs it to its end.
fn example(kafka: &Broker) -> Result<Finished> {
    let example = Example::new(env!("CARGO_BIN_EXE_kafka_tracing"));
    example.broker(kafka).spawn()?.wait(TIMEOUT)?.ok()
}

#[derive(Debug)]
struct Span {
    trace: String,
    id: String,
    parent: String,
    name: String,
    kind: String,
    attributes: BTreeMap<String, String>,
}

/// All spans that a program has printed.
fn spans(ended: &Finished) -> Result<Vec<Span>> {
    let lines = ended.stdout.lines();
    let spans = lines.filter(|line| line.starts_with("trace "));
    spans
        .map(|line| {
            let (front, rest) = line.split_once(": ").context("no colon")?;
            let words: Vec<&str> = front.split(' ').collect();
            let [_, trace, _, id, _, parent] = words[..] else {
                anyhow::bail!("not a span: {line}");
            };
            let mut parts = rest.split(", ");
            let name = parts.next().unwrap_or_default().into();
            let kind = parts.next().context("no kind")?.into();
            let attributes = parts.filter_map(|one| one.split_once('='));
            Ok(Span {
                trace: trace.into(),
                id: id.into(),
                parent: parent.into(),
                name,
                kind,
                attributes: attributes
                    .map(|(key, value)| (key.into(), value.into()))
                    .collect(),
            })
        })
        .collect()
}

impl Span {
    fn has(&self, name: &str, value: &str) -> bool {
        self.attributes
            .get(name)
            .is_some_and(|found| found == value)
    }
}

/// The only span that was made for the record at this place.
fn processed(spans: &[Span], offset: i64) -> Result<&Span> {
    let mut found = spans.iter().filter(|span| {
        span.name == "process traced-orders"
            && span.has("messaging.destination.partition.id", "0")
            && span.has("messaging.kafka.offset", &offset.to_string())
    });
    let span = found
        .next()
        .with_context(|| format!("no span for {offset} in {spans:?}"))?;
    ensure!(found.next().is_none(), "two spans for {offset}");
    Ok(span)
}

const NONE: &str = "0000000000000000";

#[test]
fn trace_of_producer_continues_in_consumer() -> Result<()> {
    let kafka = shared::kafka(&["kafka_tracing"])?;
    let ended = example(&kafka)?;
    assert!(ended.stdout.ends_with("order-2 charged\n"));

    let records = reader::read(&kafka, TOPIC, "read_uncommitted")?;
    assert_eq!(records.len(), 1);
    let headers = records[0].headers().context("no headers")?;
    assert_eq!(headers.count(), 1);
    assert_eq!(headers.get(0).key, "traceparent");
    let header = String::from_utf8(headers.get(0).value.context("no value")?.to_vec())?;

    let spans = spans(&ended)?;
    let names: Vec<&str> = spans.iter().map(|span| &*span.name).collect();
    assert_eq!(
        names,
        ["send traced-orders", "charge", "process traced-orders"]
    );
    let (send, charge, process) = (&spans[0], &spans[1], &spans[2]);
    assert_eq!((&*send.kind, &*process.kind), ("Producer", "Consumer"));
    assert_eq!(send.parent, NONE);
    assert_eq!(header, format!("00-{}-{}-01", send.trace, send.id));
    assert_eq!((&process.trace, &process.parent), (&send.trace, &send.id));
    assert_eq!((&charge.trace, &charge.parent), (&send.trace, &process.id));
    for (name, value) in [
        ("messaging.system", "kafka"),
        ("messaging.destination.name", TOPIC),
        ("messaging.kafka.offset", "0"),
        ("messaging.destination.partition.id", "0"),
    ] {
        assert!(process.has(name, value), "{process:?}");
    }
    assert!(!process.attributes.contains_key("error.type"));
    Ok(())
}

#[tokio::test]
async fn foreign_context_is_continued_and_broken_context_stops_nothing() -> Result<()> {
    let kafka = shared::kafka(&["kafka_tracing"])?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let (trace, span) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let good = format!("00-{trace}-{span}-01");
    let old = format!("00-{}-{}-01", "1".repeat(32), "2".repeat(16));
    let contexts: [(&str, Vec<&[u8]>); 5] = [
        ("foreign", vec![good.as_bytes()]),
        // Each program that forwards a record appends its context.
        ("passed-on", vec![old.as_bytes(), good.as_bytes()]),
        ("none", vec![]),
        ("broken", vec![b"00-xyz-1-01"]),
        ("no-text", vec![b"\xff\xfe"]),
    ];
    let mut places = Vec::new();
    for (payload, values) in &contexts {
        let headers = values.iter().fold(OwnedHeaders::new(), |all, value| {
            all.insert(Header {
                key: "traceparent",
                value: Some(*value),
            })
        });
        let record = FutureRecord::<str, _>::to(TOPIC)
            .partition(0)
            .payload(*payload)
            .headers(headers);
        let at = producer.send(record, TIMEOUT).await;
        places.push(at.map_err(|(error, _)| error)?.offset);
    }
    // Payloads that are not an order.
    let bad: [Option<&[u8]>; 3] = [None, Some(b""), Some(b"\xff\xfe")];
    for payload in bad {
        let mut record = FutureRecord::<[u8], [u8]>::to(TOPIC).partition(0);
        record.payload = payload;
        let at = producer.send(record, TIMEOUT).await;
        places.push(at.map_err(|(error, _)| error)?.offset);
    }
    // rdkafka cannot read the first header name. This order goes to partition 0, too.
    let odd: [(&[u8], &[u8]); 2] = [(b"\xff\xfe", b"?"), (b"traceparent", good.as_bytes())];
    produce_kafka_record(&kafka, TOPIC, None, &odd, b"odd")?;

    let ended = example(&kafka)?;
    let handled = |line: &&str| line.ends_with(" charged") || line.starts_with("not an order: ");
    let count = ended.stdout.lines().filter(handled).count();
    assert_eq!(count, places.len() + 2, "{}", ended.stdout);
    let handled = spans(&ended)?;
    for ((name, _), offset) in contexts.iter().zip(&places) {
        let process = processed(&handled, *offset)?;
        if ["foreign", "passed-on"].contains(name) {
            assert_eq!((&*process.trace, &*process.parent), (trace, span), "{name}");
        } else {
            assert_eq!(process.parent, NONE, "{name}");
            assert_ne!(process.trace, trace, "{name}");
        }
        assert!(!process.attributes.contains_key("error.type"), "{name}");
    }
    for offset in &places[contexts.len()..] {
        let process = processed(&handled, *offset)?;
        assert!(process.has("error.type", "invalid_order"), "{process:?}");
    }
    let odd = processed(&handled, 8)?;
    assert_eq!(odd.parent, NONE);
    Ok(())
}
