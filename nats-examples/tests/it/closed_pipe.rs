//! `nats_… | head -1`: a program whose output nobody reads any more ends with its next line.

use anyhow::Result;
use compose::call;
use compose::harness::{Call, closed_pipe};

use crate::nats::server;

/// What runs until Ctrl-C, and what gives it something to print; the others print by themselves.
const PROGRAMS: [(Call<'_>, Option<Call<'_>>); 13] = [
    (
        call!("jetstream_consumer"),
        Some(call!("jetstream_consumer", "send", "order-1")),
    ),
    (
        call!("jetstream_idempotent_consumer"),
        Some(call!("jetstream_idempotent_consumer", "send", "2")),
    ),
    (
        call!("jetstream_lag_monitor"),
        Some(call!("jetstream_work_queue", "send", "20")),
    ),
    (
        call!("jetstream_partitions"),
        Some(call!("jetstream_partitions", "send", "20")),
    ),
    (
        call!("jetstream_replay", "follow"),
        Some(call!("jetstream_replay")),
    ),
    (
        call!("jetstream_retry_dlq"),
        Some(call!("jetstream_retry_dlq", "send", "order-1")),
    ),
    (call!("nats_drain"), Some(call!("nats_drain", "ask", "2"))),
    (call!("nats_headers"), Some(call!("nats_headers", "send"))),
    (
        call!("nats_kv", "watch"),
        Some(call!("nats_kv", "stock", "5")),
    ),
    (call!("nats_leader_election", "anna"), None),
    (
        call!("nats_queue_group", "join", "anna"),
        Some(call!("nats_queue_group", "send", "2")),
    ),
    (
        call!("nats_responder"),
        Some(call!("nats_requester", "1, 2")),
    ),
    (
        call!("nats_subscribe", "events.>"),
        Some(call!("nats_publish")),
    ),
];

#[test]
fn every_program_ends_when_nobody_reads_what_it_prints() -> Result<()> {
    let nats = server()?;
    let folder = tempfile::tempdir()?;
    closed_pipe(&PROGRAMS, |example| {
        let example = example.current_dir(folder.path()).broker(&nats);
        example.env("LAG_INTERVAL", "1")
    })
}
