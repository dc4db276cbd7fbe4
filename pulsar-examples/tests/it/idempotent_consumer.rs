//! Each payment once in the books, and once in the topic, whatever is repeated and whoever dies.

use std::path::Path;

use anyhow::Result;
use compose::Broker;
use compose::harness::{Example, Running};
use rusqlite::Connection;

use crate::support::{
    TIMEOUT, backlog, client, consumer, own, run, send, start, stats, stop, topic, until,
};

const PAYMENTS: &str = env!("CARGO_BIN_EXE_pulsar_idempotent_consumer");

fn books(broker: &Broker, path: &Path, ids_kept: &str) -> Result<Running> {
    let program = Example::new(PAYMENTS)
        .broker(broker)
        .env("PAYMENTS_DB", path);
    program.env("IDS_KEPT", ids_kept).spawn()
}

fn number(books: &Path, question: &str) -> Result<i64> {
    Ok(Connection::open(books)?.query_row(question, [], |row| row.get(0))?)
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_and_repeated_and_still_once() -> Result<()> {
    // What is in the topic is counted.
    let (broker, _turn) = own("idempotent-payments").await?;
    let payments = topic("idempotent-payments");
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("books.sqlite");
    let judge = client(broker).await?;
    consumer(&judge, &payments, "judge").await?.close().await?;

    // A producer dies while it sends, and is started again under its name.
    let mut cut = start(PAYMENTS, broker, &["send", "monday", "3000"])?;
    until("some are stored", async || {
        let stored = stats(broker, &payments).await?["msgInCounter"].as_u64();
        Ok(stored.is_some_and(|stored| stored > 100))
    })
    .await?;
    cut.kill()?;
    cut.wait(TIMEOUT)?;
    let repeated = run(PAYMENTS, broker, &["send", "monday", "1500"])?;
    let dropped: u64 = repeated
        .trim_end()
        .rsplit(' ')
        .next()
        .unwrap_or_default()
        .parse()?;
    assert!(
        dropped > 100,
        "the kill came too early to prove anything: {repeated}"
    );
    let stored = backlog(broker, &payments, "judge").await?;
    let expected = i64::try_from(stored)?;
    assert!(expected >= 1500, "{expected}");

    // The first 1500 again, under another name: now only the consumer can know.
    run(PAYMENTS, broker, &["again", "monday", "1500"])?;
    assert_eq!(backlog(broker, &payments, "judge").await?, stored + 1500);
    let mut first = books(broker, &path, "100000")?;
    for _ in 0..500 {
        first.wait_for("monday-", TIMEOUT)?;
    }
    first.kill()?;
    first.wait(TIMEOUT)?;
    let mut second = books(broker, &path, "100000")?;
    until("all are acknowledged", async || {
        Ok(backlog(broker, &payments, "idempotent-payments").await? == 0)
    })
    .await?;
    let printed = stop(&mut second)?;
    let printed = first.lines().join("\n") + &printed;
    assert!(printed.matches("seen before").count() >= 1500);
    assert_eq!(
        number(&path, "SELECT sum(payments) FROM balances")?,
        expected
    );
    assert_eq!(
        number(&path, "SELECT sum(cents) FROM balances")?,
        100 * expected
    );

    // What is no payment is kept aside, and ids are forgotten beyond the limit.
    let bad: [&[u8]; 5] = [
        b"",
        b"\xff\xfe",
        b"{}",
        br#"{"payment_id":"","user_id":"u","cents":1}"#,
        br#"{"payment_id":"p","user_id":"u","cents":9223372036854775807}"#,
    ];
    send(&judge, &payments, bad).await?;
    let good =
        [1, 2, 3, 3, 1].map(|id| format!(r#"{{"payment_id":"p-{id}","user_id":"new","cents":7}}"#));
    send(&judge, &payments, good).await?;
    let mut third = books(broker, &path, "2")?;
    until("all are acknowledged", async || {
        Ok(backlog(broker, &payments, "idempotent-payments").await? == 0)
    })
    .await?;
    stop(&mut third)?;
    let paid = "SELECT payments FROM balances WHERE user_id = 'new'";
    assert_eq!(number(&path, paid)?, 4, "p-3 is known, p-1 is forgotten");
    assert_eq!(number(&path, "SELECT count(*) FROM seen")?, 2);
    assert_eq!(number(&path, "SELECT count(*) FROM rejected")?, 5);
    assert_eq!(
        number(
            &path,
            "SELECT count(*) FROM rejected WHERE payload = x'fffe'"
        )?,
        1
    );
    Ok(())
}
