//! Log aggregation: every line is one document, whatever is killed and whatever the store answers.

mod faults;
mod files;
mod http;
mod kills;

use std::path::Path;
use std::sync::{OnceLock, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use compose::harness::{Example, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{Headers, OwnedMessage};
use rdkafka::{Message, Offset, TopicPartitionList};
use serde_json::Value;

/// All tests share one store, under indices of their own; who breaks it has it alone.
static ALONE: RwLock<()> = RwLock::new(());

fn store() -> Result<&'static Broker> {
    static STORE: OnceLock<std::result::Result<Broker, String>> = OnceLock::new();
    STORE
        .get_or_init(|| Broker::private(Service::OpenSearch).map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow::anyhow!("{error}"))
}

/// The program, with its indices named `index-…`, and its topics likewise.
fn program(kafka: &Broker, store: &str, index: &str, args: &[&str]) -> Example {
    // A search does not look at Kafka.
    let topic: &[&str] = match args.first() {
        Some(&"search") => &[],
        _ => &["--topic", index],
    };
    Example::new(env!("CARGO_BIN_EXE_log_aggregation"))
        .args(args)
        .args(["--index", index, "--wait", "60"])
        .args(topic)
        .broker(kafka)
        .env("ELASTICSEARCH_URL", store)
}

/// A GET to the store.
fn get(path: &str) -> Result<Value> {
    let answer = http::get(&store()?.address(), path)?;
    ensure!(answer.status == 200, "{path}: {}", answer.text());
    Ok(serde_json::from_slice(&answer.body)?)
}

fn count(index: &str) -> Result<u64> {
    get(&format!("/{index}-2*.*.*/_refresh"))?;
    let count = get(&format!("/{index}-2*.*.*/_count"))?;
    count["count"].as_u64().context("no count")
}

/// Waits until there are that many documents.
fn await_count(index: &str, documents: u64) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        // Without an index yet there is no answer, or 0.
        let found = count(index);
        if found.as_ref().is_ok_and(|found| *found == documents) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("{found:?} documents instead of {documents}");
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// The documents that `query` finds, at most ten thousand.
fn find(index: &str, query: &str) -> Result<Vec<Value>> {
    get(&format!("/{index}-2*.*.*/_refresh"))?;
    let query = query
        .replace(' ', "%20")
        .replace('[', "%5B")
        .replace(']', "%5D");
    let found = get(&format!("/{index}-2*.*.*/_search?size=10000&q={query}"))?;
    let hits = found["hits"]["hits"].as_array().context("no hits")?;
    Ok(hits.clone())
}

/// All that a `read_committed` consumer finds on the dead-letter topic, which has one partition.
fn dead_letters(brokers: &str, topic: &str) -> Result<Vec<OwnedMessage>> {
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "independent-reader")
        .set("isolation.level", "read_committed")
        .set("enable.partition.eof", "true")
        .create()?;
    let mut start = TopicPartitionList::new();
    start.add_partition_offset(&format!("{topic}.dlq"), 0, Offset::Beginning)?;
    reader.assign(&start)?;
    let mut letters = Vec::new();
    loop {
        match reader.poll(TIMEOUT) {
            Some(Ok(letter)) => letters.push(letter.detach()),
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(letters),
            Some(Err(error)) => return Err(error.into()),
            None => bail!("the dead letters have no end"),
        }
    }
}

fn header(letter: &OwnedMessage, key: &str) -> Option<String> {
    let header = letter.headers()?.iter().find(|header| header.key == key)?;
    String::from_utf8(header.value?.to_vec()).ok()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}

#[test]
fn without_kafka_there_is_one_readable_error() -> Result<()> {
    compose::harness::broker_absent(Service::Kafka, &[env!("CARGO_BIN_EXE_log_aggregation")])
}
