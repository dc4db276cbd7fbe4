//! The wrong worker loses orders and the broker does not know it. The right worker loses none.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::shared;

fn example(kafka: &Broker, args: &[&str]) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_pitfall_auto_commit"))
        .args(args)
        .broker(kafka)
        .spawn()
}

#[test]
fn auto_commit_loses_orders_silently_and_stored_offsets_do_not() -> Result<()> {
    let kafka = shared::kafka(&["kafka_pitfall_auto_commit"])?;
    // The second time, the topics hold the orders of the first.
    for run in 1..=2 {
        let ended = example(&kafka, &[])?.wait(Duration::from_secs(90))?.ok()?;
        let numbers = |way: &str| -> Result<Vec<u32>> {
            let mut lines = ended.stdout.lines();
            let line = lines.find_map(|line| line.strip_prefix(&format!("{way}: ")));
            let words = line.context("no result")?.split_whitespace();
            Ok(words.filter_map(|word| word.parse().ok()).collect())
        };
        let wrong = numbers("wrong")?;
        assert!(wrong[0] == 250 && wrong[1] > 0, "{}", ended.stdout);
        assert_eq!(wrong[2], 0, "{}", ended.stdout);
        let right = numbers("right")?;
        assert_eq!(right[..2], [250, 0], "{}", ended.stdout);
        assert!(right[2] > 0, "the crash hit nothing: {}", ended.stdout);

        // The broker sees no difference: both groups have no lag.
        for group in ["pitfall-auto-commit-wrong", "pitfall-auto-commit-right"] {
            let observer: BaseConsumer = ClientConfig::new()
                .set("bootstrap.servers", kafka.address())
                .set("group.id", group)
                .create()?;
            let mut list = TopicPartitionList::new();
            list.add_partition(group, 0);
            let list = observer.committed_offsets(list, Duration::from_secs(30))?;
            let committed = list.elements()[0].offset();
            assert_eq!(committed, Offset::Offset(run * 250), "{group}");
        }
    }
    Ok(())
}

/// The other worker is the second member: both run with the same settings, as two replicas of a service do.
#[tokio::test]
async fn a_second_member_that_joins_during_the_work_ends_no_worker_and_loses_no_order() -> Result<()>
{
    let kafka = shared::kafka(&["kafka_pitfall_auto_commit"])?;
    let topic = "pitfall-auto-commit-right";
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let sent = (0..500).map(|_| {
        let record = FutureRecord::<(), _>::to(topic).payload("order");
        producer.send(record.partition(0), TIMEOUT)
    });
    let sent = futures::future::try_join_all(sent).await;
    sent.map_err(|(error, _)| error)?;
    let mut first = example(&kafka, &[topic, "499"])?;
    first.wait_for("20", TIMEOUT)?;
    let mut second = example(&kafka, &[topic, "499"])?;
    let lost = first.wait_for("partition lost, order repeated", TIMEOUT)?;
    // One of them gets the partition and ends after the last order. The other waits.
    let (mut finisher, mut other) = loop {
        if first.try_wait()?.is_some() {
            break (first, second);
        }
        if second.try_wait()?.is_some() {
            break (second, first);
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    finisher.wait(TIMEOUT)?.ok()?;
    ensure!(other.try_wait()?.is_none(), "{lost}: both have ended");
    let lines = [finisher.lines(), other.lines()].concat();
    let handled: BTreeSet<u32> = lines.iter().flat_map(|line| line.parse()).collect();
    assert_eq!(handled, (0..500).collect(), "lost");
    assert!(!lines.iter().any(|line| line.contains("Fenced")));
    Ok(())
}
