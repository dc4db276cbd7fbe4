//! Administer Kafka topics and groups so that every step can be repeated
//!
//! Creates a topic, describes it, alters its configuration, adds a partition, looks at a group, and deletes both. Each
//! step is done twice: a program that sets things up will be started again, and by two people at once. What is there
//! already, or gone already, is success; any other error is one.
//!
//! ```console
//! $ cargo lab run kafka_admin
//! cluster [..] with 1 broker(s)
//! create topic: done
//! create topic: there already
//! partitions: 2, set: retention.ms=3600000
//! alter max.message.bytes only: set: max.message.bytes=2000000
//! alter, with what was set before: set: max.message.bytes=2000000, retention.ms=3600000
//! alter, with what was set before: set: max.message.bytes=2000000, retention.ms=3600000
//! grow to 3 partitions: done
//! grow to 3 partitions: has them already
//! group admin-demo-group: Empty, 0 member(s), committed: partition 0 at 0
//! delete group: done
//! delete group: not there
//! delete topic: done
//! delete topic: not there
//! ```
//!
//! Notice: `alter_configs` replaces the whole configuration of a topic. What it is not told goes back to the default:
//! the second line about the configuration has lost the retention time. So read, change, write; nothing guards against
//! someone else who does so at the same moment. (Kafka has an incremental request; version 0.39 of the crate lacks it.)
//! And what was altered is not at once what is described: a broker may still answer with the old configuration.
//!
//! Notice too: adding partitions moves the keys. Records of a key that were in one partition go on in another. And there
//! is no way back: partitions are never removed.
//!
//! Try: start a consumer of group `admin-demo-group` on this topic and delete the group: a group with members refuses.
//!
//! Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_replay, kafka_lag_monitor.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rdkafka::admin::{
    AdminClient, AdminOptions, AlterConfig, ConfigSource, NewPartitions, NewTopic,
    ResourceSpecifier, TopicReplication,
};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tokio::time::sleep;

const TOPIC: &str = "admin-demo";
const GROUP: &str = "admin-demo-group";
const PATIENCE: Duration = Duration::from_secs(5);

struct Admin {
    client: AdminClient<DefaultClientContext>,
    options: AdminOptions,
}

#[tokio::main]
async fn main() -> Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers);
    let admin = Admin {
        client: config.create()?,
        // Until the topic is there on all brokers, and not only decided. The default answers at once.
        options: AdminOptions::new()
            .request_timeout(Some(PATIENCE))
            .operation_timeout(Some(PATIENCE)),
    };
    // This client is a producer inside: asked about one topic that is not there, it may create it. All is safe.
    let cluster = admin.client.inner().fetch_metadata(None, PATIENCE);
    let cluster = cluster.with_context(|| {
        format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one")
    })?;
    let id = admin.client.inner().fetch_cluster_id(PATIENCE);
    let id = id.unwrap_or_else(|| "without an id".into());
    println!("cluster {id} with {} broker(s)", cluster.brokers().len());

    for _ in 0..2 {
        println!("create topic: {}", admin.create().await?);
    }
    let partitions = admin.await_partitions(1..).await?;
    let set = admin.settings().await?;
    println!("partitions: {partitions}, set: {}", shown(&set));

    let change = ("max.message.bytes", "2000000");
    admin.replace_settings(&BTreeMap::from([change])).await?;
    let lossy = admin.settings().await?;
    println!("alter {} only: set: {}", change.0, shown(&lossy));
    // The right way, from what was there before.
    for _ in 0..2 {
        let mut all: BTreeMap<&str, &str> =
            set.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        all.insert(change.0, change.1);
        admin.replace_settings(&all).await?;
        let set = admin.settings().await?;
        println!("alter, with what was set before: set: {}", shown(&set));
    }

    for _ in 0..2 {
        println!("grow to 3 partitions: {}", admin.grow(3).await?);
        admin.await_partitions(3..).await?;
    }

    config.set("group.id", GROUP);
    let member: BaseConsumer = config.create()?;
    let mut position = TopicPartitionList::new();
    position.add_partition_offset(TOPIC, 0, Offset::Offset(0))?;
    // A group comes into being with its first member or, as here, with its first commit.
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = member.commit(&position, CommitMode::Sync) {
        // A broker that has just started takes over its groups first.
        let passing = matches!(
            error.rdkafka_error_code(),
            Some(RDKafkaErrorCode::NotCoordinator | RDKafkaErrorCode::CoordinatorLoadInProgress)
        );
        if !passing || Instant::now() > deadline {
            return Err(error).with_context(|| format!("{GROUP} refuses the commit"));
        }
        sleep(Duration::from_millis(100)).await;
    }
    admin.describe_group(&member)?;
    drop(member);
    for _ in 0..2 {
        println!("delete group: {}", admin.delete_group().await?);
    }

    println!("delete topic: {}", admin.delete().await?);
    admin.await_partitions(..1).await?;
    println!("delete topic: {}", admin.delete().await?);
    Ok(())
}

impl Admin {
    async fn create(&self) -> Result<&'static str> {
        // -1 is the broker's default replication factor.
        let topic =
            NewTopic::new(TOPIC, 2, TopicReplication::Fixed(-1)).set("retention.ms", "3600000");
        // The outer error is about the request, the inner one about this topic.
        let results = self.client.create_topics([&topic], &self.options).await?;
        match results.into_iter().next().context("no answer")? {
            Ok(_) => Ok("done"),
            Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => Ok("there already"),
            Err((_, code)) => bail!("cannot create topic {TOPIC}: {code}"),
        }
    }

    async fn delete(&self) -> Result<&'static str> {
        let results = self.client.delete_topics(&[TOPIC], &self.options).await?;
        match results.into_iter().next().context("no answer")? {
            Ok(_) => Ok("done"),
            Err((_, RDKafkaErrorCode::UnknownTopicOrPartition)) => Ok("not there"),
            Err((_, code)) => bail!("cannot delete topic {TOPIC}: {code}"),
        }
    }

    async fn grow(&self, count: usize) -> Result<&'static str> {
        let partitions = NewPartitions::new(TOPIC, count);
        let results = self.client.create_partitions([&partitions], &self.options);
        match results.await?.into_iter().next().context("no answer")? {
            Ok(_) => Ok("done"),
            // The same code stands for more than one error; what is true is in the metadata.
            Err((_, RDKafkaErrorCode::InvalidPartitions)) if self.partitions()? >= count => {
                Ok("has them already")
            }
            Err((_, code)) => bail!("cannot add partitions to {TOPIC}: {code}"),
        }
    }

    /// What was set for this topic, without the defaults and what the broker's own configuration says.
    async fn settings(&self) -> Result<BTreeMap<String, String>> {
        let topic = [ResourceSpecifier::Topic(TOPIC)];
        let results = self.client.describe_configs(&topic, &self.options).await?;
        let described = results.into_iter().next().context("no answer")?;
        let described =
            described.map_err(|code| anyhow::anyhow!("cannot describe {TOPIC}: {code}"))?;
        Ok(described
            .entries
            .into_iter()
            .filter(|entry| entry.source == ConfigSource::DynamicTopic)
            .filter_map(|entry| Some((entry.name, entry.value?)))
            .collect())
    }

    async fn replace_settings(&self, settings: &BTreeMap<&str, &str>) -> Result<()> {
        let mut change = AlterConfig::new(ResourceSpecifier::Topic(TOPIC));
        for (name, value) in settings {
            change = change.set(name, value);
        }
        let results = self.client.alter_configs([&change], &self.options).await?;
        match results.into_iter().next().context("no answer")? {
            Ok(_) => {}
            Err((_, code)) => bail!("cannot configure {TOPIC}: {code}"),
        }
        // What is written is not at once what is read: brokers learn of the change after it was accepted.
        let deadline = Instant::now() + PATIENCE;
        while !self
            .settings()
            .await?
            .iter()
            .map(text)
            .eq(settings.iter().map(text))
        {
            ensure!(
                Instant::now() < deadline,
                "{TOPIC} has not changed after {PATIENCE:?}"
            );
            sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    fn describe_group(&self, member: &BaseConsumer) -> Result<()> {
        let groups = self
            .client
            .inner()
            .fetch_group_list(Some(GROUP), PATIENCE)?;
        let group = groups.groups().first().context("no such group")?;
        let mut asked = TopicPartitionList::new();
        asked.add_partition_range(TOPIC, 0, 2);
        let committed = member.committed_offsets(asked, PATIENCE)?;
        let positions: Vec<String> = committed
            .elements()
            .iter()
            .filter_map(|entry| match entry.offset() {
                Offset::Offset(next) => Some(format!("partition {} at {next}", entry.partition())),
                _ => None, // never committed
            })
            .collect();
        let (state, members) = (group.state(), group.members().len());
        println!(
            "group {GROUP}: {state}, {members} member(s), committed: {}",
            positions.join(", ")
        );
        Ok(())
    }

    async fn delete_group(&self) -> Result<&'static str> {
        let results = self.client.delete_groups(&[GROUP], &self.options).await?;
        match results.into_iter().next().context("no answer")? {
            Ok(_) => Ok("done"),
            Err((_, RDKafkaErrorCode::GroupIdNotFound)) => Ok("not there"),
            Err((_, code)) => bail!("cannot delete group {GROUP}: {code}"),
        }
    }

    /// How many partitions the topic has; 0 if there is no such topic.
    fn partitions(&self) -> Result<usize> {
        let metadata = self.client.inner().fetch_metadata(None, PATIENCE)?;
        let mut topics = metadata.topics().iter();
        let topic = topics.find(|topic| topic.name() == TOPIC);
        Ok(topic.map_or(0, |topic| topic.partitions().len()))
    }

    /// The controller decides, and the brokers hear of it a little later; there is nothing that tells when.
    async fn await_partitions(&self, wanted: impl std::ops::RangeBounds<usize>) -> Result<usize> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let count = self.partitions()?;
            if wanted.contains(&count) {
                return Ok(count);
            }
            ensure!(
                Instant::now() < deadline,
                "{TOPIC} still has {count} partitions after {PATIENCE:?}"
            );
            sleep(Duration::from_millis(50)).await;
        }
    }
}

fn shown(settings: &BTreeMap<String, String>) -> String {
    settings.iter().map(text).collect::<Vec<_>>().join(", ")
}

fn text((name, value): (impl Display, impl Display)) -> String {
    format!("{name}={value}")
}
