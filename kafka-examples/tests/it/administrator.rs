//! What an administrator does for an example: with the client, and on a secured broker with Kafka's own tools.

use anyhow::{Result, ensure};
use compose::harness::{TIMEOUT, kafka_tool};
use compose::{Broker, User};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;

/// A client on the listener without TLS.
pub fn admin(kafka: &Broker) -> Result<AdminClient<DefaultClientContext>> {
    let mut config = ClientConfig::new();
    Ok(config.set("bootstrap.servers", kafka.address()).create()?)
}

/// Creates a topic with as many copies as the broker makes by default: one on each node.
pub async fn create_topic(
    kafka: &Broker,
    name: &str,
    partitions: i32,
    settings: &[(&str, &str)],
) -> Result<()> {
    let mut topic = NewTopic::new(name, partitions, TopicReplication::Fixed(-1));
    for (setting, value) in settings {
        topic = topic.set(setting, value);
    }
    let options = AdminOptions::new().operation_timeout(Some(TIMEOUT));
    let created = admin(kafka)?.create_topics([&topic], &options).await?;
    ensure!(created.iter().all(Result::is_ok), "{created:?}");
    Ok(())
}

/// Runs one of Kafka's own tools on a secured broker, such as `TopicCommand`, and requires that it succeeds.
pub fn tool(kafka: &Broker, class: &str, args: &[&str]) -> Result<()> {
    let administrator = kafka.secured_env(User::Administrator)?;
    let administrator = administrator.into_iter().collect();
    let class = format!("org.apache.kafka.tools.{class}");
    let output = kafka_tool(kafka, &class, &administrator)?
        .args(args)
        .output()?;
    ensure!(output.status.success(), "{args:?}: {output:?}");
    Ok(())
}
