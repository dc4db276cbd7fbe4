//! On a cluster of three nodes, a node dies: the programs that run until stopped continue with the other two.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use compose::harness::{Call, Running, TIMEOUT};
use compose::{Broker, Service};

use crate::consumers::{CONSUMERS, Fed, example};

/// How long the members of a group may wait for a new leader, a new coordinator, and the killed node's session.
const LIMIT: Duration = Duration::from_secs(150);
/// A failed transaction ends it, and the next start continues: its header says so.
const ENDS: &str = "kafka_crash_safe_windows";

struct Program<'a> {
    fed: Fed<'a>,
    running: Running,
    /// The lines about records that it had printed before this part of the test.
    before: usize,
}

impl Program<'_> {
    /// How many lines about records it has printed.
    fn printed(&mut self) -> usize {
        // The offset of another record is another one.
        let part = self.fed.2.split(" 0").next().unwrap_or(self.fed.2);
        let lines = self.running.lines();
        lines.iter().filter(|line| line.contains(part)).count()
    }

    fn has_printed_more(&mut self, kafka: &Broker, folder: &Path) -> Result<bool> {
        let (program, _) = self.fed.0;
        if let Some(ended) = self.running.try_wait()? {
            let lines = self.running.lines();
            ensure!(program.ends_with(ENDS), "{program}: {ended}: {lines:?}");
            self.running = example(self.fed.0, kafka, folder).spawn()?;
            self.before = 0;
        }
        Ok(self.printed() > self.before)
    }
}

#[test]
fn every_program_continues_when_a_node_of_three_dies() -> Result<()> {
    let kafka = Broker::private_cluster(Service::Kafka, 3)?;
    let folder = tempfile::tempdir()?;
    let start = |call| example(call, &kafka, folder.path()).spawn();
    // Some need their topic at the start.
    feed(&start, CONSUMERS.iter().filter_map(|fed| fed.1))?;
    let mut programs = Vec::new();
    for fed in CONSUMERS {
        programs.push(Program {
            fed,
            running: start(fed.0)?,
            before: 0,
        });
    }
    // The node that dies is the leader of some partitions and the coordinator of some groups.
    for killed in [None, Some(1)] {
        if let Some(node) = killed {
            kafka.kill(node)?;
        }
        let started = Instant::now();
        let mut waiting: Vec<_> = programs.iter_mut().collect();
        for program in &mut waiting {
            program.before = program.printed();
        }
        while !waiting.is_empty() {
            // Again and again: a record that is written before a reader has its partitions can be skipped.
            feed(&start, waiting.iter().filter_map(|program| program.fed.1))?;
            let mut still = Vec::new();
            for program in waiting {
                if !program.has_printed_more(&kafka, folder.path())? {
                    still.push(program);
                }
            }
            waiting = still;
            let late = started.elapsed() > LIMIT;
            if let (true, Some(program)) = (late, waiting.first_mut()) {
                let lines = program.running.lines();
                let last = &lines[lines.len().saturating_sub(5)..];
                let (name, _) = program.fed.0;
                bail!("killed: {killed:?}, {name} waits: {last:?}");
            }
        }
    }
    for program in &mut programs {
        program.running.terminate()?;
        let ended = program.running.wait(TIMEOUT)?;
        ended.ok().with_context(|| program.fed.0.0.to_owned())?;
    }
    Ok(())
}

/// Runs the programs that write records. During the death of a node, one may fail.
fn feed<'a>(
    start: &impl Fn(Call<'a>) -> Result<Running>,
    feeders: impl Iterator<Item = Call<'a>>,
) -> Result<()> {
    for mut feeder in feeders.map(start).collect::<Result<Vec<_>>>()? {
        feeder.wait(TIMEOUT)?;
    }
    Ok(())
}
