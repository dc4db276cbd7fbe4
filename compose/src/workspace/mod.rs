//! What examples there are, what each needs, and how to copy one out of here.
//!
//! An example is a binary of a package that has a `[package.metadata.lab]`:
//!
//! ```toml
//! [package.metadata.lab]
//! services = ["kafka"]                    # what its binaries need
//!
//! [package.metadata.lab.bin.order_pipeline]
//! services = ["kafka", "opensearch"]      # what this one needs instead
//! nodes = 2                               # and of each so many, instead of one
//! ```
//!
//! Its header, the `//!` lines at the top of the file, is its description; the first line is the title.
//!
//! ```no_run
//! let workspace = compose::workspace::Workspace::load()?;
//! for group in workspace.groups() {
//!     println!("{}", group.title);
//!     for example in &group.examples {
//!         println!("  {:28} {}", example.name, example.title);
//!     }
//! }
//! # anyhow::Ok(())
//! ```

mod copy;
mod index;
mod scan;

pub use copy::Constant;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cargo_metadata::{Metadata, MetadataCommand, Package, Target};
use serde::Deserialize;

/// The examples of this workspace.
#[derive(Debug)]
pub struct Workspace {
    root: PathBuf,
    metadata: Metadata,
    packages: Vec<LabPackage>,
    examples: Vec<ExampleInfo>,
}

/// One example: a binary with a header.
#[derive(Clone, Debug)]
pub struct ExampleInfo {
    /// The name of the binary, as in `cargo run --bin NAME`.
    pub name: String,
    /// The package it belongs to.
    pub package: String,
    /// The first line of the header without its full stop; empty if there is no header.
    pub title: String,
    /// The file with `main`.
    pub source: PathBuf,
    /// The services it needs, by the names that `cargo lab up` takes.
    pub services: Vec<String>,
    /// How many nodes it needs of each.
    pub nodes: u16,
    /// The `required-features` of the binary.
    pub features: Vec<String>,
    /// The `//!` lines at the top of the file, without the `//!`.
    pub header: String,
    /// The line of the file on which the header starts, counted from 1.
    pub header_line: usize,
}

/// The examples that belong together: those of one package.
#[derive(Clone, Debug)]
pub struct Group<'a> {
    /// A heading, such as "RabbitMQ".
    pub title: String,
    /// The package.
    pub package: &'a str,
    /// What most of the examples need; empty if that differs from one to the next.
    pub services: &'a [String],
    /// The examples, by name.
    pub examples: Vec<&'a ExampleInfo>,
}

#[derive(Debug)]
struct LabPackage {
    name: String,
    lab: Lab,
}

/// `[package.metadata.lab]`
#[derive(Debug, Default, Deserialize)]
struct Lab {
    #[serde(default)]
    services: Vec<String>,
    #[serde(default)]
    bin: BTreeMap<String, LabBin>,
}

#[derive(Debug, Deserialize)]
struct LabBin {
    services: Option<Vec<String>>,
    nodes: Option<u16>,
}

impl Workspace {
    /// Reads the workspace that this program was built from, or if that is gone, the one around the current folder.
    ///
    /// # Errors
    /// Cargo cannot be run, or cannot read the workspace; or an example's file cannot be read.
    pub fn load() -> Result<Workspace> {
        let built_from = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .map(|root| root.join("Cargo.toml"));
        match built_from.filter(|manifest| manifest.is_file()) {
            Some(manifest) => Workspace::read(Some(&manifest)),
            None => Workspace::read(None),
        }
    }

    fn read(manifest: Option<&Path>) -> Result<Workspace> {
        let mut command = MetadataCommand::new();
        command.no_deps();
        if let Some(manifest) = manifest {
            command.manifest_path(manifest);
        }
        let metadata = command.exec().with_context(|| match manifest {
            Some(manifest) => format!("cannot ask cargo about the workspace of {}", manifest.display()),
            None => "cannot ask cargo about the current folder; run this inside a checkout of the examples".to_owned(),
        })?;

        let mut packages = Vec::new();
        let mut examples = Vec::new();
        for package in metadata.workspace_packages() {
            let Some(lab) = package.metadata.get("lab") else {
                continue;
            };
            let lab = Lab::deserialize(lab).with_context(|| {
                format!("{}: [package.metadata.lab] is wrong", package.manifest_path)
            })?;
            for target in package.targets.iter().filter(|target| target.is_bin()) {
                examples.push(ExampleInfo::read(package, &lab, target)?);
            }
            packages.push(LabPackage {
                name: package.name.to_string(),
                lab,
            });
        }
        examples.sort_by(|a, b| a.name.cmp(&b.name));
        let root = metadata.workspace_root.clone().into_std_path_buf();
        Ok(Workspace {
            root,
            metadata,
            packages,
            examples,
        })
    }

    /// The folder with the workspace's `Cargo.toml`.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where cargo puts what it builds.
    pub fn target_directory(&self) -> &Path {
        self.metadata.target_directory.as_std_path()
    }

    /// Whether `cargo build` or `cargo test` has built all packages together. Only then is there the book's library,
    /// which no other package uses.
    pub fn is_built_as_a_whole(&self, release: bool) -> bool {
        let profile = if release { "release" } else { "debug" };
        let built = fs::read_dir(self.target_directory().join(profile).join("deps"));
        let mut names = built.into_iter().flatten().flatten();
        names.any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("libdocs-") && name.ends_with(".rlib")
        })
    }

    /// All examples, by name.
    pub fn examples(&self) -> &[ExampleInfo] {
        &self.examples
    }

    /// All examples, by package, in the order of the workspace's members. Packages without examples are left out.
    pub fn groups(&self) -> Vec<Group<'_>> {
        self.packages
            .iter()
            .map(|package| self.group(package))
            .filter(|group| !group.examples.is_empty())
            .collect()
    }

    fn group<'a>(&'a self, package: &'a LabPackage) -> Group<'a> {
        Group {
            title: heading(&package.name),
            package: &package.name,
            services: &package.lab.services,
            examples: self
                .examples
                .iter()
                .filter(|example| example.package == package.name)
                .collect(),
        }
    }

    /// The example with this name.
    ///
    /// # Errors
    /// There is none; the error names the most similar ones.
    pub fn find(&self, name: &str) -> Result<&ExampleInfo> {
        if let Some(example) = self.examples.iter().find(|example| example.name == name) {
            return Ok(example);
        }
        let near = nearest(
            name,
            self.examples.iter().map(|example| example.name.as_str()),
        );
        let hint = match near.as_slice() {
            [] => String::new(),
            [one] => format!(" Did you mean {one}?"),
            [most @ .., last] => format!(" Did you mean {} or {last}?", most.join(", ")),
        };
        bail!("no example is called '{name}'.{hint} `cargo lab list` shows all of them.")
    }

    fn cargo_package(&self, name: &str) -> Result<&Package> {
        let mut packages = self.metadata.packages.iter();
        packages
            .find(|package| package.name == name)
            .with_context(|| format!("cargo knows no package '{name}'"))
    }
}

impl ExampleInfo {
    fn read(package: &Package, lab: &Lab, target: &Target) -> Result<ExampleInfo> {
        let source = target.src_path.clone().into_std_path_buf();
        let text = fs::read_to_string(&source)
            .with_context(|| format!("cannot read {}", source.display()))?;
        let (header_line, header) = header(&text);
        let title = header.lines().next().unwrap_or_default().trim();
        let own = lab.bin.get(&target.name);
        let services = own.and_then(|bin| bin.services.as_ref());
        Ok(ExampleInfo {
            name: target.name.clone(),
            package: package.name.to_string(),
            title: title.strip_suffix('.').unwrap_or(title).to_owned(),
            source,
            services: services.unwrap_or(&lab.services).clone(),
            nodes: own.and_then(|bin| bin.nodes).unwrap_or(1),
            features: target.required_features.clone(),
            header,
            header_line,
        })
    }

    /// The header, and the file in which it stands, relative to the workspace if it is there.
    pub fn description(&self, workspace: &Path) -> String {
        let source = self.source.strip_prefix(workspace).unwrap_or(&self.source);
        format!("{}\n{}\n", self.header, source.display())
    }

    /// Whether the program understands `--help` by itself. That is so if its main file uses clap: what parses arguments
    /// by hand has its header for that.
    ///
    /// # Errors
    /// The file cannot be read, or is no valid Rust.
    pub fn parses_arguments(&self) -> Result<bool> {
        let path = self.source.display();
        let text =
            fs::read_to_string(&self.source).with_context(|| format!("cannot read {path}"))?;
        let mut used = BTreeSet::new();
        scan::crates_used(&text, &["clap"], &mut used)
            .with_context(|| format!("cannot scan {path}"))?;
        Ok(!used.is_empty())
    }
}

/// The first block of `//!` lines and the line on which it starts.
fn header(text: &str) -> (usize, String) {
    let is_header = |line: &&str| line.trim_start().starts_with("//!");
    let before = text.lines().take_while(|line| !is_header(line)).count();
    let mut header = String::new();
    for line in text.lines().skip(before).take_while(is_header) {
        let line = line.trim_start().trim_start_matches("//!");
        header.push_str(line.strip_prefix(' ').unwrap_or(line).trim_end());
        header.push('\n');
    }
    (before + 1, header)
}

/// "kafka-examples" is "Kafka", "scenarios" is "Scenarios".
fn heading(package: &str) -> String {
    let name = package.strip_suffix("-examples").unwrap_or(package);
    match name {
        "rabbitmq" => "RabbitMQ".to_owned(),
        "nats" => "NATS".to_owned(),
        "opensearch" => "OpenSearch".to_owned(),
        _ => {
            let mut letters = name.chars();
            letters.next().map_or_else(String::new, |first| {
                first.to_uppercase().chain(letters).collect()
            })
        }
    }
}

/// At most four of `names` that someone who wrote `wanted` may have meant, best first.
pub fn nearest<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let wanted = wanted.to_lowercase().replace('-', "_");
    let mut scored: Vec<(f64, &str)> = names
        .map(|name| {
            let part = !wanted.is_empty() && (name.contains(&wanted) || wanted.contains(name));
            let score = strsim::normalized_damerau_levenshtein(&wanted, name);
            // Someone who remembers a part of the name has remembered that part right.
            (if part { score + 1.0 } else { score }, name)
        })
        .filter(|(score, _)| *score >= 0.55)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
    scored.into_iter().take(4).map(|(_, name)| name).collect()
}

/// A workspace with a package of examples, for tests.
#[cfg(test)]
struct Fixture {
    folder: tempfile::TempDir,
    workspace: Workspace,
}

#[cfg(test)]
impl Fixture {
    const FILES: [(&'static str, &'static str); 10] = [
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
[features]
default = ["jetstream", "json"]
jetstream = ["async-nats/default"]
json = ["dep:json"]
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

    fn new() -> Fixture {
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

    fn read(&self, path: impl AsRef<Path>) -> String {
        fs::read_to_string(self.folder.path().join(path)).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            [("NATS".to_owned(), 2), ("Scenarios".to_owned(), 1)]
        );
        let error = fixture.workspace.find("nats").unwrap_err().to_string();
        assert_eq!(
            error,
            "no example is called 'nats'. Did you mean nats_a or nats_b? `cargo lab list` shows all of them."
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
}
