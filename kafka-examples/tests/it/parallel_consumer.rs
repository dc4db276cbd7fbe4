//! Many at once, in order per key, and never a position beyond what is done.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::shared;

const ORDERS: usize = 3000;

fn example(kafka: &Broker, args: &[&str]) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_parallel_consumer"))
        .args(args)
        .broker(kafka)
        .spawn()
}

/// The group's positions, asked of the broker; 0 where it has none.
fn committed(kafka: &Broker) -> Result<[i64; 2]> {
    let observer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "parallel-orders")
        .create()?;
    let mut list = TopicPartitionList::new();
    list.add_partition_range("parallel-orders", 0, 1);
    let list = observer.committed_offsets(list, TIMEOUT)?;
    let mut positions = [0; 2];
    for at in list.elements() {
        if let Offset::Offset(next) = at.offset() {
            positions[usize::try_from(at.partition())?] = next;
        }
    }
    Ok(positions)
}

/// Partition, offset, and key of what was done, in the order in which it was done.
type Done = Vec<(usize, i64, String)>;

fn done(member: &mut Running) -> Result<Done> {
    let mut all = Vec::new();
    for line in member.lines() {
        // done: partition 0 offset 3 user-7 order-11
        if line.starts_with("done: ") {
            let words: Vec<&str> = line.split(' ').collect();
            let key = words.get(5).context("no key")?;
            all.push((words[2].parse()?, words[4].parse()?, key.to_string()));
        }
    }
    Ok(all)
}

/// All but the orders: what the group did to a member, and what went wrong.
fn said(member: &mut Running) -> Vec<String> {
    let mut lines = member.lines();
    lines.retain(|line| !line.starts_with("done: "));
    lines
}

fn distinct<'a>(all: impl IntoIterator<Item = &'a Done>) -> usize {
    let places = all
        .into_iter()
        .flatten()
        .map(|(partition, offset, _)| (partition, offset));
    places.collect::<BTreeSet<_>>().len()
}

fn check_order(done: &Done) {
    let mut last: BTreeMap<(usize, &str), i64> = BTreeMap::new();
    for (partition, offset, key) in done {
        if let Some(before) = last.insert((*partition, key), *offset) {
            assert!(
                before < *offset,
                "{key}: {before} before {offset} on {partition}"
            );
        }
    }
}

/// On a machine that is busy enough, a member is too slow for the group or a commit for its limit. The member says that
/// work may be repeated, and there was no clean handover to judge: then once more, on another Kafka. What is repeated in
/// silence is a failure at once.
fn until_clean(scenario: impl Fn(&Broker) -> Result<bool>) -> Result<()> {
    const ATTEMPTS: usize = 5;
    for _ in 0..ATTEMPTS {
        let kafka = shared::kafka(&["kafka_parallel_consumer"])?;
        if scenario(&kafka)? {
            return Ok(());
        }
    }
    bail!("no clean handover in {ATTEMPTS} attempts")
}

fn is_clean(said: &[Vec<String>]) -> bool {
    let not = said
        .iter()
        .flatten()
        .find(|line| line.contains(" be repeated"));
    not.inspect(|line| println!("not a clean handover: {line}"))
        .is_none()
}

#[test]
fn sigkill_and_rebalance_lose_nothing_and_keep_the_order_of_each_key() -> Result<()> {
    until_clean(sigkill_and_rebalance)
}

fn sigkill_and_rebalance(kafka: &Broker) -> Result<bool> {
    example(kafka, &["send", &ORDERS.to_string()])?
        .wait(TIMEOUT)?
        .ok()?;
    let mut first = example(kafka, &[])?;
    // Behind at least one of the commits that come every second.
    for _ in 0..700 {
        first.wait_for("done: ", TIMEOUT)?;
    }
    first.kill()?;
    first.wait(TIMEOUT)?;
    let killed = done(&mut first)?;
    let positions = committed(kafka)?;
    assert!(positions.iter().sum::<i64>() > 0, "nothing was committed");
    for (partition, next) in positions.into_iter().enumerate() {
        let of: BTreeSet<i64> = killed
            .iter()
            .filter(|at| at.0 == partition)
            .map(|at| at.1)
            .collect();
        assert!(
            (0..next).all(|offset| of.contains(&offset)),
            "committed {next} on {partition} over a gap"
        );
    }
    let overtaken = |partition| {
        let offsets: Vec<i64> = killed
            .iter()
            .filter(|at| at.0 == partition)
            .map(|at| at.1)
            .collect();
        !offsets.is_sorted()
    };
    assert!(
        overtaken(0) || overtaken(1),
        "no order overtook another, so a gap was impossible"
    );

    let mut second = example(kafka, &[])?;
    second.wait_for("done: ", TIMEOUT)?;
    let mut third = example(kafka, &[])?;
    third.wait_for("assigned: ", TIMEOUT)?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let all = [killed.clone(), done(&mut second)?, done(&mut third)?];
        if distinct(&all) == ORDERS {
            break;
        }
        ensure!(
            Instant::now() < deadline,
            "only {} of {ORDERS}",
            distinct(&all)
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    for member in [&mut second, &mut third] {
        member.interrupt()?;
        member.wait(TIMEOUT)?.ok()?;
    }
    let said = [said(&mut second), said(&mut third)];
    if !is_clean(&said) {
        return Ok(false);
    }
    let (second, third) = (done(&mut second)?, done(&mut third)?);
    for one in [&killed, &second, &third] {
        check_order(one);
    }
    assert!(!third.is_empty(), "the rebalance moved no work");
    assert_eq!(
        distinct([&second, &third]),
        second.len() + third.len(),
        "a clean handover repeats nothing: {said:#?}"
    );
    let expected = ORDERS - usize::try_from(positions.iter().sum::<i64>())?;
    assert_eq!(
        second.len() + third.len(),
        expected,
        "from the commits on, and no more"
    );
    assert_eq!(
        committed(kafka)?.iter().sum::<i64>(),
        i64::try_from(ORDERS)?
    );
    Ok(true)
}

/// Sends until it is stopped. A quarter is of two busy users: their lanes are full, and orders of the others overtake
/// theirs. Whichever partition moves, many of its orders are done behind one that is not.
fn feed(kafka: &Broker, stop: &AtomicBool) -> Result<usize> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("enable.idempotence", "true")
        .set("linger.ms", "0")
        .create()?;
    let mut reports = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        for partition in 0..2 {
            let number = reports.len() / 2;
            let user = match number % 4 {
                0 => format!("busy-{partition}"),
                _ => format!("user-{partition}-{}", number % 23),
            };
            let record = FutureRecord::to("parallel-orders")
                .partition(partition)
                .key(&user)
                .payload("order");
            reports.push(producer.send_result(record).map_err(|(error, _)| error)?);
        }
        // More than the lanes can do, and in turn: what is sent at once is read one partition after the other.
        std::thread::sleep(Duration::from_millis(8));
    }
    let sent = reports.len();
    for report in reports {
        futures::executor::block_on(report)?.map_err(|(error, _)| error)?;
    }
    Ok(sent)
}

#[test]
fn a_rebalance_repeats_no_order_that_has_overtaken_others() -> Result<()> {
    until_clean(rebalance_amid_full_lanes)
}

fn rebalance_amid_full_lanes(kafka: &Broker) -> Result<bool> {
    let mut first = example(kafka, &[])?;
    first.wait_for("assigned: [0, 1]", TIMEOUT)?;
    let stop = AtomicBool::new(false);
    let (mut second, sent) = std::thread::scope(|scope| {
        let feeder = scope.spawn(|| feed(kafka, &stop));
        let second = (|| {
            for _ in 0..200 {
                first.wait_for("done: ", TIMEOUT)?;
            }
            let mut second = example(kafka, &[])?;
            second.wait_for("done: ", TIMEOUT)?;
            anyhow::Ok(second)
        })();
        stop.store(true, Ordering::Relaxed);
        let sent = feeder.join();
        let sent = sent.map_err(|_| anyhow!("the feeder panicked"))??;
        anyhow::Ok((second?, sent))
    })?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let all = [done(&mut first)?, done(&mut second)?];
        if distinct(&all) == sent {
            break;
        }
        ensure!(Instant::now() < deadline, "{} of {sent}", distinct(&all));
        std::thread::sleep(Duration::from_millis(50));
    }
    for member in [&mut first, &mut second] {
        member.interrupt()?;
        member.wait(TIMEOUT)?.ok()?;
    }

    let said = [said(&mut first), said(&mut second)];
    if !is_clean(&said) {
        return Ok(false);
    }
    let handed_over = |line: &String| line.starts_with("handing over [") && !line.contains(',');
    let lines = first.lines();
    let handover = lines.iter().position(handed_over).context("no handover")?;
    let moved = usize::from(lines[handover].starts_with("handing over [1]"));
    let (first, second) = (done(&mut first)?, done(&mut second)?);
    assert_eq!(first.len() + second.len(), sent, "repeated: {said:#?}");
    let before: Vec<i64> = first
        .iter()
        .filter(|at| at.0 == moved)
        .map(|at| at.1)
        .collect();
    // More than can have been in work.
    let overtaken = |at: &usize| {
        before[..*at]
            .iter()
            .filter(|one| **one > before[*at])
            .count()
            > 8
    };
    let mut last = before.len().saturating_sub(16)..before.len();
    check_order(&first.iter().chain(&second).cloned().collect());
    let proves = last.any(|at| overtaken(&at));
    if !proves {
        println!("no queue held up others, so nothing could be repeated: {before:?}");
    }
    Ok(proves)
}

#[tokio::test]
async fn what_is_no_order_is_reported_and_does_not_block() -> Result<()> {
    let kafka = shared::kafka(&["kafka_parallel_consumer"])?;
    example(&kafka, &["send", "1"])?.wait(TIMEOUT)?.ok()?;
    let before = {
        let mut member = example(&kafka, &[])?;
        member.wait_for("done: ", TIMEOUT)?;
        member.interrupt()?;
        member.wait(TIMEOUT)?.ok()?;
        committed(&kafka)?[0]
    };
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let records: [Option<&[u8]>; 4] = [None, Some(b""), Some(b"\xff"), Some(b"good")];
    for payload in records {
        let record = FutureRecord::<[u8], [u8]> {
            payload,
            ..FutureRecord::to("parallel-orders").partition(0)
        };
        producer
            .send(record, TIMEOUT)
            .await
            .map_err(|(error, _)| error)?;
    }
    let mut member = example(&kafka, &[])?;
    // They are worked on side by side.
    let mut seen = 0;
    while seen < 4 {
        member.wait_for_line(
            |line| {
                line.starts_with("not an order, skipped: partition 0") || line.ends_with(" good")
            },
            "the fate of a record",
            TIMEOUT,
        )?;
        seen += 1;
    }
    member.interrupt()?;
    let ended = member.wait(TIMEOUT)?.ok()?;
    assert_eq!(ended.stdout.matches("not an order").count(), 3);
    assert_eq!(committed(&kafka)?[0], before + 4);
    Ok(())
}
