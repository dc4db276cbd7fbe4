//! Brokers that the tests of one program share.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::{Result, anyhow};

use crate::{Broker, Service};

/// Running brokers of a service, for tests that leave the broker alone. Each is started when none of the others will do.
///
/// Meant for a `static`, which is never dropped: the brokers end with the test program, however that ends.
#[derive(Debug)]
pub struct Pool {
    service: Service,
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
            brokers: Mutex::new(Vec::new()),
        }
    }

    /// A broker that was never lent to somebody with one of these names, and never will be again. What they name, topics
    /// or programs, is up to the callers.
    ///
    /// # Errors
    /// The broker does not start.
    pub fn lend(&self, names: &[&str]) -> Result<Arc<Broker>> {
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
