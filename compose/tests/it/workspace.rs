//! What is known about the examples.

// Clippy's leave for tests does not reach the functions that tests call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;

use compose::Service;
use compose::workspace::Workspace;

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
