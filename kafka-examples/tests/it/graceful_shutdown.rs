//! A stop finishes the task in hand, commits it and leaves the group, within its limits.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::harness::{Example, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::groups::GroupInfo;
use rdkafka::producer::{FutureProducer, FutureRecord};

use crate::reader::committed;
use crate::shared;

const TOPIC: &str = "shutdown-tasks";
const GROUP: &str = "shutdown-workers";
/// Well below the session timeout of 45 seconds, after which a member that does not leave is expelled.
const AT_ONCE: Duration = Duration::from_secs(15);

fn worker(kafka: &Broker) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_graceful_shutdown"))
        .broker(kafka)
        .spawn()
}

/// To one partition, in this order.
async fn send(kafka: &Broker, seconds: &[&str]) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    for payload in seconds {
        let record = FutureRecord::<(), str>::to(TOPIC).partition(0);
        let sent = producer.send(record.payload(payload), TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
    }
    Ok(())
}

/// How many times each task is done.
fn done(workers: &mut [Running]) -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    for line in workers.iter_mut().flat_map(Running::lines) {
        if line.ends_with(": done") {
            *counts.entry(line).or_default() += 1;
        }
    }
    counts
}

/// With Ctrl-C and with SIGTERM.
#[tokio::test]
async fn stop_during_work_loses_and_repeats_no_task_and_the_successor_takes_over_at_once()
-> Result<()> {
    let kafka = shared::kafka(&["kafka_graceful_shutdown"])?;
    send(&kafka, &["2"; 6]).await?;
    let mut workers = vec![worker(&kafka)?];
    for stop in [Running::interrupt, Running::terminate] {
        let worker_in_hand = workers.last_mut().context("no worker")?;
        worker_in_hand.wait_for("2 seconds of work", TIMEOUT)?;
        stop(worker_in_hand)?;
        worker_in_hand.wait_for("finishing one task", TIMEOUT)?;
        let ended = worker_in_hand.wait(TIMEOUT)?.ok()?;
        assert!(
            ended.stdout.ends_with("done\ncommitted\nleft the group\n"),
            "{}",
            ended.stdout
        );
        let begun = ended.stdout.matches("seconds of work").count();
        assert_eq!(ended.stdout.matches(": done").count(), begun);
        let count = done(&mut workers).len();
        assert_eq!(committed(&kafka, GROUP, TOPIC)?[&0], i64::try_from(count)?);
        assert!(count < 6, "the signal came after the last task");
        let begin = Instant::now();
        let mut successor = worker(&kafka)?;
        successor.wait_for(&format!("offset {count}: "), TIMEOUT)?;
        assert!(begin.elapsed() < AT_ONCE, "{:?}", begin.elapsed());
        workers.push(successor);
    }
    let last = workers.last_mut().context("no worker")?;
    last.wait_for("offset 5: done", TIMEOUT)?;
    last.terminate()?;
    last.wait(TIMEOUT)?.ok()?;
    assert_eq!(committed(&kafka, GROUP, TOPIC)?[&0], 6);
    let counts = done(&mut workers);
    assert!(
        counts.len() == 6 && counts.values().all(|count| *count == 1),
        "{counts:?}"
    );
    Ok(())
}

#[tokio::test]
async fn second_ctrl_c_abandons_the_task_and_the_successor_repeats_it() -> Result<()> {
    let kafka = shared::kafka(&["kafka_graceful_shutdown"])?;
    send(&kafka, &["0", "600"]).await?;
    let mut first = worker(&kafka)?;
    first.wait_for("600 seconds of work", TIMEOUT)?;
    first.interrupt()?;
    first.wait_for("finishing one task", TIMEOUT)?;
    let begin = Instant::now();
    first.interrupt()?;
    let ended = first.wait(TIMEOUT)?;
    ensure!(begin.elapsed() < Duration::from_secs(10), "not abandoned");
    assert_eq!(ended.code(), 1, "{}{}", ended.stdout, ended.stderr);
    assert!(
        ended
            .stderr
            .contains("Error: abandoned the task: it will be repeated"),
        "{}",
        ended.stderr
    );
    assert!(
        ended.stdout.ends_with("left the group\n"),
        "{}",
        ended.stdout
    );
    assert_eq!(committed(&kafka, GROUP, TOPIC)?[&0], 1);
    let mut second = worker(&kafka)?;
    second.wait_for("offset 1: 600 seconds of work", AT_ONCE)?;
    Ok(())
}

#[tokio::test]
async fn task_that_takes_too_long_is_abandoned() -> Result<()> {
    let kafka = shared::kafka(&["kafka_graceful_shutdown"])?;
    send(&kafka, &["0", "600"]).await?;
    let mut worker = worker(&kafka)?;
    worker.wait_for("600 seconds of work", TIMEOUT)?;
    worker.terminate()?;
    let begin = Instant::now();
    let ended = worker.wait(TIMEOUT)?;
    assert!(
        begin.elapsed() < Duration::from_secs(25),
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(ended.code(), 1, "{}{}", ended.stdout, ended.stderr);
    assert!(
        ended.stderr.contains("abandoned the task after 15s"),
        "{}",
        ended.stderr
    );
    assert!(
        ended.stdout.ends_with("left the group\n"),
        "{}",
        ended.stdout
    );
    assert_eq!(committed(&kafka, GROUP, TOPIC)?[&0], 1);
    Ok(())
}

/// Waits until all of them are members, and the group has shared out the partitions.
fn await_members(kafka: &Broker, count: usize) -> Result<()> {
    let observer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let stable =
            |group: &GroupInfo| group.state() == "Stable" && group.members().len() == count;
        // Fails as long as the broker loads the group.
        if let Ok(list) = observer.fetch_group_list(Some(GROUP), TIMEOUT)
            && list.groups().iter().any(stable)
        {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the group is not complete");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// One worker has a task in hand, the others have none.
#[tokio::test]
async fn stop_after_the_broker_died_ends_within_the_limits_and_reports_it() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let mut workers = Vec::new();
    for _ in 0..4 {
        workers.push(worker(&kafka)?);
    }
    await_members(&kafka, workers.len())?;
    send(&kafka, &["0", "5"]).await?;
    let deadline = Instant::now() + TIMEOUT;
    let begun = |line: &String| line.ends_with("5 seconds of work");
    let mut busy = loop {
        if let Some(at) = workers
            .iter_mut()
            .position(|worker| worker.lines().iter().any(begun))
        {
            break workers.swap_remove(at);
        }
        ensure!(Instant::now() < deadline, "no worker has the task");
        std::thread::sleep(Duration::from_millis(10));
    };
    kafka.kill(1)?;
    for worker in &mut workers {
        worker.wait_for("waiting: ", TIMEOUT)?;
        worker.terminate()?;
    }
    busy.terminate()?;
    let begin = Instant::now();
    // The task, the commit, the close, and room for a slow machine.
    let limit = Duration::from_secs(5 + 5 + 5 + 5);
    let ended = busy.wait(limit)?;
    assert_eq!(ended.code(), 1, "{}{}", ended.stdout, ended.stderr);
    assert!(ended.stdout.contains("offset 1: done"), "{}", ended.stdout);
    let reason = "the last tasks may be repeated";
    assert!(ended.stderr.contains(reason), "{}", ended.stderr);
    for mut worker in workers {
        let ended = worker.wait(limit.saturating_sub(begin.elapsed()))?;
        assert_eq!(ended.code(), 1, "{}{}", ended.stdout, ended.stderr);
        assert!(!ended.stdout.contains("left"), "{}", ended.stdout);
        assert!(ended.stderr.contains("Error: "), "{}", ended.stderr);
    }
    Ok(())
}
