//! A reader that shares no code with the examples.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use compose::Broker;
use compose::harness::TIMEOUT;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{Headers, Message, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

/// Sends 3,000,000 bytes that are small when the broker sees them, and returns them. Its limit of a megabyte is for
/// what is compressed.
pub async fn send_large(kafka: &Broker, topic: &str) -> Result<Vec<u8>> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("message.max.bytes", "4000000")
        .set("compression.type", "lz4")
        .create()?;
    let payload = vec![0xff; 3_000_000];
    let record = FutureRecord::<[u8], [u8]>::to(topic)
        .partition(0)
        .payload(&payload);
    let sent = producer.send(record, TIMEOUT).await;
    sent.map_err(|(error, _)| error)?;
    Ok(payload)
}

/// The offset that the group has committed for each partition of the topic, asked of the broker.
pub fn positions(kafka: &Broker, group: &str, topic: &str) -> Result<BTreeMap<i32, Option<i64>>> {
    let observer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", group)
        .create()?;
    let asked = partitions(&observer, topic)?;
    let deadline = Instant::now() + TIMEOUT;
    let list = loop {
        match observer.committed_offsets(asked.clone(), TIMEOUT) {
            Ok(list) => break list,
            // A broker that has just started looks for the group's coordinator first.
            Err(error) => ensure!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let elements = list.elements();
    let positions = elements
        .iter()
        .map(|at| (at.partition(), position(at.offset())));
    Ok(positions.collect())
}

fn partitions(client: &BaseConsumer, topic: &str) -> Result<TopicPartitionList> {
    let metadata = client.fetch_metadata(Some(topic), TIMEOUT)?;
    let mut all = TopicPartitionList::new();
    for partition in metadata.topics()[0].partitions() {
        all.add_partition(topic, partition.id());
    }
    Ok(all)
}

fn position(offset: Offset) -> Option<i64> {
    match offset {
        Offset::Offset(next) => Some(next),
        _ => None,
    }
}

/// How many records the group of this client has not committed. Fails while the broker starts.
pub fn left(judge: &BaseConsumer, topic: &str) -> Result<i64> {
    let committed = judge.committed_offsets(partitions(judge, topic)?, TIMEOUT)?;
    let mut left = 0;
    for at in committed.elements() {
        let (_, end) = judge.fetch_watermarks(topic, at.partition(), TIMEOUT)?;
        left += end - position(at.offset()).unwrap_or(0);
    }
    Ok(left)
}

/// As [`positions`], with 0 where the group has committed nothing.
pub fn committed(kafka: &Broker, group: &str, topic: &str) -> Result<BTreeMap<i32, i64>> {
    let positions = positions(kafka, group, topic)?.into_iter();
    Ok(positions
        .map(|(partition, next)| (partition, next.unwrap_or(0)))
        .collect())
}

/// All that a reader with this isolation sees, in the order of each partition.
pub fn read(kafka: &Broker, topic: &str, isolation: &str) -> Result<Vec<OwnedMessage>> {
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "reader")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("isolation.level", isolation)
        .create()?;
    let mut all = partitions(&reader, topic)?;
    all.set_all_offsets(Offset::Beginning)?;
    reader.assign(&all)?;
    let (mut records, mut ends) = (Vec::new(), BTreeSet::new());
    let deadline = Instant::now() + TIMEOUT;
    while ends.len() < all.count() {
        ensure!(Instant::now() < deadline, "cannot read {topic} to its end");
        match reader.poll(Duration::from_secs(1)) {
            Some(Ok(record)) => records.push(record.detach()),
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                ends.insert(partition);
            }
            Some(Err(error)) => return Err(error.into()),
            None => {}
        }
    }
    Ok(records)
}

/// Waits until no transaction on the topic is open.
///
/// A commit is answered when it is decided. Its markers are written after that, and until they are, a reader of what is
/// committed comes to an end before it.
pub fn await_markers(kafka: &Broker, topic: &str) -> Result<()> {
    let reader = |isolation: &str| -> Result<BaseConsumer> {
        Ok(ClientConfig::new()
            .set("bootstrap.servers", kafka.address())
            .set("isolation.level", isolation)
            .create()?)
    };
    let (committed, all) = (reader("read_committed")?, reader("read_uncommitted")?);
    let metadata = all.fetch_metadata(Some(topic), TIMEOUT)?;
    let deadline = Instant::now() + TIMEOUT;
    for partition in metadata.topics()[0].partitions() {
        let end = |reader: &BaseConsumer| reader.fetch_watermarks(topic, partition.id(), TIMEOUT);
        while end(&committed)? != end(&all)? {
            ensure!(
                Instant::now() < deadline,
                "a transaction is open on {topic}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(())
}

/// The first header with this name, as text.
pub fn header(record: &OwnedMessage, name: &str) -> Option<String> {
    let header = record.headers()?.iter().find(|header| header.key == name)?;
    Some(String::from_utf8_lossy(header.value?).into_owned())
}
