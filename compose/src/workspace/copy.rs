//! `cargo lab new`: an example as a project of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use cargo_metadata::{Dependency, DependencyKind, Package};

use super::{ExampleInfo, Workspace, mentions};
use crate::files;

/// The crate whose build script needs protoc, and the one that brings it.
const NEEDS_PROTOC: &str = "pulsar";
const BRINGS_PROTOC: &str = "protoc-bin-vendored";

/// The feature with which a package's client can connect to a secured broker, if that takes one.
pub(crate) const SECURE: &str = "secure";

/// As in the workspace's own configuration.
const CONFIG: &str = r#"[env]
# An error an example ends with is for its user: one readable chain of causes. A panic still shows its backtrace.
RUST_LIB_BACKTRACE = "0"
"#;

const PROTOC_CONFIG: &str = r#"# The build script of `pulsar` needs protoc. This finds the system's, or the one in cargo's folder that the dependency
# `protoc-bin-vendored` brought. A PROTOC of your own wins. On Windows, install protoc and set PROTOC to it.
PROTOC = { value = ".cargo/protoc", relative = true }
"#;

/// A constant that names something of the example's own, such as a topic or a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Constant {
    /// Its file, as seen from the `src` of the copy.
    pub(crate) file: PathBuf,
    /// Its line there, from 1.
    pub(crate) line: usize,
    /// The line itself.
    pub(crate) text: String,
}

impl ExampleInfo {
    /// What to change first in a copy: the constants at the top level whose value is a name, those of `main.rs` first.
    ///
    /// # Errors
    /// A file of the example cannot be read.
    pub(crate) fn names(&self) -> Result<Vec<Constant>> {
        let mut constants = Vec::new();
        for (file, text) in sources(self)? {
            let lines = text.lines().enumerate().filter(|(_, line)| is_name(line));
            constants.extend(lines.map(|(index, line)| Constant {
                file: file.clone(),
                line: index + 1,
                text: line.to_owned(),
            }));
        }
        constants.sort_by_key(|constant| constant.file != Path::new("main.rs"));
        Ok(constants)
    }
}

/// `const TOPIC: &str = "orders";`, but not one whose value is a number, a sentence, or a statement of SQL.
fn is_name(line: &str) -> bool {
    let line = line.strip_prefix("pub ").unwrap_or(line);
    let value = line
        .strip_prefix("const ")
        .and_then(|rest| rest.split_once(": &str = \""))
        .and_then(|(_, rest)| rest.strip_suffix("\";"));
    value.is_some_and(|value| {
        !value.contains(char::is_whitespace) && value.contains(char::is_alphabetic)
    })
}

impl Workspace {
    /// The other examples of its package that the transcripts of an example run, such as the one that feeds it.
    pub(crate) fn companions(&self, example: &ExampleInfo) -> Vec<&ExampleInfo> {
        let words: Vec<&str> = example.header.split_whitespace().collect();
        let runs = |name: &str| {
            words
                .windows(4)
                .any(|at| at == ["cargo", "lab", "run", name])
        };
        let others = self.examples.iter().filter(|other| {
            other.package == example.package && other.name != example.name && runs(&other.name)
        });
        others.collect()
    }

    /// Writes a stand-alone Cargo project into `path`: the example as `src/main.rs`, word for word, its
    /// [companions](Workspace::companions) in `src/bin`, and the crates that these use with the versions and features
    /// they have here.
    ///
    /// # Errors
    /// No example has this name, `path` is a file or a folder that is not empty, the example uses code of this
    /// workspace, or a file cannot be read or written.
    pub(crate) fn new_project(&self, name: &str, path: &Path) -> Result<()> {
        let example = self.find(name)?;
        check_vacant(path)?;
        let package = self.cargo_package(&example.package)?;
        let mut sources = sources(example)?;
        let companions = self.companions(example);
        for companion in &companions {
            let folder = Path::new("bin");
            for (file, text) in self::sources(companion)? {
                let place = if file == Path::new("main.rs") {
                    folder.join(&companion.name).with_extension("rs")
                } else {
                    bail!("{} has several files, and {name} runs it", companion.name);
                };
                sources.insert(place, text);
            }
        }
        let dependencies = dependencies(package, &sources)?;
        for dependency in &dependencies {
            ensure!(
                dependency.path.is_none(),
                "the example uses {}, which is a part of this workspace, so it cannot be copied alone",
                dependency.rename.as_ref().unwrap_or(&dependency.name)
            );
        }
        let needs_protoc = dependencies
            .iter()
            .any(|dependency| dependency.name == NEEDS_PROTOC);

        write(
            &path.join("Cargo.toml"),
            &manifest(package, example, !companions.is_empty(), &dependencies)?,
        )?;
        // Cargo drops what the project does not use, and keeps the versions that were tested.
        let lock = self.root.join("Cargo.lock");
        if lock.is_file() {
            write(&path.join("Cargo.lock"), &read(&lock)?)?;
        }
        write(&path.join(".gitignore"), "/target\n")?;
        for (file, text) in &sources {
            write(&path.join("src").join(file), text)?;
        }
        let protoc = if needs_protoc { PROTOC_CONFIG } else { "" };
        let settings = path.join(".cargo");
        write(&settings.join("config.toml"), &format!("{CONFIG}{protoc}"))?;
        if needs_protoc {
            let script = self.root.join("compose").join("protoc");
            let copy = settings.join("protoc");
            // Unlike reading and writing, this keeps it executable.
            fs::copy(&script, &copy).with_context(|| {
                format!("cannot copy {} to {}", script.display(), copy.display())
            })?;
        }
        Ok(())
    }
}

fn check_vacant(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    ensure!(
        path.is_dir(),
        "{} is a file; name a new or an empty folder",
        path.display()
    );
    let mut entries =
        fs::read_dir(path).with_context(|| format!("cannot read the folder {}", path.display()))?;
    ensure!(
        entries.next().is_none(),
        "{} is not empty; name a new or an empty folder",
        path.display()
    );
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    let write = || {
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(path, text)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// The example's files by their places in `src`. An example in a folder of its own consists of all that is in it.
fn sources(example: &ExampleInfo) -> Result<BTreeMap<PathBuf, String>> {
    let mut sources = BTreeMap::new();
    let folder = example
        .source
        .parent()
        .filter(|_| example.source.file_name() == Some(OsStr::new("main.rs")));
    // `src/main.rs` shares its folder with everything else of the package.
    match folder.filter(|folder| folder.file_name() != Some(OsStr::new("src"))) {
        Some(folder) => {
            for path in files::all_in(folder)? {
                let place = path.strip_prefix(folder)?.to_owned();
                sources.insert(place, read(&path)?);
            }
        }
        None => {
            sources.insert(PathBuf::from("main.rs"), read(&example.source)?);
        }
    }
    Ok(sources)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The features of its package that the example requires: those that bring an optional crate it uses, and those that bring
/// more of a crate and have the name of the module it uses, as `jetstream = ["async-nats/default"]`.
///
/// # Errors
/// A file cannot be read, or an optional crate that is used belongs to no feature.
pub(super) fn features(package: &Package, example: &ExampleInfo) -> Result<Vec<String>> {
    let sources = sources(example)?;
    let mut required = BTreeSet::new();
    if example.secure && package.features.contains_key(SECURE) {
        required.insert(SECURE.to_owned());
    }
    for (feature, brought) in &package.features {
        let mut crates = brought.iter().filter_map(|entry| entry.split_once('/'));
        if crates.any(|(name, _)| {
            let module = format!("{}::{feature}", name.replace('-', "_"));
            sources.values().any(|text| text.contains(&module))
        }) {
            required.insert(feature.clone());
        }
    }
    for dependency in dependencies(package, &sources)? {
        if !dependency.optional {
            continue;
        }
        let name = dependency.rename.as_ref().unwrap_or(&dependency.name);
        let brings = format!("dep:{name}");
        let mut features = package.features.iter();
        let (feature, _) = features
            .find(|(_, brought)| brought.contains(&brings))
            .with_context(|| format!("{}: no feature has \"{brings}\"", package.manifest_path))?;
        required.insert(feature.clone());
    }
    Ok(required.into_iter().collect())
}

/// What the sources use of the package's dependencies.
fn dependencies<'a>(
    package: &'a Package,
    sources: &BTreeMap<PathBuf, String>,
) -> Result<Vec<&'a Dependency>> {
    let known: Vec<(String, &Dependency)> = package
        .dependencies
        .iter()
        .filter(|dependency| dependency.kind == DependencyKind::Normal)
        .map(|dependency| {
            (
                dependency
                    .rename
                    .as_ref()
                    .unwrap_or(&dependency.name)
                    .replace('-', "_"),
                dependency,
            )
        })
        .collect();
    let own_library = package
        .targets
        .iter()
        .find(|target| target.is_lib())
        .map(|target| target.name.replace('-', "_"));
    let is_used = |name: &str| {
        let mut sources = sources
            .iter()
            .filter(|(file, _)| file.extension() == Some(OsStr::new("rs")));
        sources.any(|(_, text)| mentions(text, name))
    };
    if let Some(library) = own_library.as_deref()
        && is_used(library)
    {
        bail!(
            "the example uses {library}, the library of its package, so it cannot be copied alone"
        );
    }
    let used = known.iter().filter(|(name, dependency)| {
        is_used(name) || dependency.name == BRINGS_PROTOC && is_used(NEEDS_PROTOC)
    });
    Ok(used.map(|(_, dependency)| *dependency).collect())
}

fn manifest(
    package: &Package,
    example: &ExampleInfo,
    has_companions: bool,
    dependencies: &[&Dependency],
) -> Result<String> {
    let name = &example.name;
    let mut text = String::new();
    write!(
        text,
        "[package]\nname = {name:?}\nversion = \"0.1.0\"\nedition = \"{}\"\n",
        package.edition
    )?;
    if has_companions {
        writeln!(text, "default-run = {name:?}")?;
    }
    if let Some(version) = &package.rust_version {
        // Cargo reports 1.89 as 1.89.0; the two mean the same.
        writeln!(text, "rust-version = \"{version}\"")?;
    }
    let mut tables: BTreeMap<Option<String>, Vec<&Dependency>> =
        BTreeMap::from([(None, Vec::new())]);
    for dependency in dependencies {
        tables
            .entry(dependency.target.as_ref().map(ToString::to_string))
            .or_default()
            .push(dependency);
    }
    for (target, dependencies) in tables {
        match target {
            None => writeln!(text, "\n[dependencies]")?,
            Some(target) => writeln!(text, "\n[target.'{target}'.dependencies]")?,
        }
        for dependency in dependencies {
            if dependency.name == BRINGS_PROTOC {
                writeln!(
                    text,
                    "# Not used by the code: it brings the protoc that the build script of `{NEEDS_PROTOC}` runs."
                )?;
                writeln!(text, "# See .cargo/config.toml.")?;
            }
            writeln!(text, "{}", requirement(package, example, dependency))?;
        }
    }
    write!(
        text,
        "\n# A workspace of its own: the project also builds inside the folder of another.\n[workspace]\n"
    )?;
    Ok(text)
}

/// The features of this crate that the package's default features turn on, and those that the example requires: a copy
/// leaves nothing out to build faster.
fn features_turned_on<'a>(package: &'a Package, example: &ExampleInfo, name: &str) -> Vec<&'a str> {
    let default = package.features.get("default").into_iter().flatten();
    let required = default.chain(&example.features);
    let entries = required.filter_map(|feature| package.features.get(feature));
    let entries = entries.flatten().filter_map(|entry| entry.split_once('/'));
    entries
        .filter(|(brought, _)| *brought == name)
        .map(|(_, feature)| feature)
        .collect()
}

/// One line of `[dependencies]`, in the shortest form.
fn requirement(package: &Package, example: &ExampleInfo, dependency: &Dependency) -> String {
    let version = dependency.req.to_string();
    // "^1.0" and "1.0" mean the same, and the latter is what people write.
    let version = if version.contains(',') {
        &version
    } else {
        version.trim_start_matches('^')
    };
    let name = dependency.rename.as_ref().unwrap_or(&dependency.name);
    let mut settings = Vec::new();
    if dependency.rename.is_some() {
        settings.push(format!("package = {:?}", dependency.name));
    }
    let listed = dependency.features.iter().map(String::as_str);
    let mut features: Vec<&str> = listed.collect();
    for feature in features_turned_on(package, example, name) {
        if !features.contains(&feature) {
            features.push(feature);
        }
    }
    let defaults = dependency.uses_default_features || features.contains(&"default");
    features.retain(|feature| *feature != "default");
    if !defaults {
        settings.push("default-features = false".to_owned());
    }
    if !features.is_empty() {
        settings.push(format!("features = {features:?}"));
    }
    if settings.is_empty() {
        format!("{name} = {version:?}")
    } else {
        format!(
            "{name} = {{ version = {version:?}, {} }}",
            settings.join(", ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Fixture;
    use super::*;

    /// What the folder holds, by path.
    fn files(folder: &Path) -> Vec<String> {
        let paths = files::all_in(folder).unwrap();
        let places = paths.iter().map(|path| path.strip_prefix(folder).unwrap());
        places.map(|place| place.display().to_string()).collect()
    }

    #[test]
    fn exactly_what_is_used() {
        let fixture = Fixture::new();
        let copy = fixture.folder.path().join("new").join("copy");
        fixture.workspace.new_project("nats_a", &copy).unwrap();
        assert_eq!(
            files(&copy),
            [
                ".cargo/config.toml",
                ".gitignore",
                "Cargo.toml",
                "src/main.rs"
            ]
        );
        assert_eq!(
            fs::read_to_string(copy.join(".cargo/config.toml")).unwrap(),
            CONFIG
        );
        assert_eq!(
            fs::read_to_string(copy.join("src/main.rs")).unwrap(),
            fixture.read("nats-examples/src/bin/nats_a.rs")
        );
        let manifest = fs::read_to_string(copy.join("Cargo.toml")).unwrap();
        assert_eq!(
            manifest,
            r#"[package]
name = "nats_a"
version = "0.1.0"
edition = "2024"
rust-version = "1.89.0"

[dependencies]
anyhow = "1.0"
async-nats = { version = "0.51", features = ["ring"] }
json = { version = ">=1.0, <2", package = "serde_json", features = ["raw_value"] }
serde = { version = "1.0", features = ["derive", "rc"] }

[target.'cfg(unix)'.dependencies]
libc = "0.2"

# A workspace of its own: the project also builds inside the folder of another.
[workspace]
"#
        );
    }

    /// The copy has all that the transcript runs, and what the client needs to connect with TLS.
    #[test]
    fn a_secure_example_with_the_one_that_feeds_it() {
        let mut fixture = Fixture::new();
        // As `lab index` does it.
        fixture.workspace.write_indexes(false).unwrap();
        let manifest = fixture.folder.path().join("Cargo.toml");
        fixture.workspace = Workspace::read(Some(&manifest)).unwrap();
        let copy = fixture.folder.path().join("copy");
        fixture.workspace.new_project("nats_c", &copy).unwrap();
        let example = "nats-examples/src/bin/nats_c.rs";
        let read = |file: &str| fs::read_to_string(copy.join(file)).unwrap();
        assert_eq!(read("src/main.rs"), fixture.read(example));
        let companion = "nats-examples/src/bin/nats_a.rs";
        assert_eq!(read("src/bin/nats_a.rs"), fixture.read(companion));
        let manifest = read("Cargo.toml");
        for line in [
            "default-run = \"nats_c\"",
            "async-nats = { version = \"0.51\", features = [\"ring\", \"nkeys\"] }",
            "serde = { version = \"1.0\", features = [\"derive\", \"rc\"] }",
        ] {
            assert!(manifest.contains(line), "{line:?} is missing in {manifest}");
        }
    }

    #[test]
    fn an_example_with_modules_that_needs_protoc() {
        let fixture = Fixture::new();
        let copy = fixture.folder.path().join("copy");
        fixture.workspace.new_project("pipeline", &copy).unwrap();
        let expected = [
            ".cargo/config.toml",
            ".cargo/protoc",
            ".gitignore",
            "Cargo.toml",
            "src/main.rs",
            "src/stages/mod.rs",
        ];
        assert_eq!(files(&copy), expected);
        let manifest = fs::read_to_string(copy.join("Cargo.toml")).unwrap();
        let dependencies = r#"
[dependencies]
anyhow = "1.0"
# Not used by the code: it brings the protoc that the build script of `pulsar` runs.
# See .cargo/config.toml.
protoc-bin-vendored = "3"
pulsar = { version = "6.9", default-features = false, features = ["tokio-rustls-runtime-ring"] }

"#;
        assert!(manifest.contains(dependencies), "{manifest}");
    }

    #[test]
    fn names_are_told_from_other_constants() {
        for (line, name) in [
            (r#"const TOPIC: &str = "orders";"#, true),
            (r#"pub const SUBJECT: &str = "orders.>";"#, true),
            (r#"const USAGE: &str = "one of these";"#, false),
            (r#"const LARGEST: &str = "10485760";"#, false),
            (r#"const NONE: &str = "";"#, false),
            ("const TABLES: &str = \"", false),
            ("const PARTITIONS: i32 = 3;", false),
            (r#"    const INNER: &str = "inner";"#, false),
            (r#"// const OLD: &str = "old";"#, false),
        ] {
            assert_eq!(is_name(line), name, "{line}");
        }
    }

    #[test]
    fn what_belongs_to_the_workspace_cannot_be_copied() {
        let fixture = Fixture::new();
        let copy = fixture.folder.path().join("copy");
        let error = fixture
            .workspace
            .new_project("nats_b", &copy)
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "the example uses tool, which is a part of this workspace, so it cannot be copied alone"
        );
        assert!(!copy.exists(), "something was written");
    }
}
