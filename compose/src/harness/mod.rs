//! What the tests of the examples are made of: running a program under observation, breaking things under it, and
//! comparing a header's transcript with what happens.
//!
//! The transcripts of a whole package are tests with one line of code, see [`transcripts()`]. A test of a guarantee goes
//! like this:
//!
//! ```no_run
//! use std::time::Duration;
//! use compose::{Broker, Service, harness::Example};
//!
//! # fn main() -> anyhow::Result<()> {
//! # let binary = "target/debug/kafka_manual_commit";  // in a test: env!("CARGO_BIN_EXE_kafka_manual_commit")
//! let broker = Broker::private(Service::Kafka)?;
//! let limit = Duration::from_secs(30);
//! let mut consumer = Example::new(binary).broker(&broker).spawn()?;
//! consumer.wait_for("order-1 processed", limit)?;
//! consumer.kill()?;
//! let mut consumer = Example::new(binary).broker(&broker).spawn()?;
//! consumer.wait_for("order-1 processed", limit)?;
//! consumer.interrupt()?;
//! consumer.wait(limit)?.ok()?;
//! # Ok(())
//! # }
//! ```

mod checks;
mod example;
mod kafka_record;
mod kafka_tool;
mod pool;
pub(crate) mod proxy;
pub mod transcript;
mod transcripts;

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result};

pub use crate::probe::http_get;
pub use crate::workspace::{ExampleInfo, Workspace};
pub use checks::{Call, broker_absent, closed_pipe, names, without_broker};
pub use example::{Example, Finished, Running, handles};
pub use kafka_record::produce_kafka_record;
pub use kafka_tool::kafka_tool;
pub use pool::Pool;
pub use proxy::{Direction, Proxy};
pub use transcripts::{private_brokers, transcripts};

/// The same variables but for one, which has another value, or is missing.
pub fn but(
    env: &HashMap<String, String>,
    name: &str,
    value: Option<&str>,
) -> HashMap<String, String> {
    let mut env = env.clone();
    match value {
        Some(value) => env.insert(name.to_owned(), value.to_owned()),
        None => env.remove(name),
    };
    env
}

/// A limit for what a test waits for and nothing depends on: it only bounds how long a failure takes.
///
/// Not for a test of how long something takes at most; that has a limit of its own.
pub const TIMEOUT: Duration = Duration::from_secs(180);

/// Chance for a test that breaks things at any moment. `TEST_SEED` in the environment repeats what a failed run has
/// printed.
///
/// # Errors
/// `TEST_SEED` is not a number.
pub fn chance() -> Result<fastrand::Rng> {
    let seed = match std::env::var("TEST_SEED") {
        Ok(seed) => seed.parse().context("TEST_SEED is a whole number")?,
        Err(_) => fastrand::u64(..),
    };
    println!("the same again: TEST_SEED={seed}");
    Ok(fastrand::Rng::with_seed(seed))
}
