//! What must agree in different places of the repository.

// Clippy's leave for tests does not reach the functions that tests call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

use compose::fetch;

#[test]
fn docker_runs_the_versions_that_run_natively() {
    let compose =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("compose.yaml")).unwrap();
    for (service, version) in fetch::versions() {
        let (_, after) = compose
            .split_once(&format!("\n  {service}:\n"))
            .expect(service);
        let image = after
            .lines()
            .find_map(|line| line.trim().strip_prefix("image: "))
            .expect(service);
        let (_, tag) = image.split_once(':').expect("an image without a tag");
        let same = tag == version || tag.starts_with(&format!("{version}-"));
        assert!(
            same,
            "{service}: compose.yaml has {tag}, natively it is {version}"
        );
    }
}

/// Whoever learns NATS must not wait for librdkafka to build: `lab` links no client, and each crate only its own.
#[test]
fn nobody_builds_the_client_of_another_broker() {
    const CLIENTS: [&str; 4] = ["rdkafka", "lapin", "async-nats", "pulsar"];
    for (package, own) in [
        ("compose", None),
        ("kafka-examples", Some("rdkafka")),
        ("rabbitmq-examples", Some("lapin")),
        ("nats-examples", Some("async-nats")),
        ("pulsar-examples", Some("pulsar")),
    ] {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let output = Command::new(cargo)
            .args([
                "tree",
                "--package",
                package,
                "--edges",
                "normal,build",
                "--prefix",
                "none",
            ])
            .args(["--format", "{p}"])
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
        for client in CLIENTS {
            assert_eq!(
                crates.contains(&client),
                Some(client) == own,
                "{package} and {client}"
            );
        }
    }
}
