//! What the headers of the RabbitMQ examples show and claim, tried on a real broker.

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
mod quorum_queue;
mod reconnect;
mod rpc;
mod send_receive;
mod shared;
mod stream;
mod tracing;
mod work_queue;

#[test]
fn transcripts() {
    compose::harness::transcripts_with(
        env!("CARGO_PKG_NAME"),
        env!("CARGO_BIN_EXE_rabbitmq_send"),
        shared::for_transcript,
    );
}
