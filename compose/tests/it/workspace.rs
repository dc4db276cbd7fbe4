//! What is known about the examples, and the promise that each can be copied out of here.

// Clippy's leave for tests does not reach the functions that tests call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use compose::Service;
use compose::workspace::Workspace;

/// `cargo lab new` for every example, then `cargo check` of the result, as a reader with nothing but Rust would.
///
/// Copies with the same dependencies are checked as binaries of one project, which saves most of the time and proves the
/// same: each compiles with exactly what its own manifest lists. They share the workspace's target folder, where most
/// dependencies have been checked already. `COPY=name` restricts this to the examples whose name contains that.
#[test]
fn every_example_builds_as_a_project_of_its_own() {
    let workspace = Workspace::load().unwrap();
    let target = workspace.target_directory();
    let filter = std::env::var("COPY").unwrap_or_default();
    // Outside of the workspace, whose cargo settings would help.
    let folder = tempfile::tempdir().unwrap();
    let mut projects: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for example in workspace.examples() {
        if !example.name.contains(&filter) {
            continue;
        }
        let project = folder.path().join(&example.name);
        workspace.new_project(&example.name, &project).unwrap();
        let manifest = fs::read_to_string(project.join("Cargo.toml")).unwrap();
        let mut alike = manifest.replace(&format!("name = {:?}\n", example.name), "");
        // One that consists of several files cannot be a file among others.
        if fs::read_dir(project.join("src")).unwrap().count() > 1 {
            alike.push_str(&example.name);
        }
        projects.entry(alike).or_default().push(project);
    }
    assert!(
        !projects.is_empty(),
        "no example's name contains '{filter}'"
    );
    let mut failures = Vec::new();
    for group in projects.values() {
        let names: Vec<_> = group
            .iter()
            .map(|project| project.file_name().unwrap().display().to_string())
            .collect();
        let names = names.join(", ");
        let result = check_copies(group, &folder.path().join("project"), target);
        eprintln!(
            "copy of {names} ... {}",
            if result.is_ok() { "ok" } else { "FAILED" }
        );
        if let Err(error) = result {
            failures.push(format!("{names}: {error:#}"));
        }
    }
    assert!(
        failures.is_empty(),
        "{} of {} projects don't build\n\n{}",
        failures.len(),
        projects.len(),
        failures.join("\n\n")
    );
}

/// Checks the first project with the programs of the others beside its own, in the folder `project`.
///
/// That is the same for all, since the path of protoc is in it: another path is a reason to build pulsar again.
fn check_copies(group: &[PathBuf], project: &Path, target: &Path) -> Result<()> {
    let (first, others) = group.split_first().context("an empty group")?;
    if project.exists() {
        fs::remove_dir_all(project)?;
    }
    fs::rename(first, project)?;
    for other in others {
        let file = project
            .join("src/bin")
            .join(other.file_name().context("a project has a name")?)
            .with_extension("rs");
        fs::create_dir_all(project.join("src/bin"))?;
        fs::rename(other.join("src/main.rs"), file)?;
    }
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .arg("check")
        .current_dir(project)
        .env("CARGO_TARGET_DIR", target)
        // As the workspace's dependencies are, or none of them could be used again.
        .env("CARGO_PROFILE_DEV_DEBUG", "0");
    // What cargo told this test about the workspace is not what a reader's shell has.
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text == "PROTOC"
            || name_text == "RUSTFLAGS"
            || name_text.starts_with("CARGO_PKG_")
            || name_text.starts_with("CARGO_MANIFEST")
        {
            cargo.env_remove(&name);
        }
    }
    let output = cargo.output().context("cannot run cargo")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let manifest = fs::read_to_string(project.join("Cargo.toml"))?;
    ensure!(
        output.status.success(),
        "cargo check failed\n{manifest}\n{said}"
    );
    // Nothing is missing, and the compiler has nothing to complain about either.
    ensure!(
        !said.contains("warning:"),
        "cargo check warned\n{manifest}\n{said}"
    );
    Ok(())
}

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
    let refused = |path: &PathBuf| workspace.new_project(name, path).unwrap_err().to_string();
    assert!(
        refused(&folder.path().to_owned()).ends_with("is not empty; name a new or an empty folder")
    );
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
