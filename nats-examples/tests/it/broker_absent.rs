//! No broker: one error that names the address and the way out, and soon.

use anyhow::Result;
use compose::Service;
use compose::harness::broker_absent;

#[test]
fn without_a_broker_the_error_says_where_and_what_to_do() -> Result<()> {
    broker_absent(
        Service::Nats,
        &[
            env!("CARGO_BIN_EXE_jetstream_ack_kinds"),
            env!("CARGO_BIN_EXE_jetstream_async_publish"),
            env!("CARGO_BIN_EXE_jetstream_consumer"),
            env!("CARGO_BIN_EXE_jetstream_dedup"),
            env!("CARGO_BIN_EXE_jetstream_idempotent_consumer"),
            env!("CARGO_BIN_EXE_jetstream_lag_monitor"),
            env!("CARGO_BIN_EXE_jetstream_partitions"),
            env!("CARGO_BIN_EXE_jetstream_replay"),
            env!("CARGO_BIN_EXE_jetstream_retry_dlq"),
            env!("CARGO_BIN_EXE_jetstream_stream"),
            env!("CARGO_BIN_EXE_jetstream_work_queue"),
            env!("CARGO_BIN_EXE_nats_drain"),
            env!("CARGO_BIN_EXE_nats_headers"),
            env!("CARGO_BIN_EXE_nats_kv"),
            env!("CARGO_BIN_EXE_nats_leader_election"),
            env!("CARGO_BIN_EXE_nats_object_store"),
            env!("CARGO_BIN_EXE_nats_publish"),
            env!("CARGO_BIN_EXE_nats_queue_group"),
            env!("CARGO_BIN_EXE_nats_reconnect"),
            env!("CARGO_BIN_EXE_nats_requester"),
            env!("CARGO_BIN_EXE_nats_responder"),
            env!("CARGO_BIN_EXE_nats_scatter_gather"),
            env!("CARGO_BIN_EXE_nats_service"),
            env!("CARGO_BIN_EXE_nats_slow_consumer"),
            env!("CARGO_BIN_EXE_nats_subscribe"),
        ],
    )
}
