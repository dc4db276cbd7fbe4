//! Runs the package managers: their output into a log, their words into a cause, their progress onto the screen.

use std::collections::VecDeque;
use std::env;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// The tool goes when we go, even by SIGKILL: a watcher beside it holds the other end of a pipe and
/// ends the tool at end of file. A line on the pipe says that all is well and the watcher may leave.
/// The tool itself has the shell's place, so it stays in the foreground and gets the terminal's Ctrl-C.
const WATCHED: &str = r#"
exec 3<&0 </dev/null
( exec >/dev/null 2>&1; read -r _ <&3 || kill -TERM $$ ) &
exec 3<&-
exec "$@"
"#;

/// The program of this name on PATH.
pub(super) fn which(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(name))
        .find(|file| is_program(file))
}

pub(super) fn is_program(file: &Path) -> bool {
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
        let file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .open(&path)
            .with_context(|| format!("cannot write the log {}", path.display()))?;
        Ok(Log { path, file })
    }

    pub(super) fn line(&mut self, line: &str) {
        // A full disk must not hide the tool's own complaint about it.
        let _ = writeln!(self.file, "{line}");
    }
}

/// Why a tool failed, as far as its own words tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    Offline,
    Certificate,
    DiskFull,
    Interrupted,
    Other,
}

impl Cause {
    pub(super) fn of(text: &str) -> Cause {
        const DISK: &[&str] = &[
            "no space left on device",
            "enough free space",
            "disk quota exceeded",
        ];
        const CERTIFICATE: &[&str] = &[
            "pkix path",
            "unable to find valid certification path",
            "trustanchors parameter must be non-empty",
            "x509:",
            "certificate verification failed",
            "certificate is not trusted",
        ];
        const OFFLINE: &[&str] = &[
            "offline mode",
            "unknown host",
            "unknownhostexception",
            "name or service not known",
            "no address associated",
            "temporary failure in name resolution",
            "temporary failure resolving",
            "could not resolve host",
            "could not resolve '",
            "no such host",
            "server misbehaving",
            "connection refused",
            "could not connect",
            "unable to connect",
            "cannot initiate the connection",
            "connect timed out",
            "connection timed out",
            "connection reset",
            "network is unreachable",
            "no route to host",
            "i/o timeout",
            "handshake timeout",
            "read timed out",
        ];
        // The same words come in either case, from the system and from Go.
        let text = text.to_lowercase();
        let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
        if has(DISK) {
            Cause::DiskFull
        } else if has(CERTIFICATE) {
            Cause::Certificate
        } else if has(OFFLINE) {
            Cause::Offline
        } else {
            Cause::Other
        }
    }
}

/// A tool that failed: the cause in a sentence, the tool's last words, and where to read all of them.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) tool: &'static str,
    pub(super) cause: Cause,
    pub(super) words: Vec<String>,
    pub(super) log: PathBuf,
    status: Option<ExitStatus>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tool = self.tool;
        match self.cause {
            Cause::Offline => writeln!(f, "no network: {tool} could not reach its servers")?,
            Cause::Certificate => writeln!(f, "{tool} does not trust the server's certificate")?,
            Cause::DiskFull => writeln!(f, "the disk is full")?,
            Cause::Interrupted => return write!(f, "{tool} was interrupted"),
            Cause::Other => match self.status {
                Some(status) => writeln!(f, "{tool} failed ({status})")?,
                None => writeln!(f, "{tool} failed")?,
            },
        }
        for word in &self.words {
            writeln!(f, "  {word}")?;
        }
        let advice = match self.cause {
            Cause::Offline => match tool {
                "Maven" => {
                    "Check the connection; Maven's proxy or mirror goes into ~/.m2/settings.xml. Then run it again: it goes on where it stopped."
                }
                "apt" => {
                    "Check the connection, and apt's proxy in /etc/apt/apt.conf.d. Then run it again."
                }
                _ => {
                    "Check the connection, and the proxy in HTTPS_PROXY. Then run it again: it goes on where it stopped."
                }
            },
            Cause::Certificate => {
                "If a proxy here signs with its own authority, give that to the tool too; for Java: MAVEN_OPTS=-Djavax.net.ssl.trustStore=FILE."
            }
            Cause::DiskFull => {
                "Make room, or set LAB_HOME to a folder on another disk; then run it again."
            }
            _ => "Run it again; if it fails in the same way, its output tells more.",
        };
        writeln!(f, "{advice}")?;
        write!(f, "The whole output: {}", self.log.display())
    }
}

impl std::error::Error for Failure {}

/// Runs a tool to its end and returns what it said. `name` is how messages call it.
pub(super) fn run(
    name: &'static str,
    command: &mut Command,
    log: &mut Log,
    mut on_line: impl FnMut(&str),
) -> Result<String> {
    log.line(&format!("$ {command:?}"));
    let mut watched = Command::new("/bin/sh");
    watched.args(["-c", WATCHED, "sh"]);
    watched.arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => watched.env(key, value),
            None => watched.env_remove(key),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        watched.current_dir(folder);
    }
    let (output, input) = io::pipe().context("cannot create a pipe")?;
    let mut child = watched
        .stdin(Stdio::piped())
        .stdout(input.try_clone().context("cannot create a pipe")?)
        .stderr(input)
        .spawn()
        .with_context(|| format!("cannot start {name} ({:?})", command.get_program()))?;
    // It holds the writing end of the output: without this, end of file would never come.
    drop(watched);

    let mut pipe = child.stdin.take();
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
    let status = child
        .wait()
        .with_context(|| format!("cannot wait for {name}"))?;
    if let Some(pipe) = &mut pipe {
        let _ = pipe.write_all(b"\n");
    }
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
    let interrupted = status.is_some_and(|status| {
        status.signal().is_some() || matches!(status.code(), Some(130 | 143))
    });
    Failure {
        tool,
        cause: if interrupted {
            Cause::Interrupted
        } else {
            Cause::of(said)
        },
        words: last_words(said),
        log: log.path.clone(),
        status,
    }
}

/// The lines that matter: those that the tool itself marks as errors, else the last ones.
fn last_words(said: &str) -> Vec<String> {
    const MOST: usize = 3;
    const MARKS: &[&str] = &["E: ", "W: Failed to fetch", "[ERROR] "];
    // What Maven says after every error.
    const ASIDE: &[&str] = &[
        "[ERROR] [Help",
        "re-run Maven",
        "Re-run Maven",
        "more information about the errors",
    ];
    let shorten = |line: &str| -> String {
        let mut short: String = line.chars().take(300).collect();
        if short.len() < line.len() {
            short.push('…');
        }
        short
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
    let mut last = VecDeque::new();
    for line in said.lines().filter(|line| !line.trim().is_empty()) {
        if last.len() == MOST {
            last.pop_front();
        }
        last.push_back(shorten(line));
    }
    last.into()
}

/// All bars of this process, so that two fetches at once do not write over each other.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// A line for the reader, on stderr, without tearing a bar apart.
pub fn say(line: &str) {
    BARS.suspend(|| write_line(line));
}

/// Unlike `eprintln!`, it does not panic when the reader of a pipe has left.
fn write_line(line: &str) {
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// What is shown while something is fetched or built: a bar on a terminal, else a line at the start and one at the end.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    started: Instant,
}

impl Progress {
    pub(super) fn start(label: &str, by: &str) -> Progress {
        Progress::titled(label, &format!("fetching {label} by {by}"))
    }

    /// `label` stands before the bar, `line` is what is said where there is no terminal.
    pub fn titled(label: &str, line: &str) -> Progress {
        let bar = if io::stderr().is_terminal() {
            let bar = BARS.add(ProgressBar::new_spinner());
            bar.set_style(spinner());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar.set_prefix(label.to_owned());
            bar
        } else {
            write_line(line);
            ProgressBar::hidden()
        };
        Progress {
            bar,
            started: Instant::now(),
        }
    }

    /// What it does at the moment.
    pub fn show(&self, message: impl Into<String>) {
        self.bar.set_message(message.into());
    }

    /// From now on it is known how many steps there are.
    pub(super) fn steps(&self, count: usize) {
        let style = "{spinner} {prefix} [{bar:24}] {pos}/{len} {wide_msg} {elapsed}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            self.bar.set_style(style);
        }
        self.bar.set_length(count as u64);
        self.bar.set_position(0);
    }

    pub(super) fn step(&self) {
        self.bar.inc(1);
    }

    /// Back to work of unknown length.
    pub(super) fn no_steps(&self) {
        self.bar.set_style(spinner());
    }

    pub(super) fn done(self, line: &str) {
        let seconds = self.started.elapsed().as_secs_f64();
        self.bar.finish_and_clear();
        say(&format!("{line} in {seconds:.0} s"));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn spinner() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {prefix}: {wide_msg} {elapsed}")
        .unwrap_or_else(|_| ProgressStyle::default_spinner())
}

#[cfg(test)]
mod tests {
    use super::{Cause, last_words};

    #[test]
    fn a_cause_is_told_from_the_tools_words() {
        for (words, cause) in [
            (
                "Could not transfer artifact a:pom:1 from/to central: Connect to x failed: Connection refused",
                Cause::Offline,
            ),
            ("dial tcp: lookup x: no such host", Cause::Offline),
            ("  Temporary failure resolving 'x'", Cause::Offline),
            (
                "write a.zip: no space left on device; dial tcp: i/o timeout",
                Cause::DiskFull,
            ),
            (
                "PKIX path building failed: unable to find valid certification path",
                Cause::Certificate,
            ),
            (
                "Could not resolve dependencies for project: a:jar:1 was not found",
                Cause::Other,
            ),
            ("go: m@v1 requires go >= 1.99", Cause::Other),
        ] {
            assert_eq!(Cause::of(words), cause, "{words}");
        }
    }

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
