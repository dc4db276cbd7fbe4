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
//!
//! [package.metadata.lab.bin.kafka_secure]
//! secure = true                           # needs a secured broker, and the package's feature `secure` if there is one
//! ```
//!
//! Its header, the `//!` lines at the top of the file, is its description; the first line is the title.

mod copy;
mod index;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cargo_metadata::{Metadata, MetadataCommand, Package, Target};
use serde::Deserialize;

pub(crate) use copy::SECURE;

use crate::Service;

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
    /// Whether it needs them secured.
    pub secure: bool,
    /// The `required-features` of the binary.
    pub features: Vec<String>,
    /// The `//!` lines at the top of the file, without the `//!`.
    pub header: String,
    /// The line of the file on which the header starts, counted from 1.
    #[cfg_attr(not(feature = "harness"), expect(dead_code))]
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
    #[serde(default)]
    secure: bool,
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
    pub(crate) fn is_built_as_a_whole(&self, release: bool) -> bool {
        self.has_built("libdocs-", release)
    }

    /// Whether OpenSSL was built, which the feature `secure` of a package brings. Without that feature, cargo would build
    /// its clients again.
    pub(crate) fn is_built_with_tls(&self, release: bool) -> bool {
        self.has_built("libopenssl_sys-", release)
    }

    fn has_built(&self, library: &str, release: bool) -> bool {
        let profile = if release { "release" } else { "debug" };
        let built = fs::read_dir(self.target_directory().join(profile).join("deps"));
        let mut names = built.into_iter().flatten().flatten();
        names.any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with(library) && name.ends_with(".rlib")
        })
    }

    /// The feature `secure` of each package that has one, as cargo takes it: `kafka-examples/secure`.
    pub(crate) fn secure_features(&self) -> Vec<String> {
        let packages = self.metadata.workspace_packages();
        let with = packages
            .iter()
            .filter(|package| package.features.contains_key(SECURE));
        with.map(|package| format!("{}/{SECURE}", package.name))
            .collect()
    }

    /// All examples, by name.
    #[cfg_attr(not(feature = "harness"), expect(dead_code))]
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
            secure: own.is_some_and(|bin| bin.secure),
            features: target.required_features.clone(),
            header,
            header_line,
        })
    }

    /// Whether this service must be secured for it. Some services cannot be.
    pub(crate) fn needs_secured(&self, service: Service) -> bool {
        self.secure && service.spec().facts().secured.is_some()
    }

    /// The header, and the file in which it stands, relative to the workspace if it is there.
    pub(crate) fn description(&self, workspace: &Path) -> String {
        let source = self.source.strip_prefix(workspace).unwrap_or(&self.source);
        format!("{}\n{}\n", self.header, source.display())
    }

    /// Whether the program understands `--help` by itself. That is so if its main file uses clap: what parses arguments
    /// by hand has its header for that.
    pub(crate) fn parses_arguments(&self) -> Result<bool> {
        let text = fs::read_to_string(&self.source)
            .with_context(|| format!("cannot read {}", self.source.display()))?;
        Ok(mentions(&text, "clap"))
    }
}

/// Whether the code has a path that starts with this crate, or brings it in as a whole. Lines of comment don't count.
fn mentions(text: &str, name: &str) -> bool {
    let lines = text.lines().map(str::trim_start);
    let mut code = lines.filter(|line| !line.starts_with("//"));
    code.any(|line| {
        line.match_indices(name).any(|(at, _)| {
            let starts = !line[..at].ends_with(|c: char| c.is_alphanumeric() || "_:.".contains(c));
            let after = &line[at + name.len()..];
            let is_whole = line.starts_with("use ") && after.starts_with([' ', ';']);
            starts && (after.starts_with("::") || is_whole)
        })
    })
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
    if let Ok(service) = name.parse::<Service>() {
        return service.spec().facts().title.to_owned();
    }
    let mut letters = name.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(letters).collect()
    })
}

/// At most four of `names` that someone who wrote `wanted` may have meant, best first.
pub(crate) fn nearest<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
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
