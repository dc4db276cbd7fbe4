//! At least once, positions that never run ahead of the work, and partitions that move.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use compose::harness::{Example, Proxy, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::shared;

fn member(kafka: &Broker) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_consumer_group"))
        .broker(kafka)
        .spawn()
}

/// One that has been assigned the whole topic.
fn only_member(kafka: &Broker) -> Result<Running> {
    let mut member = member(kafka)?;
    member.wait_for("assigned: [0, 1, 2]", TIMEOUT)?;
    Ok(member)
}

/// `count` orders in each of the three partitions, with the ids `partition-number`.
async fn produce(kafka: &Broker, numbers: std::ops::Range<u32>) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    for number in numbers {
        for partition in 0..3 {
            let id = format!("{partition}-{number}");
            let order = format!(r#"{{"order_id":"{id}","user_id":"u","amount":1}}"#);
            send(&producer, partition, &order).await?;
        }
    }
    Ok(())
}

async fn send(producer: &FutureProducer, partition: i32, payload: &str) -> Result<()> {
    let record = FutureRecord::<str, str>::to("orders")
        .partition(partition)
        .payload(payload);
    producer
        .send(record, TIMEOUT)
        .await
        .map_err(|(error, _)| error)?;
    Ok(())
}

/// The group's positions, asked of the broker; 0 where it has none.
fn committed(kafka: &Broker) -> Result<BTreeMap<i32, i64>> {
    let observer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "order-processor-group")
        .create()?;
    let mut list = TopicPartitionList::new();
    list.add_partition_range("orders", 0, 2);
    let list = observer.committed_offsets(list, TIMEOUT)?;
    let position = |offset| match offset {
        Offset::Offset(next) => next,
        _ => 0,
    };
    Ok(list
        .elements()
        .iter()
        .map(|at| (at.partition(), position(at.offset())))
        .collect())
}

/// The ids that were processed, with repeats.
fn processed(lines: &[String]) -> Vec<String> {
    let id = |line: &String| {
        Some(
            line.strip_prefix("processed: ")?
                .split(' ')
                .next()?
                .to_owned(),
        )
    };
    lines.iter().filter_map(id).collect()
}

fn per_partition(ids: &[String]) -> BTreeMap<i32, i64> {
    let mut counts = BTreeMap::from([(0, 0), (1, 0), (2, 0)]);
    for id in ids.iter().collect::<HashSet<_>>() {
        *counts.entry(id[..1].parse().unwrap_or(-1)).or_default() += 1;
    }
    counts
}

#[tokio::test]
async fn after_sigkill_nothing_is_lost_and_the_position_was_never_ahead() -> Result<()> {
    let kafka = shared::kafka(&["kafka_consumer_group"])?;
    let mut first = only_member(&kafka)?;
    produce(&kafka, 0..20).await?;
    for _ in 0..10 {
        first.wait_for("processed: ", TIMEOUT)?;
    }
    first.wait_for("committed: ", TIMEOUT)?;
    // Between two commits, which are a second apart; frozen, so that none comes while the test looks.
    loop {
        first.wait_for("processed: ", TIMEOUT)?;
        first.pause()?;
        if committed(&kafka)?.values().sum::<i64>() < processed(&first.lines()).len() as i64 {
            break;
        }
        first.resume()?;
    }
    first.kill()?;
    first.wait(TIMEOUT)?;
    let before = processed(&first.lines());
    let done = per_partition(&before);
    let position = committed(&kafka)?;
    for (partition, next) in &position {
        assert!(
            next <= &done[partition],
            "committed {position:?}, processed {done:?}"
        );
    }
    assert!(
        position.values().sum::<i64>() > 0,
        "the first commit left no position"
    );

    let mut second = member(&kafka)?;
    let mut all: HashSet<_> = before.iter().cloned().collect();
    let deadline = Instant::now() + TIMEOUT;
    while all.len() < 60 {
        ensure!(Instant::now() < deadline, "only {} of 60 orders", all.len());
        second.wait_for("processed: ", TIMEOUT)?;
        all.extend(processed(&second.lines()));
    }
    let after = processed(&second.lines());
    let repeats = before.iter().filter(|id| after.contains(id)).count();
    let expected = done.values().sum::<i64>() - position.values().sum::<i64>();
    assert_eq!(
        i64::try_from(repeats)?,
        expected,
        "what was done and not committed is repeated"
    );
    assert!(
        repeats > 0,
        "the kill hit no uncommitted work, so it proved nothing"
    );
    Ok(())
}

#[tokio::test]
async fn ctrl_c_commits_exactly_what_was_processed() -> Result<()> {
    let kafka = shared::kafka(&["kafka_consumer_group"])?;
    let mut member = only_member(&kafka)?;
    produce(&kafka, 0..20).await?;
    for _ in 0..15 {
        member.wait_for("processed: ", TIMEOUT)?;
    }
    // In the middle of an order.
    member.wait_for("topic orders", TIMEOUT)?;
    member.interrupt()?;
    let ended = member.wait(TIMEOUT)?.ok()?;
    let done = per_partition(&processed(&member.lines()));
    assert_eq!(committed(&kafka)?, done);
    let total: i64 = done.values().sum();
    assert!(
        (16..60).contains(&total),
        "stopped in the middle, after the order in hand: {total}"
    );
    assert!(
        ended
            .stdout
            .ends_with(&format!("left the group; orders processed: {total}\n"))
    );
    Ok(())
}

#[tokio::test]
async fn two_members_share_and_a_third_of_the_work_moves() -> Result<()> {
    let kafka = shared::kafka(&["kafka_consumer_group"])?;
    let mut first = only_member(&kafka)?;
    let mut second = member(&kafka)?;
    let given = first
        .wait_for("revoked: ", TIMEOUT)?
        .replace("revoked: ", "");
    let taken = second
        .wait_for("assigned: ", TIMEOUT)?
        .replace("assigned: ", "");
    assert_eq!(given, taken, "only the partition that moves is taken away");
    let partition: i32 = taken.trim_matches(['[', ']']).parse()?;

    produce(&kafka, 0..5).await?;
    for _ in 0..10 {
        first.wait_for("processed: ", TIMEOUT)?;
    }
    for _ in 0..5 {
        second.wait_for("processed: ", TIMEOUT)?;
    }
    assert_eq!(per_partition(&processed(&second.lines()))[&partition], 5);
    assert_eq!(per_partition(&processed(&first.lines()))[&partition], 0);

    second.interrupt()?;
    second.wait(TIMEOUT)?.ok()?;
    first.wait_for(&format!("assigned: [{partition}]"), TIMEOUT)?;
    produce(&kafka, 5..6).await?;
    for _ in 0..3 {
        first.wait_for("processed: ", TIMEOUT)?;
    }
    let mut all = processed(&first.lines());
    assert!(all.contains(&format!("{partition}-5")));
    all.extend(processed(&second.lines()));
    assert_eq!(all.len(), 18, "a clean handover repeats nothing: {all:?}");
    Ok(())
}

#[tokio::test]
async fn a_record_that_is_no_order_is_reported_and_does_not_block() -> Result<()> {
    let kafka = shared::kafka(&["kafka_consumer_group"])?;
    let mut member = only_member(&kafka)?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    send(&producer, 0, "{").await?;
    produce(&kafka, 0..1).await?;
    member.wait_for("not an order, skipped: partition 0 offset 0", TIMEOUT)?;
    member.wait_for("processed: 0-0 ", TIMEOUT)?;
    member.interrupt()?;
    member.wait(TIMEOUT)?.ok()?;
    assert_eq!(committed(&kafka)?[&0], 2);
    Ok(())
}

#[tokio::test]
async fn ctrl_c_without_a_broker_ends_with_an_error_and_not_in_a_hang() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let mut member = only_member(&kafka)?;
    produce(&kafka, 0..20).await?;
    member.wait_for("processed: ", TIMEOUT)?;
    kafka.kill(1)?;
    member.wait_for("processed: ", TIMEOUT)?;
    member.interrupt()?;
    let ended = member.wait(Duration::from_secs(30))?;
    assert_eq!(ended.code(), 1, "{}", ended.stderr);
    for said in [
        "left without a word to the group",
        "will be processed again",
    ] {
        assert!(ended.stderr.contains(said), "{}", ended.stderr);
    }
    Ok(())
}

/// Far more than the five seconds after which the client gives up a request.
const NOTICES: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_member_notices_that_nothing_comes_through_and_no_order_is_forgotten() -> Result<()> {
    let (kafka, proxy) = Proxy::in_front_of(Service::Kafka)?;
    let program = Example::new(env!("CARGO_BIN_EXE_kafka_consumer_group"));
    let mut member = program.proxy(&proxy).spawn()?;
    member.wait_for("assigned: [0, 1, 2]", TIMEOUT)?;
    produce(&kafka, 0..1).await?;
    for _ in 0..3 {
        member.wait_for("processed: ", TIMEOUT)?;
    }
    proxy.black_hole()?;
    produce(&kafka, 1..2).await?;
    member.wait_for("waiting for the broker", NOTICES)?;
    let lines = member.lines();
    assert!(!lines.iter().any(|line| line.contains("-1")), "{lines:?}");
    proxy.heal()?;
    let deadline = Instant::now() + TIMEOUT;
    while committed(&kafka)?.values().any(|position| *position < 2) {
        ensure!(Instant::now() < deadline, "{:?}", member.lines());
        std::thread::sleep(Duration::from_millis(100));
    }
    member.interrupt()?;
    let said = member.wait(TIMEOUT)?.ok()?.stdout;
    for partition in 0..3 {
        assert!(
            said.contains(&format!("processed: {partition}-1")),
            "{said}"
        );
    }
    Ok(())
}
