//! The same brokers in containers, for those who have an engine: `compose/compose.yaml`.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::Service;
use crate::services::Node;

/// Whether a Docker engine answers and the client has `docker compose`. The client alone is not enough.
pub(crate) fn answers() -> bool {
    let succeeds = |arguments: &[&str]| {
        Command::new("docker")
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    succeeds(&["info", "--format", "{{.ServerVersion}}"]) && succeeds(&["compose", "version"])
}

/// `docker compose` on the project's file with these arguments.
pub(crate) fn compose(arguments: &[&str]) -> Command {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("compose.yaml");
    let mut command = Command::new("docker");
    command
        .args([
            "compose",
            "--project-name",
            "messaging-lab",
            "--profile",
            "*",
            "--file",
        ])
        .arg(file);
    command.args(arguments);
    command
}

/// The service as a node whose process is `docker compose up`, which stops the container when it is stopped itself.
pub(crate) fn node(service: Service) -> Node {
    let facts = service.spec().facts();
    Node {
        number: 1,
        first: None,
        run: compose(&["up", "--no-log-prefix", service.name()]),
        host: format!("127.0.0.1:{}", facts.port),
        web: facts
            .web
            .map(|web| format!("http://127.0.0.1:{}", web.port)),
        secured: None,
        secured_web: None,
    }
}

/// `kill`, `pause`, `unpause` or `restart` of the service's container.
pub(crate) fn signal(service: Service, verb: &str) -> Result<()> {
    let output = compose(&[verb, service.name()])
        .output()
        .context("cannot run docker")?;
    if !output.status.success() {
        bail!(
            "docker compose {verb} {service} failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
