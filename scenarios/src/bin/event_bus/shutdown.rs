//! One flag that every task heeds: Ctrl-C, SIGTERM, or the end of the run.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

#[derive(Clone)]
pub struct Stop(watch::Sender<bool>);

impl Stop {
    pub fn new() -> Stop {
        Stop(watch::Sender::new(false))
    }

    /// Raised by Ctrl-C and SIGTERM. The second signal ends the process at once.
    pub fn on_signals() -> Result<Stop> {
        let stop = Stop::new();
        let mut interrupt = signal(SignalKind::interrupt()).context("no Ctrl-C")?;
        let mut terminate = signal(SignalKind::terminate()).context("no SIGTERM")?;
        let raised = stop.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if raised.is_set() {
                    std::process::exit(130);
                }
                raised.set();
            }
        });
        Ok(stop)
    }

    pub fn set(&self) {
        self.0.send_replace(true);
    }

    pub fn is_set(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until the flag is raised.
    pub async fn wait(&self) {
        // Cannot fail: the sender is in our hands.
        let _ = self.0.subscribe().wait_for(|stopped| *stopped).await;
    }

    /// Waits for `time`, or until the flag is raised; says which.
    pub async fn within(&self, time: Duration) -> bool {
        tokio::time::timeout(time, self.wait()).await.is_ok()
    }
}
