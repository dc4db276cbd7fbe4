//! `lab run`: an example on the brokers it needs.

use std::process::{Command, ExitCode};
use std::sync::mpsc::RecvTimeoutError;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;
use compose::Service;
use compose::fetch;
use compose::home::Home;
use compose::registry::Use;
use compose::workspace::Workspace;
use nix::sys::signal::Signal;

use crate::ladder::{self, Found};
use crate::owner::Owner;
use crate::say::{page, say};
use crate::{build, interrupt};

/// Builds the example, starts what it needs and is not there, runs it, and stops what was started.
///
/// The exit code is the example's.
pub fn run(name: &str, args: &[String], release: bool) -> Result<ExitCode> {
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
    let mut services = Vec::new();
    if !help {
        for service in &example.services {
            services.push(service.parse()?);
        }
    }
    // Both take a minute the first time, and neither needs the other.
    let fetch = fetch_meanwhile(&home, &services);
    let program = build::build(&workspace, name, release, fetch.is_some())?;
    if let Some(fetch) = fetch {
        fetch
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    }

    let owner = Owner::new(home.clone(), false)?;
    let mut environment = Vec::new();
    let mut uses = Vec::new();
    let mut mocked = false;
    for service in services {
        match owner.start(service, example.nodes, false)? {
            None => {}
            Some(Found::Variable(_)) => {}
            Some(Found::Lab(entry)) => {
                uses.push(Use::of(&home, service)?);
                if entry.backend == "mock" {
                    say!("{}", ladder::MOCK_WARNING);
                    mocked = true;
                }
                environment.extend(entry.env);
            }
            Some(Found::Port(address)) => {
                say!("{service}: using the one that listens at {address}");
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

    interrupt::attend();
    let mut command = Command::new(&program);
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
    drop(uses);
    wait_for_others(&owner, &interrupted)?;
    owner.stop()?;
    if mocked {
        say!("that ran on librdkafka's mock cluster: what is not guaranteed is said above");
    }
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    match code {
        Some(code) => Ok(ExitCode::from(code)),
        None => {
            say!("{name} was ended by a signal ({status})");
            Ok(ExitCode::FAILURE)
        }
    }
}

/// Fetches what is missing of the brokers that will have to be started, on a thread of its own. If this process ends
/// first, the fetch ends with it.
fn fetch_meanwhile(home: &Home, services: &[Service]) -> Option<JoinHandle<Result<()>>> {
    let missing = |service: &&Service| {
        let plan = fetch::plan(home, service.name());
        plan.missing().is_empty() && !plan.is_ready()
    };
    let missing: Vec<Service> = services.iter().filter(missing).copied().collect();
    if missing.is_empty() {
        return None;
    }
    let home = home.clone();
    Some(std::thread::spawn(move || {
        for service in missing {
            if ladder::find(&home, service)?.is_none() {
                ladder::fetch(&home, service)?;
            }
        }
        Ok(())
    }))
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
            say!(
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
