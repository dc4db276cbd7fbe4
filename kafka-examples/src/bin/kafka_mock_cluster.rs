//! Test without Kafka: librdkafka's mock cluster as a program of its own
//!
//! librdkafka has a small cluster for its own tests. Producers, consumer groups and transactions run on it within
//! milliseconds. It guarantees nothing: aborted transactions stay visible to `read_committed` consumers, everything is in
//! memory, and timestamps are not those of a broker. A program that works here was tried, but its guarantees were not.
//! kafka_mock_test has the same mock inside of a unit test, where it can be told to fail.
//!
//! ```console
//! $ cargo lab run kafka_mock_cluster
//! KAFKA_BROKERS=127.0.0.1:[..]
//! a mock of 3 brokers; topics are created at first use; Ctrl-C ends it and all it holds
//! ^C
//! gone
//! ```
//!
//! Notice: the admin API cannot create topics. A topic is created when it is used.
//!
//! Try: keep it running. In a second terminal set KAFKA_BROKERS to the printed value and run kafka_async_producer.
//!
//! Settings: none. `LAB_BACKEND=mock cargo lab run NAME` runs any Kafka example on it. See also: kafka_mock_test.

use anyhow::{Context, Result};
use rdkafka::mocking::MockCluster;
use tokio::signal::unix::{SignalKind, signal};

const BROKERS: i32 = 3;

#[tokio::main]
async fn main() -> Result<()> {
    // The handler is installed here and not at the first await, so that an early Ctrl-C is not missed.
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for Ctrl-C")?;
    // The cluster ends when this value is dropped.
    let cluster = MockCluster::new(BROKERS).context("cannot start the mock cluster")?;
    println!("KAFKA_BROKERS={}", cluster.bootstrap_servers());
    println!(
        "a mock of {BROKERS} brokers; topics are created at first use; Ctrl-C ends it and all it holds"
    );

    interrupt.recv().await;
    drop(cluster);
    println!("gone");
    Ok(())
}
