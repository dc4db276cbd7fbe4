//! Kafkas for the tests that leave the broker alone.

use std::sync::Arc;

use anyhow::Result;
use compose::harness::Pool;
use compose::workspace::ExampleInfo;
use compose::{Broker, Service};

static KAFKAS: Pool = Pool::new(Service::Kafka).owned_by(owner);

/// A Kafka on which none of these examples has run, and on which no other test will run them: their topics and groups
/// have fixed names, so two tests of one example need two Kafkas.
///
/// A test that breaks the broker, or counts all of its topics, has a private one.
pub fn kafka(examples: &[&str]) -> Result<Arc<Broker>> {
    KAFKAS.lend(examples)
}

/// Of examples that share a topic, the one that creates it.
fn owner(example: &str) -> &str {
    match example {
        "kafka_async_producer" => "kafka_consumer_group",
        "kafka_page_views" => "kafka_window_aggregation",
        "kafka_dlq_replay" => "kafka_retry_dlq",
        _ => example,
    }
}

/// For the transcript in the header of an example.
pub fn for_transcript(example: &ExampleInfo) -> Result<Vec<Arc<Broker>>> {
    // What these show is the whole broker.
    const ALONE: [&str; 3] = ["kafka_admin", "kafka_lag_monitor", "kafka_replay"];
    KAFKAS.for_transcript(example, &ALONE)
}
