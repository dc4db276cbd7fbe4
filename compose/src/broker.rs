//! A running broker: started, watched, broken on purpose, stopped.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;

use crate::home::Home;
use crate::process::Supervised;
use crate::recipe::{self, Node, Ports, Setup};
use crate::{Service, fetch, probe};

/// How long a broker may take until it serves. Generous: two cores may be busy with a build.
const START_LIMIT: Duration = Duration::from_secs(180);

/// How long a broker may take to end by itself before it is killed.
const STOP_GRACE: Duration = Duration::from_secs(20);
/// The same for one that writes its class archive at the end, which may take some seconds more.
const ARCHIVE_GRACE: Duration = Duration::from_secs(120);

/// What a service runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
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

/// The state of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// The process is there. A paused one counts as running: only the operating system knows.
    Running,
    /// The process has ended.
    Ended,
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
        let setup = recipe::setup(service, &home, &folder, nodes, Ports::Free)?;
        Broker::launch(
            service,
            Backend::Native,
            setup,
            folder.clone(),
            &folder,
            Some(temporary),
        )
    }

    /// Starts the learner's broker: on the ports of [`Ports::from_env`], with storage that is kept between runs.
    ///
    /// # Errors
    /// The broker cannot be had, a port is taken, or it does not start.
    pub fn shared(service: Service, home: &Home, nodes: u16, fresh: bool) -> Result<Broker> {
        let version = version(service);
        let mut name = format!("{service}-{version}");
        if nodes > 1 {
            name += &format!("-{nodes}-nodes");
        }
        let folder = home.data().join(name);
        if fresh && folder.exists() {
            fs::remove_dir_all(&folder)
                .with_context(|| format!("cannot delete {}", folder.display()))?;
        }
        let setup = recipe::setup(service, home, &folder, nodes, Ports::from_env(service)?)?;
        let logs = home.logs();
        Broker::launch(service, Backend::Native, setup, folder, &logs, None)
    }

    /// Starts the service's container, on the default ports.
    ///
    /// # Errors
    /// A port is taken, or Docker cannot start it.
    pub fn docker(service: Service, home: &Home) -> Result<Broker> {
        recipe::require_free(service, service.default_port())?;
        let setup = Setup::foreign(crate::docker::node(service));
        Broker::launch(
            service,
            Backend::Docker,
            setup,
            PathBuf::new(),
            &home.logs(),
            None,
        )
    }

    /// Starts librdkafka's mock cluster: the example `kafka_mock_cluster`, whose binary is given.
    ///
    /// # Errors
    /// It does not start.
    pub fn mock(program: &Path, home: &Home) -> Result<Broker> {
        let node = Node {
            number: 1,
            prepare: None,
            run: Command::new(program),
            address: String::new(),
            web: None,
            health: Vec::new(),
        };
        let mut broker = Broker::prepare(
            Service::Kafka,
            Backend::Mock,
            Setup::foreign(node),
            PathBuf::new(),
            &home.logs(),
            None,
        )?;
        broker.spawn(1)?;
        broker.setup.nodes[0].address = broker.await_address()?;
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
            if let Some(prepare) = node.prepare.take() {
                let status = Supervised::spawn(&prepare, out, err, None)?.wait()?;
                if !status.success() {
                    return Err(epitaph(service, setup.program.as_deref(), &log));
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
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// The address in the form that the service's environment variable takes, with all nodes where clients accept a list.
    pub fn address(&self) -> String {
        let hosts: Vec<_> = self
            .setup
            .nodes
            .iter()
            .map(|node| node.address.clone())
            .collect();
        self.service.address(&hosts)
    }

    /// The web consoles or admin interfaces, one per node that has one.
    pub fn web(&self) -> Vec<String> {
        self.setup
            .nodes
            .iter()
            .filter_map(|node| node.web.clone())
            .collect()
    }

    /// What to set in the environment of an example so that it finds this broker. Pulsar's second node is in
    /// `PULSAR_ADDRESS_B` and `PULSAR_ADMIN_URL_B`, a third in `…_C`.
    pub fn env(&self) -> Vec<(String, String)> {
        let mut variables = vec![(self.service.variable().to_owned(), self.address())];
        if let (Some(name), Some(web)) =
            (self.service.web_variable(), self.web().into_iter().next())
        {
            variables.push((name.to_owned(), web));
        }
        // A client of Pulsar takes one address, and each node is a cluster of its own.
        if self.service == Service::Pulsar {
            for (node, letter) in self.setup.nodes.iter().skip(1).zip('B'..='Z') {
                let name = format!("{}_{letter}", self.service.variable());
                variables.push((
                    name,
                    self.service.address(std::slice::from_ref(&node.address)),
                ));
                if let (Some(name), Some(web)) = (self.service.web_variable(), &node.web) {
                    variables.push((format!("{name}_{letter}"), web.clone()));
                }
            }
        }
        variables
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

    /// Whether the node's process is there.
    ///
    /// # Errors
    /// There is no such node.
    pub fn state(&self, node: u16) -> Result<NodeState> {
        match self
            .lock(node)?
            .as_mut()
            .map(Supervised::try_wait)
            .transpose()?
        {
            Some(None) => Ok(NodeState::Running),
            Some(Some(_)) | None => Ok(NodeState::Ended),
        }
    }

    /// SIGKILL: the node is gone at once, without a word to its clients. What it had written stays, since the operating
    /// system holds it; this is a process crash, not a power loss.
    ///
    /// # Errors
    /// There is no such node, or the system refuses.
    pub fn kill(&self, node: u16) -> Result<()> {
        let mut process = self.lock(node)?;
        if let Backend::Docker = self.backend {
            return crate::docker::signal(self.service, "kill");
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
                crate::docker::signal(self.service, "restart")?;
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
            return crate::docker::signal(self.service, docker);
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
            (None, Backend::Docker) => Some(crate::docker::compose(&[
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
        while self.state(1)? == NodeState::Running && Instant::now() < deadline {
            let text = fs::read_to_string(log).unwrap_or_default();
            let line = text
                .split_inclusive('\n')
                .find_map(|line| line.strip_prefix("KAFKA_BROKERS="));
            if let Some(address) = line.and_then(|line| line.strip_suffix('\n')) {
                return Ok(address.to_owned());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!(
            "the mock cluster died at start. The last lines of {}:\n{}",
            log.display(),
            tail(log, 15)
        )
    }

    fn await_ready(&self, number: u16) -> Result<()> {
        let service = self.service;
        let node = &self.setup.nodes[usize::from(number) - 1];
        let log = self.log(number)?;
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let patience = Duration::from_secs(5);
            let ready = probe::probe(service, &node.address, patience) == probe::Found::Ready
                && node.health.iter().all(|page| {
                    probe::http_get(page, patience).is_some_and(|(status, _)| status == 200)
                });
            if ready {
                return Ok(());
            }
            if self.state(number)? == NodeState::Ended {
                return Err(epitaph(service, self.setup.program.as_deref(), log));
            }
            if Instant::now() > deadline {
                bail!(
                    "{service} does not serve at {} after {} seconds. The last lines of {}:\n{}",
                    node.address,
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

/// Why a broker died at start, as well as can be told.
fn epitaph(service: Service, program: Option<&Path>, log: &Path) -> anyhow::Error {
    // A damaged program is the one reason that the log does not name.
    if let Some(Err(damage)) = program.map(fetch::verify) {
        return damage.context(format!("{service} died at start: its program is damaged"));
    }
    anyhow!(
        "{service} died at start. The last lines of {}:\n{}",
        log.display(),
        tail(log, 15)
    )
}

/// The file that a node writes its output to.
pub fn log_path(folder: &Path, service: Service, node: u16) -> PathBuf {
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

fn version(service: Service) -> String {
    let all = fetch::versions();
    all.into_iter()
        .find_map(|(name, version)| (name == service.name()).then_some(version))
        .unwrap_or_default()
}

/// The last lines of a log, indented, long ones cut.
pub fn tail(path: &Path, count: usize) -> String {
    let Ok(file) = File::open(path) else {
        return format!("    (no log at {})", path.display());
    };
    let mut lines = VecDeque::new();
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    while reader
        .read_until(b'\n', &mut line)
        .is_ok_and(|length| length > 0)
    {
        let text: String = String::from_utf8_lossy(&line)
            .trim_end()
            .chars()
            .take(300)
            .collect();
        if !text.is_empty() {
            lines.push_back(format!("    {text}"));
        }
        if lines.len() > count {
            lines.pop_front();
        }
        line.clear();
    }
    if lines.is_empty() {
        "    (it wrote nothing)".to_owned()
    } else {
        Vec::from(lines).join("\n")
    }
}
