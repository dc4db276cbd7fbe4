//! Every payment is in the books once, whatever dies and however often it is delivered.

use anyhow::{Context, Result};
use compose::harness::Running;
use lapin::BasicProperties;

use crate::shared::{Place, TIMEOUT, vhost};

const PROGRAM: &str = env!("CARGO_BIN_EXE_rabbitmq_idempotent_consumer");
const QUEUE: &str = "idempotent-payments";
const DEAD: &str = "idempotent-payments.dead";

fn consumer(place: &Place, folder: &tempfile::TempDir, kept: &str) -> Result<Running> {
    let program = place.example(PROGRAM).env("IDS_KEPT", kept);
    let mut running = program.current_dir(folder.path()).spawn()?;
    running.wait_for("waiting for payments", TIMEOUT)?;
    Ok(running)
}

fn books(folder: &tempfile::TempDir) -> Result<(u32, u32, u32)> {
    let books = rusqlite::Connection::open(folder.path().join("rabbitmq-payments.sqlite"))?;
    let sums = "SELECT sum(payments), sum(cents), (SELECT count(*) FROM seen) FROM balances";
    Ok(books.query_row(sums, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?)
}

#[tokio::test]
async fn sigkill_and_repeats_leave_each_payment_in_the_books_once() -> Result<()> {
    let (place, folder) = (vhost().await?, tempfile::tempdir()?);
    for _ in 0..2 {
        place.run(PROGRAM, &["send", "600"])?.ok()?;
    }
    let mut repeated = false;
    // The prefetched ones come back after each kill, and so do those of which only the ack is missing.
    for payment in ["payment-20:", "payment-150:", "payment-400:"] {
        let mut killed = consumer(&place, &folder, "100000")?;
        killed.wait_for(payment, TIMEOUT)?;
        killed.kill()?;
        place
            .becomes_such(QUEUE, "without consumers", |(_, consumers)| consumers == 0)
            .await?;
        repeated |= killed
            .lines()
            .iter()
            .any(|line| line.contains("seen before"));
    }
    let mut last = consumer(&place, &folder, "100000")?;
    place.becomes(QUEUE, (0, 1)).await?;
    last.wait_for("payment-600: seen before, ignored", TIMEOUT)?;
    last.interrupt()?;
    let ended = last.wait(TIMEOUT)?.ok()?;
    assert!(
        ended
            .stdout
            .ends_with("in the books: 600 payments, 60000 cents\n"),
        "{}",
        ended.stdout
    );
    assert_eq!(books(&folder)?, (600, 60_000, 600));
    // Positive control: there was something to suppress.
    assert!(repeated || ended.stdout.contains("seen before"));
    place.becomes(QUEUE, (0, 0)).await
}

#[tokio::test]
async fn the_ids_are_bounded_and_a_forgotten_one_is_paid_again() -> Result<()> {
    let (place, folder) = (vhost().await?, tempfile::tempdir()?);
    for _ in 0..2 {
        place.run(PROGRAM, &["send", "3"])?.ok()?;
    }
    let mut consumer = consumer(&place, &folder, "2")?;
    for _ in 0..2 {
        consumer.wait_for("payment-3: ", TIMEOUT)?;
    }
    consumer.interrupt()?;
    consumer.wait(TIMEOUT)?.ok()?;
    let (payments, _, ids) = books(&folder)?;
    assert_eq!(ids, 2);
    assert!(payments > 3, "{payments}");
    Ok(())
}

#[tokio::test]
async fn what_is_no_payment_is_kept_aside() -> Result<()> {
    let (place, folder) = (vhost().await?, tempfile::tempdir()?);
    let mut consumer = consumer(&place, &folder, "100000")?;
    let good = br#"{"user_id":"user-1","cents":5}"#;
    let named = |id: &str| BasicProperties::default().with_message_id(id.into());
    place.publish(QUEUE, good).await?; // without an id
    place.publish_with(QUEUE, good, named("")).await?;
    let bodies: [&[u8]; 4] = [
        b"",
        &[0xff, 0x00],
        b"{}",
        br#"{"user_id":"u","cents":9000000000}"#,
    ];
    for body in bodies {
        place.publish_with(QUEUE, body, named("bad")).await?;
    }
    place.publish_with(QUEUE, good, named("good")).await?;
    consumer.wait_for("good: user-1 +5 cents, balance 5", TIMEOUT)?;
    place.becomes(DEAD, (6, 0)).await?;
    consumer.interrupt()?;
    consumer.wait(TIMEOUT)?.ok()?;
    assert_eq!(books(&folder)?, (1, 5, 1));
    place.take(DEAD).await?.context("nothing there")?;
    Ok(())
}
