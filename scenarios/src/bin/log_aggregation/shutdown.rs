//! One flag that every thread heeds: Ctrl-C, SIGTERM, or a failure elsewhere in the process.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

#[derive(Clone, Default)]
pub struct Stop(Arc<(Mutex<bool>, Condvar)>);

impl Stop {
    /// A flag that is raised by Ctrl-C and SIGTERM. The second signal ends the process at once.
    pub fn on_signals() -> anyhow::Result<Stop> {
        let stop = Stop::default();
        let raised = stop.clone();
        ctrlc::set_handler(move || {
            if raised.is_set() {
                std::process::exit(130);
            }
            raised.set();
        })?;
        Ok(stop)
    }

    pub fn set(&self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.1.notify_all();
    }

    pub fn is_set(&self) -> bool {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `time`, or until the flag is raised; says which.
    pub fn within(&self, time: Duration) -> bool {
        let guard = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (guard, _) = self
            .0
            .1
            .wait_timeout_while(guard, time, |stopped| !*stopped)
            .unwrap_or_else(PoisonError::into_inner);
        *guard
    }
}
