//! What the headers of the Pulsar examples show and claim, tried on a real broker.

mod broker_absent;
mod producer_consumer;

#[test]
fn transcripts() {
    compose::harness::transcripts(
        env!("CARGO_PKG_NAME"),
        env!("CARGO_BIN_EXE_pulsar_producer"),
    );
}
