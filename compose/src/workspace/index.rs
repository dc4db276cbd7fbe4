//! What is made from the examples: the tables in the READMEs, and the lists of binaries in the manifests.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{Group, Workspace};

/// The lines around what is made.
const README: [&str; 2] = ["<!-- index -->", "<!-- /index -->"];
const MANIFEST: [&str; 2] = ["# index", "# /index"];

impl Workspace {
    /// The examples as Markdown: one table for a package with links relative to its folder, or for `None` a heading
    /// and a table per package with links relative to the workspace.
    pub(crate) fn index(&self, package: Option<&str>) -> String {
        let mut text = String::new();
        for group in self.groups() {
            match package {
                Some(package) if package == group.package => {
                    self.table(&mut text, &group, &self.folder(package))
                }
                Some(_) => {}
                None => {
                    if !text.is_empty() {
                        text.push('\n');
                    }
                    let _ = writeln!(text, "### {}\n", group.title);
                    self.table(&mut text, &group, &self.root);
                }
            }
        }
        text
    }

    /// Writes the index between the lines `<!-- index -->` and `<!-- /index -->` of `README.md` and of each example
    /// package's `README.md`, and the list of binaries, with the features they require, between `# index` and
    /// `# /index` of those `Cargo.toml` that have such lines. Returns the files that were not up to date; with `check`
    /// they are left as they are.
    ///
    /// # Errors
    /// An example has no header, `[package.metadata.lab.bin]` names a binary that does not exist, or a `README.md` is
    /// missing or has no place for the index. All such faults are reported together, and nothing is written.
    pub fn write_indexes(&self, check: bool) -> Result<Vec<PathBuf>> {
        let mut faults = Vec::new();
        for example in self
            .examples
            .iter()
            .filter(|example| example.title.is_empty())
        {
            faults.push(format!(
                "{}: the file must start with a //! header, whose first line is the title",
                example.source.display()
            ));
        }
        for package in &self.packages {
            for name in package.lab.bin.keys() {
                if !self
                    .examples
                    .iter()
                    .any(|example| &example.name == name && example.package == package.name)
                {
                    let manifest = self.folder(&package.name).join("Cargo.toml");
                    faults.push(format!(
                        "{}: [package.metadata.lab.bin.{name}] is about no binary",
                        manifest.display()
                    ));
                }
            }
        }

        let mut files = vec![(self.root.join("README.md"), README, self.index(None))];
        for group in self.groups() {
            let folder = self.folder(group.package);
            files.push((
                folder.join("README.md"),
                README,
                self.index(Some(group.package)),
            ));
            let manifest = folder.join("Cargo.toml");
            let text = fs::read_to_string(&manifest).unwrap_or_default();
            if text.lines().any(|line| line == MANIFEST[0]) {
                match self.binaries(&group) {
                    Ok(binaries) => files.push((manifest, MANIFEST, binaries)),
                    Err(error) => faults.push(format!("{error:#}")),
                }
            }
        }
        let mut stale = Vec::new();
        for (path, markers, index) in files {
            match refreshed(&path, markers, &index) {
                Ok(Some(text)) => stale.push((path, text)),
                Ok(None) => {}
                Err(error) => faults.push(format!("{error:#}")),
            }
        }
        if !faults.is_empty() {
            bail!("{}", faults.join("\n"));
        }
        if !check {
            for (path, text) in &stale {
                fs::write(path, text)
                    .with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
        Ok(stale.into_iter().map(|(path, _)| path).collect())
    }

    /// For the manifest: without it cargo would build an empty test program for each example that has no unit tests, as
    /// large as the example itself, and would not know which features each requires.
    fn binaries(&self, group: &Group<'_>) -> Result<String> {
        let package = self.cargo_package(group.package)?;
        let mut text = String::from("bin = [\n");
        for example in &group.examples {
            let features = match super::copy::features(package, example)?.as_slice() {
                [] => String::new(),
                features => format!(", required-features = {features:?}"),
            };
            let source = fs::read_to_string(&example.source)
                .with_context(|| format!("cannot read {}", example.source.display()))?;
            let test = if source.contains("#[cfg(test)]") {
                ""
            } else {
                ", test = false"
            };
            let _ = writeln!(text, "    {{ name = {:?}{test}{features} }},", example.name);
        }
        text.push_str("]\n");
        Ok(text)
    }

    fn folder(&self, package: &str) -> PathBuf {
        self.cargo_package(package)
            .ok()
            .and_then(|package| package.manifest_path.parent())
            .map_or_else(
                || self.root.join(package),
                |folder| folder.as_std_path().to_owned(),
            )
    }

    fn table(&self, text: &mut String, group: &Group<'_>, from: &Path) {
        // That an example of Kafka needs Kafka goes without saying.
        let differ = group
            .examples
            .iter()
            .flat_map(|example| &example.services)
            .any(|service| !group.services.contains(service));
        text.push_str(if differ {
            "| Example | What it shows | Needs |\n|---|---|---|\n"
        } else {
            "| Example | What it shows |\n|---|---|\n"
        });
        for example in &group.examples {
            let path = example.source.strip_prefix(from).unwrap_or(&example.source);
            // Links are URLs: slashes on every system.
            let link = path
                .iter()
                .map(|part| part.to_string_lossy())
                .collect::<Vec<_>>()
                .join("/");
            let title = example.title.replace('|', r"\|");
            let _ = write!(text, "| [`{}`]({link}) | {title} |", example.name);
            if differ {
                let _ = write!(text, " {} |", example.services.join(", "));
            }
            text.push('\n');
        }
    }
}

/// The text of the file with this index in it, or `None` if that is what the file says.
fn refreshed(path: &Path, markers: [&str; 2], index: &str) -> Result<Option<String>> {
    let old = fs::read_to_string(path)
        .with_context(|| format!("cannot read {}, where the index belongs", path.display()))?;
    let new = filled(&old, markers, index).with_context(|| {
        format!(
            "{}: add the lines {} and {} where the index belongs",
            path.display(),
            markers[0],
            markers[1]
        )
    })?;
    Ok((new != old).then_some(new))
}

/// `text` with `index` between the two marker lines.
fn filled(text: &str, [start, end]: [&str; 2], index: &str) -> Option<String> {
    let mut lines = text.split_inclusive('\n');
    let mut new = String::with_capacity(text.len() + index.len());
    loop {
        let line = lines.next()?;
        new.push_str(line);
        if line.trim_end() == start {
            break;
        }
    }
    let end = lines.find(|line| line.trim_end() == end)?;
    // Without the empty lines a Markdown reader would take the markers for a part of the table.
    let _ = write!(new, "\n{index}\n{end}");
    new.extend(lines);
    Some(new)
}

#[cfg(test)]
mod tests {
    use super::super::tests::Fixture;
    use super::*;

    #[test]
    fn indexes_are_written_and_checked() {
        let fixture = Fixture::new();
        let workspace = &fixture.workspace;
        let names = |paths: Vec<PathBuf>| -> Vec<String> {
            paths
                .iter()
                .map(|path| {
                    path.strip_prefix(workspace.root())
                        .unwrap()
                        .display()
                        .to_string()
                })
                .collect()
        };
        let all = [
            "README.md",
            "nats-examples/README.md",
            "nats-examples/Cargo.toml",
            "scenarios/README.md",
        ];
        assert_eq!(names(workspace.write_indexes(true).unwrap()), all);
        assert_eq!(
            fixture.read("nats-examples/README.md"),
            "<!-- index -->\nold\n<!-- /index -->\n"
        );
        assert_eq!(names(workspace.write_indexes(false).unwrap()), all);
        assert_eq!(
            workspace.write_indexes(true).unwrap(),
            Vec::<PathBuf>::new()
        );
        assert_eq!(
            fixture.read("nats-examples/README.md"),
            "<!-- index -->\n\n| Example | What it shows |\n|---|---|\n| [`nats_a`](src/bin/nats_a.rs) | First |\n\
             | [`nats_b`](src/bin/nats_b.rs) | Second \\| last |\n| [`nats_c`](src/bin/nats_c.rs) | Third |\n\n<!-- /index -->\n"
        );
        assert!(
            fixture
                .read("nats-examples/Cargo.toml")
                .starts_with("# index\n\nbin = [\n    { name = \"nats_a\", test = false, required-features = [\"jetstream\", \"json\"] },\n    { name = \"nats_b\", test = false },\n    { name = \"nats_c\", required-features = [\"secure\"] },\n]\n\n# /index\n"),
        );
        assert_eq!(
            fixture.read("README.md"),
            "# Title\n\n<!-- index -->\n\n### NATS\n\n| Example | What it shows |\n|---|---|\n\
             | [`nats_a`](nats-examples/src/bin/nats_a.rs) | First |\n\
             | [`nats_b`](nats-examples/src/bin/nats_b.rs) | Second \\| last |\n\
             | [`nats_c`](nats-examples/src/bin/nats_c.rs) | Third |\n\n### Scenarios\n\n\
             | Example | What it shows | Needs |\n|---|---|---|\n\
             | [`pipeline`](scenarios/src/bin/pipeline/main.rs) | All of it | kafka, opensearch |\n\n\
             <!-- /index -->\n\nEnd.\n"
        );
    }

    #[test]
    fn all_faults_are_reported_and_nothing_is_written() {
        let fixture = Fixture::new();
        let root = fixture.workspace.root().to_owned();
        fs::write(
            root.join("nats-examples/src/bin/nats_a.rs"),
            "fn main() {}\n",
        )
        .unwrap();
        fs::remove_file(root.join("nats-examples/README.md")).unwrap();
        fs::write(root.join("scenarios/README.md"), "no place\n").unwrap();
        let manifest = fixture.read("scenarios/Cargo.toml");
        fs::write(
            root.join("scenarios/Cargo.toml"),
            manifest.replace("lab.bin.pipeline", "lab.bin.gone"),
        )
        .unwrap();
        let workspace = Workspace::read(Some(&root.join("Cargo.toml"))).unwrap();
        let error = workspace.write_indexes(false).unwrap_err().to_string();
        for part in [
            "nats_a.rs: the file must start with a //! header",
            "[package.metadata.lab.bin.gone] is about no binary",
            "nats-examples/README.md",
            "scenarios/README.md: add the lines <!-- index --> and <!-- /index -->",
        ] {
            assert!(error.contains(part), "{part:?} is missing in:\n{error}");
        }
        assert_eq!(error.lines().count(), 4, "{error}");
        assert!(!fixture.read("README.md").contains("nats_b"));
    }

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let text =
            "The index stands after `<!-- index -->`.\n\n<!-- index -->\nold\n<!-- /index -->\nend";
        let new = filled(text, README, "| new |\n").unwrap();
        assert_eq!(
            new,
            "The index stands after `<!-- index -->`.\n\n<!-- index -->\n\n| new |\n\n<!-- /index -->\nend"
        );
        assert_eq!(filled(&new, README, "| new |\n").unwrap(), new);
    }

    #[test]
    fn both_markers_are_needed() {
        assert_eq!(filled("<!-- index -->\nold\n", README, ""), None);
        assert_eq!(filled("old\n<!-- /index -->\n", README, ""), None);
        assert_eq!(
            filled("<!-- /index -->\n<!-- index -->\n", README, ""),
            None
        );
    }
}
