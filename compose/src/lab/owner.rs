//! The process that owns brokers, and an example if it is a `lab run`: starts them, takes orders for them, and takes
//! them along when it ends.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::running::{Desk, Entry, EntryNode, Lease, Order, Run, Verb};
use super::{interrupt, origin};
use crate::Service;
use crate::broker::{Access, Backend, Broker, Wish};
use crate::home::Home;
use crate::process::Supervised;
use crate::terminal::say;

/// Brokers that this process runs, and the example that it runs on them.
pub(super) struct Owner {
    home: Home,
    /// As in [`Entry::command`].
    command: String,
    socket: PathBuf,
    held: Mutex<BTreeMap<Service, Held>>,
    example: Mutex<Option<Example>>,
    /// Locked while an order is carried out and answered.
    busy: Mutex<()>,
}

struct Held {
    broker: Broker,
    lease: Lease,
    /// As in [`Entry::access`].
    access: Vec<Access>,
    paused: Vec<u16>,
    /// What was published last.
    entry: Option<Entry>,
}

struct Example {
    process: Supervised,
    lease: Lease,
    /// What was published last.
    run: Run,
}

impl Example {
    fn set_state(&mut self, state: &str) -> Result<()> {
        if self.run.state != state {
            self.run.state = state.to_owned();
            self.lease.publish(&self.run)?;
        }
        Ok(())
    }
}

impl Owner {
    /// Opens the desk at which other `lab`s give orders.
    pub(super) fn new(home: Home, command: String) -> Result<Arc<Owner>> {
        let desk = Desk::open(&home)?;
        let socket = desk.path.clone();
        interrupt::remove_at_end(socket.clone());
        let owner = Arc::new(Owner {
            home,
            command,
            socket,
            held: Mutex::new(BTreeMap::new()),
            example: Mutex::new(None),
            busy: Mutex::new(()),
        });
        let clerk = Arc::clone(&owner);
        std::thread::spawn(move || desk.serve(&clerk.busy, |order| clerk.obey(&order)));
        Ok(owner)
    }

    /// Starts a service, whose programs are here, under this process.
    pub(super) fn start(
        &self,
        service: Service,
        backend: Backend,
        lease: Lease,
        wish: Wish,
    ) -> Result<()> {
        say!("starting {service}…");
        let broker = origin::start(&self.home, service, backend, wish)?;
        let access = broker.access()?;
        interrupt::remove_at_end(lease.file().to_owned());
        let mut held = Held {
            broker,
            lease,
            access,
            paused: Vec::new(),
            entry: None,
        };
        self.publish(&mut held)?;
        self.lock().insert(service, held);
        Ok(())
    }

    /// How to connect to a service that this process runs; empty if it is not secured.
    pub(super) fn access(&self, service: Service) -> Vec<Access> {
        let held = self.lock();
        held.get(&service)
            .map_or_else(Vec::new, |held| held.access.clone())
    }

    /// The environment for an example.
    pub(super) fn env(&self) -> Vec<(String, String)> {
        self.lock()
            .values()
            .flat_map(|held| held.broker.env())
            .collect()
    }

    /// Whether one of them is the mock.
    pub(super) fn has_mock(&self) -> bool {
        self.lock()
            .values()
            .any(|held| held.broker.backend() == Backend::Mock)
    }

    /// What there is to say of a service that this process runs.
    pub(super) fn describe(&self, service: Service) -> Option<String> {
        Some(self.lock().get(&service)?.entry.as_ref()?.describe())
    }

    /// Publishes what has changed, and says which nodes have ended since the last look.
    pub(super) fn look(&self) -> Result<Vec<(Service, u16, PathBuf)>> {
        let mut ended = Vec::new();
        for (service, held) in self.lock().iter_mut() {
            let before = held.entry.clone();
            self.publish(held)?;
            for number in held.broker.numbers() {
                let ran = before.as_ref().is_some_and(|entry| {
                    entry
                        .nodes
                        .iter()
                        .any(|node| node.number == number && node.state != ENDED)
                });
                if ran && !held.broker.is_running(number)? {
                    ended.push((*service, number, held.broker.log(number)?.to_owned()));
                }
            }
        }
        Ok(ended)
    }

    /// Whether no service is left.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Starts the example in the foreground, and tells other `lab`s of it.
    pub(super) fn launch(&self, name: &str, command: &mut Command) -> Result<()> {
        let (lease, number) = Lease::of_run(&self.home, name)?;
        interrupt::remove_at_end(lease.file().to_owned());
        let mut example = lock(&self.example);
        let process = Supervised::foreground(command)?;
        let args = command.get_args();
        let run = Run {
            name: name.to_owned(),
            number,
            args: args.map(|arg| arg.to_string_lossy().into_owned()).collect(),
            pid: process.pid(),
            state: RUNNING.to_owned(),
            owner: std::process::id(),
            socket: self.socket.clone(),
        };
        lease.publish(&run)?;
        *example = Some(Example {
            process,
            lease,
            run,
        });
        Ok(())
    }

    /// How the example has ended, if it has.
    pub(super) fn ended(&self) -> Result<Option<ExitStatus>> {
        let mut example = lock(&self.example);
        let process = &mut example.as_mut().context("no example was started")?.process;
        let status = process.try_wait()?;
        if status.is_some() {
            // From now on the process id may be that of another program.
            *example = None;
        }
        Ok(status)
    }

    /// Wakes the example up, if it is paused, and sends it the signal, if there is one.
    pub(super) fn signal(&self, signal: Option<Signal>) -> Result<()> {
        let mut example = lock(&self.example);
        let example = example.as_mut().context("no example was started")?;
        if let Some(signal) = signal {
            example.process.signal(signal)?;
        }
        example.process.signal(Signal::SIGCONT)?;
        example.set_state(RUNNING)
    }

    /// Stops everything in an orderly way, unless an interrupt ends this process before that.
    pub(super) fn stop(&self) -> Result<()> {
        interrupt::stop_attending();
        let held = std::mem::take(&mut *self.lock());
        if !held.is_empty() {
            let names: Vec<_> = held.keys().map(|service| service.name()).collect();
            say!("stopping {}…", names.join(", "));
        }
        for held in held.values() {
            held.lease.withdraw();
        }
        // The leases are given up only after the brokers have gone: their ports must be free by then.
        let mut leases = Vec::new();
        for (_, held) in held {
            held.broker.stop()?;
            leases.push(held.lease);
        }
        let _ = std::fs::remove_file(&self.socket);
        // Whoever ordered the last service down still waits to be told.
        drop(self.busy.lock());
        Ok(())
    }

    fn obey(&self, order: &Order) -> Result<()> {
        let Ok(service) = order.service.parse::<Service>() else {
            return self.obey_for_example(order);
        };
        let mut all = self.lock();
        let held = all
            .get_mut(&service)
            .with_context(|| format!("{service} does not run here any more"))?;
        let node = order.node;
        match order.verb {
            Verb::Kill => held.broker.kill(node)?,
            Verb::Pause => {
                held.broker.pause(node)?;
                held.paused.push(node);
            }
            Verb::Resume => held.broker.resume(node)?,
            Verb::Restart => held.broker.restart(node)?,
            Verb::Down => {
                if let Some(Held { broker, lease, .. }) = all.remove(&service) {
                    lease.withdraw();
                    broker.stop()?;
                    drop(lease);
                }
                return Ok(());
            }
        }
        if order.verb != Verb::Pause {
            held.paused.retain(|paused| *paused != node);
        }
        self.publish(held)
    }

    fn obey_for_example(&self, order: &Order) -> Result<()> {
        let mut example = lock(&self.example);
        let example = example
            .as_mut()
            .filter(|example| example.run.name == order.service && example.run.number == order.node)
            .with_context(|| format!("{} does not run here any more", order.service))?;
        let state = match order.verb {
            Verb::Kill => {
                // `ended` will be told how.
                example.process.kill()?;
                return Ok(());
            }
            Verb::Pause => {
                example.process.pause()?;
                PAUSED
            }
            Verb::Resume => {
                example.process.signal(Signal::SIGCONT)?;
                RUNNING
            }
            Verb::Restart | Verb::Down => bail!("{} is an example, not a broker", order.service),
        };
        example.set_state(state)
    }

    fn publish(&self, held: &mut Held) -> Result<()> {
        let entry = self.entry(held)?;
        if held.entry.as_ref() != Some(&entry) {
            held.lease.publish(&entry)?;
            held.entry = Some(entry);
        }
        Ok(())
    }

    fn entry(&self, held: &Held) -> Result<Entry> {
        let broker = &held.broker;
        let mut nodes = Vec::new();
        for number in broker.numbers() {
            let state = match broker.is_running(number)? {
                false => ENDED,
                true if held.paused.contains(&number) => PAUSED,
                true => RUNNING,
            };
            nodes.push(EntryNode {
                number,
                pid: broker.pid(number)?,
                state: state.to_owned(),
                log: broker.log(number)?.to_owned(),
            });
        }
        Ok(Entry {
            owner: std::process::id(),
            command: self.command.clone(),
            backend: broker.backend().to_string(),
            version: broker.version().map(str::to_owned),
            env: broker.env(),
            web: broker.web(),
            access: held.access.clone(),
            nodes,
            folder: broker.folder().to_owned(),
            socket: self.socket.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Service, Held>> {
        lock(&self.held)
    }
}

/// The states of an example or a node.
const RUNNING: &str = "running";
const PAUSED: &str = "paused";
const ENDED: &str = "ended";

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
