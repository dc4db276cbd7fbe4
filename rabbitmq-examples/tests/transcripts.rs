//! What the headers of the RabbitMQ examples show: one test for each, with the name of the example.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use compose::harness::{ExampleInfo, Pool, transcripts};
use compose::{Broker, Service};

fn main() -> ExitCode {
    let binary = env!("CARGO_BIN_EXE_rabbitmq_send");
    transcripts(env!("CARGO_PKG_NAME"), binary, brokers)
}

fn brokers(example: &ExampleInfo) -> Result<Vec<Arc<Broker>>> {
    static RABBITS: Pool = Pool::new(Service::RabbitMq);
    RABBITS.for_transcript(example, &[])
}
