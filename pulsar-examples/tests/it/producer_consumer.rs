//! At least once: what was not acknowledged is delivered again, and nothing else is.

use std::time::Duration;

use anyhow::{Context, Result};
use compose::harness::{Example, Running, TIMEOUT};
use compose::{Broker, Service};
use futures::TryStreamExt;
use pulsar::consumer::InitialPosition;
use pulsar::{Consumer, ConsumerOptions, Pulsar, TokioExecutor};

use crate::support::{self, own, send_batch};

const TOPIC: &str = "persistent://public/default/orders";

fn consumer(pulsar: &Broker) -> Result<Running> {
    let program = Example::new(env!("CARGO_BIN_EXE_pulsar_consumer"));
    let mut running = program.broker(pulsar).spawn()?;
    running.wait_for("subscribed", TIMEOUT)?;
    Ok(running)
}

async fn client(pulsar: &Broker) -> Result<Pulsar<TokioExecutor>> {
    Ok(Pulsar::builder(pulsar.address(), TokioExecutor)
        .build()
        .await?)
}

async fn send(client: &Pulsar<TokioExecutor>, payloads: &[String]) -> Result<()> {
    support::send(client, TOPIC, payloads).await
}

fn orders(count: u32) -> Vec<String> {
    let order = |id| format!(r#"{{"order_id":"o{id}","user_id":"u","amount":1}}"#);
    (0..count).map(order).collect()
}

/// What the subscription still has to deliver: only asked when no consumer is connected.
async fn backlog(client: &Pulsar<TokioExecutor>, last: &str) -> Result<Vec<String>> {
    // The end of the backlog is a message of our own.
    send(client, &[last.to_owned()]).await?;
    let mut consumer: Consumer<String, _> = client
        .consumer()
        .with_topic(TOPIC)
        .with_subscription("order-processor")
        .with_subscription_type(pulsar::SubType::Failover)
        .build()
        .await?;
    let mut rest = Vec::new();
    loop {
        let next = tokio::time::timeout(TIMEOUT, consumer.try_next()).await??;
        let payload = next.context("the stream ended")?.deserialize()?;
        if payload == last {
            break;
        }
        rest.push(payload);
    }
    consumer.close().await?;
    Ok(rest)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_receipt_names_the_place_of_its_order() -> Result<()> {
    let (pulsar, _turn) = own("orders").await?;
    let client = client(pulsar).await?;
    let mut reader: Consumer<String, _> = client
        .consumer()
        .with_topic(TOPIC)
        .with_options(ConsumerOptions::default().with_initial_position(InitialPosition::Earliest))
        .build()
        .await?;
    let producer = Example::new(env!("CARGO_BIN_EXE_pulsar_producer"));
    let ended = producer.broker(pulsar).spawn()?.wait(TIMEOUT)?.ok()?;
    assert_eq!(ended.stdout.lines().count(), 3);
    for line in ended.stdout.lines() {
        let message = tokio::time::timeout(TIMEOUT, reader.try_next()).await??;
        let message = message.context("the stream ended")?;
        let order: serde_json::Value = serde_json::from_str(&message.deserialize()?)?;
        let id = order["order_id"].as_str().context("no order_id")?;
        assert_eq!(message.key().as_deref(), Some(id));
        assert_eq!(order["amount"], 4_999, "an integer of cents");
        let place = message.message_id();
        assert_eq!(
            line,
            format!("{id}: stored as {}:{}", place.ledger_id, place.entry_id)
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn after_sigkill_what_was_not_acknowledged_comes_again() -> Result<()> {
    let (pulsar, _turn) = own("orders").await?;
    let client = client(pulsar).await?;
    let mut first = consumer(pulsar)?;
    send(&client, &orders(30)).await?;
    for _ in 0..10 {
        first.wait_for("acknowledged", TIMEOUT)?;
    }
    first.kill()?;
    first.wait(TIMEOUT)?;
    let done = first
        .lines()
        .iter()
        .filter(|line| line.contains("acknowledged"))
        .count();

    let mut second = consumer(pulsar)?;
    second.wait_for(" o29 of u", TIMEOUT)?;
    second.interrupt()?;
    second.wait(TIMEOUT)?.ok()?;
    let again: Vec<_> = second
        .lines()
        .into_iter()
        .filter(|line| line.contains("acknowledged"))
        .collect();
    for id in done..30 {
        let order = format!(" o{id} of u");
        assert!(
            again.iter().any(|line| line.contains(&order)),
            "o{id} is lost: {again:#?}"
        );
    }
    assert!(
        again.len() <= 30 - done + 1,
        "at most the last ack was lost: {again:#?}"
    );
    assert_eq!(backlog(&client, "end").await?, Vec::<String>::new());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_batch_nothing_is_lost_by_a_sigkill_nor_by_a_message_that_is_no_order() -> Result<()> {
    let (pulsar, _turn) = own("orders").await?;
    let client = client(pulsar).await?;
    let mut first = consumer(pulsar)?;
    send_batch(&client, TOPIC, orders(50)).await?;
    first.wait_for(" o0 of u", TIMEOUT)?;
    first.kill()?;
    first.wait(TIMEOUT)?;
    let mut second = consumer(pulsar)?;
    second.wait_for(" o49 of u, 1 cents: acknowledged", TIMEOUT)?;
    second.interrupt()?;
    second.wait(TIMEOUT)?.ok()?;
    let lines = second.lines();
    for id in 0..50 {
        let order = format!(" o{id} of u");
        assert!(
            lines.iter().any(|line| line.contains(&order)),
            "o{id} is lost: {lines:#?}"
        );
    }
    assert_eq!(backlog(&client, "end").await?, Vec::<String>::new());

    // The ack of the last would be the ack of the one that must be kept.
    let mut third = consumer(pulsar)?;
    let batch = ["{".to_owned(), orders(1).remove(0)];
    send_batch(&client, TOPIC, &batch).await?;
    third.wait_for("its batch is kept", TIMEOUT)?;
    send(&client, &orders(1)).await?;
    third.wait_for("acknowledged", TIMEOUT)?;
    third.interrupt()?;
    third.wait(TIMEOUT)?.ok()?;
    let kept = [&["end".to_owned()], &batch[..]].concat();
    assert_eq!(backlog(&client, "end of all").await?, kept);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_in_a_batch_that_is_larger_than_the_queue_is_an_orderly_end() -> Result<()> {
    let (pulsar, _turn) = own("orders").await?;
    let client = client(pulsar).await?;
    let mut running = consumer(pulsar)?;
    send(&client, &orders(3)).await?;
    let batches = [orders(200), orders(200)];
    for batch in &batches {
        send_batch(&client, TOPIC, batch).await?;
    }
    // Three alone, and the first of the batch.
    for _ in 0..5 {
        running.wait_for(" of u, 1 cents", TIMEOUT)?;
    }
    running.interrupt()?;
    running.wait(TIMEOUT)?.ok()?;
    assert_eq!(
        backlog(&client, "end").await?,
        batches.concat(),
        "the acks of the three have arrived, and the batches are kept"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_finishes_the_order_in_hand_and_its_ack_arrives() -> Result<()> {
    let (pulsar, _turn) = own("orders").await?;
    let client = client(pulsar).await?;
    let mut running = consumer(pulsar)?;
    let orders = orders(30);
    send(&client, &orders).await?;
    for _ in 0..5 {
        running.wait_for("acknowledged", TIMEOUT)?;
    }
    running.interrupt()?;
    running.wait(TIMEOUT)?.ok()?;
    let done = running
        .lines()
        .iter()
        .filter(|line| line.contains("acknowledged"))
        .count();
    assert!(done < 30);
    assert_eq!(backlog(&client, "end").await?, orders[done..]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_no_order_is_reported_and_kept() -> Result<()> {
    let (pulsar, _turn) = own("orders").await?;
    let client = client(pulsar).await?;
    let mut running = consumer(pulsar)?;
    send(&client, &["{".to_owned(), orders(1).remove(0)]).await?;
    running.wait_for("not an order, kept in the backlog", TIMEOUT)?;
    running.wait_for("o0 of u", TIMEOUT)?;
    running.interrupt()?;
    running.wait(TIMEOUT)?.ok()?;
    let reports = running
        .lines()
        .iter()
        .filter(|line| line.contains("not an order"))
        .count();
    assert_eq!(reports, 1, "no hot loop");
    assert_eq!(backlog(&client, "end").await?, ["{"]);
    Ok(())
}

/// The client tries to come back, for about a minute. Which of the two it is depends on the moment of the restart.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_broker_crash_the_consumer_goes_on_or_ends_with_an_error() -> Result<()> {
    let pulsar = Broker::private(Service::Pulsar)?;
    let mut running = consumer(&pulsar)?;
    pulsar.kill(1)?;
    pulsar.restart(1)?;
    send(&client(&pulsar).await?, &orders(1)).await?;
    if running.wait_for("o0 of u", Duration::from_secs(90)).is_ok() {
        running.interrupt()?;
        running.wait(TIMEOUT)?.ok()?;
    } else {
        let ended = running.wait(TIMEOUT)?;
        assert_eq!(ended.code(), 1, "{}", ended.stderr);
        assert!(
            ended.stderr.contains("lost the connection"),
            "{}",
            ended.stderr
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_long_backlog_the_end_is_orderly_too() -> Result<()> {
    let (pulsar, _turn) = own("orders").await?;
    let client = client(pulsar).await?;
    consumer(pulsar)?.kill()?;
    let orders = orders(500);
    send(&client, &orders).await?;
    let mut running = consumer(pulsar)?;
    for _ in 0..3 {
        running.wait_for("acknowledged", TIMEOUT)?;
    }
    running.interrupt()?;
    let ended = running.wait(TIMEOUT)?.ok()?;
    let done = ended.stdout.matches("acknowledged").count();
    assert!(done < 400, "no queue was full");
    assert_eq!(backlog(&client, "end").await?, orders[done..]);
    Ok(())
}
