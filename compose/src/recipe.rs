//! How each service is started natively: its configuration, its command line, and how to tell that it is ready.
//!
//! The configuration files stand in `compose/<service>/`; what is between braces there is filled in here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::home::Home;
use crate::ports::{self, Claim};
use crate::{Service, fetch};

/// Which ports a broker listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ports {
    /// This one for clients, the next numbers for those of further nodes, and the customary ones for web consoles.
    From(u16),
    /// Ones that nobody else has or will have.
    Free,
}

impl Ports {
    /// What `LAB_PORTS` says of this service: `free`, or a list such as `kafka=19092,nats=14222`. Without it, the ports
    /// that clients expect.
    ///
    /// # Errors
    /// The variable is not understood.
    pub fn from_env(service: Service) -> Result<Ports> {
        let text = std::env::var("LAB_PORTS").unwrap_or_default();
        if text == "free" {
            return Ok(Ports::Free);
        }
        for item in text.split(',').filter(|item| !item.is_empty()) {
            let parsed = item.split_once('=').and_then(|(name, port)| {
                Some((
                    name.trim().parse::<Service>().ok()?,
                    port.trim().parse::<u16>().ok()?,
                ))
            });
            match parsed {
                Some((named, port)) if named == service => return Ok(Ports::From(port)),
                Some(_) => {}
                None => bail!(
                    "LAB_PORTS has '{item}'; it is 'free', or a list such as 'kafka=19092,nats=14222'"
                ),
            }
        }
        Ok(Ports::From(service.default_port()))
    }
}

/// One node of a service, ready to be started, and started again after a kill.
#[derive(Debug)]
pub struct Node {
    /// From 1.
    pub number: u16,
    /// To be run once before the first start, such as the formatting of the storage.
    pub prepare: Option<Command>,
    /// The broker itself.
    pub run: Command,
    /// `host:port` for clients.
    pub address: String,
    /// The web console or the admin interface.
    pub web: Option<String>,
    /// Pages that answer 200 as soon as clients can be served.
    pub health: Vec<String>,
}

/// A whole service: its nodes, and what they need beside them.
#[derive(Debug)]
pub struct Setup {
    /// In order of their numbers.
    pub nodes: Vec<Node>,
    /// A process that has to run before the nodes and for as long as they do.
    pub companion: Option<Command>,
    /// The program's folder in the cache, if it came from there.
    pub program: Option<PathBuf>,
    /// What the first node writes at an orderly end, if it is not there yet.
    pub(crate) archive: Option<ClassArchive>,
    _claims: Vec<Claim>,
}

/// The port numbers of one node, in the order in which a recipe asks for them.
struct NodePorts {
    client: u16,
    web: u16,
    others: Vec<u16>,
}

/// Brings the program onto the machine if need be, and writes the configuration of `nodes` nodes into `folder`.
///
/// # Errors
/// The program cannot be had, a default port is taken, or the folder cannot be written.
pub fn setup(
    service: Service,
    home: &Home,
    folder: &Path,
    nodes: u16,
    ports: Ports,
) -> Result<Setup> {
    if nodes > 1 && !service.can_cluster() {
        bail!("{service} runs on one node here; several nodes: kafka, rabbitmq, nats, pulsar");
    }
    let program = fetch(service, home)?;
    let mut claims = Vec::new();
    let mut numbers = Vec::new();
    for node in 0..nodes {
        numbers.push(choose_ports(service, node, ports, &mut claims)?);
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let mut setup = match &program {
        Program::Jvm { java, jars } => match service {
            Service::Kafka => kafka(java, jars, folder, &numbers),
            Service::Pulsar => pulsar(java, jars, folder, &numbers),
            _ => opensearch(java, jars, folder, &numbers),
        },
        Program::Nats(server) => nats(server, folder, &numbers),
        Program::RabbitMq(rabbitmq) => rabbit(rabbitmq, folder, &numbers, &mut claims),
    }?;
    setup._claims = claims;
    setup.program = match program {
        Program::Jvm { jars, .. } => Some(jars),
        _ => None,
    };
    Ok(setup)
}

/// A service's program, as it is on this machine.
#[derive(Debug)]
pub enum Program {
    /// A Java and a folder of jars.
    Jvm {
        /// The launcher.
        java: PathBuf,
        /// The folder.
        jars: PathBuf,
    },
    /// nats-server.
    Nats(PathBuf),
    /// RabbitMQ with its Erlang.
    RabbitMq(fetch::RabbitMq),
}

/// Brings the service's program onto the machine if need be, and says where it is.
///
/// # Errors
/// It cannot be had; the message says what to install.
pub fn fetch(service: Service, home: &Home) -> Result<Program> {
    Ok(match service {
        Service::Kafka => Program::Jvm {
            java: fetch::java(home)?,
            jars: fetch::kafka(home)?,
        },
        Service::Pulsar => Program::Jvm {
            java: fetch::java(home)?,
            jars: fetch::pulsar(home)?,
        },
        Service::OpenSearch => Program::Jvm {
            java: fetch::java(home)?,
            jars: fetch::opensearch(home)?,
        },
        Service::Nats => Program::Nats(fetch::nats(home)?),
        Service::RabbitMq => Program::RabbitMq(fetch::rabbitmq(home)?),
    })
}

/// How many ports a node needs beside the client's and the web's.
fn other_ports(service: Service) -> usize {
    match service {
        Service::Kafka | Service::Nats | Service::Pulsar => 1,
        Service::RabbitMq => 3,
        Service::OpenSearch => 0,
    }
}

fn choose_ports(
    service: Service,
    node: u16,
    ports: Ports,
    claims: &mut Vec<Claim>,
) -> Result<NodePorts> {
    let mut keep = |claim: Claim| {
        let port = claim.port;
        claims.push(claim);
        port
    };
    let client = match ports {
        Ports::From(first) => {
            let port = first + node;
            require_free(service, port)?;
            port
        }
        Ports::Free if service == Service::OpenSearch => {
            // The runner accepts no HTTP port above 9299.
            keep(ports::claim_in(9201..9299)?)
        }
        Ports::Free => keep(ports::claim()?),
    };
    // Nobody connects to the console by default, so a taken port is no reason to fail.
    let web = match service.default_web_port() {
        Some(port) if ports != Ports::Free && ports::is_free(port + node) => port + node,
        Some(_) => keep(ports::claim()?),
        None => 0,
    };
    let others = (0..other_ports(service))
        .map(|_| Ok(keep(ports::claim()?)))
        .collect::<Result<_>>()?;
    Ok(NodePorts {
        client,
        web,
        others,
    })
}

/// Fails readably if the port is taken.
pub(crate) fn require_free(service: Service, port: u16) -> Result<()> {
    if !ports::is_free(port) {
        bail!(
            "port {port} is taken by a program that is not a {service} that `lab` started; \
             stop that program, choose another port with LAB_PORTS={service}=PORT, \
             or set {} to the address of a {service} of your own",
            service.variable()
        );
    }
    Ok(())
}

fn kafka(java: &Path, jars: &Path, folder: &Path, ports: &[NodePorts]) -> Result<Setup> {
    let voters: Vec<_> = ports
        .iter()
        .zip(1..)
        .map(|(ports, node)| format!("{node}@127.0.0.1:{}", ports.others[0]))
        .collect();
    let replicas = ports.len().min(3);
    let cluster = cluster_id(folder)?;
    let archive = ClassArchive::missing(java, jars, folder);
    let mut nodes = Vec::new();
    for (ports, number) in ports.iter().zip(1..) {
        let node_folder = node_folder(folder, number)?;
        let data = node_folder.join("data");
        let properties = node_folder.join("server.properties");
        let values = [
            ("node", number.to_string()),
            ("port", ports.client.to_string()),
            ("controller_port", ports.others[0].to_string()),
            ("voters", voters.join(",")),
            ("data", data.display().to_string()),
            ("replicas", replicas.to_string()),
            ("in_sync", replicas.saturating_sub(1).max(1).to_string()),
        ];
        write(
            &properties,
            &fill(include_str!("../kafka/server.properties"), &values)?,
        )?;
        let mut prepare = jvm(java, jars, &node_folder, &["-Xmx128m"])?;
        prepare.args([
            "kafka.tools.StorageTool",
            "format",
            "--ignore-formatted",
            "-t",
            &cluster,
            "-c",
        ]);
        prepare.arg(&properties);
        let mut run = jvm(java, jars, &node_folder, &["-Xmx512m"])?;
        if let Some(archive) = archive.as_ref().filter(|_| number == 1) {
            run.arg(archive.option());
        }
        run.arg("kafka.Kafka").arg(&properties);
        nodes.push(Node {
            number,
            prepare: (!data.join("meta.properties").exists()).then_some(prepare),
            run,
            address: format!("127.0.0.1:{}", ports.client),
            web: None,
            health: Vec::new(),
        });
    }
    Ok(Setup {
        archive,
        ..Setup::of(nodes)
    })
}

/// The same for all nodes and all starts of one data folder.
fn cluster_id(folder: &Path) -> Result<String> {
    let path = folder.join("cluster.id");
    if let Ok(id) = fs::read_to_string(&path) {
        return Ok(id);
    }
    let moment = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let digest = Sha256::digest(format!(
        "{}{}{}",
        folder.display(),
        moment.as_nanos(),
        std::process::id()
    ));
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    // Sixteen bytes in base64url: twenty-one digits that say something, and a last one whose spare bits are zero.
    let id = format!("{}A", &hex[..21]);
    write(&path, &id)?;
    Ok(id)
}

fn pulsar(java: &Path, jars: &Path, folder: &Path, ports: &[NodePorts]) -> Result<Setup> {
    let archive = ClassArchive::missing(java, jars, folder);
    let nodes = ports.iter().zip(1..).map(|(ports, number)| {
        let archive = archive.as_ref().filter(|_| number == 1);
        pulsar_standalone(java, jars, folder, ports, number, archive)
    });
    Ok(Setup {
        nodes: nodes.collect::<Result<_>>()?,
        archive,
        ..Setup::of(Vec::new())
    })
}

/// A cluster of one node, with metadata of its own.
fn pulsar_standalone(
    java: &Path,
    jars: &Path,
    folder: &Path,
    ports: &NodePorts,
    number: u16,
    archive: Option<&ClassArchive>,
) -> Result<Node> {
    let node_folder = node_folder(folder, number)?;
    let conf = node_folder.join("standalone.conf");
    let cluster = match number {
        1 => "standalone".to_owned(),
        _ => format!("standalone-{number}"),
    };
    let values = [
        ("port", ports.client.to_string()),
        ("web_port", ports.web.to_string()),
        ("cluster", cluster),
    ];
    write(
        &conf,
        &fill(include_str!("../pulsar/standalone.conf"), &values)?,
    )?;
    let mut run = jvm(
        java,
        jars,
        &node_folder,
        &["-Xmx1g", "-XX:MaxDirectMemorySize=512m"],
    )?;
    run.args(archive.map(ClassArchive::option));
    run.args(["org.apache.pulsar.PulsarStandaloneStarter", "--config"])
        .arg(conf);
    run.arg("--metadata-dir").arg(node_folder.join("metadata"));
    run.arg("--bookkeeper-dir")
        .arg(node_folder.join("bookkeeper"));
    run.args(["--bookkeeper-port", &ports.others[0].to_string()]);
    run.args([
        "--no-functions-worker",
        "--no-stream-storage",
        "--advertised-address",
        "127.0.0.1",
    ]);
    let web = format!("http://127.0.0.1:{}", ports.web);
    Ok(Node {
        number,
        prepare: None,
        run,
        address: format!("127.0.0.1:{}", ports.client),
        // The broker is there before the namespace is that all examples use.
        health: vec![
            format!("{web}/admin/v2/brokers/health"),
            format!("{web}/admin/v2/persistent/public/default"),
        ],
        web: Some(web),
    })
}

fn opensearch(java: &Path, jars: &Path, folder: &Path, ports: &[NodePorts]) -> Result<Setup> {
    let [ports] = ports else {
        bail!("opensearch runs as one node")
    };
    let node_folder = node_folder(folder, 1)?;
    let archive = ClassArchive::missing(java, jars, folder);
    let mut run = jvm(java, jars, &node_folder, &["-Xms512m", "-Xmx512m"])?;
    run.args(archive.as_ref().map(ClassArchive::option));
    run.args([
        "org.codelibs.opensearch.runner.OpenSearchRunner",
        "-numOfNode",
        "1",
        "-printOnFailure",
        "-basePath",
    ]);
    run.arg(node_folder.join("data"));
    // The runner adds the node's number to the port. Nodes of one cluster name would find and join each other.
    run.args(["-baseHttpPort", &(ports.client - 1).to_string()]);
    run.args(["-clusterName", &format!("lab-{}", ports.client)]);
    let address = format!("127.0.0.1:{}", ports.client);
    let node = Node {
        number: 1,
        prepare: None,
        run,
        health: vec![format!(
            "http://{address}/_cluster/health?wait_for_status=yellow&timeout=1s"
        )],
        web: None,
        address,
    };
    Ok(Setup {
        archive,
        ..Setup::of(vec![node])
    })
}

fn nats(server: &Path, folder: &Path, ports: &[NodePorts]) -> Result<Setup> {
    let routes: Vec<_> = ports
        .iter()
        .map(|ports| format!("\"nats://127.0.0.1:{}\"", ports.others[0]))
        .collect();
    let mut nodes = Vec::new();
    for (node, number) in ports.iter().zip(1..) {
        let node_folder = node_folder(folder, number)?;
        let cluster = match ports {
            [_] => String::new(),
            _ => format!(
                "cluster {{\n  name: \"lab\"\n  listen: \"127.0.0.1:{}\"\n  routes: [{}]\n}}",
                node.others[0],
                routes.join(", ")
            ),
        };
        let values = [
            ("node", number.to_string()),
            ("port", node.client.to_string()),
            ("web_port", node.web.to_string()),
            ("data", node_folder.join("data").display().to_string()),
            ("cluster", cluster),
        ];
        let conf = node_folder.join("server.conf");
        write(&conf, &fill(include_str!("../nats/server.conf"), &values)?)?;
        let mut run = Command::new(server);
        run.arg("-c").arg(conf);
        let web = format!("http://127.0.0.1:{}", node.web);
        nodes.push(Node {
            number,
            prepare: None,
            run,
            address: format!("127.0.0.1:{}", node.client),
            health: vec![format!("{web}/healthz")],
            web: Some(web),
        });
    }
    Ok(Setup::of(nodes))
}

fn rabbit(
    program: &fetch::RabbitMq,
    folder: &Path,
    ports: &[NodePorts],
    claims: &mut Vec<Claim>,
) -> Result<Setup> {
    // Erlang's name server. Left to itself RabbitMQ starts one as a daemon, which would outlive everybody.
    let epmd = ports::claim()?;
    let epmd_port = epmd.port.to_string();
    claims.push(epmd);
    let mut companion = rabbit_command(program, "epmd");
    companion.args(["-address", "127.0.0.1", "-port", &epmd_port]);

    let plugins = folder.join("enabled_plugins");
    write(&plugins, include_str!("../rabbitmq/enabled_plugins"))?;
    let members: String = match ports {
        [_] => String::new(),
        _ => {
            ports
                .iter()
                .zip(1..)
                .map(|(_, node)| {
                    format!("cluster_formation.classic_config.nodes.{node} = lab{node}@localhost\n")
                })
                .collect::<String>()
                + "cluster_formation.peer_discovery_backend = classic_config\n"
        }
    };
    let mut nodes = Vec::new();
    for (node, number) in ports.iter().zip(1_u16..) {
        let node_folder = node_folder(folder, number)?;
        let values = [
            ("port", node.client.to_string()),
            ("web_port", node.web.to_string()),
            ("prometheus_port", node.others[1].to_string()),
            ("stream_port", node.others[2].to_string()),
            ("cluster", members.clone()),
        ];
        let conf = node_folder.join("rabbitmq.conf");
        write(
            &conf,
            &fill(include_str!("../rabbitmq/rabbitmq.conf"), &values)?,
        )?;
        let mut run = rabbit_command(program, "rabbitmq-server");
        run.env("RABBITMQ_NODENAME", format!("lab{number}@localhost"))
            .env("RABBITMQ_CONFIG_FILE", &conf)
            .env(
                "RABBITMQ_ADVANCED_CONFIG_FILE",
                node_folder.join("advanced.config"),
            )
            .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", &plugins)
            .env("RABBITMQ_MNESIA_BASE", node_folder.join("data"))
            .env("RABBITMQ_LOG_BASE", node_folder.join("log"))
            .env("RABBITMQ_LOGS", "-")
            .env("RABBITMQ_GENERATED_CONFIG_DIR", node_folder.join("config"))
            .env("RABBITMQ_PID_FILE", node_folder.join("pid"))
            .env("RABBITMQ_DIST_PORT", node.others[0].to_string())
            // Has the start script become the broker instead of waiting for it as its parent: signals must reach the
            // broker itself.
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
            .env("HOME", folder)
            // Without a limit, Erlang makes its port table as large as the container's limit of open files.
            .env("ERL_MAX_PORTS", "65536");
        let web = format!("http://127.0.0.1:{}", node.web);
        nodes.push(Node {
            number,
            prepare: None,
            run,
            address: format!("127.0.0.1:{}", node.client),
            health: vec![format!("{web}/api/overview")],
            web: Some(web),
        });
    }
    Ok(Setup {
        companion: Some(companion),
        ..Setup::of(nodes)
    })
}

/// A program of RabbitMQ or of its Erlang.
fn rabbit_command(rabbitmq: &fetch::RabbitMq, name: &str) -> Command {
    let folders = [
        rabbitmq.erlang_bin.as_deref(),
        Some(rabbitmq.sbin.as_path()),
    ];
    let own = folders
        .iter()
        .flatten()
        .map(|folder| folder.join(name))
        .find(|path| path.exists());
    let mut command = Command::new(own.unwrap_or_else(|| PathBuf::from(name)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let first = rabbitmq.erlang_bin.iter().cloned();
    if let Ok(path) = std::env::join_paths(first.chain(std::env::split_paths(&path))) {
        command.env("PATH", path);
    }
    command.envs(rabbitmq.env.iter().map(|(name, value)| (name, value)));
    command
}

impl Setup {
    /// One node that is not started by a recipe of this module.
    pub(crate) fn foreign(node: Node) -> Setup {
        Setup::of(vec![node])
    }

    fn of(nodes: Vec<Node>) -> Setup {
        Setup {
            nodes,
            companion: None,
            program: None,
            archive: None,
            _claims: Vec::new(),
        }
    }
}

/// The classes of a broker as its JVM has them in memory once they are read and checked (class data sharing). Half of
/// the time that a broker takes to start is spent on that.
///
/// A JVM writes it at an orderly end. It knows for which JVM and which jars it was made, and is not used with others.
#[derive(Debug)]
pub(crate) struct ClassArchive {
    written: PathBuf,
    kept: PathBuf,
}

impl ClassArchive {
    /// Beside the program's folder, one for each Java.
    fn path(java: &Path, jars: &Path) -> PathBuf {
        let java = Sha256::digest(java.as_os_str().as_encoded_bytes());
        let java: String = java
            .iter()
            .take(4)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let mut path = jars.as_os_str().to_owned();
        path.push(format!("-java-{java}.jsa"));
        path.into()
    }

    /// What a broker with this folder is to write, if there is none yet.
    fn missing(java: &Path, jars: &Path, folder: &Path) -> Option<ClassArchive> {
        let kept = ClassArchive::path(java, jars);
        let written = folder.join("classes.jsa");
        (!kept.exists()).then_some(ClassArchive { written, kept })
    }

    fn option(&self) -> String {
        format!("-XX:ArchiveClassesAtExit={}", self.written.display())
    }

    /// Puts what was written into its place, all at once: others may be starting with it. Without it they start slowly,
    /// so a failure is none.
    pub(crate) fn keep(&self) {
        let new = self
            .kept
            .with_extension(format!("{}.part", std::process::id()));
        if fs::copy(&self.written, &new).is_ok() {
            let _ = fs::rename(&new, &self.kept);
        }
        let _ = fs::remove_file(&self.written);
        let _ = fs::remove_file(&new);
    }
}

/// A JVM that starts fast and stays small rather than one that runs at its best after minutes.
fn jvm(java: &Path, jars: &Path, folder: &Path, options: &[&str]) -> Result<Command> {
    let logging = folder.join("log4j2.properties");
    write(&logging, include_str!("../log4j2.properties"))?;
    // The native libraries of the jars are unpacked there, 10 MB at each start, and a JVM that is killed leaves them.
    let scratch = folder.join("tmp");
    if scratch.exists() {
        fs::remove_dir_all(&scratch)
            .with_context(|| format!("cannot empty {}", scratch.display()))?;
    }
    fs::create_dir(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
    let mut command = Command::new(java);
    command
        .args(["-XX:TieredStopAtLevel=1", "-XX:+ExitOnOutOfMemoryError"])
        // Its figures would be files as well, outside of that folder.
        .arg("-XX:-UsePerfData")
        .arg(format!("-Djava.io.tmpdir={}", scratch.display()))
        .args(options);
    let archive = ClassArchive::path(java, jars);
    if archive.exists() {
        command.arg(format!("-XX:SharedArchiveFile={}", archive.display()));
    }
    // An archive that this JVM cannot use is passed over.
    command.args(["-Xlog:cds=off", "-Xlog:cds+dynamic=off"]);
    command.arg(format!("-Dlog4j2.configurationFile={}", logging.display()));
    // Pulsar and OpenSearch reach into the JDK.
    for package in [
        "java.lang",
        "java.nio",
        "jdk.internal.misc",
        "jdk.internal.platform",
        "sun.net",
        "java.util.zip",
    ] {
        command
            .arg("--add-opens")
            .arg(format!("java.base/{package}=ALL-UNNAMED"));
    }
    command.arg("-cp").arg(jars.join("*"));
    Ok(command)
}

fn node_folder(folder: &Path, number: u16) -> Result<PathBuf> {
    let path = folder.join(format!("node-{number}"));
    fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    Ok(path)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Replaces each `{name}`; a name without a value is a mistake in the template.
fn fill(template: &str, values: &[(&str, String)]) -> Result<String> {
    let mut text = template.to_owned();
    for (name, value) in values {
        let mark = format!("{{{name}}}");
        if !text.contains(&mark) {
            bail!("the template has no {mark}");
        }
        text = text.replace(&mark, value);
    }
    Ok(text)
}
