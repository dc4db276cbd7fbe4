//! What the headers of the Pulsar examples show and claim, tried on a real broker.

mod backlog_monitor;
mod broker_absent;
mod closed_pipe;
mod idempotent_consumer;
mod operations;
mod producer_consumer;
mod reading;
mod reconnect;
mod redelivery;
mod subscriptions;
mod support;
mod writing;

#[test]
fn transcripts() {
    compose::harness::transcripts_with(
        env!("CARGO_PKG_NAME"),
        env!("CARGO_BIN_EXE_pulsar_producer"),
        support::for_transcript,
    );
}
