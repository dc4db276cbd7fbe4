//! Each event is read in the version of its header, or is reported with the reason.

use anyhow::{Result, ensure};
use compose::Broker;
use compose::harness::{Example, TIMEOUT, produce_kafka_record};
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};

use crate::administrator::create_topic;
use crate::reader::send_large;
use crate::shared;

const TOPIC: &str = "schema-events";

type Bytes<'a> = Option<&'a [u8]>;

/// The lines that the reader prints for all events of the topic.
fn lines(kafka: &Broker) -> Result<Vec<String>> {
    let reader = Example::new(env!("CARGO_BIN_EXE_kafka_headers_schema"));
    let ended = reader.broker(kafka).spawn()?.wait(TIMEOUT)?.ok()?;
    Ok(ended.stdout.lines().map(str::to_owned).collect())
}

async fn send(
    kafka: &Broker,
    versions: &[&[u8]],
    key: Bytes<'_>,
    payload: Bytes<'_>,
) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("message.max.bytes", "1100000")
        .create()?;
    let mut record = FutureRecord::<[u8], [u8]>::to(TOPIC).partition(4);
    (record.key, record.payload) = (key, payload);
    let mut headers = OwnedHeaders::new();
    for version in versions {
        let value = Some(*version);
        let key = "schema-version";
        headers = headers.insert(Header { key, value });
    }
    let sent = producer.send(record.headers(headers), TIMEOUT).await;
    sent.map_err(|(error, _)| error)?;
    Ok(())
}

#[tokio::test]
async fn known_versions_are_read_and_other_events_are_reported() -> Result<()> {
    let kafka = shared::kafka(&["kafka_headers_schema"])?;
    // More partitions than the broker would choose.
    create_topic(&kafka, TOPIC, 5, &[]).await?;
    let spaces = vec![b' '; 1_040_000];
    let long = "9".repeat(5000);
    let wordy = format!(r#"{{"order_id":"x","amount":"{long}"}}"#);
    let event: Bytes<'_> = Some(br#"{"order_id":"x","amount":1}"#);
    let bad: [(&[&[u8]], Bytes<'_>, Bytes<'_>); 12] = [
        (&[b"1.1"], None, Some(b"\xff\xfe")),
        (&[b"1.1"], Some(b"\xff"), Some(b"")),
        (&[b"1.1"], Some(b"k"), None),
        (&[b"2.0"], None, event),
        (&[b"10.1"], None, event),
        (&[b"\xff"], None, event),
        (&[b"one"], None, event),
        (&[], Some(b"k"), event),
        (&[b"1.0"], None, Some(&spaces)),
        (&[b"1.0"], None, Some(wordy.as_bytes())),
        (&[long.as_bytes()], None, event),
        // The last header counts.
        (&[b"1.0", b"2.0"], None, event),
    ];
    for (versions, key, payload) in bad {
        send(&kafka, versions, key, payload).await?;
    }
    let new_field = br#"{"order_id":"good","amount":1,"new":[]}"#;
    send(&kafka, &[b"1.0"], None, Some(new_field)).await?;
    let currency = br#"{"order_id":"next","amount":1,"currency":"USD"}"#;
    send(&kafka, &[b"2.0", b"1.7"], None, Some(currency)).await?;

    let lines = lines(&kafka)?;
    assert_eq!(lines.len(), bad.len() + 2, "{lines:?}");
    for (offset, line) in lines[..bad.len()].iter().enumerate() {
        let start = format!("partition 4 offset {offset} not read: ");
        ensure!(line.starts_with(&start), "{line}");
    }
    ensure!(lines[3].ends_with(": version 2.0, this reader knows 1.x"));
    ensure!(lines[7].ends_with(": no header schema-version"));
    let order = r#"OrderPlaced { order_id: "good", amount: 1, currency: "EUR" }"#;
    let good = format!("partition 4 offset 12: version 1.0: {order}");
    assert_eq!(lines[12], good);
    let order = r#"OrderPlaced { order_id: "next", amount: 1, currency: "USD" }"#;
    let next = format!("partition 4 offset 13: version 1.7: {order}");
    assert_eq!(lines[13], next);
    Ok(())
}

#[tokio::test]
async fn large_events_and_headers_that_cannot_be_read_are_reported() -> Result<()> {
    let kafka = shared::kafka(&["kafka_headers_schema"])?;
    send_large(&kafka, TOPIC).await?;
    let headers: [(&[u8], &[u8]); 2] = [(b"\xff", b"?"), (b"schema-version", b"1.0")];
    let event = br#"{"order_id":"odd","amount":1}"#;
    produce_kafka_record(&kafka, TOPIC, None, &headers, event)?;
    let expected = [
        "partition 0 offset 0 not read: no header schema-version",
        "partition 0 offset 1 not read: the name of a header is not UTF-8",
    ];
    assert_eq!(lines(&kafka)?, expected);
    Ok(())
}
