//! `rabbitmq_… | head -1`: a program whose output nobody reads any more ends, at the latest with its next line.

use anyhow::Result;
use compose::call;
use compose::harness::{Call, closed_pipe};

use crate::shared::vhost;

/// What runs until Ctrl-C, and what gives it something to print; the others print by themselves.
const PROGRAMS: [(Call<'_>, Option<Call<'_>>); 15] = [
    (
        call!("rabbitmq_graceful_shutdown"),
        Some(call!("rabbitmq_graceful_shutdown", "send", "2")),
    ),
    (
        call!("rabbitmq_idempotent_consumer"),
        Some(call!("rabbitmq_idempotent_consumer", "send", "2")),
    ),
    (
        call!("rabbitmq_queue_monitor"),
        Some(call!("rabbitmq_send")),
    ),
    (
        call!("rabbitmq_quorum_queue"),
        Some(call!("rabbitmq_quorum_queue", "send", "job-1")),
    ),
    (call!("rabbitmq_receive"), Some(call!("rabbitmq_send"))),
    (
        call!("rabbitmq_receive_logs"),
        Some(call!("rabbitmq_emit_log", "INFO: x")),
    ),
    (
        call!("rabbitmq_receive_logs_direct", "error"),
        Some(call!("rabbitmq_emit_log_direct", "error", "x")),
    ),
    (
        call!("rabbitmq_receive_logs_headers", "all", "format=pdf"),
        Some(call!("rabbitmq_emit_log_headers", "format=pdf", "x")),
    ),
    (
        call!("rabbitmq_receive_logs_topic", "#"),
        Some(call!("rabbitmq_emit_log_topic", "kern.info", "x")),
    ),
    (call!("rabbitmq_reconnect"), None),
    (
        call!("rabbitmq_retry_backoff"),
        Some(call!("rabbitmq_retry_backoff", "send")),
    ),
    (
        call!("rabbitmq_rpc_server"),
        Some(call!("rabbitmq_rpc_client", "5")),
    ),
    (
        call!("rabbitmq_stream", "first"),
        Some(call!("rabbitmq_stream", "send", "created")),
    ),
    (
        call!("rabbitmq_tracing"),
        Some(call!("rabbitmq_tracing", "send")),
    ),
    (
        call!("rabbitmq_worker", "3"),
        Some(call!("rabbitmq_new_task", "mail")),
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_program_ends_when_nobody_reads_what_it_prints() -> Result<()> {
    let place = vhost().await?;
    let folder = tempfile::tempdir()?;
    closed_pipe(&PROGRAMS, |example| {
        let example = place.told(example).current_dir(folder.path());
        let example = example.env("MONITOR_INTERVAL", "1");
        example.env("METRICS_PORT", "0").env("TASK_SECONDS", "0")
    })
}
