//! What the headers of the RabbitMQ examples claim, tried on a real broker.

mod backoff;
mod broker_absent;
mod closed_pipe;
mod confirms;
mod dead_letter;
mod graceful_shutdown;
mod idempotent_consumer;
mod limits;
mod logs;
mod monitor;
mod network;
mod quorum_queue;
mod reconnect;
mod rpc;
mod secure;
mod send_receive;
mod shared;
mod stream;
mod tracing;
mod work_queue;
