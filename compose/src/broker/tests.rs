//! Private brokers: each starts, can be broken and comes back; several live side by side; none stays behind.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::Broker;
use crate::probe::{self, Found};
use crate::security::BROKER;
use crate::{Service, User};

const PATIENCE: Duration = Duration::from_secs(5);

fn host(broker: &Broker) -> String {
    broker.setup.nodes[0].host.clone()
}

fn ask(broker: &Broker) -> Found {
    broker.service().probe(&host(broker), PATIENCE)
}

/// Waits for what must come soon, and says what it waited for if it does not.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The states of a process's threads. Empty where the system does not tell.
fn thread_states(pid: u32) -> Vec<char> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let stats = threads.into_iter().flatten().flatten();
    // "17 (name) S 1 …", and a name may have spaces.
    stats
        .filter_map(|thread| {
            let stat = fs::read_to_string(thread.path().join("stat")).ok()?;
            stat.rsplit(") ").next()?.chars().next()
        })
        .collect()
}

/// The addresses on which a process listens, as the kernel writes them. Empty where the system does not tell.
fn listening(pid: u32) -> Vec<String> {
    let files = fs::read_dir(format!("/proc/{pid}/fd"));
    let sockets: Vec<String> = files
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|file| {
            let target = fs::read_link(file.path()).ok()?;
            let inode = target.to_str()?.strip_prefix("socket:[")?;
            Some(inode.trim_end_matches(']').to_owned())
        })
        .collect();
    let mut addresses = Vec::new();
    for table in ["tcp", "tcp6"] {
        let table = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        for line in table.lines() {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // Its local address, its state, its inode.
            if let (Some(local), Some(&"0A"), Some(inode)) =
                (fields.get(1), fields.get(3), fields.get(9))
                && sockets.iter().any(|socket| socket == inode)
            {
                addresses.push((*local).to_owned());
            }
        }
    }
    addresses
}

fn breaks_and_comes_back(service: Service) {
    let broker = Broker::private(service).unwrap();
    assert_eq!(ask(&broker), Found::Ready);
    let folder = broker.folder().to_owned();
    let before = broker.pid(1).unwrap().unwrap();

    let addresses = listening(before);
    let is_loopback = |address: &String| {
        [
            "0100007F:",
            "0000000000000000FFFF00000100007F:",
            "00000000000000000000000001000000:",
        ]
        .iter()
        .any(|loopback| address.starts_with(loopback))
    };
    assert!(addresses.iter().all(is_loopback), "{addresses:?}");
    assert!(
        !addresses.is_empty() || cfg!(not(target_os = "linux")),
        "it listens nowhere"
    );

    broker.pause(1).unwrap();
    let states = thread_states(before);
    assert!(
        states.iter().all(|state| "TD".contains(*state)),
        "{states:?}"
    );
    // The kernel still accepts the connection of a stopped process, but nobody speaks.
    assert_eq!(
        service.probe(&host(&broker), Duration::from_millis(300)),
        Found::Other
    );
    broker.resume(1).unwrap();
    eventually("it answers again after the pause", || {
        ask(&broker) == Found::Ready
    });

    broker.kill(1).unwrap();
    assert!(!broker.is_running(1).unwrap());
    assert_eq!(ask(&broker), Found::Nothing);
    broker.restart(1).unwrap();
    assert_eq!(ask(&broker), Found::Ready);
    assert_ne!(broker.pid(1).unwrap().unwrap(), before);

    let address = host(&broker);
    drop(broker);
    assert_eq!(service.probe(&address, PATIENCE), Found::Nothing);
    assert!(!folder.exists(), "{} is left", folder.display());
}

#[test]
fn every_service_breaks_and_comes_back() {
    std::thread::scope(|scope| {
        let tests = Service::ALL.map(|service| {
            let test = std::thread::Builder::new().name(service.to_string());
            test.spawn_scoped(scope, move || breaks_and_comes_back(service))
                .unwrap()
        });
        // All of them, so that the failure of one does not hide another's.
        let ended = tests.map(|test| test.join().is_ok());
        let failed: Vec<_> = Service::ALL
            .iter()
            .zip(ended)
            .filter(|(_, ok)| !ok)
            .collect();
        assert!(failed.is_empty(), "{failed:?}; see above");
    });
}

#[test]
fn private_brokers_do_not_meet() {
    let one = Broker::private(Service::Nats).unwrap();
    let two = Broker::private(Service::Nats).unwrap();
    assert_ne!(one.address(), two.address());
    one.kill(1).unwrap();
    assert_eq!(ask(&two), Found::Ready);
}

#[test]
fn rabbitmq_nodes_form_a_cluster() {
    let cluster = Broker::private_cluster(Service::RabbitMq, 3).unwrap();
    let page = format!("{}/api/nodes", cluster.web()[0]);
    eventually("all three nodes run as one cluster", || {
        let body = probe::http_get(&page, PATIENCE)
            .map(|(_, body)| body)
            .unwrap_or_default();
        body.matches("\"running\":true").count() == 3
    });
}

/// What is said of RabbitMQ is said of 4.x. An older one is a fall-back for learners, and proves nothing here.
#[test]
fn rabbitmq_under_test_is_a_supported_one() {
    let broker = Broker::private(Service::RabbitMq).unwrap();
    let version = broker.version().unwrap();
    let major = version.split('.').next().unwrap();
    assert!(major.parse::<u32>().unwrap() >= 4, "{version}");
}

#[test]
fn nats_nodes_form_a_cluster() {
    let cluster = Broker::private_cluster(Service::Nats, 3).unwrap();
    cluster.kill(2).unwrap();
    // Two of three are a majority, so JetStream goes on; the health page says so.
    let page = format!("{}/healthz", cluster.web()[0]);
    eventually("JetStream works with two of three nodes", || {
        probe::http_get(&page, PATIENCE).is_some_and(|(status, _)| status == 200)
    });
    cluster.restart(2).unwrap();
}

#[test]
fn secured_nodes_of_kafka_form_a_cluster() {
    // They find each other by the broker's certificate, or they do not serve and give no rights.
    let cluster = Broker::temporary(Service::Kafka, 3, true, false).unwrap();
    cluster.kill(2).unwrap();
    cluster.restart(2).unwrap();
}

/// A server that joins the cluster may do everything, whoever it is.
#[test]
fn secured_nodes_of_nats_form_a_cluster_that_no_user_can_join() {
    let cluster = Broker::temporary(Service::Nats, 3, true, false).unwrap();
    let setup = &cluster.setup;
    let security = setup.security.as_ref().unwrap();
    let conf = fs::read_to_string(cluster.folder().join("node-1/server.conf")).unwrap();
    // As the first node, but for the name, the ports, the storage and the certificate.
    let routes = conf.find("cluster {").unwrap();
    let mut other = conf[routes..].replace(
        &security.certificate(BROKER),
        &security.certificate(User::Application),
    );
    other = other.replace(&security.key(BROKER), &security.key(User::Application));
    let listen = other.find("listen:").unwrap();
    let end = other[listen..].find('\n').unwrap() + listen;
    other.replace_range(listen..end, "listen: \"127.0.0.1:-1\"");
    let other = &other[..other.find("\n}").unwrap() + 2];
    let file = cluster.folder().join("other.conf");
    fs::write(
        &file,
        format!("server_name: other\nlisten: \"127.0.0.1:-1\"\n{other}\n"),
    )
    .unwrap();
    let mut other = Command::new(setup.nodes[0].run.get_program());
    let mut other = other
        .arg("-c")
        .arg(&file)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("the cluster refuses it", || {
        let log = fs::read_to_string(cluster.log(1).unwrap()).unwrap();
        log.contains("Router connection closed: Authentication Failure")
    });
    other.kill().unwrap();
    other.wait().unwrap();
    let page = format!("{}/routez", cluster.web()[0]);
    let (_, body) = probe::http_get(&page, PATIENCE).unwrap();
    assert!(!body.contains("\"other\""), "{body}");
}

#[test]
fn two_nodes_of_pulsar_are_two_clusters() {
    let broker = Broker::private_cluster(Service::Pulsar, 2).unwrap();
    let env = broker.env();
    let value = |name: &str| {
        env.iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.clone())
            .unwrap()
    };
    assert_ne!(value("PULSAR_ADDRESS"), value("PULSAR_ADDRESS_B"));
    for (admin, cluster) in [
        ("PULSAR_ADMIN_URL", "standalone"),
        ("PULSAR_ADMIN_URL_B", "standalone-2"),
    ] {
        let page = format!("{}/admin/v2/clusters", value(admin));
        let (status, body) = probe::http_get(&page, PATIENCE).unwrap();
        assert_eq!(
            (status, body.trim()),
            (200, format!("[\"{cluster}\"]").as_str())
        );
    }
}

#[test]
fn a_service_of_one_node_says_so() {
    let error = Broker::private_cluster(Service::OpenSearch, 3).unwrap_err();
    assert!(
        format!("{error:#}").contains("opensearch runs on 1 node here, not on 3"),
        "{error:#}"
    );
}

#[test]
fn a_node_that_is_not_there_is_named() {
    let broker = Broker::private(Service::Nats).unwrap();
    let error = broker.kill(7).unwrap_err();
    assert_eq!(
        error.to_string(),
        "nats has no node 7; its nodes are numbered from 1 to 1"
    );
}
