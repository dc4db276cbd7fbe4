//! A payment is paid or dead-lettered whatever is killed, and blocks no other payment.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::harness::{Example, Running, TIMEOUT, chance, produce_kafka_record};
use compose::{Broker, Service};
use rdkafka::message::{Header, Headers, OwnedHeaders, OwnedMessage, Timestamp};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message};

use crate::administrator::{create_topic, tool};
use crate::{reader, shared};

const NAME: &str = "kafka_retry_dlq";
const PAYMENTS: &str = "retry-dlq.payments";
const DEAD_LETTERS: &str = "retry-dlq.payments.dlq";
const DEAD: &str = "; moved to retry-dlq.payments.dlq";

fn payer(kafka: &Broker) -> Result<Running> {
    let payer = Example::new(env!("CARGO_BIN_EXE_kafka_retry_dlq"));
    payer.broker(kafka).spawn()
}

fn stop(running: &mut Running) -> Result<()> {
    running.terminate()?;
    running.wait(TIMEOUT)?.ok()?;
    Ok(())
}

async fn send(kafka: &Broker, key: Option<&str>, payload: Option<&[u8]>) -> Result<()> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.address());
    config.set("message.max.bytes", "2000000");
    let producer: FutureProducer = config.set("linger.ms", "0").create()?;
    let mut record = FutureRecord::<str, [u8]>::to(PAYMENTS).partition(0);
    (record.key, record.payload) = (key, payload);
    let record = record.headers(OwnedHeaders::new().insert(Header {
        key: "tenant",
        value: Some("acme"),
    }));
    let sent = producer.send(record, TIMEOUT).await;
    sent.map_err(|(error, _)| error)?;
    Ok(())
}

fn dead_letters(kafka: &Broker) -> Result<Vec<OwnedMessage>> {
    reader::read(kafka, DEAD_LETTERS, "read_committed")
}

fn header(record: &OwnedMessage, name: &str) -> Result<String> {
    let headers = record.headers().context("no headers")?;
    let mut found = headers.iter().filter(|header| header.key == name);
    let header = found.next().with_context(|| format!("no header {name}"))?;
    ensure!(found.next().is_none(), "two headers {name}");
    Ok(String::from_utf8_lossy(header.value.unwrap_or_default()).into_owned())
}

#[tokio::test]
async fn a_failing_payment_blocks_no_other_and_each_attempt_waits_longer() -> Result<()> {
    let kafka = shared::kafka(&[NAME])?;
    let mut running = payer(&kafka)?;
    send(&kafka, None, Some(br#"{"fails":99}"#)).await?;
    send(&kafka, None, Some(br#"{"fails":0}"#)).await?;
    running.wait_for(r#"{"fails":99}: attempt 5 failed"#, TIMEOUT)?;
    stop(&mut running)?;
    let lines = running.lines();
    let at = |text: &str| lines.iter().position(|line| line.contains(text));
    let fine = at(r#"{"fails":0}: paid at attempt 1"#).context("not paid")?;
    ensure!(Some(fine) < at("attempt 2 failed"), "{lines:?}");
    let millis = |record: &OwnedMessage| record.timestamp().to_millis().unwrap_or(0);
    let sent = reader::read(&kafka, PAYMENTS, "read_committed")?;
    // The timestamp in a retry topic is the time at which the record is due: half of the delay at least.
    let mut before = millis(&sent[0]);
    for (number, delay) in (1..).zip([100, 200, 400, 500]) {
        let topic = format!("{PAYMENTS}.retry-{number}");
        let waited = reader::read(&kafka, &topic, "read_committed")?;
        ensure!(waited.len() == 1, "{} records in {topic}", waited.len());
        let due = millis(&waited[0]);
        ensure!(due >= before + delay / 2, "{topic}: {} ms", due - before);
        before = due;
    }
    ensure!(
        millis(&dead_letters(&kafka)?[0]) >= before,
        "handled before it was due"
    );
    Ok(())
}

#[tokio::test]
async fn each_payment_is_paid_or_dead_lettered_over_kills_at_random_moments() -> Result<()> {
    const PAYMENTS: usize = 150;
    let kafka = shared::kafka(&[NAME])?;
    let mut chance = chance()?;
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.address());
    let producer: FutureProducer = config.create()?;
    for number in 0..PAYMENTS {
        let payload = format!(r#"{{"id":{number},"fails":{}}}"#, number % 7);
        let record = FutureRecord::<(), _>::to(self::PAYMENTS).payload(&payload);
        let sent = producer.send(record, TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
    }
    let mut ends: BTreeMap<String, String> = BTreeMap::new();
    for kills in 0.. {
        let mut running = payer(&kafka)?;
        if kills < 2 {
            for _ in 0..chance.u32(1..90) {
                running.wait_for("attempt ", TIMEOUT)?;
            }
            running.kill()?;
            running.wait(TIMEOUT)?;
            note(&mut ends, &running.lines());
            continue;
        }
        ensure!(ends.len() < PAYMENTS, "the kills came too late");
        let earlier = ends.clone();
        let deadline = Instant::now() + TIMEOUT;
        while ends.len() < PAYMENTS {
            ensure!(Instant::now() < deadline, "only {} ended", ends.len());
            running.wait_for_line(is_end, "end of a payment", TIMEOUT)?;
            ends = earlier.clone();
            note(&mut ends, &running.lines());
        }
        stop(&mut running)?;
        break;
    }
    for (payment, end) in ends {
        let fails = payment.trim_end_matches('}').rsplit_once(':');
        let fails: u32 = fails.context("no number")?.1.parse()?;
        let right = match fails {
            0..5 => format!("paid at attempt {}", fails + 1),
            _ => format!("attempt 5 failed: the bank does not answer{DEAD}"),
        };
        assert_eq!(end, right, "{payment}");
    }
    for letter in dead_letters(&kafka)? {
        assert_eq!(header(&letter, "reason")?, "the bank does not answer");
        assert!(header(&letter, "origin")?.starts_with("retry-dlq.payments/"));
    }
    Ok(())
}

fn is_end(line: &str) -> bool {
    line.contains(": paid at attempt ") || line.ends_with(DEAD)
}

fn note(ends: &mut BTreeMap<String, String>, lines: &[String]) {
    for line in lines.iter().filter(|line| is_end(line)) {
        if let Some((payment, end)) = line.split_once(": ") {
            ends.insert(payment.into(), end.into());
        }
    }
}

#[tokio::test]
async fn malformed_and_large_payments_are_dead_lettered_with_key_and_headers() -> Result<()> {
    let kafka = shared::kafka(&[NAME])?;
    let mut chance = chance()?;
    // Random bytes do not compress. With the headers of a dead letter they are too large for the broker.
    let huge: Vec<u8> = std::iter::repeat_with(|| chance.u8(..))
        .take(1_048_440)
        .collect();
    let large = reader::send_large(&kafka, PAYMENTS).await?;
    let bad: [Option<&[u8]>; 5] = [None, Some(b""), Some(b"\xff\xfe"), Some(b"{"), Some(&huge)];
    for payload in bad {
        send(&kafka, Some("k"), payload).await?;
    }
    let odd: [(&[u8], &[u8]); 1] = [(b"\xff\xfe", b"?")];
    produce_kafka_record(&kafka, PAYMENTS, None, &odd, br#"{"fails":0}"#)?;
    produce_kafka_record(&kafka, PAYMENTS, None, &odd, b"odd")?;
    send(&kafka, None, Some(br#"{"fails":1}"#)).await?;
    let mut running = payer(&kafka)?;
    running.wait_for(r#"{"fails":0}: paid at attempt 1"#, TIMEOUT)?;
    running.wait_for(r#"{"fails":1}: paid at attempt 2"#, TIMEOUT)?;
    stop(&mut running)?;

    let letters = dead_letters(&kafka)?;
    assert_eq!(letters.len(), bad.len() + 2);
    let with = |payload: Option<&[u8]>| letters.iter().position(|one| one.payload() == payload);
    with(Some(&large)).context("the large payment is missing")?;
    let odd = with(Some(b"odd")).context("the odd payment is missing")?;
    for (offset, payload) in (1..).zip(bad) {
        let origin = format!("{PAYMENTS}/0/{offset}");
        // The odd header cannot be read.
        let others = letters.iter().enumerate().filter(|(at, _)| *at != odd);
        let mut found =
            others.filter(|(_, one)| header(one, "origin").ok().as_ref() == Some(&origin));
        let (_, letter) = found.next().context("a letter is missing")?;
        assert!(found.next().is_none());
        assert_eq!(header(letter, "tenant")?, "acme");
        assert!(!header(letter, "reason")?.is_empty());
        if payload == Some(&huge) {
            assert!(letter.key().is_none() && letter.payload().is_none());
        } else {
            assert_eq!((letter.key(), letter.payload()), (Some(&b"k"[..]), payload));
        }
    }
    assert_eq!(letters[odd].headers().map(Headers::count), Some(3));
    Ok(())
}

#[tokio::test]
async fn a_payment_too_large_for_its_retry_topic_is_dead_lettered() -> Result<()> {
    let kafka = shared::kafka(&[NAME])?;
    let retry = "retry-dlq.payments.retry-1";
    create_topic(&kafka, retry, 1, &[("max.message.bytes", "50")]).await?;
    send(&kafka, Some("k"), Some(br#"{"fails":1}"#)).await?;
    let mut running = payer(&kafka)?;
    running.wait_for(DEAD, TIMEOUT)?;
    stop(&mut running)?;
    let letters = dead_letters(&kafka)?;
    assert_eq!(letters.len(), 1);
    assert!(letters[0].key().is_none() && letters[0].payload().is_none());
    assert_eq!(header(&letters[0], "origin")?, format!("{PAYMENTS}/0/0"));
    assert_eq!(header(&letters[0], "reason")?, "the bank does not answer");
    assert_eq!(header(&letters[0], "tenant")?, "acme");
    Ok(())
}

#[tokio::test]
async fn a_timestamp_of_a_wrong_clock_delays_nothing_and_a_second_member_can_join() -> Result<()> {
    let kafka = shared::kafka(&[NAME])?;
    let mut first = payer(&kafka)?;
    send(&kafka, None, Some(br#"{"fails":0}"#)).await?;
    first.wait_for("paid at attempt 1", TIMEOUT)?;
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.address());
    let producer: FutureProducer = config.create()?;
    let soon = Timestamp::now().to_millis().unwrap_or(0) + 3_000_000;
    let mut second = payer(&kafka)?;
    for number in 0..60 {
        let payload = format!(r#"{{"id":{number},"fails":1}}"#);
        let record = FutureRecord::<(), _>::to("retry-dlq.payments.retry-1");
        let record = record.payload(&payload).timestamp(soon);
        let sent = producer.send(record, TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
    }
    let deadline = Instant::now() + TIMEOUT;
    let mut ends = BTreeMap::new();
    while ends.len() < 60 {
        ensure!(Instant::now() < deadline, "only {} are paid", ends.len());
        for running in [&mut first, &mut second] {
            ensure!(running.try_wait()?.is_none(), "{:?}", running.lines());
            let lines = running.lines();
            note(&mut ends, &lines);
            ends.remove(r#"{"fails":0}"#);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    stop(&mut second)?;
    stop(&mut first)
}

#[tokio::test]
async fn it_works_without_permission_to_create_topics() -> Result<()> {
    let kafka = Broker::secure(Service::Kafka)?;
    let retries = (1..5).map(|number| format!("{PAYMENTS}.retry-{number}"));
    for topic in retries.chain([PAYMENTS.into(), DEAD_LETTERS.into()]) {
        tool(&kafka, "TopicCommand", &["--create", "--topic", &topic])?;
    }
    send(&kafka, None, Some(br#"{"fails":1}"#)).await?;
    send(&kafka, None, Some(b"{")).await?;
    let mut running = payer(&kafka)?;
    running.wait_for("paid at attempt 2", TIMEOUT)?;
    stop(&mut running)?;
    assert_eq!(dead_letters(&kafka)?.len(), 1);

    // It deletes nothing here, and so it must not replay anything.
    let replay = Example::new(env!("CARGO_BIN_EXE_kafka_dlq_replay"));
    let ended = replay.broker(&kafka).spawn()?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    assert!(
        ended.stderr.contains("cannot delete from"),
        "{}",
        ended.stderr
    );
    assert!(ended.stderr.contains("TopicAuthorizationFailed"));
    assert_eq!(reader::read(&kafka, PAYMENTS, "read_committed")?.len(), 2);
    Ok(())
}
