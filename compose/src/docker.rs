//! The same brokers in containers, for those who have an engine: `compose/compose.yaml`.
//!
//! A node is a container, and its process here is `docker start --attach`, which lasts for as long as the container runs.
//! A kill of that process does not reach the container: what is done to a node is an order to the engine. So a guard runs
//! beside the nodes, and its watcher has the engine remove the containers if the owner is killed.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use sha1::{Digest, Sha1};

use crate::Service;
use crate::home::Home;
use crate::ports::Ports;
use crate::services::{Setup, choose_ports};
use crate::terminal::say;

/// The services that `compose.yaml` has as a cluster too, in a profile such as `kafka-cluster`, and its number of nodes.
const CLUSTERS: [Service; 2] = [Service::Kafka, Service::Nats];
const CLUSTER_NODES: u16 = 3;

/// Whether a Docker engine answers and the client has `docker compose`. The client alone is not enough.
pub(crate) fn answers() -> bool {
    let succeeds = |arguments: &[&str]| is_success(Command::new("docker").args(arguments));
    succeeds(&["info", "--format", "{{.ServerVersion}}"]) && succeeds(&["compose", "version"])
}

fn is_success(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null());
    quiet
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Runs it to its end. What it says is shown only if it fails.
fn run(command: &mut Command) -> Result<String> {
    let output = command.output().context("cannot run docker")?;
    if !output.status.success() {
        let arguments = command
            .get_args()
            .map(|argument| argument.to_string_lossy());
        bail!(
            "`docker {}` failed: {}",
            arguments.collect::<Vec<_>>().join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `docker compose` with the file that has all services, of which it sees those in this profile.
fn compose(profile: &str) -> Command {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("compose.yaml");
    let mut command = Command::new("docker");
    command.args(["compose", "--profile", profile, "--file"]);
    command.arg(file);
    // With that, containers are named in another way.
    command.env_remove("COMPOSE_COMPATIBILITY");
    command
}

/// Has the engine fetch the service's image, if it lacks it.
pub(crate) fn pull(service: Service) -> Result<()> {
    let images = run(compose(service.name()).args(["config", "--images"]))?;
    let inspect = ["image", "inspect"];
    if is_success(Command::new("docker").args(inspect).args(images.lines())) {
        return Ok(());
    }
    say!("fetching the image {}…", images.trim());
    let mut pull = compose(service.name());
    let status = pull.arg("pull").stdin(Stdio::null()).status();
    ensure!(
        status.context("cannot run docker")?.success(),
        "docker could not fetch the image {}",
        images.trim()
    );
    Ok(())
}

/// A service's containers and their network. Each service is a project of its own for Compose: no two share a network,
/// which one of them would take from under the other.
#[derive(Debug)]
pub(crate) struct Project {
    name: String,
    /// The names of the nodes in `compose.yaml`.
    nodes: Vec<String>,
}

impl Project {
    fn new(service: Service, home: &Home, count: u16) -> Project {
        // One per user and `LAB_HOME`, as is the right to run the service: whatever has this name is ours.
        let digest = Sha1::digest(home.run().as_os_str().as_encoded_bytes());
        let digest: String = digest.iter().take(4).map(|b| format!("{b:02x}")).collect();
        Project {
            name: format!("messaging-lab-{service}-{digest}"),
            nodes: match count {
                1 => vec![service.to_string()],
                _ => (1..=count)
                    .map(|node| format!("{service}-{node}"))
                    .collect(),
            },
        }
    }

    fn compose(&self, profile: &str) -> Command {
        let mut command = compose(profile);
        command.args(["--project-name", &self.name]);
        command
    }

    /// Stops the containers, gracefully for this long, and removes all that there is of them, and the network.
    pub(crate) fn removal(&self, grace: Duration) -> Command {
        // All profiles: a cluster may have been left behind where one node is wanted now.
        let mut command = self.compose("*");
        command.args(["down", "--volumes", "--remove-orphans", "--timeout"]);
        command.arg(grace.as_secs().to_string());
        command
    }

    /// Carries out a [`Project::removal`].
    pub(crate) fn remove(&self, grace: Duration) -> Result<()> {
        run(&mut self.removal(grace)).map(drop)
    }

    /// `kill`, `pause`, `unpause` or `stop` of one node, with options.
    pub(crate) fn order(&self, order: &[&str], node: u16) -> Result<()> {
        let container = self.container(node);
        run(Command::new("docker").args(order).arg(container)).map(drop)
    }

    /// As Compose names it.
    fn container(&self, node: u16) -> String {
        format!("{}-{}-1", self.name, self.nodes[usize::from(node) - 1])
    }
}

/// The nodes as containers. What an earlier run has left behind is removed.
pub(crate) fn set_up(service: Service, home: &Home, count: u16, ports: Ports) -> Result<Setup> {
    let clusters = CLUSTERS.map(Service::name).join(" and ");
    ensure!(
        count == 1 || (count == CLUSTER_NODES && CLUSTERS.contains(&service)),
        "in Docker, {service} does not run on {count} nodes: {clusters} run on 1 or {CLUSTER_NODES}, all others on 1"
    );
    let project = Project::new(service, home, count);
    project.remove(Duration::ZERO)?;
    let (ports, claims) = choose_ports(service, count, ports)?;
    let mut create = match count {
        1 => project.compose(service.name()),
        _ => project.compose(&format!("{service}-cluster")),
    };
    create.arg("create");
    let mut nodes = Vec::new();
    for ports in &ports {
        for (kind, port) in [("PORT", ports.client), ("WEB", ports.web)] {
            let name = service.name().to_uppercase();
            create.env(
                format!("LAB_{name}_{kind}_{}", ports.number),
                port.to_string(),
            );
        }
        let mut attach = Command::new("docker");
        attach.args(["start", "--attach", &project.container(ports.number)]);
        nodes.push(ports.node(attach));
    }
    // All containers at once: several clients at a time would make several networks of the same name.
    nodes[0].first = Some(create);
    Ok(Setup {
        // The guard, which does no more than wait for its input to end.
        companion: Some(Command::new("cat")),
        project: Some(project),
        claims,
        ..Setup::of(nodes, Some(service.version()))
    })
}
