//! Change one setting of a topic without losing the others
//!
//! A change with `alter_configs` replaces all settings of the topic: a setting that is not in the request returns to
//! its default. The program first makes this mistake. Then it reads the settings, changes one, and writes back all.
//!
//! ```console
//! $ cargo lab run kafka_topic_config
//! before: {"retention.ms": "3600000"}
//! max.message.bytes alone: {"max.message.bytes": "2000000"}
//! with all settings: {"max.message.bytes": "2000000", "retention.ms": "3600000"}
//! ```
//!
//! Notice:
//! - Two programs that do this at the same time can overwrite each other's change. Kafka has a request that changes
//!   only some settings (`kafka-configs.sh --alter` sends it), but rdkafka 0.39 cannot send it.
//! - rdkafka 0.39 does not report that a broker refuses `describe_configs` or `alter_configs`: check the result.
//!
//! Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_admin.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rdkafka::ClientConfig;
use rdkafka::admin::{
    AdminClient, AdminOptions, AlterConfig, ConfigEntry, ConfigSource, NewTopic, ResourceSpecifier,
    TopicReplication,
};
use rdkafka::client::DefaultClientContext;
use tokio::time::sleep;

const TOPIC: &str = "topic-config-demo";
const TIMEOUT: Duration = Duration::from_secs(5);

type Admin = AdminClient<DefaultClientContext>;
type Settings = BTreeMap<String, String>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    let admin: Admin = config.set("bootstrap.servers", &brokers).create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let topic = NewTopic::new(TOPIC, 1, TopicReplication::Fixed(-1)).set("retention.ms", "3600000");
    let created = admin.create_topics([&topic], &options()).await;
    if let Some(Err((_, code))) = created.context(tip)?.first() {
        // Fine if the topic exists. It keeps its settings.
        eprintln!("not created: {code}");
    }

    let before = settings(&admin).await?;
    println!("before: {before:?}");
    let change = Settings::from([("max.message.bytes".into(), "2000000".into())]);
    alter(&admin, &change).await?;
    println!("max.message.bytes alone: {:?}", settings(&admin).await?);
    // The pattern: write back all settings, with the change among them.
    let all = before.into_iter().chain(change).collect();
    alter(&admin, &all).await?;
    println!("with all settings: {:?}", settings(&admin).await?);
    Ok(())
}

/// The settings of this topic, without the defaults.
async fn settings(admin: &Admin) -> anyhow::Result<Settings> {
    let topic = [ResourceSpecifier::Topic(TOPIC)];
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let topics = admin.describe_configs(&topic, &options()).await?;
        let entries = topics.into_iter().flatten().flat_map(|topic| topic.entries);
        let entries: Vec<_> = entries.collect();
        // A topic always has entries. To write back an empty answer would reset all settings.
        if !entries.is_empty() {
            let is_own = |entry: &ConfigEntry| entry.source == ConfigSource::DynamicTopic;
            let own = entries.into_iter().filter(is_own);
            return Ok(own
                .filter_map(|entry| Some((entry.name, entry.value?)))
                .collect());
        }
        let in_time = Instant::now() < deadline;
        ensure!(in_time, "cannot describe {TOPIC}: is it permitted?");
        sleep(Duration::from_millis(50)).await;
    }
}

/// Replaces all settings of the topic, and waits until they are the new ones.
async fn alter(admin: &Admin, new: &Settings) -> anyhow::Result<()> {
    let mut change = AlterConfig::new(ResourceSpecifier::Topic(TOPIC));
    for (name, value) in new {
        change = change.set(name, value);
    }
    admin.alter_configs([&change], &options()).await?;
    let deadline = Instant::now() + TIMEOUT;
    while settings(admin).await? != *new {
        let in_time = Instant::now() < deadline;
        ensure!(in_time, "{TOPIC} is not altered: is it permitted?");
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

fn options() -> AdminOptions {
    let options = AdminOptions::new().request_timeout(Some(TIMEOUT));
    // Lets the broker create the topic before it answers. It does not help with settings: `alter` waits for them.
    options.operation_timeout(Some(TIMEOUT))
}
