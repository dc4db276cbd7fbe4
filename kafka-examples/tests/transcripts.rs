//! What the headers of the Kafka examples show: one test for each, with the name of the example.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use compose::harness::{ExampleInfo, Pool, transcripts};
use compose::{Broker, Service};

#[path = "it/owner.rs"]
mod owner;

fn main() -> ExitCode {
    let binary = env!("CARGO_BIN_EXE_kafka_async_producer");
    transcripts(env!("CARGO_PKG_NAME"), binary, brokers)
}

fn brokers(example: &ExampleInfo) -> Result<Vec<Arc<Broker>>> {
    static KAFKAS: Pool = Pool::new(Service::Kafka).owned_by(owner::owner);
    // What these show is the whole broker.
    const ALONE: [&str; 3] = ["kafka_admin", "kafka_lag_monitor", "kafka_replay"];
    KAFKAS.for_transcript(example, &ALONE)
}
