//! The order pipeline: exactly-once effect under SIGKILL, and what it does with bad input.

mod checker;
mod inputs;
mod kills;
mod network;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use compose::harness::{Example, TIMEOUT};
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{Headers, OwnedMessage};
use rdkafka::{Message, Offset, TopicPartitionList};
use rusqlite::{Connection, OpenFlags};
use tempfile::TempDir;

/// The pipeline's own: the `orders` of the Kafka lessons are not its business.
const TOPIC: &str = "order-pipeline.orders";
const DEAD_LETTERS: &str = "order-pipeline.orders.dlq";

/// The program with its books in `state`.
fn program(state: &TempDir, brokers: &str, args: &[&str]) -> Example {
    Example::new(env!("CARGO_BIN_EXE_order_pipeline"))
        .args(args)
        .arg_state(state.path())
        .env("KAFKA_BROKERS", brokers)
}

trait ArgState {
    fn arg_state(self, state: &Path) -> Self;
}

impl ArgState for Example {
    fn arg_state(self, state: &Path) -> Example {
        self.args([Path::new("--state"), state])
    }
}

/// All that a `read_committed` consumer finds on `topic`, partition by partition.
///
/// A commit is answered when it is decided. Its markers are written after that, and until they are, such a consumer
/// comes to an end before it; so this waits for them.
fn committed(brokers: &str, topic: &str) -> Result<Vec<OwnedMessage>> {
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "independent-reader")
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .create()?;
    let metadata = reader.fetch_metadata(Some(topic), TIMEOUT)?;
    let mut all = TopicPartitionList::new();
    for partition in metadata.topics()[0].partitions() {
        all.add_partition_offset(topic, partition.id(), Offset::Beginning)?;
    }
    let any: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("isolation.level", "read_uncommitted")
        .create()?;
    let deadline = Instant::now() + TIMEOUT;
    for partition in all.elements() {
        let end = |of: &BaseConsumer| of.fetch_watermarks(topic, partition.partition(), TIMEOUT);
        while end(&reader)? != end(&any)? {
            ensure!(
                Instant::now() < deadline,
                "a transaction is open on {topic}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let mut open = all.count();
    reader.assign(&all)?;
    let mut records = Vec::new();
    while open > 0 {
        match reader.poll(TIMEOUT) {
            Some(Ok(record)) => records.push(record.detach()),
            Some(Err(KafkaError::PartitionEOF(_))) => open -= 1,
            Some(Err(error)) => return Err(error.into()),
            None => bail!("{topic} has no end"),
        }
    }
    Ok(records)
}

fn header(record: &OwnedMessage, key: &str) -> Option<String> {
    let header = record.headers()?.iter().find(|header| header.key == key)?;
    String::from_utf8(header.value?.to_vec()).ok()
}

/// One number from the books of a service.
fn books(state: &TempDir, service: &str, sql: &str) -> Result<i64> {
    let file = books_file(state, service)?;
    let db = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    Ok(db.query_row(sql, [], |row| row.get(0))?)
}

fn books_file(state: &TempDir, service: &str) -> Result<PathBuf> {
    let cluster = std::fs::read_dir(state.path())?
        .flatten()
        .find(|entry| entry.path().is_dir())
        .context("no books")?;
    Ok(cluster.path().join(format!("{service}.db")))
}

/// The number that the report gives for `what`.
fn reported(stdout: &str, what: &str) -> Option<i64> {
    let line = stdout.lines().find(|line| line.starts_with(what))?;
    line[what.len()..].trim().parse().ok()
}
