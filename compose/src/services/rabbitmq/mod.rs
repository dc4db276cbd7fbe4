//! RabbitMQ with the Erlang that it runs on: the machine's own, else Debian packages.
//!
//! The broker is started by its own scripts, and beside it runs Erlang's name server, which would otherwise become a
//! daemon that outlives everybody.

mod installation;

use anyhow::Result;
use serde_json::json;

use self::installation::Installation;
use super::setup::{fill, variables, write};
use super::{Facts, Node, NodePorts, Program, Secured, Setup, Site, Spec, Web};
use crate::fetch::Part;
use crate::home::Home;
use crate::ports;
use crate::probe::{Greeting, Page};
use crate::security::{self, BROKER, Security, User};

pub(super) struct RabbitMq;

/// What Debian 13 packages, and what `compose.yaml` pins.
const VERSION: &str = include_str!("../../../rabbitmq/version");

impl Spec for RabbitMq {
    fn facts(&self) -> Facts {
        Facts {
            name: "rabbitmq",
            title: "RabbitMQ",
            variable: "AMQP_ADDR",
            port: 5672,
            web: Some(Web {
                variable: "RABBITMQ_MANAGEMENT_URL",
                port: 15672,
            }),
            most_nodes: 5,
            // Those of Erlang's distribution, of Prometheus, of streams, and, of the first node's, of Erlang's name server.
            other_ports: 4,
            advertises: false,
            free_ports: ports::RANGE,
            // The protocol header of AMQP 0-9-1, answered by the method frame Connection.Start.
            greeting: Greeting::Handshake {
                ask: b"AMQP\x00\x00\x09\x01",
                answer: |bytes| {
                    bytes.len() >= 11 && bytes[0] == 1 && bytes[7..11] == [0, 10, 0, 10]
                },
            },
            secured: Some(Secured {
                port: Some(5671),
                web: None,
            }),
        }
    }

    /// `%2f` is the default virtual host, "/".
    fn address(&self, hosts: &[String]) -> String {
        format!("amqp://guest:guest@{}/%2f", hosts[0])
    }

    /// AMQP asks everybody for a name and a password.
    fn plain_address(&self, hosts: &[String], security: &Security) -> Result<String> {
        let password = security.password(User::Application)?;
        Ok(format!(
            "amqp://{}:{password}@{}/{VHOST}",
            User::Application,
            hosts[0]
        ))
    }

    fn program(&self) -> &dyn Program {
        self
    }

    fn set_up(&self, site: &Site) -> Result<Setup> {
        let program = Installation::find_or_fetch(site.home)?;
        let epmd_port = site.nodes[0].others[3].to_string();
        let mut companion = program.command("epmd");
        companion.args(["-address", "127.0.0.1", "-port", &epmd_port]);

        let plugins = site.folder.join("enabled_plugins");
        write(&plugins, include_str!("../../../rabbitmq/enabled_plugins"))?;
        let members: String = site
            .nodes
            .iter()
            .map(|node| {
                format!(
                    "cluster_formation.classic_config.nodes.{0} = lab{0}@localhost\n",
                    node.number
                )
            })
            .collect();
        let cluster = match site.nodes {
            [_] => String::new(),
            _ => format!("cluster_formation.peer_discovery_backend = classic_config\n{members}"),
        };
        let secured = |node: &NodePorts| match site.security {
            Some(security) => secured(node, security),
            None => Ok(String::new()),
        };
        // What one release has stored, another may not read.
        let data = match program.version.as_str() {
            version if version == self.version() => "data".to_owned(),
            other => format!("data-{other}"),
        };
        let mut nodes = Vec::new();
        for node in site.nodes {
            let folder = site.folder_of(node)?;
            let values = [
                ("port", node.client.to_string()),
                ("web_port", node.web.to_string()),
                ("prometheus_port", node.others[1].to_string()),
                ("stream_port", node.others[2].to_string()),
                ("cluster", cluster.clone()),
                ("secured", secured(node)?),
            ];
            let conf = folder.join("rabbitmq.conf");
            write(
                &conf,
                &fill(include_str!("../../../rabbitmq/rabbitmq.conf"), &values)?,
            )?;
            let mut run = program.command("rabbitmq-server");
            run.env("RABBITMQ_NODENAME", format!("lab{}@localhost", node.number))
                .env("RABBITMQ_CONFIG_FILE", &conf)
                .env(
                    "RABBITMQ_ADVANCED_CONFIG_FILE",
                    folder.join("advanced.config"),
                )
                .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
                .env("RABBITMQ_ENABLED_PLUGINS_FILE", &plugins)
                .env("RABBITMQ_MNESIA_BASE", folder.join(&data))
                .env("RABBITMQ_LOG_BASE", folder.join("log"))
                .env("RABBITMQ_LOGS", "-")
                .env("RABBITMQ_GENERATED_CONFIG_DIR", folder.join("config"))
                .env("RABBITMQ_PID_FILE", folder.join("pid"))
                .env("RABBITMQ_DIST_PORT", node.others[0].to_string())
                // Has the start script become the broker instead of waiting for it as its parent: signals must reach
                // the broker itself.
                .env("RUNNING_UNDER_SYSTEMD", "true")
                // Erlang's shell would read a Ctrl-C as a question.
                .env("RABBITMQ_SERVER_START_ARGS", "+B i")
                .env(
                    "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                    "-kernel inet_dist_use_interface {127,0,0,1}",
                )
                .env("ERL_EPMD_ADDRESS", "127.0.0.1")
                .env("ERL_EPMD_PORT", &epmd_port)
                // Where the cookie is that the nodes of a cluster share.
                .env("HOME", site.folder)
                // Without a limit, Erlang makes its port table as large as the container's limit of open files.
                .env("ERL_MAX_PORTS", "65536");
            nodes.push(node.node(run));
        }
        Ok(Setup {
            companion: Some(companion),
            ..Setup::of(nodes, Some(program.version))
        })
    }

    fn health(&self, _host: &str, web: &str, security: Option<&Security>) -> Result<Vec<Page>> {
        let url = format!("{web}/api/overview");
        Ok(vec![match security {
            Some(security) => {
                let user = User::Administrator;
                Page::basic(url, user, &security.password(user)?)
            }
            None => Page::basic(url, "guest", "guest"),
        }])
    }

    /// `AMQP_CERT` and `AMQP_KEY` are the client's certificate, which the broker asks for, and its key.
    fn secured_env(
        &self,
        nodes: &[Node],
        security: &Security,
        user: User,
    ) -> Result<Vec<(String, String)>> {
        let host = nodes[0].secured.as_deref().unwrap_or_default();
        let address = format!("amqps://{user}:{}@{host}/{VHOST}", security.password(user)?);
        let env = [
            (self.facts().variable, address),
            ("AMQP_CA", security.ca()),
            ("AMQP_CERT", security.certificate(user)),
            ("AMQP_KEY", security.key(user)),
        ];
        Ok(variables(env))
    }
}

/// The virtual host of a secured broker.
const VHOST: &str = "lab";

/// What a secured node's configuration has besides.
fn secured(node: &NodePorts, security: &Security) -> Result<String> {
    let Some(ports) = &node.secured else {
        return Ok(String::new());
    };
    let mut users = Vec::new();
    let mut permissions = Vec::new();
    for user in User::ALL {
        let (tags, configure): (&[&str], _) = match user {
            User::Application => (&[], "^$"),
            User::Administrator => (&["administrator"], ".*"),
        };
        let name = user.to_string();
        users.push(json!({"name": name, "password": security.password(user)?, "tags": tags}));
        permissions.push(json!({
            "user": name, "vhost": VHOST, "configure": configure, "write": ".*", "read": ".*",
        }));
    }
    let definitions = json!({
        "vhosts": [{"name": VHOST}], "users": users, "permissions": permissions,
    });
    let path = security.path("definitions.json");
    security::write(&path, &definitions.to_string())?;
    let values = [
        ("port", ports.client.to_string()),
        ("ca", security.ca()),
        ("certificate", security.certificate(BROKER)),
        ("key", security.key(BROKER)),
        ("definitions", path),
    ];
    fill(include_str!("../../../rabbitmq/secured.conf"), &values)
}

impl Program for RabbitMq {
    fn version(&self) -> String {
        VERSION.trim().to_owned()
    }

    fn parts(&self, home: &Home) -> Vec<Part> {
        vec![Part::new("rabbitmq-server", Installation::source(home))]
    }

    fn fetch(&self, home: &Home) -> Result<()> {
        Installation::find_or_fetch(home).map(drop)
    }
}
