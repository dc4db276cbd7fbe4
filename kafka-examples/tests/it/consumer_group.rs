//! At least once, positions that never run ahead of the work, partitions that move, and errors that end the program.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::harness::{Example, Proxy, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{FutureProducer, FutureRecord};

use crate::administrator::{create_topic, tool};
use crate::reader::committed;
use crate::shared;

const TOPIC: &str = "group-orders";
const GROUP: &str = "order-processor-group";

fn member(kafka: &Broker) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_consumer_group"))
        .broker(kafka)
        .spawn()
}

/// A member that has been assigned the whole topic.
fn only_member(kafka: &Broker) -> Result<Running> {
    let mut member = member(kafka)?;
    member.wait_for("assigned: [0, 1, 2]", TIMEOUT)?;
    Ok(member)
}

fn producer(kafka: &Broker) -> Result<FutureProducer> {
    Ok(ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?)
}

/// `count` orders in each of the first partitions of the topic.
async fn produce(kafka: &Broker, partitions: i32, count: u32) -> Result<()> {
    let producer = producer(kafka)?;
    for _ in 0..count {
        for partition in 0..partitions {
            send(&producer, partition, Some(b"k"), Some(b"order")).await?;
        }
    }
    Ok(())
}

async fn send(
    producer: &FutureProducer,
    partition: i32,
    key: Option<&[u8]>,
    payload: Option<&[u8]>,
) -> Result<()> {
    let mut record = FutureRecord::<[u8], [u8]>::to(TOPIC).partition(partition);
    (record.key, record.payload) = (key, payload);
    let sent = producer.send(record, TIMEOUT).await;
    sent.map_err(|(error, _)| error)?;
    Ok(())
}

/// The partition and offset of each processed order, with repeats.
fn processed(lines: &[String]) -> Vec<(i32, i64)> {
    let place = |line: &String| {
        let place = line.strip_prefix("processed: partition ")?;
        let (partition, offset) = place.split_once(" offset ")?;
        Some((partition.parse().ok()?, offset.parse().ok()?))
    };
    lines.iter().filter_map(place).collect()
}

/// How many different orders of each partition.
fn per_partition(orders: &[(i32, i64)]) -> BTreeMap<i32, i64> {
    let mut counts = BTreeMap::from([(0, 0), (1, 0), (2, 0)]);
    for (partition, _) in orders.iter().collect::<BTreeSet<_>>() {
        *counts.entry(*partition).or_default() += 1;
    }
    counts
}

#[tokio::test]
async fn sigkill_loses_no_order_and_repeats_only_uncommitted_ones() -> Result<()> {
    let kafka = shared::kafka(&["kafka_consumer_group"])?;
    let mut first = only_member(&kafka)?;
    produce(&kafka, 3, 30).await?;
    for _ in 0..10 {
        first.wait_for("processed: ", TIMEOUT)?;
    }
    // Late in the work on an order, so that most commits have happened during the work on one.
    for _ in 0..25 {
        first.wait_for("topic group-orders", TIMEOUT)?;
        std::thread::sleep(Duration::from_millis(80));
        first.pause()?;
        let position = committed(&kafka, GROUP, TOPIC)?;
        let done = per_partition(&processed(&first.lines()));
        assert!(
            position
                .iter()
                .all(|(partition, next)| *next <= done[partition]),
            "committed {position:?}, processed {done:?}"
        );
        first.resume()?;
    }
    // Between two commits, which are a second apart; frozen, so that none comes while the test looks.
    loop {
        first.wait_for("processed: ", TIMEOUT)?;
        first.pause()?;
        if committed(&kafka, GROUP, TOPIC)?.values().sum::<i64>()
            < processed(&first.lines()).len() as i64
        {
            break;
        }
        first.resume()?;
    }
    first.kill()?;
    first.wait(TIMEOUT)?;
    let before = processed(&first.lines());
    let done = per_partition(&before);
    let position = committed(&kafka, GROUP, TOPIC)?;
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
    let mut all: BTreeSet<_> = before.iter().copied().collect();
    let deadline = Instant::now() + TIMEOUT;
    while all.len() < 90 {
        ensure!(Instant::now() < deadline, "only {} of 90 orders", all.len());
        second.wait_for("processed: ", TIMEOUT)?;
        all.extend(processed(&second.lines()));
    }
    let after = processed(&second.lines());
    let repeats = before.iter().filter(|order| after.contains(order)).count();
    let expected = done.values().sum::<i64>() - position.values().sum::<i64>();
    assert_eq!(
        i64::try_from(repeats)?,
        expected,
        "processed and uncommitted orders are repeated"
    );
    assert!(
        repeats > 0,
        "the kill hit no uncommitted work, so it proved nothing"
    );
    Ok(())
}

#[tokio::test]
async fn ctrl_c_and_sigterm_commit_exactly_the_processed_orders() -> Result<()> {
    let kafka = shared::kafka(&["kafka_consumer_group"])?;
    let (mut orders, mut sent) = (Vec::new(), 0);
    for stop in [Running::interrupt, Running::terminate] {
        let mut member = only_member(&kafka)?;
        produce(&kafka, 3, 20).await?;
        sent += 60;
        for _ in 0..15 {
            member.wait_for("processed: ", TIMEOUT)?;
        }
        // In the middle of an order.
        member.wait_for("topic group-orders", TIMEOUT)?;
        stop(&mut member)?;
        let ended = member.wait(TIMEOUT)?.ok()?;
        let begun = ended.stdout.matches("topic group-orders").count();
        let done = processed(&member.lines());
        assert!(done.len() >= 16 && done.len() == begun, "{}", ended.stdout);
        orders.extend(done);
        assert!(orders.len() < sent, "the signal came after the last order");
        assert_eq!(committed(&kafka, GROUP, TOPIC)?, per_partition(&orders));
    }
    let different: BTreeSet<_> = orders.iter().collect();
    assert_eq!(different.len(), orders.len(), "{orders:?}");
    Ok(())
}

#[tokio::test]
async fn members_share_partitions_and_join_and_leave_without_repeats() -> Result<()> {
    let kafka = shared::kafka(&["kafka_consumer_group"])?;
    let list = |line: String| line.split_once(": ").map(|(_, list)| list.to_owned());
    let partitions = |line: String| -> Result<BTreeSet<i32>> {
        Ok(serde_json::from_str(&list(line).context("no list")?)?)
    };
    let mut first = only_member(&kafka)?;
    produce(&kafka, 3, 10).await?;
    first.wait_for("topic group-orders", TIMEOUT)?;
    // Joins while the first member works on an order.
    let mut second = member(&kafka)?;
    let kept = partitions(first.wait_for("assigned: ", TIMEOUT)?)?;
    let moved = partitions(second.wait_for("assigned: ", TIMEOUT)?)?;
    assert!(!kept.is_empty() && !moved.is_empty());
    assert_eq!(&kept | &moved, BTreeSet::from([0, 1, 2]));
    assert_eq!(kept.len() + moved.len(), 3);
    produce(&kafka, 3, 20).await?;
    for _ in 0..3 {
        first.wait_for("processed: ", TIMEOUT)?;
        second.wait_for("processed: ", TIMEOUT)?;
    }
    second.terminate()?;
    second.wait(TIMEOUT)?.ok()?;
    first.wait_for("assigned: [0, 1, 2]", TIMEOUT)?;
    let second = processed(&second.lines());
    assert!(
        second
            .iter()
            .all(|(partition, _)| moved.contains(partition))
    );
    let at_end = BTreeMap::from([(0, 30), (1, 30), (2, 30)]);
    let deadline = Instant::now() + TIMEOUT;
    while committed(&kafka, GROUP, TOPIC)? != at_end {
        ensure!(Instant::now() < deadline, "{:?}", first.lines());
        std::thread::sleep(Duration::from_millis(100));
    }
    first.interrupt()?;
    first.wait(TIMEOUT)?.ok()?;
    let mut all = processed(&first.lines());
    all.extend(second);
    let different: BTreeSet<_> = all.iter().collect();
    assert_eq!((all.len(), different.len()), (90, 90), "{all:?}");
    Ok(())
}

/// The member is silent for longer than its session, while it works on an order.
#[tokio::test]
async fn member_that_lost_its_partitions_during_the_work_continues() -> Result<()> {
    let kafka = shared::kafka(&["kafka_consumer_group"])?;
    let mut first = only_member(&kafka)?;
    produce(&kafka, 3, 10).await?;
    first.wait_for("processed: ", TIMEOUT)?;
    first.wait_for("topic group-orders", TIMEOUT)?;
    first.pause()?;
    let mut second = only_member(&kafka)?;
    second.wait_for("processed: ", TIMEOUT)?;
    first.resume()?;
    first.wait_for("assigned: [", TIMEOUT)?;
    let deadline = Instant::now() + TIMEOUT;
    while committed(&kafka, GROUP, TOPIC)?
        .values()
        .any(|next| *next < 10)
    {
        ensure!(Instant::now() < deadline, "{:?}", first.lines());
        std::thread::sleep(Duration::from_millis(100));
    }
    let mut all: BTreeSet<_> = processed(&first.lines()).into_iter().collect();
    all.extend(processed(&second.lines()));
    assert_eq!(all.len(), 30);
    for mut member in [first, second] {
        member.terminate()?;
        member.wait(TIMEOUT)?.ok()?;
    }
    Ok(())
}

#[tokio::test]
async fn any_bytes_are_processed_on_any_number_of_partitions() -> Result<()> {
    let kafka = shared::kafka(&["kafka_consumer_group"])?;
    create_topic(&kafka, TOPIC, 5, &[]).await?;
    let mut member = member(&kafka)?;
    member.wait_for("assigned: [0, 1, 2, 3, 4]", TIMEOUT)?;
    let producer = producer(&kafka)?;
    send(&producer, 4, None, None).await?;
    send(&producer, 4, Some(b"\xff"), Some(b"\xc3")).await?;
    produce(&kafka, 5, 1).await?;
    for _ in 0..7 {
        member.wait_for("processed: ", TIMEOUT)?;
    }
    member.interrupt()?;
    member.wait(TIMEOUT)?.ok()?;
    assert_eq!(
        committed(&kafka, GROUP, TOPIC)?,
        BTreeMap::from([(0, 1), (1, 1), (2, 1), (3, 1), (4, 3)])
    );
    Ok(())
}

#[tokio::test]
async fn stop_without_a_broker_reports_that_orders_will_be_repeated() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let mut member = only_member(&kafka)?;
    produce(&kafka, 3, 20).await?;
    member.wait_for("processed: ", TIMEOUT)?;
    kafka.kill(1)?;
    member.wait_for("processed: ", TIMEOUT)?;
    member.interrupt()?;
    let ended = member.wait(Duration::from_secs(30))?;
    assert_eq!(ended.code(), 1, "{}", ended.stderr);
    let said = "cannot close: no broker answers";
    assert!(ended.stderr.contains(said), "{}", ended.stderr);
    Ok(())
}

/// Another member's strategy cannot work with the default one. Waiting would not help.
#[tokio::test]
async fn group_with_another_strategy_ends_the_member_with_the_reason() -> Result<()> {
    let kafka = shared::kafka(&["kafka_consumer_group"])?;
    create_topic(&kafka, TOPIC, 3, &[]).await?;
    let other: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", GROUP)
        .set("partition.assignment.strategy", "cooperative-sticky")
        .create()?;
    other.subscribe(&[TOPIC])?;
    let deadline = Instant::now() + TIMEOUT;
    while other.assignment()?.count() == 0 {
        ensure!(Instant::now() < deadline, "no assignment");
        other.poll(Duration::from_millis(100));
    }
    let ended = member(&kafka)?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    let stderr = ended.stderr;
    assert!(stderr.contains("Error: "), "{stderr}");
    assert!(stderr.contains("InconsistentGroupProtocol"), "{stderr}");
    assert!(!stderr.contains("waiting"), "{stderr}");
    Ok(())
}

/// First while the member is in the group, and then from the start. Neither may it create the topic.
#[tokio::test]
async fn missing_group_permission_ends_the_member_with_the_reason() -> Result<()> {
    let kafka = Broker::secure(Service::Kafka)?;
    let create = &["--create", "--topic", TOPIC, "--partitions", "3"];
    tool(&kafka, "TopicCommand", create)?;
    let member = only_member(&kafka)?;
    produce(&kafka, 3, 1).await?;
    let refused = |mut member: Running| -> Result<()> {
        let ended = member.wait(TIMEOUT)?;
        let stderr = &ended.stderr;
        assert_eq!(ended.code(), 1, "{stderr}");
        let error = stderr.lines().find(|line| line.starts_with("Error: "));
        let error = error.context("no error")?;
        assert!(error.contains("GroupAuthorizationFailed"), "{stderr}");
        assert!(!stderr.contains("waiting: "), "{stderr}");
        Ok(())
    };
    let deny = [
        "--add",
        "--deny-principal",
        "User:ANONYMOUS",
        "--group",
        GROUP,
    ];
    let deny = [&deny[..], &["--operation", "Read"]].concat();
    tool(&kafka, "AclCommand", &deny)?;
    // A member learns it with its next request, at the latest when another one joins.
    refused(member)?;
    refused(crate::consumer_group::member(&kafka)?)
}

/// Far more than the client's own limits for a request.
const NOTICES: Duration = Duration::from_secs(120);

#[tokio::test]
async fn member_notices_a_silent_network_and_forgets_no_order() -> Result<()> {
    let (kafka, proxy) = Proxy::in_front_of(Service::Kafka)?;
    let program = Example::new(env!("CARGO_BIN_EXE_kafka_consumer_group"));
    let mut member = program.proxy(&proxy).spawn()?;
    member.wait_for("assigned: [0, 1, 2]", TIMEOUT)?;
    produce(&kafka, 3, 1).await?;
    for _ in 0..3 {
        member.wait_for("processed: ", TIMEOUT)?;
    }
    proxy.black_hole()?;
    produce(&kafka, 3, 1).await?;
    member.wait_for("waiting: ", NOTICES)?;
    assert_eq!(processed(&member.lines()).len(), 3);
    proxy.heal()?;
    let deadline = Instant::now() + TIMEOUT;
    while committed(&kafka, GROUP, TOPIC)?
        .values()
        .any(|position| *position < 2)
    {
        ensure!(Instant::now() < deadline, "{:?}", member.lines());
        std::thread::sleep(Duration::from_millis(100));
    }
    member.interrupt()?;
    member.wait(TIMEOUT)?.ok()?;
    for partition in 0..3 {
        assert!(processed(&member.lines()).contains(&(partition, 1)));
    }
    Ok(())
}
