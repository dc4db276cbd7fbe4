//! A handover repeats nothing, a crash repeats no more than the orders since the last commit.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT};

use crate::arriving_orders::with_orders;
use crate::reader::committed;
use crate::shared;

const TOPIC: &str = "rebalance-orders";

fn example(kafka: &Broker) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_rebalance"))
        .broker(kafka)
        .spawn()
}

fn done(member: &mut Running) -> Vec<String> {
    let mut lines = member.lines();
    lines.retain(|line| line.ends_with(": done"));
    lines
}

fn wait_for_all(before: &[String], member: &mut Running, sent: usize) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let now = done(member);
        let all: BTreeSet<&String> = before.iter().chain(&now).collect();
        if all.len() == sent {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "only {} of {sent}: {:#?}",
            all.len(),
            said(member)
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The lines that are not orders.
fn said(member: &mut Running) -> Vec<String> {
    let mut lines = member.lines();
    lines.retain(|line| !line.ends_with(": done"));
    lines
}

#[test]
fn a_handover_repeats_nothing() -> Result<()> {
    let kafka = shared::kafka(&["kafka_rebalance"])?;
    let mut first = example(&kafka)?;
    first.wait_for("assigned: [0, 1, 2]", TIMEOUT)?;
    let mut second = None;
    let sent = with_orders(&kafka, TOPIC, || {
        first.wait_for(": done", TIMEOUT)?;
        let second = second.insert(example(&kafka)?);
        // Both have partitions: neither has fenced the other.
        for _ in 0..50 {
            second.wait_for(": done", TIMEOUT)?;
            first.wait_for(": done", TIMEOUT)?;
        }
        first.terminate()?;
        first.wait(TIMEOUT)?.ok()?;
        second.wait_for("assigned: [0, 1, 2]", TIMEOUT)?;
        second.wait_for(": done", TIMEOUT)?;
        Ok(())
    })?;
    let mut second = second.ok_or_else(|| anyhow!("no second member"))?;
    let before = done(&mut first);
    wait_for_all(&before, &mut second, sent)?;
    second.interrupt()?;
    second.wait(TIMEOUT)?.ok()?;
    assert!(
        first
            .lines()
            .iter()
            .any(|line| line.starts_with("revoked: [0, 1, 2]")),
        "{:?}",
        said(&mut first)
    );
    let twice = before.len() + done(&mut second).len() - sent;
    assert_eq!(twice, 0, "{:#?}{:#?}", said(&mut first), said(&mut second));
    let end = usize::try_from(committed(&kafka, TOPIC, TOPIC)?.values().sum::<i64>())?;
    assert_eq!(end, sent, "the last commit is not at the end");
    Ok(())
}

/// The control of the test above: without the commit on revoke, orders are repeated.
#[test]
fn a_crash_repeats_at_most_a_hundred_orders() -> Result<()> {
    let kafka = shared::kafka(&["kafka_rebalance"])?;
    let mut first = example(&kafka)?;
    first.wait_for("assigned: [0, 1, 2]", TIMEOUT)?;
    let sent = with_orders(&kafka, TOPIC, || {
        // Some commits, and some orders after the last one.
        for _ in 0..250 {
            first.wait_for(": done", TIMEOUT)?;
        }
        first.kill()
    })?;
    first.wait(TIMEOUT)?;
    let before = done(&mut first);
    let mut second = example(&kafka)?;
    wait_for_all(&before, &mut second, sent)?;
    second.interrupt()?;
    second.wait(TIMEOUT)?.ok()?;
    let twice = before.len() + done(&mut second).len() - sent;
    // The last line can be printed and not stored, and a commit can be on its way.
    assert!((1..=200).contains(&twice), "{twice} orders were repeated");
    Ok(())
}

/// It loses its partitions while it is stopped, and is a member again afterwards.
#[test]
fn a_member_that_was_stopped_for_too_long_comes_back() -> Result<()> {
    let kafka = shared::kafka(&["kafka_rebalance"])?;
    let mut first = example(&kafka)?;
    first.wait_for("assigned: [0, 1, 2]", TIMEOUT)?;
    let mut second = None;
    let sent = with_orders(&kafka, TOPIC, || {
        first.wait_for(": done", TIMEOUT)?;
        first.pause()?;
        // It gets the partitions when the first one has not been heard of for the session timeout, 45 seconds.
        let second = second.insert(example(&kafka)?);
        second.wait_for("assigned: [0, 1, 2]", 3 * TIMEOUT)?;
        second.wait_for(": done", TIMEOUT)?;
        first.resume()?;
        first.wait_for("lost to others: [0, 1, 2]", TIMEOUT)?;
        first.wait_for("assigned: ", TIMEOUT)?;
        first.wait_for(": done", TIMEOUT)?;
        Ok(())
    })?;
    let mut second = second.ok_or_else(|| anyhow!("no second member"))?;
    second.interrupt()?;
    second.wait(TIMEOUT)?.ok()?;
    let before = done(&mut second);
    wait_for_all(&before, &mut first, sent)?;
    first.interrupt()?;
    first.wait(TIMEOUT)?.ok()?;
    Ok(())
}
