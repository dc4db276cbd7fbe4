//! Core NATS: at most once, and what the wildcards match.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::Client;
use compose::harness::{Example, Running, TIMEOUT, http_get};
use compose::{Broker, Service};
use futures::StreamExt;

use crate::nats::handed_over;

fn subscriber(nats: &Broker, pattern: &str) -> Result<Running> {
    let program = Example::new(env!("CARGO_BIN_EXE_nats_subscribe"));
    let mut running = program.args([pattern]).broker(nats).spawn()?;
    running.wait_for("listening on", TIMEOUT)?;
    // So the subscription is written to its connection. The server may still read ours first.
    let deadline = Instant::now() + TIMEOUT;
    while !subjects(nats)?.iter().any(|known| known == pattern) {
        ensure!(
            Instant::now() < deadline,
            "the server knows no subscription to {pattern}"
        );
        thread::sleep(Duration::from_millis(10));
    }
    Ok(running)
}

/// What the server has subscriptions to, by its monitoring page.
fn subjects(nats: &Broker) -> Result<Vec<String>> {
    let page = format!("{}/subsz?subs=1", nats.web()[0]);
    let (_, text) = http_get(&page, TIMEOUT).with_context(|| format!("no answer from {page}"))?;
    let page: serde_json::Value = serde_json::from_str(&text)?;
    let list = page["subscriptions_list"].as_array();
    Ok(list
        .into_iter()
        .flatten()
        .filter_map(|subscription| Some(subscription["subject"].as_str()?.to_owned()))
        .collect())
}

/// What the subscriber printed between "listening" and "drained".
fn received(mut subscriber: Running) -> Result<Vec<String>> {
    subscriber.interrupt()?;
    let ended = subscriber.wait(TIMEOUT)?.ok()?;
    let mut lines: Vec<_> = ended.stdout.lines().skip(1).map(str::to_owned).collect();
    let last = lines.pop().unwrap_or_default();
    assert_eq!(last, format!("drained; messages handled: {}", lines.len()));
    Ok(lines)
}

async fn publish(client: &Client, messages: &[(&'static str, &'static str)]) -> Result<()> {
    for (subject, body) in messages {
        client.publish(*subject, (*body).into()).await?;
    }
    Ok(client.flush().await?)
}

#[tokio::test]
async fn the_published_events_reach_a_subscriber() -> Result<()> {
    let nats = Broker::private(Service::Nats)?;
    let client = async_nats::connect(nats.address()).await?;
    let mut events = client.subscribe("events.>").await?;
    client.flush().await?;
    Example::new(env!("CARGO_BIN_EXE_nats_publish"))
        .broker(&nats)
        .spawn()?
        .wait(TIMEOUT)?
        .ok()?;
    for subject in ["events.user.created", "events.user.updated"] {
        let message = tokio::time::timeout(TIMEOUT, events.next()).await?.unwrap();
        assert_eq!(message.subject.as_str(), subject);
        assert_eq!(message.payload, "User ID: 123");
    }
    Ok(())
}

#[tokio::test]
async fn what_is_published_while_nobody_subscribes_is_lost() -> Result<()> {
    let nats = Broker::private(Service::Nats)?;
    let client = async_nats::connect(nats.address()).await?;
    let early = subscriber(&nats, "events.>")?;
    publish(&client, &[("events.n", "1")]).await?;
    assert_eq!(received_after(early, "events.n: 1")?, ["events.n: 1"]);
    publish(&client, &[("events.n", "2")]).await?;
    let late = subscriber(&nats, "events.>")?;
    publish(&client, &[("events.n", "3")]).await?;
    assert_eq!(received_after(late, "events.n: 3")?, ["events.n: 3"]);
    Ok(())
}

#[tokio::test]
async fn a_star_matches_one_token_and_a_greater_than_sign_the_rest() -> Result<()> {
    let nats = Broker::private(Service::Nats)?;
    let client = async_nats::connect(nats.address()).await?;
    let messages = [
        ("events", "0"),
        ("events.user", "1"),
        ("events.user.created", "2"),
        ("events.user.email.changed", "3"),
        ("events.user.last", "end"),
    ];
    for (pattern, expected) in [
        ("events.user.*", vec!["events.user.created: 2"]),
        (
            "events.user.>",
            vec!["events.user.created: 2", "events.user.email.changed: 3"],
        ),
        (
            "events.>",
            vec![
                "events.user: 1",
                "events.user.created: 2",
                "events.user.email.changed: 3",
            ],
        ),
    ] {
        let subscriber = subscriber(&nats, pattern)?;
        publish(&client, &messages).await?;
        let mut lines = received_after(subscriber, "events.user.last: end")?;
        assert_eq!(lines.pop().as_deref(), Some("events.user.last: end"));
        assert_eq!(lines, expected, "{pattern}");
    }
    Ok(())
}

/// Frozen while they come and told to stop before it can look at them: few enough to be in its socket then.
#[tokio::test]
async fn drain_hands_out_all_that_is_already_here() -> Result<()> {
    const MANY: usize = 500;
    let nats = Broker::private(Service::Nats)?;
    let client = async_nats::connect(nats.address()).await?;
    let mut subscriber = subscriber(&nats, "burst")?;
    // Handled, so that it surely listens for Ctrl-C.
    publish(&client, &[("burst", "first")]).await?;
    subscriber.wait_for("burst: first", TIMEOUT)?;
    subscriber.pause()?;
    for number in 0..MANY {
        client.publish("burst", number.to_string().into()).await?;
    }
    handed_over(&nats, &client).await?;
    subscriber.interrupt()?;
    subscriber.resume()?;
    let ended = subscriber.wait(TIMEOUT)?.ok()?;
    let mut expected = vec!["listening on burst; Ctrl-C to stop".to_owned()];
    expected.push("burst: first".into());
    expected.extend((0..MANY).map(|number| format!("burst: {number}")));
    expected.push(format!("drained; messages handled: {}", MANY + 1));
    assert_eq!(ended.stdout.lines().collect::<Vec<_>>(), expected);
    Ok(())
}

#[tokio::test]
async fn ctrl_c_ends_it_also_while_the_server_is_away() -> Result<()> {
    let nats = Broker::private(Service::Nats)?;
    let mut subscriber = subscriber(&nats, "events.>")?;
    nats.kill(1)?;
    subscriber.wait_for("disconnected", TIMEOUT)?;
    subscriber.interrupt()?;
    subscriber.wait_for("does not answer", TIMEOUT)?;
    subscriber.wait(TIMEOUT)?.ok()?;
    Ok(())
}

/// Non-UTF-8 is shown, not a reason to die.
#[tokio::test]
async fn bytes_that_are_no_text_do_no_harm() -> Result<()> {
    let nats = Broker::private(Service::Nats)?;
    let client = async_nats::connect(nats.address()).await?;
    let subscriber = subscriber(&nats, "events.>")?;
    client
        .publish("events.raw", vec![0xff, b'x'].into())
        .await?;
    publish(&client, &[("events.raw", "end")]).await?;
    let lines = received_after(subscriber, "events.raw: end")?;
    assert_eq!(lines, ["events.raw: \u{fffd}x", "events.raw: end"]);
    Ok(())
}

fn received_after(mut subscriber: Running, last: &str) -> Result<Vec<String>> {
    subscriber.wait_for(last, TIMEOUT)?;
    received(subscriber)
}
