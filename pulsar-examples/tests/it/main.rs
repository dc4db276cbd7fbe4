//! What the headers of the Pulsar examples claim, tried on a real broker.

mod backlog_monitor;
mod broker_absent;
mod closed_pipe;
mod idempotent_consumer;
mod network;
mod operations;
mod producer_consumer;
mod reading;
mod reconnect;
mod redelivery;
mod secure;
mod subscriptions;
mod support;
mod writing;
