//! Administer a topic so that every step can be repeated
//!
//! Creates a topic, describes it, alters its configuration, adds a partition, and deletes it. Each step is done twice,
//! because a program that sets things up is started again. If the topic exists already, or is gone already, that is a
//! success. Any other refusal ends the program with its reason.
//!
//! ```console
//! $ cargo lab run kafka_admin
//! create: done
//! create: TopicAlreadyExists [..]
//! describe: 2 partitions, retention.ms=3600000
//! alter max.message.bytes alone: 2 partitions, max.message.bytes=2000000
//! alter with all settings: 2 partitions, max.message.bytes=2000000, retention.ms=3600000
//! alter with all settings: 2 partitions, max.message.bytes=2000000, retention.ms=3600000
//! grow to 3 partitions: done
//! grow to 3 partitions: InvalidPartitions [..]
//! delete: done
//! delete: UnknownTopicOrPartition [..]
//! ```
//!
//! Notice:
//! - `alter_configs` replaces the whole configuration: a setting that is not in the request gets its default again.
//! - New partitions move the keys: later records of a key can go to another partition. Partitions cannot be removed.
//! - rdkafka 0.39 does not report that a broker refuses `describe_configs` or `alter_configs`: check the result.
//!
//! Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_offsets, kafka_lag_monitor.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rdkafka::ClientConfig;
use rdkafka::admin::{
    AdminClient, AdminOptions, AlterConfig, ConfigEntry, ConfigSource, NewPartitions, NewTopic,
    ResourceSpecifier, TopicReplication,
};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::RDKafkaErrorCode::{self, *};
use tokio::time::sleep;

const TOPIC: &str = "admin-demo";
const TIMEOUT: Duration = Duration::from_secs(5);

type Admin = AdminClient<DefaultClientContext>;
type Settings = BTreeMap<String, String>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    let admin: Admin = config.set("bootstrap.servers", &brokers).create()?;
    partitions(&admin).with_context(|| {
        format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one")
    })?;

    for _ in 0..2 {
        println!("create: {}", create(&admin).await?);
    }
    let settings = settings(&admin).await?;
    println!("describe: {}", describe(&admin).await?);

    let change = Settings::from([("max.message.bytes".into(), "2000000".into())]);
    alter(&admin, &change).await?;
    println!("alter max.message.bytes alone: {}", describe(&admin).await?);
    let all = settings.into_iter().chain(change).collect();
    for _ in 0..2 {
        alter(&admin, &all).await?;
        println!("alter with all settings: {}", describe(&admin).await?);
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
    let topic = NewTopic::new(TOPIC, 2, TopicReplication::Fixed(-1)).set("retention.ms", "3600000");
    let results = admin.create_topics([&topic], &options()).await?;
    // In production, topics are often created by another team: then it only has to exist.
    let fine = [TopicAlreadyExists, TopicAuthorizationFailed];
    let created = outcome(results, &fine)?;
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
    until("is gone", async || Ok(partitions(admin)? == 0)).await?;
    Ok(deleted)
}

/// Replaces all settings of the topic. Kafka has a request that changes only some; rdkafka 0.39 lacks it.
async fn alter(admin: &Admin, settings: &Settings) -> anyhow::Result<()> {
    let mut change = AlterConfig::new(ResourceSpecifier::Topic(TOPIC));
    for (name, value) in settings {
        change = change.set(name, value);
    }
    admin.alter_configs([&change], &options()).await?;
    until("is altered", async || {
        Ok(self::settings(admin).await? == *settings)
    })
    .await
}

/// The pattern: the error codes in `fine` say that there was nothing to do, so a step can be repeated.
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

/// Waits until the brokers show the change, which the controller has told them. It also shows a refusal that was not told.
async fn until(change: &str, shown: impl AsyncFn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while !shown().await? {
        let in_time = Instant::now() < deadline;
        ensure!(in_time, "no broker shows that {TOPIC} {change}");
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

async fn describe(admin: &Admin) -> anyhow::Result<String> {
    let mut text = format!("{} partitions", partitions(admin)?);
    for (name, value) in settings(admin).await? {
        text += &format!(", {name}={value}");
    }
    Ok(text)
}

/// The settings of this topic, without the defaults.
async fn settings(admin: &Admin) -> anyhow::Result<Settings> {
    let topic = [ResourceSpecifier::Topic(TOPIC)];
    let topics = admin.describe_configs(&topic, &options()).await?;
    let entries = topics.into_iter().flatten().flat_map(|topic| topic.entries);
    let entries: Vec<ConfigEntry> = entries.collect();
    // A topic always has entries. To write back an empty answer would reset all settings.
    let refused = entries.is_empty();
    ensure!(
        !refused,
        "cannot describe {TOPIC}: DescribeConfigs not permitted"
    );
    let own = entries
        .into_iter()
        .filter(|entry| entry.source == ConfigSource::DynamicTopic);
    Ok(own
        .filter_map(|entry| Some((entry.name, entry.value?)))
        .collect())
}

/// How many partitions the topic has; 0 if it does not exist.
fn partitions(admin: &Admin) -> anyhow::Result<usize> {
    // All topics: a question about one topic can create it.
    let metadata = admin.inner().fetch_metadata(None, TIMEOUT)?;
    let mut topics = metadata.topics().iter();
    let topic = topics.find(|topic| topic.name() == TOPIC);
    Ok(topic.map_or(0, |topic| topic.partitions().len()))
}

fn options() -> AdminOptions {
    let options = AdminOptions::new().request_timeout(Some(TIMEOUT));
    // The broker answers when it is done, and not when it has begun.
    options.operation_timeout(Some(TIMEOUT))
}
