//! Apache Kafka: jars by Maven, and one JVM per node, which is broker and controller.

use std::fs;
use std::path::Path;

use anyhow::Result;

use super::jvm::Jvm;
use super::setup::{fill, write};
use super::{Facts, Mock, Node, Program, Setup, Site, Spec};
use crate::fetch::maven::Jars;
use crate::ports;
use crate::probe::Greeting;

pub(super) struct Kafka;

const JARS: Jars = Jars::of_pom("kafka", include_str!("../../kafka/pom.xml"));

impl Spec for Kafka {
    fn facts(&self) -> Facts {
        Facts {
            name: "kafka",
            title: "Kafka",
            variable: "KAFKA_BROKERS",
            port: 9092,
            web: None,
            most_nodes: 5,
            // The controller's.
            other_ports: 1,
            free_ports: ports::RANGE,
            // ApiVersions request, version 0, correlation id 7, no client id.
            greeting: Greeting::Handshake {
                ask: &[0, 0, 0, 10, 0, 18, 0, 0, 0, 0, 0, 7, 0xff, 0xff],
                answer: |bytes| bytes.len() >= 10 && bytes[4..10] == [0, 0, 0, 7, 0, 0],
            },
        }
    }

    fn address(&self, hosts: &[String]) -> String {
        hosts.join(",")
    }

    fn program(&self) -> &dyn Program {
        &JARS
    }

    fn set_up(&self, site: &Site) -> Result<Setup> {
        let jvm = Jvm::fetch(site.home, &JARS)?.archiving(site.folder);
        let voters: Vec<_> = site
            .nodes
            .iter()
            .map(|node| format!("{}@127.0.0.1:{}", node.number, node.others[0]))
            .collect();
        let replicas = site.nodes.len().min(3);
        let cluster = cluster_id(site.folder)?;
        let mut nodes = Vec::new();
        for node in site.nodes {
            let folder = site.folder_of(node)?;
            let data = folder.join("data");
            let properties = folder.join("server.properties");
            let values = [
                ("node", node.number.to_string()),
                ("port", node.client.to_string()),
                ("controller_port", node.others[0].to_string()),
                ("voters", voters.join(",")),
                ("data", data.display().to_string()),
                ("replicas", replicas.to_string()),
                ("in_sync", replicas.saturating_sub(1).max(1).to_string()),
            ];
            write(
                &properties,
                &fill(include_str!("../../kafka/server.properties"), &values)?,
            )?;
            let mut format = jvm.command(&folder, &["*"], &["-Xmx128m"])?;
            format
                .args(["kafka.tools.StorageTool", "format", "--ignore-formatted"])
                .args(["-t", &cluster, "-c"])
                .arg(&properties);
            let mut run = jvm.command(&folder, &["*"], &["-Xmx512m"])?;
            run.args(jvm.archive_option(node));
            run.arg("kafka.Kafka").arg(&properties);
            nodes.push(Node {
                first: (!data.join("meta.properties").exists()).then_some(format),
                ..node.node(run)
            });
        }
        Ok(jvm.set_up(nodes))
    }

    fn mock(&self) -> Option<Mock> {
        Some(Mock {
            example: "kafka_mock_cluster",
            warning: "\
kafka: this is librdkafka's MOCK cluster, not Apache Kafka. What it does not guarantee:
  - aborted transactions stay visible to read_committed consumers: no exactly-once
  - nothing is durable: all is in memory and gone when it ends
  - timestamps of records are not those of a broker; retention and compaction do not happen",
        })
    }
}

/// The same for all nodes and all starts of one data folder.
fn cluster_id(folder: &Path) -> Result<String> {
    let path = folder.join("cluster.id");
    if let Ok(id) = fs::read_to_string(&path) {
        return Ok(id);
    }
    // Sixteen bytes in base64url: twenty-one digits that say something, and a last one whose spare bits are zero.
    let id = format!("{:021x}A", fastrand::u128(..) >> 44);
    write(&path, &id)?;
    Ok(id)
}
