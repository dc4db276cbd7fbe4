//! `lab doctor`: what this machine has, and what is missing.

use std::fmt::Write as _;
use std::process::{Command, ExitCode, Stdio};

use anyhow::Result;

use crate::fetch::{Advice, Part};
use crate::home::Home;
use crate::terminal::page;
use crate::{Service, docker};

/// Exits with an error if a program that every build takes is missing, or some broker cannot run here at all.
pub(super) fn doctor() -> Result<ExitCode> {
    let home = Home::from_env()?;
    let mut text = format!("brokers are kept in {}\n\n", home.root().display());
    let mut healthy = true;

    for (program, why) in [
        ("cc", "builds librdkafka and SQLite"),
        ("make", "builds librdkafka"),
    ] {
        let found = runs(program);
        healthy &= found;
        writeln!(
            text,
            "{program:10}  {} ({why})",
            if found { "found" } else { "MISSING" }
        )?;
    }
    let engine = docker::answers();
    let engine_text = if engine {
        "an engine answers"
    } else {
        "no engine answers (not needed)"
    };
    writeln!(text, "{:10}  {engine_text}\n", "docker")?;

    let mut advice: Vec<String> = Vec::new();
    for service in Service::ALL {
        let spec = service.spec();
        let parts = spec.program().parts(&home);
        let missing: Vec<_> = parts.iter().filter_map(Part::missing).collect();
        let verdict = if missing.is_empty() && parts.iter().all(|part| part.is_here()) {
            "ready"
        } else if missing.is_empty() {
            "will be fetched at first use"
        } else if engine {
            "will run in Docker"
        } else if spec.mock().is_some() {
            "will be a mock"
        } else {
            healthy = false;
            "CANNOT RUN HERE"
        };
        writeln!(text, "{service:10}  {verdict}")?;
        // A program of the machine's own may be of another version.
        let version = match parts.last() {
            Some(part) if part.is_of_machine() => String::new(),
            _ => format!("{}: ", service.version()),
        };
        let parts: Vec<_> = parts.iter().map(ToString::to_string).collect();
        writeln!(text, "            {version}{}", parts.join(", "))?;
        for line in missing.iter().map(Advice::to_string) {
            if !advice.contains(&line) {
                advice.push(line);
            }
        }
    }
    if !advice.is_empty() {
        writeln!(text, "\nTo install:")?;
        for line in advice {
            writeln!(text, "  {line}")?;
        }
    }
    page(&text)?;
    Ok(if healthy {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn runs(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
