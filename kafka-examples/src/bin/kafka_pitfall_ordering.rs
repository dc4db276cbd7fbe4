//! Pitfall: order exists only within a partition, so records without a key arrive out of order
//!
//! Sends the events of three users to a topic with three partitions, once without a key and once with the user as key,
//! and counts what a consumer receives in the wrong order. With a key, one user's events share a partition and arrive
//! in the order in which they were sent. Nothing orders the events of different users.
//!
//! ```console
//! $ cargo lab run kafka_pitfall_ordering
//! without a key:
//!   alice: 40 events on partitions [..], [..] of 780 pairs out of order
//!   bob: 40 events on partitions [..], [..] of 780 pairs out of order
//!   carol: 40 events on partitions [..], [..] of 780 pairs out of order
//! with the user as key:
//!   alice: 40 events on partitions {[..]}, 0 of 780 pairs out of order
//!   bob: 40 events on partitions {[..]}, 0 of 780 pairs out of order
//!   carol: 40 events on partitions {[..]}, 0 of 780 pairs out of order
//! ```
//!
//! Notice: a pair is out of order if the later event arrived first: a payment before its order, for example. Without a
//! key the client picks a partition at random and stays with it for `sticky.partitioning.linger.ms`, 10 by default. So a
//! burst can look ordered in a test, and a consumer that always keeps up can look ordered, too, until it has to catch up:
//! then it reads partition by partition. Every event here was confirmed before the next was sent; that does not help.
//!
//! Try: key by event instead of by user. Create the topic with one partition: all is in order, and nothing is shared.
//! Beyond the key, two more things break order: a retry that overtakes (`enable.idempotence` prevents it), and a
//! consumer that works on several records at once (see kafka_parallel_consumer).
//!
//! Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_async_producer, kafka_parallel_consumer.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use tokio::time::{sleep, timeout};

const TOPIC: &str = "pitfall-ordering";
const PARTITIONS: i32 = 3;
const USERS: [&str; 3] = ["alice", "bob", "carol"];
const EVENTS: usize = 40;
const PATIENCE: Duration = Duration::from_secs(5);

/// What a user's events looked like when they arrived: partition and number of each.
type Arrivals = BTreeMap<String, Vec<(i32, usize)>>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    create_topic(&brokers).await?;
    for (title, keyed) in [("without a key", false), ("with the user as key", true)] {
        let (consumer, ends) = reader(&brokers).await?;
        let sent = send(&brokers, keyed).await?;
        // Only now: the events have piled up, as they do whenever a consumer is slow, or restarts.
        consumer.assign(&ends)?;
        println!("{title}:");
        report(&receive(&consumer, sent).await?);
    }
    Ok(())
}

/// A consumer, and where the partitions end before this run: earlier runs have left their events there.
async fn reader(brokers: &str) -> anyhow::Result<(StreamConsumer, TopicPartitionList)> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // The client wants a name, but without `subscribe` and commits it is no group.
        .set("group.id", "pitfall-ordering")
        .set("enable.auto.commit", "false")
        .create()?;
    let mut ends = TopicPartitionList::new();
    let deadline = Instant::now() + PATIENCE;
    for partition in 0..PARTITIONS {
        let end = loop {
            match consumer.fetch_watermarks(TOPIC, partition, PATIENCE) {
                Ok((_, end)) => break end,
                // A topic can be created before its leaders know that they are. Nothing tells when they do.
                Err(_) if Instant::now() < deadline => sleep(Duration::from_millis(50)).await,
                Err(error) => bail!("{TOPIC}, partition {partition}: {error}"),
            }
        };
        ends.add_partition_offset(TOPIC, partition, Offset::Offset(end))?;
    }
    Ok((consumer, ends))
}

/// The users take turns, and each event is confirmed before the next is sent. Returns the last offsets.
async fn send(brokers: &str, keyed: bool) -> anyhow::Result<BTreeMap<i32, i64>> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .set("partitioner", "murmur2_random")
        .create()?;
    let mut last = BTreeMap::new();
    for number in 0..EVENTS {
        for user in USERS {
            let event = format!("{user} {number}");
            let mut record = FutureRecord::<str, str>::to(TOPIC).payload(&event);
            if keyed {
                record = record.key(user);
            }
            let sent = producer.send(record, PATIENCE).await;
            let sent = sent
                .map_err(|(error, _)| error)
                .with_context(|| format!("{event}: no delivery report from {brokers}"))?;
            last.insert(sent.partition, sent.offset);
        }
    }
    Ok(last)
}

/// Receives up to the given offsets, in the order in which the client hands the records out.
async fn receive(
    consumer: &StreamConsumer,
    mut last: BTreeMap<i32, i64>,
) -> anyhow::Result<Arrivals> {
    let mut arrivals = Arrivals::new();
    while !last.is_empty() {
        let received = timeout(Duration::from_secs(30), consumer.recv()).await;
        match received.context("events that were confirmed do not arrive")? {
            Ok(record) => {
                let payload = String::from_utf8_lossy(record.payload().unwrap_or_default());
                if let Some((user, number)) = payload.split_once(' ')
                    && let Ok(number) = number.parse()
                {
                    let arrived = (record.partition(), number);
                    arrivals.entry(user.to_owned()).or_default().push(arrived);
                }
                if last
                    .get(&record.partition())
                    .is_some_and(|last| record.offset() >= *last)
                {
                    last.remove(&record.partition());
                }
            }
            Err(error @ KafkaError::MessageConsumptionFatal(_)) => bail!(error),
            Err(error) => eprintln!("waiting for the broker: {error}"),
        }
    }
    Ok(arrivals)
}

fn report(arrivals: &Arrivals) {
    for (user, events) in arrivals {
        let partitions: BTreeSet<i32> = events.iter().map(|(partition, _)| *partition).collect();
        let pairs = events.len() * (events.len() - 1) / 2;
        let wrong: usize = events
            .iter()
            .enumerate()
            .map(|(at, (_, number))| {
                events[at..]
                    .iter()
                    .filter(|(_, later)| later < number)
                    .count()
            })
            .sum();
        println!(
            "  {user}: {} events on partitions {partitions:?}, {wrong} of {pairs} pairs out of order",
            events.len()
        );
    }
}

/// Left to the broker, the topic would often have a single partition, and the pitfall would not show.
async fn create_topic(brokers: &str) -> anyhow::Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    // It blocks, but nothing else runs yet.
    admin
        .inner()
        .fetch_metadata(None, PATIENCE)
        .with_context(|| {
            format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one")
        })?;
    // -1 is the broker's default replication factor.
    let topic = NewTopic::new(TOPIC, PARTITIONS, TopicReplication::Fixed(-1));
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin.create_topics([&topic], &options).await {
        Ok(results) => {
            for result in results {
                match result {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                    Err((topic, code)) => bail!("cannot create topic {topic}: {code}"),
                }
            }
        }
        // Not every cluster lets its clients create topics; librdkafka's mock does not.
        Err(error) => eprintln!("leaving topic {TOPIC} to the broker: {error}"),
    }
    Ok(())
}
