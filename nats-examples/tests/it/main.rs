//! What the headers of the NATS examples show and claim, tried on a real broker.

mod broker_absent;
mod closed_pipe;
mod core;
mod jetstream;
mod nats;
mod publish_subscribe;
mod requests;
mod stores;

#[test]
fn transcripts() {
    compose::harness::transcripts(env!("CARGO_PKG_NAME"), env!("CARGO_BIN_EXE_nats_publish"));
}
