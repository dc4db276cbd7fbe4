//! The services that examples run on. What they have in common is here; all that is particular to one is in its module.
//!
//! A new service is a module here with a line in the list below, a folder beside `src` with its configuration and its
//! version, an entry in `compose.yaml`, and a row in `docs/brokers.md`. Tests tell what is missing of these, and those of
//! every service run on it too.

mod jvm;
mod kafka;
mod nats;
mod opensearch;
mod pulsar;
mod rabbitmq;
mod registry;
mod setup;

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};

use crate::fetch::Part;
use crate::home::Home;
use crate::probe::{self, Found, Greeting, Page};
use crate::security::{Security, User};
use crate::workspace::nearest;

pub(crate) use jvm::ClassArchive;
#[cfg(feature = "harness")]
pub(crate) use kafka::tool as kafka_tool;
pub(crate) use setup::{
    Behind, Grant, Node, NodePorts, Setup, Site, check_count, check_secure, choose_ports, prepare,
};

macro_rules! services {
    ($($(#[$doc:meta])* $name:ident: $spec:expr,)*) => {
        /// A service that examples need.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Service {
            $($(#[$doc])* $name,)*
        }

        impl Service {
            /// All of them, in the order in which they are listed everywhere.
            pub const ALL: [Service; [$(stringify!($name)),*].len()] = [$(Service::$name),*];

            pub(crate) fn spec(self) -> &'static dyn Spec {
                match self {
                    $(Service::$name => &$spec,)*
                }
            }
        }
    };
}

services! {
    /// Apache Kafka, in KRaft mode.
    Kafka: kafka::Kafka,
    /// RabbitMQ with the management, prometheus and stream plugins.
    RabbitMq: rabbitmq::RabbitMq,
    /// nats-server with JetStream.
    Nats: nats::Nats,
    /// Apache Pulsar standalone.
    Pulsar: pulsar::Pulsar,
    /// OpenSearch, one node.
    OpenSearch: opensearch::OpenSearch,
    /// Apicurio Registry, a schema registry with Confluent's API.
    Registry: registry::Registry,
}

/// All that there is to know of one service.
pub(crate) trait Spec: Sync {
    /// What is the same on every machine.
    fn facts(&self) -> Facts;

    /// What it runs on.
    fn program(&self) -> &dyn Program;

    /// The value of the variable for nodes that listen on these `host:port`s, of which there is at least one.
    fn address(&self, hosts: &[String]) -> String;

    /// The same for a secured service, where whoever takes it has the rights of the application, without TLS.
    fn plain_address(&self, hosts: &[String], _security: &Security) -> Result<String> {
        Ok(self.address(hosts))
    }

    /// Writes the configuration of the nodes, and says how they are started. The programs are fetched if need be.
    fn set_up(&self, site: &Site) -> Result<Setup>;

    /// The pages that answer 200 as soon as the node at `host:port` serves its clients, natively and in a container.
    /// The greeting says too little of a broker that answers before it serves.
    fn health(&self, _host: &str, _web: &str, _security: Option<&Security>) -> Result<Vec<Page>> {
        Ok(Vec::new())
    }

    /// What connects a client to the listeners with TLS, as this user. The names are the service's own where it has some.
    fn secured_env(
        &self,
        _nodes: &[Node],
        _security: &Security,
        _user: User,
    ) -> Result<Vec<(String, String)>> {
        bail!("{} cannot be secured", self.facts().title)
    }

    /// What tells an example where the nodes are.
    fn env(&self, nodes: &[Node], security: Option<&Security>) -> Result<Vec<(String, String)>> {
        let hosts: Vec<_> = nodes.iter().map(|node| node.host.clone()).collect();
        let address = match security {
            Some(security) => self.plain_address(&hosts, security)?,
            None => self.address(&hosts),
        };
        let mut variables = vec![(self.facts().variable.to_owned(), address)];
        let console = nodes.first().and_then(|node| node.web.clone());
        variables.extend(
            self.facts()
                .web
                .zip(console)
                .map(|(web, url)| (web.variable.to_owned(), url)),
        );
        Ok(variables)
    }

    /// What stands in for it where it cannot run, if there is anything.
    fn mock(&self) -> Option<Mock> {
        None
    }
}

/// What is the same on every machine.
pub(crate) struct Facts {
    /// The name used on the command line, in `[package.metadata.lab]` and in `compose.yaml`.
    pub(crate) name: &'static str,
    /// The name as it is written in a heading.
    pub(crate) title: &'static str,
    /// The environment variable through which an example learns the address.
    pub(crate) variable: &'static str,
    /// The port that clients expect by default.
    pub(crate) port: u16,
    /// The web console or admin interface, if it is not on the clients' port.
    pub(crate) web: Option<Web>,
    /// How many nodes can run together.
    pub(crate) most_nodes: u16,
    /// How many ports a node needs beside the clients' and the web's.
    pub(crate) other_ports: usize,
    /// Whether its nodes tell clients where to connect, whatever address those came by.
    pub(crate) advertises: bool,
    /// Among which its clients' port has to be, where it is chosen freely.
    pub(crate) free_ports: Range<u16>,
    /// How it is told from other programs.
    pub(crate) greeting: Greeting,
    /// How it listens with TLS, if it can.
    pub(crate) secured: Option<Secured>,
}

/// Where a secured service listens with TLS.
pub(crate) struct Secured {
    /// The one that people expect; `None` if the port without TLS serves both.
    pub(crate) port: Option<u16>,
    /// The one that people expect for the web console, if there is one with TLS.
    pub(crate) web: Option<u16>,
}

/// The programs that a service takes.
pub(crate) trait Program {
    /// The version that is fetched, from the one place where it stands.
    fn version(&self) -> String;

    /// What they are, the service itself last. Nothing is fetched for the answer.
    fn parts(&self, home: &Home) -> Vec<Part>;

    /// Brings them onto the machine, if need be.
    fn fetch(&self, home: &Home) -> Result<()>;
}

/// An interface over HTTP.
pub(crate) struct Web {
    /// The environment variable through which an example learns where it is.
    pub(crate) variable: &'static str,
    /// The port that people expect by default.
    pub(crate) port: u16,
}

/// A program that does a part of what the service does.
pub(crate) struct Mock {
    /// The example that is the program. It prints the service's variable with the address.
    pub(crate) example: &'static str,
    /// What every user has to know.
    pub(crate) warning: &'static str,
}

impl Service {
    /// The name used on the command line, in `[package.metadata.lab]` and in `compose.yaml`.
    pub fn name(self) -> &'static str {
        self.spec().facts().name
    }

    /// The environment variable through which an example learns the address.
    pub fn variable(self) -> &'static str {
        self.spec().facts().variable
    }

    /// The value of [`Service::variable`] for nodes that listen on these `host:port`s.
    ///
    /// # Panics
    /// There is none of them.
    pub fn address(self, hosts: &[String]) -> String {
        self.spec().address(hosts)
    }

    /// What is found at `host:port`, waiting at most `patience` for each step.
    pub(crate) fn probe(self, host: &str, patience: Duration) -> Found {
        probe::greet(&self.spec().facts().greeting, host, patience)
    }

    /// The version that is fetched where the machine has none of its own.
    pub fn version(self) -> String {
        self.spec().program().version()
    }
}

/// The names of the services for which this is true, for a sentence.
pub(crate) fn names(which: impl Fn(&dyn Spec) -> bool) -> String {
    let all = Service::ALL.iter().filter(|service| which(service.spec()));
    let names: Vec<_> = all.map(|service| service.name()).collect();
    names.join(", ")
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Service {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Service> {
        let mut all = Service::ALL.into_iter();
        all.find(|service| service.name() == name).ok_or_else(|| {
            let names = Service::ALL.iter().map(|service| service.name());
            let hint = match nearest(name, names).first() {
                Some(near) => format!("did you mean '{near}'?"),
                None => format!("there are {}", crate::services::names(|_| true)),
            };
            anyhow!("no service is called '{name}'; {hint}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_is_found_where_it_stands() {
        for service in Service::ALL {
            let version = service.version();
            let numeric = version
                .split('.')
                .all(|part| !part.is_empty() && part.chars().all(|c| c.is_ascii_digit()));
            assert!(numeric, "{service}: {version:?}");
        }
    }

    #[test]
    fn nothing_is_used_twice() {
        let facts = || Service::ALL.iter().map(|service| service.spec().facts());
        let webs = facts().filter_map(|facts| facts.web);
        let (variables, ports): (Vec<_>, Vec<_>) = webs.map(|web| (web.variable, web.port)).unzip();
        let all = |mut all: Vec<String>| {
            all.sort();
            let count = all.len();
            all.dedup();
            assert_eq!(all.len(), count, "{all:?}");
        };
        all(facts().map(|facts| facts.name.to_owned()).collect());
        let names = facts().map(|facts| facts.variable).chain(variables);
        all(names.map(str::to_owned).collect());
        let ports = facts().map(|facts| facts.port).chain(ports);
        all(ports.map(|port| port.to_string()).collect());
    }
}
