//! What the headers of the NATS examples show: one test for each, with the name of the example.

use std::process::ExitCode;

use compose::harness::{private_brokers, transcripts};

fn main() -> ExitCode {
    let binary = env!("CARGO_BIN_EXE_nats_publish");
    // A NATS starts in a moment, so each has its own.
    transcripts(env!("CARGO_PKG_NAME"), binary, private_brokers)
}
