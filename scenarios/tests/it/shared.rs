//! Brokers for the tests that leave them alone.

use std::sync::Arc;

use anyhow::Result;
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
