//! `lab run`: an example on the brokers it needs.

use std::process::{Command, ExitCode};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use anyhow::Result;
use compose::Service;
use compose::home::Home;
use compose::process::Supervised;
use compose::registry::Use;
use compose::workspace::Workspace;
use nix::sys::signal::Signal;

use crate::build;
use crate::ladder::{self, Found};
use crate::owner::{self, Owner};

/// Builds the example, starts what it needs and is not there, runs it, and stops what was started.
///
/// The exit code is the example's.
pub fn run(name: &str, args: &[String], release: bool) -> Result<ExitCode> {
    let interrupted = owner::interrupts()?;
    let home = Home::from_env()?;
    let workspace = Workspace::load()?;
    let example = workspace.find(name)?;
    let program = build::build(&workspace, name, release)?;

    let owner = Owner::new(home.clone(), false)?;
    let mut environment = Vec::new();
    let mut uses = Vec::new();
    let mut mocked = false;
    for service in &example.services {
        let service: Service = service.parse()?;
        match owner.start(service, example.nodes, false)? {
            None => {}
            Some(Found::Variable(_)) => {}
            Some(Found::Lab(entry)) => {
                uses.push(Use::of(&home, service)?);
                if entry.backend == "mock" {
                    eprintln!("{}", ladder::MOCK_WARNING);
                    mocked = true;
                }
                environment.extend(entry.env);
            }
            Some(Found::Port(address)) => {
                eprintln!("{service}: using the one that listens at {address}");
                environment.push((service.variable().to_owned(), address));
            }
        }
    }
    mocked |= owner.has_mock();
    environment.extend(owner.env());
    if mocked {
        // For examples that word their report by it.
        environment.push(("LAB_MOCK".to_owned(), "1".to_owned()));
    }

    owner::attend();
    let mut command = Command::new(&program);
    command.args(args).envs(environment);
    let mut process = Supervised::foreground(&mut command)?;
    let status = loop {
        if let Some(status) = process.try_wait()? {
            break status;
        }
        match interrupted.recv_timeout(Duration::from_millis(20)) {
            // In a terminal the Ctrl-C has reached the example too; a second one could mean "at once" to it.
            Ok(()) if !from_terminal() => process.signal(Signal::SIGINT)?,
            Ok(()) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break process.wait()?,
        }
        owner.look()?;
    };
    drop(uses);
    wait_for_others(&owner, &interrupted)?;
    owner.stop()?;
    if mocked {
        eprintln!("that ran on librdkafka's mock cluster: what is not guaranteed is said above");
    }
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    match code {
        Some(code) => Ok(ExitCode::from(code)),
        None => {
            eprintln!("{name} was ended by a signal ({status})");
            Ok(ExitCode::FAILURE)
        }
    }
}

/// Another `lab run` may have come to depend on what this one started.
fn wait_for_others(owner: &Owner, interrupted: &std::sync::mpsc::Receiver<()>) -> Result<()> {
    let mut said = false;
    loop {
        let used = owner.in_use()?;
        if used.is_empty() {
            return Ok(());
        }
        if !said {
            let names: Vec<_> = used.iter().map(ToString::to_string).collect();
            eprintln!(
                "{}: still used by another `lab run`; stops with it, or at once by Ctrl-C",
                names.join(", ")
            );
            said = true;
        }
        if !matches!(
            interrupted.recv_timeout(Duration::from_millis(100)),
            Err(RecvTimeoutError::Timeout)
        ) {
            return Ok(());
        }
    }
}

/// Whether this process is in the foreground of a terminal, which sends a Ctrl-C to all of its group.
fn from_terminal() -> bool {
    let Ok(terminal) = std::fs::File::open("/dev/tty") else {
        return false;
    };
    nix::unistd::tcgetpgrp(&terminal).is_ok_and(|group| group == nix::unistd::getpgrp())
}
