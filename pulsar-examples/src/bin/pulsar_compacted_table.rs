//! Compacted topic: a table with the latest value of each key
//!
//! Messages are changes, `key = value`, and one with an empty payload deletes its key. Who reads all of them in order
//! has the table. Compaction writes what is left of them to a place of its own, and a reader that asks for it gets one
//! message per key, and then whatever came since.
//!
//! ```console
//! $ cargo lab run pulsar_compacted_table set tea 250
//! set: tea
//! $ cargo lab run pulsar_compacted_table set cake 390
//! set: cake
//! $ cargo lab run pulsar_compacted_table set tea 270
//! set: tea
//! $ cargo lab run pulsar_compacted_table set soup 500
//! set: soup
//! $ cargo lab run pulsar_compacted_table delete soup
//! deleted: soup
//! $ cargo lab run pulsar_compacted_table
//! cake = 390
//! tea = 270
//! 2 keys from 5 messages
//! $ cargo lab run pulsar_compacted_table compact
//! compacted
//! $ cargo lab run pulsar_compacted_table set milk 120
//! set: milk
//! $ cargo lab run pulsar_compacted_table
//! cake = 390
//! milk = 120
//! tea = 270
//! 3 keys from 3 messages
//! ```
//!
//! Notice: compaction changes how much is read, never the table. It needs a key in each message; one without is dropped
//! by it. Only readers and consumers of type Exclusive or Failover may ask for the compacted view. It happens when
//! asked for, as here, or by itself above a `compactionThreshold` of the namespace.
//!
//! Try: look at the topic after the compaction with a reader that does not ask for it: all messages are still there.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650), PULSAR_ADMIN_URL (http://localhost:8080). See also:
//! pulsar_reader.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use futures::TryStreamExt;
use pulsar::message::proto::MessageIdData;
use pulsar::reader::Reader;
use pulsar::{ConsumerOptions, Pulsar, TokioExecutor};
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

const TOPIC: &str = "public/default/compacted-prices";
const PATIENCE: Duration = Duration::from_secs(5);
/// For the admin interface.
const ANSWER: Duration = Duration::from_secs(30);
const COMPACTION: Duration = Duration::from_secs(300);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let admin =
        std::env::var("PULSAR_ADMIN_URL").unwrap_or_else(|_| "http://localhost:8080".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => print_table(&pulsar, &address).await,
        ["set", key, value] => {
            ensure!(!value.is_empty(), "an empty value would delete {key}");
            change(&pulsar, &admin, key, value).await?;
            println!("set: {key}");
            Ok(())
        }
        ["delete", key] => {
            change(&pulsar, &admin, key, "").await?;
            println!("deleted: {key}");
            Ok(())
        }
        ["compact"] => compact(&admin).await,
        _ => bail!("usage: pulsar_compacted_table [set KEY VALUE | delete KEY | compact]"),
    }
}

async fn change(
    pulsar: &Pulsar<TokioExecutor>,
    admin: &str,
    key: &str,
    value: &str,
) -> anyhow::Result<()> {
    let topic = format!("persistent://{TOPIC}");
    let mut producer = pulsar.producer().with_topic(topic).build().await?;
    keep(admin).await?;
    let message = producer.create_message().with_key(key).with_content(value);
    let receipt = message.send_non_blocking().await?;
    timeout(PATIENCE, receipt)
        .await
        .context("no receipt; do it again")??;
    Ok(producer.close().await?)
}

/// A topic that no subscription holds is deleted as it is read; this keeps it. For this topic alone; it has to exist.
async fn keep(admin: &str) -> anyhow::Result<()> {
    let url = format!("{admin}/admin/v2/persistent/{TOPIC}/retention");
    let policy = json!({"retentionTimeInMinutes": -1, "retentionSizeInMB": -1});
    let request = reqwest::Client::new()
        .post(&url)
        .timeout(ANSWER)
        .json(&policy);
    let answer = request
        .send()
        .await
        .with_context(|| format!("cannot ask {url}"))?;
    if !answer.status().is_success() {
        bail!(
            "cannot set the retention: {}: {}",
            answer.status(),
            answer.text().await?
        );
    }
    Ok(())
}

async fn print_table(pulsar: &Pulsar<TokioExecutor>, address: &str) -> anyhow::Result<()> {
    // The earliest position; on the wire it is -1.
    let earliest = MessageIdData {
        ledger_id: u64::MAX,
        entry_id: u64::MAX,
        ..MessageIdData::default()
    };
    let options = ConsumerOptions::default()
        .starting_on_message(earliest)
        .read_compacted(true);
    let mut reader: Reader<Vec<u8>, _> = pulsar
        .reader()
        .with_topic(format!("persistent://{TOPIC}"))
        .with_options(options)
        .into_reader()
        .await?;
    let end = timeout(PATIENCE, reader.get_last_message_id())
        .await
        .context("no answer")??;
    // -1: the topic is empty.
    let end = (end.ledger_id as i64, end.entry_id as i64);
    let mut table: BTreeMap<String, String> = BTreeMap::new();
    let mut messages = 0;
    let mut at_end = end.1 < 0;
    while !at_end {
        let message = timeout(PATIENCE, reader.try_next())
            .await
            .context("the end is not in sight")??;
        let message = message.with_context(|| format!("lost the connection to {address}"))?;
        messages += 1;
        let place = message.message_id();
        at_end = (place.ledger_id as i64, place.entry_id as i64) >= end;
        let value = String::from_utf8_lossy(&message.payload.data).into_owned();
        match message.key() {
            Some(key) if value.is_empty() => drop(table.remove(&key)),
            Some(key) => drop(table.insert(key, value)),
            None => eprintln!("a message without a key is no change: ignored"),
        }
    }
    for (key, value) in &table {
        println!("{key} = {value}");
    }
    println!("{} keys from {messages} messages", table.len());
    Ok(())
}

async fn compact(admin: &str) -> anyhow::Result<()> {
    let http = reqwest::Client::builder().timeout(ANSWER).build()?;
    let url = format!("{admin}/admin/v2/persistent/{TOPIC}/compaction");
    let answer = http
        .put(&url)
        .send()
        .await
        .with_context(|| format!("cannot ask {url}"))?;
    match answer.status() {
        status if status.is_success() => {}
        StatusCode::CONFLICT => {} // one is running
        status => bail!("cannot compact: {status}: {}", answer.text().await?),
    }
    // It runs in the broker; ask until it is over.
    let over = async {
        loop {
            let answer = http.get(&url).send().await?.error_for_status()?;
            let state: Value = answer.json().await?;
            match state["status"].as_str() {
                Some("SUCCESS") => return Ok(()),
                Some("RUNNING") => sleep(Duration::from_millis(100)).await,
                _ => bail!("the compaction failed: {state}"),
            }
        }
    };
    timeout(COMPACTION, over)
        .await
        .with_context(|| format!("not compacted after {COMPACTION:?}; see {url}"))??;
    println!("compacted");
    Ok(())
}

/// Left alone, the client retries for more than a minute, in silence.
async fn connect(address: &str) -> anyhow::Result<Pulsar<TokioExecutor>> {
    let client = Pulsar::builder(address, TokioExecutor).build();
    let connected = timeout(PATIENCE, client).await;
    Ok(connected.with_context(|| {
        format!("no Pulsar broker answers at {address}; `cargo lab up pulsar` starts one")
    })??)
}
