//! The five services: their names, addresses and settings.

use std::fmt;
use std::str::FromStr;

/// A service that examples need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Service {
    /// Apache Kafka, in KRaft mode.
    Kafka,
    /// RabbitMQ with the management, prometheus and stream plugins.
    RabbitMq,
    /// nats-server with JetStream.
    Nats,
    /// Apache Pulsar standalone.
    Pulsar,
    /// OpenSearch, one node.
    OpenSearch,
}

impl Service {
    /// All of them, in the order in which they are listed everywhere.
    pub const ALL: [Service; 5] = [
        Service::Kafka,
        Service::RabbitMq,
        Service::Nats,
        Service::Pulsar,
        Service::OpenSearch,
    ];

    /// The name used on the command line, in `[package.metadata.lab]` and in `compose.yaml`.
    pub fn name(self) -> &'static str {
        match self {
            Service::Kafka => "kafka",
            Service::RabbitMq => "rabbitmq",
            Service::Nats => "nats",
            Service::Pulsar => "pulsar",
            Service::OpenSearch => "opensearch",
        }
    }

    /// The environment variable through which an example learns the address.
    pub fn variable(self) -> &'static str {
        match self {
            Service::Kafka => "KAFKA_BROKERS",
            Service::RabbitMq => "AMQP_ADDR",
            Service::Nats => "NATS_URL",
            Service::Pulsar => "PULSAR_ADDRESS",
            Service::OpenSearch => "ELASTICSEARCH_URL",
        }
    }

    /// The port that clients expect by default.
    pub fn default_port(self) -> u16 {
        match self {
            Service::Kafka => 9092,
            Service::RabbitMq => 5672,
            Service::Nats => 4222,
            Service::Pulsar => 6650,
            Service::OpenSearch => 9200,
        }
    }

    /// The default port of the web console or admin interface, if there is one beside the client port.
    pub fn default_web_port(self) -> Option<u16> {
        match self {
            Service::Kafka | Service::OpenSearch => None,
            Service::RabbitMq => Some(15672),
            Service::Nats => Some(8222),
            Service::Pulsar => Some(8080),
        }
    }

    /// The value of [`Service::variable`] for brokers that listen on these `host:port`s.
    pub fn address(self, hosts: &[String]) -> String {
        let all = hosts.join(",");
        let first = hosts.first().map_or("", String::as_str);
        match self {
            Service::Kafka => all,
            // `%2f` is the default virtual host, "/".
            Service::RabbitMq => format!("amqp://guest:guest@{first}/%2f"),
            Service::Nats => hosts
                .iter()
                .map(|h| format!("nats://{h}"))
                .collect::<Vec<_>>()
                .join(","),
            Service::Pulsar => format!("pulsar://{first}"),
            Service::OpenSearch => format!("http://{first}"),
        }
    }

    /// The variable and the value that tell an example where the admin interface over HTTP is, if it has one.
    pub fn web_variable(self) -> Option<&'static str> {
        match self {
            Service::Kafka | Service::OpenSearch => None,
            Service::RabbitMq => Some("RABBITMQ_MANAGEMENT_URL"),
            Service::Nats => Some("NATS_MONITOR_URL"),
            Service::Pulsar => Some("PULSAR_ADMIN_URL"),
        }
    }

    /// Whether more than one node can be started. The nodes of Pulsar are not one cluster: each is a cluster of its own,
    /// for replication from one to the next.
    pub fn can_cluster(self) -> bool {
        self != Service::OpenSearch
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Service {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> anyhow::Result<Service> {
        Service::ALL
            .into_iter()
            .find(|service| service.name() == name)
            .ok_or_else(|| {
                let names: Vec<_> = Service::ALL.iter().map(|service| service.name()).collect();
                let near = names
                    .iter()
                    .max_by(|a, b| strsim::jaro(name, a).total_cmp(&strsim::jaro(name, b)));
                let hint = near.filter(|near| strsim::jaro(name, near) > 0.7);
                match hint {
                    Some(near) => {
                        anyhow::anyhow!("no service is called '{name}'; did you mean '{near}'?")
                    }
                    None => anyhow::anyhow!(
                        "no service is called '{name}'; there are {}",
                        names.join(", ")
                    ),
                }
            })
    }
}
