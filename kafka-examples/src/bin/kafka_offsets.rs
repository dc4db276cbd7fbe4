//! Show the offsets of a group, move them while the group is stopped, and delete records
//!
//! A committed offset is the next record that the group reads. Moving it makes the group read records again, or skip
//! them. The broker refuses the move while the group has members, so no consumer overwrites it.
//!
//! ```console
//! $ cargo lab run kafka_send -p 0 offsets-demo a b c d
//! ...
//! $ cargo lab run kafka_offsets offsets-group offsets-demo beginning
//! ...
//! partition 0: records [0, 4), committed 0, lag 4
//! ...
//! $ cargo lab run kafka_offsets offsets-group offsets-demo delete 0 2
//! ...
//! partition 0: records [2, 4), committed 0, expired: auto.offset.reset decides where a consumer starts
//! ...
//! $ cargo lab run kafka_offsets offsets-group offsets-demo end
//! ...
//! partition 0: records [2, 4), committed 4, lag 0
//! ...
//! ```
//!
//! Notice:
//! - An offset expires when its record is deleted, and when the group was empty for offsets.retention.minutes (7 days).
//! - A consumer without a valid offset starts at `auto.offset.reset`: `latest` (the default) skips what it has not read.
//! - A time is turned into the first record that is not older. If all are older, that is the end.
//!
//! Try: start a consumer of the group, and move its offsets. `delete 0 end` empties partition 0.
//!
//! Usage: kafka_offsets GROUP TOPIC [beginning | end | TIME | delete PARTITION OFFSET]. TIME is like
//! 2026-01-01T12:00:00Z. Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: kafka_replay, kafka_lag_monitor.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use chrono::DateTime;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::RDKafkaErrorCode::{RebalanceInProgress, UnknownMemberId};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing_subscriber::EnvFilter;

const USAGE: &str = "usage: kafka_offsets GROUP TOPIC [beginning | end | 2026-01-01T12:00:00Z | delete PARTITION OFFSET|end]";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (group, topic, action) = match args[..] {
        [group, topic] => (group, topic, Action::Show),
        [group, topic, to] => (group, topic, Action::Move(target(to)?)),
        [group, topic, "delete", partition, before] => {
            let partition = partition.parse().context(USAGE)?;
            (group, topic, Action::Delete(partition, offset(before)?))
        }
        _ => bail!(USAGE),
    };
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers).set("group.id", group);
    // This client asks and commits in the name of the group. It does not join it.
    let client: BaseConsumer = config.create()?;
    let metadata = client.fetch_metadata(Some(topic), TIMEOUT).with_context(|| {
        format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one")
    })?;
    let mut partitions = TopicPartitionList::new();
    for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
        partitions.add_partition(topic, partition.id());
    }
    ensure!(partitions.count() > 0, "there is no topic {topic}");

    match action {
        Action::Show => {}
        Action::Move(to) => move_to(client, &partitions, to).await?,
        Action::Delete(partition, before) => delete(&config, topic, partition, before).await?,
    }
    show(&client, &partitions)
}
