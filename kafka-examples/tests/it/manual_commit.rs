//! The position never passes an order that is neither processed nor in the dead-letter topic.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Result;
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use crate::reader::send_large;
use crate::shared;

type Bytes<'a> = Option<&'a [u8]>;

fn example(kafka: &Broker, args: &[&str]) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_manual_commit"))
        .args(args)
        .broker(kafka)
        .spawn()
}

/// Creates the topics, too.
fn send(kafka: &Broker, orders: &[&str]) -> Result<()> {
    let args: Vec<&str> = ["send"].iter().chain(orders).copied().collect();
    example(kafka, &args)?.wait(TIMEOUT)?.ok()?;
    Ok(())
}

fn client(kafka: &Broker) -> Result<BaseConsumer> {
    Ok(ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "reliable-processor")
        .set("enable.auto.commit", "false")
        .create()?)
}

/// The group's positions, asked of the broker; -1 where it has none.
fn committed(kafka: &Broker) -> Result<Vec<i64>> {
    let mut list = TopicPartitionList::new();
    list.add_partition_range("reliable-orders", 0, 1);
    let list = client(kafka)?.committed_offsets(list, TIMEOUT)?;
    let position = |offset| match offset {
        Offset::Offset(next) => next,
        _ => -1,
    };
    Ok(list
        .elements()
        .iter()
        .map(|at| position(at.offset()))
        .collect())
}

fn dead_letters(kafka: &Broker) -> Result<Vec<OwnedMessage>> {
    let reader = client(kafka)?;
    let mut at = TopicPartitionList::new();
    at.add_partition_offset("reliable-orders.dlq", 0, Offset::Beginning)?;
    reader.assign(&at)?;
    let (_, end) = reader.fetch_watermarks("reliable-orders.dlq", 0, TIMEOUT)?;
    let mut found = Vec::new();
    for _ in 0..30 {
        if found.len() >= usize::try_from(end)? {
            break;
        }
        if let Some(record) = reader.poll(Duration::from_secs(1)) {
            found.push(record?.detach());
        }
    }
    Ok(found)
}

fn header(record: &OwnedMessage, name: &str) -> Option<String> {
    let headers = record.headers()?;
    let header = headers.iter().find(|header| header.key == name)?;
    Some(String::from_utf8_lossy(header.value?).into_owned())
}

#[tokio::test]
async fn whatever_is_no_order_ends_in_the_dead_letter_topic_as_it_was() -> Result<()> {
    let kafka = shared::kafka(&["kafka_manual_commit"])?;
    send(&kafka, &["order-0"])?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("message.max.bytes", "2000000")
        .create()?;
    // The largest that a broker takes by default: 1,048,588 bytes with all that surrounds it.
    let huge = [b"invalid".as_slice(), &vec![b'x'; 1_048_400]].concat();
    let bad: [(Bytes<'_>, Bytes<'_>); 4] = [
        (None, None),
        (Some(b""), Some(b"")),
        (Some(b"\xff\xfe"), Some(b"\xc3\x28")),
        (Some(b"k"), Some(&huge)),
    ];
    for (key, payload) in bad {
        let record = FutureRecord::<[u8], [u8]> {
            key,
            payload,
            ..FutureRecord::to("reliable-orders").partition(0)
        };
        producer
            .send(record, TIMEOUT)
            .await
            .map_err(|(error, _)| error)?;
    }
    let large = send_large(&kafka, "reliable-orders").await?;
    send(&kafka, &["order-6"])?;

    let mut consumer = example(&kafka, &[])?;
    consumer.wait_for("partition 0 offset 6: committed 7", TIMEOUT)?;
    consumer.interrupt()?;
    consumer.wait(TIMEOUT)?.ok()?;
    assert_eq!(committed(&kafka)?[0], 7);
    let buried = dead_letters(&kafka)?;
    let bad: Vec<_> = bad.into_iter().chain([(None, Some(&large[..]))]).collect();
    assert_eq!(buried.len(), bad.len());
    for (at, (record, (key, payload))) in (1..).zip(buried.iter().zip(bad)) {
        assert!(
            record.key() == key && record.payload() == payload,
            "offset {at} was changed"
        );
        assert_eq!(header(record, "topic").as_deref(), Some("reliable-orders"));
        assert_eq!(header(record, "partition").as_deref(), Some("0"));
        assert_eq!(header(record, "offset"), Some(at.to_string()));
        assert!(header(record, "reason").is_some_and(|reason| !reason.is_empty()));
    }
    Ok(())
}

#[test]
fn with_stop_no_later_commit_skips_the_poison_order() -> Result<()> {
    let kafka = shared::kafka(&["kafka_manual_commit"])?;
    // In turn to the partitions 0 and 1.
    send(&kafka, &["a-0", "b-0", "invalid", "b-1", "a-2", "b-2"])?;
    for _ in 0..2 {
        let mut consumer = example(&kafka, &["--stop"])?;
        consumer.wait_for("offset 1: invalid failed", TIMEOUT)?;
        // New work for the other partition, and more behind the poison.
        send(&kafka, &["a-n", "b-n"])?;
        consumer.wait_for("b-n processed", TIMEOUT)?;
        consumer.wait_for("committed", TIMEOUT)?;
        assert!(
            !consumer.lines().iter().any(|line| line.contains(": a-2")),
            "{:?}",
            consumer.lines()
        );
        consumer.interrupt()?;
        consumer.wait(TIMEOUT)?.ok()?;
        assert_eq!(committed(&kafka)?[0], 1);
    }
    assert_eq!(committed(&kafka)?, [1, 5]);
    assert_eq!(dead_letters(&kafka)?.len(), 0);

    let mut consumer = example(&kafka, &[])?;
    consumer.wait_for("partition 0 offset 4: committed 5", TIMEOUT)?;
    consumer.interrupt()?;
    consumer.wait(TIMEOUT)?.ok()?;
    assert_eq!(committed(&kafka)?, [5, 5]);
    assert_eq!(dead_letters(&kafka)?.len(), 1);
    Ok(())
}

#[tokio::test]
async fn after_sigkill_nothing_is_missing_and_at_most_one_order_is_repeated() -> Result<()> {
    let kafka = shared::kafka(&["kafka_manual_commit"])?;
    let orders: Vec<String> = (0..1000).map(|number| format!("order-{number}")).collect();
    send(&kafka, &[])?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let sent = orders.iter().zip(0..).map(|(order, number)| {
        let record = FutureRecord::<(), _>::to("reliable-orders")
            .partition(number % 2)
            .payload(order);
        producer.send(record, TIMEOUT)
    });
    futures::future::try_join_all(sent)
        .await
        .map_err(|(error, _)| error)?;
    let mut first = example(&kafka, &[])?;
    for _ in 0..20 {
        first.wait_for(" processed", TIMEOUT)?;
    }
    first.kill()?;
    first.wait(TIMEOUT)?;
    let processed = |lines: Vec<String>| -> Vec<String> {
        let order = |line: &String| {
            Some(
                line.split_once(": ")?
                    .1
                    .split_once(" processed")?
                    .0
                    .to_owned(),
            )
        };
        lines.iter().filter_map(order).collect()
    };
    let before = processed(first.lines());
    let positions = committed(&kafka)?;
    assert!(before.len() < orders.len(), "the kill came too late");

    let mut second = example(&kafka, &[])?;
    for _ in 0..2 {
        second.wait_for("committed 500", TIMEOUT)?;
    }
    second.interrupt()?;
    second.wait(TIMEOUT)?.ok()?;
    let after = processed(second.lines());
    let all: BTreeSet<&String> = before.iter().chain(&after).collect();
    assert_eq!(all.len(), orders.len(), "lost");
    let start = |partition: usize| usize::try_from(positions[partition].max(0));
    let expected = orders.len() - start(0)? - start(1)?;
    assert_eq!(
        after.len(),
        expected,
        "reading goes on where it was committed"
    );
    assert!(before.len() + after.len() <= orders.len() + 1);
    assert_eq!(committed(&kafka)?, [500, 500]);
    Ok(())
}
