//! What is known about the examples, and the promise that each can be copied out of here.

// Clippy's leave for tests does not reach the functions that tests call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use compose::Service;
use compose::workspace::Workspace;

/// `cargo lab new` for every example, then `cargo check` of all that came out, as members of one workspace.
///
/// Each compiles against what its own manifest lists, so a dependency that is missing there is noticed. That they share
/// a build saves many minutes, and hides one thing: a feature that only another copy's dependencies turn on. So the first
/// of each package is also checked alone, as a reader with nothing but Rust would.
#[test]
fn every_example_builds_as_a_project_of_its_own() {
    let workspace = Workspace::load().unwrap();
    // Outside of the workspace, whose cargo settings would help.
    let folder = tempfile::tempdir().unwrap();
    // Built with the workspace's profile, many dependencies are there already.
    let manifest = fs::read_to_string(workspace.root().join("Cargo.toml")).unwrap();
    let profile = folder.path().join("profile.toml");
    fs::write(&profile, &manifest[manifest.find("[profile.").unwrap()..]).unwrap();
    let check = |project: &Path| check(project, &profile, workspace.target_directory()).unwrap();
    let groups = workspace.groups();
    assert!(!groups.is_empty());
    for group in groups {
        let name = &group.examples[0].name;
        let alone = folder.path().join(name);
        workspace.new_project(name, &alone).unwrap();
        check(&alone);
        eprintln!("{name} alone ... ok");
    }

    let all = folder.path().join("all");
    let examples = workspace.examples().iter();
    let names: Vec<&str> = examples.map(|example| example.name.as_str()).collect();
    for name in &names {
        let project = all.join(name);
        workspace.new_project(name, &project).unwrap();
        let manifest = project.join("Cargo.toml");
        let text = fs::read_to_string(&manifest).unwrap();
        let (text, _) = text
            .split_once("\n[workspace]")
            .expect("a workspace of its own");
        fs::write(&manifest, text).unwrap();
        // What stands at the root of a project, stands at the root of a workspace: of the settings, the most complete.
        for (shared, told_by) in [("Cargo.lock", "Cargo.lock"), (".cargo", ".cargo/protoc")] {
            if project.join(told_by).exists() && !all.join(shared).exists() {
                fs::rename(project.join(shared), all.join(shared)).unwrap();
            }
        }
    }
    let manifest = format!("[workspace]\nresolver = \"3\"\nmembers = {names:?}\n");
    fs::write(all.join("Cargo.toml"), manifest).unwrap();
    check(&all);
}

fn check(project: &Path, profile: &Path, target: &Path) -> Result<()> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["check", "--workspace", "--config"])
        .arg(profile)
        .current_dir(project)
        .env("CARGO_TARGET_DIR", target);
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
