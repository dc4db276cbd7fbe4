//! Nothing that arrives is lost: it is handled, or a dead letter that holds all it came with.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT, produce_kafka_record};
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Headers, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use crate::reader::send_large;
use crate::shared;

type Bytes<'a> = Option<&'a [u8]>;

fn reader(kafka: &Broker) -> Result<Running> {
    let mut reader = Example::new(env!("CARGO_BIN_EXE_kafka_headers_schema"))
        .broker(kafka)
        .spawn()?;
    reader.wait_for("waiting for events", TIMEOUT)?;
    Ok(reader)
}

async fn send(
    kafka: &Broker,
    version: Option<&[u8]>,
    key: Option<&[u8]>,
    payload: Option<&[u8]>,
) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("message.max.bytes", "1100000")
        .create()?;
    let mut record = FutureRecord::<[u8], [u8]>::to("schema-events");
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

fn dead_letters(kafka: &Broker, count: usize) -> Result<Vec<OwnedMessage>> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "judge")
        .create()?;
    let (_, end) = consumer.fetch_watermarks("schema-events.dlq", 0, TIMEOUT)?;
    assert_eq!(end, i64::try_from(count)?, "dead letters");
    let mut all = TopicPartitionList::new();
    all.add_partition_offset("schema-events.dlq", 0, Offset::Beginning)?;
    consumer.assign(&all)?;
    (0..count)
        .map(|_| {
            let mut polls = std::iter::repeat_with(|| consumer.poll(Duration::from_secs(1)));
            let letter = polls.by_ref().take(30).find_map(|letter| letter);
            Ok(letter.context("a dead letter is missing")??.detach())
        })
        .collect()
}

fn header(letter: &OwnedMessage, name: &str) -> Option<String> {
    let mut headers = letter.headers()?.iter();
    let header = headers.find(|header| header.key == name)?;
    Some(String::from_utf8_lossy(header.value?).into_owned())
}

#[tokio::test]
async fn what_is_not_understood_is_kept_as_it_came() -> Result<()> {
    let kafka = shared::kafka(&["kafka_headers_schema"])?;
    let mut first = reader(&kafka)?;
    let large = vec![b' '; 1_040_000];
    let bad: [(Bytes<'_>, Bytes<'_>, Bytes<'_>); 8] = [
        (Some(b"1.1"), None, Some(b"\xff\xfe")),
        (Some(b"1.1"), Some(b"\xff"), Some(b"")),
        (Some(b"1.1"), Some(b"k"), None),
        (Some(b"2.0"), None, Some(br#"{"order_id":"x","amount":1}"#)),
        (Some(b"\xff"), None, Some(br#"{"order_id":"x","amount":1}"#)),
        (Some(b"one"), None, Some(br#"{"order_id":"x","amount":1}"#)),
        (None, Some(b"k"), Some(br#"{"order_id":"x","amount":1}"#)),
        (Some(b"1.0"), None, Some(&large)),
    ];
    for (version, key, payload) in bad {
        send(&kafka, version, key, payload).await?;
    }
    send(
        &kafka,
        Some(b"1.0"),
        None,
        Some(br#"{"order_id":"good","amount":1,"new":[]}"#),
    )
    .await?;
    first.wait_for("offset 8, version 1.0: good for 1 cents, EUR", TIMEOUT)?;
    first.interrupt()?;
    let ended = first.wait(TIMEOUT)?.ok()?;
    assert!(ended.stdout.ends_with("handled 1, dead letters 8\n"));

    for ((number, (version, key, payload)), letter) in
        bad.into_iter().enumerate().zip(dead_letters(&kafka, 8)?)
    {
        assert_eq!((letter.key(), letter.payload()), (key, payload));
        let origin = format!("schema-events/0/{number}");
        assert_eq!(header(&letter, "dlq-origin"), Some(origin));
        assert!(header(&letter, "dlq-reason").is_some_and(|reason| !reason.is_empty()));
        let version = version.map(|version| String::from_utf8_lossy(version).into_owned());
        assert_eq!(header(&letter, "schema-version"), version);
    }

    // All of it was committed: a second reader begins behind it.
    let mut second = reader(&kafka)?;
    send(
        &kafka,
        Some(b"1.1"),
        None,
        Some(br#"{"order_id":"next","amount":1}"#),
    )
    .await?;
    second.wait_for("offset 9, ", TIMEOUT)?;
    second.interrupt()?;
    assert!(
        second
            .wait(TIMEOUT)?
            .ok()?
            .stdout
            .ends_with("handled 1, dead letters 0\n")
    );
    Ok(())
}

#[tokio::test]
async fn without_a_dead_letter_there_is_no_commit() -> Result<()> {
    let kafka = shared::kafka(&["kafka_headers_schema"])?;
    let mut first = reader(&kafka)?;
    // Fill its group's first position, so that the next one is known to have begun.
    send(
        &kafka,
        Some(b"1.0"),
        None,
        Some(br#"{"order_id":"a","amount":1}"#),
    )
    .await?;
    first.wait_for("offset 0, ", TIMEOUT)?;
    // Nothing fits any more. What the topic takes before the change is in force is a letter, too.
    let mut letters = limit(&kafka, "100", true).await?;
    let payload = [b'x'; 500];
    send(&kafka, Some(b"1.0"), None, Some(&payload)).await?;
    let ended = first.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    assert!(
        ended.stderr.contains("schema-events/0/1 is bad"),
        "{}",
        ended.stderr
    );

    letters += limit(&kafka, "1200000", false).await?;
    let mut second = reader(&kafka)?;
    second.wait_for("offset 1 -> schema-events.dlq", TIMEOUT)?;
    let letters = dead_letters(&kafka, letters + 1)?;
    let last = letters.last().context("no letter")?;
    assert_eq!(last.payload(), Some(&payload[..]));
    Ok(())
}

/// Alters the limit of the dead letters, and tries until the topic refuses a record of 200 bytes, or takes one. Returns
/// how many it has taken.
async fn limit(kafka: &Broker, bytes: &str, refuses: bool) -> Result<usize> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.address());
    let admin: AdminClient<DefaultClientContext> = config.create()?;
    let topic = ResourceSpecifier::Topic("schema-events.dlq");
    let change = AlterConfig::new(topic).set("max.message.bytes", bytes);
    let altered = admin.alter_configs([&change], &AdminOptions::new()).await?;
    ensure!(altered.iter().all(Result::is_ok), "{altered:?}");
    let producer: FutureProducer = config.create()?;
    let deadline = Instant::now() + TIMEOUT;
    let mut taken = 0;
    loop {
        ensure!(Instant::now() < deadline, "the limit is not in force");
        let record = FutureRecord::<[u8], [u8]>::to("schema-events.dlq").payload(&[b'p'; 200]);
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
async fn large_events_and_headers_that_cannot_be_read_are_dead_letters() -> Result<()> {
    let kafka = shared::kafka(&["kafka_headers_schema"])?;
    let mut first = reader(&kafka)?;
    let large = send_large(&kafka, "schema-events").await?;
    let headers: [(&[u8], &[u8]); 2] = [(b"\xff", b"?"), (b"schema-version", b"1.0")];
    let event = br#"{"order_id":"odd","amount":1}"#;
    produce_kafka_record(&kafka, "schema-events", None, &headers, event)?;
    let text = "offset 1 -> schema-events.dlq: the name of a header is not UTF-8";
    first.wait_for(text, TIMEOUT)?;
    first.interrupt()?;
    first.wait(TIMEOUT)?.ok()?;
    let letters = dead_letters(&kafka, 2)?;
    assert!(letters[0].payload() == Some(&large), "it was changed");
    assert_eq!(letters[1].payload(), Some(&event[..]));
    // Those that it came with, and two more.
    let headers = letters[1].headers().context("no headers")?;
    assert_eq!(headers.count(), 4);
    assert_eq!(headers.get(1).key, "schema-version");
    Ok(())
}
