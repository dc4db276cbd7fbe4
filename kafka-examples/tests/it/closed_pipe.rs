//! `kafka_… | head -1`: a program whose output nobody reads any more ends with its next line.

use anyhow::Result;
use compose::call;
use compose::harness::{Call, closed_pipe, names};

use crate::shared;

/// The consumers that run until Ctrl-C, and what gives them something to print; the others print by themselves.
const CONSUMERS: [(Call<'_>, Option<Call<'_>>); 14] = [
    (
        call!("kafka_compacted_table"),
        Some(call!("kafka_compacted_table", "set", "apple", "1")),
    ),
    (
        call!("kafka_consumer_group"),
        Some(call!("kafka_async_producer", "20")),
    ),
    (
        call!("kafka_exactly_once"),
        Some(call!("kafka_exactly_once", "send", "3")),
    ),
    (
        call!("kafka_headers_schema"),
        Some(call!("kafka_headers_schema", "send")),
    ),
    (
        call!("kafka_idempotent_consumer"),
        Some(call!("kafka_idempotent_consumer", "send", "3")),
    ),
    (
        call!("kafka_lag_monitor"),
        Some(call!("kafka_async_producer", "20")),
    ),
    (
        call!("kafka_manual_commit"),
        Some(call!("kafka_manual_commit", "send", "order-0", "order-1")),
    ),
    (
        call!("kafka_parallel_consumer"),
        Some(call!("kafka_parallel_consumer", "send", "200")),
    ),
    (
        call!("kafka_rebalance"),
        Some(call!("kafka_rebalance", "send", "20")),
    ),
    (call!("kafka_reconnect"), None),
    (
        call!("kafka_retry_dlq"),
        Some(call!("kafka_retry_dlq", "send")),
    ),
    (call!("kafka_tracing"), Some(call!("kafka_tracing", "send"))),
    (call!("kafka_tuned_consumer", "10", "10", "10"), None),
    (
        call!("kafka_window_aggregation"),
        Some(call!("kafka_page_views", "2026-01-01T12:00:00Z")),
    ),
];

#[test]
fn every_consumer_ends_when_nobody_reads_what_it_prints() -> Result<()> {
    let kafka = shared::kafka(&names(&CONSUMERS))?;
    let folder = tempfile::tempdir()?;
    closed_pipe(&CONSUMERS, |example| {
        let example = example.current_dir(folder.path()).broker(&kafka);
        example.env("LAG_INTERVAL", "1").env("METRICS_PORT", "0")
    })
}
