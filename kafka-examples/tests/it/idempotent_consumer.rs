//! Each payment takes effect once, whatever is sent twice and whenever the consumer dies.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT};
use rdkafka::ClientConfig;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rusqlite::Connection;

use crate::administrator::create_topic;
use crate::shared;

const TOPIC: &str = "idempotent-payments";

fn consumer(kafka: &Broker, database: &Path) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_idempotent_consumer"))
        .env("PAYMENTS_DB", database)
        .broker(kafka)
        .spawn()
}

/// Ends it as Docker and Kubernetes do.
fn stop(mut consumer: Running) -> Result<()> {
    consumer.terminate()?;
    consumer.wait(TIMEOUT)?.ok()?;
    Ok(())
}

/// To one partition, or to all in turn.
async fn produce(
    kafka: &Broker,
    partition: Option<i32>,
    payloads: Vec<Option<Vec<u8>>>,
) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("enable.idempotence", "true")
        .create()?;
    let mut reports = Vec::new();
    for payload in &payloads {
        let record = FutureRecord::<[u8], [u8]> {
            payload: payload.as_deref(),
            partition,
            ..FutureRecord::to(TOPIC)
        };
        reports.push(producer.send_result(record).map_err(|(error, _)| error)?);
    }
    for report in reports {
        report.await?.map_err(|(error, _)| error)?;
    }
    Ok(())
}

fn payment(id: u32) -> Option<Vec<u8>> {
    let user = id % 3;
    Some(format!(r#"{{"payment_id":"p-{id}","user_id":"u-{user}","cents":7}}"#).into())
}

fn number(database: &Path, question: &str) -> Result<i64> {
    Ok(Connection::open(database)?.query_row(question, [], |row| row.get(0))?)
}

#[tokio::test]
async fn each_payment_once_although_sent_twice_and_killed() -> Result<()> {
    let mut chance = compose::harness::chance()?;
    let kafka = shared::kafka(&["kafka_idempotent_consumer"])?;
    let folder = tempfile::tempdir()?;
    let database = folder.path().join("payments.sqlite");
    // All of them twice, the second time much later and in another order; then a mark for the end.
    let ids = (0..1500).chain((0..1500).rev()).chain([1500]);
    produce(&kafka, Some(0), ids.map(payment).collect()).await?;

    let mut again = 0;
    for _ in 0..3 {
        let mut consumer = consumer(&kafka, &database)?;
        for _ in 0..chance.u32(1..400) {
            consumer.wait_for("p-", TIMEOUT)?;
        }
        // At any moment between two commits, before or after the transaction of a payment.
        std::thread::sleep(Duration::from_micros(chance.u64(0..20_000)));
        consumer.kill()?;
        consumer.wait(TIMEOUT)?;
        let ignored = |line: &&String| line.contains("seen before");
        again += consumer.lines().iter().filter(ignored).count();
    }
    let mut last = consumer(&kafka, &database)?;
    last.wait_for("p-1500:", TIMEOUT)?;
    let ignored = |line: &&String| line.contains("seen before");
    again += last.lines().iter().filter(ignored).count();
    stop(last)?;

    assert_eq!(
        number(&database, "SELECT sum(payments) FROM balances")?,
        1501
    );
    assert_eq!(
        number(&database, "SELECT sum(cents) FROM balances")?,
        7 * 1501
    );
    assert_eq!(
        number(&database, "SELECT min(payments) FROM balances")?,
        500
    );
    assert!(again > 1500, "the kills brought nothing back: {again}");
    Ok(())
}

/// Its two copies meet two members at the same time.
#[tokio::test]
async fn each_payment_once_with_two_members_and_six_partitions() -> Result<()> {
    let kafka = shared::kafka(&["kafka_idempotent_consumer"])?;
    let folder = tempfile::tempdir()?;
    let database = folder.path().join("payments.sqlite");
    create_topic(&kafka, TOPIC, 6, &[]).await?;
    let mut first = consumer(&kafka, &database)?;
    let mut second = consumer(&kafka, &database)?;
    let mut done = || {
        [first.lines(), second.lines()].map(|lines| {
            let lines = lines.iter().filter(|line| line.starts_with("p-"));
            lines.count()
        })
    };
    let deadline = Instant::now() + TIMEOUT;
    let mut ids = 0;
    // The same payments in each partition, until both members have had many of them.
    while done().iter().any(|done| *done < 300) {
        ensure!(
            Instant::now() < deadline,
            "one member did all: {:?}",
            done()
        );
        for partition in 0..6 {
            let payments = (ids..ids + 50).map(payment).collect();
            produce(&kafka, Some(partition), payments).await?;
        }
        ids += 50;
    }
    // A rebalance can repeat some.
    while done().iter().sum::<usize>() < 6 * usize::try_from(ids)?
        || number(&database, "SELECT sum(payments) FROM balances")? < i64::from(ids)
    {
        ensure!(Instant::now() < deadline, "{:?}", done());
        std::thread::sleep(Duration::from_millis(50));
    }
    stop(first)?;
    stop(second)?;
    let ids = i64::from(ids);
    assert_eq!(
        number(&database, "SELECT sum(payments) FROM balances")?,
        ids
    );
    assert_eq!(
        number(&database, "SELECT sum(cents) FROM balances")?,
        7 * ids
    );
    Ok(())
}

#[tokio::test]
async fn ids_are_bounded_and_malformed_payments_are_printed_and_skipped() -> Result<()> {
    let kafka = shared::kafka(&["kafka_idempotent_consumer"])?;
    let folder = tempfile::tempdir()?;
    let database = folder.path().join("payments.sqlite");
    let long = format!(
        r#"{{"payment_id":"p","user_id":"u","cents":"{}"}}"#,
        "9".repeat(300_000)
    );
    let bad: [Option<&[u8]>; 7] = [
        None,
        Some(b""),
        Some(b"\xff\xfe"),
        Some(b"{}"),
        Some(br#"{"payment_id":"","user_id":"u","cents":1}"#),
        Some(br#"{"payment_id":"p","user_id":"u","cents":9223372036854775807}"#),
        Some(long.as_bytes()),
    ];
    // As many ids as are kept.
    let mut first = consumer(&kafka, &database)?;
    produce(&kafka, Some(0), vec![payment(0)]).await?;
    first.wait_for("p-0: u-0 +7 cents, balance 7", TIMEOUT)?;
    stop(first)?;
    Connection::open(&database)?.execute_batch(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 99999)
        INSERT INTO seen (id) SELECT 'old-' || i FROM n",
    )?;
    let mut payloads: Vec<_> = vec![payment(0), payment(1)];
    payloads.extend(bad.map(|payload| payload.map(<[u8]>::to_vec)));
    // One that is still known, one that is deleted by now, and the end.
    payloads.extend([payment(1), payment(0), payment(99)]);
    produce(&kafka, Some(0), payloads).await?;

    let mut consumer = consumer(&kafka, &database)?;
    consumer.wait_for("p-99:", TIMEOUT)?;
    let lines = consumer.lines();
    stop(consumer)?;
    // The first consumer has committed its payment at its end: it is not read again.
    assert_eq!(lines.len(), bad.len() + 5, "{lines:?}");
    assert_eq!(lines[0], "p-0: seen before, ignored");
    assert_eq!(lines[1], "p-1: u-1 +7 cents, balance 7");
    for (offset, line) in (3..).zip(&lines[2..2 + bad.len()]) {
        let start = format!("partition 0 offset {offset} skipped: ");
        ensure!(line.starts_with(&start), "{line}");
    }
    assert_eq!(lines[9], "p-1: seen before, ignored");
    assert_eq!(lines[10], "p-0: u-0 +7 cents, balance 14");
    assert_eq!(number(&database, "SELECT count(*) FROM seen")?, 100_000);
    assert_eq!(number(&database, "SELECT sum(payments) FROM balances")?, 4);
    Ok(())
}
