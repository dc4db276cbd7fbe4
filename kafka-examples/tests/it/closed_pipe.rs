//! `kafka_… | head -1`: a program ends with its next line when nothing reads its output.

use anyhow::Result;
use compose::harness::{Example, TIMEOUT, closed_pipe, names};

use crate::consumers::{CONSUMERS, with_settings};
use crate::shared;

#[test]
fn every_program_ends_when_nothing_reads_its_output() -> Result<()> {
    let programs: Vec<_> = CONSUMERS
        .iter()
        .map(|(program, feeder, _)| (*program, *feeder))
        .collect();
    let kafka = shared::kafka(&names(&programs))?;
    // One of them reads only a topic that exists.
    let views = Example::new(env!("CARGO_BIN_EXE_kafka_page_views")).broker(&kafka);
    views.spawn()?.wait(TIMEOUT)?.ok()?;
    let folder = tempfile::tempdir()?;
    closed_pipe(&programs, |example| {
        with_settings(example.current_dir(folder.path()).broker(&kafka))
    })
}
