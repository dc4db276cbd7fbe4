//! A payment is paid or dead-lettered whatever is killed, holds up nobody, and is replayed once.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT, produce_kafka_record};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{Header, Headers, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{BaseProducer, FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use crate::reader;
use crate::shared;

const PAYMENTS: &str = "retry-dlq.payments";
const DEAD_LETTERS: &str = "retry-dlq.payments.dlq";

fn payer(kafka: &Broker) -> Result<Running> {
    let payer = Example::new(env!("CARGO_BIN_EXE_kafka_retry_dlq"));
    let mut payer = payer.broker(kafka).spawn()?;
    payer.wait_for("waiting for payments", TIMEOUT)?;
    Ok(payer)
}

fn replay(kafka: &Broker) -> Result<Running> {
    let replay = Example::new(env!("CARGO_BIN_EXE_kafka_dlq_replay"));
    replay.broker(kafka).args(["replay"]).spawn()
}

fn producer(kafka: &Broker) -> Result<FutureProducer> {
    Ok(ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("message.max.bytes", "2000000")
        .set("linger.ms", "0")
        .create()?)
}

async fn send(
    producer: &FutureProducer,
    topic: &str,
    key: Option<&str>,
    payload: Option<&[u8]>,
) -> Result<()> {
    let mut record = FutureRecord::<str, [u8]>::to(topic).partition(0);
    (record.key, record.payload) = (key, payload);
    let record = record.headers(OwnedHeaders::new().insert(Header {
        key: "tenant",
        value: Some("acme"),
    }));
    producer
        .send(record, TIMEOUT)
        .await
        .map_err(|(error, _)| error)?;
    Ok(())
}

#[derive(Debug)]
struct Record {
    key: Option<String>,
    payload: Option<Vec<u8>>,
    headers: Vec<(String, String)>,
    timestamp: i64,
}

impl Record {
    fn header(&self, name: &str) -> Result<&str> {
        let mut found = self.headers.iter().filter(|(key, _)| key == name);
        let (_, value) = found
            .next()
            .with_context(|| format!("no {name}: {self:?}"))?;
        ensure!(found.next().is_none(), "two {name}: {self:?}");
        Ok(value)
    }
}

fn read(kafka: &Broker, topic: &str) -> Result<Vec<Record>> {
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "judge")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("isolation.level", "read_committed")
        .create()?;
    let mut all = TopicPartitionList::new();
    for partition in 0..3 {
        all.add_partition_offset(topic, partition, Offset::Beginning)?;
    }
    reader.assign(&all)?;
    let (mut records, mut ends) = (Vec::new(), BTreeSet::new());
    let deadline = Instant::now() + TIMEOUT;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    while ends.len() < 3 {
        ensure!(Instant::now() < deadline, "cannot read {topic} to its end");
        match reader.poll(Duration::from_secs(1)) {
            Some(Ok(record)) => {
                let headers = record.headers().into_iter().flat_map(Headers::iter);
                records.push(Record {
                    key: record.key().map(text),
                    payload: record.payload().map(<[u8]>::to_vec),
                    headers: headers
                        .map(|one| (one.key.to_owned(), text(one.value.unwrap_or_default())))
                        .collect(),
                    timestamp: record.timestamp().to_millis().unwrap_or(0),
                });
            }
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                ends.insert(partition);
            }
            Some(Err(error)) => return Err(error.into()),
            None => {}
        }
    }
    Ok(records)
}

#[tokio::test]
async fn what_fails_holds_up_nobody_and_backs_off() -> Result<()> {
    let kafka = shared::kafka(&["kafka_retry_dlq"])?;
    let mut payer = payer(&kafka)?;
    let producer = producer(&kafka)?;
    let failing = br#"{"payment_id":"failing","fails":99}"#;
    let fine = br#"{"payment_id":"fine"}"#;
    // The one right behind the other.
    tokio::try_join!(
        send(&producer, PAYMENTS, Some("failing"), Some(failing)),
        send(&producer, PAYMENTS, Some("fine"), Some(fine))
    )?;
    payer.wait_for("fine: paid at attempt 1", TIMEOUT)?;
    payer.wait_for("failing: attempt 5 failed", TIMEOUT)?;
    payer.interrupt()?;
    payer.wait(TIMEOUT)?.ok()?;
    let lines = payer.lines();
    let at = |text: &str| lines.iter().position(|line| line.starts_with(text));
    ensure!(
        at("fine: paid") < at("failing: attempt 5 failed"),
        "{lines:?}"
    );
    let sent = read(&kafka, PAYMENTS)?;
    let dead = read(&kafka, DEAD_LETTERS)?;
    // At least half of 100, 200, 400 and 500 ms.
    let took = dead[0].timestamp - sent[0].timestamp;
    ensure!(took >= 600, "five attempts within {took} ms");
    Ok(())
}

#[tokio::test]
async fn each_payment_is_paid_or_dead_lettered_over_kills() -> Result<()> {
    let kafka = shared::kafka(&["kafka_retry_dlq"])?;
    let mut running = payer(&kafka)?;
    let producer = producer(&kafka)?;
    for number in 0..200 {
        let fails = number % 7;
        let key = format!("p{number}");
        let payload = format!(r#"{{"payment_id":"{key}","fails":{fails}}}"#);
        send(&producer, PAYMENTS, Some(&key), Some(payload.as_bytes())).await?;
    }
    // How each ended, and how often.
    let mut ends: BTreeMap<String, u32> = BTreeMap::new();
    for text in ["attempt 3 failed", "paid at attempt 5"] {
        running.wait_for(text, TIMEOUT)?;
        running.kill()?;
        running.wait(TIMEOUT)?;
        note(&mut ends, &running.lines());
        running = payer(&kafka)?;
    }
    let deadline = Instant::now() + TIMEOUT;
    let earlier = ends.clone();
    while ends.len() < 200 {
        ensure!(Instant::now() < deadline, "only {} ended", ends.len());
        running.wait_for_line(is_end, "end of a payment", TIMEOUT)?;
        ends = earlier.clone();
        note(&mut ends, &running.lines());
    }
    running.interrupt()?;
    running.wait(TIMEOUT)?.ok()?;
    for letter in read(&kafka, DEAD_LETTERS)? {
        assert_eq!(letter.header("attempts")?, "5");
        assert_eq!(letter.header("cause")?, "the bank does not answer");
        assert_eq!(letter.header("origin.topic")?, PAYMENTS);
    }
    for (line, _) in ends {
        let (key, end) = line.split_once(": ").context("no colon")?;
        let fails = key[1..].parse::<u32>()? % 7;
        let right = match fails {
            0..5 => format!("paid at attempt {}", fails + 1),
            _ => "attempt 5 failed: the bank does not answer; dead letter".into(),
        };
        assert_eq!(end, right, "{key}");
    }
    Ok(())
}

fn is_end(line: &str) -> bool {
    line.contains(": paid at attempt ") || line.ends_with("; dead letter")
}

fn note(ends: &mut BTreeMap<String, u32>, lines: &[String]) {
    for line in lines.iter().filter(|line| is_end(line)) {
        *ends.entry(line.clone()).or_default() += 1;
    }
}

#[tokio::test]
async fn what_is_no_payment_is_dead_lettered_as_it_came_and_replayed_once() -> Result<()> {
    let kafka = shared::kafka(&["kafka_retry_dlq"])?;
    let mut running = payer(&kafka)?;
    let producer = producer(&kafka)?;
    let large = vec![b'x'; 1_048_000];
    let bad: [Option<&[u8]>; 5] = [None, Some(b""), Some(b"\xff\xfe"), Some(b"{"), Some(&large)];
    for payload in bad {
        send(&producer, PAYMENTS, None, payload).await?;
    }
    for _ in bad {
        running.wait_for("attempt 1 failed: not a payment: ", TIMEOUT)?;
    }
    running.interrupt()?;
    running.wait(TIMEOUT)?.ok()?;
    let letters = read(&kafka, DEAD_LETTERS)?;
    assert_eq!(letters.len(), bad.len());
    for payload in bad {
        let payload = payload.map(<[u8]>::to_vec);
        let letter = letters.iter().find(|letter| letter.payload == payload);
        let letter = letter.context("a letter is missing, or was changed")?;
        assert_eq!(letter.key, None);
        assert_eq!(letter.header("attempts")?, "1");
        assert_eq!(letter.header("origin.partition")?, "0");
        assert_eq!(letter.header("tenant")?, "acme");
    }

    // Killed in the middle, a replay neither repeats nor forgets.
    for number in 0..2_000 {
        let payload = number.to_string();
        send(&producer, DEAD_LETTERS, Some("k"), Some(payload.as_bytes())).await?;
    }
    let mut first = replay(&kafka)?;
    for _ in 0..450 {
        first.wait_for("cause: ", TIMEOUT)?;
    }
    first.kill()?;
    first.wait(TIMEOUT)?;
    let ended = replay(&kafka)?.wait(TIMEOUT)?.ok()?;
    let rest = ended.stdout.lines().last().unwrap_or_default();
    let rest: usize = rest
        .strip_prefix("replayed: ")
        .context("no count")?
        .parse()?;
    ensure!((1..2_000).contains(&rest), "killed too late: {rest}");
    let again = replay(&kafka)?.wait(TIMEOUT)?.ok()?;
    assert_eq!(again.stdout, "replayed: 0\n");

    let replayed = read(&kafka, PAYMENTS)?;
    let (replayed, sent): (Vec<_>, Vec<_>) = replayed
        .iter()
        .partition(|record| record.header("replays").is_ok());
    assert_eq!((sent.len(), replayed.len()), (bad.len(), bad.len() + 2_000));
    let once: BTreeSet<_> = replayed.iter().map(|record| &record.payload).collect();
    assert_eq!(once.len(), replayed.len());
    for record in replayed {
        assert_eq!(record.header("replays")?, "1");
        assert_eq!(record.header("tenant")?, "acme");
        ensure!(record.header("attempts").is_err(), "history went along");
    }
    Ok(())
}

#[tokio::test]
async fn a_large_payment_and_a_header_that_cannot_be_read_stop_neither_payer_nor_replay()
-> Result<()> {
    let kafka = shared::kafka(&["kafka_retry_dlq"])?;
    let mut running = payer(&kafka)?;
    let large = reader::send_large(&kafka, PAYMENTS).await?;
    running.wait_for("attempt 1 failed: not a payment: ", TIMEOUT)?;
    let headers: [(&[u8], &[u8]); 2] = [(b"\xff\xfe", b"?"), (b"tenant", b"acme")];
    let fine = br#"{"payment_id":"fine"}"#;
    produce_kafka_record(&kafka, PAYMENTS, None, &headers, fine)?;
    running.wait_for(
        "attempt 1 failed: the name of a header is not UTF-8",
        TIMEOUT,
    )?;
    send(&producer(&kafka)?, PAYMENTS, Some("next"), Some(fine)).await?;
    running.wait_for("next: paid at attempt 1", TIMEOUT)?;
    running.interrupt()?;
    running.wait(TIMEOUT)?.ok()?;

    // The names that can be read, in their order, and the values of all.
    let headers = |record: &OwnedMessage| -> Vec<(Option<String>, Vec<u8>)> {
        let all = record.headers();
        let count = all.map_or(0, Headers::count);
        let one = |at| {
            let one = catch_unwind(AssertUnwindSafe(|| all.map(|all| all.get(at))));
            let one = one.ok().flatten();
            let value = one.as_ref().and_then(|one| one.value).unwrap_or_default();
            (one.as_ref().map(|one| one.key.to_owned()), value.to_vec())
        };
        (0..count).map(one).collect()
    };
    let is = |one: &(Option<String>, Vec<u8>), key: &str, value: &[u8]| {
        one.0.as_deref() == Some(key) && one.1 == value
    };
    let letters = reader::read(&kafka, DEAD_LETTERS, "read_committed")?;
    assert_eq!(letters.len(), 2);
    assert!(
        letters
            .iter()
            .any(|letter| letter.payload() == Some(&large))
    );
    let odd = letters.iter().find(|letter| letter.payload() == Some(fine));
    let odd = headers(odd.context("it was changed")?);
    assert!(
        odd[0].0.is_none() && is(&odd[1], "tenant", b"acme"),
        "{odd:?}"
    );
    for (key, value) in [
        ("origin.topic", PAYMENTS),
        ("origin.offset", "1"),
        ("attempts", "1"),
    ] {
        let found = odd.iter().any(|one| is(one, key, value.as_bytes()));
        assert!(found, "no {key} {value}: {odd:?}");
    }

    // More replays than can be counted.
    let most: [(&[u8], &[u8]); 1] = [(b"replays", b"4294967295")];
    produce_kafka_record(&kafka, DEAD_LETTERS, None, &most, b"most")?;
    let ended = replay(&kafka)?.wait(TIMEOUT)?.ok()?;
    assert!(
        ended.stdout.contains("its headers cannot be read"),
        "{}",
        ended.stdout
    );
    assert!(ended.stdout.ends_with("replayed: 3\n"), "{}", ended.stdout);
    reader::await_markers(&kafka, PAYMENTS)?;
    let replayed = reader::read(&kafka, PAYMENTS, "read_committed")?;
    let replayed: Vec<_> = replayed
        .iter()
        .map(|one| (one.payload(), headers(one)))
        .collect();
    for (payload, times) in [(&large[..], "1"), (fine, "1"), (b"most", "4294967295")] {
        let found = replayed.iter().filter(|(replayed, headers)| {
            let times = |one: &_| is(one, "replays", times.as_bytes());
            *replayed == Some(payload) && headers.iter().any(times)
        });
        assert_eq!(found.count(), 1, "{times}");
    }
    Ok(())
}

/// A position whose transaction is open is not known, and none is not the beginning.
#[tokio::test]
async fn the_letters_are_listed_from_the_position_that_a_killed_replay_leaves() -> Result<()> {
    let kafka = shared::kafka(&["kafka_retry_dlq"])?;
    payer(&kafka)?.kill()?;
    let producer = producer(&kafka)?;
    for _ in 0..3 {
        send(&producer, DEAD_LETTERS, Some("k"), Some(b"x")).await?;
    }
    replay(&kafka)?.wait(TIMEOUT)?.ok()?;
    send(&producer, DEAD_LETTERS, Some("k"), Some(b"x")).await?;

    // In the place of a replay that is killed before its commit.
    let killed: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("transactional.id", "killed")
        .set("transaction.timeout.ms", "10000")
        .create()?;
    killed.init_transactions(TIMEOUT)?;
    killed.begin_transaction()?;
    let member: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "retry-dlq.replay")
        .create()?;
    let mut positions = TopicPartitionList::new();
    positions.add_partition_offset(DEAD_LETTERS, 0, Offset::Offset(4))?;
    let member = member.group_metadata().context("no group")?;
    killed.send_offsets_to_transaction(&positions, &member, TIMEOUT)?;

    let list = Example::new(env!("CARGO_BIN_EXE_kafka_dlq_replay"));
    let ended = list.broker(&kafka).spawn()?.wait(TIMEOUT)?.ok()?;
    assert!(
        ended.stdout.ends_with("dead letters: 1\n"),
        "{}",
        ended.stdout
    );
    Ok(())
}
