//! Test without Kafka: librdkafka's mock cluster, and what it cannot stand in for
//!
//! librdkafka carries a small cluster made for its own tests. It speaks enough of the protocol for producers, consumer
//! groups and transactions to run against it in milliseconds, and it can be told to fail on purpose. It guarantees
//! nothing: aborted transactions stay visible to `read_committed` consumers, everything is in memory, and timestamps
//! are not a broker's. What passes here has been tried, not proven.
//!
//! ```console
//! $ cargo lab run kafka_mock_cluster
//! KAFKA_BROKERS=127.0.0.1:[..]
//! a mock of 3 brokers; topics are created at first use; Ctrl-C ends it and all it holds
//! ^C
//! gone
//! ```
//!
//! Notice: topics cannot be created through the admin API, only by using them or, in a test, by
//! `MockCluster::create_topic`.
//!
//! Try: keep it running, and in a second terminal set KAFKA_BROKERS to what it printed and run
//! `kafka_async_producer`. In a test of your own, `cluster.broker_down(1)` and `cluster.request_errors(…)` make it fail.
//!
//! Settings: none. `LAB_BACKEND=mock cargo lab run NAME` puts it under any Kafka example. See also:
//! kafka_async_producer.

use anyhow::{Context, Result};
use rdkafka::mocking::MockCluster;
use tokio::signal::unix::{SignalKind, signal};

const BROKERS: i32 = 3;

#[tokio::main]
async fn main() -> Result<()> {
    // Listening starts here and not at the first await: a Ctrl-C right after the first line must not be missed.
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for Ctrl-C")?;
    // It lives as long as this value does.
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
