//! The position never passes an order that is neither processed nor in the dead-letter topic.

use std::collections::BTreeSet;

use anyhow::Result;
use compose::harness::{Example, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::admin::{AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::message::{Header, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message};

use crate::administrator::{admin, create_topic, tool};
use crate::reader::{committed, header, read, send_large};
use crate::shared;

const TOPIC: &str = "reliable-orders";
const GROUP: &str = "reliable-processor";

type Bytes<'a> = Option<&'a [u8]>;

fn consumer(kafka: &Broker) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_manual_commit"))
        .broker(kafka)
        .spawn()
}

/// Writes the orders to one partition. The first creates the topic.
fn send(kafka: &Broker, partition: &str, orders: &[&str]) -> Result<()> {
    Example::new(env!("CARGO_BIN_EXE_kafka_send"))
        .args(["-p", partition, TOPIC])
        .args(orders)
        .broker(kafka)
        .spawn()?
        .wait(TIMEOUT)?
        .ok()?;
    Ok(())
}

/// Ends the consumer. Its close sends the commits that are left.
fn stop(consumer: &mut Running) -> Result<()> {
    consumer.terminate()?;
    consumer.wait(TIMEOUT)?.ok()?;
    Ok(())
}

fn dead_letters(kafka: &Broker) -> Result<Vec<OwnedMessage>> {
    let mut letters = read(kafka, "reliable-orders.dlq", "read_committed")?;
    letters.sort_by_key(|letter| header(letter, "origin"));
    Ok(letters)
}

/// Key, payload and headers stay as they were.
#[tokio::test]
async fn malformed_orders_are_dead_lettered_unchanged() -> Result<()> {
    let kafka = shared::kafka(&["kafka_manual_commit"])?;
    send(&kafka, "0", &["order-0"])?;
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
            ..FutureRecord::to(TOPIC).partition(0)
        };
        let trace = Header {
            key: "trace",
            value: Some("7"),
        };
        let record = record.headers(OwnedHeaders::new().insert(trace));
        let sent = producer.send(record, TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
    }
    let large = send_large(&kafka, TOPIC).await?;
    send(&kafka, "0", &["order-6"])?;

    let mut consumer = consumer(&kafka)?;
    consumer.wait_for("offset 6: order-6 processed", TIMEOUT)?;
    stop(&mut consumer)?;
    assert_eq!(committed(&kafka, GROUP, TOPIC)?[&0], 7);
    let letters = dead_letters(&kafka)?;
    let bad: Vec<_> = bad.into_iter().chain([(None, Some(&large[..]))]).collect();
    assert_eq!(letters.len(), bad.len());
    for (at, (letter, (key, payload))) in (1..).zip(letters.iter().zip(bad)) {
        let same = letter.key() == key && letter.payload() == payload;
        assert!(same, "offset {at} was changed");
        let trace = (at < 5).then_some("7");
        assert_eq!(header(letter, "trace").as_deref(), trace);
        let origin = format!("reliable-orders/0/{at}");
        assert_eq!(header(letter, "origin"), Some(origin));
        assert!(header(letter, "reason").is_some_and(|reason| !reason.is_empty()));
    }
    Ok(())
}

/// Each dead letter is too large for its topic, so the position stays before the order that failed.
#[tokio::test]
async fn without_a_dead_letter_the_position_does_not_pass_the_order() -> Result<()> {
    let kafka = shared::kafka(&["kafka_manual_commit"])?;
    let limit = [("max.message.bytes", "50")];
    create_topic(&kafka, "reliable-orders.dlq", 1, &limit).await?;
    send(&kafka, "0", &["order-0", "invalid-1", "order-2"])?;
    for _ in 0..2 {
        let ended = consumer(&kafka)?.wait(TIMEOUT)?;
        assert_eq!(ended.code(), 1);
        assert!(!ended.stdout.contains("order-2"), "{}", ended.stdout);
        let said = "cannot dead-letter reliable-orders/0/1; a restart repeats it";
        assert!(ended.stderr.contains(said), "{}", ended.stderr);
        assert!(ended.stderr.contains("MessageSizeTooLarge"));
        assert_eq!(committed(&kafka, GROUP, TOPIC)?[&0], 1);
    }
    let topic = ResourceSpecifier::Topic("reliable-orders.dlq");
    let larger = AlterConfig::new(topic).set("max.message.bytes", "5000");
    let altered = admin(&kafka)?
        .alter_configs([&larger], &AdminOptions::new())
        .await?;
    assert!(altered.iter().all(Result::is_ok), "{altered:?}");
    let mut consumer = consumer(&kafka)?;
    consumer.wait_for("offset 1: dead-lettered: invalid", TIMEOUT)?;
    consumer.wait_for("order-2 processed", TIMEOUT)?;
    stop(&mut consumer)?;
    assert_eq!(committed(&kafka, GROUP, TOPIC)?[&0], 3);
    assert_eq!(dead_letters(&kafka)?.len(), 1);
    Ok(())
}

/// READ, WRITE and DESCRIBE are enough where somebody else creates the topics. Where nobody has, the reason is told.
#[tokio::test]
async fn no_permission_to_create_is_needed() -> Result<()> {
    let kafka = Broker::secure(Service::Kafka)?;
    let ended = consumer(&kafka)?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    assert!(
        ended.stderr.contains("TopicAuthorizationFailed"),
        "{}",
        ended.stderr
    );

    for topic in [TOPIC, "reliable-orders.dlq"] {
        let create = ["--create", "--partitions", "5", "--topic", topic];
        tool(&kafka, "TopicCommand", &create)?;
    }
    let mut consumer = consumer(&kafka)?;
    send(&kafka, "4", &["invalid-0", "order-1"])?;
    consumer.wait_for("partition 4 offset 0: dead-lettered", TIMEOUT)?;
    consumer.wait_for("order-1 processed", TIMEOUT)?;
    stop(&mut consumer)
}

#[tokio::test]
async fn after_sigkill_no_order_is_lost() -> Result<()> {
    let kafka = shared::kafka(&["kafka_manual_commit"])?;
    // So many that the first consumer has not read all of them when it is killed.
    let orders: Vec<String> = (0..5000).map(|number| format!("order-{number}")).collect();
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let sent = orders.iter().zip(0..).map(|(order, number)| {
        let record = FutureRecord::<(), _>::to(TOPIC);
        producer.send(record.partition(number % 2).payload(order), TIMEOUT)
    });
    let sent = futures::future::try_join_all(sent).await;
    sent.map_err(|(error, _)| error)?;
    let mut first = consumer(&kafka)?;
    for _ in 0..20 {
        first.wait_for(" processed", TIMEOUT)?;
    }
    first.kill()?;
    first.wait(TIMEOUT)?;
    let processed = |lines: Vec<String>| -> Vec<String> {
        let order = |line: &String| {
            let (_, order) = line.split_once(": ")?;
            Some(order.strip_suffix(" processed")?.to_owned())
        };
        lines.iter().filter_map(order).collect()
    };
    let before = processed(first.lines());
    let positions = committed(&kafka, GROUP, TOPIC)?;
    assert!(before.len() < orders.len(), "the kill came too late");

    let mut second = consumer(&kafka)?;
    for _ in 0..2 {
        second.wait_for(" offset 2499: ", TIMEOUT)?;
    }
    stop(&mut second)?;
    let after = processed(second.lines());
    let all: BTreeSet<&String> = before.iter().chain(&after).collect();
    assert_eq!(all.len(), orders.len(), "lost");
    // The second has read on from the positions, not from the beginning. A commit that was on its way at the kill can
    // have arrived after the positions were read.
    let start = |partition| usize::try_from(positions[&partition]);
    let left = orders.len() - start(0)? - start(1)?;
    assert!(after.len() <= left, "{} instead of {left}", after.len());
    let ends = committed(&kafka, GROUP, TOPIC)?;
    assert_eq!([ends[&0], ends[&1]], [2500, 2500]);
    Ok(())
}
