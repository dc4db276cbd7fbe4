//! Dead letters tell their story, and a replay neither loses nor loops.

use anyhow::{Context, Result};
use lapin::BasicProperties;
use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldTable};

use crate::shared::vhost;

const PROGRAM: &str = env!("CARGO_BIN_EXE_rabbitmq_dead_letter");
const WORK: &str = "dead-letter.work";
const DEAD: &str = "dead-letter.dead";

#[tokio::test]
async fn inspecting_takes_nothing_and_replaying_moves_all_without_their_story() -> Result<()> {
    let place = vhost().await?;
    place.run(PROGRAM, &[])?.ok()?;
    let first = place.run(PROGRAM, &["inspect"])?.ok()?;
    let second = place.run(PROGRAM, &["inspect"])?.ok()?;
    assert_eq!(first.stdout, second.stdout);
    for line in [
        "order-1: rejected in ",
        "order-2: expired in ",
        "order-3: maxlen in ",
    ] {
        assert!(first.stdout.contains(line), "{}", first.stdout);
    }
    place.becomes(DEAD, (3, 0)).await?;
    place.run(PROGRAM, &["replay"])?.ok()?;
    place.becomes(DEAD, (0, 0)).await?;
    place.becomes(WORK, (3, 0)).await?;
    for id in ["order-1", "order-2", "order-3"] {
        let order = place.take(WORK).await?.context("none left")?;
        assert_eq!(
            order.properties.message_id().as_ref().map(|id| id.as_str()),
            Some(id)
        );
        assert_eq!(order.properties.delivery_mode(), &Some(2));
        let headers = order.properties.headers().clone().unwrap_or_default();
        assert!(
            !headers
                .inner()
                .keys()
                .any(|key| key.as_str().contains("death")),
            "{headers:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_replay_ends_though_the_dead_die_again() -> Result<()> {
    let place = vhost().await?;
    place.run(PROGRAM, &[])?.ok()?;
    place.run(PROGRAM, &["replay"])?.ok()?;
    // Each further round pushes out the three before it.
    for number in 4..=6 {
        place
            .publish(WORK, format!("late-{number}").as_bytes())
            .await?;
    }
    place.becomes(DEAD, (3, 0)).await?;
    let ended = place.run(PROGRAM, &["replay"])?.ok()?;
    assert!(
        ended.stdout.ends_with("replayed: 3, left: 0\n"),
        "{}",
        ended.stdout
    );
    place.becomes(DEAD, (3, 0)).await?;
    place.becomes(WORK, (3, 0)).await
}

#[tokio::test]
async fn what_cannot_be_replayed_stays() -> Result<()> {
    let place = vhost().await?;
    place.run(PROGRAM, &["inspect"])?.ok()?;
    // Published here by hand, with no story; and with a story of a queue that is gone.
    place.publish(DEAD, &[0xff, 0x00]).await?;
    let mut arguments = FieldTable::default();
    for (key, value) in [
        ("x-dead-letter-exchange", ""),
        ("x-dead-letter-routing-key", DEAD),
    ] {
        arguments.insert(key.into(), AMQPValue::LongString(value.into()));
    }
    let options = QueueDeclareOptions::durable();
    place
        .channel
        .queue_declare("gone".into(), options, arguments)
        .await?;
    let expired = BasicProperties::default().with_expiration("1".into());
    place.publish_with("gone", b"homeless", expired).await?;
    place.becomes(DEAD, (2, 0)).await?;
    place
        .channel
        .queue_delete("gone".into(), Default::default())
        .await?;
    place.run(PROGRAM, &[])?.ok()?;
    place.becomes(DEAD, (5, 0)).await?;
    let ended = place.run(PROGRAM, &["replay"])?.ok()?;
    assert!(
        ended.stdout.contains("without x-death, stays"),
        "{}",
        ended.stdout
    );
    assert!(
        ended.stdout.contains("homeless: stays: gone: NO_ROUTE"),
        "{}",
        ended.stdout
    );
    assert!(
        ended.stdout.ends_with("replayed: 3, left: 2\n"),
        "{}",
        ended.stdout
    );
    place.becomes(DEAD, (2, 0)).await?;
    place.becomes(WORK, (3, 0)).await
}
