//! What the scenarios promise, tried on real brokers.

mod event_bus;
mod log_aggregation;
mod order_flow;
mod order_pipeline;
mod shared;

#[test]
fn transcripts() {
    compose::harness::transcripts_with(
        env!("CARGO_PKG_NAME"),
        env!("CARGO_BIN_EXE_order_pipeline"),
        shared::for_transcript,
    );
}
