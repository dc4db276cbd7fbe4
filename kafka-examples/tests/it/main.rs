//! What the headers of the Kafka examples claim, tried on a real broker.

mod admin;
mod async_producer;
mod batch_producer;
mod broker_absent;
mod closed_pipe;
mod compacted_table;
mod compression;
mod consumer_group;
mod exactly_once;
mod headers_schema;
mod idempotent_consumer;
mod lag_monitor;
mod manual_commit;
mod owner;
mod parallel_consumer;
mod pitfall_auto_commit;
mod pitfall_ordering;
mod reader;
mod rebalance;
mod reconnect;
mod replay;
mod retry_dlq;
mod shared;
mod tracing;
mod tuned_consumer;
mod window_aggregation;
