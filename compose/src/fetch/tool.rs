//! Runs the package managers: their output into a log, and the last words of one that fails into an error.

use std::env;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result};

use crate::process::Supervised;

/// The program of this name on PATH.
pub(crate) fn which(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(name))
        .find(|file| is_program(file))
}

pub(crate) fn is_program(file: &Path) -> bool {
    file.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The output of one fetch, whole, for whoever must find out what went wrong.
pub(super) struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    pub(super) fn create(path: PathBuf) -> Result<Log> {
        let file = File::create(&path)
            .with_context(|| format!("cannot write the log {}", path.display()))?;
        Ok(Log { path, file })
    }

    pub(super) fn line(&mut self, line: &str) {
        // A full disk must not hide the tool's own complaint about it.
        let _ = writeln!(self.file, "{line}");
    }
}

/// A tool that failed: its last words, and where to read all of them.
#[derive(Debug)]
pub(super) struct Failure {
    tool: &'static str,
    status: Option<ExitStatus>,
    pub(super) words: Vec<String>,
    log: PathBuf,
}

impl Failure {
    fn is_interrupt(&self) -> bool {
        self.status.is_some_and(|status| {
            status.signal().is_some() || matches!(status.code(), Some(130 | 143))
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tool = self.tool;
        if self.is_interrupt() {
            return write!(f, "{tool} was interrupted");
        }
        match self.status {
            Some(status) => writeln!(f, "{tool} failed ({status}):")?,
            None => writeln!(f, "{tool} failed:")?,
        }
        for word in &self.words {
            writeln!(f, "  {word}")?;
        }
        writeln!(
            f,
            "If that is the network: {tool} needs its servers, perhaps through a proxy of its own settings. \
             If it is the disk: LAB_HOME may be a folder on another one. Then run it again."
        )?;
        write!(f, "The whole output: {}", self.log.display())
    }
}

impl std::error::Error for Failure {}

/// Whether somebody has ended the tool, so that nothing else need be tried.
pub(crate) fn is_interrupt(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<Failure>()
        .is_some_and(Failure::is_interrupt)
}

/// Whether a tool failed and one of its last words has this in it.
pub(crate) fn says(error: &anyhow::Error, words: &str) -> bool {
    let failure = error.downcast_ref::<Failure>();
    failure.is_some_and(|failure| failure.words.iter().any(|line| line.contains(words)))
}

/// Runs a tool to its end and returns what it said. `name` is how messages call it. It ends with this process.
pub(super) fn run(
    name: &'static str,
    command: &Command,
    log: &mut Log,
    mut on_line: impl FnMut(&str),
) -> Result<String> {
    log.line(&format!("$ {command:?}"));
    let (output, input) = io::pipe().context("cannot create a pipe")?;
    let both = input.try_clone().context("cannot create a pipe")?;
    let mut tool = Supervised::spawn(command, both.into(), input.into(), None)?;
    // Nobody has anything to tell it.
    drop(tool.take_stdin());
    let mut said = String::new();
    let mut reader = BufReader::new(output);
    let mut bytes = Vec::new();
    while reader
        .read_until(b'\n', &mut bytes)
        .with_context(|| format!("cannot read what {name} says"))?
        > 0
    {
        let line = String::from_utf8_lossy(&bytes);
        let line = line.trim_end();
        log.line(line);
        on_line(line);
        said.push_str(line);
        said.push('\n');
        bytes.clear();
    }
    let status = tool.wait()?;
    if status.success() {
        return Ok(said);
    }
    Err(failure(name, Some(status), &said, log).into())
}

/// What a tool's output amounts to once it is known that the tool failed.
pub(super) fn failure(
    tool: &'static str,
    status: Option<ExitStatus>,
    said: &str,
    log: &Log,
) -> Failure {
    Failure {
        tool,
        status,
        words: last_words(said),
        log: log.path.clone(),
    }
}

/// The lines that matter: those that the tool itself marks as errors, else the last ones.
fn last_words(said: &str) -> Vec<String> {
    const MOST: usize = 3;
    const HALF: usize = 150;
    const MARKS: &[&str] = &["E: ", "W: Failed to fetch", "[ERROR] "];
    // What Maven says after every error.
    const ASIDE: &[&str] = &[
        "[ERROR] [Help",
        "re-run Maven",
        "Re-run Maven",
        "more information about the errors",
    ];
    // The cause is often at the end.
    let shorten = |line: &str| -> String {
        let chars: Vec<char> = line.chars().collect();
        match chars.len().checked_sub(2 * HALF) {
            Some(1..) => [
                &chars[..HALF],
                &[' ', '…', ' '],
                &chars[chars.len() - HALF..],
            ]
            .into_iter()
            .flatten()
            .collect(),
            _ => line.to_owned(),
        }
    };
    let marked: Vec<&str> = said
        .lines()
        .map(str::trim_end)
        .filter(|line| MARKS.iter().any(|mark| line.starts_with(mark)))
        .filter(|line| !ASIDE.iter().any(|aside| line.contains(aside)))
        .map(|line| line.trim_end_matches(" -> [Help 1]"))
        .take(MOST)
        .collect();
    if !marked.is_empty() {
        return marked.into_iter().map(shorten).collect();
    }
    let all: Vec<&str> = said
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let last = all.iter().skip(all.len().saturating_sub(MOST));
    last.map(|line| shorten(line)).collect()
}

#[cfg(test)]
mod tests {
    use super::last_words;

    #[test]
    fn last_words_are_the_errors_and_not_mavens_farewell() {
        let said = "[INFO] x\n[ERROR] it broke -> [Help 1]\n[ERROR] \n\
                    [ERROR] To see the full stack trace of the errors, re-run Maven with the -e switch.\n\
                    [ERROR] [Help 1] somewhere\n";
        assert_eq!(last_words(said)[0], "[ERROR] it broke");
        assert!(!last_words(said).iter().any(|word| word.contains("Help")));
        assert_eq!(last_words("a\n\nb\nc\nd\n"), ["b", "c", "d"]);
    }
}
