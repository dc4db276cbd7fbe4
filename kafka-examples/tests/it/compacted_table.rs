//! The table is what was set last, before and after the broker has compacted it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::Broker;
use compose::harness::{Example, Finished, Running, TIMEOUT};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::producer::{FutureProducer, FutureRecord};

use crate::shared;

fn table(kafka: &Broker) -> Example {
    Example::new(env!("CARGO_BIN_EXE_kafka_compacted_table")).broker(kafka)
}

fn change<const N: usize>(kafka: &Broker, args: [&str; N]) -> Result<Finished> {
    table(kafka).args(args).spawn()?.wait(TIMEOUT)?.ok()
}

/// The table, and from how many records it was read.
fn read(kafka: &Broker) -> Result<(BTreeMap<String, u64>, u64, Running)> {
    let mut reader = table(kafka).spawn()?;
    let summary = reader.wait_for("up to date: ", TIMEOUT)?;
    let (_, from) = summary.split_once(" from ").context("no count")?;
    let records = from.split(' ').next().unwrap_or_default().parse()?;
    let mut prices = BTreeMap::new();
    for line in reader.lines() {
        if let Some((key, price)) = line.split_once(" = ") {
            prices.insert(key.to_owned(), price.parse()?);
        }
    }
    Ok((prices, records, reader))
}

#[test]
fn compaction_keeps_the_latest_value_and_forgets_older_ones() -> Result<()> {
    let kafka = shared::kafka(&["kafka_compacted_table"])?;
    change(&kafka, ["set", "apple", "1"])?;
    change(&kafka, ["set", "pear", "2"])?;
    change(&kafka, ["delete", "pear"])?;
    change(&kafka, ["fill", "20000"])?;
    let mut expected = BTreeMap::from([("apple".to_owned(), 1)]);
    expected.extend((0..10).map(|n| (format!("key-{n}"), 19_990 + n)));
    let (prices, records, _) = read(&kafka)?;
    assert_eq!(prices, expected);
    assert_eq!(records, 20_003);

    // The cleaner looks every fifteen seconds, and at closed segments only: a write closes the one before.
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        ensure!(Instant::now() < deadline, "not compacted");
        change(&kafka, ["set", "apple", "1"])?;
        let (prices, records, _) = read(&kafka)?;
        assert_eq!(prices, expected);
        if records < 1_000 {
            return Ok(());
        }
    }
}

#[tokio::test]
async fn an_empty_value_is_no_tombstone_and_nonsense_changes_nothing() -> Result<()> {
    let kafka = shared::kafka(&["kafka_compacted_table"])?;
    change(&kafka, ["set", "apple", "1"])?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("message.timeout.ms", "5000")
        .create()?;
    for payload in [&b""[..], b"\xff", b"-1", b"99999999999999999999999"] {
        let record = FutureRecord::to("compacted-table.prices");
        let record = record.key("apple").payload(payload);
        producer.send(record, TIMEOUT).await.map_err(|(e, _)| e)?;
    }
    let key = &b"\xff"[..];
    let record = FutureRecord::to("compacted-table.prices")
        .key(key)
        .payload("1");
    producer.send(record, TIMEOUT).await.map_err(|(e, _)| e)?;
    let keyless = FutureRecord::<str, str>::to("compacted-table.prices").payload("1");
    ensure!(
        producer.send(keyless, TIMEOUT).await.is_err(),
        "no key, no row"
    );

    let (prices, records, mut reader) = read(&kafka)?;
    assert_eq!(
        (prices, records),
        (BTreeMap::from([("apple".into(), 1)]), 6)
    );
    let skipped = reader.lines();
    let skipped = skipped.iter().filter(|line| line.contains(" skipped: "));
    assert_eq!(skipped.count(), 5);
    change(&kafka, ["set", "apple", "2"])?;
    reader.wait_for("apple = 2", TIMEOUT)?;
    reader.interrupt()?;
    reader.wait(TIMEOUT)?.ok()?;
    Ok(())
}

#[tokio::test]
async fn what_was_not_written_is_not_reported_as_filled() -> Result<()> {
    let kafka = shared::kafka(&["kafka_compacted_table"])?;
    change(&kafka, ["set", "apple", "1"])?;
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    // No record is that small.
    let topic = ResourceSpecifier::Topic("compacted-table.prices");
    let limit = AlterConfig::new(topic).set("max.message.bytes", "10");
    let altered = admin.alter_configs([&limit], &AdminOptions::new()).await?;
    ensure!(altered.iter().all(Result::is_ok), "{altered:?}");
    // It is in force a moment later.
    let deadline = Instant::now() + TIMEOUT;
    while change(&kafka, ["set", "apple", "1"]).is_ok() {
        ensure!(Instant::now() < deadline, "the limit is not in force");
    }
    let ended = table(&kafka)
        .args(["fill", "25000"])
        .spawn()?
        .wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    let message = "Error: not all records were written";
    assert!(ended.stderr.contains(message), "{}", ended.stderr);
    Ok(())
}
