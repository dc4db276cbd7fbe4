//! Administer a topic so that every step can be repeated
//!
//! Creates a topic, adds a partition, and deletes the topic. Each step is done twice, because a set-up program runs
//! more than once. If there is nothing to do, for example because the topic already exists, the step succeeds. Every
//! other error ends the program.
//!
//! ```console
//! $ cargo lab run kafka_admin
//! create: done
//! create: TopicAlreadyExists [..]
//! grow to 3 partitions: done
//! grow to 3 partitions: InvalidPartitions [..]
//! delete: done
//! delete: UnknownTopicOrPartition [..]
//! ```
//!
//! Notice:
//! - After partitions are added, later records of a key can go to another partition. Partitions cannot be removed.
//! - A program that may not create topics accepts a topic that somebody else has created.
//! - An existing topic keeps its settings and its partitions. Compare them where they matter: kafka_topic_config.
//!
//! Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_topic_config, kafka_offsets.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::RDKafkaErrorCode::{self, *};
use tokio::time::sleep;

const TOPIC: &str = "admin-demo";
const TIMEOUT: Duration = Duration::from_secs(5);

type Admin = AdminClient<DefaultClientContext>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    let admin: Admin = config.set("bootstrap.servers", &brokers).create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    partitions(&admin).context(tip)?;
    for _ in 0..2 {
        println!("create: {}", create(&admin).await?);
    }
    for _ in 0..2 {
        println!("grow to 3 partitions: {}", grow(&admin, 3).await?);
    }
    for _ in 0..2 {
        println!("delete: {}", delete(&admin).await?);
    }
    Ok(())
}

async fn create(admin: &Admin) -> anyhow::Result<String> {
    // -1 is the broker's default replication factor.
    let topic = NewTopic::new(TOPIC, 2, TopicReplication::Fixed(-1));
    let results = admin.create_topics([&topic], &options()).await?;
    let created = outcome(results, &[TopicAlreadyExists, TopicAuthorizationFailed])?;
    let exists = until("exists", async || Ok(partitions(admin)? > 0)).await;
    exists.with_context(|| format!("create: {created}"))?;
    Ok(created)
}

async fn grow(admin: &Admin, count: usize) -> anyhow::Result<String> {
    let more = NewPartitions::new(TOPIC, count);
    let results = admin.create_partitions([&more], &options()).await?;
    let grown = outcome(results, &[InvalidPartitions])?;
    until("has grown", async || Ok(partitions(admin)? >= count)).await?;
    Ok(grown)
}

async fn delete(admin: &Admin) -> anyhow::Result<String> {
    let results = admin.delete_topics(&[TOPIC], &options()).await?;
    let deleted = outcome(results, &[UnknownTopicOrPartition])?;
    until("is deleted", async || Ok(partitions(admin)? == 0)).await?;
    Ok(deleted)
}

/// The pattern: the error codes in `fine` can mean that the work is done already. `until` then checks that this is true.
fn outcome<T, N>(
    results: Vec<Result<T, (N, RDKafkaErrorCode)>>,
    fine: &[RDKafkaErrorCode],
) -> anyhow::Result<String> {
    match results.into_iter().next().context("no answer")? {
        Ok(_) => Ok("done".into()),
        Err((_, code)) if fine.contains(&code) => Ok(code.to_string()),
        Err((_, code)) => bail!("{TOPIC}: {code}"),
    }
}

/// Waits until the broker's metadata shows the change. The answer can be a moment earlier.
async fn until(change: &str, shown: impl AsyncFn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while !shown().await? {
        let in_time = Instant::now() < deadline;
        ensure!(in_time, "the broker does not show that {TOPIC} {change}");
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// How many partitions the topic has; 0 if it does not exist.
fn partitions(admin: &Admin) -> anyhow::Result<usize> {
    // Ask for all topics: a request for one topic can create it.
    let metadata = admin.inner().fetch_metadata(None, TIMEOUT)?;
    let mut topics = metadata.topics().iter();
    let topic = topics.find(|topic| topic.name() == TOPIC);
    Ok(topic.map_or(0, |topic| topic.partitions().len()))
}

fn options() -> AdminOptions {
    let options = AdminOptions::new().request_timeout(Some(TIMEOUT));
    // Lets the broker finish the work before it answers.
    options.operation_timeout(Some(TIMEOUT))
}
