//! `lab run`: an example on the brokers it needs.
//!
//! Find the example, choose where each of its brokers comes from, obtain what is missing, start, watch.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::origin::Origin;
use super::owner::Owner;
use super::{build, interrupt};
use crate::Service;
use crate::broker::{Access, Wish};
use crate::home::Home;
use crate::security::User;
use crate::terminal::{page, say};
use crate::workspace::Workspace;

/// Builds the example, starts what it needs and is not there, runs it, and stops what was started.
///
/// The exit code is the example's.
pub(super) fn run(name: &str, args: &[String], release: bool) -> Result<ExitCode> {
    let interrupted = interrupt::catch()?;
    let workspace = Workspace::load()?;
    let example = workspace.find(name)?;
    // Whoever asks for help needs no broker, and no build either where the header is all the help there is.
    let help = args
        .first()
        .is_some_and(|arg| arg == "--help" || arg == "-h");
    if help && !example.parses_arguments()? {
        page(&example.description(workspace.root()))?;
        return Ok(ExitCode::SUCCESS);
    }

    let home = Home::from_env()?;
    let mut services: Vec<Service> = Vec::new();
    if !help {
        for service in &example.services {
            services.push(service.parse()?);
        }
    }
    // In the same order everywhere: while it waits for the second, this process keeps others from starting the first.
    services.sort();
    services.dedup();
    let mut origins = Vec::new();
    for service in services {
        origins.push((service, Origin::choose(&home, service)?));
    }

    // Fetching and building take a minute each the first time, and neither needs the other.
    let to_fetch: Vec<Service> = origins
        .iter()
        .filter(|(service, origin)| origin.is_to_fetch(&home, *service))
        .map(|(service, _)| *service)
        .collect();
    let fetches = !to_fetch.is_empty();
    let fetch_home = home.clone();
    let fetch = std::thread::spawn(move || {
        to_fetch
            .into_iter()
            .try_for_each(|service| service.spec().program().fetch(&fetch_home))
    });
    // If the build fails, this process ends, and the fetch with it.
    let program = build::build(&workspace, name, release, fetches)?;
    fetch
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;

    let owner = Owner::new(home.clone(), format!("run {name}"))?;
    let mut environment = Vec::new();
    // For a shell to read: how the application connects to a secured broker.
    let mut access = Vec::new();
    let mut mocked = false;
    for (service, mut origin) in origins {
        let secure = example.needs_secured(service);
        // That was minutes ago, if much had to be built.
        if !origin.holds(&home, service)? {
            origin = Origin::choose(&home, service)?;
        }
        if let Some(notice) = origin.notice(service) {
            say!("{notice}");
        }
        match origin {
            Origin::Variable(_) => {}
            Origin::Lab(entry) => {
                if let Some(mock) = service.spec().mock().filter(|_| entry.backend == "mock") {
                    say!("{}", mock.warning);
                    mocked = true;
                }
                if !entry.access.is_empty() {
                    say!("{service} is secured; {name} has the rights of the application");
                }
                if secure {
                    access.push(application(&entry.access).with_context(|| {
                        format!(
                            "{name} needs {service} with TLS, and the one that runs is without; \
                             `cargo lab down {service}` stops that, and `cargo lab up {service} --secure` starts another"
                        )
                    })?);
                }
                environment.extend(entry.env);
            }
            Origin::Port(address) if secure => bail!(
                "{name} needs {service} with TLS, and `lab` does not know how to log in at {address}; set {} and what \
                 else the header of {name} names, or stop what listens there",
                service.variable()
            ),
            Origin::Port(address) => environment.push((service.variable().to_owned(), address)),
            Origin::Start(backend, lease) => {
                let wish = Wish {
                    nodes: example.nodes,
                    fresh: false,
                    secure,
                };
                owner.start(service, backend, lease, wish)?;
                if secure {
                    let started = owner.access(service);
                    access.push(
                        application(&started).context("a secured broker says how to connect")?,
                    );
                }
            }
        }
    }
    mocked |= owner.has_mock();
    environment.extend(owner.env());
    if mocked {
        // For examples that word their report by it.
        environment.push(("LAB_MOCK".to_owned(), "1".to_owned()));
    }

    interrupt::attend();
    let mut command = with_access(&access, &program);
    command.args(args).envs(environment);
    owner.launch(name, &mut command)?;
    let mut interrupts = 0;
    let status = loop {
        if let Some(status) = owner.ended()? {
            break status;
        }
        if interrupted.recv_timeout(Duration::from_millis(20)) != Err(RecvTimeoutError::Timeout) {
            interrupts += 1;
            match interrupts {
                // In a terminal the Ctrl-C has reached the example too; a second one could mean "at once" to it.
                1 | 2 => owner.signal((!from_terminal()).then_some(Signal::SIGINT))?,
                _ => owner.signal(Some(Signal::SIGKILL))?,
            }
            if interrupts == 2 {
                say!("{name} is still ending; one more Ctrl-C kills it");
            }
        }
        owner.look()?;
    };
    owner.stop()?;
    if mocked {
        say!("that ran on a mock: what is not guaranteed is said above");
    }
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(code) => Ok(ExitCode::from(code)),
        None => {
            say!("{name} was ended by a signal ({status})");
            Ok(ExitCode::FAILURE)
        }
    }
}

/// The file that says how the application connects with TLS.
fn application(access: &[Access]) -> Option<String> {
    let name = User::Application.to_string();
    let access = access.iter().find(|one| one.name == name);
    access.map(|one| one.file.clone())
}

/// The program, in a shell that has read these files: a secret stands in none of them, but in a file of its own.
fn with_access(files: &[String], program: &Path) -> Command {
    if files.is_empty() {
        return Command::new(program);
    }
    let mut command = Command::new("/bin/sh");
    let script = r#"while [ "$1" != -- ]; do . "$1" || exit; shift; done; shift; exec "$@""#;
    command.args(["-c", script, "sh"]);
    command.args(files).arg("--").arg(program);
    command
}

/// Whether this process is in the foreground of a terminal, which sends a Ctrl-C to all of its group.
fn from_terminal() -> bool {
    let Ok(terminal) = std::fs::File::open("/dev/tty") else {
        return false;
    };
    nix::unistd::tcgetpgrp(&terminal).is_ok_and(|group| group == nix::unistd::getpgrp())
}
