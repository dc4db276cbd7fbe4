//! What each program does without its broker: at the start, and when it died meanwhile.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use compose::harness::{Example, ExampleInfo, TIMEOUT, Workspace, without_broker};
use compose::{Broker, Service};

/// All of the package, so that a new example is tried too.
#[test]
fn without_a_broker_the_error_says_where_and_what_to_do() -> Result<()> {
    let folder = Path::new(env!("CARGO_BIN_EXE_kafka_send")).parent();
    let folder = folder.context("a program is in a folder")?;
    let workspace = Workspace::load()?;
    let examples = workspace.examples().iter().filter(|example| {
        // One without a service needs no broker. One with several has a test of its own, as one with TLS has.
        example.package == env!("CARGO_PKG_NAME")
            && example.services == ["kafka"]
            && !example.secure
    });
    let example = |example: &ExampleInfo| {
        let args: &[&str] = match example.name.as_str() {
            "kafka_send" => &["topic", "payload"],
            "kafka_tail" => &["topic"],
            _ => &[],
        };
        let program = Example::new(folder.join(&example.name)).args(args);
        (example.name.clone(), program)
    };
    without_broker(Service::Kafka, examples.map(example).collect())
}

/// A member of a group has three things to say at its end: its last commit, what it gives up, and that it leaves. With
/// nobody there to hear them it ends all the same.
#[test]
fn ctrl_c_ends_every_consumer_although_the_broker_died() -> Result<()> {
    /// What hangs would hang for ever; the slowest of the others takes half of this.
    const LIMIT: Duration = Duration::from_secs(60);
    // What writes something to consume, what consumes it, and what it prints then.
    let consumers = [
        (
            env!("CARGO_BIN_EXE_kafka_async_producer"),
            vec!["100"],
            env!("CARGO_BIN_EXE_kafka_consumer_group"),
            "processed: ",
        ),
        (
            env!("CARGO_BIN_EXE_kafka_exactly_once"),
            vec!["send", "3"],
            env!("CARGO_BIN_EXE_kafka_exactly_once"),
            "committed: ",
        ),
        (
            env!("CARGO_BIN_EXE_kafka_headers_schema"),
            vec!["send"],
            env!("CARGO_BIN_EXE_kafka_headers_schema"),
            "offset 0, ",
        ),
        (
            env!("CARGO_BIN_EXE_kafka_idempotent_consumer"),
            vec!["send", "3"],
            env!("CARGO_BIN_EXE_kafka_idempotent_consumer"),
            "payment-1: ",
        ),
        (
            env!("CARGO_BIN_EXE_kafka_manual_commit"),
            vec!["send", "order-0", "order-1", "order-2"],
            env!("CARGO_BIN_EXE_kafka_manual_commit"),
            "committed ",
        ),
        (
            env!("CARGO_BIN_EXE_kafka_parallel_consumer"),
            vec!["send", "1000"],
            env!("CARGO_BIN_EXE_kafka_parallel_consumer"),
            "done: ",
        ),
        (
            env!("CARGO_BIN_EXE_kafka_rebalance"),
            vec!["send", "1500"],
            env!("CARGO_BIN_EXE_kafka_rebalance"),
            "done: ",
        ),
        (
            env!("CARGO_BIN_EXE_kafka_retry_dlq"),
            vec!["send"],
            env!("CARGO_BIN_EXE_kafka_retry_dlq"),
            "paid at attempt 1",
        ),
        (
            env!("CARGO_BIN_EXE_kafka_tracing"),
            vec!["send"],
            env!("CARGO_BIN_EXE_kafka_tracing"),
            "order-1: handled",
        ),
        (
            env!("CARGO_BIN_EXE_kafka_page_views"),
            vec!["2026-01-01T12:00:00Z"],
            env!("CARGO_BIN_EXE_kafka_window_aggregation"),
            "window ",
        ),
    ];
    let kafka = Broker::private(Service::Kafka)?;
    let folder = tempfile::tempdir()?;
    let example = |program: &str| {
        Example::new(program)
            .current_dir(folder.path())
            .env("METRICS_PORT", "0")
            .broker(&kafka)
    };
    // One after another: each has to be served within seconds by a broker that has just started.
    for (writer, args, ..) in &consumers {
        example(writer).args(args).spawn()?.wait(TIMEOUT)?.ok()?;
    }
    let mut running = Vec::new();
    for (.., consumer, _) in &consumers {
        running.push(example(consumer).spawn()?);
    }
    // It brings its own work, and is still busy with it.
    let tuned = env!("CARGO_BIN_EXE_kafka_tuned_consumer");
    running.push(example(tuned).args(["10", "10", "10"]).spawn()?);
    let first = consumers.iter().map(|(.., first)| *first);
    for (process, first) in running.iter_mut().zip(first.chain(["offset 0: done"])) {
        process.wait_for(first, TIMEOUT)?;
    }
    kafka.kill(1)?;
    for process in &mut running {
        process.interrupt()?;
    }
    for mut process in running {
        let ended = process.wait(LIMIT)?;
        // With an error or without: not all of them have something that they could not say.
        assert!(
            matches!(ended.code(), 0 | 1),
            "{}{}",
            ended.stdout,
            ended.stderr
        );
    }
    Ok(())
}
