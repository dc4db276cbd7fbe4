//! The trace that the producer begins is the consumer's, too, and the metrics say what was done.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT, produce_kafka_record};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Header, Headers, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use crate::shared;

const TOPIC: &str = "traced-orders";

fn example() -> Example {
    Example::new(env!("CARGO_BIN_EXE_kafka_tracing")).env("METRICS_PORT", "0")
}

/// A consumer that has its partition, and the address of its metrics.
fn consumer(kafka: &Broker, slow_ms: &str) -> Result<(Running, String)> {
    let mut consumer = example().env("SLOW_MS", slow_ms).broker(kafka).spawn()?;
    let line = consumer.wait_for("metrics: ", TIMEOUT)?;
    let address = line
        .strip_prefix("metrics: http://")
        .and_then(|rest| rest.strip_suffix("/metrics"))
        .context("no address")?
        .to_owned();
    consumer.wait_for("waiting for orders", TIMEOUT)?;
    Ok((consumer, address))
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
fn spans(program: &mut Running) -> Result<Vec<Span>> {
    let lines = program.lines();
    let spans = lines.iter().filter(|line| line.starts_with("trace "));
    spans
        .map(|line| {
            let (front, rest) = line.split_once(": ").context("no colon")?;
            let words: Vec<&str> = front.split(' ').collect();
            let [_, trace, _, id, _, parent] = words[..] else {
                anyhow::bail!("not a span: {line}");
            };
            let parts: Vec<&str> = rest.splitn(4, ", ").collect();
            let [name, kind, _, attributes] = parts[..] else {
                anyhow::bail!("not a span: {line}");
            };
            let attributes = attributes.split(' ').filter_map(|one| one.split_once('='));
            Ok(Span {
                trace: trace.into(),
                id: id.into(),
                parent: parent.into(),
                name: name.into(),
                kind: kind.into(),
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

fn of<'a>(spans: &'a [Span], name: &str, key: &str) -> Result<&'a Span> {
    let mut found = spans
        .iter()
        .filter(|span| span.name == name && span.has("messaging.kafka.message.key", key));
    let span = found
        .next()
        .with_context(|| format!("no span {name} of {key} in {spans:?}"))?;
    ensure!(found.next().is_none(), "two spans {name} of {key}");
    Ok(span)
}

fn scrape(address: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(
        stream,
        "GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    Ok(answer)
}

/// The value of the one sample with this name and these labels.
fn sample(metrics: &str, name: &str, labels: &[&str]) -> Option<f64> {
    let mut samples = metrics.lines().filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let rest = series.strip_prefix(name)?;
        let all = labels.iter().all(|label| rest.contains(label));
        (rest.starts_with('{') && all)
            .then_some(value)?
            .parse()
            .ok()
    });
    samples.next()
}

/// The value of `traceparent` in the records of the topic, by key.
fn traceparents(kafka: &Broker, count: usize) -> Result<BTreeMap<String, String>> {
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "judge")
        .create()?;
    let mut at = TopicPartitionList::new();
    at.add_partition_offset(TOPIC, 0, Offset::Beginning)?;
    reader.assign(&at)?;
    let deadline = Instant::now() + TIMEOUT;
    let mut found = BTreeMap::new();
    while found.len() < count {
        ensure!(Instant::now() < deadline, "cannot read {TOPIC}");
        let Some(record) = reader.poll(Duration::from_secs(1)) else {
            continue;
        };
        let record = record?;
        let headers = record.headers().context("no headers")?;
        let names: Vec<&str> = headers.iter().map(|header| header.key).collect();
        ensure!(names == ["traceparent"], "{names:?}");
        let value = headers.get(0).value.context("no value")?;
        let key = String::from_utf8(record.key().unwrap_or_default().to_vec())?;
        found.insert(key, String::from_utf8(value.to_vec())?);
    }
    Ok(found)
}

#[test]
fn the_trace_goes_from_the_producer_through_the_headers_to_the_consumer() -> Result<()> {
    let kafka = shared::kafka(&["kafka_tracing"])?;
    // A threshold that one of the orders passes, and the other does not.
    let (mut consumer, address) = consumer(&kafka, "1000")?;
    let mut sender = example().args(["send"]).broker(&kafka).spawn()?;
    sender.wait(TIMEOUT)?.ok()?;
    consumer.wait_for("WARN order-2: took ", TIMEOUT)?;
    consumer.wait_for("error.type=invalid_order", TIMEOUT)?;

    // The lag arrives with the client's next statistics, and falls to zero once that is committed.
    let deadline = Instant::now() + TIMEOUT;
    let lag = |metrics: &str| sample(metrics, "kafka_consumergroup_lag", &[r#"partition="0""#]);
    let metrics = loop {
        let metrics = scrape(&address)?;
        if lag(&metrics) == Some(0.0) {
            break metrics;
        }
        ensure!(Instant::now() < deadline, "no lag of 0: {metrics}");
        std::thread::sleep(Duration::from_millis(100));
    };
    let topic = r#"messaging_destination_name="traced-orders""#;
    let received = sample(
        &metrics,
        "messaging_client_consumed_messages_total",
        &[topic],
    );
    assert_eq!(received, Some(3.0), "{metrics}");
    let name = "messaging_process_duration_seconds_count";
    let failed = sample(&metrics, name, &[topic, r#"error_type="invalid_order""#]);
    assert_eq!(failed, Some(1.0), "{metrics}");
    let fine = metrics
        .lines()
        .find(|line| line.starts_with(name) && !line.contains("error_type"));
    assert!(fine.is_some_and(|line| line.ends_with(" 2")), "{metrics}");
    let bucket = "messaging_process_duration_seconds_bucket";
    let within = |limit: &str| {
        let limit = format!(r#"le="{limit}""#);
        let line = metrics.lines().find(|line| {
            line.starts_with(bucket) && line.contains(&limit) && !line.contains("error_type")
        });
        line.and_then(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
    };
    // order-2 took longer than a second, the other need not have.
    assert!(within("1").is_some_and(|count| count <= 1), "{metrics}");
    assert_eq!(within("+Inf"), Some(2), "{metrics}");

    consumer.interrupt()?;
    consumer.wait(TIMEOUT)?.ok()?;
    ensure!(
        !consumer
            .lines()
            .iter()
            .any(|line| line.contains("WARN order-3"))
    );

    let headers = traceparents(&kafka, 3)?;
    let (sent, handled) = (spans(&mut sender)?, spans(&mut consumer)?);
    assert_eq!(sent.len(), 3);
    for (key, header) in &headers {
        let send = of(&sent, "send traced-orders", key)?;
        let process = of(&handled, "process traced-orders", key)?;
        assert_eq!(*header, format!("00-{}-{}-01", send.trace, send.id));
        assert_eq!(process.trace, send.trace, "{key}");
        assert_eq!(process.parent, send.id, "{key}");
        assert_eq!((&*send.kind, &*process.kind), ("producer", "consumer"));
        assert_eq!(send.parent, "none");
        let offset = &send.attributes["messaging.kafka.offset"];
        assert!(process.has("messaging.kafka.offset", offset), "{process:?}");
        assert!(process.has("messaging.destination.partition.id", "0"));
        assert!(process.has("messaging.consumer.group.name", "traced-orders"));
        let charge = handled
            .iter()
            .find(|span| span.name == "charge" && span.parent == process.id);
        assert_eq!(charge.is_some(), key != "order-3", "{handled:?}");
        assert!(charge.is_none_or(|charge| charge.trace == send.trace));
        assert_eq!(
            process.attributes.contains_key("error.type"),
            key == "order-3"
        );
    }
    let traces: Vec<&String> = sent.iter().map(|span| &span.trace).collect();
    assert!(
        traces[0] != traces[1] && traces[1] != traces[2],
        "{traces:?}"
    );
    Ok(())
}

/// Another program's trace is continued; a broken one neither stops the order nor is continued.
#[tokio::test]
async fn a_foreign_or_broken_context_stops_nothing() -> Result<()> {
    let kafka = shared::kafka(&["kafka_tracing"])?;
    let (mut consumer, address) = consumer(&kafka, "60000")?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let (trace, span) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let good = format!("00-{trace}-{span}-01");
    let old = format!("00-{}-{}-01", "1".repeat(32), "2".repeat(16));
    let contexts: [(&str, Vec<&[u8]>); 5] = [
        ("foreign", vec![good.as_bytes()]),
        // Appended by each that passed it on.
        ("passed-on", vec![old.as_bytes(), good.as_bytes()]),
        ("none", vec![]),
        ("broken", vec![b"00-xyz-1-01"]),
        ("no-text", vec![b"\xff\xfe"]),
    ];
    for (key, values) in &contexts {
        let headers = values.iter().fold(OwnedHeaders::new(), |all, value| {
            all.insert(Header {
                key: "traceparent",
                value: Some(*value),
            })
        });
        let payload = format!(r#"{{"order_id":"{key}","work_ms":0}}"#);
        let record = FutureRecord::to(TOPIC)
            .partition(0)
            .key(*key)
            .payload(&payload)
            .headers(headers);
        let sent = producer.send(record, TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
    }
    // Neither are these an end of it.
    let endless = format!(r#"{{"order_id":"endless","work_ms":{}}}"#, u64::MAX);
    let bad: [Option<&[u8]>; 5] = [
        None,
        Some(b""),
        Some(b"\xff\xfe"),
        Some(&[b'x'; 900_000]),
        Some(endless.as_bytes()),
    ];
    for payload in bad {
        let record = FutureRecord::<[u8], [u8]> {
            payload,
            ..FutureRecord::to(TOPIC).partition(0)
        };
        let sent = producer.send(record, TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
    }
    for _ in bad {
        consumer.wait_for("error.type=invalid_order", TIMEOUT)?;
    }
    // Where the name of one header cannot be read, none can.
    let odd: [(&[u8], &[u8]); 2] = [(b"\xff\xfe", b"?"), (b"traceparent", good.as_bytes())];
    produce_kafka_record(
        &kafka,
        TOPIC,
        None,
        &odd,
        br#"{"order_id":"odd","work_ms":0}"#,
    )?;
    let last = consumer.wait_for("messaging.kafka.offset=10", TIMEOUT)?;
    ensure!(last.contains(" parent none: process "), "{last}");
    ensure!(!last.contains("error.type"), "{last}");
    let metrics = scrape(&address)?;
    let received = sample(&metrics, "messaging_client_consumed_messages_total", &[]);
    assert_eq!(received, Some(11.0), "{metrics}");
    consumer.interrupt()?;
    consumer.wait(TIMEOUT)?.ok()?;
    let handled = spans(&mut consumer)?;
    for (key, _) in contexts {
        let process = of(&handled, "process traced-orders", key)?;
        if key == "foreign" || key == "passed-on" {
            assert_eq!((&*process.trace, &*process.parent), (trace, span), "{key}");
        } else {
            assert_eq!(process.parent, "none", "{key}");
            assert_ne!(process.trace, trace, "{key}");
        }
    }
    // Where the group will go on, asked of the broker.
    let judge: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "traced-orders")
        .create()?;
    let mut at = TopicPartitionList::new();
    at.add_partition(TOPIC, 0);
    let at = judge.committed_offsets(at, TIMEOUT)?;
    assert_eq!(at.elements()[0].offset(), Offset::Offset(11));
    Ok(())
}

#[test]
fn a_port_that_is_taken_is_an_error_that_says_so() -> Result<()> {
    let kafka = shared::kafka(&["kafka_tracing"])?;
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = taken.local_addr()?.port().to_string();
    for (port, message) in [
        (
            port.as_str(),
            format!("Error: cannot serve metrics at 127.0.0.1:{port}; METRICS_PORT"),
        ),
        ("65536", "Error: METRICS_PORT is a port, 0 to 65535".into()),
        (
            "http",
            "Error: METRICS_PORT is \"http\", not a whole number".into(),
        ),
    ] {
        let mut consumer = example().env("METRICS_PORT", port).broker(&kafka).spawn()?;
        let ended = consumer.wait(TIMEOUT)?;
        assert_eq!(ended.code(), 1);
        assert!(ended.stderr.contains(&message), "{}", ended.stderr);
        assert_eq!(ended.stdout, "");
    }
    Ok(())
}
