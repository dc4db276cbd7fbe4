//! One invoice per order for every `read_committed` reader, whatever is killed, frozen or malformed.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use compose::harness::{Direction, Example, Proxy, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message};

use crate::administrator::create_topic;
use crate::ending::is_ending;
use crate::reader::{await_markers, header, left, read, send_large};
use crate::shared;

const ORDERS: &str = "exactly-once.orders";
const INVOICES: &str = "exactly-once.invoices";
const DEAD_LETTERS: &str = "exactly-once.orders.dlq";
/// So many that each partition has some.
const USERS: u32 = 50;

fn example() -> Example {
    Example::new(env!("CARGO_BIN_EXE_kafka_exactly_once"))
}

fn worker(kafka: &Broker) -> Result<Running> {
    example().broker(kafka).spawn()
}

/// A worker that shares the work instead of taking it over.
fn another_worker(kafka: &Broker, id: &str) -> Result<Running> {
    let worker = example().broker(kafka);
    worker.env("TRANSACTIONAL_ID", id).spawn()
}

/// Topics with other numbers of partitions than the broker would choose.
async fn create_topics(kafka: &Broker) -> Result<()> {
    for (name, partitions) in [(ORDERS, 6), (INVOICES, 4), (DEAD_LETTERS, 1)] {
        create_topic(kafka, name, partitions, &[]).await?;
    }
    Ok(())
}

fn order(number: u32) -> String {
    format!(r#"{{"order_id":"{number}","cents":{number}}}"#)
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

async fn produce_orders(kafka: &Broker, numbers: Range<u32>) -> Result<()> {
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
        .set("isolation.level", isolation)
        .create()?)
}

fn partitions(judge: &BaseConsumer, topic: &str) -> Result<i32> {
    let metadata = judge.fetch_metadata(Some(topic), TIMEOUT)?;
    Ok(i32::try_from(metadata.topics()[0].partitions().len())?)
}

/// Waits until the group has committed the end of all orders.
fn wait_until_done(kafka: &Broker, worker: &mut Running) -> Result<()> {
    let judge = judge(kafka, "read_uncommitted")?;
    let deadline = Instant::now() + 3 * TIMEOUT;
    loop {
        // A broker that has just started answers with errors.
        let left = left(&judge, ORDERS);
        if matches!(left, Ok(0)) {
            // The positions can be visible a moment before the results.
            await_markers(kafka, INVOICES)?;
            return await_markers(kafka, DEAD_LETTERS);
        }
        ensure!(
            Instant::now() < deadline && worker.try_wait()?.is_none(),
            "orders are left: {left:?}, {:?}",
            worker.lines()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Ends the worker as Docker and Kubernetes do.
fn stop(mut worker: Running) -> Result<()> {
    worker.terminate()?;
    worker.wait(TIMEOUT)?.ok()?;
    Ok(())
}

/// Each of the orders has one invoice, in order per key, and no transaction is left open.
fn check(kafka: &Broker, orders: Range<u32>) -> Result<()> {
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
    assert!(!is_open(kafka)?, "a transaction is open");
    Ok(())
}

/// Whether a transaction is open that has written an invoice.
fn is_open(kafka: &Broker) -> Result<bool> {
    let all = judge(kafka, "read_uncommitted")?;
    let stable = judge(kafka, "read_committed")?;
    for partition in 0..partitions(&all, INVOICES)? {
        // In this order: a commit in between looks like a closed transaction.
        let (_, end) = all.fetch_watermarks(INVOICES, partition, TIMEOUT)?;
        if stable.fetch_watermarks(INVOICES, partition, TIMEOUT)?.1 < end {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Freezes the worker while it has a transaction open that has written an invoice.
fn freeze_in_transaction(kafka: &Broker, worker: &mut Running) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        worker.pause()?;
        // A request that is on its way may still arrive: only a transaction that stays open counts.
        if is_open(kafka)? {
            std::thread::sleep(Duration::from_millis(50));
            if is_open(kafka)? {
                return Ok(());
            }
        }
        ensure!(Instant::now() < deadline, "no transaction is ever open");
        worker.resume()?;
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Invoices of aborted transactions, which only a `read_uncommitted` reader sees, are among these.
fn all_invoices(kafka: &Broker) -> Result<usize> {
    Ok(read(kafka, INVOICES, "read_uncommitted")?.len())
}

#[tokio::test]
async fn each_order_once_over_kills_and_a_restart_of_the_broker() -> Result<()> {
    let mut chance = compose::harness::chance()?;
    let kafka = Broker::private(Service::Kafka)?;
    create_topics(&kafka).await?;
    produce_orders(&kafka, 0..10_000).await?;
    for round in 0..6 {
        let mut worker = worker(&kafka)?;
        worker.wait_for("committed: ", TIMEOUT)?;
        if round % 2 == 0 {
            freeze_in_transaction(&kafka, &mut worker)?;
        } else {
            // At any moment.
            std::thread::sleep(Duration::from_millis(chance.u64(0..200)));
        }
        worker.kill()?;
        worker.wait(TIMEOUT)?;
    }
    produce_orders(&kafka, 10_000..15_000).await?;
    let mut worker = worker(&kafka)?;
    worker.wait_for("committed: ", TIMEOUT)?;
    kafka.kill(1)?;
    kafka.restart(1)?;
    produce_orders(&kafka, 15_000..16_000).await?;
    wait_until_done(&kafka, &mut worker)?;
    stop(worker)?;

    check(&kafka, 0..16_000)?;
    let all = all_invoices(&kafka)?;
    assert!(all > 16_000, "the kills hit no transaction: {all}");
    Ok(())
}

/// One of them is the group's coordinator: when it dies, `send_offsets_to_transaction` can ignore its timeout.
#[tokio::test]
async fn each_order_once_although_each_node_of_three_dies_in_turn() -> Result<()> {
    let kafka = Broker::private_cluster(Service::Kafka, 3)?;
    create_topics(&kafka).await?;
    let mut worker = worker(&kafka)?;
    let mut orders = 0;
    for node in 1..=3 {
        produce_orders(&kafka, orders..orders + 2000).await?;
        worker.wait_for("committed: ", TIMEOUT)?;
        kafka.kill(node)?;
        produce_orders(&kafka, orders + 2000..orders + 3000).await?;
        orders += 3000;
        // With two nodes.
        wait_until_done(&kafka, &mut worker)?;
        kafka.restart(node)?;
        wait_until_in_sync(&kafka, 3)?;
    }
    stop(worker)?;
    check(&kafka, 0..orders)
}

/// Waits until each partition has this many copies in sync.
fn wait_until_in_sync(kafka: &Broker, copies: usize) -> Result<()> {
    let judge = judge(kafka, "read_uncommitted")?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let metadata = judge.fetch_metadata(None, TIMEOUT)?;
        let mut partitions = metadata
            .topics()
            .iter()
            .flat_map(|topic| topic.partitions());
        if partitions.all(|partition| partition.isr().len() >= copies) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "copies are missing");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[tokio::test]
async fn zombie_is_fenced_and_says_so() -> Result<()> {
    let kafka = shared::kafka(&["kafka_exactly_once"])?;
    produce_orders(&kafka, 0..10_000).await?;
    let mut zombie = worker(&kafka)?;
    zombie.wait_for("committed: ", TIMEOUT)?;
    freeze_in_transaction(&kafka, &mut zombie)?;
    let mut successor = worker(&kafka)?;
    successor.wait_for("committed: ", TIMEOUT)?;
    let before = zombie.lines();
    zombie.resume()?;
    let ended = zombie.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    let error = "This instance has been fenced by a newer instance";
    assert!(ended.stderr.contains(error), "{}", ended.stderr);
    let committed = |lines: &[String]| {
        let committed = |line: &&String| line.starts_with("committed: ");
        lines.iter().filter(committed).count()
    };
    // A line may still have been in the pipe when it was frozen.
    assert!(committed(&zombie.lines()) <= committed(&before) + 1);
    wait_until_done(&kafka, &mut successor)?;
    stop(successor)?;
    check(&kafka, 0..10_000)
}

/// Produces one order after another until the worker has committed some of them. Meanwhile the other workers have an
/// unfinished batch nearly all the time. Returns the number after the last order.
async fn feed_until_commit(kafka: &Broker, worker: &mut Running, mut next: u32) -> Result<u32> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("linger.ms", "0")
        .create()?;
    let deadline = Instant::now() + TIMEOUT;
    let committed = |line: &String| line.starts_with("committed: ");
    while !worker.lines().iter().any(committed) {
        ensure!(Instant::now() < deadline, "no commit: {:?}", worker.lines());
        let (key, order) = (format!("user-{}", next % USERS), order(next));
        let record = FutureRecord::to(ORDERS).key(&key).payload(&order);
        let sent = producer.send(record, TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
        next += 1;
    }
    Ok(next)
}

/// Partitions move between workers while they have batches in work.
#[tokio::test]
async fn each_order_once_although_partitions_move_in_the_middle_of_a_batch() -> Result<()> {
    const AGAIN: &str = "starting again from the committed offsets: ";
    let kafka = shared::kafka(&["kafka_exactly_once"])?;
    create_topics(&kafka).await?;
    let mut first = worker(&kafka)?;
    let mut next = feed_until_commit(&kafka, &mut first, 0).await?;
    let mut others = Vec::new();
    // Nearly always the first of them is enough.
    for id in ["a", "b", "c", "d", "e"] {
        let mut other = another_worker(&kafka, id)?;
        next = feed_until_commit(&kafka, &mut other, next).await?;
        others.push(other);
        let lines = others.iter_mut().flat_map(Running::lines);
        if lines
            .chain(first.lines())
            .any(|line| line.starts_with(AGAIN))
        {
            break;
        }
        ensure!(others.len() < 5, "no batch met a rebalance");
    }
    produce_orders(&kafka, next..next + 5000).await?;
    wait_until_done(&kafka, &mut first)?;
    stop(first)?;
    for other in others {
        stop(other)?;
    }
    check(&kafka, 0..next + 5000)
}

#[tokio::test]
async fn bad_orders_are_dead_lettered_once_and_abort_nothing() -> Result<()> {
    let kafka = shared::kafka(&["kafka_exactly_once"])?;
    produce_orders(&kafka, 0..200).await?;
    // The largest that a broker takes by default: 1,048,588 bytes with its headers and framing.
    let huge = vec![b'x'; 1_048_400];
    let wordy = format!(r#"{{"order_id":"o","cents":"{}"}}"#, "é".repeat(10_000));
    let bad: [(Bytes<'_>, Bytes<'_>); 6] = [
        (None, None),
        (Some(b""), Some(b"")),
        (Some(b"\xff\xfe"), Some(b"\xc3\x28")),
        (None, Some(b"{}")),
        (Some(b"k"), Some(&huge)),
        (Some(b"wordy"), Some(wordy.as_bytes())),
    ];
    produce(&kafka, &bad).await?;
    let large = send_large(&kafka, ORDERS).await?;
    let bad: Vec<_> = bad.into_iter().chain([(None, Some(&large[..]))]).collect();
    produce_orders(&kafka, 200..400).await?;
    let mut worker = worker(&kafka)?;
    wait_until_done(&kafka, &mut worker)?;
    let lines = worker.lines();
    stop(worker)?;

    check(&kafka, 0..400)?;
    let letters = read(&kafka, DEAD_LETTERS, "read_committed")?;
    assert_eq!(letters.len(), bad.len());
    for (key, payload) in bad.iter().copied() {
        let found = letters
            .iter()
            .find(|record| record.key() == key && record.payload() == payload);
        let letter = found.context("missing, or changed")?;
        let origin = header(letter, "origin").context("no origin")?;
        assert!(origin.starts_with("exactly-once.orders/"), "{origin}");
        let reason = header(letter, "reason").context("no reason")?;
        assert!((1..=200).contains(&reason.chars().count()), "{reason}");
    }
    let bad_lines = lines.iter().filter(|line| line.contains("is not an order"));
    assert_eq!(bad_lines.count(), bad.len(), "{lines:?}");
    assert_eq!(all_invoices(&kafka)?, 400, "a transaction was aborted");
    Ok(())
}

#[tokio::test]
async fn dead_letter_that_is_too_large_is_written_without_its_payload() -> Result<()> {
    let kafka = shared::kafka(&["kafka_exactly_once"])?;
    let mut random = fastrand::Rng::with_seed(1);
    // It cannot be compressed, and two more headers do not fit beside it.
    let payload: Vec<u8> = std::iter::repeat_with(|| random.u8(..))
        .take(1_048_350)
        .collect();
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("message.max.bytes", "2000000")
        .create()?;
    let trace = Header {
        key: "trace",
        value: Some(&[b't'; 100]),
    };
    let record = FutureRecord::<[u8], [u8]>::to(ORDERS).partition(0);
    let record = record.payload(&payload).key(b"k");
    let record = record.headers(OwnedHeaders::new().insert(trace));
    let sent = producer.send(record, TIMEOUT).await;
    sent.map_err(|(error, _)| error)?;
    produce_orders(&kafka, 0..400).await?;
    let mut worker = worker(&kafka)?;
    wait_until_done(&kafka, &mut worker)?;
    stop(worker)?;

    check(&kafka, 0..400)?;
    let letters = read(&kafka, DEAD_LETTERS, "read_committed")?;
    assert_eq!(letters.len(), 1);
    assert_eq!(
        (letters[0].key(), letters[0].payload()),
        (Some(&b"k"[..]), None)
    );
    let origin = header(&letters[0], "origin");
    assert_eq!(origin.as_deref(), Some("exactly-once.orders/0/0"));
    assert!(header(&letters[0], "trace").is_some());
    Ok(())
}

/// The refusal is the reason, and not what follows from it. The position stays, so a restart meets the order again.
#[tokio::test]
async fn invoice_that_is_too_large_ends_the_program_with_its_reason() -> Result<()> {
    let kafka = shared::kafka(&["kafka_exactly_once"])?;
    // The marker at the end of a transaction has room, and the invoice has not, although it is compressed.
    create_topic(&kafka, INVOICES, 4, &[("max.message.bytes", "300")]).await?;
    let mut random = fastrand::Rng::with_seed(1);
    let id: String = (0..1000).map(|_| random.alphanumeric()).collect();
    let large = format!(r#"{{"order_id":"{id}","cents":1}}"#);
    produce(&kafka, &[(None, Some(large.as_bytes()))]).await?;
    let ended = worker(&kafka)?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    let error = ended.stderr.split("Error: ").nth(1).unwrap_or_default();
    let reason = "Message size too large";
    assert!(error.contains(reason), "{}", ended.stderr);
    assert_eq!(left(&judge(&kafka, "read_uncommitted")?, ORDERS)?, 1);
    Ok(())
}

#[tokio::test]
async fn group_with_another_assignor_ends_the_program_with_its_reason() -> Result<()> {
    let kafka = shared::kafka(&["kafka_exactly_once"])?;
    create_topics(&kafka).await?;
    let other: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "exactly-once")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .create()?;
    other.subscribe(&[ORDERS])?;
    let deadline = Instant::now() + TIMEOUT;
    while other.assignment()?.count() == 0 {
        ensure!(Instant::now() < deadline, "the other member has nothing");
        if let Some(record) = other.poll(Duration::from_millis(100)) {
            record?;
        }
    }
    let ended = worker(&kafka)?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    let reason = "InconsistentGroupProtocol";
    assert!(ended.stderr.contains(reason), "{}", ended.stderr);
    Ok(())
}

/// Each time, the worker gets no answer to its commit, and cannot know whether it happened.
#[tokio::test]
async fn each_order_once_although_the_end_of_a_transaction_is_cut_off() -> Result<()> {
    let (kafka, proxy) = Proxy::in_front_of(Service::Kafka)?;
    produce_orders(&kafka, 0..10_000).await?;
    let mut worker = example().proxy(&proxy).spawn()?;
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
    stop(worker)?;
    check(&kafka, 0..10_000)?;
    // Without an end, a transaction is aborted.
    let all = all_invoices(&kafka)?;
    assert!(all > 10_000, "no end was cut off: {all}");
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
        worker.wait_for("starting again from the committed offsets", TIMEOUT)?;
        let hit = holds(worker)?;
        proxy.heal()?;
        worker.wait_for("committed: ", TIMEOUT)?;
        if hit {
            return Ok(());
        }
    }
    bail!("the fault always came too late")
}

fn said_to_be_committed(worker: &mut Running) -> usize {
    let count = |line: &String| {
        let (count, _) = line.strip_prefix("committed: ")?.split_once(' ')?;
        count.parse::<usize>().ok()
    };
    worker.lines().iter().filter_map(count).sum()
}
