//! The network between client and broker fails, and the broker does not.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use compose::harness::{Direction, Example, Finished, Proxy, Running};
use compose::{Broker, Service};
use pulsar::{Consumer, TokioExecutor};

use crate::support::{
    TIMEOUT, backlog, client, consumer, next, numbers, send, stats, stop, topic, until,
};

const PRODUCER: &str = env!("CARGO_BIN_EXE_pulsar_producer");
const CONSUMER: &str = env!("CARGO_BIN_EXE_pulsar_consumer");
const RECONNECT: &str = env!("CARGO_BIN_EXE_pulsar_reconnect");

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
async fn a_tick_without_a_receipt_is_sent_again_and_all_are_received() -> Result<()> {
    let (broker, proxy) = Proxy::in_front_of(Service::Pulsar)?;
    let ticks = topic("reconnect-ticks");
    subscribe(&broker, &ticks).await?;
    let mut program = start(RECONNECT, &proxy)?;
    for _ in 0..5 {
        program.wait_for("received: tick", TIMEOUT)?;
    }
    let subscription = subscription_of_the_run(&broker, &ticks).await?;
    proxy.swallow(Direction::ToClient)?;
    program.wait_for("producer: made anew", TIMEOUT)?;
    // Healed early, while the client still tries to get its lost connections back by itself.
    proxy.heal()?;
    program.wait_for("stored: tick", TIMEOUT)?;
    until("what came during the fault is read", async || {
        Ok(backlog(&broker, &ticks, &subscription).await? == 0)
    })
    .await?;
    let newest = numbers(&program.lines(), "received: tick ")
        .into_iter()
        .max();
    let later = newest.context("no ticks")? + 30;
    program.wait_for(&format!("received: tick {later}"), TIMEOUT)?;
    // By now, a consumer that was thrown away would have come back.
    let stats = stats(&broker, &ticks).await?;
    let consumers = &stats["subscriptions"][&subscription]["consumers"];
    assert_eq!(consumers.as_array().map(Vec::len), Some(1), "{consumers}");

    let said = stop(&mut program)?;
    let last = said.lines().last().unwrap_or_default();
    assert!(last.contains(" indeterminate 0 /"), "{last}");
    assert!(last.ends_with(" lost 0 / unexpected 0"), "{last}");
    let lines: Vec<String> = said.lines().map(str::to_owned).collect();
    let all = |prefix| -> BTreeSet<u32> { numbers(&lines, prefix).into_iter().collect() };
    let mut there: BTreeMap<u32, u32> = BTreeMap::new();
    for tick in read(&broker, &ticks).await? {
        let number = tick.rsplit(' ').next().context("no number")?.parse()?;
        *there.entry(number).or_default() += 1;
    }
    let stored: BTreeSet<u32> = there.keys().copied().collect();
    assert_eq!(all("stored: tick "), stored);
    assert_eq!(all("received: tick "), stored);
    // What is there twice was stored when its receipt was lost.
    let twice = there.values().any(|count| *count > 1);
    assert!(twice, "no receipt was lost");
    Ok(())
}

async fn subscription_of_the_run(broker: &Broker, topic: &str) -> Result<String> {
    let stats = stats(broker, topic).await?;
    let mut names = stats["subscriptions"]
        .as_object()
        .into_iter()
        .flat_map(serde_json::Map::keys);
    let name = names.find(|name| name.starts_with("reconnect-ticks-"));
    name.cloned().context("the run has no subscription")
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
