//! OpenSearch: jars by Maven with a runner that starts them without shell scripts, and one JVM.

use anyhow::Result;

use super::jvm::Jvm;
use super::{Facts, Program, Setup, Site, Spec};
use crate::fetch::maven::Jars;
use crate::probe::{Greeting, Page};
use crate::security::Security;

pub(super) struct OpenSearch;

const JARS: Jars = Jars::of_pom("opensearch", include_str!("../../opensearch/pom.xml"));

impl Spec for OpenSearch {
    fn facts(&self) -> Facts {
        Facts {
            name: "opensearch",
            title: "OpenSearch",
            variable: "ELASTICSEARCH_URL",
            port: 9200,
            web: None,
            most_nodes: 1,
            other_ports: 0,
            // The runner accepts no port above 9299, and adds the node's number to the one that it is given.
            advertises: false,
            free_ports: 9201..9299,
            greeting: Greeting::Page {
                path: "/",
                has: "\"cluster_name\"",
            },
            secured: None,
        }
    }

    fn address(&self, hosts: &[String]) -> String {
        format!("http://{}", hosts[0])
    }

    fn program(&self) -> &dyn Program {
        &JARS
    }

    fn set_up(&self, site: &Site) -> Result<Setup> {
        let jvm = Jvm::fetch(site.home, &JARS)?.archiving(site.folder);
        let node = &site.nodes[0];
        let folder = site.folder_of(node)?;
        let mut run = jvm.command(&folder, &["*"], &["-Xms512m", "-Xmx512m"])?;
        run.args(jvm.archive_option(node));
        run.args(["org.codelibs.opensearch.runner.OpenSearchRunner"])
            .args(["-numOfNode", "1", "-printOnFailure", "-basePath"])
            .arg(folder.join("data"));
        run.args(["-baseHttpPort", &(node.client - 1).to_string()]);
        // Nodes of one cluster name would find and join each other.
        run.args(["-clusterName", &format!("lab-{}", node.client)]);
        Ok(jvm.set_up(vec![node.node(run)]))
    }

    fn health(&self, host: &str, _web: &str, _security: Option<&Security>) -> Result<Vec<Page>> {
        Ok(vec![Page::of(format!(
            "http://{host}/_cluster/health?wait_for_status=yellow&timeout=1s"
        ))])
    }
}
