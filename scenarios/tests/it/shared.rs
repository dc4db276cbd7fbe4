//! Brokers for the tests that leave them alone.

use std::sync::Arc;

use anyhow::Result;
use compose::harness::Pool;
use compose::{Broker, Service};

static KAFKAS: Pool = Pool::new(Service::Kafka);

/// A Kafka on which nobody uses these names, whatever they name.
pub fn kafka(names: &[&str]) -> Result<Arc<Broker>> {
    KAFKAS.lend(names)
}
