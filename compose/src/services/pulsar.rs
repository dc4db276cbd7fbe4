//! Apache Pulsar standalone: jars by Maven, and one JVM per node. Each node is a cluster of its own, for replication
//! from one to the next.

use anyhow::Result;

use super::jvm::Jvm;
use super::setup::{fill, write};
use super::{Facts, Node, NodePorts, Program, Setup, Site, Spec, Web};
use crate::fetch::maven::Jars;
use crate::ports;
use crate::probe::Greeting;

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
                variable: "PULSAR_ADMIN_URL",
                port: 8080,
            }),
            most_nodes: 5,
            // The bookie's.
            other_ports: 1,
            free_ports: ports::RANGE,
            // CONNECT with client version "lab" and protocol version 15, answered by CONNECTED (3).
            greeting: Greeting::Handshake {
                ask: &[
                    0, 0, 0, 15, 0, 0, 0, 11, 0x08, 2, 0x12, 7, 0x0a, 3, b'l', b'a', b'b', 0x20, 15,
                ],
                answer: |bytes| bytes.len() >= 10 && bytes[8..10] == [0x08, 3],
            },
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
        let nodes = nodes.collect::<Result<_>>()?;
        Ok(jvm.set_up(nodes))
    }

    /// The broker is there before the namespace is that all examples use.
    fn health(&self, _host: &str, web: &str) -> Vec<String> {
        vec![
            format!("{web}/admin/v2/brokers/health"),
            format!("{web}/admin/v2/persistent/public/default"),
        ]
    }

    /// A client takes one address, so the second cluster is in `PULSAR_ADDRESS_B` and `PULSAR_ADMIN_URL_B`, a third in
    /// `…_C`.
    fn env(&self, nodes: &[Node]) -> Vec<(String, String)> {
        let endings = std::iter::once(String::new()).chain(('B'..='Z').map(|c| format!("_{c}")));
        let mut variables = Vec::new();
        for (node, ending) in nodes.iter().zip(endings) {
            let address = self.address(std::slice::from_ref(&node.host));
            variables.push((format!("{}{ending}", self.facts().variable), address));
            variables.extend(
                self.facts()
                    .web
                    .zip(node.web.clone())
                    .map(|(web, url)| (format!("{}{ending}", web.variable), url)),
            );
        }
        variables
    }
}

fn standalone(jvm: &Jvm, site: &Site, node: &NodePorts) -> Result<Node> {
    let folder = site.folder_of(node)?;
    let conf = folder.join("standalone.conf");
    let cluster = match node.number {
        1 => "standalone".to_owned(),
        number => format!("standalone-{number}"),
    };
    let values = [
        ("port", node.client.to_string()),
        ("web_port", node.web.to_string()),
        ("cluster", cluster),
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
