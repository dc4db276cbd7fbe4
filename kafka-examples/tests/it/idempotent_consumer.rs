//! Each payment once in the books, whatever is sent twice and whenever the consumer dies.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rusqlite::Connection;

use crate::shared;

fn consumer(kafka: &Broker, books: &Path, ids_kept: &str) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_idempotent_consumer"))
        .env("PAYMENTS_DB", books)
        .env("IDS_KEPT", ids_kept)
        .broker(kafka)
        .spawn()
}

async fn produce(kafka: &Broker, payloads: Vec<Option<Vec<u8>>>) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("enable.idempotence", "true")
        .create()?;
    let mut reports = Vec::new();
    for payload in &payloads {
        let record = FutureRecord::<[u8], [u8]> {
            payload: payload.as_deref(),
            ..FutureRecord::to("idempotent-payments").partition(0)
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

fn number(books: &Path, question: &str) -> Result<i64> {
    Ok(Connection::open(books)?.query_row(question, [], |row| row.get(0))?)
}

#[tokio::test]
async fn killed_twice_and_sent_twice_and_still_once() -> Result<()> {
    let kafka = shared::kafka(&["kafka_idempotent_consumer"])?;
    let folder = tempfile::tempdir()?;
    let books = folder.path().join("books.sqlite");
    // All of them twice, the second time much later and in another order; then a mark for the end.
    let ids = (0..1500).chain((0..1500).rev()).chain([1500]);
    produce(&kafka, ids.map(payment).collect()).await?;

    let mut again = 0;
    for kill_after in [300, 900] {
        let mut consumer = consumer(&kafka, &books, "100000")?;
        for _ in 0..kill_after {
            consumer.wait_for("p-", TIMEOUT)?;
        }
        consumer.kill()?;
        consumer.wait(TIMEOUT)?;
        let ignored = |line: &&String| line.contains("seen before");
        again += consumer.lines().iter().filter(ignored).count();
    }
    let mut last = consumer(&kafka, &books, "100000")?;
    last.wait_for("p-1500:", TIMEOUT)?;
    last.interrupt()?;
    let ended = last.wait(TIMEOUT)?.ok()?;
    again += ended.stdout.matches("seen before").count();

    assert_eq!(number(&books, "SELECT sum(payments) FROM balances")?, 1501);
    assert_eq!(number(&books, "SELECT sum(cents) FROM balances")?, 7 * 1501);
    assert_eq!(number(&books, "SELECT min(payments) FROM balances")?, 500);
    assert!(
        again > 1500,
        "the kills brought nothing back, so they proved nothing: {again}"
    );
    assert!(
        ended
            .stdout
            .ends_with("in the books: 1501 payments, 10507 cents, 0 rejected\n")
    );
    Ok(())
}

#[tokio::test]
async fn ids_are_bounded_and_what_is_no_payment_is_kept_aside() -> Result<()> {
    let kafka = shared::kafka(&["kafka_idempotent_consumer"])?;
    let folder = tempfile::tempdir()?;
    let books = folder.path().join("books.sqlite");
    let bad: [Option<&[u8]>; 6] = [
        None,
        Some(b""),
        Some(b"\xff\xfe"),
        Some(b"{}"),
        Some(br#"{"payment_id":"","user_id":"u","cents":1}"#),
        Some(br#"{"payment_id":"p","user_id":"u","cents":9223372036854775807}"#),
    ];
    let mut payloads: Vec<_> = (0..20).map(payment).collect();
    payloads.extend(bad.map(|payload| payload.map(<[u8]>::to_vec)));
    // One that is still known, one that is forgotten, and the end.
    payloads.extend([payment(19), payment(0), payment(99)]);
    produce(&kafka, payloads).await?;

    let mut consumer = consumer(&kafka, &books, "5")?;
    consumer.wait_for("p-19: seen before", TIMEOUT)?;
    consumer.wait_for("p-99:", TIMEOUT)?;
    consumer.interrupt()?;
    consumer.wait(TIMEOUT)?.ok()?;
    assert_eq!(number(&books, "SELECT count(*) FROM seen")?, 5);
    assert_eq!(number(&books, "SELECT sum(payments) FROM balances")?, 22);
    let aside = Connection::open(&books)?;
    let mut query = aside.prepare("SELECT payload FROM no_payments ORDER BY offset")?;
    let kept: Vec<Option<Vec<u8>>> = query
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    assert_eq!(kept, bad.map(|payload| payload.map(<[u8]>::to_vec)));
    Ok(())
}

#[tokio::test]
async fn what_a_new_topic_rejects_at_the_same_offset_is_kept_as_well_and_once() -> Result<()> {
    let kafka = shared::kafka(&["kafka_idempotent_consumer"])?;
    let folder = tempfile::tempdir()?;
    let books = folder.path().join("books.sqlite");
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let options = AdminOptions::new();
    let topic = NewTopic::new("idempotent-payments", 1, TopicReplication::Fixed(1));
    // The second topic is new, the third round reads it again.
    for (round, kept) in [2, 4, 4].into_iter().enumerate() {
        if round < 2 {
            let deadline = Instant::now() + TIMEOUT;
            // It is gone a moment after it was deleted.
            while admin.create_topics([&topic], &options).await?[0].is_err() {
                ensure!(Instant::now() < deadline, "the topic stays");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            produce(&kafka, vec![None, Some(b"{}".to_vec()), payment(7)]).await?;
        }
        let mut consumer = consumer(&kafka, &books, "100000")?;
        consumer.wait_for("p-7: ", TIMEOUT)?;
        consumer.interrupt()?;
        consumer.wait(TIMEOUT)?.ok()?;
        let count = number(&books, "SELECT count(*) FROM no_payments")?;
        assert_eq!(count, kept, "round {round}");
        let group = ["idempotent-payments"];
        let deleted = admin.delete_groups(&group, &options).await?;
        ensure!(deleted.iter().all(Result::is_ok), "{deleted:?}");
        if round == 0 {
            let deleted = admin.delete_topics(&group, &options).await?;
            ensure!(deleted.iter().all(Result::is_ok), "{deleted:?}");
        }
    }
    Ok(())
}
