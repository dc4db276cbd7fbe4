//! The promise that each example can be copied out of here.

// Clippy's leave for tests does not reach the functions that tests call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use compose::harness::Workspace;

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
        copy(name, &alone);
        check(&alone);
        eprintln!("{name} alone ... ok");
    }

    let all = folder.path().join("all");
    let examples = workspace.examples().iter();
    let names: Vec<&str> = examples.map(|example| example.name.as_str()).collect();
    for name in &names {
        let project = all.join(name);
        copy(name, &project);
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

fn copy(name: &str, project: &Path) {
    let mut lab = Command::new(env!("CARGO_BIN_EXE_lab"));
    let output = lab.args(["new", name]).arg(project).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {said}");
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
