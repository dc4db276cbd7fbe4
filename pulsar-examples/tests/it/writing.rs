//! Producing: every order is stored, in the entries and in the partition that the examples say.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use compose::harness::Example;

use crate::support::{TIMEOUT, backlog, run, shared, start, stats, stop, topic, until};

const BATCH: &str = env!("CARGO_BIN_EXE_pulsar_batch_producer");
const PARTITIONED: &str = env!("CARGO_BIN_EXE_pulsar_partitioned_topic");

#[tokio::test(flavor = "multi_thread")]
async fn every_way_stores_every_order_and_batches_are_fewer_entries() -> Result<()> {
    let broker = shared()?;
    let producer = Example::new(BATCH).broker(broker).env("ORDERS", "2345");
    let printed = producer.spawn()?.wait(TIMEOUT)?.ok()?.stdout;
    let mut entries = Vec::new();
    let mut bytes = Vec::new();
    for (number, line) in printed.lines().skip(1).enumerate() {
        let stored = stats(broker, &topic(&format!("batch-orders-{number}"))).await?;
        let expected = if number == 0 { 200 } else { 2345 };
        assert_eq!(stored["msgInCounter"], expected, "{line}");
        let mut fields = line.rsplit(", ");
        let mut field = || -> Result<f64> {
            let text = fields.next().and_then(|field| field.split(' ').next());
            Ok(text.context("no such field")?.parse()?)
        };
        bytes.push(field()?);
        entries.push(field()?);
    }
    assert_eq!(entries[..2], [200.0, 2345.0]);
    // A batch may be sent early by its timeout, never late.
    assert!(entries[2] >= 24.0 && entries[2] < 1200.0, "{printed}");
    assert!(entries[3] >= 3.0 && entries[3] < 1200.0, "{printed}");
    // 64 KB are 64 orders. With a hundred in flight, no batch has more.
    assert!(entries[4] >= 35.0 && entries[4] < 1200.0, "{printed}");
    for few in [5, 6] {
        assert!(entries[few] >= 23.0 && entries[few] < 1200.0, "{printed}");
    }
    assert!(
        bytes[0] > 1000.0 && bytes[7] < bytes[3] / 2.0 && bytes[8] < bytes[3] / 2.0,
        "{printed}"
    );
    Ok(())
}

/// The partitions that Java's `hashCode` gives, masked to be positive, modulo 3.
const AS_IN_JAVA: [&str; 6] = ["1", "2", "0", "1", "2", "0"];

#[tokio::test(flavor = "multi_thread")]
async fn keys_go_where_java_sends_them_and_two_consumers_share_the_partitions() -> Result<()> {
    let broker = shared()?;
    let mut anna = start(PARTITIONED, broker, &["anna"])?;
    let mut ben = start(PARTITIONED, broker, &["ben"])?;
    anna.wait_for("subscribed to 3 partitions", TIMEOUT)?;
    ben.wait_for("subscribed to 3 partitions", TIMEOUT)?;
    let partition = |number: u32| topic(&format!("partitioned-orders-partition-{number}"));
    until("both are active", async || {
        let mut active = BTreeSet::new();
        for number in 0..3 {
            let stats = stats(broker, &partition(number)).await?;
            let name = &stats["subscriptions"]["partitioned-worker"]["activeConsumerName"];
            active.insert(name.as_str().context("none")?.to_owned());
        }
        Ok(active.len() == 2)
    })
    .await?;
    run(PARTITIONED, broker, &["send", "120"])?;
    let all_done = async || {
        let mut left = 0;
        for number in 0..3 {
            left += backlog(broker, &partition(number), "partitioned-worker").await?;
        }
        Ok(left == 0)
    };
    until("all are acknowledged", all_done).await?;
    anna.kill()?;
    run(PARTITIONED, broker, &["send", "120"])?;
    let done = until("all are acknowledged by one", all_done).await;
    done.with_context(|| format!("ben: {:?}", ben.lines()))?;
    stop(&mut ben)?;

    let mut orders: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    let mut sharers = BTreeSet::new();
    let lines = [anna.lines(), ben.lines()].concat();
    for line in &lines {
        let fields: Vec<&str> = line.split(' ').collect();
        let [name, "partition", partition, user, order] = fields[..] else {
            continue;
        };
        let number: usize = user.trim_start_matches("user-").parse()?;
        assert_eq!(
            partition.trim_end_matches(':'),
            AS_IN_JAVA[number],
            "{line}"
        );
        sharers.insert(name);
        orders
            .entry(user.to_owned())
            .or_default()
            .push(order.trim_start_matches("order-").parse()?);
    }
    assert_eq!(sharers.len(), 2, "{lines:#?}");
    for (user, numbers) in orders {
        let once: Vec<u32> = (1..=120)
            .filter(|number| user == format!("user-{}", number % 6))
            .collect();
        assert_eq!(numbers, [once.clone(), once].concat(), "{user}");
    }
    Ok(())
}
