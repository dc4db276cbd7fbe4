//! No broker: one error that names the address and the way out, and soon.

use anyhow::Result;
use compose::Service;
use compose::harness::broker_absent;

/// All but rabbitmq_queue_monitor, which speaks HTTP; see there.
#[test]
fn without_a_broker_the_error_says_where_and_what_to_do() -> Result<()> {
    broker_absent(
        Service::RabbitMq,
        &[
            env!("CARGO_BIN_EXE_rabbitmq_dead_letter"),
            env!("CARGO_BIN_EXE_rabbitmq_emit_log"),
            env!("CARGO_BIN_EXE_rabbitmq_emit_log_direct"),
            env!("CARGO_BIN_EXE_rabbitmq_emit_log_headers"),
            env!("CARGO_BIN_EXE_rabbitmq_emit_log_topic"),
            env!("CARGO_BIN_EXE_rabbitmq_graceful_shutdown"),
            env!("CARGO_BIN_EXE_rabbitmq_idempotent_consumer"),
            env!("CARGO_BIN_EXE_rabbitmq_mandatory"),
            env!("CARGO_BIN_EXE_rabbitmq_new_task"),
            env!("CARGO_BIN_EXE_rabbitmq_pitfall_missing_ack"),
            env!("CARGO_BIN_EXE_rabbitmq_priority"),
            env!("CARGO_BIN_EXE_rabbitmq_publisher_confirms"),
            env!("CARGO_BIN_EXE_rabbitmq_quorum_queue"),
            env!("CARGO_BIN_EXE_rabbitmq_receive"),
            env!("CARGO_BIN_EXE_rabbitmq_receive_logs"),
            env!("CARGO_BIN_EXE_rabbitmq_receive_logs_direct"),
            env!("CARGO_BIN_EXE_rabbitmq_receive_logs_headers"),
            env!("CARGO_BIN_EXE_rabbitmq_receive_logs_topic"),
            env!("CARGO_BIN_EXE_rabbitmq_reconnect"),
            env!("CARGO_BIN_EXE_rabbitmq_retry_backoff"),
            env!("CARGO_BIN_EXE_rabbitmq_rpc_client"),
            env!("CARGO_BIN_EXE_rabbitmq_rpc_server"),
            env!("CARGO_BIN_EXE_rabbitmq_send"),
            env!("CARGO_BIN_EXE_rabbitmq_stream"),
            env!("CARGO_BIN_EXE_rabbitmq_tracing"),
            env!("CARGO_BIN_EXE_rabbitmq_ttl_overflow"),
            env!("CARGO_BIN_EXE_rabbitmq_worker"),
        ],
    )
}
