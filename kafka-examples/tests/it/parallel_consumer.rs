//! Many records at once, in order per key, and never a position past a record that is not done.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT};
use futures::future::try_join_all;
use rdkafka::ClientConfig;
use rdkafka::producer::{FutureProducer, FutureRecord};

use crate::reader::committed;
use crate::shared;

const TOPIC: &str = "parallel-orders";

fn example(kafka: &Broker) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_parallel_consumer"))
        .broker(kafka)
        .spawn()
}

/// Sends orders of twenty users, in order.
pub async fn send(kafka: &Broker, topic: &str, count: usize) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("enable.idempotence", "true")
        .create()?;
    let sent = (0..count).map(|number| {
        let (user, order) = (format!("user-{}", number % 20), format!("order-{number}"));
        let record = FutureRecord::to(topic).key(&user).payload(&order);
        let report = producer.send_result(record).map_err(|(error, _)| error);
        async { anyhow::Ok(report?.await?.map_err(|(error, _)| error)?) }
    });
    try_join_all(sent).await?;
    Ok(())
}

/// Partition, offset, and key of the records that are done, in the order in which they were done.
pub type Done = Vec<(i32, i64, String)>;

pub fn done(member: &mut Running) -> Result<Done> {
    let mut all = Vec::new();
    for line in member.lines() {
        // partition 0 offset 3: user-7 order-11 done
        if line.starts_with("partition ") && line.ends_with(" done") {
            let words: Vec<&str> = line.split(' ').collect();
            let offset = words[3].trim_end_matches(':').parse()?;
            let key = words.get(4).context("no key")?;
            all.push((words[1].parse()?, offset, key.to_string()));
        }
    }
    Ok(all)
}

pub fn distinct<'a>(all: impl IntoIterator<Item = &'a Done>) -> usize {
    let places = all.into_iter().flatten().map(|at| (at.0, at.1));
    places.collect::<BTreeSet<_>>().len()
}

/// Each key's records are done in the order of their offsets. A record that is repeated begins that order again.
pub fn check_order(done: &Done) {
    let mut last: BTreeMap<(i32, &str), i64> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for (partition, offset, key) in done {
        if !seen.insert((partition, offset)) {
            continue;
        }
        if let Some(before) = last.insert((*partition, key), *offset) {
            assert!(
                before < *offset,
                "{key}: {before} before {offset} on {partition}"
            );
        }
    }
}

/// Everything before each position is among these.
fn check_positions(positions: &BTreeMap<i32, i64>, done: &Done) {
    let done: BTreeSet<(i32, i64)> = done.iter().map(|at| (at.0, at.1)).collect();
    for (partition, next) in positions {
        let missing = (0..*next).find(|offset| !done.contains(&(*partition, *offset)));
        assert_eq!(missing, None, "committed {next} on {partition} over a gap");
    }
}

/// Waits until the broker has a position, and returns when it has moved.
fn wait_for_commit(kafka: &Broker, from: i64) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while committed(kafka, TOPIC, TOPIC)?.values().sum::<i64>() <= from {
        ensure!(Instant::now() < deadline, "nothing is committed");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[tokio::test]
async fn sigkill_loses_nothing_and_keeps_the_order_of_each_key() -> Result<()> {
    const ORDERS: usize = 3000;
    let mut chance = compose::harness::chance()?;
    let kafka = shared::kafka(&["kafka_parallel_consumer"])?;
    send(&kafka, TOPIC, ORDERS).await?;
    let (mut all, mut before) = (Vec::new(), 0);
    for _ in 0..2 {
        let mut member = example(&kafka)?;
        member.wait_for(" done", TIMEOUT)?;
        wait_for_commit(&kafka, before)?;
        for _ in 0..chance.usize(1..100) {
            member.wait_for(" done", TIMEOUT)?;
        }
        member.kill()?;
        member.wait(TIMEOUT)?;
        let killed = done(&mut member)?;
        check_order(&killed);
        let mut last: BTreeMap<i32, i64> = BTreeMap::new();
        let overtakes = |at: &(i32, i64, String)| last.insert(at.0, at.1) > Some(at.1);
        assert!(
            killed.iter().any(overtakes),
            "no order overtook another, so no gap was possible"
        );
        all.extend(killed);
        let positions = committed(&kafka, TOPIC, TOPIC)?;
        check_positions(&positions, &all);
        before = positions.values().sum();
    }
    assert!(distinct([&all]) < ORDERS, "the kill came too late");

    let mut last = example(&kafka)?;
    last.wait_for(" done", TIMEOUT)?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let now = done(&mut last)?;
        if distinct([&all, &now]) == ORDERS {
            break;
        }
        ensure!(Instant::now() < deadline, "only {}", distinct([&all, &now]));
        std::thread::sleep(Duration::from_millis(50));
    }
    last.terminate()?;
    last.wait(TIMEOUT)?.ok()?;
    check_order(&done(&mut last)?);
    let ends = committed(&kafka, TOPIC, TOPIC)?;
    assert_eq!(usize::try_from(ends.values().sum::<i64>())?, ORDERS);
    Ok(())
}

/// Orders after a slow one are done, and a commit follows: it does not pass the slow one.
#[tokio::test]
async fn commit_does_not_pass_an_order_that_is_not_done() -> Result<()> {
    let kafka = shared::kafka(&["kafka_parallel_consumer"])?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let send = async |partition, payload: &str| {
        let record = FutureRecord::<(), str>::to(TOPIC).partition(partition);
        let sent = producer.send(record.payload(payload), TIMEOUT).await;
        sent.map_err(|(error, _)| error)
    };
    for payload in ["1", "600000", "1", "1"] {
        send(0, payload).await?;
    }
    let mut member = example(&kafka)?;
    for _ in 0..3 {
        member.wait_for(" 1 done", TIMEOUT)?;
    }
    send(1, "1").await?;
    let deadline = Instant::now() + TIMEOUT;
    while committed(&kafka, TOPIC, TOPIC)?[&1] != 1 {
        ensure!(Instant::now() < deadline, "nothing is committed");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(committed(&kafka, TOPIC, TOPIC)?[&0], 1);
    member.terminate()?;
    member.wait(TIMEOUT)?.ok()?;
    assert_eq!(committed(&kafka, TOPIC, TOPIC)?[&0], 1);
    // The next member repeats the orders after the slow one.
    example(&kafka)?.wait_for("partition 0 offset 2: ", TIMEOUT)?;
    Ok(())
}

#[tokio::test]
async fn a_rebalance_amid_work_loses_nothing() -> Result<()> {
    const ORDERS: usize = 4000;
    let kafka = shared::kafka(&["kafka_parallel_consumer"])?;
    send(&kafka, TOPIC, ORDERS).await?;
    let mut first = example(&kafka)?;
    first.wait_for(" done", TIMEOUT)?;
    // It joins while records are in work: their partitions are revoked.
    let mut second = example(&kafka)?;
    second.wait_for(" done", TIMEOUT)?;
    first.terminate()?;
    first.wait(TIMEOUT)?.ok()?;
    let first = done(&mut first)?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let now = done(&mut second)?;
        check_positions(
            &committed(&kafka, TOPIC, TOPIC)?,
            &[first.clone(), done(&mut second)?].concat(),
        );
        if distinct([&first, &now]) == ORDERS {
            break;
        }
        ensure!(
            Instant::now() < deadline,
            "only {}",
            distinct([&first, &now])
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    second.interrupt()?;
    second.wait(TIMEOUT)?.ok()?;
    let ends = committed(&kafka, TOPIC, TOPIC)?;
    assert_eq!(usize::try_from(ends.values().sum::<i64>())?, ORDERS);
    Ok(())
}

#[tokio::test]
async fn any_bytes_are_worked_on() -> Result<()> {
    let kafka = shared::kafka(&["kafka_parallel_consumer"])?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let records: [Option<&[u8]>; 4] = [None, Some(b""), Some(b"\xff"), Some(b"good")];
    for payload in records {
        for key in records {
            let mut record = FutureRecord::<[u8], [u8]>::to(TOPIC).partition(0);
            (record.key, record.payload) = (key, payload);
            let sent = producer.send(record, TIMEOUT).await;
            sent.map_err(|(error, _)| error)?;
        }
    }
    let mut member = example(&kafka)?;
    for _ in 0..16 {
        member.wait_for(" done", TIMEOUT)?;
    }
    member.interrupt()?;
    member.wait(TIMEOUT)?.ok()?;
    assert_eq!(committed(&kafka, TOPIC, TOPIC)?[&0], 16);
    Ok(())
}

/// One key fills all of the records that may be in work, and there are more to receive.
#[tokio::test]
async fn sigterm_is_heard_while_one_key_is_busy() -> Result<()> {
    const ORDERS: usize = 1000;
    let kafka = shared::kafka(&["kafka_parallel_consumer"])?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let sent = (0..ORDERS).map(|_| {
        let record = FutureRecord::to(TOPIC)
            .partition(0)
            .key("busy")
            .payload("order");
        producer.send(record, TIMEOUT)
    });
    try_join_all(sent).await.map_err(|(error, _)| error)?;
    let mut member = example(&kafka)?;
    member.wait_for(" done", TIMEOUT)?;
    member.terminate()?;
    member.wait(TIMEOUT)?.ok()?;
    let done = done(&mut member)?;
    assert!(done.len() < ORDERS, "the signal was not heard");
    // All is committed but the records that were being processed.
    let committed = usize::try_from(committed(&kafka, TOPIC, TOPIC)?[&0])?;
    assert!(
        (1..=done.len()).contains(&committed) && done.len() - committed < 64,
        "{committed} of {done:?}"
    );
    Ok(())
}
