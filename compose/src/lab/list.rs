//! `lab list`: the examples, wrapped by words at the terminal's width.

use std::fmt::Write as _;

use anyhow::{Result, bail};
use console::Term;

use crate::terminal::page;
use crate::workspace::{ExampleInfo, Group, Workspace};

/// Where no terminal tells.
const WIDTH: usize = 80;
/// With less room than this beside the names, titles stand below them.
const LEAST_TITLE: usize = 30;
const INDENT: usize = 2;
const GAP: usize = 2;

/// Prints the examples whose name or title contains the filter.
pub(super) fn list(filter: Option<&str>) -> Result<()> {
    let workspace = Workspace::load()?;
    let filter = filter.unwrap_or_default().to_lowercase();
    let wanted = |example: &&ExampleInfo| {
        example.name.contains(&filter) || example.title.to_lowercase().contains(&filter)
    };
    let mut groups = workspace.groups();
    for group in &mut groups {
        group.examples.retain(wanted);
    }
    groups.retain(|group| !group.examples.is_empty());
    if groups.is_empty() {
        bail!("no example has '{filter}' in its name or title");
    }
    let width = Term::stdout()
        .size_checked()
        .map_or(WIDTH, |(_, columns)| columns.into());
    page(&text(&groups, width)?)
}

fn text(groups: &[Group], width: usize) -> Result<String> {
    let examples = groups.iter().flat_map(|group| &group.examples);
    let longest = examples.map(|example| example.name.len()).max();
    let column = INDENT + longest.unwrap_or_default() + GAP;
    let below = width < column + LEAST_TITLE;
    let indent = if below { 3 * INDENT } else { column };
    let mut text = String::new();
    for group in groups {
        let gap = if text.is_empty() { "" } else { "\n" };
        writeln!(text, "{gap}{}", group.title)?;
        for ExampleInfo { name, title, .. } in &group.examples {
            let mut lines = wrap(title, width.saturating_sub(indent)).into_iter();
            if below {
                writeln!(text, "{:INDENT$}{name}", "")?;
            } else {
                let first = lines.next().unwrap_or_default();
                let name = format!("{:INDENT$}{name}", "");
                writeln!(text, "{}", format!("{name:column$}{first}").trim_end())?;
            }
            for line in lines {
                writeln!(text, "{:indent$}{line}", "")?;
            }
        }
    }
    Ok(text)
}

/// As many words on a line as there is room for, and at least one.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_between_words() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("one two three", 6), ["one", "two", "three"]);
        assert_eq!(
            wrap("a longer-than-that b", 5),
            ["a", "longer-than-that", "b"]
        );
        assert!(wrap("", 5).is_empty());
    }

    #[test]
    fn titles_hang_beside_their_names_or_stand_below_them() {
        let workspace = Workspace::load().unwrap();
        let groups = workspace.groups();
        for width in [40, 80, 120] {
            let text = text(&groups, width).unwrap();
            for line in text.lines() {
                assert!(line.chars().count() <= width, "{width}: {line}");
                assert_eq!(line, line.trim_end());
            }
            let words = text.split_whitespace().count();
            let expected: usize = groups
                .iter()
                .map(|group| {
                    let titles = group
                        .examples
                        .iter()
                        .map(|example| example.title.split_whitespace().count() + 1);
                    group.title.split_whitespace().count() + titles.sum::<usize>()
                })
                .sum();
            assert_eq!(words, expected, "{width}");
        }
    }
}
