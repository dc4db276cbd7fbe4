//! Where a broker comes from: one that is there already, else native, else Docker, else (Kafka) the mock.

use std::env;
use std::time::Duration;

use anyhow::{Result, bail};
use compose::broker::Backend;
use compose::home::Home;
use compose::recipe::Ports;
use compose::registry::{self, Entry};
use compose::workspace::Workspace;
use compose::{Broker, Service, docker, fetch, probe, recipe};

use crate::build;
use crate::say::say;

/// How long another `lab` may take to fetch and start what this one needs too.
const OTHERS_START: Duration = Duration::from_secs(600);

/// A broker that need not be started.
pub enum Found {
    /// The environment variable says where.
    Variable(String),
    /// Another `lab` of this user runs it.
    Lab(Box<Entry>),
    /// Something that speaks the service's protocol listens on the default port.
    Port(String),
}

impl Found {
    /// In the form of the service's environment variable.
    pub fn address(&self) -> &str {
        match self {
            Found::Variable(address) | Found::Port(address) => address,
            Found::Lab(entry) => entry.env.first().map_or("", |(_, address)| address),
        }
    }
}

/// `LAB_BACKEND`, if set.
pub fn forced() -> Result<Option<Backend>> {
    let Ok(name) = env::var("LAB_BACKEND") else {
        return Ok(None);
    };
    match name.as_str() {
        "" => Ok(None),
        "native" => Ok(Some(Backend::Native)),
        "docker" => Ok(Some(Backend::Docker)),
        "mock" => Ok(Some(Backend::Mock)),
        other => bail!("LAB_BACKEND is '{other}'; it can be native, docker or mock"),
    }
}

/// Looks for a broker that runs already. A forced backend accepts only one of that kind that a `lab` runs.
pub fn find(home: &Home, service: Service) -> Result<Option<Found>> {
    let forced = forced()?;
    let variable = env::var(service.variable())
        .ok()
        .filter(|address| !address.is_empty());
    if let (Some(address), None) = (&variable, forced) {
        return Ok(Some(Found::Variable(address.clone())));
    }
    if registry::find(home, service)?.is_none() && registry::is_owned(home, service)? {
        say!("waiting until another `cargo lab` has started {service}…");
    }
    if let Some(entry) = registry::await_entry(home, service, OTHERS_START)? {
        if let Some(wanted) = forced
            && entry.backend != wanted.to_string()
        {
            bail!(
                "{service} already runs, but on the {} backend and not on {wanted}; \
                 stop it with `cargo lab down {service}`",
                entry.backend
            );
        }
        return Ok(Some(Found::Lab(Box::new(entry))));
    }
    if forced.is_some() {
        Ok(None)
    } else {
        Ok(find_running(service)?.map(Found::Port))
    }
}

/// The backend on which the service is to be started.
pub fn choose(home: &Home, service: Service) -> Result<Backend> {
    match forced()? {
        Some(Backend::Mock) if service != Service::Kafka => {
            bail!(
                "there is no mock of {service}, only of kafka; unset LAB_BACKEND or set it to native"
            )
        }
        Some(Backend::Docker) if !docker::answers() => {
            bail!(
                "LAB_BACKEND is docker, but no Docker engine answers; start it, or unset LAB_BACKEND"
            )
        }
        Some(backend) => return Ok(backend),
        None => {}
    }
    let plan = fetch::plan(home, service.name());
    if plan.missing().is_empty() {
        return Ok(Backend::Native);
    }
    if docker::answers() {
        say!("{service}: {}; using Docker", plan.missing().join("; "));
        return Ok(Backend::Docker);
    }
    if service == Service::Kafka {
        say!(
            "kafka: {}, and no Docker engine answers",
            plan.missing().join("; ")
        );
        return Ok(Backend::Mock);
    }
    bail!(
        "{service} cannot run here: {}; and no Docker engine answers. See `cargo lab doctor`",
        plan.missing().join("; ")
    )
}

/// Brings the program onto the machine if the service is to run natively and has not been fetched.
pub fn fetch(home: &Home, service: Service) -> Result<()> {
    if choose(home, service)? == Backend::Native {
        recipe::fetch(service, home)?;
    }
    Ok(())
}

/// The address of a broker on the usual port that no `lab` started.
pub fn find_running(service: Service) -> Result<Option<String>> {
    let Ports::From(port) = Ports::from_env(service)? else {
        return Ok(None);
    };
    let address = format!("127.0.0.1:{port}");
    let found = probe::probe(service, &address, Duration::from_secs(2));
    Ok((found == probe::Found::Ready).then(|| service.address(&[address])))
}

/// Starts the service on the default ports.
pub fn start(
    home: &Home,
    service: Service,
    backend: Backend,
    nodes: u16,
    fresh: bool,
) -> Result<Broker> {
    if nodes > 1 && backend != Backend::Native {
        bail!("several nodes run natively only, not on the {backend} backend");
    }
    match backend {
        Backend::Native => Broker::shared(service, home, nodes, fresh),
        Backend::Docker => Broker::docker(service, home),
        Backend::Mock => {
            let program = build::build(&Workspace::load()?, "kafka_mock_cluster", false, false)?;
            let broker = Broker::mock(&program, home)?;
            say!("{MOCK_WARNING}");
            Ok(broker)
        }
    }
}

/// What every user of the mock has to know.
pub const MOCK_WARNING: &str = "\
kafka: this is librdkafka's MOCK cluster, not Apache Kafka. What it does not guarantee:
  - aborted transactions stay visible to read_committed consumers: no exactly-once
  - nothing is durable: all is in memory and gone when it ends
  - timestamps of records are not those of a broker; retention and compaction do not happen";
