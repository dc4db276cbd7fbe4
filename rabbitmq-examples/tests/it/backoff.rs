//! A payment that fails is not lost with its worker, and never in the way.
//!
//! Not the broker's SIGKILL: it hands on what has waited without a confirm, and that one may be lost.

use anyhow::{Context, Result};
use compose::harness::Running;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use crate::shared::{Place, TIMEOUT, vhost};

const PROGRAM: &str = env!("CARGO_BIN_EXE_rabbitmq_retry_backoff");
const PAYMENTS: &str = "retry-backoff.payments";
const DEAD: &str = "retry-backoff.dead";
const OTHER: &str = "other";

fn worker(place: &Place) -> Result<Running> {
    place.start(PROGRAM, &[], "waiting for payments")
}

#[tokio::test]
async fn each_attempt_has_its_place_and_others_overtake() -> Result<()> {
    let place = vhost().await?;
    // All are in the queue before the first fails, however slow the sender.
    place.run(PROGRAM, &["send"])?.ok()?;
    let mut worker = worker(&place)?;
    worker.wait_for("payment-3: attempt 5 failed", TIMEOUT)?;
    place.becomes(DEAD, (2, 0)).await?;
    worker.interrupt()?;
    let ended = worker.wait(TIMEOUT)?.ok()?;
    let line = |text: &str| {
        let line = ended.stdout.lines().position(|line| line.starts_with(text));
        line.with_context(|| format!("{text}: {}", ended.stdout))
    };
    // payment-4 comes after the failures and is not kept waiting by any of their attempts.
    assert!(line("payment-4: no payment")? < line("payment-2: attempt 2 failed")?);
    assert!(line("payment-2: paid at attempt 3")? < line("payment-3: attempt 4 failed")?);
    assert!(
        ended
            .stdout
            .ends_with("paid: 2, to be retried: 6, dead letters: 2\n")
    );
    let mut found = Vec::new();
    while let Some(letter) = place.take(DEAD).await? {
        let headers = letter.properties.headers().clone().unwrap_or_default();
        let body = String::from_utf8_lossy(&letter.data).into_owned();
        let attempts = headers.inner().get("attempts").cloned();
        found.push((body, attempts, headers.contains_key("reason")));
    }
    let attempts = |count| Some(AMQPValue::LongUInt(count));
    let third = r#"{"payment_id":"payment-3","fails":1000}"#.to_owned();
    assert_eq!(
        found,
        [
            ("payment-4".into(), attempts(1), true),
            (third, attempts(5), true)
        ]
    );
    place.becomes(PAYMENTS, (0, 0)).await
}

#[tokio::test]
async fn sigkill_again_and_again_loses_no_payment() -> Result<()> {
    let place = vhost().await?;
    place.run(PROGRAM, &["send"])?.ok()?;
    place.drain(PAYMENTS).await?;
    for number in 0..300 {
        let body = format!(r#"{{"payment_id":"p{number}","fails":1000}}"#);
        place.publish(PAYMENTS, body.as_bytes()).await?;
    }
    // In the middle of it, at whatever point that is.
    for text in [
        "p50: attempt",
        "p150: attempt",
        "p250: attempt",
        "attempt 3 failed",
    ] {
        let mut worker = worker(&place)?;
        worker.wait_for(text, TIMEOUT)?;
        worker.kill()?;
    }
    let mut worker = worker(&place)?;
    // Some come twice: a copy was stored, and the kill came before the ack of the original.
    let all = (0..300).map(|number| format!(r#"{{"payment_id":"p{number}","fails":1000}}"#));
    place.take_until(DEAD, &all.collect()).await?;
    worker.interrupt()?;
    worker.wait(TIMEOUT)?.ok()?;
    Ok(())
}

#[tokio::test]
async fn what_the_sender_has_said_of_it_goes_along_but_its_expiration() -> Result<()> {
    let place = vhost().await?;
    let mut worker = worker(&place)?;
    for body in [r#"{"payment_id":"p","fails":1000}"#, "no payment"] {
        let mut headers = FieldTable::default();
        headers.insert("tenant".into(), AMQPValue::LongString("north".into()));
        headers.insert(
            "CC".into(),
            AMQPValue::FieldArray(vec![AMQPValue::LongString(OTHER.into())].into()),
        );
        let sent = BasicProperties::default()
            .with_message_id("id-7".into())
            .with_content_type("application/json".into())
            .with_timestamp(1_750_000_000)
            .with_user_id("guest".into())
            .with_expiration("600000".into())
            .with_headers(headers);
        place.declare(OTHER).await?;
        place.publish_with(PAYMENTS, body.as_bytes(), sent).await?;
        worker.wait_for("dead letter", TIMEOUT)?;
        place.becomes(DEAD, (1, 0)).await?;
        let letter = place.take(DEAD).await?.context("no dead letter")?;
        let properties = &letter.properties;
        let text = |text: &Option<ShortString>| text.as_ref().map(ToString::to_string);
        assert_eq!(text(properties.message_id()).as_deref(), Some("id-7"));
        assert_eq!(
            text(properties.content_type()).as_deref(),
            Some("application/json")
        );
        assert_eq!(properties.timestamp(), &Some(1_750_000_000));
        assert_eq!(text(properties.expiration()), None);
        let headers = properties.headers().clone().unwrap_or_default();
        let north = AMQPValue::LongString("north".into());
        assert_eq!(headers.inner().get("tenant"), Some(&north));
        assert!(headers.contains_key("attempts") && headers.contains_key("reason"));
        // The other addressee has had it once, from the sender.
        assert_eq!(place.drain(OTHER).await?, [body]);
    }
    Ok(())
}

#[tokio::test]
async fn what_is_no_payment_is_a_dead_letter_at_once() -> Result<()> {
    let place = vhost().await?;
    let mut worker = worker(&place)?;
    let large = vec![b'x'; 1 << 20];
    let bodies: [&[u8]; 4] = [b"", &[0xff, 0x00], b"{\"payment_id\":7}", &large];
    for body in bodies {
        place.publish(PAYMENTS, body).await?;
    }
    place.publish(PAYMENTS, br#"{"payment_id":"good"}"#).await?;
    worker.wait_for("good: paid at attempt 1", TIMEOUT)?;
    place.becomes(DEAD, (4, 0)).await?;
    for body in bodies {
        assert_eq!(place.take(DEAD).await?.context("none left")?.data, body);
    }
    Ok(())
}
