//! What is said to be confirmed is there, and what is said to be unconfirmed is exactly the rest.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use compose::{Broker, Service};

use crate::shared::{Place, TIMEOUT, settle, vhost};

const PUBLISHER: &str = env!("CARGO_BIN_EXE_rabbitmq_publisher_confirms");
const QUEUE: &str = "publisher-confirms";

/// `name: 5 attempted, 3 confirmed, 0 refused, 2 unconfirmed, …`
fn counts(line: &str) -> Result<[u64; 4]> {
    let (_, rest) = line.split_once(": ").context("no colon")?;
    let mut counts = rest
        .split(", ")
        .filter_map(|part| part.split(' ').next()?.parse().ok());
    let mut next = || {
        counts
            .next()
            .with_context(|| format!("no four counts: {line}"))
    };
    Ok([next()?, next()?, next()?, next()?])
}

/// `1-3, 7`
fn ids(ranges: &str) -> Result<BTreeSet<u64>> {
    let mut ids = BTreeSet::new();
    for range in ranges.split(", ") {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        ids.extend(first.parse::<u64>()?..=last.parse()?);
    }
    Ok(ids)
}

#[tokio::test]
async fn each_way_confirms_all_and_they_are_in_the_queue() -> Result<()> {
    let place = vhost().await?;
    for way in ["single", "batches", "streaming"] {
        let ended = place.run(PUBLISHER, &["250", way])?.ok()?;
        assert_eq!(
            counts(ended.stdout.trim())?,
            [250, 250, 0, 0],
            "{}",
            ended.stdout
        );
        place.becomes(QUEUE, (250, 0)).await?;
    }
    // The refused ones are in no queue.
    let ended = place.run(PUBLISHER, &["1"])?.ok()?;
    assert!(
        ended.stdout.ends_with("refused: 11-15\n"),
        "{}",
        ended.stdout
    );
    place.becomes("publisher-confirms.full", (10, 0)).await
}

/// Publishes without end, lets `fault` happen, and compares what is said with what is there after `mend`.
async fn ordeal(
    rabbitmq: &Broker,
    way: &str,
    [fault, mend]: [fn(&Broker, u16) -> Result<()>; 2],
    reasons: &[&str],
) -> Result<()> {
    let place = Place::of(rabbitmq).await?;
    let mut publisher = place.example(PUBLISHER).args(["10000000", way]).spawn()?;
    // It purges what the round before has left; the queue may not be there yet.
    place.exists(QUEUE).await?;
    // More than the window, or none of them need be confirmed.
    place
        .becomes_such(QUEUE, "at least 1500", |(ready, _)| ready >= 1500)
        .await?;
    fault(rabbitmq, 1)?;
    let ended = publisher.wait(TIMEOUT)?;
    let said = &ended.stderr;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    assert!(said.contains("publish what is unconfirmed again"), "{said}");
    assert!(reasons.iter().any(|reason| said.contains(reason)), "{said}");
    let mut lines = ended.stdout.lines();
    let [attempted, confirmed, refused, unconfirmed] = counts(lines.next().context("no counts")?)?;
    let doubtful = ids(lines
        .next()
        .and_then(|line| line.strip_prefix("unconfirmed: "))
        .context("none in doubt")?)?;
    assert_eq!(refused, 0);
    assert_eq!(doubtful.len() as u64, unconfirmed);
    assert_eq!(attempted, confirmed + unconfirmed);
    assert!(confirmed >= 100, "{confirmed} confirmed");

    mend(rabbitmq, 1)?;
    let place = Place::of(rabbitmq).await?;
    let mut there = BTreeSet::new();
    for message in place.drain_messages(QUEUE).await? {
        let id = message.properties.message_id().as_ref().context("no id")?;
        there.insert(id.as_str().parse::<u64>()?);
    }
    let lost = (1..=attempted).filter(|id| !there.contains(id) && !doubtful.contains(id));
    assert_eq!(
        lost.collect::<Vec<_>>(),
        [0; 0],
        "{way}: confirmed and lost"
    );
    assert!(
        there.iter().all(|id| (1..=attempted).contains(id)),
        "{way}: never attempted"
    );
    Ok(())
}

#[tokio::test]
async fn a_broker_that_is_killed_or_silent_leaves_no_doubt_about_what_is_in_doubt() -> Result<()> {
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    let place = Place::of(&rabbitmq).await?;
    place.run(PUBLISHER, &["10", "batches"])?.ok()?;
    settle(&rabbitmq)?;
    for way in ["batches", "streaming"] {
        ordeal(&rabbitmq, way, [Broker::kill, Broker::restart], &[""]).await?;
    }
    let silent = ["no confirm within 10s", "the broker takes nothing more"];
    ordeal(
        &rabbitmq,
        "streaming",
        [Broker::pause, Broker::resume],
        &silent,
    )
    .await
}
