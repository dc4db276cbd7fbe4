//! `pulsar_… | head -1`: a program whose output nobody reads any more ends, at the latest with its next line.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use compose::harness::Example;

use crate::support::{SOON, pooled};

/// A program with its arguments.
type Call<'a> = (&'a str, &'a [&'a str]);

/// What runs until Ctrl-C, and what gives it something to print; the others print by themselves.
const PROGRAMS: [(Call<'_>, Option<Call<'_>>); 19] = [
    (
        (env!("CARGO_BIN_EXE_pulsar_backlog_monitor"), &[]),
        Some((env!("CARGO_BIN_EXE_pulsar_producer"), &[])),
    ),
    (
        (env!("CARGO_BIN_EXE_pulsar_consumer"), &[]),
        Some((env!("CARGO_BIN_EXE_pulsar_producer"), &[])),
    ),
    (
        (env!("CARGO_BIN_EXE_pulsar_dead_letter"), &[]),
        Some((
            env!("CARGO_BIN_EXE_pulsar_dead_letter"),
            &["send", "order-1"],
        )),
    ),
    (
        (env!("CARGO_BIN_EXE_pulsar_delayed_delivery"), &[]),
        Some((env!("CARGO_BIN_EXE_pulsar_delayed_delivery"), &["send"])),
    ),
    (
        (env!("CARGO_BIN_EXE_pulsar_exclusive"), &["first"]),
        Some((env!("CARGO_BIN_EXE_pulsar_exclusive"), &["send", "2"])),
    ),
    (
        (env!("CARGO_BIN_EXE_pulsar_failover"), &["main"]),
        Some((env!("CARGO_BIN_EXE_pulsar_failover"), &["send", "2"])),
    ),
    (
        (env!("CARGO_BIN_EXE_pulsar_idempotent_consumer"), &[]),
        Some((
            env!("CARGO_BIN_EXE_pulsar_idempotent_consumer"),
            &["again", "monday", "2"],
        )),
    ),
    (
        (env!("CARGO_BIN_EXE_pulsar_key_shared"), &["anna"]),
        Some((env!("CARGO_BIN_EXE_pulsar_key_shared"), &["send", "2"])),
    ),
    (
        (env!("CARGO_BIN_EXE_pulsar_multi_topic"), &[]),
        Some((
            env!("CARGO_BIN_EXE_pulsar_multi_topic"),
            &["send", "kitchen", "21"],
        )),
    ),
    (
        (env!("CARGO_BIN_EXE_pulsar_negative_ack"), &[]),
        Some((
            env!("CARGO_BIN_EXE_pulsar_negative_ack"),
            &["send", "job-1"],
        )),
    ),
    (
        (env!("CARGO_BIN_EXE_pulsar_partitioned_topic"), &["anna"]),
        Some((
            env!("CARGO_BIN_EXE_pulsar_partitioned_topic"),
            &["send", "2"],
        )),
    ),
    (
        (env!("CARGO_BIN_EXE_pulsar_reader"), &["earliest"]),
        Some((env!("CARGO_BIN_EXE_pulsar_reader"), &["send", "red"])),
    ),
    ((env!("CARGO_BIN_EXE_pulsar_reconnect"), &[]), None),
    (
        (env!("CARGO_BIN_EXE_pulsar_request_reply"), &["serve"]),
        Some((env!("CARGO_BIN_EXE_pulsar_request_reply"), &["7"])),
    ),
    (
        (env!("CARGO_BIN_EXE_pulsar_retry_backoff"), &[]),
        Some((
            env!("CARGO_BIN_EXE_pulsar_retry_backoff"),
            &["send", "order-1"],
        )),
    ),
    (
        (env!("CARGO_BIN_EXE_pulsar_schema"), &[]),
        Some((env!("CARGO_BIN_EXE_pulsar_schema"), &["send", "v1"])),
    ),
    (
        (env!("CARGO_BIN_EXE_pulsar_seek"), &["read"]),
        Some((env!("CARGO_BIN_EXE_pulsar_seek"), &["send", "red"])),
    ),
    (
        (env!("CARGO_BIN_EXE_pulsar_shared"), &["anna"]),
        Some((env!("CARGO_BIN_EXE_pulsar_shared"), &["send", "2"])),
    ),
    (
        (env!("CARGO_BIN_EXE_pulsar_tracing"), &[]),
        Some((env!("CARGO_BIN_EXE_pulsar_tracing"), &["send"])),
    ),
];

#[test]
fn every_program_ends_when_nobody_reads_what_it_prints() -> Result<()> {
    let feeders = PROGRAMS.iter().filter_map(|(_, feeder)| *feeder);
    let calls = PROGRAMS.iter().map(|(call, _)| *call).chain(feeders);
    let names: Vec<&str> = calls
        .filter_map(|(program, _)| program.rsplit('/').next())
        .collect();
    let broker = pooled(&names)?;
    let folder = tempfile::tempdir()?;
    let example = |program: &str| {
        Example::new(program)
            .current_dir(folder.path())
            .env("BACKLOG_INTERVAL", "1")
            .env("METRICS_PORT", "0")
            .broker(&broker)
    };
    let mut running = Vec::new();
    for ((program, args), feeder) in PROGRAMS {
        let pipe = example("/bin/sh").args(["-c", r#""$0" "$@" | head -1"#, program]);
        running.push((program, pipe.args(args).spawn()?, feeder));
    }
    let deadline = Instant::now() + SOON;
    while !running.is_empty() {
        let mut left = Vec::new();
        for (program, mut pipe, feeder) in running {
            if pipe.try_wait()?.is_none() {
                // Again and again: a line that is printed before `head` has ended is lost, and hurts nobody.
                if let Some((feeder, args)) = feeder {
                    // Without its consumer it may fail.
                    example(feeder).args(args).spawn()?.wait(SOON)?;
                }
                left.push((program, pipe, feeder));
                continue;
            }
            let ended = pipe.wait(SOON)?;
            ensure!(
                ended.stdout.lines().count() == 1 && ended.stderr.contains("Broken pipe"),
                "{program} ended for another reason: {}{}",
                ended.stdout,
                ended.stderr
            );
        }
        running = left;
        let names: Vec<&str> = running.iter().map(|(name, ..)| *name).collect();
        ensure!(Instant::now() < deadline, "still running: {names:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
