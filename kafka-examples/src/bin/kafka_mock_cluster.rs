//! Test without Kafka: librdkafka's mock cluster as a separate program
//!
//! librdkafka has a small cluster for its own tests. Producers, consumer groups and transactions run on it within
//! milliseconds. It gives no guarantees: `read_committed` consumers see aborted transactions, all data is in memory,
//! and timestamps differ from a broker's. If a program works here, this proves nothing about its guarantees.
//!
//! ```console
//! $ cargo lab run kafka_mock_cluster
//! KAFKA_BROKERS=127.0.0.1:[..]
//! a mock of 3 brokers; Ctrl-C stops it and deletes its data
//! ^C
//! stopped
//! ```
//!
//! Notice: a producer creates topics, a consumer only with `allow.auto.create.topics`, and the admin API cannot.
//!
//! Try: keep it running. In a second terminal set KAFKA_BROKERS to the printed value and run kafka_async_producer.
//!
//! Settings: none. `LAB_BACKEND=mock cargo lab run NAME` runs an example on the mock; those that need more than the
//! mock has fail. See also: kafka_mock_test, which has the mock in unit tests and makes it return errors.

use anyhow::{Context, Result};
use rdkafka::mocking::MockCluster;
use tokio::signal::unix::{SignalKind, signal};

const BROKERS: i32 = 3;

#[tokio::main]
async fn main() -> Result<()> {
    // Install the handlers first, so that an early Ctrl-C or SIGTERM is not missed.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    // The pattern: a cluster inside this process. It ends when this value is dropped.
    let cluster = MockCluster::new(BROKERS).context("cannot start the mock cluster")?;
    println!("KAFKA_BROKERS={}", cluster.bootstrap_servers());
    println!("a mock of {BROKERS} brokers; Ctrl-C stops it and deletes its data");
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    drop(cluster);
    println!("stopped");
    Ok(())
}
