//! `lab doctor`: what this machine has, and what is missing.

use std::fmt::Write as _;
use std::process::{Command, ExitCode, Stdio};

use anyhow::Result;
use compose::home::Home;
use compose::{Service, docker, fetch};

/// Exits with an error if a program that every build takes is missing, or some broker cannot run here at all.
pub fn doctor() -> Result<ExitCode> {
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

    let mut advice = Vec::new();
    for service in Service::ALL {
        let plan = fetch::plan(&home, service.name());
        let missing: Vec<_> = plan.missing().into_iter().map(str::to_owned).collect();
        let verdict = match (missing.is_empty(), engine, service) {
            (true, _, _) if plan.is_ready() => "ready",
            (true, _, _) => "will be fetched at first use",
            (false, true, _) => "will run in Docker",
            (false, false, Service::Kafka) => "will be librdkafka's mock",
            (false, false, _) => {
                healthy = false;
                "CANNOT RUN HERE"
            }
        };
        writeln!(text, "{service:10}  {verdict}")?;
        writeln!(text, "            {plan}")?;
        for line in missing {
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
    crate::say::page(&text)?;
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
