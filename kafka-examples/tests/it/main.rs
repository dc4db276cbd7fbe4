//! What the headers of the Kafka examples claim, tried on a real broker.

mod admin;
mod administrator;
mod arriving_orders;
mod async_producer;
mod avro;
mod batch_producer;
mod broker_absent;
mod closed_pipe;
mod cluster;
mod compacted_table;
mod compression;
mod consumer_group;
mod consumer_protocol;
mod consumers;
mod crash_safe_windows;
mod dlq_replay;
mod ending;
mod exactly_once;
mod failover;
mod graceful_shutdown;
mod group_members;
mod headers_schema;
mod idempotent_consumer;
mod lag_monitor;
mod manual_commit;
mod metrics;
mod mock_cluster;
mod offsets;
mod owner;
mod parallel_consumer;
mod parallel_rebalance;
mod pattern_subscription;
mod pitfall_auto_commit;
mod pitfall_ordering;
mod production_worker;
mod reader;
mod rebalance;
mod reconnect;
mod replay;
mod request_reply;
mod retry_dlq;
mod rights;
mod secure;
mod send_and_tail;
mod shared;
mod topic_config;
mod tracing;
mod tuned_consumer;
mod web_service;
mod window_aggregation;
mod without_permission;

/// Without it, kafka_secure is not built, and its tests would be left out silently.
#[test]
fn the_feature_secure_is_on() {
    let on = cfg!(feature = "secure");
    assert!(
        on,
        "add `--features kafka-examples/secure`, as the README's command does"
    );
}
