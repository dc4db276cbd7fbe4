//! No event is lost: it is handled, or a dead letter with all that the event had.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT, produce_kafka_record};
use rdkafka::admin::{AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Headers, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message};

use crate::administrator::{admin, create_topic};
use crate::reader::{header, read, send_large};
use crate::shared;

const TOPIC: &str = "schema-events";
const DEAD_LETTERS: &str = "schema-events.dlq";

type Bytes<'a> = Option<&'a [u8]>;

fn reader(kafka: &Broker) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_headers_schema"))
        .broker(kafka)
        .spawn()
}

/// Ends it as Docker and Kubernetes do.
fn stop(mut reader: Running) -> Result<()> {
    reader.terminate()?;
    let ended = reader.wait(TIMEOUT)?.ok()?;
    ensure!(
        ended.stdout.ends_with("left the group\n"),
        "{}",
        ended.stdout
    );
    Ok(())
}

async fn send(
    kafka: &Broker,
    partition: i32,
    (version, key, payload): (Bytes<'_>, Bytes<'_>, Bytes<'_>),
) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("message.max.bytes", "1100000")
        .create()?;
    let mut record = FutureRecord::<[u8], [u8]>::to(TOPIC).partition(partition);
    if let Some(version) = version {
        record = record.headers(OwnedHeaders::new().insert(Header {
            key: "schema-version",
            value: Some(version),
        }));
    }
    record.key = key;
    record.payload = payload;
    let sent = producer.send(record, TIMEOUT).await;
    sent.map_err(|(error, _)| error)?;
    Ok(())
}

/// The dead letters by their origin.
fn dead_letters(kafka: &Broker) -> Result<BTreeMap<String, OwnedMessage>> {
    let letters = read(kafka, DEAD_LETTERS, "read_committed")?;
    let count = letters.len();
    let letters: BTreeMap<_, _> = letters
        .into_iter()
        .map(|letter| Ok((header(&letter, "origin").context("no origin")?, letter)))
        .collect::<Result<_>>()?;
    assert_eq!(letters.len(), count, "a dead letter was written twice");
    Ok(letters)
}

#[tokio::test]
async fn events_that_are_not_understood_are_dead_lettered_unchanged() -> Result<()> {
    let kafka = shared::kafka(&["kafka_headers_schema"])?;
    // More than the broker would choose.
    create_topic(&kafka, TOPIC, 5, &[]).await?;
    let mut first = reader(&kafka)?;
    let spaces = vec![b' '; 1_040_000];
    let long = "9".repeat(5000);
    let wordy = format!(r#"{{"order_id":"x","amount":"{long}"}}"#);
    let event: Bytes<'_> = Some(br#"{"order_id":"x","amount":1}"#);
    let bad: [(Bytes<'_>, Bytes<'_>, Bytes<'_>); 11] = [
        (Some(b"1.1"), None, Some(b"\xff\xfe")),
        (Some(b"1.1"), Some(b"\xff"), Some(b"")),
        (Some(b"1.1"), Some(b"k"), None),
        (Some(b"2.0"), None, event),
        (Some(b"10.1"), None, event),
        (Some(b"\xff"), None, event),
        (Some(b"one"), None, event),
        (None, Some(b"k"), event),
        (Some(b"1.0"), None, Some(&spaces)),
        (Some(b"1.0"), None, Some(wordy.as_bytes())),
        (Some(long.as_bytes()), None, event),
    ];
    for record in bad {
        send(&kafka, 4, record).await?;
    }
    let good = br#"{"order_id":"good","amount":1,"new":[]}"#;
    send(&kafka, 4, (Some(b"1.0"), None, Some(good))).await?;
    first.wait_for(
        "partition 4 offset 11: version 1.0: good for 1 cents, EUR",
        TIMEOUT,
    )?;
    stop(first)?;

    let letters = dead_letters(&kafka)?;
    assert_eq!(letters.len(), bad.len());
    for (number, (version, key, payload)) in bad.into_iter().enumerate() {
        let letter = letters.get(&format!("schema-events/4/{number}"));
        let letter = letter.context("no dead letter")?;
        assert_eq!(letter.key(), key);
        assert!(letter.payload() == payload, "{number} was changed");
        let reason = header(letter, "reason").context("no reason")?;
        assert!((1..=200).contains(&reason.chars().count()), "{reason}");
        let version = version.map(|version| String::from_utf8_lossy(version).into_owned());
        assert_eq!(header(letter, "schema-version"), version);
    }

    // All of them were committed: a second reader begins after them.
    let mut second = reader(&kafka)?;
    let next = br#"{"order_id":"next","amount":1,"currency":"USD"}"#;
    send(&kafka, 4, (Some(b"1.1"), None, Some(next))).await?;
    second.wait_for(
        "partition 4 offset 12: version 1.1: next for 1 cents, USD",
        TIMEOUT,
    )?;
    assert_eq!(second.lines().len(), 1, "{:?}", second.lines());
    stop(second)
}

#[tokio::test]
async fn without_a_dead_letter_there_is_no_commit() -> Result<()> {
    let kafka = shared::kafka(&["kafka_headers_schema"])?;
    create_topic(&kafka, DEAD_LETTERS, 1, &[]).await?;
    let mut first = reader(&kafka)?;
    // It has begun to read, and its group has a first position.
    let event = br#"{"order_id":"a","amount":1}"#;
    send(&kafka, 0, (Some(b"1.0"), None, Some(event))).await?;
    first.wait_for("partition 0 offset 0: version", TIMEOUT)?;
    // Even the headers do not fit any more. Letters that the topic takes before the change is in force are letters too.
    let mut letters = limit(&kafka, "100", true).await?;
    let payload = [b'x'; 500];
    send(&kafka, 0, (Some(b"1.0"), None, Some(&payload))).await?;
    let ended = first.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    let error = "cannot dead-letter schema-events/0/1";
    assert!(ended.stderr.contains(error), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("MessageSizeTooLarge"),
        "{}",
        ended.stderr
    );

    letters += limit(&kafka, "1200000", false).await?;
    let mut second = reader(&kafka)?;
    second.wait_for("partition 0 offset 1: dead-lettered", TIMEOUT)?;
    let found = read(&kafka, DEAD_LETTERS, "read_committed")?;
    assert_eq!(found.len(), letters + 1);
    assert!(found[letters].payload() == Some(&payload[..]));
    Ok(())
}

#[tokio::test]
async fn dead_letter_that_is_too_large_is_written_without_its_payload() -> Result<()> {
    let kafka = shared::kafka(&["kafka_headers_schema"])?;
    create_topic(&kafka, DEAD_LETTERS, 1, &[]).await?;
    let letters = limit(&kafka, "1000", false).await?;
    // Whether or not the new limit is in force, this does not fit.
    let mut random = fastrand::Rng::with_seed(1);
    let payload: Vec<u8> = std::iter::repeat_with(|| random.u8(..))
        .take(1_048_450)
        .collect();
    send(&kafka, 0, (Some(b"1.0"), Some(b"k"), Some(&payload))).await?;
    let event = br#"{"order_id":"next","amount":1}"#;
    send(&kafka, 0, (Some(b"1.0"), None, Some(event))).await?;
    let mut first = reader(&kafka)?;
    first.wait_for("partition 0 offset 1: version 1.0: next", TIMEOUT)?;
    stop(first)?;
    let found = read(&kafka, DEAD_LETTERS, "read_committed")?;
    let letter = found.get(letters).context("no dead letter")?;
    assert_eq!((letter.key(), letter.payload()), (Some(&b"k"[..]), None));
    assert_eq!(
        header(letter, "origin").as_deref(),
        Some("schema-events/0/0")
    );
    assert_eq!(header(letter, "schema-version").as_deref(), Some("1.0"));
    Ok(())
}

/// Alters the limit of the dead letters, and tries until the topic refuses a record of 200 bytes, or takes one. Returns
/// how many it has taken.
async fn limit(kafka: &Broker, bytes: &str, refuses: bool) -> Result<usize> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.address());
    let topic = ResourceSpecifier::Topic(DEAD_LETTERS);
    let change = AlterConfig::new(topic).set("max.message.bytes", bytes);
    let altered = admin(kafka)?
        .alter_configs([&change], &AdminOptions::new())
        .await?;
    ensure!(altered.iter().all(Result::is_ok), "{altered:?}");
    let producer: FutureProducer = config.create()?;
    let deadline = Instant::now() + TIMEOUT;
    let mut taken = 0;
    loop {
        ensure!(Instant::now() < deadline, "the limit is not in force");
        let record = FutureRecord::<[u8], [u8]>::to(DEAD_LETTERS).payload(&[b'p'; 200]);
        let refused = match producer.send(record, TIMEOUT).await {
            Ok(_) => {
                taken += 1;
                false
            }
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge), _)) => true,
            Err((error, _)) => return Err(error.into()),
        };
        if refused == refuses {
            return Ok(taken);
        }
    }
}

#[tokio::test]
async fn large_events_and_headers_that_cannot_be_read_are_dead_lettered() -> Result<()> {
    let kafka = shared::kafka(&["kafka_headers_schema"])?;
    let mut first = reader(&kafka)?;
    let large = send_large(&kafka, TOPIC).await?;
    let headers: [(&[u8], &[u8]); 2] = [(b"\xff", b"?"), (b"schema-version", b"1.0")];
    let event = br#"{"order_id":"odd","amount":1}"#;
    produce_kafka_record(&kafka, TOPIC, None, &headers, event)?;
    let text = "partition 0 offset 1: dead-lettered: the name of a header is not UTF-8";
    first.wait_for(text, TIMEOUT)?;
    stop(first)?;
    // The test cannot read these headers either.
    let letters = read(&kafka, DEAD_LETTERS, "read_committed")?;
    assert_eq!(letters.len(), 2);
    let by_payload = |payload: &[u8]| {
        let mut letters = letters.iter();
        letters.find(|letter| letter.payload() == Some(payload))
    };
    by_payload(&large).context("missing, or changed")?;
    let odd = by_payload(event).context("missing, or changed")?;
    // Its own two headers, and two more.
    let headers = odd.headers().context("no headers")?;
    assert_eq!(headers.count(), 4);
    assert_eq!(headers.get(1).key, "schema-version");
    Ok(())
}
