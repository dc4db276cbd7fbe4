//! No broker: one error that names the address and the way out, and soon.

use anyhow::Result;
use compose::Service;
use compose::harness::broker_absent;

#[test]
fn without_a_broker_the_error_says_where_and_what_to_do() -> Result<()> {
    broker_absent(
        Service::Kafka,
        &[
            env!("CARGO_BIN_EXE_kafka_admin"),
            env!("CARGO_BIN_EXE_kafka_async_producer"),
            env!("CARGO_BIN_EXE_kafka_batch_producer"),
            env!("CARGO_BIN_EXE_kafka_compacted_table"),
            env!("CARGO_BIN_EXE_kafka_compression"),
            env!("CARGO_BIN_EXE_kafka_consumer_group"),
            env!("CARGO_BIN_EXE_kafka_dlq_replay"),
            env!("CARGO_BIN_EXE_kafka_exactly_once"),
            env!("CARGO_BIN_EXE_kafka_headers_schema"),
            env!("CARGO_BIN_EXE_kafka_idempotent_consumer"),
            env!("CARGO_BIN_EXE_kafka_lag_monitor"),
            env!("CARGO_BIN_EXE_kafka_manual_commit"),
            env!("CARGO_BIN_EXE_kafka_page_views"),
            env!("CARGO_BIN_EXE_kafka_parallel_consumer"),
            env!("CARGO_BIN_EXE_kafka_pitfall_auto_commit"),
            env!("CARGO_BIN_EXE_kafka_pitfall_ordering"),
            env!("CARGO_BIN_EXE_kafka_rebalance"),
            env!("CARGO_BIN_EXE_kafka_reconnect"),
            env!("CARGO_BIN_EXE_kafka_replay"),
            env!("CARGO_BIN_EXE_kafka_retry_dlq"),
            env!("CARGO_BIN_EXE_kafka_tracing"),
            env!("CARGO_BIN_EXE_kafka_tuned_consumer"),
            env!("CARGO_BIN_EXE_kafka_window_aggregation"),
        ],
    )
}
