//! Brokers for the tests that leave them alone, and chance that can be repeated.

use std::sync::Arc;

use anyhow::{Context, Result};
use compose::harness::Pool;
use compose::workspace::ExampleInfo;
use compose::{Broker, Service};

static KAFKAS: Pool = Pool::new(Service::Kafka);

/// A Kafka on which nobody uses these names, whatever they name.
pub fn kafka(names: &[&str]) -> Result<Arc<Broker>> {
    KAFKAS.lend(names)
}

/// For the transcript in the header of a scenario. Kafka is the one that several of them need.
pub fn for_transcript(scenario: &ExampleInfo) -> Result<Vec<Arc<Broker>>> {
    let broker = |service: &String| match service.parse()? {
        Service::Kafka => kafka(&[&scenario.name]),
        service => Ok(Arc::new(Broker::private(service)?)),
    };
    scenario.services.iter().map(broker).collect()
}

/// Chance for a test that breaks things at any moment. `TEST_SEED` in the environment repeats what a failed run has
/// printed.
pub fn chance() -> Result<fastrand::Rng> {
    let seed = match std::env::var("TEST_SEED") {
        Ok(seed) => seed.parse().context("TEST_SEED is a whole number")?,
        Err(_) => fastrand::u64(..),
    };
    println!("the same again: TEST_SEED={seed}");
    Ok(fastrand::Rng::with_seed(seed))
}
