//! One invoice per order for whoever reads what is committed, whatever is killed, frozen or malformed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use compose::harness::{Direction, Example, Proxy, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Headers;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use crate::ending::is_ending;
use crate::reader::{await_markers, read, send_large};
use crate::shared;

const ORDERS: &str = "exactly-once.orders";
const INVOICES: &str = "exactly-once.invoices";
const DEAD_LETTERS: &str = "exactly-once.orders.dlq";
const USERS: u32 = 7;

/// Slow, so that at nearly every moment a transaction is open, with some of it written.
fn worker(kafka: &Broker) -> Result<Running> {
    slow_worker().broker(kafka).spawn()
}

fn slow_worker() -> Example {
    Example::new(env!("CARGO_BIN_EXE_kafka_exactly_once"))
        .env("WORK_MS", "2")
        .env("BATCH", "50")
        .env("BATCH_MS", "50")
}

fn create_topics(kafka: &Broker) -> Result<()> {
    let sender = Example::new(env!("CARGO_BIN_EXE_kafka_exactly_once"));
    sender
        .args(["send"])
        .broker(kafka)
        .spawn()?
        .wait(TIMEOUT)?
        .ok()?;
    Ok(())
}

fn order(number: u32) -> String {
    let user = number % USERS;
    format!(r#"{{"order_id":"{number}","user_id":"user-{user}","cents":{number}}}"#)
}

type Bytes<'a> = Option<&'a [u8]>;

async fn produce(kafka: &Broker, records: &[(Bytes<'_>, Bytes<'_>)]) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("enable.idempotence", "true")
        .set("message.max.bytes", "2000000")
        .create()?;
    let mut reports = Vec::new();
    for (key, payload) in records {
        let record = FutureRecord::<[u8], [u8]> {
            key: *key,
            payload: *payload,
            ..FutureRecord::to(ORDERS)
        };
        reports.push(producer.send_result(record).map_err(|(error, _)| error)?);
    }
    for report in reports {
        report.await?.map_err(|(error, _)| error)?;
    }
    Ok(())
}

async fn produce_orders(kafka: &Broker, numbers: std::ops::Range<u32>) -> Result<()> {
    let orders: Vec<(String, String)> = numbers
        .map(|number| (format!("user-{}", number % USERS), order(number)))
        .collect();
    let records: Vec<(Bytes<'_>, Bytes<'_>)> = orders
        .iter()
        .map(|(key, payload)| (Some(key.as_bytes()), Some(payload.as_bytes())))
        .collect();
    produce(kafka, &records).await
}

fn judge(kafka: &Broker, isolation: &str) -> Result<BaseConsumer> {
    Ok(ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "exactly-once")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("isolation.level", isolation)
        .create()?)
}

/// Waits until the group has committed the end of all orders.
fn wait_until_done(kafka: &Broker, worker: &mut Running) -> Result<()> {
    let judge = judge(kafka, "read_uncommitted")?;
    let deadline = Instant::now() + 3 * TIMEOUT;
    let left = || -> Result<i64> {
        let mut left = 0;
        for partition in 0..2 {
            let mut at = TopicPartitionList::new();
            at.add_partition(ORDERS, partition);
            let position = match judge.committed_offsets(at, TIMEOUT)?.elements()[0].offset() {
                Offset::Offset(position) => position,
                _ => 0,
            };
            left += judge.fetch_watermarks(ORDERS, partition, TIMEOUT)?.1 - position;
        }
        Ok(left)
    };
    loop {
        // An error is what a broker that has just started answers.
        let left = left();
        if matches!(left, Ok(0)) {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline && worker.try_wait()?.is_none(),
            "orders are left: {left:?}, {:?}",
            worker.lines()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Each of the orders once, in order per key, and no transaction is left open.
fn check(kafka: &Broker, orders: std::ops::Range<u32>) -> Result<()> {
    let invoices = read(kafka, INVOICES, "read_committed")?;
    let mut per_key: BTreeMap<Vec<u8>, Vec<u32>> = BTreeMap::new();
    let mut places: BTreeMap<Vec<u8>, BTreeSet<i32>> = BTreeMap::new();
    for invoice in &invoices {
        let payload = std::str::from_utf8(invoice.payload().context("no payload")?)?;
        let number: u32 = payload
            .strip_prefix(r#"{"order_id":""#)
            .and_then(|rest| rest.split_once('"'))
            .context("no order_id")?
            .0
            .parse()?;
        assert_eq!(payload, order(number));
        let key = invoice.key().context("no key")?.to_vec();
        per_key.entry(key.clone()).or_default().push(number);
        places.entry(key).or_default().insert(invoice.partition());
    }
    for (key, numbers) in &per_key {
        let key = String::from_utf8_lossy(key);
        let expected: Vec<u32> = orders
            .clone()
            .filter(|number| key == format!("user-{}", number % USERS))
            .collect();
        assert_eq!(*numbers, expected, "{key}: lost, doubled, or out of order");
    }
    assert_eq!(per_key.len(), usize::try_from(USERS)?);
    assert!(places.values().all(|places| places.len() == 1));
    for partition in 0..2 {
        let end = |isolation: &str| -> Result<i64> {
            Ok(judge(kafka, isolation)?
                .fetch_watermarks(INVOICES, partition, TIMEOUT)?
                .1)
        };
        assert_eq!(end("read_committed")?, end("read_uncommitted")?, "open");
    }
    Ok(())
}

/// Waits until a transaction is open and some of it is written.
fn wait_until_open(kafka: &Broker) -> Result<()> {
    let (all, stable) = (
        judge(kafka, "read_uncommitted")?,
        judge(kafka, "read_committed")?,
    );
    let deadline = Instant::now() + TIMEOUT;
    loop {
        for partition in 0..2 {
            // In this order: what is committed meanwhile looks less open, and not more.
            let (_, end) = all.fetch_watermarks(INVOICES, partition, TIMEOUT)?;
            if stable.fetch_watermarks(INVOICES, partition, TIMEOUT)?.1 < end {
                return Ok(());
            }
        }
        ensure!(Instant::now() < deadline, "no transaction is ever open");
    }
}

#[tokio::test]
async fn each_order_once_over_kills_and_a_restart_of_the_broker() -> Result<()> {
    let mut chance = compose::harness::chance()?;
    let kafka = Broker::private(Service::Kafka)?;
    create_topics(&kafka)?;
    produce_orders(&kafka, 0..2500).await?;
    for round in 0..5 {
        let mut worker = worker(&kafka)?;
        worker.wait_for("committed: ", TIMEOUT)?;
        if round % 2 == 0 {
            wait_until_open(&kafka)?;
        } else {
            // At any moment.
            std::thread::sleep(Duration::from_millis(chance.u64(0..200)));
        }
        worker.kill()?;
        worker.wait(TIMEOUT)?;
    }
    let mut worker = worker(&kafka)?;
    worker.wait_for("committed: ", TIMEOUT)?;
    kafka.kill(1)?;
    kafka.restart(1)?;
    produce_orders(&kafka, 2500..3000).await?;
    wait_until_done(&kafka, &mut worker)?;
    worker.interrupt()?;
    worker.wait(TIMEOUT)?.ok()?;

    check(&kafka, 0..3000)?;
    // Whoever does not ask for `read_committed` sees what the killed ones had written: the kills hit transactions.
    let all = read(&kafka, INVOICES, "read_uncommitted")?.len();
    assert!(all > 3000, "the kills proved nothing: {all}");
    Ok(())
}

#[tokio::test]
async fn a_zombie_is_fenced_off_and_says_so() -> Result<()> {
    let kafka = shared::kafka(&["kafka_exactly_once"])?;
    create_topics(&kafka)?;
    produce_orders(&kafka, 0..1500).await?;
    let mut zombie = worker(&kafka)?;
    zombie.wait_for("committed: ", TIMEOUT)?;
    // In the midst of its next batch.
    std::thread::sleep(Duration::from_millis(50));
    zombie.pause()?;
    let mut successor = worker(&kafka)?;
    successor.wait_for("committed: ", TIMEOUT)?;
    let before = zombie.lines();
    zombie.resume()?;
    let ended = zombie.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    assert!(
        ended.stderr.contains("Error: fenced off: "),
        "{}",
        ended.stderr
    );
    let committed = |lines: &[String]| {
        let committed = |line: &&String| line.starts_with("committed: ");
        lines.iter().filter(committed).count()
    };
    // A line may still have been in the pipe when it was frozen.
    assert!(committed(&zombie.lines()) <= committed(&before) + 1);
    wait_until_done(&kafka, &mut successor)?;
    successor.interrupt()?;
    successor.wait(TIMEOUT)?.ok()?;
    check(&kafka, 0..1500)
}

#[tokio::test]
async fn what_is_no_order_is_dead_lettered_once_and_holds_up_nothing() -> Result<()> {
    let kafka = shared::kafka(&["kafka_exactly_once"])?;
    create_topics(&kafka)?;
    produce_orders(&kafka, 0..20).await?;
    // The largest that a broker takes by default: 1,048,588 bytes with all that surrounds it.
    let huge = vec![b'x'; 1_048_400];
    let bad: [(Bytes<'_>, Bytes<'_>); 5] = [
        (None, None),
        (Some(b""), Some(b"")),
        (Some(b"\xff\xfe"), Some(b"\xc3\x28")),
        (None, Some(b"{}")),
        (Some(b"k"), Some(&huge)),
    ];
    produce(&kafka, &bad).await?;
    let large = send_large(&kafka, ORDERS).await?;
    let bad: Vec<_> = bad.into_iter().chain([(None, Some(&large[..]))]).collect();
    produce_orders(&kafka, 20..40).await?;
    let mut worker = worker(&kafka)?;
    wait_until_done(&kafka, &mut worker)?;
    worker.interrupt()?;
    worker.wait(TIMEOUT)?.ok()?;
    check(&kafka, 0..40)?;
    let buried = read(&kafka, DEAD_LETTERS, "read_committed")?;
    assert_eq!(buried.len(), bad.len());
    for (key, payload) in bad.iter().copied() {
        let found = buried
            .iter()
            .find(|record| record.key() == key && record.payload() == payload);
        let headers = found.context("missing, or changed")?.headers();
        let names: Vec<&str> = headers
            .into_iter()
            .flat_map(Headers::iter)
            .map(|one| one.key)
            .collect();
        assert_eq!(names, ["reason", "topic", "partition", "offset"]);
    }
    let lines = worker.lines();
    // A session that ended in between has aborted the same once more.
    let aborts: BTreeSet<_> = lines
        .iter()
        .filter(|line| line.starts_with("aborted, "))
        .collect();
    assert_eq!(aborts.len(), bad.len(), "{lines:?}");
    Ok(())
}

/// All of it in one transaction would take 20 seconds, and the broker's patience ends after 15.
#[tokio::test]
async fn more_work_than_a_transaction_may_take_is_committed_in_parts() -> Result<()> {
    let kafka = shared::kafka(&["kafka_exactly_once"])?;
    create_topics(&kafka)?;
    produce_orders(&kafka, 0..100).await?;
    let mut worker = Example::new(env!("CARGO_BIN_EXE_kafka_exactly_once"))
        .env("WORK_MS", "200")
        .broker(&kafka)
        .spawn()?;
    wait_until_done(&kafka, &mut worker)?;
    worker.interrupt()?;
    worker.wait(TIMEOUT)?.ok()?;
    check(&kafka, 0..100)
}

/// Each time, the worker gets no answer to its commit, and cannot know which of the two it was.
#[tokio::test]
async fn each_order_once_although_the_end_of_a_transaction_is_cut_off() -> Result<()> {
    let (kafka, proxy) = Proxy::in_front_of(Service::Kafka)?;
    create_topics(&kafka)?;
    produce_orders(&kafka, 0..1500).await?;
    let mut worker = slow_worker().proxy(&proxy).spawn()?;
    worker.wait_for("committed: ", TIMEOUT)?;

    cut_off(&kafka, &proxy, &mut worker, Direction::ToClient, |worker| {
        // The end has arrived, and its answer has not.
        await_markers(&kafka, INVOICES)?;
        let there = read(&kafka, INVOICES, "read_committed")?.len();
        Ok(there > said_to_be_committed(worker))
    })?;
    cut_off(&kafka, &proxy, &mut worker, Direction::ToBroker, |_| {
        // All but the end has arrived.
        is_ending(&kafka)
    })?;

    wait_until_done(&kafka, &mut worker)?;
    worker.interrupt()?;
    worker.wait(TIMEOUT)?.ok()?;
    check(&kafka, 0..1500)?;
    // Without an end, a transaction is aborted. Whoever does not ask for `read_committed` sees what it has written.
    let all = read(&kafka, INVOICES, "read_uncommitted")?.len();
    assert!(all > 1500, "no end was cut off: {all}");
    Ok(())
}

/// Swallows one direction while the end of a transaction is on its way, until the worker gives up; again, until the fault
/// was such that `holds`.
fn cut_off(
    kafka: &Broker,
    proxy: &Proxy,
    worker: &mut Running,
    direction: Direction,
    holds: impl Fn(&mut Running) -> Result<bool>,
) -> Result<()> {
    // On a busy machine, the fault may come too late for the end, and hit the beginning of the next one.
    for _ in 0..5 {
        // So long there is time between what the worker has sent before the end, and the end.
        proxy.delay(Direction::ToBroker, Duration::from_secs(1))?;
        let deadline = Instant::now() + TIMEOUT;
        while !is_ending(kafka)? {
            ensure!(Instant::now() < deadline, "no transaction ends");
        }
        proxy.swallow(direction)?;
        worker.wait_for("beginning again from what is committed", TIMEOUT)?;
        let hit = holds(worker)?;
        proxy.heal()?;
        worker.wait_for("committed: ", TIMEOUT)?;
        if hit {
            return Ok(());
        }
    }
    bail!("however early the fault, it was too late")
}

fn said_to_be_committed(worker: &mut Running) -> usize {
    let count = |line: &String| {
        let (count, _) = line.strip_prefix("committed: ")?.split_once(' ')?;
        count.parse::<usize>().ok()
    };
    worker.lines().iter().filter_map(count).sum()
}
