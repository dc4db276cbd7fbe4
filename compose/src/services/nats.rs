//! nats-server with JetStream: one program, built by Go or packaged by Debian.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, anyhow, bail};
use nkeys::KeyPair;

use super::setup::{fill, variables};
use super::{Facts, Node, Program, Secured, Setup, Site, Spec, Web};
use crate::fetch::apt::{self, Packages};
use crate::fetch::{self, Part, Source, go};
use crate::home::Home;
use crate::ports;
use crate::probe::{Greeting, Page};
use crate::security::{self, BROKER, Security, User, make_once};
use crate::terminal::say;

pub(super) struct Nats;

const PROGRAM: &str = "nats-server";

const MODULE: go::Module = go::Module {
    program: PROGRAM,
    binary: PROGRAM,
    module: include_str!("../../nats/module"),
};

const PACKAGE: Packages = Packages {
    name: PROGRAM,
    label: PROGRAM,
    suite: None,
    candidates: &[PROGRAM],
    keep: |package, _| package == PROGRAM,
    finish: |root, _| match packaged_in(root) {
        program if fetch::is_program(&program) => Ok(()),
        program => bail!("the package holds no {}", program.display()),
    },
};

const ADVICE: fetch::Advice = fetch::Advice {
    program: PROGRAM,
    debian: "nats-server",
    fedora: "golang",
    brew: "nats-server",
};

impl Spec for Nats {
    fn facts(&self) -> Facts {
        Facts {
            name: "nats",
            title: "NATS",
            variable: "NATS_URL",
            port: 4222,
            web: Some(Web {
                variable: "NATS_MONITOR_URL",
                port: 8222,
            }),
            most_nodes: 5,
            // The one on which the nodes of a cluster talk.
            other_ports: 1,
            advertises: false,
            free_ports: ports::RANGE,
            // The server speaks first.
            greeting: Greeting::Handshake {
                ask: b"",
                answer: |bytes| bytes.starts_with(b"INFO {"),
            },
            secured: Some(Secured {
                port: None,
                web: None,
            }),
        }
    }

    fn address(&self, hosts: &[String]) -> String {
        let urls: Vec<_> = hosts.iter().map(|host| format!("nats://{host}")).collect();
        urls.join(",")
    }

    fn program(&self) -> &dyn Program {
        self
    }

    fn set_up(&self, site: &Site) -> Result<Setup> {
        let program = program(site.home)?;
        let (secured, routes_tls) = match site.security {
            Some(security) => secured(security)?,
            None => (String::new(), String::new()),
        };
        let routes: Vec<_> = site
            .nodes
            .iter()
            .map(|node| format!("\"nats://127.0.0.1:{}\"", node.others[0]))
            .collect();
        let mut nodes = Vec::new();
        for node in site.nodes {
            let folder = site.folder_of(node)?;
            let cluster = match site.nodes {
                [_] => String::new(),
                _ => format!(
                    "cluster {{\n  name: \"lab\"\n  listen: \"127.0.0.1:{}\"\n  routes: [{}]\n{routes_tls}}}",
                    node.others[0],
                    routes.join(", ")
                ),
            };
            let values = [
                ("node", node.number.to_string()),
                ("port", node.client.to_string()),
                ("web_port", node.web.to_string()),
                ("data", folder.join("data").display().to_string()),
                ("cluster", cluster),
                ("secured", secured.clone()),
            ];
            let conf = folder.join("server.conf");
            // If it is secured, there are passwords in it.
            security::write(
                &conf,
                &fill(include_str!("../../nats/server.conf"), &values)?,
            )?;
            let mut run = Command::new(&program);
            run.arg("-c").arg(conf);
            nodes.push(node.node(run));
        }
        let is_ours = MODULE
            .installed(site.home)
            .is_some_and(|ours| ours == program);
        Ok(Setup::of(nodes, is_ours.then(|| self.version())))
    }

    fn health(&self, _host: &str, web: &str, _security: Option<&Security>) -> Result<Vec<Page>> {
        Ok(vec![Page::of(format!("{web}/healthz"))])
    }

    /// The names are those of the `nats` command.
    fn secured_env(
        &self,
        nodes: &[Node],
        security: &Security,
        user: User,
    ) -> Result<Vec<(String, String)>> {
        let urls: Vec<_> = nodes
            .iter()
            .filter_map(|node| Some(format!("tls://{}", node.secured.as_ref()?)))
            .collect();
        let env = [
            (self.facts().variable, urls.join(",")),
            ("NATS_USER", user.to_string()),
            ("NATS_PASSWORD", security.password(user)?),
            ("NATS_CA", security.ca()),
        ];
        Ok(variables(env))
    }
}

impl Program for Nats {
    fn version(&self) -> String {
        MODULE.version()
    }

    fn parts(&self, home: &Home) -> Vec<Part> {
        let source = if let Some(program) = fetch::which(PROGRAM) {
            Source::Machine(program)
        } else if let Some(program) = MODULE.installed(home) {
            Source::Cache(program)
        } else if fetch::which("go").is_some() {
            Source::Go
        } else {
            PACKAGE.source(home, ADVICE)
        };
        vec![Part::new(PROGRAM, source)]
    }

    fn fetch(&self, home: &Home) -> Result<()> {
        program(home).map(drop)
    }
}

/// The subjects of the examples, by their first word.
const SUBJECTS: [&str; 20] = [
    "ack-kinds",
    "async-publish",
    "dedup",
    "drain",
    "event-bus",
    "events",
    "headers",
    "idempotent",
    "jobs",
    "order-flow",
    "orders",
    "partitions",
    "quotes",
    "reconnect",
    "replay",
    "retry",
    "rpc",
    "slow",
    "text",
    "work-queue",
];

/// What a secured server's configuration has besides, and what the part on its cluster has.
fn secured(security: &Security) -> Result<(String, String)> {
    let seed = security.path("application.seed");
    make_once(&seed, |new| {
        let seed = KeyPair::new_user().seed();
        security::write(new, &seed.map_err(|error| anyhow!("no nkey: {error}"))?)
    })?;
    let nkey = KeyPair::from_seed(&security.secret("application.seed")?)
        .map_err(|error| anyhow!("{seed} holds no nkey: {error}"))?;
    let subjects: Vec<_> = SUBJECTS
        .iter()
        .map(|subject| format!("\"{subject}.>\""))
        .collect();
    let values = [
        ("certificate", security.certificate(BROKER)),
        ("key", security.key(BROKER)),
        ("administrator", security.password(User::Administrator)?),
        ("application", security.password(User::Application)?),
        ("nkey", nkey.public_key()),
        ("subjects", subjects.join(", ")),
    ];
    let routes = [
        ("certificate", security.certificate(BROKER)),
        ("key", security.key(BROKER)),
        ("ca", security.ca()),
    ];
    Ok((
        fill(include_str!("../../nats/secured.conf"), &values)?,
        fill(include_str!("../../nats/routes.conf"), &routes)?,
    ))
}

/// The one on PATH, else the one that Go builds, else Debian's.
fn program(home: &Home) -> Result<PathBuf> {
    if let Some(program) = fetch::which(PROGRAM).or_else(|| MODULE.installed(home)) {
        return Ok(program);
    }
    let packaged = || Ok(packaged_in(&PACKAGE.install(home)?));
    match fetch::which("go") {
        Some(go) => MODULE.install(home, &go).or_else(|error| {
            // A Go that is too old cannot build it.
            let is_old = ["requires go", "toolchain"]
                .iter()
                .any(|word| fetch::says(&error, word));
            if !is_old || !apt::available() {
                return Err(error);
            }
            say!("{error:#}\ntaking Debian's {PROGRAM} instead");
            packaged()
        }),
        None if apt::available() => packaged(),
        None => bail!("{ADVICE}"),
    }
}

fn packaged_in(root: &Path) -> PathBuf {
    let folders = ["usr/sbin", "usr/bin"].map(|folder| root.join(folder).join(PROGRAM));
    let found = folders.iter().find(|program| program.exists());
    found.unwrap_or(&folders[1]).clone()
}
