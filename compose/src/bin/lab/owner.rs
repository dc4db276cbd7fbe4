//! The process that owns brokers, and an example if it is a `lab run`: starts them, takes orders for them, and takes
//! them along when it ends.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use compose::broker::{Backend, NodeState, tail};
use compose::home::Home;
use compose::process::Supervised;
use compose::registry::{self, Desk, Entry, Lease, Order, Run, RunLease, Verb};
use compose::{Broker, Service};
use nix::sys::signal::Signal;

use crate::interrupt;
use crate::ladder::{self, Found};
use crate::say::{out, say};

/// Brokers that this process runs, and the example that it runs on them.
pub struct Owner {
    home: Home,
    detached: bool,
    socket: PathBuf,
    held: Mutex<BTreeMap<Service, Held>>,
    example: Mutex<Option<Example>>,
    /// Locked while an order is carried out and answered.
    busy: Mutex<()>,
}

struct Held {
    broker: Broker,
    lease: Lease,
    paused: Vec<u16>,
    /// What was published last.
    entry: Option<Entry>,
}

struct Example {
    process: Supervised,
    lease: RunLease,
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
    pub fn new(home: Home, detached: bool) -> Result<Arc<Owner>> {
        let desk = Desk::open(&home)?;
        let socket = desk.path.clone();
        interrupt::remove_at_end(socket.clone());
        let owner = Arc::new(Owner {
            home,
            detached,
            socket,
            held: Mutex::new(BTreeMap::new()),
            example: Mutex::new(None),
            busy: Mutex::new(()),
        });
        let clerk = Arc::clone(&owner);
        std::thread::spawn(move || desk.serve(&clerk.busy, |order| clerk.obey(&order)));
        Ok(owner)
    }

    /// Starts a service under this process, unless there is one already: then says which.
    pub fn start(&self, service: Service, nodes: u16, fresh: bool) -> Result<Option<Found>> {
        if let Some(found) = ladder::find(&self.home, service)? {
            return Ok(Some(found));
        }
        let backend = ladder::choose(&self.home, service)?;
        let Some(lease) = Lease::acquire(&self.home, service)? else {
            // Another `lab` was faster by a moment.
            return ladder::find(&self.home, service);
        };
        interrupt::remove_at_end(lease.file().to_owned());
        if backend == Backend::Native {
            // Fetching says by itself what it does.
            ladder::fetch(&self.home, service)?;
        }
        say!("starting {service}…");
        let broker = ladder::start(&self.home, service, backend, nodes, fresh)?;
        let mut held = Held {
            broker,
            lease,
            paused: Vec::new(),
            entry: None,
        };
        self.publish(&mut held)?;
        self.lock().insert(service, held);
        Ok(None)
    }

    /// The environment for an example.
    pub fn env(&self) -> Vec<(String, String)> {
        self.lock()
            .values()
            .flat_map(|held| held.broker.env())
            .collect()
    }

    /// Whether one of them is the mock.
    pub fn has_mock(&self) -> bool {
        self.lock()
            .values()
            .any(|held| held.broker.backend() == Backend::Mock)
    }

    /// The address and the consoles of a service that this process runs.
    fn describe(&self, service: Service) -> Option<String> {
        let held = self.lock();
        let broker = &held.get(&service)?.broker;
        let mut text = broker.address();
        for web in broker.web() {
            text += &format!("   {web}");
        }
        if broker.backend() != Backend::Native {
            text += &format!("   ({})", broker.backend());
        }
        Some(text)
    }

    /// Publishes what has changed, and says which nodes have ended since the last look.
    pub fn look(&self) -> Result<Vec<(Service, u16, PathBuf)>> {
        let mut ended = Vec::new();
        for (service, held) in self.lock().iter_mut() {
            let before = held.entry.clone();
            self.publish(held)?;
            for number in held.broker.numbers() {
                let ran = before.as_ref().is_some_and(|entry| {
                    entry
                        .nodes
                        .iter()
                        .any(|node| node.number == number && node.state != "ended")
                });
                if ran && held.broker.state(number)? == NodeState::Ended {
                    ended.push((*service, number, held.broker.log(number)?.to_owned()));
                }
            }
        }
        Ok(ended)
    }

    /// Whether no service is left.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// The services on which another `lab` depends.
    pub fn in_use(&self) -> Result<Vec<Service>> {
        let held = self.lock();
        let mut used = Vec::new();
        for (service, held) in held.iter() {
            if held.lease.in_use()? {
                used.push(*service);
            }
        }
        Ok(used)
    }

    /// Starts the example in the foreground, and tells other `lab`s of it.
    pub fn launch(&self, name: &str, command: &mut Command) -> Result<()> {
        let lease = RunLease::acquire(&self.home, name)?;
        interrupt::remove_at_end(lease.file().to_owned());
        let mut example = lock(&self.example);
        let process = Supervised::foreground(command)?;
        let args = command.get_args();
        let run = Run {
            name: name.to_owned(),
            number: lease.number(),
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
    pub fn ended(&self) -> Result<Option<ExitStatus>> {
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
    pub fn signal(&self, signal: Option<Signal>) -> Result<()> {
        let mut example = lock(&self.example);
        let example = example.as_mut().context("no example was started")?;
        if let Some(signal) = signal {
            example.process.signal(signal)?;
        }
        example.process.signal(Signal::SIGCONT)?;
        example.set_state(RUNNING)
    }

    /// Stops everything in an orderly way, unless an interrupt ends this process before that.
    pub fn stop(&self) -> Result<()> {
        interrupt::stop_attending();
        let held = std::mem::take(&mut *self.lock());
        if !held.is_empty() {
            let names: Vec<_> = held.keys().map(|service| service.name()).collect();
            say!("stopping {}…", names.join(", "));
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
        let entry = registry::describe(&held.broker, &self.socket, self.detached, &held.paused)?;
        if held.entry.as_ref() != Some(&entry) {
            held.lease.publish(&entry)?;
            held.entry = Some(entry);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Service, Held>> {
        lock(&self.held)
    }
}

/// The states of an example.
const RUNNING: &str = "running";
const PAUSED: &str = "paused";

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `lab up`: starts the services and keeps them until Ctrl-C, SIGTERM, or until all have been taken down.
pub fn up(services: &[Service], nodes: u16, fresh: bool, hold: bool) -> Result<()> {
    if hold {
        // A session of its own, so that closing the terminal does not take the brokers along.
        nix::unistd::setsid().context("cannot leave the terminal's session")?;
    }
    let interrupted = interrupt::catch()?;
    let owner = Owner::new(Home::from_env()?, hold)?;
    for service in services {
        match owner.start(*service, nodes, fresh)? {
            None => out!(
                "{service:10}  {}",
                owner.describe(*service).unwrap_or_default()
            ),
            Some(found) => {
                refuse_changes(*service, nodes, fresh)?;
                out!("{service:10}  {} (runs already)", found.address());
            }
        }
    }
    interrupt::attend();
    if owner.is_empty() {
        return owner.stop();
    }
    if !hold {
        out!("Ctrl-C stops what was started here");
    }
    loop {
        match interrupted.recv_timeout(Duration::from_millis(300)) {
            Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {}
        }
        for (service, node, log) in owner.look()? {
            out!(
                "{service}.{node} has ended; `cargo lab restart {service}.{node}` starts it again"
            );
            out!("{}", tail(&log, 3));
        }
        if owner.is_empty() {
            return owner.stop();
        }
    }
    owner.stop()
}

/// Whoever asks for empty storage or a cluster must not get a broker that was there before.
fn refuse_changes(service: Service, nodes: u16, fresh: bool) -> Result<()> {
    if nodes > 1 || fresh {
        bail!(
            "{service} runs already; --nodes and --fresh need a start: stop it first with `cargo lab down {service}`"
        );
    }
    Ok(())
}

/// `lab up --detach`: the same in a background process, from which this one returns as soon as all serve.
pub fn detach(services: &[Service], nodes: u16, fresh: bool) -> Result<ExitCode> {
    let interrupted = interrupt::catch()?;
    let home = Home::from_env()?;
    let mut wanted = Vec::new();
    for service in services {
        match ladder::find(&home, *service)? {
            Some(found) => {
                refuse_changes(*service, nodes, fresh)?;
                out!("{service:10}  {} (runs already)", found.address());
            }
            None => wanted.push(*service),
        }
    }
    if wanted.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    for service in &wanted {
        // Fetching shows its progress, so it is done here.
        ladder::fetch(&home, *service)?;
    }
    let log = home.logs().join(format!("up-{}.log", std::process::id()));
    let out = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut command =
        Command::new(std::env::current_exe().context("cannot find this program's own file")?);
    command.args(["up", "--hold", "--nodes", &nodes.to_string()]);
    if fresh {
        command.arg("--fresh");
    }
    command.args(wanted.iter().map(|service| service.name()));
    let names: Vec<_> = wanted.iter().map(|service| service.name()).collect();
    say!("starting {}…", names.join(", "));
    interrupt::attend();
    let mut holder = command
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        .spawn()
        .context("cannot start the background process")?;
    let mut waiting = wanted.clone();
    while !waiting.is_empty() {
        if let Some(status) = holder.try_wait()? {
            // Another `lab` may have been faster by a moment.
            if status.success() {
                for service in &waiting {
                    let entry = registry::await_entry(&home, *service, Duration::from_secs(600))?;
                    let entry = entry.with_context(|| {
                        format!("{service} was stopped as soon as it had started")
                    })?;
                    let address = entry.env.first().map_or("", |(_, address)| address);
                    out!("{service:10}  {address} (runs already)");
                }
                return Ok(ExitCode::SUCCESS);
            }
            bail!(
                "the background process ended ({status}):\n{}",
                tail(&log, 25)
            );
        }
        for service in std::mem::take(&mut waiting) {
            match registry::find(&home, service)? {
                Some(entry) if entry.owner == holder.id() => {
                    let address = entry.env.first().map_or("", |(_, address)| address);
                    out!("{service:10}  {address}   {}", entry.web.join(" "));
                }
                _ => waiting.push(service),
            }
        }
        if interrupted.recv_timeout(Duration::from_millis(50)) != Err(RecvTimeoutError::Timeout) {
            // It has left the terminal's session, so no Ctrl-C reaches it there.
            holder.kill().context("cannot end the background process")?;
            holder.wait()?;
            return Ok(ExitCode::from(interrupt::EXIT_CODE));
        }
    }
    out!("`cargo lab down` stops what was started here");
    Ok(ExitCode::SUCCESS)
}
