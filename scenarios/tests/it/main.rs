//! What the scenarios promise, tried on real brokers.

#[path = "../../../kafka-examples/tests/it/ending.rs"]
mod ending;
mod event_bus;
mod log_aggregation;
mod order_flow;
mod order_pipeline;
mod shared;
