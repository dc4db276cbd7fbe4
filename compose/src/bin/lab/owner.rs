//! The process that owns brokers: starts them, takes orders for them, and takes them along when it ends.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use compose::broker::{Backend, NodeState, tail};
use compose::home::Home;
use compose::registry::{self, Desk, Entry, Lease, Order, Verb};
use compose::{Broker, Service};

use crate::ladder::{self, Found};

/// Brokers that this process runs.
pub struct Owner {
    home: Home,
    detached: bool,
    socket: PathBuf,
    held: Mutex<BTreeMap<Service, Held>>,
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

impl Owner {
    /// Opens the desk at which other `lab`s give orders.
    pub fn new(home: Home, detached: bool) -> Result<Arc<Owner>> {
        let desk = Desk::open(&home)?;
        let socket = desk.path.clone();
        let owner = Arc::new(Owner {
            home,
            detached,
            socket,
            held: Mutex::new(BTreeMap::new()),
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

    /// Stops everything in an orderly way.
    pub fn stop(&self) -> Result<()> {
        let held = std::mem::take(&mut *self.lock());
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
        let service: Service = order.service.parse()?;
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

    fn publish(&self, held: &mut Held) -> Result<()> {
        let entry = registry::describe(&held.broker, &self.socket, self.detached, &held.paused)?;
        if held.entry.as_ref() != Some(&entry) {
            held.lease.publish(&entry)?;
            held.entry = Some(entry);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Service, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Set as soon as an interrupt is awaited.
static ATTENTIVE: AtomicBool = AtomicBool::new(false);

/// From here on interrupts are awaited, and do not end the process any more.
pub fn attend() {
    ATTENTIVE.store(true, Ordering::SeqCst);
}

/// Ctrl-C and SIGTERM, one message each. Until [`attend`] is called they end the process at once: a fetch or the start
/// of a broker can take minutes, and what was started goes with this process, however that ends.
pub fn interrupts() -> Result<Receiver<()>> {
    let (sender, receiver) = mpsc::channel();
    ctrlc::set_handler(move || {
        if !ATTENTIVE.load(Ordering::SeqCst) {
            std::process::exit(130);
        }
        let _ = sender.send(());
    })
    .context("cannot catch Ctrl-C")?;
    Ok(receiver)
}

/// `lab up`: starts the services and keeps them until Ctrl-C, SIGTERM, or until all have been taken down.
pub fn up(services: &[Service], nodes: u16, fresh: bool, hold: bool) -> Result<()> {
    if hold {
        // A session of its own, so that closing the terminal does not take the brokers along.
        nix::unistd::setsid().context("cannot leave the terminal's session")?;
    }
    let interrupted = interrupts()?;
    let owner = Owner::new(Home::from_env()?, hold)?;
    for service in services {
        match owner.start(*service, nodes, fresh)? {
            None => println!(
                "{service:10}  {}",
                owner.describe(*service).unwrap_or_default()
            ),
            Some(found) => {
                refuse_changes(*service, nodes, fresh)?;
                println!("{service:10}  {} (runs already)", found.address());
            }
        }
    }
    attend();
    if owner.is_empty() {
        return owner.stop();
    }
    if !hold {
        println!("Ctrl-C stops what was started here");
    }
    loop {
        match interrupted.recv_timeout(Duration::from_millis(300)) {
            Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {}
        }
        for (service, node, log) in owner.look()? {
            println!(
                "{service}.{node} has ended; `cargo lab restart {service}.{node}` starts it again"
            );
            println!("{}", tail(&log, 3));
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
pub fn detach(services: &[Service], nodes: u16, fresh: bool) -> Result<()> {
    let home = Home::from_env()?;
    let mut wanted = Vec::new();
    for service in services {
        match ladder::find(&home, *service)? {
            Some(found) => {
                refuse_changes(*service, nodes, fresh)?;
                println!("{service:10}  {} (runs already)", found.address());
            }
            None => wanted.push(*service),
        }
    }
    if wanted.is_empty() {
        return Ok(());
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
                    println!("{service:10}  {address} (runs already)");
                }
                return Ok(());
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
                    println!("{service:10}  {address}   {}", entry.web.join(" "));
                }
                _ => waiting.push(service),
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("`cargo lab down` stops what was started here");
    Ok(())
}
