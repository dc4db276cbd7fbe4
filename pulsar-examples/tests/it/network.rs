//! The network between client and broker fails, and the broker does not.

use std::time::Duration;

use anyhow::{Result, bail};
use compose::harness::{Direction, Example, Finished, Proxy, Running};
use compose::{Broker, Service};
use pulsar::{Consumer, TokioExecutor};

use crate::support::{TIMEOUT, backlog, client, consumer, next, send, stats, stop, topic, until};

const PRODUCER: &str = env!("CARGO_BIN_EXE_pulsar_producer");
const CONSUMER: &str = env!("CARGO_BIN_EXE_pulsar_consumer");

/// How late the broker's answers are: so long there is time to see a message in the topic before its receipt arrives.
const LATE: Duration = Duration::from_millis(700);
/// The consumer asks after half a minute of silence, and waits five seconds for the answer.
const NOTICES: Duration = Duration::from_secs(90);

fn start(program: &str, proxy: &Proxy) -> Result<Running> {
    Example::new(program).proxy(proxy).spawn()
}

/// All that the subscription `judge` still has, up to a message of our own.
async fn read(broker: &Broker, topic: &str) -> Result<Vec<String>> {
    let client = client(broker).await?;
    send(&client, topic, ["the end"]).await?;
    let mut judge: Consumer<Vec<u8>, TokioExecutor> = consumer(&client, topic, "judge").await?;
    let mut all = Vec::new();
    loop {
        let message = next(&mut judge).await?;
        judge.ack(&message).await?;
        let text = String::from_utf8(message.deserialize())?;
        if text == "the end" {
            break;
        }
        all.push(text);
    }
    judge.close().await?;
    Ok(all)
}

/// Has the broker keep what comes to the topic.
async fn subscribe(broker: &Broker, topic: &str) -> Result<()> {
    let client = client(broker).await?;
    Ok(consumer(&client, topic, "judge").await?.close().await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_receipt_is_reported_as_may_or_may_not_be_stored() -> Result<()> {
    let (broker, proxy) = Proxy::in_front_of(Service::Pulsar)?;
    let broker = &broker;
    let orders = topic("orders");
    subscribe(broker, &orders).await?;
    let ended = lose_a_receipt(broker, &proxy, &orders).await?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    let receipts = ended.stdout.matches(": stored as ").count();
    let order = format!("order-{}", 123 + receipts);
    let said = format!("{order}: no receipt from");
    assert!(ended.stderr.contains(&said), "{}", ended.stderr);
    let said = "it may or may not be stored";
    assert!(ended.stderr.contains(said), "{}", ended.stderr);
    // It is.
    let stored = read(broker, &orders).await?;
    assert_eq!(stored.len(), receipts + 1, "{stored:?}");
    assert!(stored.iter().any(|one| one.contains(&order)), "{stored:?}");
    Ok(())
}

/// Of a producer whose order is stored, and whose receipt is on its way.
async fn lose_a_receipt(broker: &Broker, proxy: &Proxy, topic: &str) -> Result<Finished> {
    // On a busy machine the fault may come too late.
    for _ in 0..5 {
        proxy.delay(Direction::ToClient, LATE)?;
        let mut producer = start(PRODUCER, proxy)?;
        until("an order is stored", async || {
            Ok(backlog(broker, topic, "judge").await? > 0)
        })
        .await?;
        proxy.swallow(Direction::ToClient)?;
        let ended = producer.wait(TIMEOUT)?;
        if ended.code() != 0 {
            return Ok(ended);
        }
        read(broker, topic).await?;
        proxy.heal()?;
    }
    bail!("however early the fault, the producer has got its receipt, or does without")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_notices_that_nothing_comes_through_and_its_order_goes_to_the_next() -> Result<()>
{
    let (broker, proxy) = Proxy::in_front_of(Service::Pulsar)?;
    let orders = topic("orders");
    let direct = client(&broker).await?;
    let order = |id| format!(r#"{{"order_id":"{id}","user_id":"u","amount":1}}"#);
    let mut first = start(CONSUMER, &proxy)?;
    first.wait_for("subscribed", TIMEOUT)?;
    send(&direct, &orders, [order("before")]).await?;
    first.wait_for("before of u, 1 cents: acknowledged", TIMEOUT)?;
    proxy.black_hole()?;
    send(&direct, &orders, [order("unseen")]).await?;
    // The broker has sent it, and does not know yet that it has sent it to nobody.
    until("the order is on its way", async || {
        let stats = stats(&broker, &orders).await?;
        let sent = &stats["subscriptions"]["order-processor"]["msgOutCounter"];
        Ok(*sent == 2)
    })
    .await?;
    let ended = first.wait(NOTICES)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    let said = &ended.stderr;
    assert!(said.contains("lost the connection to"), "{said}");
    assert!(!ended.stdout.contains("unseen"), "{}", ended.stdout);
    proxy.heal()?;
    let mut second = start(CONSUMER, &proxy)?;
    second.wait_for("unseen of u, 1 cents: acknowledged", TIMEOUT)?;
    stop(&mut second)?;
    assert_eq!(backlog(&broker, &orders, "order-processor").await?, 0);
    Ok(())
}
