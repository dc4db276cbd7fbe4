//! A handover repeats nothing if the position is committed, and does repeat without.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::shared;

fn example(kafka: &Broker, args: &[&str]) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_rebalance"))
        .args(args)
        .broker(kafka)
        .spawn()
}

fn done(member: &mut Running) -> Vec<String> {
    let mut lines = member.lines();
    lines.retain(|line| line.starts_with("done: "));
    lines
}

/// A second member joins while 1500 orders come in, and both end in turn. Returns how many were done twice.
fn repeats(kafka: &Broker, args: &[&str]) -> Result<usize> {
    let mut first = example(kafka, args)?;
    first.wait_for("assigned: [0, 1, 2, 3]", TIMEOUT)?;
    let mut sender = example(kafka, &["send", "1500"])?;
    first.wait_for("done: ", TIMEOUT)?;
    let mut second = example(kafka, args)?;
    second.wait_for("assigned: ", TIMEOUT)?;
    for _ in 0..50 {
        second.wait_for("done: ", TIMEOUT)?;
    }
    first.interrupt()?;
    first.wait(TIMEOUT)?.ok()?;
    let first = done(&mut first);
    assert!(
        sender.try_wait()?.is_none(),
        "the end came after the last order"
    );
    let deadline = Instant::now() + 3 * TIMEOUT;
    loop {
        let second = done(&mut second);
        let all: BTreeSet<&String> = first.iter().chain(&second).collect();
        if all.len() == 1500 {
            break;
        }
        ensure!(Instant::now() < deadline, "only {} of 1500", all.len());
        std::thread::sleep(Duration::from_millis(50));
    }
    sender.wait(TIMEOUT)?.ok()?;
    second.interrupt()?;
    second.wait(TIMEOUT)?.ok()?;
    Ok(first.len() + done(&mut second).len() - 1500)
}

#[test]
fn what_was_done_is_committed_before_the_partition_moves() -> Result<()> {
    let kafka = shared::kafka(&["kafka_rebalance"])?;
    assert_eq!(repeats(&kafka, &[])?, 0);
    let observer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "rebalance-orders")
        .create()?;
    let mut list = TopicPartitionList::new();
    list.add_partition_range("rebalance-orders", 0, 3);
    for at in observer.committed_offsets(list, TIMEOUT)?.elements() {
        assert_eq!(
            at.offset(),
            Offset::Offset(375),
            "partition {}",
            at.partition()
        );
    }
    Ok(())
}

#[test]
fn without_a_commit_on_revoke_work_is_repeated() -> Result<()> {
    let kafka = shared::kafka(&["kafka_rebalance"])?;
    assert!(repeats(&kafka, &["--careless"])? > 0);
    Ok(())
}
