//! Keeps the book and the READMEs true.

// Clippy's leave for tests does not reach the functions that tests call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use compose::Service;
use compose::harness::Workspace;
use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every page that people read: the book's, the front page, and that of each folder.
fn pages() -> Vec<PathBuf> {
    let mut pages = vec![root().join("README.md")];
    for folder in fs::read_dir(root())
        .unwrap()
        .map(|entry| entry.unwrap().path())
    {
        if folder.join("README.md").is_file() {
            pages.push(folder.join("README.md"));
        }
    }
    for file in fs::read_dir(root().join("docs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
    {
        if file.extension().is_some_and(|extension| extension == "md") && !pages.contains(&file) {
            pages.push(file);
        }
    }
    pages
}

fn links(text: &str) -> Vec<String> {
    Parser::new_ext(text, Options::ENABLE_TABLES)
        .filter_map(|event| match event {
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                Some(dest_url.to_string())
            }
            _ => None,
        })
        .collect()
}

/// The anchors that GitHub and mdBook give to a page's headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    let mut heading: Option<String> = None;
    for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
        match event {
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::Text(part) | Event::Code(part) => {
                if let Some(heading) = &mut heading {
                    heading.push_str(&part);
                }
            }
            Event::End(TagEnd::Heading(_)) => {
                let text = heading
                    .take()
                    .unwrap_or_default()
                    .to_lowercase()
                    .replace(' ', "-");
                anchors.insert(
                    text.chars()
                        .filter(|c| c.is_alphanumeric() || "-_".contains(*c))
                        .collect(),
                );
            }
            _ => {}
        }
    }
    anchors
}

/// A link that leads nowhere, and why.
fn broken(page: &Path, link: &str) -> Option<String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return None;
    }
    let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
    let target = if file.is_empty() {
        page.to_owned()
    } else {
        page.parent().unwrap().join(file)
    };
    if !target.exists() {
        return Some(format!(
            "{}: {link}: there is no {}",
            page.display(),
            target.display()
        ));
    }
    if !anchor.is_empty() && !anchors(&read(&target)).contains(anchor) {
        return Some(format!(
            "{}: {link}: no heading makes that anchor",
            page.display()
        ));
    }
    None
}

#[test]
fn every_link_leads_somewhere() {
    let mut count = 0;
    let mut wrong = Vec::new();
    for page in pages() {
        let links = links(&read(&page));
        count += links.len();
        wrong.extend(links.iter().filter_map(|link| broken(&page, link)));
    }
    assert!(count > 20, "only {count} links were found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_broken_link_is_noticed() {
    let page = root().join("README.md");
    assert!(broken(&page, "docs/no-such-chapter.md").is_some());
    assert!(broken(&page, "README.md#no-such-heading").is_some());
    assert!(broken(&page, "README.md#what-is-there").is_none());
}

#[test]
fn every_chapter_is_in_the_table_of_contents() {
    let docs = root().join("docs");
    let listed: BTreeSet<_> = links(&read(&docs.join("SUMMARY.md"))).into_iter().collect();
    let chapters: BTreeSet<_> = fs::read_dir(&docs)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".md") && name != "SUMMARY.md")
        .collect();
    assert_eq!(listed, chapters);
}

#[test]
fn every_example_that_a_command_names_exists() {
    let workspace = Workspace::load().unwrap();
    let mut count = 0;
    for page in pages() {
        for line in read(&page).lines() {
            for (_, rest) in ["cargo lab run ", "cargo lab new "]
                .iter()
                .filter_map(|verb| line.split_once(verb))
            {
                let name: String = rest
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                if name.is_empty() || name == "NAME" {
                    continue;
                }
                count += 1;
                workspace
                    .find(&name)
                    .unwrap_or_else(|error| panic!("{}: {error}", page.display()));
            }
        }
    }
    assert!(count > 5, "only {count} commands were found");
}

#[test]
fn ci_runs_the_test_command_of_the_readme() {
    let readme = read(&root().join("README.md"));
    let command = readme
        .lines()
        .filter_map(|line| line.strip_prefix("$ "))
        .find(|command| command.contains(" test"))
        .expect("the README has a command that runs the tests");
    assert_eq!(read(&root().join(".ci/run")).lines().last(), Some(command));
}

#[test]
fn the_table_of_services_has_all_of_them() {
    let page = read(&root().join("docs/brokers.md"));
    for service in Service::ALL {
        let row = format!("\n| `{service}` | `{}` |", service.variable());
        assert!(
            page.contains(&row),
            "docs/brokers.md has no row that begins with{row}"
        );
    }
}
