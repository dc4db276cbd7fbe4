//! Which crates a source file uses.
//!
//! The file is read as tokens, so that comments and strings cannot mislead, and macro calls, which a syntax tree leaves
//! unparsed, are covered too.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

/// Adds to `used` those of the `crates` (by the names that code calls them by) that the source mentions.
pub(super) fn crates_used<'a>(
    source: &str,
    crates: &[&'a str],
    used: &mut BTreeSet<&'a str>,
) -> Result<()> {
    // A byte order mark and a `#!` line are no tokens.
    let source = source.trim_start_matches('\u{feff}');
    let source = match source.strip_prefix("#!") {
        Some(rest) if !rest.trim_start().starts_with('[') => {
            rest.split_once('\n').map_or("", |(_, rest)| rest)
        }
        _ => source,
    };
    let tokens: TokenStream = source.parse().ok().context("it is no valid Rust")?;
    walk(tokens, false, crates, used);
    Ok(())
}

/// A name stands for a crate if a path starts with it (`serde::Serialize`, `::serde::Serialize`), or if it is brought
/// in as a whole (`use serde_json as json;`, `use {anyhow, serde_json};`).
fn walk<'a>(
    tokens: TokenStream,
    mut in_use: bool,
    crates: &[&'a str],
    used: &mut BTreeSet<&'a str>,
) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    for (at, token) in tokens.iter().enumerate() {
        match token {
            TokenTree::Ident(ident) => {
                let name = ident.to_string();
                let next = tokens.get(at + 1);
                // Not `impl Trait + use<'a>`, nor `extern "C"`.
                let is_use = name == "use"
                    && !matches!(next, Some(TokenTree::Punct(punct)) if punct.as_char() == '<')
                    || name == "extern"
                        && matches!(next, Some(TokenTree::Ident(ident)) if ident == "crate");
                if is_use {
                    in_use = true;
                } else if let Some(name) = crates.iter().find(|known| **known == name)
                    && starts_a_path(&tokens, at)
                    && (in_use || is_path_separator(&tokens, at + 1))
                {
                    used.insert(name);
                }
            }
            TokenTree::Group(group) => {
                if is_attribute(&tokens, at, group) {
                    in_strings_of_serde(group.stream(), crates, used);
                }
                if !in_use {
                    walk(group.stream(), false, crates, used);
                } else if starts_a_path(&tokens, at) {
                    // What stands in the braces is the start of a path again; in `std::{…}` it is not.
                    walk(group.stream(), true, crates, used);
                }
            }
            TokenTree::Punct(punct) if punct.as_char() == ';' => in_use = false,
            TokenTree::Punct(_) | TokenTree::Literal(_) => {}
        }
    }
}

/// Whether no other part of a path or expression stands before this token: not `self::`, `foo::`, `value.`, `as`.
fn starts_a_path(tokens: &[TokenTree], at: usize) -> bool {
    let before = |n: usize| at.checked_sub(n).and_then(|i| tokens.get(i));
    match before(1) {
        Some(TokenTree::Punct(punct)) if punct.as_char() == '.' => {
            // A field or a method; but `..` is a range or the rest of a struct.
            matches!(before(2), Some(TokenTree::Punct(p)) if p.as_char() == '.')
        }
        Some(TokenTree::Punct(punct)) if punct.as_char() == ':' => {
            // `name: Type` starts a path; `::name` does too unless something stands before the `::`.
            let double = matches!(before(2), Some(TokenTree::Punct(p)) if p.as_char() == ':');
            !double
                || match before(3) {
                    Some(TokenTree::Ident(ident)) => {
                        let keywords = [
                            "use", "as", "in", "impl", "dyn", "for", "mut", "return", "match",
                            "if", "where",
                        ];
                        keywords.iter().any(|keyword| ident == keyword)
                    }
                    // `Vec<T>::new` and `<T as Trait>::name` go on; `-> ::name` and `=> ::name` start.
                    Some(TokenTree::Punct(punct)) if punct.as_char() == '>' => {
                        matches!(before(4), Some(TokenTree::Punct(p)) if matches!(p.as_char(), '-' | '='))
                    }
                    _ => true,
                }
        }
        Some(TokenTree::Ident(ident)) => ident != "as" || is_path_separator(tokens, at + 1),
        _ => true,
    }
}

fn is_path_separator(tokens: &[TokenTree], at: usize) -> bool {
    let is_colon =
        |i: usize| matches!(tokens.get(i), Some(TokenTree::Punct(punct)) if punct.as_char() == ':');
    is_colon(at) && is_colon(at + 1)
}

fn is_attribute(tokens: &[TokenTree], at: usize, group: &Group) -> bool {
    let before = at.checked_sub(1).and_then(|i| tokens.get(i));
    group.delimiter() == Delimiter::Bracket
        && matches!(before, Some(TokenTree::Punct(punct)) if matches!(punct.as_char(), '#' | '!'))
}

/// `#[serde(with = "chrono::serde::ts_seconds")]` keeps a path in a string.
fn in_strings_of_serde<'a>(
    attribute: TokenStream,
    crates: &[&'a str],
    used: &mut BTreeSet<&'a str>,
) {
    let mut tokens = attribute.into_iter();
    if !matches!(tokens.next(), Some(TokenTree::Ident(ident)) if ident == "serde") {
        return;
    }
    let Some(TokenTree::Group(arguments)) = tokens.next() else {
        return;
    };
    for token in arguments.stream() {
        if let TokenTree::Literal(literal) = token
            && let Ok(path) = literal.to_string().trim_matches('"').parse()
        {
            walk(path, false, crates, used);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(source: &str) -> Vec<&'static str> {
        let crates = [
            "anyhow",
            "chrono",
            "clap",
            "futures",
            "rdkafka",
            "serde",
            "serde_json",
            "tokio",
            "tracing",
        ];
        let mut used = BTreeSet::new();
        crates_used(source, &crates, &mut used).unwrap();
        used.into_iter().collect()
    }

    #[test]
    fn paths_uses_attributes_and_macros() {
        assert_eq!(used("#[tokio::main] async fn main() {}"), ["tokio"]);
        assert_eq!(used("use serde::{Deserialize, Serialize};"), ["serde"]);
        assert_eq!(used("pub(crate) use ::serde::Serialize;"), ["serde"]);
        assert_eq!(used("use serde_json as json;"), ["serde_json"]);
        assert_eq!(
            used("use {anyhow::Result, serde_json, tokio::{select, time}};"),
            ["anyhow", "serde_json", "tokio"]
        );
        assert_eq!(used("extern crate tracing;"), ["tracing"]);
        assert_eq!(
            used("fn main() -> anyhow::Result<()> { Ok(()) }"),
            ["anyhow"]
        );
        assert_eq!(
            used("fn f() -> ::anyhow::Result { match a { _ => ::tokio::x } }"),
            ["anyhow", "tokio"]
        );
        assert_eq!(
            used("fn f(t: chrono::DateTime) -> impl futures::Stream {}"),
            ["chrono", "futures"]
        );
        assert_eq!(
            used("fn f() { x(<rdkafka::Message as ::serde::Serialize>::f) }"),
            ["rdkafka", "serde"]
        );
        assert_eq!(
            used(r#"fn f() { println!("{}", serde_json::json!({ "a": [chrono::Utc::now()] })) }"#),
            ["chrono", "serde_json"]
        );
        assert_eq!(
            used("fn f() { for i in 0..tokio::N {} let _ = a as rdkafka::T; }"),
            ["rdkafka", "tokio"]
        );
        assert_eq!(used("#[derive(clap::Parser)] struct A;"), ["clap"]);
        assert_eq!(
            used(r#"struct A { #[serde(with = "chrono::serde::ts_seconds")] t: u8 }"#),
            ["chrono"]
        );
        assert_eq!(used("#!/usr/bin/env run\nuse tokio::time;"), ["tokio"]);
        assert_eq!(used("#![allow(unused)]\nuse tokio::time;"), ["tokio"]);
    }

    #[test]
    fn comments_strings_and_namesakes_do_not_count() {
        assert_eq!(
            used(
                "//! tokio::main\n// use serde::Serialize;\n/* rdkafka::x */ /// chrono::Utc\nfn main() {}"
            ),
            [""; 0]
        );
        assert_eq!(
            used(
                r##"fn f() { g("tokio::spawn"); g(r#"use serde::{A};"#); g(b"anyhow::Result"); }"##
            ),
            [""; 0]
        );
        assert_eq!(
            used("use crate::tokio::x; use self::serde::y; use std::{clap::A, x::chrono};"),
            [""; 0]
        );
        assert_eq!(
            used(
                "fn f() { let tracing = 1; self.futures.len(); tokio(); S { anyhow: 2 }; x::<A>::serde::y(); }"
            ),
            [""; 0]
        );
        assert_eq!(used("use std::sync as tokio;"), [""; 0]);
        assert_eq!(
            used("fn f() -> impl X + use<'_> { serde } extern \"C\" fn g() { tokio }"),
            [""; 0]
        );
        assert_eq!(
            used("use std::time; fn f() { let serde = 1; serde }"),
            [""; 0]
        );
        assert_eq!(used("#[doc = \"tokio::x\"] fn f() {}"), [""; 0]);
    }

    #[test]
    fn broken_source_is_an_error() {
        assert!(crates_used("fn main() {", &[], &mut BTreeSet::new()).is_err());
    }
}
