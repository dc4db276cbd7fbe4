//! Apache Kafka: jars by Maven, and one JVM per node, which is broker and controller.

#[cfg(feature = "harness")]
use std::collections::HashMap;
use std::fs;
use std::path::Path;
#[cfg(feature = "harness")]
use std::process::Command;

use anyhow::{Context, Result};

use super::jvm::Jvm;
use super::setup::{fill, variables, write};
use super::{Behind, Facts, Grant, Mock, Node, NodePorts, Program, Secured, Setup, Site, Spec};
use crate::fetch::maven::Jars;
#[cfg(feature = "harness")]
use crate::home::Home;
use crate::ports;
use crate::probe::Greeting;
use crate::security::{self, BROKER, Security, User};

pub(super) struct Kafka;

const JARS: Jars = Jars::of_pom("kafka", include_str!("../../kafka/pom.xml"));

impl Spec for Kafka {
    fn facts(&self) -> Facts {
        Facts {
            name: "kafka",
            title: "Kafka",
            variable: VARIABLE,
            port: 9092,
            web: None,
            most_nodes: 5,
            // The controller's.
            other_ports: 1,
            advertises: true,
            free_ports: ports::RANGE,
            // ApiVersions request, version 0, correlation id 7, no client id.
            greeting: Greeting::Handshake {
                ask: &[0, 0, 0, 10, 0, 18, 0, 0, 0, 0, 0, 7, 0xff, 0xff],
                answer: |bytes| bytes.len() >= 10 && bytes[4..10] == [0, 0, 0, 7, 0, 0],
            },
            // Not 9093: without TLS, that is the second node's.
            secured: Some(Secured {
                port: Some(9193),
                web: None,
            }),
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
            let (listener, advertised) = match node.behind {
                Some(Behind { listen, proxy }) => (
                    format!(",PROXIED://127.0.0.1:{listen}"),
                    format!(",PROXIED://127.0.0.1:{proxy}"),
                ),
                None => Default::default(),
            };
            let values = [
                ("proxied_listener", listener),
                ("proxied_advertised", advertised),
                ("node", node.number.to_string()),
                ("port", node.client.to_string()),
                ("controller_port", node.others[0].to_string()),
                ("voters", voters.join(",")),
                ("data", data.display().to_string()),
                ("replicas", replicas.to_string()),
                ("in_sync", replicas.saturating_sub(1).max(1).to_string()),
                ("secured", secured(node, site.security)?),
            ];
            write(
                &properties,
                &fill(include_str!("../../kafka/server.properties"), &values)?,
            )?;
            let mut run = jvm.command(&folder, &["*"], &["-Xmx512m"])?;
            run.args(jvm.archive_option(node));
            run.arg("kafka.Kafka").arg(&properties);
            let mut node = node.node(run);
            if !data.join("meta.properties").exists() {
                let mut format = jvm.command(&folder, &["*"], &["-Xmx128m"])?;
                format
                    .args(["kafka.tools.StorageTool", "format", "--ignore-formatted"])
                    .args(["-t", &cluster, "-c"])
                    .arg(&properties);
                if let Some(security) = site.security {
                    format.arg(format!("@{}", passwords(security)?));
                }
                node.first = Some(format);
            }
            nodes.push(node);
        }
        let grants = match site.security {
            Some(security) => grants(&jvm, site, &nodes, security)?,
            None => Vec::new(),
        };
        Ok(Setup {
            grants,
            ..jvm.set_up(nodes)
        })
    }

    /// There are no usual names: these are librdkafka's settings, in capitals.
    fn secured_env(
        &self,
        nodes: &[Node],
        security: &Security,
        user: User,
    ) -> Result<Vec<(String, String)>> {
        let ca = security.ca();
        let env = [
            (VARIABLE, secured_hosts(nodes)),
            ("KAFKA_SECURITY_PROTOCOL", "SASL_SSL".to_owned()),
            ("KAFKA_SASL_MECHANISM", MECHANISM.to_owned()),
            ("KAFKA_SASL_USERNAME", user.to_string()),
            ("KAFKA_SASL_PASSWORD", security.password(user)?),
            ("KAFKA_SSL_CA_LOCATION", ca),
        ];
        Ok(variables(env))
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

const VARIABLE: &str = "KAFKA_BROKERS";

const MECHANISM: &str = "SCRAM-SHA-512";

/// What a node's properties have besides, if it is secured.
fn secured(node: &NodePorts, security: Option<&Security>) -> Result<String> {
    let (Some(security), Some(ports)) = (security, &node.secured) else {
        return Ok(String::new());
    };
    // Kafka takes key and certificate from one file.
    let store = security.path("broker.pem");
    let pem =
        security::read(security.key(BROKER))? + &security::read(security.certificate(BROKER))?;
    security::write(&store, &pem)?;
    let values = [
        ("port", node.client.to_string()),
        ("secured_port", ports.client.to_string()),
        ("internal_port", ports.internal.to_string()),
        ("controller_port", node.others[0].to_string()),
        ("store", store),
        ("ca", security.ca()),
    ];
    fill(include_str!("../../kafka/secured.properties"), &values)
}

/// The arguments of the storage tool that tell it the users, in a file: everybody can read the list of processes.
fn passwords(security: &Security) -> Result<String> {
    let path = security.path("users.args");
    let mut lines = String::new();
    for user in User::ALL {
        let password = security.password(user)?;
        lines += &format!("--add-scram\n{MECHANISM}=[name={user},password={password}]\n");
    }
    security::write(&path, &lines)?;
    Ok(path)
}

/// What allows the application, and whoever comes without TLS, to read and to write. With TLS the application may also
/// create topics whose names begin with `secure-`, and no others.
fn grants(jvm: &Jvm, site: &Site, nodes: &[Node], security: &Security) -> Result<Vec<Grant>> {
    // For Kafka's own tools, after --command-config.
    let config = |user: User| security.path(&format!("{user}.properties"));
    let ca = security.ca();
    for user in User::ALL {
        let properties = client_properties(&user.to_string(), &security.password(user)?, &ca)?;
        security::write(config(user), &properties)?;
    }
    let mut grants = Vec::new();
    let application = User::Application.to_string();
    let with_or_without_tls = ["ANONYMOUS", &application];
    let own_topics = ["--topic", "secure-", "--resource-pattern-type", "prefixed"];
    let rules: [(&str, &[&str], &[&str]); 3] = [
        (
            "Read",
            &with_or_without_tls,
            &["--topic", "*", "--group", "*"],
        ),
        (
            "Write",
            &with_or_without_tls,
            &["--topic", "*", "--transactional-id", "*"],
        ),
        ("Create", &[&application], &own_topics),
    ];
    for (operation, principals, resources) in rules {
        let folder = site.folder.join(operation);
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let mut command = jvm.command(&folder, &["*"], &["-Xmx128m"])?;
        command
            .args(["org.apache.kafka.tools.AclCommand", "--add"])
            .args(["--bootstrap-server", &secured_hosts(nodes)])
            .arg("--command-config")
            .arg(config(User::Administrator));
        for principal in principals {
            command
                .arg("--allow-principal")
                .arg(format!("User:{principal}"));
        }
        command
            .args(["--operation", operation, "--operation", "Describe"])
            .args(resources);
        grants.push(Grant::Run(command));
    }
    Ok(grants)
}

fn secured_hosts(nodes: &[Node]) -> String {
    let hosts: Vec<_> = nodes
        .iter()
        .filter_map(|node| node.secured.clone())
        .collect();
    hosts.join(",")
}

/// One of Kafka's own tools, by the name of its class, which connects as these variables say, those of
/// [`Spec::secured_env`]. The folder is for its configuration.
#[cfg(feature = "harness")]
pub(crate) fn tool(
    home: &Home,
    folder: &Path,
    class: &str,
    env: &HashMap<String, String>,
) -> Result<Command> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let value = |name| env.get(name).map_or("", String::as_str);
    let properties = client_properties(
        value("KAFKA_SASL_USERNAME"),
        value("KAFKA_SASL_PASSWORD"),
        value("KAFKA_SSL_CA_LOCATION"),
    )?;
    let config = folder.join("client.properties");
    security::write(&config, &properties)?;
    let mut command = Jvm::fetch(home, &JARS)?.command(folder, &["*"], &["-Xmx128m"])?;
    command
        .args([
            class,
            "--bootstrap-server",
            value(VARIABLE),
            "--command-config",
        ])
        .arg(config);
    Ok(command)
}

fn client_properties(user: &str, password: &str, ca: &str) -> Result<String> {
    let values = [
        ("mechanism", MECHANISM.to_owned()),
        ("user", user.to_owned()),
        ("password", password.to_owned()),
        ("ca", ca.to_owned()),
    ];
    fill(include_str!("../../kafka/client.properties"), &values)
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
