//! `pulsar_… | head -1`: a program whose output nobody reads any more ends, at the latest with its next line.

use anyhow::Result;
use compose::harness::{Call, closed_pipe};
use compose::{Broker, Service, call};

/// What runs until Ctrl-C, and what gives it something to print; the others print by themselves.
const PROGRAMS: [(Call<'_>, Option<Call<'_>>); 19] = [
    (
        call!("pulsar_backlog_monitor"),
        Some(call!("pulsar_producer")),
    ),
    (call!("pulsar_consumer"), Some(call!("pulsar_producer"))),
    (
        call!("pulsar_dead_letter"),
        Some(call!("pulsar_dead_letter", "send", "order-1")),
    ),
    (
        call!("pulsar_delayed_delivery"),
        Some(call!("pulsar_delayed_delivery", "send")),
    ),
    (
        call!("pulsar_exclusive", "first"),
        Some(call!("pulsar_exclusive", "send", "2")),
    ),
    (
        call!("pulsar_failover", "main"),
        Some(call!("pulsar_failover", "send", "2")),
    ),
    (
        call!("pulsar_idempotent_consumer"),
        Some(call!("pulsar_idempotent_consumer", "again", "monday", "2")),
    ),
    (
        call!("pulsar_key_shared", "anna"),
        Some(call!("pulsar_key_shared", "send", "2")),
    ),
    (
        call!("pulsar_multi_topic"),
        Some(call!("pulsar_multi_topic", "send", "kitchen", "21")),
    ),
    (
        call!("pulsar_negative_ack"),
        Some(call!("pulsar_negative_ack", "send", "job-1")),
    ),
    (
        call!("pulsar_partitioned_topic", "anna"),
        Some(call!("pulsar_partitioned_topic", "send", "2")),
    ),
    (
        call!("pulsar_reader", "earliest"),
        Some(call!("pulsar_reader", "send", "red")),
    ),
    (call!("pulsar_reconnect"), None),
    (
        call!("pulsar_request_reply", "serve"),
        Some(call!("pulsar_request_reply", "7")),
    ),
    (
        call!("pulsar_retry_backoff"),
        Some(call!("pulsar_retry_backoff", "send", "order-1")),
    ),
    (
        call!("pulsar_schema"),
        Some(call!("pulsar_schema", "send", "v1")),
    ),
    (
        call!("pulsar_seek", "read"),
        Some(call!("pulsar_seek", "send", "red")),
    ),
    (
        call!("pulsar_shared", "anna"),
        Some(call!("pulsar_shared", "send", "2")),
    ),
    (
        call!("pulsar_tracing"),
        Some(call!("pulsar_tracing", "send")),
    ),
];

#[test]
fn every_program_ends_when_nobody_reads_what_it_prints() -> Result<()> {
    let broker = Broker::private(Service::Pulsar)?;
    let folder = tempfile::tempdir()?;
    closed_pipe(&PROGRAMS, |example| {
        let example = example.current_dir(folder.path()).broker(&broker);
        example
            .env("BACKLOG_INTERVAL", "1")
            .env("METRICS_PORT", "0")
    })
}
