//! `lab status` and `lab logs`: what runs, where, and what it says.

use std::fmt::Write as _;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::orders::{Target, numbered};
use super::origin::find_running;
use super::running::{self, Run};
use crate::Service;
use crate::broker::log_path;
use crate::home::Home;
use crate::security::without_password;
use crate::terminal::page;

pub(super) fn status() -> Result<()> {
    let home = Home::from_env()?;
    let mut text = String::new();
    for service in Service::ALL {
        if let Some(entry) = running::find(&home, service)? {
            let version = entry
                .version
                .map_or(String::new(), |version| format!(" {version}"));
            writeln!(
                text,
                "{service:10}  {}{version} (lab {}, process {})",
                entry.backend, entry.command, entry.owner
            )?;
            for (name, value) in &entry.env {
                let value = without_password(value);
                writeln!(text, "            {name}={value}")?;
            }
            for access in &entry.access {
                let file = &access.file;
                writeln!(text, "            {}: . '{file}'", access.title)?;
            }
            for node in &entry.nodes {
                let pid = node
                    .pid
                    .map_or(String::new(), |pid| format!(", process {pid}"));
                let log = node.log.display();
                writeln!(
                    text,
                    "            node {}: {}{pid}, log {log}",
                    node.number, node.state
                )?;
            }
        } else if let Some(address) = find_running(service)? {
            writeln!(text, "{service:10}  {address} (not started by `lab`)")?;
        } else if running::is_owned(&home, service)? {
            writeln!(text, "{service:10}  starting or stopping")?;
        } else {
            writeln!(text, "{service:10}  -")?;
        }
    }
    let runs = running::runs(&home)?;
    if !runs.is_empty() {
        writeln!(text, "\nexamples")?;
    }
    for run in runs {
        let Run { state, pid, .. } = &run;
        write!(text, "  {}: {state}, process {pid}", numbered(&run))?;
        // They tell the stages of a scenario apart.
        if !run.args.is_empty() {
            write!(text, ", arguments: {}", run.args.join(" "))?;
        }
        text.push('\n');
    }
    page(&text)
}

pub(super) fn logs(target: Target, lines: usize, follow: bool) -> Result<()> {
    let home = Home::from_env()?;
    let path = match running::find(&home, target.service)? {
        Some(entry) => {
            let node = entry
                .nodes
                .into_iter()
                .find(|node| node.number == target.node);
            node.with_context(|| format!("{} has no node {}", target.service, target.node))?
                .log
        }
        // What a broker said last is wanted most when it has gone.
        None => log_path(&home.logs(), target.service, target.node),
    };
    if !path.exists() {
        bail!(
            "{} has not run yet: there is no {}",
            target.service,
            path.display()
        );
    }
    let mut tail = Command::new("tail");
    tail.args(["-n", &lines.to_string()]);
    if follow {
        tail.arg("-f");
    }
    let status = tail.arg(&path).status().context("cannot run `tail`")?;
    // `tail` is ended by a signal when the reader of a pipe has left.
    if status.code().is_some_and(|code| code != 0) && !follow {
        bail!("`tail {}` failed", path.display());
    }
    Ok(())
}
