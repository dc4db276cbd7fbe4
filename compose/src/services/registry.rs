//! Apicurio Registry, a schema registry with Confluent's API: an archive by Maven, and one JVM. It keeps what it is told
//! in memory.

use anyhow::Result;

use super::jvm::Jvm;
use super::{Facts, Program, Setup, Site, Spec};
use crate::fetch::maven::Jars;
use crate::ports;
use crate::probe::Greeting;

pub(super) struct Registry;

const JARS: Jars = Jars::of_archive("registry", include_str!("../../registry/archive"));

impl Spec for Registry {
    fn facts(&self) -> Facts {
        Facts {
            name: "registry",
            title: "Schema registry",
            variable: "SCHEMA_REGISTRY_URL",
            port: 8081,
            web: None,
            most_nodes: 1,
            other_ports: 0,
            advertises: false,
            free_ports: ports::RANGE,
            greeting: Greeting::Page {
                path: "/apis/ccompat/v7/schemas/types",
                has: "AVRO",
            },
            secured: None,
        }
    }

    fn address(&self, hosts: &[String]) -> String {
        // Where Confluent's API is.
        format!("http://{}/apis/ccompat/v7", hosts[0])
    }

    fn program(&self) -> &dyn Program {
        &JARS
    }

    fn set_up(&self, site: &Site) -> Result<Setup> {
        let jvm = Jvm::fetch(site.home, &JARS)?;
        let node = &site.nodes[0];
        let folder = site.folder_of(node)?;
        let mut run = jvm.command(&folder, &["*", "lib/*"], &["-Xmx256m"])?;
        run.arg("-Dquarkus.http.host=127.0.0.1")
            .arg(format!("-Dquarkus.http.port={}", node.client))
            .arg("io.quarkus.runner.GeneratedMain");
        Ok(jvm.set_up(vec![node.node(run)]))
    }
}
