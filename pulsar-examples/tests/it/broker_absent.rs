//! No broker: one error that names the address and the way out, and soon.

use anyhow::Result;
use compose::Service;
use compose::harness::broker_absent;

#[test]
fn without_a_broker_the_error_says_where_and_what_to_do() -> Result<()> {
    broker_absent(
        Service::Pulsar,
        &[
            env!("CARGO_BIN_EXE_pulsar_backlog_monitor"),
            env!("CARGO_BIN_EXE_pulsar_batch_producer"),
            env!("CARGO_BIN_EXE_pulsar_compacted_table"),
            env!("CARGO_BIN_EXE_pulsar_consumer"),
            env!("CARGO_BIN_EXE_pulsar_dead_letter"),
            env!("CARGO_BIN_EXE_pulsar_delayed_delivery"),
            env!("CARGO_BIN_EXE_pulsar_exclusive"),
            env!("CARGO_BIN_EXE_pulsar_failover"),
            env!("CARGO_BIN_EXE_pulsar_geo_replication"),
            env!("CARGO_BIN_EXE_pulsar_idempotent_consumer"),
            env!("CARGO_BIN_EXE_pulsar_key_shared"),
            env!("CARGO_BIN_EXE_pulsar_multi_tenant"),
            env!("CARGO_BIN_EXE_pulsar_multi_topic"),
            env!("CARGO_BIN_EXE_pulsar_negative_ack"),
            env!("CARGO_BIN_EXE_pulsar_partitioned_topic"),
            env!("CARGO_BIN_EXE_pulsar_producer"),
            env!("CARGO_BIN_EXE_pulsar_reader"),
            env!("CARGO_BIN_EXE_pulsar_reconnect"),
            env!("CARGO_BIN_EXE_pulsar_request_reply"),
            env!("CARGO_BIN_EXE_pulsar_retry_backoff"),
            env!("CARGO_BIN_EXE_pulsar_schema"),
            env!("CARGO_BIN_EXE_pulsar_seek"),
            env!("CARGO_BIN_EXE_pulsar_shared"),
            env!("CARGO_BIN_EXE_pulsar_tracing"),
        ],
    )
}
