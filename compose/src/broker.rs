//! A running broker: started, watched, broken on purpose, stopped.

use std::fs::{self, File, OpenOptions};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;

use crate::files::tail;
use crate::home::Home;
use crate::ports::Ports;
use crate::probe::{self, Found};
use crate::process::Supervised;
use crate::services::{self, Node, Setup};
use crate::{Service, docker};

#[cfg(test)]
mod tests;

/// How long a broker may take until it serves. Generous: two cores may be busy with a build.
const START_LIMIT: Duration = Duration::from_secs(180);

/// How long a broker may take to end by itself before it is killed.
const STOP_GRACE: Duration = Duration::from_secs(20);
/// The same for one that writes its class archive at the end, which may take some seconds more.
const ARCHIVE_GRACE: Duration = Duration::from_secs(120);

/// What a service runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    /// The real broker, as a process.
    Native,
    /// The real broker, in a container.
    Docker,
    /// librdkafka's mock cluster.
    Mock,
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Backend::Native => "native",
            Backend::Docker => "docker",
            Backend::Mock => "mock",
        })
    }
}

/// A service that this process runs. It ends with this process, however that ends.
#[derive(Debug)]
pub struct Broker {
    service: Service,
    backend: Backend,
    nodes: Vec<Running>,
    // After the nodes: fields are dropped in this order.
    _companion: Option<Supervised>,
    setup: Setup,
    folder: PathBuf,
    temporary: Option<tempfile::TempDir>,
}

#[derive(Debug)]
struct Running {
    log: PathBuf,
    process: Mutex<Option<Supervised>>,
}

impl Broker {
    /// Starts one node for this process alone: on free ports, with empty storage in a temporary folder, and gone without
    /// a trace afterwards. This is what tests use.
    ///
    /// # Errors
    /// The broker cannot be had or does not start; the message says why, with its last log lines.
    pub fn private(service: Service) -> Result<Broker> {
        Broker::private_cluster(service, 1)
    }

    /// As [`Broker::private`], with several nodes that form a cluster.
    ///
    /// # Errors
    /// As [`Broker::private`], and for services of which only one node can run.
    pub fn private_cluster(service: Service, nodes: u16) -> Result<Broker> {
        let home = Home::from_env()?;
        let temporary = tempfile::Builder::new()
            .prefix(&format!("lab-{service}-"))
            .tempdir()
            .context("cannot create a temporary folder")?;
        let folder = temporary.path().to_owned();
        let setup = services::prepare(service, &home, &folder, nodes, Ports::Free)?;
        let logs = folder.clone();
        Broker::launch(
            service,
            Backend::Native,
            setup,
            folder,
            &logs,
            Some(temporary),
        )
    }

    /// Starts the learner's broker: on the ports of [`Ports::from_env`], with storage that is kept between runs.
    pub(crate) fn shared(service: Service, home: &Home, nodes: u16, fresh: bool) -> Result<Broker> {
        let mut name = format!("{service}-{}", service.version());
        if nodes > 1 {
            name += &format!("-{nodes}-nodes");
        }
        let folder = home.data().join(name);
        if fresh && folder.exists() {
            fs::remove_dir_all(&folder)
                .with_context(|| format!("cannot delete {}", folder.display()))?;
        }
        let ports = Ports::from_env(service)?;
        let setup = services::prepare(service, home, &folder, nodes, ports)?;
        Broker::launch(service, Backend::Native, setup, folder, &home.logs(), None)
    }

    /// Starts the service's container, on the default ports.
    pub(crate) fn docker(service: Service, home: &Home) -> Result<Broker> {
        services::require_free(service, service.spec().facts().port)?;
        let setup = Setup::of(vec![docker::node(service)], Some(service.version()));
        let folder = PathBuf::new();
        Broker::launch(service, Backend::Docker, setup, folder, &home.logs(), None)
    }

    /// Starts what stands in for the service, a program that says on which port it listens.
    pub(crate) fn mock(service: Service, program: &Path, home: &Home) -> Result<Broker> {
        let node = Node {
            number: 1,
            first: None,
            run: Command::new(program),
            host: String::new(),
            web: None,
        };
        let setup = Setup::of(vec![node], None);
        let folder = PathBuf::new();
        let mut broker =
            Broker::prepare(service, Backend::Mock, setup, folder, &home.logs(), None)?;
        broker.spawn(1)?;
        broker.setup.nodes[0].host = broker.await_address()?;
        broker.await_ready(1)?;
        Ok(broker)
    }

    fn launch(
        service: Service,
        backend: Backend,
        setup: Setup,
        folder: PathBuf,
        logs: &Path,
        temporary: Option<tempfile::TempDir>,
    ) -> Result<Broker> {
        let broker = Broker::prepare(service, backend, setup, folder, logs, temporary)?;
        // A cluster's nodes need each other to become ready: start all, then wait.
        for number in broker.numbers() {
            broker.spawn(number)?;
        }
        for number in broker.numbers() {
            broker.await_ready(number)?;
        }
        Ok(broker)
    }

    fn prepare(
        service: Service,
        backend: Backend,
        mut setup: Setup,
        folder: PathBuf,
        logs: &Path,
        temporary: Option<tempfile::TempDir>,
    ) -> Result<Broker> {
        fs::create_dir_all(logs).with_context(|| format!("cannot create {}", logs.display()))?;
        let companion = match &setup.companion {
            Some(command) => {
                let (out, err) = log_streams(&logs.join(format!("{service}-companion.log")), true)?;
                Some(Supervised::spawn(command, out, err, None)?)
            }
            None => None,
        };
        for node in &mut setup.nodes {
            let log = log_path(logs, service, node.number);
            let (out, err) = log_streams(&log, true)?;
            if let Some(first) = node.first.take() {
                let status = Supervised::spawn(&first, out, err, None)?.wait()?;
                if !status.success() {
                    return Err(epitaph(service, &log));
                }
            }
        }
        let nodes = setup
            .nodes
            .iter()
            .map(|node| Running {
                log: log_path(logs, service, node.number),
                process: Mutex::new(None),
            })
            .collect();
        Ok(Broker {
            service,
            backend,
            nodes,
            _companion: companion,
            setup,
            folder,
            temporary,
        })
    }

    /// Which service this is.
    pub fn service(&self) -> Service {
        self.service
    }

    /// What it runs on.
    pub(crate) fn backend(&self) -> Backend {
        self.backend
    }

    /// The version of what runs, if it is known.
    pub fn version(&self) -> Option<&str> {
        self.setup.version.as_deref()
    }

    /// The address in the form that the service's environment variable takes, with all nodes where clients accept a list.
    pub fn address(&self) -> String {
        let nodes = self.setup.nodes.iter();
        let hosts: Vec<_> = nodes.map(|node| node.host.clone()).collect();
        self.service.address(&hosts)
    }

    /// The web consoles or admin interfaces, one per node that has one.
    pub fn web(&self) -> Vec<String> {
        let nodes = self.setup.nodes.iter();
        nodes.filter_map(|node| node.web.clone()).collect()
    }

    /// What to set in the environment of an example so that it finds this broker. Pulsar's second node is in
    /// `PULSAR_ADDRESS_B` and `PULSAR_ADMIN_URL_B`, a third in `…_C`.
    pub fn env(&self) -> Vec<(String, String)> {
        self.service.spec().env(&self.setup.nodes)
    }

    /// The numbers of the nodes, from 1.
    pub fn numbers(&self) -> impl Iterator<Item = u16> + use<> {
        1..=u16::try_from(self.nodes.len()).unwrap_or(u16::MAX)
    }

    /// Where the node's storage is; empty for a container or the mock.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The file with all that the node has written.
    ///
    /// # Errors
    /// There is no such node.
    pub fn log(&self, node: u16) -> Result<&Path> {
        Ok(&self.running(node)?.log)
    }

    /// The process id of a node, if it runs.
    ///
    /// # Errors
    /// There is no such node.
    pub fn pid(&self, node: u16) -> Result<Option<u32>> {
        Ok(self.lock(node)?.as_ref().map(Supervised::pid))
    }

    /// Whether the node's process is there. A paused one counts as running: only the operating system knows.
    ///
    /// # Errors
    /// There is no such node.
    pub fn is_running(&self, node: u16) -> Result<bool> {
        let mut process = self.lock(node)?;
        let status = process.as_mut().map(Supervised::try_wait).transpose()?;
        Ok(matches!(status, Some(None)))
    }

    /// SIGKILL: the node is gone at once, without a word to its clients. What it had written stays, since the operating
    /// system holds it; this is a process crash, not a power loss.
    ///
    /// # Errors
    /// There is no such node, or the system refuses.
    pub fn kill(&self, node: u16) -> Result<()> {
        let mut process = self.lock(node)?;
        if let Backend::Docker = self.backend {
            return docker::signal(self.service, "kill");
        }
        match process.take() {
            Some(mut process) => process.kill().map(drop),
            None => bail!("{}.{node} is not running", self.service),
        }
    }

    /// SIGSTOP: the node holds its connections and says nothing, from the moment that this returns.
    ///
    /// # Errors
    /// There is no such node, or the system refuses.
    pub fn pause(&self, node: u16) -> Result<()> {
        self.signal(node, Supervised::pause, "pause")
    }

    /// SIGCONT: a paused node goes on.
    ///
    /// # Errors
    /// There is no such node, or the system refuses.
    pub fn resume(&self, node: u16) -> Result<()> {
        self.signal(node, |process| process.signal(Signal::SIGCONT), "unpause")
    }

    /// Stops the node if it runs, starts it on the same storage and ports, and waits until it serves again.
    ///
    /// # Errors
    /// There is no such node, it does not start, or it is the mock, which has no storage to come back with.
    pub fn restart(&self, node: u16) -> Result<()> {
        match self.backend {
            Backend::Native => {}
            Backend::Docker => {
                docker::signal(self.service, "restart")?;
                return self.await_ready(node);
            }
            Backend::Mock => bail!("the mock cluster keeps nothing, so it cannot be restarted"),
        }
        if let Some(mut process) = self.lock(node)?.take() {
            process.stop(self.grace())?;
        }
        self.spawn(node)?;
        self.await_ready(node)
    }

    /// Stops all nodes in an orderly way.
    ///
    /// # Errors
    /// The system refuses.
    pub fn stop(self) -> Result<()> {
        for number in self.numbers() {
            if let Some(process) = self.lock(number)?.as_mut() {
                // The same order to all before any is waited for.
                process.signal(Signal::SIGCONT)?;
                process.signal(Signal::SIGTERM)?;
            }
        }
        for number in self.numbers() {
            if let Some(mut process) = self.lock(number)?.take() {
                let status = process.stop(self.grace())?;
                self.keep_archive(number, status);
            }
        }
        Ok(())
    }

    fn grace(&self) -> Duration {
        match self.setup.archive {
            Some(_) => ARCHIVE_GRACE,
            None => STOP_GRACE,
        }
    }

    fn keep_archive(&self, node: u16, status: ExitStatus) {
        // One that was killed may not have finished writing.
        if let Some(archive) = self.setup.archive.as_ref().filter(|_| node == 1)
            && status.signal().is_none()
        {
            archive.keep();
        }
    }

    fn running(&self, node: u16) -> Result<&Running> {
        let index = usize::from(node).checked_sub(1);
        index
            .and_then(|index| self.nodes.get(index))
            .with_context(|| {
                format!(
                    "{} has no node {node}; its nodes are numbered from 1 to {}",
                    self.service,
                    self.nodes.len()
                )
            })
    }

    fn lock(&self, node: u16) -> Result<MutexGuard<'_, Option<Supervised>>> {
        // A panic of another thread leaves the option itself whole.
        Ok(self
            .running(node)?
            .process
            .lock()
            .unwrap_or_else(PoisonError::into_inner))
    }

    fn signal(
        &self,
        node: u16,
        send: impl FnOnce(&Supervised) -> Result<()>,
        docker: &str,
    ) -> Result<()> {
        if let Backend::Docker = self.backend {
            return docker::signal(self.service, docker);
        }
        match self.lock(node)?.as_ref() {
            Some(process) => send(process),
            None => bail!("{}.{node} is not running", self.service),
        }
    }

    fn spawn(&self, number: u16) -> Result<()> {
        let node = &self.setup.nodes[usize::from(number) - 1];
        let (out, err) = log_streams(self.log(number)?, false)?;
        let farewell = match (&self.temporary, self.backend) {
            (Some(folder), _) => {
                let mut command = Command::new("rm");
                command.arg("-rf").arg(folder.path());
                Some(command)
            }
            (None, Backend::Docker) => Some(docker::compose(&[
                "rm",
                "--stop",
                "--force",
                self.service.name(),
            ])),
            (None, _) => None,
        };
        *self.lock(number)? = Some(Supervised::spawn(&node.run, out, err, farewell.as_ref())?);
        Ok(())
    }

    /// The mock chooses its port itself and says which.
    fn await_address(&self) -> Result<String> {
        let log = self.log(1)?;
        let deadline = Instant::now() + START_LIMIT;
        while self.is_running(1)? && Instant::now() < deadline {
            let text = fs::read_to_string(log).unwrap_or_default();
            let line = text.split_inclusive('\n').find_map(|line| {
                line.strip_prefix(self.service.variable())?
                    .strip_prefix('=')
            });
            if let Some(address) = line.and_then(|line| line.strip_suffix('\n')) {
                return Ok(address.to_owned());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!(
            "the mock of {} died at start. The last lines of {}:\n{}",
            self.service,
            log.display(),
            tail(log, 15)
        )
    }

    fn await_ready(&self, number: u16) -> Result<()> {
        let (service, spec) = (self.service, self.service.spec());
        let node = &self.setup.nodes[usize::from(number) - 1];
        // A mock has several in one process, and no pages.
        let host = node.host.split(',').next().unwrap_or_default();
        let pages = match self.backend {
            Backend::Mock => Vec::new(),
            Backend::Native | Backend::Docker => {
                spec.health(host, node.web.as_deref().unwrap_or_default())
            }
        };
        let log = self.log(number)?;
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let patience = Duration::from_secs(5);
            let ready = service.probe(host, patience) == Found::Ready
                && pages.iter().all(|page| {
                    probe::http_get(page, patience).is_some_and(|(status, _)| status == 200)
                });
            if ready {
                return Ok(());
            }
            if !self.is_running(number)? {
                return Err(epitaph(service, log));
            }
            if Instant::now() > deadline {
                bail!(
                    "{service} does not serve at {} after {} seconds. The last lines of {}:\n{}",
                    node.host,
                    START_LIMIT.as_secs(),
                    log.display(),
                    tail(log, 15)
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if self.temporary.is_some() {
            // Before the folder goes: a broker that still runs would write into it again.
            for (number, node) in self.numbers().zip(&self.nodes) {
                let mut process = node.process.lock().unwrap_or_else(PoisonError::into_inner);
                // It is of no further use to anybody, and is killed, unless it has something to leave behind.
                if let Some(mut process) = process.take()
                    && self.setup.archive.is_some()
                    && let Ok(status) = process.stop(self.grace())
                {
                    self.keep_archive(number, status);
                }
            }
        }
    }
}

fn epitaph(service: Service, log: &Path) -> anyhow::Error {
    anyhow!(
        "{service} died at start. The last lines of {}:\n{}",
        log.display(),
        tail(log, 15)
    )
}

/// The file that a node writes its output to.
pub(crate) fn log_path(folder: &Path, service: Service, node: u16) -> PathBuf {
    folder.join(format!("{service}-{node}.log"))
}

fn log_streams(path: &Path, fresh: bool) -> Result<(Stdio, Stdio)> {
    let open = || -> Result<File> {
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .with_context(|| format!("cannot write {}", path.display()))
    };
    let out = open()?;
    if fresh {
        out.set_len(0)?;
    }
    Ok((out.into(), open()?.into()))
}
