//! Pitfall: order exists only within a partition, so records without a key arrive out of order
//!
//! Sends the events of three users twice: without a key, and with the user as key. Then it counts the events that
//! arrive after a later event of the same user. With a key, all events of a user go to one partition and arrive in
//! order. Events of different users have no order.
//!
//! ```console
//! $ cargo lab run kafka_pitfall_ordering
//! without a key:
//!   alice: [..] of 40 events too late, partitions [..]
//!   bob: [..] of 40 events too late, partitions [..]
//!   carol: [..] of 40 events too late, partitions [..]
//! with the user as key:
//!   alice: 0 of 40 events too late, partitions {[..]}
//!   bob: 0 of 40 events too late, partitions {[..]}
//!   carol: 0 of 40 events too late, partitions {[..]}
//! ```
//!
//! Notice:
//! - Each event is confirmed before the next is sent, and the order is still lost.
//! - Without a key the client stays with one partition for `sticky.partitioning.linger.ms`, so a short test is in order.
//! - A consumer without lag often sees the right order. A consumer with lag reads partition by partition.
//!
//! Try: use the event as key. Create the topic with one partition: everything is in order.
//! Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_async_producer, kafka_parallel_consumer.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::Context;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

const TOPIC: &str = "pitfall-ordering";
const USERS: [&str; 3] = ["alice", "bob", "carol"];
const EVENTS: usize = 40;
const TIMEOUT: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers);
    let producer: FutureProducer = config
        .clone()
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "30000")
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(None, TIMEOUT);
    metadata.context(tip)?;
    for (title, keyed) in [("without a key", false), ("with the user as key", true)] {
        let sent = send(&producer, keyed).await?;
        // The name of a group is required, although this program joins no group.
        let consumer: BaseConsumer = config.set("group.id", TOPIC).create()?;
        println!("{title}:");
        receive(&consumer, sent)?;
    }
    Ok(())
}

/// The users take turns. Returns the first and the last offset in each partition.
async fn send(producer: &FutureProducer, keyed: bool) -> anyhow::Result<BTreeMap<i32, (i64, i64)>> {
    let mut sent = BTreeMap::new();
    for number in 0..EVENTS {
        for user in USERS {
            let event = format!("{user} {number}");
            let mut record = FutureRecord::<str, str>::to(TOPIC).payload(&event);
            record.key = keyed.then_some(user);
            let at = producer.send(record, TIMEOUT).await;
            let at = at.map_err(|(error, _)| error)?;
            let (_, last) = sent.entry(at.partition).or_insert((at.offset, at.offset));
            *last = at.offset;
        }
    }
    Ok(sent)
}

/// Receives the events after all were sent, like a restarted consumer, and counts the late ones.
fn receive(consumer: &BaseConsumer, mut sent: BTreeMap<i32, (i64, i64)>) -> anyhow::Result<()> {
    let mut start = TopicPartitionList::new();
    for (partition, (first, _)) in &sent {
        start.add_partition_offset(TOPIC, *partition, Offset::Offset(*first))?;
    }
    consumer.assign(&start)?;
    let mut users = BTreeMap::<String, (BTreeSet<i32>, usize, usize)>::new();
    while !sent.is_empty() {
        let record = match consumer.poll(TIMEOUT).context("an event is missing")? {
            Ok(record) => record,
            // Another address may answer.
            Err(KafkaError::MessageConsumption(AllBrokersDown | BrokerTransportFailure)) => {
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let (at, offset) = (record.partition(), record.offset());
        let event = String::from_utf8_lossy(record.payload().unwrap_or_default());
        if let Some((user, number)) = event.split_once(' ')
            && let Ok(number) = number.parse::<usize>()
        {
            let (partitions, latest, late) = users.entry(user.to_owned()).or_default();
            partitions.insert(at);
            *late += usize::from(number < *latest);
            *latest = number.max(*latest);
        }
        sent.retain(|partition, (_, last)| *partition != at || offset < *last);
    }
    for (user, (partitions, _, late)) in users {
        println!("  {user}: {late} of {EVENTS} events too late, partitions {partitions:?}");
    }
    Ok(())
}
