//! A dead letter is written back and then deleted, and none is deleted that is not written.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT, chance, produce_kafka_record};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Header, Headers, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message};

use crate::{reader, shared};

const NAME: &str = "kafka_dlq_replay";
const PAYMENTS: &str = "retry-dlq.payments";
const DEAD_LETTERS: &str = "retry-dlq.payments.dlq";

fn replay(kafka: &Broker) -> Result<Running> {
    let replay = Example::new(env!("CARGO_BIN_EXE_kafka_dlq_replay"));
    replay.broker(kafka).spawn()
}

async fn send_letters(kafka: &Broker, count: usize) -> Result<()> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.address());
    let producer: FutureProducer = config.create()?;
    let payloads: Vec<String> = (0..count).map(|number| number.to_string()).collect();
    let sent = payloads.iter().map(|payload| {
        let record = FutureRecord::to(DEAD_LETTERS).key(payload).payload(payload);
        let headers = OwnedHeaders::new().insert(Header {
            key: "tenant",
            value: Some("acme"),
        });
        producer.send(record.headers(headers), TIMEOUT)
    });
    let sent = futures::future::try_join_all(sent).await;
    sent.map_err(|(error, _)| error)?;
    Ok(())
}

/// How often each letter is in the payments topic.
fn replayed(kafka: &Broker) -> Result<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    for record in reader::read(kafka, PAYMENTS, "read_committed")? {
        let payload = record.payload().context("no payload")?;
        ensure!(record.key() == Some(payload), "another key");
        let headers = record.headers().context("no headers")?;
        ensure!(headers.count() == 1 && headers.get(0).value == Some(b"acme"));
        let payload = String::from_utf8(payload.to_vec())?;
        *counts.entry(payload).or_default() += 1;
    }
    Ok(counts)
}

/// How many letters the topic still has.
fn left(kafka: &Broker) -> Result<i64> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.address());
    let reader: BaseConsumer = config.create()?;
    let metadata = reader.fetch_metadata(Some(DEAD_LETTERS), TIMEOUT)?;
    let mut left = 0;
    for partition in metadata.topics()[0].partitions() {
        let (low, high) = reader.fetch_watermarks(DEAD_LETTERS, partition.id(), TIMEOUT)?;
        left += high - low;
    }
    Ok(left)
}

#[tokio::test]
async fn a_killed_replay_forgets_no_letter_and_repeats_at_most_one() -> Result<()> {
    const LETTERS: usize = 600;
    const KILLS: usize = 3;
    let kafka = shared::kafka(&[NAME])?;
    let mut chance = chance()?;
    send_letters(&kafka, LETTERS).await?;
    for _ in 0..KILLS {
        let mut running = replay(&kafka)?;
        for _ in 0..chance.u32(1..150) {
            running.wait_for(": replayed", TIMEOUT)?;
        }
        running.kill()?;
        running.wait(TIMEOUT)?;
        // A letter is still there, or was written.
        let written = i64::try_from(replayed(&kafka)?.len())?;
        ensure!(written + left(&kafka)? >= i64::try_from(LETTERS)?, "lost");
    }
    ensure!(left(&kafka)? > 0, "the kills came too late");
    replay(&kafka)?.wait(TIMEOUT)?.ok()?;
    assert_eq!(left(&kafka)?, 0);
    let counts = replayed(&kafka)?;
    assert_eq!(counts.len(), LETTERS);
    let repeated = counts.values().sum::<usize>() - LETTERS;
    ensure!(repeated <= KILLS, "{repeated} letters are repeated");

    // The topic keeps the position, and no group has offsets that expire.
    let again = replay(&kafka)?.wait(TIMEOUT)?.ok()?;
    assert_eq!(again.stdout, "replayed: 0\n");
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.address());
    let observer: BaseConsumer = config.create()?;
    let groups = observer.fetch_group_list(None, TIMEOUT)?;
    let mut groups = groups.groups().iter();
    ensure!(!groups.any(|group| group.name() == "kafka_dlq_replay"));
    Ok(())
}

#[tokio::test]
async fn it_ends_while_its_replays_cause_new_letters_and_copies_odd_headers() -> Result<()> {
    let kafka = shared::kafka(&[NAME])?;
    send_letters(&kafka, 1).await?;
    let odd: [(&[u8], &[u8]); 1] = [(b"\xff", b"?")];
    produce_kafka_record(&kafka, DEAD_LETTERS, None, &odd, b"odd")?;
    let large = reader::send_large(&kafka, DEAD_LETTERS).await?;
    send_letters(&kafka, 200).await?;
    // None of the letters is a payment: each comes back as a new letter.
    let payer = Example::new(env!("CARGO_BIN_EXE_kafka_retry_dlq"));
    let mut payer = payer.broker(&kafka).spawn()?;
    let ended = replay(&kafka)?.wait(TIMEOUT)?.ok()?;
    assert!(
        ended.stdout.ends_with("replayed: 203\n"),
        "{}",
        ended.stdout
    );
    for _ in 0..203 {
        payer.wait_for("; moved to retry-dlq.payments.dlq", TIMEOUT)?;
    }
    payer.terminate()?;
    payer.wait(TIMEOUT)?.ok()?;
    assert_eq!(left(&kafka)?, 203);
    let payments = reader::read(&kafka, PAYMENTS, "read_committed")?;
    assert!(payments.iter().any(|one| one.payload() == Some(&large)));
    let odd = payments.iter().find(|one| one.payload() == Some(b"odd"));
    assert_eq!(odd.and_then(|odd| Some(odd.headers()?.count())), Some(1));
    Ok(())
}

/// The letter of a record that was too large for the dead-letter topic has no payload.
#[tokio::test]
async fn a_letter_without_its_payload_is_kept_and_a_missing_topic_is_an_error() -> Result<()> {
    let kafka = shared::kafka(&[NAME])?;
    let missing = replay(&kafka)?.wait(TIMEOUT)?;
    assert_eq!(missing.code(), 1);
    let reason = "Error: no topic retry-dlq.payments.dlq";
    ensure!(missing.stderr.contains(reason), "{}", missing.stderr);

    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.address());
    let producer: FutureProducer = config.create()?;
    let record = FutureRecord::<(), ()>::to(DEAD_LETTERS).partition(0);
    let sent = producer.send(record, TIMEOUT).await;
    sent.map_err(|(error, _)| error)?;
    let ended = replay(&kafka)?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    let reason = "Error: offset 0 has no payload";
    ensure!(ended.stderr.contains(reason), "{}", ended.stderr);
    assert_eq!(left(&kafka)?, 1);
    Ok(())
}
