//! Brings the brokers' programs onto this machine, for this user alone and without root.
//!
//! What the machine has is used. What it lacks is fetched by the package manager that publishes it
//! (Maven, Go, apt), into the cache, and only there. An installation is all or nothing: see
//! [`verify`] for how it is told that one is whole.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::home::Home;

mod debian;
mod install;
mod java;
mod maven;
mod nats;
mod rabbitmq;
mod tool;
mod truststore;

pub use rabbitmq::RabbitMq;
pub use tool::{Progress, say};

const KAFKA: &str = include_str!("../../kafka/pom.xml");
const PULSAR: &str = include_str!("../../pulsar/pom.xml");
const OPENSEARCH: &str = include_str!("../../opensearch/pom.xml");
const NATS: &str = include_str!("../../nats/module");
/// What Debian 12 packages. Another release brings another; this one is what `compose.yaml` pins.
const RABBITMQ: &str = include_str!("../../rabbitmq/version");

/// A `java` of version 17 or newer: that of JAVA_HOME, the one on PATH, else Debian's, unpacked into the cache.
pub fn java(home: &Home) -> Result<PathBuf> {
    Ok(java::find_or_fetch(home)?.program)
}

/// The folder with Kafka's jars.
pub fn kafka(home: &Home) -> Result<PathBuf> {
    maven(home, "kafka", &pom_version(KAFKA), KAFKA)
}

/// The folder with Pulsar's jars.
pub fn pulsar(home: &Home) -> Result<PathBuf> {
    maven(home, "pulsar", &pom_version(PULSAR), PULSAR)
}

/// The folder with OpenSearch's jars.
pub fn opensearch(home: &Home) -> Result<PathBuf> {
    maven(home, "opensearch", &pom_version(OPENSEARCH), OPENSEARCH)
}

/// The folder with the jars that a pom depends on, for any program that is published so.
///
/// `name` and `version` are the name of the folder. It is fetched again when the pom changes.
pub fn maven(home: &Home, name: &str, version: &str, pom: &str) -> Result<PathBuf> {
    maven::Jars::new(name, version, pom).install(home)
}

/// The `nats-server` on PATH, else the one that Go builds, else Debian's.
pub fn nats(home: &Home) -> Result<PathBuf> {
    nats::Module::new(NATS.trim(), &module_version(NATS)).install(home)
}

/// RabbitMQ of the machine, else Debian's with its Erlang, unpacked into the cache.
pub fn rabbitmq(home: &Home) -> Result<RabbitMq> {
    rabbitmq::find_or_fetch(home)
}

/// Checks every byte of a fetched program against the hashes taken when it came, and names the files that differ.
///
/// Each use compares names and sizes only, which takes milliseconds.
pub fn verify(dir: &Path) -> Result<()> {
    install::verify(dir)
}

/// The version of each service, from the one place where it stands.
pub fn versions() -> [(&'static str, String); 5] {
    [
        ("kafka", pom_version(KAFKA)),
        ("rabbitmq", RABBITMQ.trim().to_owned()),
        ("nats", module_version(NATS)),
        ("pulsar", pom_version(PULSAR)),
        ("opensearch", pom_version(OPENSEARCH)),
    ]
}

fn pom_version(pom: &str) -> String {
    let after = pom.split_once("<version>").map_or("", |(_, after)| after);
    after.split('<').next().unwrap_or_default().to_owned()
}

fn module_version(module: &str) -> String {
    let version = module.trim().rsplit('@').next().unwrap_or_default();
    version.trim_start_matches('v').to_owned()
}

/// What a service will run on, found out without fetching anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The service's name.
    pub service: String,
    /// The version that would be fetched. A program of the machine may be of another.
    pub version: String,
    /// The programs that it takes, the service itself last.
    pub parts: Vec<Part>,
}

/// One program of a [`Plan`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// Where it comes from.
    pub source: Source,
}

/// Where a program comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The machine has it.
    Machine(PathBuf),
    /// It was fetched before, and is whole.
    Cache(PathBuf),
    /// Will be fetched by Maven.
    Maven,
    /// Will be built by Go.
    Go,
    /// Will be unpacked from Debian packages.
    Debian,
    /// Cannot be had; the text says what to install.
    Missing(String),
}

impl Plan {
    /// Nothing has to be fetched.
    pub fn is_ready(&self) -> bool {
        let here = |part: &Part| matches!(part.source, Source::Machine(_) | Source::Cache(_));
        self.parts.iter().all(here)
    }

    /// What to install before the service can run natively, one text for each thing that is missing.
    pub fn missing(&self) -> Vec<&str> {
        self.parts
            .iter()
            .filter_map(|part| match &part.source {
                Source::Missing(advice) => Some(advice.as_str()),
                _ => None,
            })
            .collect()
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: ", self.service, self.version)?;
        for (index, part) in self.parts.iter().enumerate() {
            if index > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{} {}", part.name, part.source)?;
        }
        Ok(())
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Machine(path) => write!(f, "{}", path.display()),
            Source::Cache(path) => write!(f, "fetched ({})", path.display()),
            Source::Maven => f.write_str("to be fetched by Maven"),
            Source::Go => f.write_str("to be built by Go"),
            Source::Debian => f.write_str("to be unpacked from Debian packages"),
            Source::Missing(_) => f.write_str("missing"),
        }
    }
}

/// For `lab doctor`: what a service will run on and what is missing. Fetches nothing.
pub fn plan(home: &Home, service: &str) -> Plan {
    let version = versions()
        .into_iter()
        .find_map(|(name, version)| (name == service).then_some(version))
        .unwrap_or_default();
    let part = |name: &str, source: Source| Part {
        name: name.to_owned(),
        source,
    };
    let packaged = |packages: debian::Packages, name: &str| match packages.installed(home) {
        Some(root) => Source::Cache(root),
        None if debian::available() => Source::Debian,
        None => Source::Missing(missing(name)),
    };
    let parts = match service {
        "kafka" | "pulsar" | "opensearch" => {
            let pom = match service {
                "kafka" => KAFKA,
                "pulsar" => PULSAR,
                _ => OPENSEARCH,
            };
            let mut parts = vec![part(
                "Java",
                match java::find() {
                    Ok(java) => Source::Machine(java.program),
                    Err(_) => packaged(java::package(), "Java"),
                },
            )];
            match maven::Jars::new(service, &version, pom).installed(home) {
                Some(dir) => parts.push(part("jars", Source::Cache(dir))),
                None => {
                    let maven = match tool::which("mvn") {
                        Some(maven) => Source::Machine(maven),
                        None => packaged(maven::package(), "Maven"),
                    };
                    parts.push(part("Maven", maven));
                    parts.push(part("jars", Source::Maven));
                }
            }
            parts
        }
        "nats" => {
            let module = nats::Module::new(NATS.trim(), &version);
            let source = if let Some(program) = tool::which("nats-server") {
                Source::Machine(program)
            } else if let Some(program) = module.installed(home) {
                Source::Cache(program)
            } else if tool::which("go").is_some() {
                Source::Go
            } else {
                packaged(nats::package(), "nats-server")
            };
            vec![part("nats-server", source)]
        }
        "rabbitmq" => {
            let source = match rabbitmq::find() {
                Some(found) => Source::Machine(found.sbin),
                None => packaged(rabbitmq::package(), "RabbitMQ"),
            };
            vec![part("rabbitmq-server", source)]
        }
        other => vec![part(
            other,
            Source::Missing(format!("there is no service called {other}")),
        )],
    };
    Plan {
        service: service.to_owned(),
        version,
        parts,
    }
}

/// What to install where a program neither is nor can be fetched.
fn missing(program: &str) -> String {
    let (debian, fedora, brew) = match program {
        "Java" => (
            "openjdk-17-jre-headless",
            "java-21-openjdk-headless",
            "openjdk@21",
        ),
        "Maven" => ("maven", "maven", "maven"),
        "nats-server" => ("nats-server", "golang", "nats-server"),
        _ => ("rabbitmq-server", "rabbitmq-server", "rabbitmq"),
    };
    format!(
        "{program} is not on PATH and cannot be fetched here; install it: \
         `sudo apt install {debian}` (Debian, Ubuntu), `sudo dnf install {fedora}` (Fedora), \
         `brew install {brew}` (macOS)"
    )
}

#[cfg(test)]
mod tests {
    use super::versions;

    #[test]
    fn every_version_is_found_where_it_stands() {
        for (service, version) in versions() {
            let numeric = version
                .split('.')
                .all(|part| !part.is_empty() && part.chars().all(|c| c.is_ascii_digit()));
            assert!(numeric, "{service}: {version:?}");
        }
    }
}
