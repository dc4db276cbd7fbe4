//! The table is the latest value of each key, before and after the broker has compacted the topic.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use compose::harness::{Example, Finished, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::ClientConfig;
use rdkafka::producer::{BaseRecord, FutureProducer, FutureRecord, Producer, ThreadedProducer};

use crate::administrator::{create_topic, tool};
use crate::reader;
use crate::shared;

const TOPIC: &str = "compacted-table.prices";

fn table(kafka: &Broker) -> Result<Finished> {
    let table = Example::new(env!("CARGO_BIN_EXE_kafka_compacted_table"));
    table.broker(kafka).spawn()?.wait(TIMEOUT)
}

/// Sends with `kafka_send`, as the header says.
fn feed<const N: usize>(kafka: &Broker, args: [&str; N]) -> Result<()> {
    let send = Example::new(env!("CARGO_BIN_EXE_kafka_send"));
    let mut send = send.args(args).broker(kafka).spawn()?;
    send.wait(TIMEOUT)?.ok()?;
    Ok(())
}

/// The table, and all that the program has printed.
fn read(kafka: &Broker) -> Result<(BTreeMap<String, u64>, Finished)> {
    let ended = table(kafka)?.ok()?;
    let mut prices = BTreeMap::new();
    for line in ended.stdout.lines() {
        if let Some((key, price)) = line.split_once(" = ") {
            prices.insert(key.to_owned(), price.parse()?);
        }
    }
    let summary = ended.stdout.lines().last().unwrap_or_default();
    let keys = format!("{} keys", prices.len());
    ensure!(summary.starts_with(&keys), "{}", ended.stdout);
    Ok((prices, ended))
}

fn prices<const N: usize>(prices: [(&str, u64); N]) -> BTreeMap<String, u64> {
    prices.map(|(key, price)| (key.to_owned(), price)).into()
}

#[tokio::test]
async fn compaction_keeps_the_latest_value_and_removes_older_ones() -> Result<()> {
    let kafka = shared::kafka(&["kafka_compacted_table"])?;
    let config = [
        ("cleanup.policy", "compact"),
        // A new segment after some seconds, compacted when a tenth of it is old.
        ("segment.ms", "5000"),
        ("min.cleanable.dirty.ratio", "0.1"),
    ];
    create_topic(&kafka, TOPIC, 1, &config).await?;
    feed(&kafka, ["-k", "apple", TOPIC, "1"])?;
    feed(&kafka, ["-k", "pear", TOPIC, "2"])?;
    feed(&kafka, ["-k", "pear", "-Z", TOPIC, ""])?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("enable.idempotence", "true")
        .create()?;
    let mut reports = Vec::new();
    for number in 0..20_000 {
        let (key, price) = (format!("key-{}", number % 10), number.to_string());
        let record = FutureRecord::to(TOPIC).key(&key).payload(&price);
        reports.push(producer.send_result(record).map_err(|(error, _)| error)?);
    }
    for report in reports {
        report.await?.map_err(|(error, _)| error)?;
    }
    let mut expected = prices([("apple", 1)]);
    expected.extend((0..10).map(|n| (format!("key-{n}"), 19_990 + n)));
    assert_eq!(read(&kafka)?.0, expected);
    assert_eq!(reader::read(&kafka, TOPIC, "read_committed")?.len(), 20_003);

    // The cleaner looks every 15 seconds, and only at closed segments: a write closes the segment before it.
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        ensure!(Instant::now() < deadline, "not compacted");
        feed(&kafka, ["-k", "apple", TOPIC, "1"])?;
        assert_eq!(read(&kafka)?.0, expected);
        if reader::read(&kafka, TOPIC, "read_committed")?.len() < 1_000 {
            return Ok(());
        }
    }
}

#[tokio::test]
async fn an_empty_value_is_not_a_tombstone_and_malformed_records_change_nothing() -> Result<()> {
    let kafka = shared::kafka(&["kafka_compacted_table"])?;
    create_topic(&kafka, TOPIC, 1, &[("cleanup.policy", "compact")]).await?;
    feed(&kafka, ["-k", "apple", TOPIC, "1"])?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("message.timeout.ms", "5000")
        .create()?;
    for payload in [&b""[..], b"\xff", b"-1", b"99999999999999999999999"] {
        let record = FutureRecord::to(TOPIC).key("apple").payload(payload);
        producer.send(record, TIMEOUT).await.map_err(|(e, _)| e)?;
    }
    let key = &b"\xff"[..];
    let record = FutureRecord::to(TOPIC).key(key).payload("1");
    producer.send(record, TIMEOUT).await.map_err(|(e, _)| e)?;
    let without_key = FutureRecord::<str, str>::to(TOPIC).payload("1");
    ensure!(
        producer.send(without_key, TIMEOUT).await.is_err(),
        "a record without a key is written"
    );

    let (found, ended) = read(&kafka)?;
    assert_eq!(found, prices([("apple", 1)]));
    let skipped = ended
        .stdout
        .lines()
        .filter(|line| line.contains(" skipped: "));
    assert_eq!(skipped.count(), 5);
    feed(&kafka, ["-k", "apple", TOPIC, "2"])?;
    assert_eq!(read(&kafka)?.0, prices([("apple", 2)]));
    feed(&kafka, ["-k", "apple", "-Z", TOPIC, ""])?;
    assert_eq!(read(&kafka)?.0, prices([]));
    Ok(())
}

/// The topic of the example has as many partitions as the broker makes. This one has more, and some are empty.
#[tokio::test]
async fn all_partitions_are_read_and_a_topic_without_compaction_is_reported() -> Result<()> {
    let kafka = shared::kafka(&["kafka_compacted_table"])?;
    create_topic(&kafka, TOPIC, 7, &[]).await?;
    for (partition, key) in ["a", "b", "c", "d", "e", "f"].into_iter().enumerate() {
        let partition = partition.to_string();
        feed(&kafka, ["-p", &partition, "-k", key, TOPIC, "1"])?;
    }
    let (found, ended) = read(&kafka)?;
    let expected = [("a", 1), ("b", 1), ("c", 1), ("d", 1), ("e", 1), ("f", 1)];
    assert_eq!(found, prices(expected));
    let warning = "cleanup.policy is Some(\"delete\"), not compact: ";
    ensure!(ended.stderr.contains(warning), "{}", ended.stderr);
    Ok(())
}

#[test]
fn the_example_creates_its_topic_with_compaction() -> Result<()> {
    let kafka = shared::kafka(&["kafka_compacted_table"])?;
    let (found, ended) = read(&kafka)?;
    assert_eq!(found, prices([]));
    assert_eq!(ended.stdout, "0 keys, the topic is new\n");
    feed(&kafka, ["-k", "apple", TOPIC, "1"])?;
    let (found, ended) = read(&kafka)?;
    assert_eq!(found, prices([("apple", 1)]));
    assert_eq!(ended.stderr, "");
    // Only a compacted topic refuses a record without a key.
    let send = Example::new(env!("CARGO_BIN_EXE_kafka_send")).args([TOPIC, "1"]);
    let refused = send.broker(&kafka).spawn()?.wait(TIMEOUT)?;
    assert_eq!(refused.code(), 1, "{}", refused.stdout);
    Ok(())
}

/// The last offset of a transaction is its marker, which is not a record.
#[test]
fn a_topic_that_ends_with_a_transaction_is_read_to_its_end() -> Result<()> {
    let kafka = shared::kafka(&["kafka_compacted_table"])?;
    table(&kafka)?.ok()?;
    let producer: ThreadedProducer<_> = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("transactional.id", "prices")
        .create()?;
    producer.init_transactions(TIMEOUT)?;
    for (price, is_committed) in [("1", true), ("2", false)] {
        producer.begin_transaction()?;
        let record = BaseRecord::to(TOPIC).key("apple").payload(price);
        producer.send(record).map_err(|(error, _)| error)?;
        if is_committed {
            producer.commit_transaction(TIMEOUT)?;
        } else {
            producer.flush(TIMEOUT)?;
            producer.abort_transaction(TIMEOUT)?;
        }
    }
    reader::await_markers(&kafka, TOPIC)?;
    assert_eq!(read(&kafka)?.0, prices([("apple", 1)]));
    Ok(())
}

#[test]
fn without_the_permission_to_create_an_existing_topic_is_used() -> Result<()> {
    let kafka = Broker::secure(Service::Kafka)?;
    let ended = table(&kafka)?;
    assert_eq!(ended.code(), 1);
    let reason = format!("Error: no topic {TOPIC}, or no permission");
    assert!(ended.stderr.contains(&reason), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("TopicAuthorizationFailed"),
        "{}",
        ended.stderr
    );

    let config = "cleanup.policy=compact";
    let create = ["--create", "--topic", TOPIC, "--config", config];
    tool(&kafka, "TopicCommand", &create)?;
    feed(&kafka, ["-k", "apple", TOPIC, "1"])?;
    let (found, ended) = read(&kafka)?;
    assert_eq!(found, prices([("apple", 1)]));
    let warned = |line: &str| line.contains("not created") && line.contains("AuthorizationFailed");
    assert!(ended.stderr.lines().any(warned), "{}", ended.stderr);
    Ok(())
}
