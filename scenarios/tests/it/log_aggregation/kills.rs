//! A log with odd bytes, and SIGKILL for everything that handles it.

use std::collections::HashMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use compose::{Broker, Service};
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use serde_json::json;

use compose::harness::chance;

use super::{ALONE, TIMEOUT, count, find, path, program, store};

const LINES: usize = 12_000;

/// What real logs are made of, and what nobody would expect in one.
fn line(number: usize, random: &mut fastrand::Rng) -> Vec<u8> {
    match number % 8 {
        0 | 1 => json!({ "time": format!("2026-03-0{}T10:00:00Z", 1 + number % 3), "level": "info", "msg": "m", "n": number })
            .to_string()
            .into_bytes(),
        2 | 3 => format!(r#"10.0.0.1 - - [02/Mar/2026:10:00:00 +0100] "GET /{number} HTTP/1.1" 404 12 "-" "agent""#)
            .into_bytes(),
        4 => [format!(r#"10.0.0.1 - - [02/Mar/2026:10:00:00 +0100] "GET /{number}"#).as_bytes(), b"\xff\xfe HTTP/1.1\" 200 12"].concat(),
        5 => (0..random.usize(0..60))
            .map(|_| random.u8(..))
            .filter(|byte| !b"\r\n".contains(byte))
            .collect(),
        6 => Vec::new(),
        _ => format!("\tat com.example.Shop.sell(Shop.java:{number})").into_bytes(),
    }
}

#[test]
fn every_line_is_one_document_whatever_is_killed() -> Result<()> {
    let _alone = ALONE.write();
    let mut random = chance()?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("odd.log");
    let mut lines: Vec<Vec<u8>> = (0..LINES).map(|number| line(number, &mut random)).collect();
    // A byte-order mark in the first line would be taken for that.
    lines[0] = b"{}".to_vec();
    // Longer than what Kafka takes by default.
    lines[100] = vec![b'x'; (1 << 20) - 1];
    std::fs::write(&file, lines.join(&b'\n'))?;
    let (store, index) = (store()?, "kills");
    let kafka = Broker::private(Service::Kafka)?;

    let ingest = || {
        program(
            &kafka,
            &store.address(),
            index,
            &["ingest", path(&file), "--produce-only"],
        )
        .spawn()
    };
    // Small batches, so that it is at work for seconds, and each kill falls into that.
    let aggregate = || {
        program(
            &kafka,
            &store.address(),
            index,
            &["aggregate", "--instance", "one", "--batch", "10"],
        )
        .spawn()
    };
    // Makes the topic, so that the first entry on it is seen at once.
    let audit = program(&kafka, &store.address(), index, &["audit"]);
    audit.spawn()?.wait(TIMEOUT)?;
    let topic = &Topic::new(&kafka.address())?;
    let stored = || count(index).unwrap_or_default();

    // Each of these falls into the work: after some of it was done, and before the end of it.
    for _ in 0..3 {
        let before = topic.committed();
        let mut killed = ingest()?;
        until(|| topic.committed() > before)?;
        killed.kill()?;
    }
    let before = topic.committed();
    assert!(
        before < LINES as u64,
        "all was ingested before it was killed"
    );
    let mut ingesting = ingest()?;
    until(|| topic.committed() > before)?;
    kafka.kill(1)?;
    kafka.restart(1)?;
    let ingested = ingesting.wait(TIMEOUT)?.ok()?;
    assert!(
        ingested
            .stdout
            .contains(&format!("{LINES} lines, {LINES} entries")),
        "{}",
        ingested.stdout
    );

    for _ in 0..3 {
        let before = stored();
        let mut aggregating = aggregate()?;
        until(|| stored() > before)?;
        aggregating.kill()?;
    }
    // Kafka, in the middle of what the aggregator does.
    let before = stored();
    assert!(before < LINES as u64, "all was stored before it was killed");
    let mut aggregating = aggregate()?;
    until(|| stored() > before)?;
    kafka.kill(1)?;
    kafka.restart(1)?;
    let audit = || {
        program(
            &kafka,
            &store.address(),
            index,
            &["audit", "--timeout", "120"],
        )
        .spawn()?
        .wait(TIMEOUT)?
        .ok()
    };
    audit()?;

    // The store goes away, with more to do for it. The member stays in its group, and goes on.
    let more = ["--entries", "3000", "--seed", "7", "--produce-only"];
    let before = await_member(&kafka.address())?;
    store.kill(1)?;
    program(&kafka, &store.address(), index, &more)
        .spawn()?
        .wait(TIMEOUT)?
        .ok()?;
    aggregating.wait_for("partitions paused", TIMEOUT)?;
    assert_eq!(await_member(&kafka.address())?, before);
    store.restart(1)?;
    aggregating.wait_for("partitions resumed", TIMEOUT)?;
    audit()?;
    assert_eq!(await_member(&kafka.address())?, before);
    aggregating.terminate()?;
    aggregating.wait(TIMEOUT)?.ok()?;

    // Every line, and its very bytes.
    assert_eq!(count(index)?, LINES as u64 + 3000);
    let mut found = HashMap::new();
    for from in (1..=LINES).step_by(6000) {
        let to = from + 5999;
        for hit in find(index, &format!("ingested.line:[{from} TO {to}]"))? {
            let number = hit["_source"]["ingested"]["line"]
                .as_u64()
                .context("line")?;
            let twice = found.insert(number as usize - 1, hit["_source"].clone());
            ensure!(twice.is_none(), "line {number} twice");
        }
    }
    for (number, line) in lines.iter().enumerate() {
        let document = found
            .get(&number)
            .with_context(|| format!("line {} is lost", number + 1))?;
        let kept = match document["ingested"]["raw_base64"].as_str() {
            Some(raw) => BASE64.decode(raw)?,
            None if document["level"] == "UNPARSED" => {
                document["message"].as_str().context("message")?.into()
            }
            None if document["ingested"]["format"] == "json" => {
                ensure!(document["fields"]["n"] == number, "{document}");
                line.clone()
            }
            None => {
                let request = document["http"]["request"].as_str().context("request")?;
                ensure!(request == format!("GET /{number} HTTP/1.1"), "{document}");
                line.clone()
            }
        };
        ensure!(kept == *line, "line {} is {document}", number + 1);
    }
    Ok(())
}

fn until(mut done: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while !done() {
        ensure!(Instant::now() < deadline, "nothing was done");
    }
    Ok(())
}

/// The topic of the logs, which has six partitions.
struct Topic(BaseConsumer);

impl Topic {
    fn new(brokers: &str) -> Result<Topic> {
        let client = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .create()?;
        Ok(Topic(client))
    }

    /// How many records are committed, and ends of transactions, which are few; 0 if there is no topic yet.
    fn committed(&self) -> u64 {
        let end = |partition| self.0.fetch_watermarks("kills", partition, TIMEOUT);
        (0..6)
            .filter_map(|partition| end(partition).ok())
            .map(|(_, end)| end.unsigned_abs())
            .sum()
    }
}

/// The name that the broker has given to the group's only member.
fn await_member(brokers: &str) -> Result<String> {
    let client: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        // Right after its restart the broker may not know its groups yet.
        if let Ok(groups) = client.fetch_group_list(Some("log-aggregation-kills"), TIMEOUT)
            && let [group] = groups.groups()
            && let [member] = group.members()
            && group.state() == "Stable"
        {
            return Ok(member.id().to_owned());
        }
        ensure!(Instant::now() < deadline, "the group has no member");
        thread::sleep(Duration::from_millis(100));
    }
}
