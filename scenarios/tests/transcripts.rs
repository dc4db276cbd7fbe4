//! What the headers of the scenarios show: one test for each, with the name of the scenario.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use compose::harness::{ExampleInfo, Pool, transcripts};
use compose::{Broker, Service};

fn main() -> ExitCode {
    let binary = env!("CARGO_BIN_EXE_order_pipeline");
    transcripts(env!("CARGO_PKG_NAME"), binary, brokers)
}

fn brokers(scenario: &ExampleInfo) -> Result<Vec<Arc<Broker>>> {
    // The one that several of them need.
    static KAFKAS: Pool = Pool::new(Service::Kafka);
    KAFKAS.for_transcript(scenario, &[])
}
