//! What must agree in different places of the repository.

// Clippy's leave for tests does not reach the functions that tests call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

use compose::Service;
use compose::harness::Workspace;

fn read(file: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap()
}

#[test]
fn docker_runs_the_versions_that_run_natively() {
    let compose = read("compose.yaml");
    for service in Service::ALL {
        let (version, service) = (service.version(), service.name());
        let (_, after) = compose
            .split_once(&format!("\n  {service}:"))
            .unwrap_or_else(|| panic!("compose.yaml has no service {service}"));
        let image = after
            .lines()
            .find_map(|line| line.trim().strip_prefix("image: "))
            .unwrap_or_else(|| panic!("compose.yaml has no image of {service}"));
        let (_, tag) = image.split_once(':').expect("an image without a tag");
        let same = tag == version || tag.starts_with(&format!("{version}-"));
        assert!(
            same,
            "{service}: compose.yaml has {tag}, natively it is {version}"
        );
    }
}

#[test]
fn every_service_in_docker_listens_on_the_port_that_lab_chooses() {
    let compose = read("compose.yaml");
    for service in Service::ALL {
        let variable = format!("LAB_{}_PORT_1", service.name().to_uppercase());
        let port = format!("\"127.0.0.1:${{{variable}:-");
        assert!(compose.contains(&port), "compose.yaml lacks {variable}");
    }
}

/// One that is missing is noticed only by the example that needs it.
#[test]
fn kafka_has_in_docker_the_settings_that_it_has_natively() {
    let compose = read("compose.yaml");
    for line in read("kafka/server.properties").lines() {
        let Some((key, value)) = line.split_once('=') else {
            continue;
        };
        // One node has the first of these, each of three the second.
        let values = match value {
            "{replicas}" => vec!["1", "3"],
            "{in_sync}" => vec!["1", "2"],
            // Addresses differ.
            _ if value.contains('{') || line.starts_with('#') || key.contains("listener") => vec![],
            value => vec![value],
        };
        let variable = key.replace('.', "_").to_uppercase();
        for value in values {
            let setting = format!("KAFKA_{variable}: {value}\n");
            assert!(compose.contains(&setting), "compose.yaml lacks {setting}");
        }
    }
}

const CLIENTS: [&str; 4] = ["rdkafka", "lapin", "async-nats", "pulsar"];

/// Those of the [`CLIENTS`] that cargo builds for a package.
fn clients_of(package: &str, features: &[&str]) -> Vec<&'static str> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["tree", "--package", package])
        .args(["--edges", "normal,build", "--prefix", "none"])
        .args(["--format", "{p}"])
        .args(features)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let tree = String::from_utf8(output.stdout).unwrap();
    let crates: Vec<_> = tree
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    CLIENTS
        .into_iter()
        .filter(|client| crates.contains(client))
        .collect()
}

/// Whoever learns NATS must not wait for librdkafka to build: `lab` links no client, and each crate only its own.
#[test]
fn nobody_builds_the_client_of_another_broker() {
    assert!(clients_of("compose", &[]).is_empty());
    for (package, own) in [
        ("kafka-examples", "rdkafka"),
        ("rabbitmq-examples", "lapin"),
        ("nats-examples", "async-nats"),
        ("pulsar-examples", "pulsar"),
    ] {
        assert_eq!(clients_of(package, &[]), [own], "{package}");
    }
}

/// `cargo lab run` gives a scenario the features that it requires, and no others.
#[test]
fn a_scenario_builds_the_clients_of_the_brokers_it_runs_on() {
    let workspace = Workspace::load().unwrap();
    let scenarios: Vec<_> = workspace
        .examples()
        .iter()
        .filter(|example| example.package == "scenarios")
        .collect();
    assert!(!scenarios.is_empty());
    for scenario in scenarios {
        let features = scenario.features.join(",");
        let features = ["--no-default-features", "--features", &features];
        let expected: Vec<_> = [
            ("kafka", "rdkafka"),
            ("rabbitmq", "lapin"),
            ("nats", "async-nats"),
            ("pulsar", "pulsar"),
        ]
        .into_iter()
        .filter(|(service, _)| scenario.services.iter().any(|needed| needed == service))
        .map(|(_, client)| client)
        .collect();
        assert_eq!(
            clients_of("scenarios", &features),
            expected,
            "{}",
            scenario.name
        );
    }
}
