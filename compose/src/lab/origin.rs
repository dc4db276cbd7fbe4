//! Where a broker comes from: one that is there already, else native, else Docker, else a mock.

use std::env;
use std::time::Duration;

use anyhow::{Result, bail};

use super::build;
use super::running::{self, Entry, Lease};
use crate::broker::{Backend, Broker, Wish};
use crate::home::Home;
use crate::ports::Ports;
use crate::probe::Found;
use crate::services::names;
use crate::terminal::say;
use crate::workspace::Workspace;
use crate::{Service, docker};

/// How long another `lab` may take to fetch and start what this one needs too.
pub(super) const OTHERS_START: Duration = Duration::from_secs(600);

/// Where the broker of a service comes from.
pub(super) enum Origin {
    /// The environment variable says where it is.
    Variable(String),
    /// Another `lab` of this user runs it.
    Lab(Box<Entry>),
    /// Something that speaks the service's protocol listens on the usual port.
    Port(String),
    /// This process is to start it. The lease keeps others from doing so meanwhile.
    Start(Backend, Lease),
}

impl Origin {
    /// Looks for a broker that runs already, and if there is none, for what it can run on. A forced backend accepts only
    /// a broker of that kind that a `lab` runs.
    pub(super) fn choose(home: &Home, service: Service) -> Result<Origin> {
        let forced = forced()?;
        let variable = env::var(service.variable()).unwrap_or_default();
        if forced.is_none() && !variable.is_empty() {
            return Ok(Origin::Variable(variable));
        }
        loop {
            if running::find(home, service)?.is_none() && running::is_owned(home, service)? {
                say!("waiting for another `cargo lab`, which starts or stops {service}…");
            }
            if let Some(entry) = running::await_entry(home, service, OTHERS_START)? {
                if let Some(wanted) = forced
                    && entry.backend != wanted.to_string()
                {
                    bail!(
                        "{service} already runs, but on the {} backend and not on {wanted}; \
                         stop it with `cargo lab down {service}`",
                        entry.backend
                    );
                }
                return Ok(Origin::Lab(Box::new(entry)));
            }
            if forced.is_none()
                && let Some(address) = find_running(service)?
            {
                return Ok(Origin::Port(address));
            }
            // Else another `lab` was faster by a moment.
            if let Some(lease) = Lease::of_service(home, service)? {
                return Ok(Origin::Start(choose_backend(home, service, forced)?, lease));
            }
        }
    }

    /// Whether this is still so. Others stop their brokers when they like.
    pub(super) fn holds(&self, home: &Home, service: Service) -> Result<bool> {
        Ok(match self {
            Origin::Variable(_) | Origin::Start(..) => true,
            Origin::Lab(entry) => {
                running::find(home, service)?.is_some_and(|now| now.owner == entry.owner)
            }
            Origin::Port(_) => find_running(service)?.is_some(),
        })
    }

    /// What a user has to know beforehand of a broker that runs already.
    pub(super) fn notice(&self, service: Service) -> Option<String> {
        match self {
            Origin::Lab(entry) if entry.command.starts_with("run ") => Some(format!(
                "{service}: this is the one of `cargo lab {}`, and it stops with that",
                entry.command
            )),
            Origin::Port(address) => Some(format!(
                "{service}: using the one that listens at {address}"
            )),
            Origin::Lab(_) | Origin::Variable(_) | Origin::Start(..) => None,
        }
    }

    /// The address of one that runs already, in the form of the service's environment variable.
    pub(super) fn address(&self) -> Option<&str> {
        match self {
            Origin::Variable(address) | Origin::Port(address) => Some(address),
            Origin::Lab(entry) => Some(entry.address()),
            Origin::Start(..) => None,
        }
    }

    /// Whether programs have to be fetched for it.
    pub(super) fn is_to_fetch(&self, home: &Home, service: Service) -> bool {
        let is_native = matches!(self, Origin::Start(Backend::Native, _));
        is_native
            && !service
                .spec()
                .program()
                .parts(home)
                .iter()
                .all(|part| part.is_here())
    }
}

/// `LAB_BACKEND`, if set.
fn forced() -> Result<Option<Backend>> {
    match env::var("LAB_BACKEND").unwrap_or_default().as_str() {
        "" => Ok(None),
        "native" => Ok(Some(Backend::Native)),
        "docker" => Ok(Some(Backend::Docker)),
        "mock" => Ok(Some(Backend::Mock)),
        other => bail!("LAB_BACKEND is '{other}'; it can be native, docker or mock"),
    }
}

fn choose_backend(home: &Home, service: Service, forced: Option<Backend>) -> Result<Backend> {
    let mock = service.spec().mock();
    match forced {
        Some(Backend::Mock) if mock.is_none() => bail!(
            "there is no mock of {service}, only of {}; unset LAB_BACKEND or set it to native",
            names(|spec| spec.mock().is_some())
        ),
        Some(Backend::Docker) if !docker::answers() => bail!(
            "LAB_BACKEND is docker, but no Docker engine answers; start it, or unset LAB_BACKEND"
        ),
        Some(backend) => return Ok(backend),
        None => {}
    }
    let parts = service.spec().program().parts(home);
    let missing: Vec<String> = parts
        .iter()
        .filter_map(|part| Some(part.missing()?.to_string()))
        .collect();
    if missing.is_empty() {
        return Ok(Backend::Native);
    }
    let missing = missing.join("; ");
    if docker::answers() {
        say!("{service}: {missing}; using Docker");
        return Ok(Backend::Docker);
    }
    if mock.is_some() {
        say!("{service}: {missing}, and no Docker engine answers");
        return Ok(Backend::Mock);
    }
    bail!(
        "{service} cannot run here: {missing}; and no Docker engine answers. See `cargo lab doctor`"
    )
}

/// The address of a broker on the usual port that no `lab` started.
pub(super) fn find_running(service: Service) -> Result<Option<String>> {
    let Ports::From(port) = Ports::from_env(service)? else {
        return Ok(None);
    };
    let host = format!("127.0.0.1:{port}");
    let found = service.probe(&host, Duration::from_secs(2));
    Ok((found == Found::Ready).then(|| service.address(&[host])))
}

/// Brings the service's programs onto the machine, if need be.
pub(super) fn obtain(home: &Home, service: Service, backend: Backend) -> Result<()> {
    match backend {
        Backend::Native => service.spec().program().fetch(home),
        Backend::Docker => docker::pull(service),
        Backend::Mock => Ok(()),
    }
}

/// Starts the service on the usual ports.
pub(super) fn start(home: &Home, service: Service, backend: Backend, wish: Wish) -> Result<Broker> {
    if wish.secure && backend != Backend::Native {
        bail!("{service} is secured natively only, not on the {backend} backend");
    }
    if wish.nodes > 1 && backend == Backend::Mock {
        bail!("several nodes run natively or in Docker, not on the {backend} backend");
    }
    match (backend, service.spec().mock()) {
        (Backend::Native, _) => Broker::shared(service, home, wish),
        (Backend::Docker, _) => Broker::docker(service, home, wish.nodes),
        (Backend::Mock, Some(mock)) => {
            let program = build::build(&Workspace::load()?, mock.example, false, false)?;
            let broker = Broker::mock(service, &program, home)?;
            say!("{}", mock.warning);
            Ok(broker)
        }
        (Backend::Mock, None) => bail!("there is no mock of {service}"),
    }
}
