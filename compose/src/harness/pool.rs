//! Brokers that the tests of one program share.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::{Result, anyhow};

use super::transcript::Transcript;
use super::transcripts::private_broker;
use crate::workspace::ExampleInfo;
use crate::{Broker, Service};

/// Running brokers of a service, for tests that leave the broker alone. Each is started when none of the others will do.
///
/// Meant for a `static`, which is never dropped: the brokers end with the test program, however that ends.
#[derive(Debug)]
pub struct Pool {
    service: Service,
    owner: fn(&str) -> &str,
    brokers: Mutex<Vec<Lent>>,
}

#[derive(Debug)]
struct Lent {
    names: BTreeSet<String>,
    broker: Arc<OnceLock<Result<Arc<Broker>, String>>>,
}

impl Pool {
    /// Has no broker yet.
    pub const fn new(service: Service) -> Pool {
        Pool {
            service,
            owner: |name| name,
            brokers: Mutex::new(Vec::new()),
        }
    }

    /// Takes every name for its owner's, where several programs use the same topics: `owner` gives one name for all of them.
    /// An empty name is for a program that has no topics of its own, such as a general sender: it can run on any broker.
    #[must_use]
    pub const fn owned_by(mut self, owner: fn(&str) -> &str) -> Pool {
        self.owner = owner;
        self
    }

    /// The brokers for the transcripts in the header of an example: one that is shared, as long as no program of theirs has
    /// run on it. Private are those of other services, clusters, and those that are broken or looked at as a whole: the
    /// transcript says `cargo lab kill` or the like, or the example is one of those that have to be `alone`.
    ///
    /// # Errors
    /// The header is wrong, or a broker does not start.
    pub fn for_transcript(
        &self,
        example: &ExampleInfo,
        alone: &[&str],
    ) -> Result<Vec<Arc<Broker>>> {
        let transcripts = Transcript::parse(&example.header, example.header_line)?;
        let is_shared = example.nodes == 1
            && !example.secure
            && !alone.contains(&example.name.as_str())
            && !transcripts.iter().any(Transcript::breaks_a_broker);
        let programs: BTreeSet<&str> = transcripts.iter().flat_map(Transcript::programs).collect();
        let programs: Vec<&str> = programs.into_iter().collect();
        let broker = |name: &String| match name.parse::<Service>()? {
            service if is_shared && service == self.service => self.lend(&programs),
            service => private_broker(service, example),
        };
        example.services.iter().map(broker).collect()
    }

    /// A broker that was never lent to somebody with one of these names, and never will be again. What they name, topics
    /// or programs, is up to the callers.
    ///
    /// # Errors
    /// The broker does not start.
    pub fn lend(&self, names: &[&str]) -> Result<Arc<Broker>> {
        let names = names.iter().map(|name| (self.owner)(name));
        let names: Vec<&str> = names.filter(|name| !name.is_empty()).collect();
        let broker = {
            let mut brokers = self.brokers.lock().unwrap_or_else(PoisonError::into_inner);
            let is_free = |lent: &Lent| names.iter().all(|name| !lent.names.contains(*name));
            let at = brokers.iter().position(is_free).unwrap_or_else(|| {
                brokers.push(Lent {
                    names: BTreeSet::new(),
                    broker: Arc::default(),
                });
                brokers.len() - 1
            });
            let names = names.iter().map(|name| (*name).to_owned());
            brokers[at].names.extend(names);
            brokers[at].broker.clone()
        };
        // It starts outside of the lock, so that nobody waits for a broker that is not theirs.
        let started = broker.get_or_init(|| {
            let broker = Broker::private(self.service);
            broker.map(Arc::new).map_err(|error| format!("{error:#}"))
        });
        started.clone().map_err(|reason| anyhow!(reason))
    }
}
