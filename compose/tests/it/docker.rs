//! `lab` with brokers in containers, on a real engine: they are started, broken and stopped, and nothing is left behind.
//!
//! Ignored, as few machines that run the tests have an engine. It takes `docker` with `docker compose`, some 4 GB of
//! memory, and the images of `compose.yaml`, which are fetched where the engine lacks them:
//!
//!     cargo test -p compose --test it docker -- --ignored

// Clippy's leave for tests does not reach the functions that tests call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use compose::Service;
use compose::harness::http_get;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

/// One test at a time: a few brokers are enough for a laptop's memory.
static ENGINE: Mutex<()> = Mutex::new(());

const PATIENCE: Duration = Duration::from_secs(5);

/// A `lab` with a `LAB_HOME` of its own, and with free ports.
struct Lab {
    home: TempDir,
    _engine: MutexGuard<'static, ()>,
}

impl Lab {
    fn new() -> Lab {
        Lab {
            _engine: ENGINE.lock().unwrap_or_else(PoisonError::into_inner),
            home: tempfile::tempdir().unwrap(),
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
        command
            .args(arguments)
            .env("LAB_HOME", self.home.path())
            .env("LAB_BACKEND", "docker")
            .env("LAB_PORTS", "free")
            .stdin(Stdio::null());
        for service in Service::ALL {
            command.env_remove(service.variable());
        }
        command
    }

    #[track_caller]
    fn ok(&self, arguments: &[&str]) -> String {
        ok(&mut self.command(arguments))
    }

    #[track_caller]
    fn fails(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Starts the service in the background.
    fn up(&self, service: &str, nodes: &str) -> Running {
        self.ok(&["up", service, "--nodes", nodes, "--detach"]);
        self.running(service)
    }

    /// What runs, once it serves.
    fn running(&self, service: &str) -> Running {
        let file = self.home.path().join(format!("run/{service}.json"));
        let mut text = Vec::new();
        eventually("the service is published", || {
            text = fs::read(&file).unwrap_or_default();
            !text.is_empty()
        });
        let entry: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(entry["backend"], "docker");
        let address = entry["env"][0][1].as_str().unwrap();
        let hosts = address.split(',').map(|host| {
            let host = host.rsplit(['/', '@']).find(|part| part.contains(':'));
            host.unwrap().to_owned()
        });
        let hosts: Vec<_> = hosts.collect();
        let port = hosts[0].rsplit(':').next().unwrap();
        let publishes = format!("publish={port}");
        let project = "{{.Label \"com.docker.compose.project\"}}";
        let project = docker(&["ps", "--filter", &publishes, "--format", project]);
        let mut running = Running {
            hosts,
            entry,
            project: project.trim().to_owned(),
            volumes: Vec::new(),
        };
        for container in running.containers() {
            let names = "{{range .Mounts}}{{.Name}} {{end}}";
            let names = docker(&["inspect", "--format", names, &container]);
            let names = names.split_whitespace().map(str::to_owned);
            running.volumes.extend(names);
        }
        running
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.command(&["down"]).output();
    }
}

/// A service as the engine sees it, and as the owner has published it.
struct Running {
    /// `host:port` of each node.
    hosts: Vec<String>,
    entry: Value,
    project: String,
    volumes: Vec<String>,
}

impl Running {
    fn listed(&self, list: &[&str]) -> Vec<String> {
        let label = format!("label=com.docker.compose.project={}", self.project);
        let output = docker(&[list, &["--filter", &label]].concat());
        output.lines().map(str::to_owned).collect()
    }

    /// Also those that do not run.
    fn containers(&self) -> Vec<String> {
        self.listed(&["ps", "--all", "--format", "{{.Names}}"])
    }

    /// Runs a script in the container of this node.
    fn execute(&self, node: &str, script: &str) -> Output {
        let name = format!("{}-{node}-1", self.project);
        let mut command = Command::new("docker");
        command.args(["exec", &name, "sh", "-c", script]);
        command.output().unwrap()
    }

    fn leftovers(&self) -> Vec<String> {
        let networks = self.listed(&["network", "ls", "--format", "{{.Name}}"]);
        let all = docker(&["volume", "ls", "--quiet"]);
        let volumes = self.volumes.iter().cloned();
        let volumes = volumes.filter(|volume| all.lines().any(|other| other == volume));
        let containers = self.containers().into_iter();
        containers.chain(networks).chain(volumes).collect()
    }

    #[track_caller]
    fn assert_nothing_is_left(&self) {
        assert!(self.project.contains("messaging-lab-"), "{}", self.project);
        assert_eq!(self.leftovers(), Vec::<String>::new());
    }

    fn web(&self, node: usize, page: &str) -> String {
        format!("{}{page}", self.entry["web"][node].as_str().unwrap())
    }

    fn owner(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.entry["owner"].as_i64().unwrap()).unwrap())
    }
}

#[track_caller]
fn ok(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn docker(arguments: &[&str]) -> String {
    ok(Command::new("docker").args(arguments))
}

#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// SIGKILL, and a new start. `serves` asks the broker for what was stored before.
fn dies_and_comes_back(lab: &Lab, service: &str, running: &Running, serves: impl Fn() -> bool) {
    assert!(serves());
    assert_eq!(lab.ok(&["kill", service]), format!("{service}: killed\n"));
    assert!(lab.ok(&["status"]).contains("node 1: ended"));
    assert!(TcpStream::connect(&running.hosts[0]).is_err());
    assert!(lab.fails(&["pause", service]).contains("not running"));
    lab.ok(&["restart", service]);
    assert!(lab.ok(&["status"]).contains("node 1: running"));
    assert!(serves());
}

/// All else that can be done to one node, up to its end.
fn pauses_restarts_and_ends(
    lab: &Lab,
    service: &str,
    running: &Running,
    serves: impl Fn() -> bool,
) {
    assert!(serves());
    lab.ok(&["pause", service]);
    assert!(lab.ok(&["status"]).contains("node 1: paused"));
    assert!(!serves());
    lab.ok(&["resume", service]);
    eventually("it answers again", &serves);

    lab.ok(&["restart", service]);
    assert!(serves());
    lab.ok(&["pause", service]);
    lab.ok(&["restart", service]);
    assert!(serves());
    assert!(!lab.ok(&["logs", service]).is_empty());

    lab.ok(&["pause", service]);
    assert_eq!(running.containers().len(), 1);
    assert_eq!(lab.ok(&["down"]), format!("{service}: stopped\n"));
    running.assert_nothing_is_left();
}

/// The addresses of the nodes that Kafka names to its clients.
fn kafka_nodes(host: &str) -> io::Result<BTreeSet<String>> {
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // Metadata request, version 0, correlation id 7, no client id, and an empty list: of all topics.
    stream.write_all(&[0, 0, 0, 14, 0, 3, 0, 0, 0, 0, 0, 7, 0xff, 0xff, 0, 0, 0, 0])?;
    let number = |bytes: &mut dyn Read, width: usize| -> io::Result<usize> {
        let mut number = [0; 8];
        bytes.read_exact(&mut number[8 - width..])?;
        Ok(usize::try_from(u64::from_be_bytes(number)).unwrap())
    };
    let length = number(&mut stream, 4)?;
    let mut answer = vec![0; length];
    stream.read_exact(&mut answer)?;
    // After the correlation id.
    let mut rest = &answer[4..];
    let count = number(&mut rest, 4)?;
    let mut nodes = BTreeSet::new();
    for _ in 0..count {
        let _id = number(&mut rest, 4)?;
        let mut name = vec![0; number(&mut rest, 2)?];
        rest.read_exact(&mut name)?;
        let name = String::from_utf8(name).unwrap();
        nodes.insert(format!("{name}:{}", number(&mut rest, 4)?));
    }
    Ok(nodes)
}

/// Writes a message from within a node's container, and is told that all replicas in sync have it.
fn kafka_write(running: &Running, node: &str, message: &str) -> bool {
    let script = format!(
        "echo {message} | /opt/kafka/bin/kafka-console-producer.sh --bootstrap-server {node}:19092 \
         --producer-property acks=all --topic orders --sync"
    );
    running.execute(node, &script).status.success()
}

fn kafka_read(running: &Running, node: &str, count: u16) -> String {
    let script = format!(
        "/opt/kafka/bin/kafka-console-consumer.sh --bootstrap-server {node}:19092 --topic orders \
         --from-beginning --timeout-ms 30000 --max-messages {count}"
    );
    String::from_utf8(running.execute(node, &script).stdout).unwrap()
}

#[test]
#[ignore = "needs a Docker engine"]
fn kafka_is_broken_and_mended() {
    let lab = Lab::new();
    let running = lab.up("kafka", "1");
    assert!(kafka_write(&running, "kafka", "kept"));
    let serves = || {
        kafka_nodes(&running.hosts[0]).is_ok_and(|nodes| nodes.iter().eq(&running.hosts))
            && kafka_read(&running, "kafka", 1) == "kept\n"
    };
    dies_and_comes_back(&lab, "kafka", &running, serves);
    pauses_restarts_and_ends(&lab, "kafka", &running, serves);
}

#[test]
#[ignore = "needs a Docker engine"]
fn a_node_of_kafka_is_killed_and_the_others_serve() {
    let lab = Lab::new();
    let running = lab.up("kafka", "3");
    assert_eq!(running.containers().len(), 3);
    let knows = |node: usize, hosts: &[String]| {
        let hosts = hosts.iter().cloned().collect();
        kafka_nodes(&running.hosts[node]).is_ok_and(|nodes| nodes == hosts)
    };
    eventually("all nodes know all", || {
        (0..3).all(|node| knows(node, &running.hosts))
    });
    assert!(kafka_write(&running, "kafka-1", "first"));
    let topics = "/opt/kafka/bin/kafka-topics.sh --describe --topic orders --bootstrap-server";
    let described = running.execute("kafka-1", &format!("{topics} kafka-1:19092"));
    let described = String::from_utf8(described.stdout).unwrap();
    for setting in ["ReplicationFactor: 3", "min.insync.replicas=2"] {
        assert!(described.contains(setting), "{described}");
    }

    assert_eq!(lab.ok(&["kill", "kafka.2"]), "kafka.2: killed\n");
    let left = [running.hosts[0].clone(), running.hosts[2].clone()];
    eventually("the others have noticed", || knows(0, &left));
    assert!(lab.ok(&["status"]).contains("node 2: ended"));
    assert!(kafka_write(&running, "kafka-1", "second"));
    assert_eq!(kafka_read(&running, "kafka-3", 2).lines().count(), 2);

    lab.ok(&["restart", "kafka.2"]);
    eventually("all nodes know all again", || {
        (0..3).all(|node| knows(node, &running.hosts))
    });
    assert_eq!(kafka_read(&running, "kafka-2", 2).lines().count(), 2);
    lab.ok(&["down", "kafka"]);
    running.assert_nothing_is_left();
}

/// A request of NATS and its answer.
fn nats_request(host: &str, subject: &str, body: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "CONNECT {{\"verbose\":false}}\r\nSUB answer 1\r\nPUB {subject} answer {}\r\n{body}\r\n",
        body.len()
    )?;
    let mut lines = BufReader::new(stream).lines();
    while let Some(line) = lines.next() {
        if line?.starts_with("MSG answer ") {
            return lines.next().unwrap_or_else(|| Ok(String::new()));
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

fn nats_stream(host: &str, replicas: u16) -> bool {
    let stream = json!({ "name": "orders", "subjects": ["orders"], "num_replicas": replicas });
    let answer = nats_request(host, "$JS.API.STREAM.CREATE.orders", &stream.to_string());
    answer.is_ok_and(|answer| !answer.contains("\"error\""))
}

/// Writes a message, and is told that it is stored.
fn nats_write(host: &str) -> bool {
    nats_request(host, "orders", "kept").is_ok_and(|answer| answer.contains("\"seq\""))
}

fn nats_count(host: &str) -> Option<u64> {
    let answer = nats_request(host, "$JS.API.STREAM.INFO.orders", "").ok()?;
    let answer: Value = serde_json::from_str(&answer).ok()?;
    answer["state"]["messages"].as_u64()
}

#[test]
#[ignore = "needs a Docker engine"]
fn nats_is_broken_and_mended() {
    let lab = Lab::new();
    let running = lab.up("nats", "1");
    let host = &running.hosts[0];
    assert!(nats_stream(host, 1) && nats_write(host));
    let serves = || nats_count(host) == Some(1);
    dies_and_comes_back(&lab, "nats", &running, serves);
    pauses_restarts_and_ends(&lab, "nats", &running, serves);
}

#[test]
#[ignore = "needs a Docker engine"]
fn a_node_of_nats_is_killed_and_the_others_serve() {
    let lab = Lab::new();
    let running = lab.up("nats", "3");
    assert_eq!(running.containers().len(), 3);
    let [first, second, third] = running.hosts.as_slice() else {
        panic!("{:?}", running.hosts);
    };
    eventually("a stream is on three nodes", || nats_stream(first, 3));
    eventually("the stream has a leader", || nats_write(first));
    // What a node tells its clients of the others can be reached from here.
    let stream = TcpStream::connect(first).unwrap();
    let mut greeting = String::new();
    BufReader::new(stream).read_line(&mut greeting).unwrap();
    for host in &running.hosts {
        assert!(greeting.contains(&format!("\"{host}\"")), "{greeting}");
    }

    lab.ok(&["kill", "nats.2"]);
    assert!(TcpStream::connect(second).is_err());
    // They may have to elect a leader, and a write whose answer was lost may count twice.
    eventually("the others take messages", || nats_write(third));
    eventually("the others have them", || nats_count(first) >= Some(2));
    lab.ok(&["restart", "nats.2"]);
    eventually("it has them too", || nats_count(second) >= Some(2));
    lab.ok(&["down", "nats"]);
    running.assert_nothing_is_left();
}

/// Asks RabbitMQ's management interface for something.
fn rabbitmq(running: &Running, method: &str, path: &str, body: &Value) -> Option<Value> {
    let agent = ureq::Agent::config_builder().timeout_global(Some(PATIENCE));
    let request = ureq::http::Request::builder()
        .method(method)
        .uri(running.web(0, path))
        .header("authorization", "Basic Z3Vlc3Q6Z3Vlc3Q=")
        .body(body.to_string());
    let answer = agent.build().new_agent().run(request.unwrap());
    let answer = answer.ok()?.body_mut().read_to_string().ok()?;
    Some(serde_json::from_str(&answer).unwrap_or_default())
}

#[test]
#[ignore = "needs a Docker engine"]
fn rabbitmq_is_broken_and_mended() {
    let lab = Lab::new();
    let running = lab.up("rabbitmq", "1");
    let page = running.web(0, "/api/overview");
    let serves = || http_get(&page, PATIENCE).is_some_and(|(status, _)| status == 200);
    dies_and_comes_back(&lab, "rabbitmq", &running, serves);

    // Only now, as this interface does not say when a message is stored.
    let queue = json!({ "durable": true });
    rabbitmq(&running, "PUT", "/api/queues/%2f/orders", &queue).unwrap();
    let message = json!({
        "routing_key": "orders", "payload": "kept", "payload_encoding": "string",
        "properties": { "delivery_mode": 2 },
    });
    let publish = "/api/exchanges/%2f/amq.default/publish";
    let answer = rabbitmq(&running, "POST", publish, &message).unwrap();
    assert_eq!(answer["routed"], true);
    let serves = || {
        let get = json!({ "count": 1, "ackmode": "ack_requeue_true", "encoding": "auto" });
        let found = rabbitmq(&running, "POST", "/api/queues/%2f/orders/get", &get);
        found.is_some_and(|found| found[0]["payload"] == "kept")
    };
    eventually("the message is in the queue", serves);
    pauses_restarts_and_ends(&lab, "rabbitmq", &running, serves);
}

#[test]
#[ignore = "needs a Docker engine"]
fn nothing_outlives_an_owner_that_is_killed() {
    let lab = Lab::new();
    lab.ok(&["up", "kafka", "nats", "--nodes", "3", "--detach"]);
    let (kafka, nats) = (lab.running("kafka"), lab.running("nats"));
    lab.ok(&["kill", "kafka.1"]);
    lab.ok(&["pause", "kafka.3"]);
    lab.ok(&["pause", "nats.2"]);
    assert_eq!(kafka.containers().len() + nats.containers().len(), 6);
    kill(kafka.owner(), Signal::SIGKILL).unwrap();
    eventually("all is gone", || {
        kafka.leftovers().is_empty() && nats.leftovers().is_empty()
    });
    assert!(lab.ok(&["status"]).contains("kafka       -"));
}

#[test]
#[ignore = "needs a Docker engine"]
fn a_service_goes_and_the_other_stays_until_ctrl_c() {
    let lab = Lab::new();
    let mut up = lab.command(&["up", "nats", "rabbitmq"]);
    let mut up = up.stdout(Stdio::null()).spawn().unwrap();
    let (nats, rabbitmq) = (lab.running("nats"), lab.running("rabbitmq"));
    assert_eq!(lab.ok(&["down", "rabbitmq"]), "rabbitmq: stopped\n");
    rabbitmq.assert_nothing_is_left();
    assert!(nats_stream(&nats.hosts[0], 1));
    kill(nats.owner(), Signal::SIGINT).unwrap();
    assert!(up.wait().unwrap().success());
    nats.assert_nothing_is_left();
}

/// As after a crash that has taken the watchers along.
#[test]
#[ignore = "needs a Docker engine"]
fn what_was_left_behind_is_no_hindrance() {
    let lab = Lab::new();
    let before = lab.up("nats", "1");
    assert!(nats_stream(&before.hosts[0], 1));
    lab.ok(&["down"]);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("compose.yaml");
    let mut compose = Command::new("docker");
    compose.args(["compose", "--profile", "nats-cluster", "--project-name"]);
    compose.arg(&before.project).arg("--file").arg(file);
    for node in 1..=3 {
        // Port 0 is one that the engine chooses.
        compose.env(format!("LAB_NATS_PORT_{node}"), "0");
        compose.env(format!("LAB_NATS_WEB_{node}"), "0");
    }
    ok(compose.args(["up", "--detach"]));
    docker(&["kill", &format!("{}-nats-2-1", before.project)]);
    assert_eq!(before.containers().len(), 3);

    let running = lab.up("nats", "1");
    assert_eq!(running.project, before.project);
    assert_eq!(running.containers().len(), 1);
    assert_eq!(nats_count(&running.hosts[0]), None);
    lab.ok(&["down"]);
    running.assert_nothing_is_left();
}

#[test]
#[ignore = "needs a Docker engine"]
fn an_example_runs_on_a_container_that_goes_with_it() {
    let lab = Lab::new();
    let before = docker(&["ps", "--all", "--quiet"]);
    let said = lab.ok(&["run", "nats_publish"]);
    assert!(said.contains("events.user.created"), "{said}");
    assert_eq!(docker(&["ps", "--all", "--quiet"]), before);
}

#[test]
#[ignore = "needs a Docker engine"]
fn clusters_that_compose_yaml_does_not_have_are_refused() {
    let lab = Lab::new();
    for (service, nodes) in [("rabbitmq", "3"), ("kafka", "2"), ("nats", "5")] {
        let error = lab.fails(&["up", service, "--nodes", nodes]);
        let reason = format!("in Docker, {service} does not run on {nodes} nodes");
        assert!(error.contains(&reason), "{error}");
    }
}
