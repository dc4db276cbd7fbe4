//! A running broker: started, watched, broken on purpose, stopped.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::files::tail;
use crate::home::Home;
use crate::ports::Ports;
use crate::probe::Found;
use crate::process::Supervised;
use crate::security::{self, Security};
use crate::services::{self, Grant, Node, Setup};
use crate::{Service, User, docker};

#[cfg(test)]
mod tests;

/// How long a broker may take until it serves. Generous: two cores may be busy with a build.
const START_LIMIT: Duration = Duration::from_secs(180);

/// How long a broker may take to end by itself before it is killed.
const STOP_GRACE: Duration = Duration::from_secs(20);
/// The same for one that writes its class archive at the end, which may take some seconds more.
const ARCHIVE_GRACE: Duration = Duration::from_secs(120);

/// How long one order of the administrator's may take.
const GRANT_LIMIT: Duration = Duration::from_secs(60);

/// What a user wants of a service that is started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish {
    pub(crate) nodes: u16,
    /// With empty storage.
    pub(crate) fresh: bool,
    /// With TLS and authentication.
    pub(crate) secure: bool,
}

/// How to connect to a secured broker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Access {
    /// `plain`, or the name of the user.
    #[serde(default)]
    pub(crate) name: String,
    /// With which rights.
    pub(crate) title: String,
    /// To be read by a shell.
    pub(crate) file: String,
    /// What is in the file, line by line.
    pub(crate) exports: Vec<String>,
}

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
    companion: Option<Supervised>,
    setup: Setup,
    /// As [`Broker::env`].
    env: Vec<(String, String)>,
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
        Broker::temporary(service, nodes, false, false)
    }

    /// As [`Broker::private`], with TLS and authentication. [`Broker::secured_env`] leads to the listener with TLS,
    /// [`Broker::env`] to the one without, and to the rights of the application.
    ///
    /// # Errors
    /// As [`Broker::private`], and for services that cannot be secured.
    pub fn secure(service: Service) -> Result<Broker> {
        Broker::temporary(service, 1, true, false)
    }

    /// As [`Broker::private`], with ports for a proxy in front of it.
    #[cfg(feature = "harness")]
    pub(crate) fn private_behind_proxy(service: Service) -> Result<(Broker, services::Behind)> {
        let broker = Broker::temporary(service, 1, false, true)?;
        let behind = broker.setup.behind.first().copied();
        Ok((
            broker,
            behind.context("a broker without ports for a proxy")?,
        ))
    }

    fn temporary(service: Service, nodes: u16, secure: bool, proxied: bool) -> Result<Broker> {
        let home = Home::from_env()?;
        let temporary = tempfile::Builder::new()
            .prefix(&format!("lab-{service}-"))
            .tempdir()
            .context("cannot create a temporary folder")?;
        let folder = temporary.path().to_owned();
        let security = secure
            .then(|| Security::at(folder.join("secure")))
            .transpose()?;
        let setup = services::prepare(
            service,
            &home,
            &folder,
            nodes,
            Ports::Free,
            security,
            proxied,
        )?;
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
    pub(crate) fn shared(service: Service, home: &Home, wish: Wish) -> Result<Broker> {
        let Wish {
            nodes,
            fresh,
            secure,
        } = wish;
        let mut name = format!("{service}-{}", service.version());
        if nodes > 1 {
            name += &format!("-{nodes}-nodes");
        }
        // The users are stored too.
        if secure {
            name += "-secure";
        }
        let folder = home.data().join(name);
        if fresh && folder.exists() {
            fs::remove_dir_all(&folder)
                .with_context(|| format!("cannot delete {}", folder.display()))?;
        }
        let ports = Ports::from_env(service)?;
        let security = secure
            .then(|| Security::at(home.secure(service)))
            .transpose()?;
        let setup = services::prepare(service, home, &folder, nodes, ports, security, false)?;
        Broker::launch(service, Backend::Native, setup, folder, &home.logs(), None)
    }

    /// Starts the service in containers, on the ports of [`Ports::from_env`]. What they store goes with them.
    pub(crate) fn docker(service: Service, home: &Home, nodes: u16) -> Result<Broker> {
        let setup = docker::set_up(service, home, nodes, Ports::from_env(service)?)?;
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
            secured: None,
            secured_web: None,
        };
        let setup = Setup::of(vec![node], None);
        let folder = PathBuf::new();
        let mut broker =
            Broker::prepare(service, Backend::Mock, setup, folder, &home.logs(), None)?;
        broker.spawn(1)?;
        broker.setup.nodes[0].host = broker.await_address()?;
        broker.env = service.spec().env(&broker.setup.nodes, None)?;
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
        broker.grant()?;
        Ok(broker)
    }

    /// Gives the users their rights.
    fn grant(&self) -> Result<()> {
        let mut programs = Vec::new();
        for (number, grant) in (1..).zip(&self.setup.grants) {
            match grant {
                Grant::Run(command) => {
                    let log = self.log(1)?.with_extension(format!("grant-{number}"));
                    let (out, err) = log_streams(&log, true)?;
                    programs.push((Supervised::spawn(command, out, err, None)?, log));
                }
                Grant::Post(page, json) => {
                    let (status, body) = page
                        .post(json, GRANT_LIMIT)
                        .with_context(|| format!("no answer from {}", page.url))?;
                    if !(200..300).contains(&status) {
                        bail!("{} answers {status}: {body}", page.url);
                    }
                }
            }
        }
        for (mut program, log) in programs {
            if !program
                .wait_for(GRANT_LIMIT)?
                .is_some_and(|status| status.success())
            {
                bail!(
                    "the users of {service} cannot be given their rights. If their passwords are newer than the storage, \
                     `cargo lab up {service} --secure --fresh` begins with both. The last lines of {}:\n{}",
                    log.display(),
                    tail(&log, 15),
                    service = self.service,
                );
            }
            let _ = fs::remove_file(log);
        }
        Ok(())
    }

    fn prepare(
        service: Service,
        backend: Backend,
        setup: Setup,
        folder: PathBuf,
        logs: &Path,
        temporary: Option<tempfile::TempDir>,
    ) -> Result<Broker> {
        fs::create_dir_all(logs).with_context(|| format!("cannot create {}", logs.display()))?;
        let companion = match &setup.companion {
            Some(command) => {
                let (out, err) = log_streams(&logs.join(format!("{service}-companion.log")), true)?;
                let project = setup.project.as_ref();
                let farewell = project.map(|project| project.removal(Duration::ZERO));
                Some(Supervised::spawn(command, out, err, farewell.as_ref())?)
            }
            None => None,
        };
        let nodes = setup
            .nodes
            .iter()
            .map(|node| Running {
                log: log_path(logs, service, node.number),
                process: Mutex::new(None),
            })
            .collect();
        let env = service.spec().env(&setup.nodes, setup.security.as_ref())?;
        let mut broker = Broker {
            service,
            backend,
            nodes,
            companion,
            setup,
            env,
            folder,
            temporary,
        };
        for (node, running) in broker.setup.nodes.iter_mut().zip(&broker.nodes) {
            let (out, err) = log_streams(&running.log, true)?;
            if let Some(first) = node.first.take() {
                let status = Supervised::spawn(&first, out, err, None)?.wait()?;
                if !status.success() {
                    return Err(epitaph(service, &running.log));
                }
                // Kafka's shows the hashes of the users' passwords.
                log_streams(&running.log, true)?;
            }
        }
        Ok(broker)
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
        let first = self.env().into_iter().next();
        first.map_or_else(String::new, |(_, address)| address)
    }

    /// The web consoles or admin interfaces, one per node that has one.
    pub fn web(&self) -> Vec<String> {
        let nodes = self.setup.nodes.iter();
        nodes.filter_map(|node| node.web.clone()).collect()
    }

    /// What to set in the environment of an example so that it finds this broker. Pulsar's second node is in
    /// `PULSAR_ADDRESS_B` and `PULSAR_ADMIN_URL_B`, a third in `…_C`.
    pub fn env(&self) -> Vec<(String, String)> {
        self.env.clone()
    }

    /// What to set to connect with TLS as this user; the CA's certificate is among it. `docs/brokers.md` has the names.
    ///
    /// # Errors
    /// The broker is not secured, or a file with a secret cannot be read.
    pub fn secured_env(&self, user: User) -> Result<Vec<(String, String)>> {
        let security = self.setup.security.as_ref();
        let security = security.with_context(|| format!("this {} is not secured", self.service))?;
        let spec = self.service.spec();
        spec.secured_env(&self.setup.nodes, security, user)
    }

    /// What a user is told of a secured broker: how to connect to it, with a file of what to set in a shell. A secret is not in
    /// it, but the file that holds the secret.
    pub(crate) fn access(&self) -> Result<Vec<Access>> {
        let Some(security) = &self.setup.security else {
            return Ok(Vec::new());
        };
        let access = |title: String, name: &str, env: Vec<(String, String)>| -> Result<Access> {
            let mut exports = Vec::new();
            for (name, value) in env {
                exports.push(format!("export {name}=\"{}\"", security.for_shell(&value)?));
            }
            let file = security.path(&format!("{name}.env"));
            security::write(&file, &(exports.join("\n") + "\n"))?;
            Ok(Access {
                name: name.to_owned(),
                title,
                file,
                exports,
            })
        };
        let plain = "without TLS, with the rights of the application".to_owned();
        let mut all = vec![access(plain, "plain", self.env())?];
        for user in User::ALL {
            let title = format!("with TLS, as the {user}");
            all.push(access(title, &user.to_string(), self.secured_env(user)?)?);
        }
        Ok(all)
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
        let Some(running) = process.as_mut() else {
            bail!("{}.{node} is not running", self.service);
        };
        if let Some(project) = &self.setup.project {
            project.order(&["kill"], node)?;
            // It has the last lines of the log still to write.
            running.wait_for(STOP_GRACE)?;
        }
        running.kill()?;
        *process = None;
        Ok(())
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
        if let Backend::Mock = self.backend {
            bail!("the mock cluster keeps nothing, so it cannot be restarted");
        }
        let mut process = self.lock(node)?;
        if let Some(project) = &self.setup.project {
            // Also if no process is there: somebody may have started the container by hand.
            project.order(&["stop", "-t", &STOP_GRACE.as_secs().to_string()], node)?;
        }
        if let Some(mut process) = process.take() {
            process.stop(self.grace())?;
        }
        drop(process);
        self.spawn(node)?;
        self.await_ready(node)
    }

    /// Stops all nodes in an orderly way.
    ///
    /// # Errors
    /// The system refuses.
    pub fn stop(mut self) -> Result<()> {
        if let Some(project) = &self.setup.project {
            project.remove(STOP_GRACE)?;
            self.companion = None;
            return Ok(());
        }
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
        match (self.lock(node)?.as_ref(), &self.setup.project) {
            (Some(_), Some(project)) => project.order(&[docker], node),
            (Some(process), None) => send(process),
            (None, _) => bail!("{}.{node} is not running", self.service),
        }
    }

    fn spawn(&self, number: u16) -> Result<()> {
        let node = &self.setup.nodes[usize::from(number) - 1];
        let (out, err) = log_streams(self.log(number)?, false)?;
        let farewell = self.temporary.as_ref().map(|folder| {
            let mut command = Command::new("rm");
            command.arg("-rf").arg(folder.path());
            command
        });
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
            Backend::Native | Backend::Docker => spec.health(
                host,
                node.web.as_deref().unwrap_or_default(),
                self.setup.security.as_ref(),
            )?,
        };
        let log = self.log(number)?;
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let patience = Duration::from_secs(5);
            let ready = service.probe(host, patience) == Found::Ready
                && pages
                    .iter()
                    .all(|page| page.get(patience).is_some_and(|(status, _)| status == 200));
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
        // One that was not stopped, such as one that did not start, still has its containers.
        if let Some(project) = &self.setup.project
            && self.companion.is_some()
        {
            let _ = project.remove(Duration::ZERO);
        }
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
            // Who logs in, and with what right, is nobody else's business.
            .mode(0o600)
            .open(path)
            .with_context(|| format!("cannot write {}", path.display()))
    };
    let out = open()?;
    if fresh {
        out.set_len(0)?;
    }
    Ok((out.into(), open()?.into()))
}
