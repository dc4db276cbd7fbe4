//! Apache Pulsar standalone: jars by Maven, and one JVM per node. Each node is a cluster of its own, for replication
//! from one to the next.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::jvm::Jvm;
use super::setup::{fill, write};
use super::{Behind, Facts, Grant, Node, NodePorts, Program, Secured, Setup, Site, Spec, Web};
use crate::fetch::maven::Jars;
use crate::ports;
use crate::probe::{Greeting, Page};
use crate::security::{self, BROKER, Security, User, make_once};

pub(super) struct Pulsar;

const JARS: Jars = Jars::of_pom("pulsar", include_str!("../../pulsar/pom.xml"));

impl Spec for Pulsar {
    fn facts(&self) -> Facts {
        Facts {
            name: "pulsar",
            title: "Pulsar",
            variable: "PULSAR_ADDRESS",
            port: 6650,
            web: Some(Web {
                variable: ADMIN_VARIABLE,
                port: 8080,
            }),
            most_nodes: 5,
            // The bookie's.
            other_ports: 1,
            advertises: true,
            free_ports: ports::RANGE,
            // CONNECT with client version "lab" and protocol version 15, answered by CONNECTED (3).
            greeting: Greeting::Handshake {
                ask: &[
                    0, 0, 0, 15, 0, 0, 0, 11, 0x08, 2, 0x12, 7, 0x0a, 3, b'l', b'a', b'b', 0x20, 15,
                ],
                answer: |bytes| bytes.len() >= 10 && bytes[8..10] == [0x08, 3],
            },
            secured: Some(Secured {
                port: Some(6651),
                web: Some(8443),
            }),
        }
    }

    fn address(&self, hosts: &[String]) -> String {
        format!("pulsar://{}", hosts[0])
    }

    fn program(&self) -> &dyn Program {
        &JARS
    }

    fn set_up(&self, site: &Site) -> Result<Setup> {
        let jvm = Jvm::fetch(site.home, &JARS)?.archiving(site.folder);
        let nodes = site.nodes.iter().map(|node| standalone(&jvm, site, node));
        let nodes: Vec<Node> = nodes.collect::<Result<_>>()?;
        let mut grants = Vec::new();
        if let Some(security) = site.security {
            let token = security.secret(&token_file(User::Administrator))?;
            for web in nodes.iter().filter_map(|node| node.web.as_ref()) {
                let user = User::Application;
                let url = format!("{web}/admin/v2/namespaces/{NAMESPACE}/permissions/{user}");
                let actions = json!(["produce", "consume"]);
                grants.push(Grant::Post(Page::bearer(url, &token), actions.to_string()));
            }
        }
        Ok(Setup {
            grants,
            ..jvm.set_up(nodes)
        })
    }

    /// The broker is there before the namespace is that all examples use.
    fn health(&self, _host: &str, web: &str, security: Option<&Security>) -> Result<Vec<Page>> {
        let paths = [
            "brokers/health".to_owned(),
            format!("persistent/{NAMESPACE}"),
        ];
        let pages = paths.map(|path| {
            let url = format!("{web}/admin/v2/{path}");
            Ok(match security {
                Some(security) => {
                    Page::bearer(url, &security.secret(&token_file(User::Administrator))?)
                }
                None => Page::of(url),
            })
        });
        pages.into_iter().collect()
    }

    /// There are no usual names.
    fn secured_env(
        &self,
        nodes: &[Node],
        security: &Security,
        user: User,
    ) -> Result<Vec<(String, String)>> {
        let mut variables = vec![
            (
                "PULSAR_TOKEN".to_owned(),
                security.secret(&token_file(user))?,
            ),
            ("PULSAR_CA".to_owned(), security.ca()),
        ];
        for (node, ending) in nodes.iter().zip(endings()) {
            let address = node.secured.as_deref().unwrap_or_default();
            let admin = node.secured_web.clone().unwrap_or_default();
            let name = self.facts().variable;
            variables.push((format!("{name}{ending}"), format!("pulsar+ssl://{address}")));
            variables.push((format!("{ADMIN_VARIABLE}{ending}"), admin));
        }
        Ok(variables)
    }

    /// A client takes one address, so the second cluster is in `PULSAR_ADDRESS_B` and `PULSAR_ADMIN_URL_B`, a third in
    /// `…_C`.
    fn env(&self, nodes: &[Node], _security: Option<&Security>) -> Result<Vec<(String, String)>> {
        let mut variables = Vec::new();
        for (node, ending) in nodes.iter().zip(endings()) {
            let address = self.address(std::slice::from_ref(&node.host));
            variables.push((format!("{}{ending}", self.facts().variable), address));
            if let Some(url) = node.web.clone() {
                variables.push((format!("{ADMIN_VARIABLE}{ending}"), url));
            }
        }
        Ok(variables)
    }
}

const ADMIN_VARIABLE: &str = "PULSAR_ADMIN_URL";

/// The one that all examples use, and the only one in which the application of a secured service may do anything.
const NAMESPACE: &str = "public/default";

/// Of the variables of the first node, the second, the third…
fn endings() -> impl Iterator<Item = String> {
    std::iter::once(String::new()).chain(('B'..='Z').map(|c| format!("_{c}")))
}

fn token_file(user: User) -> String {
    format!("{user}.token")
}

/// What a secured node's configuration has besides.
fn secured(jvm: &Jvm, folder: &Path, node: &NodePorts, security: &Security) -> Result<String> {
    let Some(ports) = &node.secured else {
        return Ok(String::new());
    };
    let key = security.path("pulsar.key");
    make_once(&key, |new| security::write(new, &security::random_word()?))?;
    for user in User::ALL {
        make_once(security.path(&token_file(user)), |new| {
            security::write(new, &token(jvm, folder, &key, user)?)
        })?;
    }
    let values = [
        ("port", ports.client.to_string()),
        ("web_port", ports.web.to_string()),
        ("certificate", security.certificate(BROKER)),
        ("key", security.key(BROKER)),
        ("ca", security.ca()),
        ("secret_key", key.clone()),
        ("token", security.path(&token_file(User::Administrator))),
    ];
    fill(include_str!("../../pulsar/secured.conf"), &values)
}

/// Made by Pulsar's own tool, which is told the key by its file.
fn token(jvm: &Jvm, folder: &Path, key: &str, user: User) -> Result<String> {
    let mut command = jvm.command(folder, &["*"], &["-Xmx128m"])?;
    command
        .args([
            "org.apache.pulsar.utils.auth.tokens.TokensCliUtils",
            "create",
        ])
        .arg("--secret-key")
        .arg(format!("file://{key}"))
        .args(["--subject", &user.to_string()]);
    let output = command.output().context("cannot run Java")?;
    let said = String::from_utf8_lossy(&output.stdout);
    match said.lines().last().map(str::trim) {
        Some(token) if output.status.success() && token.split('.').count() == 3 => {
            Ok(token.to_owned())
        }
        _ => bail!(
            "Pulsar makes no token for {user} ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        ),
    }
}

fn standalone(jvm: &Jvm, site: &Site, node: &NodePorts) -> Result<Node> {
    let folder = site.folder_of(node)?;
    let conf = folder.join("standalone.conf");
    let loopback = match cfg!(target_os = "macos") {
        true => "lo0",
        false => "lo",
    };
    let secured = match site.security {
        Some(security) => secured(jvm, &folder, node, security)?,
        None => String::new(),
    };
    let cluster = match node.number {
        1 => "standalone".to_owned(),
        number => format!("standalone-{number}"),
    };
    let proxied = node.behind.map(|Behind { listen, proxy }| {
        format!(
            "internalListenerName=direct\n\
             bindAddresses=proxied:pulsar://127.0.0.1:{listen}\n\
             advertisedListeners=direct:pulsar://127.0.0.1:{},proxied:pulsar://127.0.0.1:{proxy}",
            node.client
        )
    });
    let values = [
        ("proxied", proxied.unwrap_or_default()),
        ("port", node.client.to_string()),
        ("web_port", node.web.to_string()),
        ("loopback", loopback.to_owned()),
        ("cluster", cluster),
        ("secured", secured),
    ];
    write(
        &conf,
        &fill(include_str!("../../pulsar/standalone.conf"), &values)?,
    )?;
    let memory = ["-Xmx1g", "-XX:MaxDirectMemorySize=512m"];
    let mut run = jvm.command(&folder, &["*"], &memory)?;
    run.args(jvm.archive_option(node));
    run.args(["org.apache.pulsar.PulsarStandaloneStarter", "--config"])
        .arg(conf);
    run.arg("--metadata-dir").arg(folder.join("metadata"));
    run.arg("--bookkeeper-dir").arg(folder.join("bookkeeper"));
    run.args(["--bookkeeper-port", &node.others[0].to_string()]);
    run.args(["--no-functions-worker", "--no-stream-storage"]);
    run.args(["--advertised-address", "127.0.0.1"]);
    Ok(node.node(run))
}
