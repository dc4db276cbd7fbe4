//! The consumer protocol: members share, a running classic group is moved to it, and what the client refuses.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT};

use crate::arriving_orders::with_orders;
use crate::reader::committed;
use crate::shared;

const TOPIC: &str = "protocol-orders";

fn example(kafka: &Broker, args: &[&str]) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_consumer_protocol"))
        .args(args)
        .broker(kafka)
        .spawn()
}

fn done(member: &mut Running) -> Vec<String> {
    let mut lines = member.lines();
    lines.retain(|line| line.ends_with(": done"));
    lines
}

/// A member that waits for others to give partitions up is told of none.
fn is_assigned(line: &str) -> bool {
    line.starts_with("assigned: [") && line != "assigned: []"
}

/// The lines that are not orders, each with the number of orders before it.
fn said(member: &mut Running) -> Vec<String> {
    let lines = member.lines();
    let mut orders = Vec::new();
    let mut said = vec!["a member".to_owned()];
    for line in lines {
        match line.ends_with(": done") {
            true => orders.push(line),
            false => said.push(format!("{} {:?}: {line}", orders.len(), orders.last())),
        }
    }
    said.push(format!("{} {:?}", orders.len(), orders.last()));
    said
}

fn wait_for_all(before: &[String], members: &mut [Running], sent: usize) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let mut all: BTreeSet<String> = before.iter().cloned().collect();
        for member in members.iter_mut() {
            all.extend(done(member));
        }
        if all.len() == sent {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "only {} of {sent}", all.len());
        std::thread::sleep(Duration::from_millis(50));
    }
}

const CLASSIC: &[&str] = &["group.protocol=classic"];
const NEW: &[&str] = &[];

/// Starts two members with the first protocol, and replaces them one at a time by members with the second protocol, while
/// orders arrive. Returns how many orders were sent, what was done, and what the members said besides.
fn replace(
    kafka: &Broker,
    from: &[&str],
    to: &[&str],
) -> Result<(usize, Vec<String>, Vec<String>)> {
    let mut first = example(kafka, from)?;
    first.wait_for("assigned: [0, 1, 2]", TIMEOUT)?;
    let mut members = vec![first];
    let (mut orders, mut story) = (Vec::new(), Vec::new());
    let sent = with_orders(kafka, TOPIC, || {
        let mut second = example(kafka, from)?;
        second.wait_for(": done", TIMEOUT)?;
        members.push(second);
        for _ in 0..2 {
            // Three members share three partitions, with both protocols.
            let mut next = example(kafka, to)?;
            next.wait_for(": done", TIMEOUT)?;
            members.push(next);
            let mut leaving = members.remove(0);
            leaving.terminate()?;
            leaving.wait(TIMEOUT)?.ok()?;
            orders.extend(done(&mut leaving));
            story.extend(said(&mut leaving));
        }
        for member in &mut members {
            member.wait_for(": done", TIMEOUT)?;
        }
        Ok(())
    })?;
    wait_for_all(&orders, &mut members, sent)?;
    for mut member in members {
        member.interrupt()?;
        member.wait(TIMEOUT)?.ok()?;
        orders.extend(done(&mut member));
        story.extend(said(&mut member));
    }
    Ok((sent, orders, story))
}

#[test]
fn a_running_group_is_moved_to_the_protocol_without_loss_or_repetition() -> Result<()> {
    let kafka = shared::kafka(&["kafka_consumer_protocol"])?;
    let (sent, orders, story) = replace(&kafka, CLASSIC, NEW)?;
    assert_eq!(orders.len(), sent, "orders were repeated: {story:#?}");
    let end = committed(&kafka, TOPIC, TOPIC)?.values().sum::<i64>();
    assert_eq!(usize::try_from(end)?, sent, "{story:#?}");
    Ok(())
}

/// When the last new member leaves, the classic members can lose their partitions, and the commit of a member that leaves
/// amid that can be refused.
#[test]
fn the_way_back_loses_no_order() -> Result<()> {
    let kafka = shared::kafka(&["kafka_consumer_protocol"])?;
    // Returns when all orders are done.
    let (sent, orders, story) = replace(&kafka, NEW, CLASSIC)?;
    println!("{} repeated: {story:#?}", orders.len() - sent);
    // A position past the end or past an order that is not done would be a loss.
    let mut last = example(&kafka, CLASSIC)?;
    last.wait_for("assigned: [0, 1, 2]", TIMEOUT)?;
    let deadline = Instant::now() + TIMEOUT;
    while usize::try_from(committed(&kafka, TOPIC, TOPIC)?.values().sum::<i64>())? != sent {
        ensure!(Instant::now() < deadline, "not at the end: {story:#?}");
        std::thread::sleep(Duration::from_millis(100));
    }
    last.terminate()?;
    last.wait(TIMEOUT)?.ok()?;
    Ok(())
}

#[test]
fn two_members_share_and_one_takes_over_from_one_that_was_killed() -> Result<()> {
    let kafka = shared::kafka(&["kafka_consumer_protocol"])?;
    let mut first = example(&kafka, &[])?;
    first.wait_for("assigned: [0, 1, 2]", TIMEOUT)?;
    let mut second = None;
    let sent = with_orders(&kafka, TOPIC, || {
        first.wait_for(": done", TIMEOUT)?;
        let second = second.insert(example(&kafka, &["group.remote.assignor=range"])?);
        second.wait_for_line(is_assigned, "a partition", TIMEOUT)?;
        // Only what moves is revoked.
        let revoked = first.wait_for("revoked: ", TIMEOUT)?;
        ensure!(revoked.split(',').count() < 3, "{revoked}");
        second.wait_for(": done", TIMEOUT)?;
        first.wait_for(": done", TIMEOUT)?;
        first.kill()?;
        // The broker's session timeout, 45 seconds.
        second.wait_for_line(is_assigned, "the partitions", 3 * TIMEOUT)?;
        second.wait_for(": done", TIMEOUT)?;
        Ok(())
    })?;
    first.wait(TIMEOUT)?;
    let mut second = second.ok_or_else(|| anyhow!("no second member"))?;
    wait_for_all(&done(&mut first), std::slice::from_mut(&mut second), sent)?;
    second.terminate()?;
    second.wait(TIMEOUT)?.ok()?;
    let end = committed(&kafka, TOPIC, TOPIC)?.values().sum::<i64>();
    assert_eq!(usize::try_from(end)?, sent);
    Ok(())
}

#[test]
fn settings_of_the_classic_protocol_are_refused_with_the_reason() -> Result<()> {
    let kafka = shared::kafka(&[])?;
    let cases = [
        (
            "session.timeout.ms=10000",
            "`session.timeout.ms` is not supported",
        ),
        (
            "heartbeat.interval.ms=3000",
            "`heartbeat.interval.ms` is not supported",
        ),
        (
            "partition.assignment.strategy=range",
            "Use `group.remote.assignor` instead",
        ),
        ("no.such.setting=1", "no.such.setting"),
        ("session.timeout.ms", "usage: "),
    ];
    for (arg, reason) in cases {
        let refused = example(&kafka, &[arg])?.wait(TIMEOUT)?;
        assert_eq!(refused.code(), 1, "{arg}");
        assert!(refused.stderr.contains(reason), "{arg}: {}", refused.stderr);
        if !arg.starts_with("no.") && arg.contains('=') {
            println!("{}", refused.stderr);
        }
    }
    Ok(())
}

#[test]
fn an_assignor_that_the_broker_does_not_have_ends_the_member() -> Result<()> {
    let kafka = shared::kafka(&["kafka_consumer_protocol"])?;
    let mut member = example(&kafka, &["group.remote.assignor=nearest"])?;
    let ended = member.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    assert!(
        ended.stderr.contains("UnsupportedAssignor"),
        "{}",
        ended.stderr
    );
    Ok(())
}
