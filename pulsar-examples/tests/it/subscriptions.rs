//! The four subscription types: who gets what, in which order, and who takes over from a consumer that was killed.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use compose::harness::Running;
use compose::{Broker, Service};

use crate::support::{
    TIMEOUT, backlog, client, numbers, own, run, send_batch, shared, start, stats, stop, topic,
    until,
};

const EXCLUSIVE: &str = env!("CARGO_BIN_EXE_pulsar_exclusive");
const FAILOVER: &str = env!("CARGO_BIN_EXE_pulsar_failover");
const SHARED: &str = env!("CARGO_BIN_EXE_pulsar_shared");
const KEY_SHARED: &str = env!("CARGO_BIN_EXE_pulsar_key_shared");

fn consumer(binary: &str, broker: &Broker, args: &[&str]) -> Result<Running> {
    let mut running = start(binary, broker, args)?;
    running.wait_for("subscribed", TIMEOUT)?;
    Ok(running)
}

/// A consumer is killed after the first of a hundred orders: the next gets all that had a receipt, in order.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_acknowledged_after_its_last_order_on_all_four() -> Result<()> {
    let client = client(shared()?).await?;
    for (binary, orders, subscription) in [
        (EXCLUSIVE, "exclusive-orders", "exclusive-worker"),
        (FAILOVER, "failover-orders", "failover-worker"),
        (SHARED, "shared-orders", "shared-worker"),
        (KEY_SHARED, "key-shared-orders", "key-shared-worker"),
    ] {
        let (broker, _turn) = own(orders).await?;
        let orders = topic(orders);
        let mut first = consumer(binary, broker, &["first"])?;
        let batch = (1..=100).map(|number| format!("order-{number}"));
        send_batch(&client, &orders, batch).await?;
        first.wait_for("order-1", TIMEOUT)?;
        first.kill()?;
        first.wait(TIMEOUT)?;
        let mut second = consumer(binary, broker, &["second"])?;
        until("all are acknowledged", async || {
            Ok(backlog(broker, &orders, subscription).await? == 0)
        })
        .await?;
        stop(&mut second)?;
        assert_eq!(
            numbers(&second.lines(), "order-"),
            (1..=100).collect::<Vec<_>>(),
            "{subscription}"
        );
    }
    Ok(())
}

/// None is lost or overtaken. Orders may come again, from one whose ack was lost with the broker to the furthest, and
/// once more if the consumer, too, had to be started again.
fn in_order(done: &[u32], all: &[u32], what: &str) {
    let mut first: Vec<u32> = Vec::new();
    for number in done {
        if !first.contains(number) {
            first.push(*number);
        }
    }
    assert_eq!(first, all, "{what}");
    let back = done.windows(2).filter(|pair| pair[0] >= pair[1]).count();
    assert!(back <= 2, "{what}: {back} times back: {done:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn failover_and_key_shared_keep_the_order_over_a_sigkill_of_the_broker() -> Result<()> {
    let broker = Broker::private(Service::Pulsar)?;
    let mut running = Vec::new();
    for (binary, orders, subscription) in [
        (FAILOVER, "failover-orders", "failover-worker"),
        (KEY_SHARED, "key-shared-orders", "key-shared-worker"),
    ] {
        let first = consumer(binary, &broker, &["anna"])?;
        running.push((binary, topic(orders), subscription, first));
    }
    for (binary, ..) in &running {
        run(binary, &broker, &["send", "400"])?;
    }
    for (.., first) in &mut running {
        wait_lines(first, "order-", 20)?;
    }
    broker.kill(1)?;
    let mut before = Vec::new();
    for (.., first) in &mut running {
        before.push(numbers(&first.lines(), "order-").len());
    }
    broker.restart(1)?;
    for (binary, orders, subscription, mut first) in running {
        let lines = {
            // It comes back by itself, or ends with an error and is started again.
            let mut second = None;
            until("all are acknowledged", async || {
                if second.is_none() && first.try_wait()?.is_some() {
                    second = Some(consumer(binary, &broker, &["anna"])?);
                }
                Ok(backlog(&broker, &orders, subscription).await? == 0)
            })
            .await?;
            match &mut second {
                Some(second) => {
                    stop(second)?;
                    [first.lines(), second.lines()].concat()
                }
                None => {
                    stop(&mut first)?;
                    first.lines()
                }
            }
        };
        if binary == FAILOVER {
            let all: Vec<u32> = (1..=400).collect();
            in_order(&numbers(&lines, "order-"), &all, subscription);
            continue;
        }
        let users = by_user(&lines);
        for user in 0..8 {
            let all: Vec<u32> = (1..=400).filter(|number| number % 8 == user).collect();
            let key = format!("user-{user}");
            in_order(users.get(&key).map_or(&[][..], Vec::as_slice), &all, &key);
        }
    }
    assert!(
        before.iter().all(|done| *done < 400),
        "killed too late to prove anything: {before:?}"
    );
    Ok(())
}

fn wait_lines(running: &mut Running, text: &str, count: u32) -> Result<()> {
    (0..count).try_for_each(|_| running.wait_for(text, TIMEOUT).map(drop))
}

/// What the second has done is the rest, in order: from what the first had not acknowledged to the end.
fn rest_in_order(first: &[u32], second: &[u32], end: u32) {
    let last = first.last().copied().unwrap_or(0);
    assert_eq!(first, (1..=last).collect::<Vec<_>>(), "the first, in order");
    assert!(last < end, "killed too late to prove anything");
    let from = second.first().copied().unwrap_or(0);
    assert!(
        from >= 1 && from <= last + 1,
        "lost between {last} and {from}"
    );
    assert_eq!(
        second,
        (from..=end).collect::<Vec<_>>(),
        "the second, in order"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn exclusive_refuses_a_second_and_the_next_goes_on_in_order() -> Result<()> {
    let (broker, _turn) = own("exclusive-orders").await?;
    let mut first = consumer(EXCLUSIVE, broker, &["first"])?;
    let refused = start(EXCLUSIVE, broker, &["second"])?.wait(TIMEOUT)?;
    assert_eq!(refused.code(), 1);
    assert!(
        refused.stderr.starts_with("Error: another consumer has"),
        "{}",
        refused.stderr
    );
    let mut third = start(EXCLUSIVE, broker, &["third", "wait"])?;
    third.wait_for("waiting", TIMEOUT)?;
    run(EXCLUSIVE, broker, &["send", "200"])?;
    wait_lines(&mut first, "first: order-", 10)?;
    first.kill()?;
    first.wait(TIMEOUT)?;
    third.wait_for("third: order-200", TIMEOUT)?;
    stop(&mut third)?;
    let (first, third) = (first.lines(), third.lines());
    rest_in_order(&numbers(&first, "order-"), &numbers(&third, "order-"), 200);
    assert_eq!(
        backlog(broker, &topic("exclusive-orders"), "exclusive-worker").await?,
        0
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn failover_keeps_the_order_over_a_kill_and_the_better_priority_takes_over() -> Result<()> {
    let (broker, _turn) = own("failover-orders").await?;
    let orders = topic("failover-orders");
    let mut main = consumer(FAILOVER, broker, &["main", "0"])?;
    let mut standby = consumer(FAILOVER, broker, &["standby", "1"])?;
    run(FAILOVER, broker, &["send", "200"])?;
    wait_lines(&mut main, "main: order-", 20)?;
    let idle = numbers(&standby.lines(), "order-");
    assert!(idle.is_empty(), "a stand-in gets nothing: {idle:?}");
    main.kill()?;
    main.wait(TIMEOUT)?;
    standby.wait_for("standby: order-200", TIMEOUT)?;
    rest_in_order(
        &numbers(&main.lines(), "order-"),
        &numbers(&standby.lines(), "order-"),
        200,
    );

    let mut main = consumer(FAILOVER, broker, &["main", "0"])?;
    until("main is the active one again", async || {
        let stats = stats(broker, &orders).await?;
        Ok(stats["subscriptions"]["failover-worker"]["activeConsumerName"] == "main")
    })
    .await?;
    run(FAILOVER, broker, &["send", "5"])?;
    main.wait_for("main: order-5", TIMEOUT)?;
    stop(&mut main)?;
    stop(&mut standby)?;
    assert_eq!(backlog(broker, &orders, "failover-worker").await?, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_deals_out_and_what_a_killed_consumer_held_goes_to_the_other() -> Result<()> {
    let (broker, _turn) = own("shared-orders").await?;
    let orders = topic("shared-orders");
    let mut anna = consumer(SHARED, broker, &["anna"])?;
    let mut ben = consumer(SHARED, broker, &["ben"])?;
    run(SHARED, broker, &["send", "300"])?;
    wait_lines(&mut anna, "anna: order-", 20)?;
    wait_lines(&mut ben, "ben: order-", 20)?;
    anna.kill()?;
    anna.wait(TIMEOUT)?;
    until("all are acknowledged", async || {
        Ok(backlog(broker, &orders, "shared-worker").await? == 0)
    })
    .await?;
    stop(&mut ben)?;
    let (anna, ben) = (
        numbers(&anna.lines(), "order-"),
        numbers(&ben.lines(), "order-"),
    );
    assert!(anna.len() < 280, "killed too late to prove anything");
    let all: BTreeSet<u32> = anna.iter().chain(&ben).copied().collect();
    assert_eq!(all, (1..=300).collect(), "each at least once");
    let twice = anna.len() + ben.len() - all.len();
    // The ack of the order in hand, and those that wait behind fetched messages.
    assert!(twice <= 10, "{twice} orders done twice for one kill");

    // With far more in the backlog than the queue holds, the end is still orderly, and no ack is missing.
    run(SHARED, broker, &["send", "3000"])?;
    let mut carl = consumer(SHARED, broker, &["carl"])?;
    wait_lines(&mut carl, "carl: order-", 10)?;
    stop(&mut carl)?;
    let done = numbers(&carl.lines(), "order-").len() as u64;
    until("the rest is in the backlog", async || {
        Ok(backlog(broker, &orders, "shared-worker").await? == 3000 - done)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn key_shared_keeps_the_order_of_each_key_over_a_kill() -> Result<()> {
    let (broker, _turn) = own("key-shared-orders").await?;
    let orders = topic("key-shared-orders");
    let mut anna = consumer(KEY_SHARED, broker, &["anna"])?;
    let mut ben = consumer(KEY_SHARED, broker, &["ben"])?;
    until("both are there", async || {
        let stats = stats(broker, &orders).await?;
        let consumers = stats["subscriptions"]["key-shared-worker"]["consumers"].as_array();
        Ok(consumers.is_some_and(|all| all.len() == 2))
    })
    .await?;
    run(KEY_SHARED, broker, &["send", "400"])?;
    wait_lines(&mut anna, "anna: user-", 20)?;
    wait_lines(&mut ben, "ben: user-", 20)?;
    let before = by_user(&ben.lines());
    anna.kill()?;
    anna.wait(TIMEOUT)?;
    until("all are acknowledged", async || {
        Ok(backlog(broker, &orders, "key-shared-worker").await? == 0)
    })
    .await?;
    stop(&mut ben)?;
    let (anna, ben) = (by_user(&anna.lines()), by_user(&ben.lines()));
    assert!(
        anna.values().map(Vec::len).sum::<usize>() < 200,
        "killed too late to prove anything"
    );
    assert!(
        anna.keys().all(|user| !before.contains_key(user)),
        "a key is with one consumer"
    );
    let mut moved = 0;
    for user in 0..8 {
        let key = format!("user-{user}");
        let all: Vec<u32> = (1..=400).filter(|number| number % 8 == user).collect();
        let second = ben.get(&key).cloned().unwrap_or_default();
        match anna.get(&key) {
            None => assert_eq!(second, all, "{key}"),
            Some(first) => {
                moved += 1;
                assert_eq!(*first, all[..first.len()], "{key}, before the kill");
                assert_eq!(
                    second,
                    all[all.len() - second.len()..],
                    "{key}, after the kill"
                );
                assert!(first.len() + second.len() >= all.len(), "{key}: lost");
            }
        }
    }
    assert!(moved > 0);
    Ok(())
}

fn by_user(lines: &[String]) -> BTreeMap<String, Vec<u32>> {
    let mut users: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for line in lines {
        if let Some((_, rest)) = line.split_once(": user-")
            && let Some((user, order)) = rest.split_once(" order-")
            && let Ok(number) = order.parse()
        {
            users
                .entry(format!("user-{user}"))
                .or_default()
                .push(number);
        }
    }
    users
}
