//! `lab up --secure`: what it says, what it writes, and what nobody else gets to see.

// Clippy's leave for tests does not reach the functions that tests call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::lab::Lab;

const SERVICES: [&str; 4] = ["kafka", "rabbitmq", "nats", "pulsar"];

/// The files of a `LAB_HOME` with a password, a token or a key in them, and what stands there.
fn secrets(home: &Path) -> Vec<(PathBuf, String)> {
    let mut secrets = Vec::new();
    for service in SERVICES {
        let folder = home.join("secure").join(service);
        for folder in [folder.clone(), folder.join("certificates")] {
            for file in fs::read_dir(folder).unwrap() {
                let path = file.unwrap().path();
                let end = path.extension().and_then(|end| end.to_str());
                if let Some("password" | "token" | "seed" | "key") = end {
                    let text = fs::read_to_string(&path).unwrap();
                    // Of a key in PEM the middle: its ends are the same in all.
                    let line = text.lines().nth(1).unwrap_or(&text).to_owned();
                    secrets.push((path, line));
                }
            }
        }
    }
    // Two passwords and three keys each, one seed, two tokens, and the key with which tokens are signed.
    assert_eq!(secrets.len(), 4 * 5 + 1 + 3, "{secrets:?}");
    secrets
}

/// The command lines of all processes.
fn process_list() -> BTreeSet<String> {
    let output = Command::new("ps")
        .args(["-A", "-ww", "-o", "args="])
        .output();
    let text = String::from_utf8_lossy(&output.unwrap().stdout).into_owned();
    text.lines().map(str::to_owned).collect()
}

/// Files below the folder that somebody else than the owner could read, if the folder above is open to all.
fn readable(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    // What is gone meanwhile cannot be read.
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(kind) = entry.metadata() else {
            continue;
        };
        let closed = kind.permissions().mode() & 0o077 == 0;
        if kind.is_dir() && !closed {
            found.extend(readable(&path));
        } else if kind.is_file() && !closed {
            found.push(path);
        }
    }
    found
}

/// What a shell has in the variable after it has read the file.
fn sourced(file: &Path, variable: &str) -> String {
    let script = format!(". '{}' && printf %s \"${variable}\"", file.display());
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_secured_broker_says_how_to_connect_and_shows_no_secret() {
    let lab = Lab::new();
    let mut command = lab.command(&["up", "--secure", "--detach"]);
    let mut up = command
        .args(SERVICES)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Also what formats a storage or gives a right, and ends at once.
    let mut seen = BTreeSet::new();
    while up.try_wait().unwrap().is_none() {
        seen.extend(process_list());
        std::thread::sleep(Duration::from_millis(50));
    }
    let output = up.wait_with_output().unwrap();
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said += &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    for tool in ["kafka.tools.StorageTool", "AclCommand", "TokensCliUtils"] {
        let found = seen.iter().any(|line| line.contains(tool));
        assert!(found, "{tool} was not looked at");
    }
    let shown = said.clone() + &lab.ok(&["status"]);

    let secrets = secrets(lab.path());
    for (path, secret) in &secrets {
        let path = path.display();
        assert!(
            !shown.contains(secret.as_str()),
            "{path} is shown:\n{shown}"
        );
        let line = seen.iter().find(|line| line.contains(secret.as_str()));
        assert_eq!(line, None, "{path} is in the list of processes");
    }
    for file in readable(lab.path()) {
        let bytes = fs::read(&file).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        for (path, secret) in &secrets {
            let (file, path) = (file.display(), path.display());
            assert!(!text.contains(secret.as_str()), "{file} shows {path}");
        }
    }
    for (path, _) in &secrets {
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{}: {mode:o}", path.display());
    }

    let of = |file: &str, variable| sourced(&lab.path().join("secure").join(file), variable);
    let password = |service: &str| {
        let file = format!("secure/{service}/application.password");
        fs::read_to_string(lab.path().join(file)).unwrap()
    };
    let kafka = of("kafka/application.env", "KAFKA_SASL_PASSWORD");
    assert_eq!(kafka, password("kafka"));
    let start = format!("amqps://application:{}@localhost:", password("rabbitmq"));
    assert!(of("rabbitmq/application.env", "AMQP_ADDR").starts_with(&start));
    let start = format!("amqp://application:{}@127.0.0.1:", password("rabbitmq"));
    assert!(of("rabbitmq/plain.env", "AMQP_ADDR").starts_with(&start));
    let nats = of("nats/application.env", "NATS_PASSWORD");
    assert_eq!(nats, password("nats"));
    assert_ne!(of("nats/administrator.env", "NATS_PASSWORD"), nats);
    let token = of("pulsar/application.env", "PULSAR_TOKEN");
    assert_eq!(token.split('.').count(), 3, "{token}");
    for service in SERVICES {
        for user in ["plain", "application", "administrator"] {
            let file = lab.path().join(format!("secure/{service}/{user}.env"));
            let line = format!(". '{}'", file.display());
            assert!(said.contains(&line), "{line} is not in\n{said}");
        }
    }
    let again = lab.ok(&["up", "--secure", "nats"]);
    assert!(
        again.contains("runs already") && again.contains("NATS_CA"),
        "{again}"
    );

    let output = lab.example("nats_publish").output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    let notice = "nats is secured; nats_publish has the rights of the application";
    assert!(output.status.success() && told.contains(notice), "{told}");

    // The users are stored. Kafka's administrator connects as such when the rights are given again, so their passwords are
    // still the same.
    lab.ok(&["down"]);
    lab.ok(&["up", "--secure", "--detach", "kafka", "rabbitmq"]);
    // With new passwords they are not, and there is a way out.
    lab.ok(&["down", "kafka"]);
    fs::remove_dir_all(lab.path().join("secure/kafka")).unwrap();
    let said = lab.fails(&["up", "--secure", "kafka"]);
    assert!(
        said.contains("`cargo lab up kafka --secure --fresh`"),
        "{said}"
    );
    lab.ok(&["up", "--secure", "--fresh", "--detach", "kafka"]);
}

#[test]
fn what_cannot_be_secured_is_refused() {
    let lab = Lab::new();
    let said = lab.fails(&["up", "--secure", "nats", "opensearch"]);
    let reason =
        "opensearch cannot be secured here; of these it can: kafka, rabbitmq, nats, pulsar";
    assert!(said.contains(reason), "{said}");
    lab.ok(&["up", "nats", "--detach"]);
    let said = lab.fails(&["up", "nats", "--secure"]);
    assert!(
        said.contains("stop it first with `cargo lab down nats`"),
        "{said}"
    );
    let mut command = lab.command(&["up", "--secure", "kafka"]);
    let output = command.env("LAB_BACKEND", "mock").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("secured natively only"),
        "{said}"
    );
}
