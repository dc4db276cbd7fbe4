//! A handover amid work repeats nothing, although records overtake each other.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT};
use rdkafka::ClientConfig;
use rdkafka::producer::{FutureProducer, FutureRecord};

use crate::arriving_orders::{confirm, while_fed};
use crate::parallel_consumer::{Done, check_order, distinct, done, send};
use crate::reader::committed;
use crate::shared;

const TOPIC: &str = "handover-orders";

fn example(kafka: &Broker) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_parallel_rebalance"))
        .broker(kafka)
        .spawn()
}

/// What the group did to a member, and what went wrong.
fn said(member: &mut Running) -> Vec<String> {
    let mut lines = member.lines();
    lines.retain(|line| !line.ends_with(" done"));
    lines
}

/// On a machine that is busy enough a member loses its partitions, or a commit does not arrive. The member says so, and
/// there was no clean handover to judge: then once more, on another Kafka. A record that is repeated without such a line
/// is a failure at once.
fn until_clean(scenario: impl Fn(&Broker) -> Result<bool>) -> Result<()> {
    const ATTEMPTS: usize = 5;
    for _ in 0..ATTEMPTS {
        let kafka = shared::kafka(&["kafka_parallel_rebalance"])?;
        if scenario(&kafka)? {
            return Ok(());
        }
    }
    bail!("no clean handover in {ATTEMPTS} attempts")
}

fn is_clean(said: &[String]) -> bool {
    let unclean = |line: &&String| {
        line.contains("lost: true") || line.starts_with("not committed") || is_repeated(line)
    };
    let found = said.iter().find(unclean);
    found
        .inspect(|line| println!("not a clean handover: {line}"))
        .is_none()
}

/// A record was not done in time.
fn is_repeated(line: &str) -> bool {
    line.starts_with("revoked: ") && !line.ends_with("not done: 0")
}

/// Whether records were done while a rebalance waited for them.
fn waited(member: &mut Running) -> bool {
    let mut waits = false;
    member.lines().iter().any(|line| {
        waits = line.starts_with("finishing: ") || waits && !line.starts_with("revoked: ");
        waits && line.ends_with(" done")
    })
}

/// Sends until it is stopped, more than the members can do. A quarter is of one busy user, whose orders wait, and orders
/// of the others overtake them.
fn feed(kafka: &Broker, stop: &AtomicBool) -> Result<usize> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("enable.idempotence", "true")
        .set("linger.ms", "0")
        .create()?;
    let mut reports = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        for partition in 0..3 {
            let number = reports.len() / 3;
            let user = match number % 4 {
                0 => format!("busy-{partition}"),
                _ => format!("user-{partition}-{}", number % 23),
            };
            let record = FutureRecord::to(TOPIC)
                .partition(partition)
                .key(&user)
                .payload("order");
            reports.push(producer.send_result(record).map_err(|(error, _)| error)?);
        }
        std::thread::sleep(Duration::from_millis(8));
    }
    confirm(reports)
}

fn wait_for_all(before: &Done, member: &mut Running, sent: usize) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let now = distinct([before, &done(member)?]);
        if now == sent {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "only {now} of {sent}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_handover_repeats_no_record_and_keeps_the_order_of_each_key() -> Result<()> {
    until_clean(handover)
}

/// A second member joins, and the first one leaves, while both are busy.
fn handover(kafka: &Broker) -> Result<bool> {
    let mut first = example(kafka)?;
    let mut second = None;
    let busy = || {
        for _ in 0..200 {
            first.wait_for(" done", TIMEOUT)?;
        }
        let second = second.insert(example(kafka)?);
        for _ in 0..200 {
            second.wait_for(" done", TIMEOUT)?;
        }
        first.terminate()?;
        first.wait(TIMEOUT)?.ok()?;
        for _ in 0..200 {
            second.wait_for(" done", TIMEOUT)?;
        }
        Ok(())
    };
    let sent = while_fed(|stop| feed(kafka, stop), busy)?;
    let mut second = second.context("no second member")?;
    let before = done(&mut first)?;
    wait_for_all(&before, &mut second, sent)?;
    second.interrupt()?;
    second.wait(TIMEOUT)?.ok()?;

    let said = [said(&mut first), said(&mut second)].concat();
    if !is_clean(&said) {
        return Ok(false);
    }
    let after = done(&mut second)?;
    assert!(!before.is_empty() && !after.is_empty());
    assert_eq!(
        before.len() + after.len(),
        sent,
        "the handover repeated records: {said:#?}"
    );
    check_order(&before);
    check_order(&after);
    check_order(&[before.clone(), after].concat());
    let end = committed(kafka, TOPIC, TOPIC)?.values().sum::<i64>();
    assert_eq!(usize::try_from(end)?, sent);
    let overtaken = before
        .windows(2)
        .any(|at| at[0].0 == at[1].0 && at[0].1 > at[1].1);
    assert!(overtaken, "no record overtook another");
    let proves = waited(&mut first) || waited(&mut second);
    if !proves {
        println!("no record was in work, so nothing could be repeated: {said:#?}");
    }
    Ok(proves)
}

/// An order takes longer than the limit of ten seconds, so its partition moves before it is done.
#[tokio::test]
async fn an_order_that_takes_too_long_does_not_stop_a_rebalance_and_is_repeated() -> Result<()> {
    let kafka = shared::kafka(&["kafka_parallel_rebalance"])?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    // Each partition has a slow order, and after it one that shows that the slow one was received.
    for payload in ["25000", "1"] {
        for partition in 0..3 {
            let record = FutureRecord::<(), str>::to(TOPIC).partition(partition);
            let sent = producer.send(record.payload(payload), TIMEOUT).await;
            sent.map_err(|(error, _)| error)?;
        }
    }
    let mut first = example(&kafka)?;
    for _ in 0..3 {
        first.wait_for(" 1 done", TIMEOUT)?;
    }
    let mut second = example(&kafka)?;
    let revoked = first.wait_for("revoked: ", TIMEOUT)?;
    assert_eq!(revoked, "revoked: [0, 1, 2], lost: false, not done: 3");

    let slow = |all: &Done| all.iter().filter(|at| at.1 == 0).count();
    assert_eq!(slow(&done(&mut first)?), 0, "the rebalance waited");
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let (before, after) = (done(&mut first)?, done(&mut second)?);
        if distinct([&before, &after]) == 6 && slow(&before) >= 3 && slow(&after) > 0 {
            break;
        }
        ensure!(Instant::now() < deadline, "{before:?} {after:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
    for mut member in [first, second] {
        member.terminate()?;
        member.wait(TIMEOUT)?.ok()?;
    }
    assert_eq!(committed(&kafka, TOPIC, TOPIC)?.values().sum::<i64>(), 6);
    Ok(())
}

#[tokio::test]
async fn sigkill_loses_nothing() -> Result<()> {
    const ORDERS: usize = 2000;
    let mut chance = compose::harness::chance()?;
    let kafka = shared::kafka(&["kafka_parallel_rebalance"])?;
    send(&kafka, TOPIC, ORDERS).await?;
    let mut first = example(&kafka)?;
    for _ in 0..chance.usize(1..1000) {
        first.wait_for(" done", TIMEOUT)?;
    }
    first.kill()?;
    first.wait(TIMEOUT)?;
    let before = done(&mut first)?;
    let mut second = example(&kafka)?;
    // The group waits for the session timeout of the first one, 45 seconds.
    second.wait_for(" done", 3 * TIMEOUT)?;
    wait_for_all(&before, &mut second, ORDERS)?;
    second.terminate()?;
    second.wait(TIMEOUT)?.ok()?;
    let end = committed(&kafka, TOPIC, TOPIC)?.values().sum::<i64>();
    assert_eq!(usize::try_from(end)?, ORDERS);
    Ok(())
}
