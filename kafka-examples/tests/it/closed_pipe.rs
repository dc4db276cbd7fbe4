//! `kafka_… | head -1`: a program whose output nobody reads any more ends with its next line.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use compose::harness::{Example, SOON};

use crate::shared;

/// A program and its arguments.
type Command = (&'static str, &'static [&'static str]);

/// The consumers that run until Ctrl-C, and what gives them something to print.
const CONSUMERS: [(Command, Option<Command>); 14] = [
    (
        (env!("CARGO_BIN_EXE_kafka_compacted_table"), &[]),
        Some((
            env!("CARGO_BIN_EXE_kafka_compacted_table"),
            &["set", "apple", "1"],
        )),
    ),
    (
        (env!("CARGO_BIN_EXE_kafka_consumer_group"), &[]),
        Some((env!("CARGO_BIN_EXE_kafka_async_producer"), &["20"])),
    ),
    (
        (env!("CARGO_BIN_EXE_kafka_exactly_once"), &[]),
        Some((env!("CARGO_BIN_EXE_kafka_exactly_once"), &["send", "3"])),
    ),
    (
        (env!("CARGO_BIN_EXE_kafka_headers_schema"), &[]),
        Some((env!("CARGO_BIN_EXE_kafka_headers_schema"), &["send"])),
    ),
    (
        (env!("CARGO_BIN_EXE_kafka_idempotent_consumer"), &[]),
        Some((
            env!("CARGO_BIN_EXE_kafka_idempotent_consumer"),
            &["send", "3"],
        )),
    ),
    (
        (env!("CARGO_BIN_EXE_kafka_lag_monitor"), &[]),
        Some((env!("CARGO_BIN_EXE_kafka_async_producer"), &["20"])),
    ),
    (
        (env!("CARGO_BIN_EXE_kafka_manual_commit"), &[]),
        Some((
            env!("CARGO_BIN_EXE_kafka_manual_commit"),
            &["send", "order-0", "order-1"],
        )),
    ),
    (
        (env!("CARGO_BIN_EXE_kafka_parallel_consumer"), &[]),
        Some((
            env!("CARGO_BIN_EXE_kafka_parallel_consumer"),
            &["send", "200"],
        )),
    ),
    (
        (env!("CARGO_BIN_EXE_kafka_rebalance"), &[]),
        Some((env!("CARGO_BIN_EXE_kafka_rebalance"), &["send", "20"])),
    ),
    // It ticks.
    ((env!("CARGO_BIN_EXE_kafka_reconnect"), &[]), None),
    (
        (env!("CARGO_BIN_EXE_kafka_retry_dlq"), &[]),
        Some((env!("CARGO_BIN_EXE_kafka_retry_dlq"), &["send"])),
    ),
    (
        (env!("CARGO_BIN_EXE_kafka_tracing"), &[]),
        Some((env!("CARGO_BIN_EXE_kafka_tracing"), &["send"])),
    ),
    // It brings its own jobs.
    (
        (
            env!("CARGO_BIN_EXE_kafka_tuned_consumer"),
            &["10", "10", "10"],
        ),
        None,
    ),
    (
        (env!("CARGO_BIN_EXE_kafka_window_aggregation"), &[]),
        Some((
            env!("CARGO_BIN_EXE_kafka_page_views"),
            &["2026-01-01T12:00:00Z"],
        )),
    ),
];

#[test]
fn every_consumer_ends_with_its_next_line_when_nobody_reads_it() -> Result<()> {
    let examples =
        CONSUMERS.map(|((consumer, _), _)| consumer.rsplit('/').next().unwrap_or_default());
    let kafka = shared::kafka(&examples)?;
    let folder = tempfile::tempdir()?;
    let example = |program: &str| {
        Example::new(program)
            .current_dir(folder.path())
            .env("LAG_INTERVAL", "1")
            .env("METRICS_PORT", "0")
            .broker(&kafka)
    };
    let mut running = Vec::new();
    for ((consumer, args), feeder) in CONSUMERS {
        let pipe = example("/bin/sh").args(["-c", r#""$0" "$@" | head -1"#, consumer]);
        running.push((consumer, pipe.args(args).spawn()?, feeder));
    }
    let deadline = Instant::now() + SOON;
    while !running.is_empty() {
        for (_, _, feeder) in &running {
            if let Some((program, args)) = feeder {
                example(program).args(*args).spawn()?.wait(SOON)?.ok()?;
            }
        }
        std::thread::sleep(Duration::from_millis(500));
        let mut left = Vec::new();
        for (consumer, mut pipe, feeder) in running {
            if pipe.try_wait()?.is_none() {
                left.push((consumer, pipe, feeder));
                continue;
            }
            let ended = pipe.wait(SOON)?;
            ensure!(
                ended.stdout.lines().count() == 1 && ended.stderr.contains("Broken pipe"),
                "{consumer} ended for another reason: {}{}",
                ended.stdout,
                ended.stderr
            );
        }
        running = left;
        let names: Vec<&str> = running.iter().map(|(name, ..)| *name).collect();
        ensure!(Instant::now() < deadline, "still running: {names:?}");
    }
    Ok(())
}
