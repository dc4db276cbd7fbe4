//! Nodes die, also the leader and also too many of them: no confirmed order is lost, and a consumer continues.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::harness::{Example, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::Message;
use rdkafka::admin::{AdminOptions, AlterConfig, ResourceSpecifier};

use crate::administrator::admin;
use crate::reader::read;

const TOPIC: &str = "failover-orders";

fn start(kafka: &Broker) -> Result<Running> {
    let mut orders = Example::new(env!("CARGO_BIN_EXE_kafka_failover"))
        .broker(kafka)
        .spawn()?;
    orders.wait_for("in sync: [1, 2, 3]", TIMEOUT)?;
    orders.wait_for("confirmed: order 5", TIMEOUT)?;
    Ok(orders)
}

/// The leader of partition 0 and its in-sync copies, as a client of the test's own sees them.
fn leader(kafka: &Broker) -> Result<(u16, usize)> {
    let admin = admin(kafka)?;
    let metadata = admin.inner().fetch_metadata(Some(TOPIC), TIMEOUT)?;
    let topic = metadata.topics().first().context("no topic")?;
    let partition = &topic.partitions()[0];
    Ok((u16::try_from(partition.leader())?, partition.isr().len()))
}

/// The orders in the topic are all that were sent, each once and in order; the program has seen nothing else confirmed.
fn check(kafka: &Broker, stdout: &str) -> Result<usize> {
    let mut written = Vec::new();
    for record in read(kafka, TOPIC, "read_committed")? {
        let payload = record.payload().context("no payload")?;
        let order = std::str::from_utf8(payload)?.strip_prefix("order ");
        written.push(order.context("not an order")?.parse::<usize>()?);
    }
    let expected: Vec<usize> = (0..written.len()).collect();
    assert_eq!(written, expected);
    let confirmed: Vec<usize> = stdout
        .lines()
        .filter_map(|line| line.strip_prefix("confirmed: order ")?.parse().ok())
        .collect();
    assert!(confirmed.iter().all(|order| written.contains(order)));
    assert!(stdout.ends_with("all orders are confirmed\n"), "{stdout}");
    Ok(confirmed.len())
}

/// No order is confirmed for a while. Returns the number of orders that were confirmed before.
fn none_is_confirmed(orders: &mut Running) -> usize {
    let mut confirmed = || {
        let lines = orders.lines();
        let confirmed = lines.iter().filter(|line| line.contains("confirmed: "));
        confirmed.count()
    };
    // The last report can still be on its way.
    thread::sleep(Duration::from_secs(1));
    let before = confirmed();
    thread::sleep(Duration::from_secs(10));
    assert_eq!(before, confirmed());
    before
}

#[test]
fn a_dead_leader_loses_no_confirmed_order() -> Result<()> {
    let kafka = Broker::private_cluster(Service::Kafka, 3)?;
    let mut orders = start(&kafka)?;
    let mut tail = Example::new(env!("CARGO_BIN_EXE_kafka_tail"))
        .args([TOPIC])
        .broker(&kafka)
        .spawn()?;
    tail.wait_for(": order 5", TIMEOUT)?;
    for _ in 0..2 {
        let (node, in_sync) = leader(&kafka)?;
        ensure!(in_sync == 3, "{in_sync}");
        kafka.kill(node)?;
        let line = orders.wait_for("leader: node ", TIMEOUT)?;
        ensure!(!line.contains(&format!("node {node},")), "{line}");
        let confirmed = orders.wait_for("confirmed: order", TIMEOUT)?;
        let order = confirmed.trim_start_matches("confirmed: ");
        tail.wait_for(&format!(": {order}"), TIMEOUT)?;
        kafka.restart(node)?;
        orders.wait_for("in sync: [1, 2, 3]", TIMEOUT)?;
    }
    orders.interrupt()?;
    let ended = orders.wait(TIMEOUT)?.ok()?;
    check(&kafka, &ended.stdout)?;
    // The consumer has seen the same, in the same order.
    let read: Vec<usize> = tail
        .lines()
        .iter()
        .filter_map(|line| line.split_once(": order ")?.1.parse().ok())
        .collect();
    assert_eq!(read, (0..read.len()).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn with_two_dead_nodes_nothing_is_confirmed_and_nothing_is_lost() -> Result<()> {
    let kafka = Broker::private_cluster(Service::Kafka, 3)?;
    let mut orders = start(&kafka)?;
    let (node, _) = leader(&kafka)?;
    let (second, third) = (node % 3 + 1, (node + 1) % 3 + 1);
    kafka.kill(node)?;
    kafka.kill(second)?;
    // What was confirmed before is on the node that is left. Nothing is confirmed as long as it is alone.
    let before = none_is_confirmed(&mut orders);
    assert!(kafka.is_running(third)?);
    kafka.restart(second)?;
    orders.wait_for("confirmed: order", TIMEOUT)?;
    kafka.restart(node)?;
    orders.terminate()?;
    let ended = orders.wait(TIMEOUT)?.ok()?;
    assert!(check(&kafka, &ended.stdout)? > before);
    Ok(())
}

/// The leader lives and has a majority of the controllers, but too few copies: it refuses with NotEnoughReplicas.
#[tokio::test]
async fn with_too_few_copies_an_order_waits() -> Result<()> {
    let kafka = Broker::private_cluster(Service::Kafka, 3)?;
    let mut orders = start(&kafka)?;
    let config = AlterConfig::new(ResourceSpecifier::Topic(TOPIC)).set("min.insync.replicas", "3");
    // Kept until the answer is there: without its client the future never ends.
    let admin = admin(&kafka)?;
    let altered = admin.alter_configs([&config], &AdminOptions::new());
    ensure!(altered.await?.iter().all(Result::is_ok));
    let (node, _) = leader(&kafka)?;
    let other = node % 3 + 1;
    kafka.kill(other)?;
    let deadline = Instant::now() + TIMEOUT;
    while leader(&kafka)? != (node, 2) {
        ensure!(Instant::now() < deadline, "{:?}", leader(&kafka)?);
    }
    none_is_confirmed(&mut orders);
    kafka.restart(other)?;
    orders.wait_for("confirmed: order", TIMEOUT)?;
    orders.terminate()?;
    let ended = orders.wait(TIMEOUT)?.ok()?;
    check(&kafka, &ended.stdout)?;
    Ok(())
}
