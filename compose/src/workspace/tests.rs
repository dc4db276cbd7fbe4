//! What is known about the examples, and the promise that each can be copied out of here.

use std::fs;
use std::path::Path;

use super::{Workspace, header, heading, mentions, nearest};
use crate::Service;

#[test]
fn every_example_is_described() {
    let workspace = Workspace::load().unwrap();
    let mut names: Vec<&str> = workspace
        .examples()
        .iter()
        .map(|example| example.name.as_str())
        .collect();
    assert!(!names.is_empty());
    names.dedup();
    assert_eq!(
        names.len(),
        workspace.examples().len(),
        "two examples have the same name"
    );
    for example in workspace.examples() {
        assert!(example.source.is_file(), "{example:?}");
        assert_eq!(
            workspace.find(&example.name).unwrap().source,
            example.source
        );
        for service in &example.services {
            service
                .parse::<Service>()
                .unwrap_or_else(|error| panic!("{}: {error}", example.name));
        }
    }
    let in_groups: usize = workspace
        .groups()
        .iter()
        .map(|group| group.examples.len())
        .sum();
    assert_eq!(in_groups, workspace.examples().len());
}

/// `cargo lab run NAME --help` starts the program itself only if it understands that.
#[test]
fn examples_whose_header_points_to_help_understand_it() {
    let workspace = Workspace::load().unwrap();
    for example in workspace.examples() {
        let pointed = example.header.contains("--help`");
        assert_eq!(
            example.parses_arguments().unwrap(),
            pointed,
            "{}",
            example.name
        );
    }
}

#[test]
fn the_indexes_are_up_to_date() {
    let stale = Workspace::load().unwrap().write_indexes(true).unwrap();
    assert!(
        stale.is_empty(),
        "`cargo lab index` brings these up to date: {stale:?}"
    );
}

#[test]
fn a_copy_needs_an_empty_place() {
    let workspace = Workspace::load().unwrap();
    let name = &workspace.examples()[0].name;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("notes.txt");
    fs::write(&file, "mine").unwrap();
    let refused = |path: &Path| workspace.new_project(name, path).unwrap_err().to_string();
    assert!(refused(folder.path()).ends_with("is not empty; name a new or an empty folder"));
    assert!(refused(&file).ends_with("is a file; name a new or an empty folder"));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");

    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    workspace.new_project(name, &empty).unwrap();
    let copy = fs::read_to_string(empty.join("src/main.rs")).unwrap();
    assert_eq!(
        copy,
        fs::read_to_string(&workspace.examples()[0].source).unwrap()
    );
    assert_eq!(
        fs::read_to_string(empty.join(".gitignore")).unwrap(),
        "/target\n"
    );
}

/// A workspace with a package of examples, for tests.
pub(super) struct Fixture {
    pub(super) folder: tempfile::TempDir,
    pub(super) workspace: Workspace,
}

impl Fixture {
    const FILES: [(&'static str, &'static str); 11] = [
        (
            "Cargo.toml",
            r#"
[workspace]
members = ["nats-examples", "scenarios", "tool"]
resolver = "3"
[workspace.package]
edition = "2024"
rust-version = "1.89"
[workspace.dependencies]
anyhow = "1.0"
async-nats = { version = "0.51", default-features = false, features = ["ring"] }
json = { package = "serde_json", version = ">=1.0, <2", features = ["raw_value"] }
protoc-bin-vendored = "3"
pulsar = { version = "6.9", default-features = false, features = ["tokio-rustls-runtime-ring"] }
serde = { version = "1.0", features = ["derive"] }
tool = { path = "tool" }
"#,
        ),
        (
            "README.md",
            "# Title\n\n<!-- index -->\n<!-- /index -->\n\nEnd.\n",
        ),
        (
            "nats-examples/Cargo.toml",
            r#"# index
# /index
[package]
name = "nats-examples"
edition.workspace = true
rust-version.workspace = true
[package.metadata.lab]
services = ["nats"]
[package.metadata.lab.bin.nats_c]
secure = true
[features]
default = ["jetstream", "json"]
jetstream = ["async-nats/default"]
json = ["dep:json"]
secure = ["async-nats/nkeys"]
[dependencies]
anyhow.workspace = true
async-nats.workspace = true
json = { workspace = true, optional = true }
protoc-bin-vendored.workspace = true
pulsar.workspace = true
serde = { workspace = true, features = ["rc"] }
tool.workspace = true
[target.'cfg(unix)'.dependencies]
libc = "0.2"
[dev-dependencies]
tempfile = "3"
"#,
        ),
        (
            "nats-examples/README.md",
            "<!-- index -->\nold\n<!-- /index -->\n",
        ),
        (
            "nats-examples/src/bin/nats_b.rs",
            "//! Second | last.\n//!\n//! More.\n\nuse tool::a;\nfn main() {}\n",
        ),
        (
            "nats-examples/src/bin/nats_a.rs",
            "//! First.\n// pulsar::x\nuse serde::Serialize;\nfn main() -> anyhow::Result<()> { libc::x(); json::y(\"tempfile::z\"); async_nats::jetstream::new() }\n",
        ),
        (
            "nats-examples/src/bin/nats_c.rs",
            "//! Third\n//!\n//! 1$ cargo lab run nats_a\n\nfn main() { async_nats::connect() }\n#[cfg(test)]\nmod tests {}\n",
        ),
        (
            "scenarios/Cargo.toml",
            r#"
[package]
name = "scenarios"
edition.workspace = true
[package.metadata.lab.bin.pipeline]
services = ["kafka", "opensearch"]
nodes = 2
[features]
default = ["more"]
more = []
[[bin]]
name = "pipeline"
path = "src/bin/pipeline/main.rs"
required-features = ["more"]
[dependencies]
anyhow.workspace = true
protoc-bin-vendored.workspace = true
pulsar.workspace = true
"#,
        ),
        ("scenarios/README.md", "<!-- index -->\n<!-- /index -->\n"),
        (
            "scenarios/src/bin/pipeline/main.rs",
            "//! All of it\nmod stages;\nfn main() -> anyhow::Result<()> { Ok(()) }\n",
        ),
        (
            "scenarios/src/bin/pipeline/stages/mod.rs",
            "use pulsar::Pulsar;\n",
        ),
    ];

    pub(super) fn new() -> Fixture {
        let folder = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for (path, text) in Fixture::FILES {
            put(path, text);
        }
        put(
            "tool/Cargo.toml",
            "[package]\nname = \"tool\"\nedition = \"2024\"\n",
        );
        put("tool/src/lib.rs", "");
        put("tool/src/main.rs", "fn main() {}\n");
        put("compose/protoc", "#!/bin/sh\n");
        let mut workspace = Workspace::read(Some(&folder.path().join("Cargo.toml"))).unwrap();
        // Where temporary folders are a link, cargo has looked through it.
        workspace.root = workspace.root.canonicalize().unwrap();
        Fixture { folder, workspace }
    }

    pub(super) fn read(&self, path: impl AsRef<Path>) -> String {
        fs::read_to_string(self.folder.path().join(path)).unwrap()
    }
}

#[test]
fn examples_are_the_binaries_of_packages_with_metadata() {
    let fixture = Fixture::new();
    let examples: Vec<_> = fixture
        .workspace
        .examples()
        .iter()
        .map(|example| {
            (
                example.name.as_str(),
                example.title.as_str(),
                format!("{} {}", example.nodes, example.services.join("+")),
            )
        })
        .collect();
    let expected = [
        ("nats_a", "First", "1 nats"),
        ("nats_b", "Second | last", "1 nats"),
        ("nats_c", "Third", "1 nats"),
        ("pipeline", "All of it", "2 kafka+opensearch"),
    ];
    assert_eq!(
        examples,
        expected.map(|(name, title, services)| (name, title, services.to_owned()))
    );
    let features = |name| &fixture.workspace.find(name).unwrap().features;
    assert_eq!(features("pipeline"), &["more"]);
    assert!(features("nats_a").is_empty());
    let groups: Vec<_> = fixture
        .workspace
        .groups()
        .iter()
        .map(|group| (group.title.clone(), group.examples.len()))
        .collect();
    assert_eq!(
        groups,
        [("NATS".to_owned(), 3), ("Scenarios".to_owned(), 1)]
    );
    let error = fixture.workspace.find("nats").unwrap_err().to_string();
    assert_eq!(
        error,
        "no example is called 'nats'. Did you mean nats_a, nats_b or nats_c? `cargo lab list` shows all of them."
    );
}

#[test]
fn the_header_is_the_first_block() {
    let text = "#![allow(unused)]\n\n//! Title.\n//!\n//!   indented\nuse a;\n//! later\n";
    assert_eq!(header(text), (3, "Title.\n\n  indented\n".to_owned()));
    assert_eq!(header("fn main() {}\n").1, "");
}

#[test]
fn near_names_are_suggested() {
    let names = [
        "kafka_manual_commit",
        "kafka_exactly_once",
        "nats_publish",
        "rabbitmq_publish_subscribe",
    ];
    assert_eq!(
        nearest("kafka-manual-comit", names.into_iter()),
        ["kafka_manual_commit"]
    );
    assert_eq!(
        nearest("publish", names.into_iter()),
        ["nats_publish", "rabbitmq_publish_subscribe"]
    );
    assert!(nearest("zzz", names.into_iter()).is_empty());
    assert!(nearest("", names.into_iter()).is_empty());
}

#[test]
fn crates_are_told_from_namesakes_and_comments() {
    for (code, uses) in [
        ("#[tokio::main] async fn main() {}", true),
        ("    let t = tokio::spawn(x);", true),
        ("use tokio as runtime;", true),
        ("use tokio;", true),
        (r#"#[serde(with = "tokio::x")]"#, true),
        ("// tokio::x", false),
        ("    /// tokio::x", false),
        ("use my_tokio::x;", false),
        ("use tokio_util::x;", false),
        ("use crate::tokio::x;", false),
        ("let tokio = 1;", false),
    ] {
        assert_eq!(mentions(code, "tokio"), uses, "{code}");
    }
}

#[test]
fn headings() {
    let packages = [
        "kafka-examples",
        "rabbitmq-examples",
        "nats-examples",
        "pulsar-examples",
        "scenarios",
    ];
    assert_eq!(
        packages.map(heading),
        ["Kafka", "RabbitMQ", "NATS", "Pulsar", "Scenarios"]
    );
}
