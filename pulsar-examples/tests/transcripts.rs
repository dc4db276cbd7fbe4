//! What the headers of the Pulsar examples show: one test for each, with the name of the example.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use compose::harness::{ExampleInfo, Pool, transcripts};
use compose::{Broker, Service};

fn main() -> ExitCode {
    let binary = env!("CARGO_BIN_EXE_pulsar_producer");
    transcripts(env!("CARGO_PKG_NAME"), binary, brokers)
}

fn brokers(example: &ExampleInfo) -> Result<Vec<Arc<Broker>>> {
    static PULSARS: Pool = Pool::new(Service::Pulsar);
    // It shows all topics that there are.
    PULSARS.for_transcript(example, &["pulsar_backlog_monitor"])
}
