//! Kafkas for the tests that leave the broker alone.

use std::sync::Arc;

use anyhow::Result;
use compose::harness::Pool;
use compose::{Broker, Service};

use crate::owner::owner;

static KAFKAS: Pool = Pool::new(Service::Kafka).owned_by(owner);

/// A Kafka on which none of these examples has run, and on which no other test will run them: their topics and groups
/// have fixed names, so two tests of one example need two Kafkas.
///
/// A test that breaks the broker, or counts all of its topics, has a private one.
pub fn kafka(examples: &[&str]) -> Result<Arc<Broker>> {
    KAFKAS.lend(examples)
}
