//! `rabbitmq_… | head -1`: a program whose output nobody reads any more ends, at the latest with its next line.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::shared::{SOON, vhost};

/// A program with its arguments.
type Call<'a> = (&'a str, &'a [&'a str]);

/// What runs until Ctrl-C, and what gives it something to print; the others print by themselves.
const PROGRAMS: [(Call<'_>, Option<Call<'_>>); 15] = [
    (
        (env!("CARGO_BIN_EXE_rabbitmq_graceful_shutdown"), &[]),
        Some((
            env!("CARGO_BIN_EXE_rabbitmq_graceful_shutdown"),
            &["send", "2"],
        )),
    ),
    (
        (env!("CARGO_BIN_EXE_rabbitmq_idempotent_consumer"), &[]),
        Some((
            env!("CARGO_BIN_EXE_rabbitmq_idempotent_consumer"),
            &["send", "2"],
        )),
    ),
    (
        (env!("CARGO_BIN_EXE_rabbitmq_queue_monitor"), &[]),
        Some((env!("CARGO_BIN_EXE_rabbitmq_send"), &[])),
    ),
    (
        (env!("CARGO_BIN_EXE_rabbitmq_quorum_queue"), &[]),
        Some((
            env!("CARGO_BIN_EXE_rabbitmq_quorum_queue"),
            &["send", "job-1"],
        )),
    ),
    (
        (env!("CARGO_BIN_EXE_rabbitmq_receive"), &[]),
        Some((env!("CARGO_BIN_EXE_rabbitmq_send"), &[])),
    ),
    (
        (env!("CARGO_BIN_EXE_rabbitmq_receive_logs"), &[]),
        Some((env!("CARGO_BIN_EXE_rabbitmq_emit_log"), &["INFO: x"])),
    ),
    (
        (
            env!("CARGO_BIN_EXE_rabbitmq_receive_logs_direct"),
            &["error"],
        ),
        Some((
            env!("CARGO_BIN_EXE_rabbitmq_emit_log_direct"),
            &["error", "x"],
        )),
    ),
    (
        (
            env!("CARGO_BIN_EXE_rabbitmq_receive_logs_headers"),
            &["all", "format=pdf"],
        ),
        Some((
            env!("CARGO_BIN_EXE_rabbitmq_emit_log_headers"),
            &["format=pdf", "x"],
        )),
    ),
    (
        (env!("CARGO_BIN_EXE_rabbitmq_receive_logs_topic"), &["#"]),
        Some((
            env!("CARGO_BIN_EXE_rabbitmq_emit_log_topic"),
            &["kern.info", "x"],
        )),
    ),
    ((env!("CARGO_BIN_EXE_rabbitmq_reconnect"), &[]), None),
    (
        (env!("CARGO_BIN_EXE_rabbitmq_retry_backoff"), &[]),
        Some((env!("CARGO_BIN_EXE_rabbitmq_retry_backoff"), &["send"])),
    ),
    (
        (env!("CARGO_BIN_EXE_rabbitmq_rpc_server"), &[]),
        Some((env!("CARGO_BIN_EXE_rabbitmq_rpc_client"), &["5"])),
    ),
    (
        (env!("CARGO_BIN_EXE_rabbitmq_stream"), &["first"]),
        Some((env!("CARGO_BIN_EXE_rabbitmq_stream"), &["send", "created"])),
    ),
    (
        (env!("CARGO_BIN_EXE_rabbitmq_tracing"), &[]),
        Some((env!("CARGO_BIN_EXE_rabbitmq_tracing"), &["send"])),
    ),
    (
        (env!("CARGO_BIN_EXE_rabbitmq_worker"), &["3"]),
        Some((env!("CARGO_BIN_EXE_rabbitmq_new_task"), &["mail"])),
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_program_ends_when_nobody_reads_what_it_prints() -> Result<()> {
    let place = vhost().await?;
    let folder = tempfile::tempdir()?;
    let example = |program: &str| {
        place
            .example(program)
            .current_dir(folder.path())
            .env("MONITOR_INTERVAL", "1")
            .env("METRICS_PORT", "0")
            .env("TASK_SECONDS", "0")
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
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}
