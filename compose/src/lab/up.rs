//! `lab up`: brokers that are kept until Ctrl-C, or in the background until `lab down`.

use std::fs::File;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::origin::{OTHERS_START, Origin, obtain};
use super::owner::Owner;
use super::{interrupt, running};
use crate::Service;
use crate::broker::Wish;
use crate::files::tail;
use crate::home::Home;
use crate::security::without_password;
use crate::terminal::{out, say};

/// `lab up`: starts the services and keeps them until Ctrl-C, SIGTERM, or until all have been taken down.
pub(super) fn up(services: &[Service], wish: Wish, hold: bool) -> Result<()> {
    if hold {
        // A session of its own, so that closing the terminal does not take the brokers along.
        nix::unistd::setsid().context("cannot leave the terminal's session")?;
    }
    let interrupted = interrupt::catch()?;
    let command = if hold { "up --detach" } else { "up" };
    let home = Home::from_env()?;
    let owner = Owner::new(home.clone(), command.to_owned())?;
    for service in services {
        match Origin::choose(&home, *service)? {
            Origin::Start(backend, lease) => {
                obtain(&home, *service, backend)?;
                owner.start(*service, backend, lease, wish)?;
                out!(
                    "{service:10}  {}",
                    owner.describe(*service).unwrap_or_default()
                );
            }
            found => say_runs_already(*service, &found, wish)?,
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

/// Says where the one is that runs already. Whoever asks for empty storage, a cluster or a secured one must get that.
fn say_runs_already(service: Service, found: &Origin, wish: Wish) -> Result<()> {
    let entry = match found {
        Origin::Lab(entry) => Some(entry),
        _ => None,
    };
    let is_secured = entry.is_some_and(|entry| !entry.access.is_empty());
    if wish.nodes > 1 || wish.fresh || (wish.secure && !is_secured) {
        bail!(
            "{service} runs already; --nodes, --fresh and --secure need a start: \
             stop it first with `cargo lab down {service}`"
        );
    }
    match entry {
        Some(entry) => out!("{service:10}  (runs already) {}", entry.describe()),
        None => {
            let address = without_password(found.address().unwrap_or_default());
            out!("{service:10}  {address} (runs already)");
        }
    }
    if let Some(notice) = found.notice(service) {
        say!("{notice}");
    }
    Ok(())
}

/// `lab up --detach`: the same in a background process, from which this one returns as soon as all serve.
pub(super) fn detach(services: &[Service], wish: Wish) -> Result<ExitCode> {
    let interrupted = interrupt::catch()?;
    let home = Home::from_env()?;
    let mut wanted = Vec::new();
    for service in services {
        match Origin::choose(&home, *service)? {
            Origin::Start(backend, _lease) => {
                // That shows its progress, so it is done here.
                obtain(&home, *service, backend)?;
                wanted.push(*service);
            }
            found => say_runs_already(*service, &found, wish)?,
        }
    }
    if wanted.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let log = home.logs().join(format!("up-{}.log", std::process::id()));
    let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut command =
        Command::new(std::env::current_exe().context("cannot find this program's own file")?);
    command.args(["up", "--hold", "--nodes", &wish.nodes.to_string()]);
    command.args(wish.fresh.then_some("--fresh"));
    command.args(wish.secure.then_some("--secure"));
    let names: Vec<_> = wanted.iter().map(|service| service.name()).collect();
    command.args(&names);
    say!("starting {}…", names.join(", "));
    interrupt::attend();
    let mut holder = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .context("cannot start the background process")?;
    while !wanted.is_empty() {
        let ended = holder.try_wait()?;
        if let Some(status) = ended
            && !status.success()
        {
            bail!(
                "the background process ended ({status}):\n{}",
                tail(&log, 25)
            );
        }
        for service in std::mem::take(&mut wanted) {
            let entry = match ended {
                // It had nothing to start: another `lab` was faster by a moment.
                Some(_) => running::await_entry(&home, service, OTHERS_START)?,
                None => running::find(&home, service)?,
            };
            match entry {
                Some(entry) => out!("{service:10}  {}", entry.describe()),
                None if ended.is_some() => bail!("{service} was stopped as soon as it had started"),
                None => wanted.push(service),
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
