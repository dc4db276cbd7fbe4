//! The console transcript in a header: read it, run it, compare.
//!
//! A transcript is a fenced block marked `console`:
//!
//! ````text
//! //! ```console
//! //! 1$ cargo lab up kafka
//! //! 2$ cargo lab run kafka_consumer_group
//! //! partition [..]: order-1
//! //! ...
//! //! 3$ cargo lab kill kafka
//! //! 2:
//! //! the broker is gone
//! //! 2^C
//! //! bye
//! //! ```
//! ````
//!
//! | line | meaning |
//! |---|---|
//! | `$ COMMAND`, `2$ COMMAND` | runs it in terminal 1 or 2, once the command before it there has ended |
//! | `2:` | what follows is more of what appears in terminal 2 |
//! | `^C`, `2^C` | Ctrl-C there; what follows is what the program prints while it ends |
//! | `[exit 1]` | the program ends with this status. Without such a line it must be 0 |
//! | `...` | any lines, or none |
//! | anything else | a line of standard output, where `[..]` stands for any characters |
//!
//! Every part is awaited before the next marker is acted on: `3$` above runs only once `partition …: order-1` has
//! appeared. A part that is empty or just `...` waits for nothing. At the end of the transcript every program must have
//! ended, and must have printed no more than the transcript says. Standard error, blank lines and spaces at the end of
//! a line don't count.
//!
//! | command | what is done |
//! |---|---|
//! | `cargo lab run NAME ARGS…` | runs the built program, with the brokers' addresses in its environment and in an empty folder |
//! | `cargo lab up …`, `cargo lab down …` | nothing: the brokers under test are there already |
//! | `cargo lab kill`, `restart`, `pause`, `resume` `SERVICE[.NODE]` | does that to a broker under test |
//!
//! `NAME=value` may stand before a command. Quotes are a shell's; pipes, redirections, variables and file name patterns
//! are refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use snapbox::Data;
use snapbox::filter::NormalizeToExpected;
use snapbox::report::{Palette, write_diff};

use super::example::{Example, Progress, Running, exit_code};

/// One `console` block of a header.
#[derive(Clone, Debug)]
pub struct Transcript {
    steps: Vec<Step>,
}

/// What went wrong, and on which line of the file.
#[derive(Debug)]
pub struct Failure {
    /// The line, counted from 1.
    pub line: usize,
    /// What went wrong, with all that is needed to see why.
    pub reason: anyhow::Error,
}

/// What a transcript can do to a broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL.
    Kill,
    /// SIGSTOP.
    Pause,
    /// SIGCONT.
    Resume,
    /// Start it again after a kill.
    Restart,
}

/// What a transcript runs on.
pub struct Stage<'a> {
    /// The folder with the built programs.
    pub programs: &'a Path,
    /// The names of those that may be run: cargo builds no others for this test, so a file may be missing or old.
    pub allowed: &'a [String],
    /// Where the programs run.
    pub folder: &'a Path,
    /// What is added to the environment of the programs.
    pub env: &'a [(String, String)],
    /// Breaks or mends the node of a service.
    pub fault: &'a dyn Fn(Fault, &str, u16) -> Result<()>,
    /// How long each part may take.
    pub limit: Duration,
}

#[derive(Clone, Debug)]
struct Step {
    line: usize,
    terminal: u32,
    action: Action,
    expected: Vec<String>,
    exit: Option<i32>,
}

#[derive(Clone, Debug)]
enum Action {
    Start(Command),
    GoOn,
    Interrupt,
}

#[derive(Clone, Debug, PartialEq)]
enum Command {
    /// `cargo lab up`, `cargo lab down`
    Nothing,
    Fault {
        fault: Fault,
        service: String,
        node: u16,
    },
    Program {
        name: String,
        args: Vec<String>,
        env: Vec<(String, String)>,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:#}", self.line, self.reason)
    }
}

impl std::error::Error for Failure {}

impl Transcript {
    /// The transcripts in a header that starts on line `first_line` of its file.
    ///
    /// # Errors
    /// A block has no end, or breaks the rules above.
    pub fn parse(header: &str, first_line: usize) -> Result<Vec<Transcript>, Failure> {
        let mut transcripts = Vec::new();
        let mut lines = (first_line..).zip(header.lines());
        while let Some((line, text)) = lines.next() {
            let language = text.trim_start_matches('`');
            let (fence, language) = (&text[..text.len() - language.len()], language.trim());
            if fence.len() < 3 {
                continue;
            }
            let mut block = Vec::new();
            loop {
                match lines.next() {
                    Some((_, text)) if text.trim_end() == fence => break,
                    Some(numbered) => block.push(numbered),
                    None => {
                        return Err(Failure {
                            line,
                            reason: anyhow!("this block has no end"),
                        });
                    }
                }
            }
            if language == "console" {
                transcripts.push(Transcript::parse_block(line, &block)?);
            }
        }
        Ok(transcripts)
    }

    fn parse_block(line: usize, block: &[(usize, &str)]) -> Result<Transcript, Failure> {
        let mut steps: Vec<Step> = Vec::new();
        for &(line, text) in block {
            let text = text.trim_end();
            let parsed = match marker(text) {
                Some((terminal, action)) => action
                    .and_then(|action| follows(&steps, terminal, &action).map(|()| action))
                    .map(|action| {
                        steps.push(Step {
                            line,
                            terminal,
                            action,
                            expected: Vec::new(),
                            exit: None,
                        })
                    }),
                None if text.is_empty() => Ok(()),
                None => match steps.last_mut() {
                    Some(step) => step.expect(text),
                    None => Err(anyhow!(
                        "a transcript starts with a command, such as `$ cargo lab run NAME`"
                    )),
                },
            };
            parsed.map_err(|reason| Failure { line, reason })?;
        }
        let transcript = Transcript { steps };
        for (at, step) in transcript.steps.iter().enumerate() {
            if step.exit.is_some() && transcript.rest_of_run(at).nth(1).is_some() {
                return Err(Failure {
                    line: step.line,
                    reason: anyhow!("nothing can follow an [exit …] but a new command"),
                });
            }
        }
        if !transcript
            .steps
            .iter()
            .any(|step| matches!(step.action, Action::Start(Command::Program { .. })))
        {
            return Err(Failure {
                line,
                reason: anyhow!("the transcript runs no program"),
            });
        }
        Ok(transcript)
    }

    /// The names of the programs that it runs.
    pub fn programs(&self) -> impl Iterator<Item = &str> {
        self.steps.iter().filter_map(|step| match &step.action {
            Action::Start(Command::Program { name, .. }) => Some(name.as_str()),
            _ => None,
        })
    }

    /// Whether it has a `cargo lab kill` or the like.
    pub(crate) fn breaks_a_broker(&self) -> bool {
        let mut actions = self.steps.iter().map(|step| &step.action);
        actions.any(|action| matches!(action, Action::Start(Command::Fault { .. })))
    }

    /// Does what the transcript says and compares what appears. Whatever happens, no program is left running.
    ///
    /// # Errors
    /// A line that should appear does not, within the time limit or before the program ends; another one does; a
    /// program ends with the wrong status or not at all; or a command cannot be run.
    pub fn run(&self, stage: &Stage<'_>) -> Result<(), Failure> {
        let mut terminals: BTreeMap<u32, Session> = BTreeMap::new();
        for (at, step) in self.steps.iter().enumerate() {
            self.act(at, stage, &mut terminals).map_err(|reason| {
                match reason.downcast::<Failure>() {
                    Ok(failure) => failure,
                    Err(reason) => Failure {
                        line: step.line,
                        reason,
                    },
                }
            })?;
        }
        for session in terminals.into_values() {
            let line = session.line;
            session
                .finish(stage.limit)
                .map_err(|reason| Failure { line, reason })?;
        }
        Ok(())
    }

    fn act(
        &self,
        at: usize,
        stage: &Stage<'_>,
        terminals: &mut BTreeMap<u32, Session>,
    ) -> Result<()> {
        let step = &self.steps[at];
        match &step.action {
            Action::Start(command) => {
                // As in a real terminal: the prompt is back only when the program before has ended.
                if let Some(before) = terminals.remove(&step.terminal) {
                    let line = before.line;
                    before
                        .finish(stage.limit)
                        .map_err(|reason| Failure { line, reason })?;
                }
                match command {
                    Command::Nothing => return Ok(()),
                    Command::Fault {
                        fault,
                        service,
                        node,
                    } => return (stage.fault)(*fault, service, *node),
                    Command::Program { name, args, env } => {
                        let session = self.start(at, stage, name, args, env)?;
                        terminals.insert(step.terminal, session);
                    }
                }
            }
            Action::GoOn => {}
            Action::Interrupt => {
                // No session: this ends a `cargo lab up`.
                let Some(session) = terminals.get_mut(&step.terminal) else {
                    return Ok(());
                };
                session.line = step.line;
                session.running.interrupt()?;
            }
        }
        let Some(session) = terminals.get_mut(&step.terminal) else {
            return Ok(());
        };
        session.line = step.line;
        session.reached += step.expected.len();
        session.await_part(stage.limit)?;
        let is_last = self.rest_of_run(at).nth(1).is_none();
        let ends = step.exit.is_some() || matches!(step.action, Action::Interrupt);
        if is_last
            && ends
            && let Some(session) = terminals.remove(&step.terminal)
        {
            session.finish(stage.limit)?;
        }
        Ok(())
    }

    fn start(
        &self,
        at: usize,
        stage: &Stage<'_>,
        name: &str,
        args: &[String],
        env: &[(String, String)],
    ) -> Result<Session> {
        ensure!(
            stage.allowed.iter().any(|allowed| allowed == name),
            "{name} is no binary of this package, and cargo builds only this package's for its tests"
        );
        let mut example = Example::new(stage.programs.join(name))
            .args(args)
            .current_dir(stage.folder);
        for (name, value) in stage.env.iter().chain(env) {
            example = example.env(name, value);
        }
        let pattern: Vec<String> = self
            .rest_of_run(at)
            .flat_map(|step| step.expected.iter().cloned())
            .collect();
        let exit = self.rest_of_run(at).find_map(|step| step.exit).unwrap_or(0);
        let states = reachable(&pattern, BTreeSet::from([0]));
        Ok(Session {
            line: 0,
            running: example.spawn()?,
            pattern,
            states,
            fed: 0,
            reached: 0,
            exit,
        })
    }

    /// The step and those after it that are about the same run of a program.
    fn rest_of_run(&self, at: usize) -> impl Iterator<Item = &Step> {
        let terminal = self.steps[at].terminal;
        let later = self.steps[at + 1..]
            .iter()
            .filter(move |step| step.terminal == terminal);
        std::iter::once(&self.steps[at])
            .chain(later.take_while(|step| !matches!(step.action, Action::Start(_))))
    }
}

impl Step {
    fn expect(&mut self, text: &str) -> Result<()> {
        let is_program = !matches!(
            &self.action,
            Action::Start(Command::Nothing | Command::Fault { .. })
        );
        ensure!(
            is_program || text.trim() == "...",
            "the output of this command is not compared; write `...` for it, or nothing"
        );
        ensure!(
            self.exit.is_none(),
            "nothing can follow an [exit …] but a new command"
        );
        match text
            .strip_prefix("[exit ")
            .and_then(|rest| rest.strip_suffix(']'))
        {
            Some(status) => {
                self.exit = Some(
                    status
                        .parse()
                        .with_context(|| format!("'{status}' is no exit status"))?,
                );
            }
            None => self.expected.push(if text.trim() == "..." {
                "...".to_owned()
            } else {
                text.to_owned()
            }),
        }
        Ok(())
    }
}

/// The terminal and what is done there, if the line is a marker.
fn marker(text: &str) -> Option<(u32, Result<Action>)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, rest) = text.split_at(digits);
    let terminal = if number.is_empty() {
        1
    } else {
        number.parse().ok()?
    };
    match rest {
        "^C" => Some((terminal, Ok(Action::Interrupt))),
        ":" if digits > 0 => Some((terminal, Ok(Action::GoOn))),
        _ => {
            let command = rest.strip_prefix("$ ")?;
            Some((
                terminal,
                parse_command(command)
                    .map(Action::Start)
                    .with_context(|| format!("`{command}`")),
            ))
        }
    }
}

/// Whether the action makes sense after these steps.
fn follows(steps: &[Step], terminal: u32, action: &Action) -> Result<()> {
    let last = steps.iter().rev().find(|step| step.terminal == terminal);
    match (action, last.map(|step| &step.action)) {
        (Action::Start(_), _) => Ok(()),
        (_, None) => bail!("no command was started in terminal {terminal}"),
        (_, Some(Action::Start(Command::Fault { .. }))) => {
            bail!("nothing runs in terminal {terminal}")
        }
        (Action::GoOn, Some(Action::Start(Command::Nothing))) => {
            bail!("the output of the command in terminal {terminal} is not compared")
        }
        (Action::Interrupt, Some(Action::Interrupt)) => {
            bail!("terminal {terminal} was interrupted before")
        }
        _ => Ok(()),
    }
}

fn parse_command(command: &str) -> Result<Command> {
    if let Some(special) = unquoted_special(command) {
        bail!(
            "an unquoted {special} means something to the shell: quote it, or do without pipes, redirections, variables and patterns"
        );
    }
    let words = shlex::split(command).context("a quote is not closed")?;
    let is_setting = |word: &&String| {
        word.split_once('=')
            .is_some_and(|(name, _)| is_variable(name))
    };
    let env: Vec<(String, String)> = words
        .iter()
        .take_while(is_setting)
        .filter_map(|word| word.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let words: Vec<&str> = words[env.len()..].iter().map(String::as_str).collect();
    match words.as_slice() {
        ["cargo", "lab", "up" | "down", ..] => Ok(Command::Nothing),
        [
            "cargo",
            "lab",
            verb @ ("kill" | "pause" | "resume" | "restart"),
            target,
        ] => {
            let fault = match *verb {
                "kill" => Fault::Kill,
                "pause" => Fault::Pause,
                "resume" => Fault::Resume,
                _ => Fault::Restart,
            };
            let (service, node) = target.split_once('.').unwrap_or((target, "1"));
            let node = node
                .parse()
                .with_context(|| format!("'{node}' is no node number"))?;
            Ok(Command::Fault {
                fault,
                service: service.to_owned(),
                node,
            })
        }
        ["cargo", "lab", "run", name, args @ ..] if !name.starts_with('-') => {
            Ok(Command::Program {
                name: (*name).to_owned(),
                args: args.iter().map(|arg| (*arg).to_owned()).collect(),
                env,
            })
        }
        _ => bail!(
            "a transcript can only run `cargo lab run NAME [ARGS]`, `cargo lab up|down …` and \
             `cargo lab kill|pause|resume|restart SERVICE[.NODE]`"
        ),
    }
}

fn is_variable(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.chars().all(|c| c == '_' || c.is_ascii_alphanumeric())
}

/// The first character that a shell would not pass on as it is.
fn unquoted_special(command: &str) -> Option<char> {
    let mut quote = None;
    let mut chars = command.chars().peekable();
    let mut starts_word = true;
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some('\''), '\'') | (Some('"'), '"') => quote = None,
            (Some('\''), _) => {}
            (_, '\\') => {
                chars.next();
            }
            (Some(_), '$' | '`') => return Some(c),
            (Some(_), _) => {}
            (None, '\'' | '"') => quote = Some(c),
            // The rest is a comment.
            (None, '#') if starts_word => return None,
            (
                None,
                '|' | '&' | ';' | '<' | '>' | '(' | ')' | '$' | '`' | '*' | '?' | '[' | '{' | '~',
            ) => return Some(c),
            (None, _) => {}
        }
        starts_word = quote.is_none() && c.is_whitespace();
    }
    None
}

/// A program that runs in a terminal, and how far its output has matched.
struct Session {
    line: usize,
    running: Running,
    /// All the lines that are expected of this run, also those that stand after later markers: the program does not
    /// wait for the transcript, so they may come early.
    pattern: Vec<String>,
    /// The positions in `pattern` at which the output so far may stand: several if it has `...`.
    states: BTreeSet<usize>,
    /// How many lines of output have been compared.
    fed: usize,
    /// The end of the part to await.
    reached: usize,
    exit: i32,
}

impl Session {
    /// Waits until all of the pattern up to `reached` has appeared.
    fn await_part(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            self.compare()?;
            if self
                .states
                .last()
                .is_some_and(|furthest| *furthest >= self.reached)
            {
                return Ok(());
            }
            let progress = self.running.advance(deadline)?;
            if progress != Progress::Output || Instant::now() >= deadline {
                let what = match self.running.status {
                    Some(status) => format!(
                        "{} ended ({status}) before it printed all of this",
                        self.running.name()
                    ),
                    None => format!(
                        "{} has not printed all of this after {limit:?}",
                        self.running.name()
                    ),
                };
                bail!("{what}{}", self.diff());
            }
        }
    }

    /// Waits until the program has ended, and as it should.
    fn finish(mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            self.compare()?;
            let progress = self.running.advance(deadline)?;
            if progress == Progress::Ended {
                break;
            }
            ensure!(
                progress == Progress::Output && Instant::now() < deadline,
                "{} is still running after {limit:?}; if only Ctrl-C ends it, the transcript needs a ^C for its terminal{}",
                self.running.name(),
                self.stderr()
            );
        }
        self.compare()?;
        self.reached = self.pattern.len();
        if !self.states.contains(&self.pattern.len()) {
            bail!(
                "{} ended before it printed all of this{}",
                self.running.name(),
                self.diff()
            );
        }
        let code = exit_code(
            self.running
                .status
                .context("an ended program has a status")?,
        );
        ensure!(
            code == self.exit,
            "{} ended with exit status {code} instead of {}{}",
            self.running.name(),
            self.exit,
            self.stderr()
        );
        Ok(())
    }

    /// Takes in the lines that have come since, and fails as soon as nothing that may yet come could make them right.
    fn compare(&mut self) -> Result<()> {
        let lines: Vec<String> = self
            .running
            .stdout()
            .skip(self.fed)
            .map(str::to_owned)
            .collect();
        for line in lines {
            self.fed += 1;
            let line = line.trim_end();
            if line.is_empty() {
                continue;
            }
            let mut next = BTreeSet::new();
            for &state in &self.states {
                match self.pattern.get(state).map(String::as_str) {
                    Some("...") => next.insert(state),
                    Some(pattern) if line_matches(line, pattern) => next.insert(state + 1),
                    _ => false,
                };
            }
            if next.is_empty() {
                let furthest = self.states.last().copied().unwrap_or_default();
                self.reached = self.reached.max((furthest + 1).min(self.pattern.len()));
                bail!(
                    "{} printed something else: {line:?} does not fit{}",
                    self.running.name(),
                    self.diff()
                );
            }
            self.states = reachable(&self.pattern, next);
        }
        Ok(())
    }

    fn diff(&self) -> String {
        let lines = |lines: &mut dyn Iterator<Item = &str>| {
            lines
                .map(|line| format!("{}\n", line.trim_end()))
                .collect::<String>()
        };
        let expected = lines(&mut self.pattern.iter().take(self.reached).map(String::as_str));
        let actual = lines(
            &mut self
                .running
                .stdout()
                .filter(|line| !line.trim_end().is_empty()),
        );
        let expected = Data::text(expected);
        // Lines that fit the pattern are replaced by it, so that only the others differ.
        let actual = NormalizeToExpected::new()
            .redact()
            .normalize(Data::text(actual), &expected);
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = write_diff(
            &mut text,
            &expected,
            &actual,
            Some(&"header"),
            Some(&"standard output"),
            Palette::plain(),
        );
        format!("\n{}{}", text.trim(), self.stderr())
    }

    fn stderr(&self) -> String {
        let stderr: String = self
            .running
            .stderr()
            .map(|line| format!("\n  {line}"))
            .collect();
        if stderr.is_empty() {
            stderr
        } else {
            format!("\nstandard error:{stderr}")
        }
    }
}

/// `states`, and the positions that can be reached from them without a further line.
fn reachable(pattern: &[String], mut states: BTreeSet<usize>) -> BTreeSet<usize> {
    let starts: Vec<usize> = states.iter().copied().collect();
    for mut state in starts {
        while pattern.get(state).is_some_and(|line| line == "...") {
            state += 1;
            states.insert(state);
        }
    }
    states
}

/// Whether a pattern, in which `[..]` stands for any characters, is true of a line.
///
/// (snapbox, which draws the differences, finds each piece only where it first appears: its `[..] ms` would not match
/// `2 ms, then 3 ms`.)
fn line_matches(line: &str, pattern: &str) -> bool {
    let Some((front, last)) = pattern.rsplit_once("[..]") else {
        return line == pattern;
    };
    let mut pieces = front.split("[..]");
    let Some(mut rest) = line.strip_prefix(pieces.next().unwrap_or_default()) else {
        return false;
    };
    for piece in pieces {
        let Some(at) = rest.find(piece) else {
            return false;
        };
        rest = &rest[at + piece.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(name: &str, args: &[&str], env: &[(&str, &str)]) -> Command {
        Command::Program {
            name: name.to_owned(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            env: env
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
        }
    }

    #[test]
    fn known_commands() {
        let parse = |command| parse_command(command).unwrap();
        assert_eq!(parse("cargo lab run a"), program("a", &[], &[]));
        assert_eq!(
            parse("cargo lab run a -v 'b c' \"d>\""),
            program("a", &["-v", "b c", "d>"], &[])
        );
        assert_eq!(
            parse("cargo lab run a   # in a second terminal"),
            program("a", &[], &[])
        );
        assert_eq!(
            parse("X=1 Y='2 3' cargo lab run a -b"),
            program("a", &["-b"], &[("X", "1"), ("Y", "2 3")])
        );
        assert_eq!(parse("cargo lab up kafka --nodes 3"), Command::Nothing);
        assert_eq!(parse("cargo lab down"), Command::Nothing);
        let fault = |fault, node| Command::Fault {
            fault,
            service: "kafka".to_owned(),
            node,
        };
        assert_eq!(parse("cargo lab kill kafka"), fault(Fault::Kill, 1));
        assert_eq!(parse("cargo lab restart kafka.3"), fault(Fault::Restart, 3));
        assert_eq!(parse("cargo lab pause kafka"), fault(Fault::Pause, 1));
        assert_eq!(parse("cargo lab resume kafka"), fault(Fault::Resume, 1));
    }

    #[test]
    fn other_commands_say_what_is_allowed() {
        let error = |command: &str| format!("{:#}", parse_command(command).unwrap_err());
        assert!(error("ls").contains("can only run `cargo lab run NAME"));
        assert!(error("cargo lab run --fast a").contains("can only run"));
        assert!(error("cargo run --bin a").contains("can only run"));
        assert!(error("cargo lab run a events.>").contains("unquoted >"));
        assert!(error("cargo lab run a \"$HOME\"").contains("unquoted $"));
        assert!(error("cargo lab run a events.*").contains("unquoted *"));
        assert!(error("cargo lab run a | head").contains("unquoted |"));
        assert!(error("cargo lab run a 'b").contains("quote is not closed"));
        assert!(error("cargo lab kill kafka.x").contains("'x' is no node number"));
    }

    #[test]
    fn markers() {
        let block = "Text.\n```console\n$ cargo lab run a\nout 1$\n\n12: not a marker\n2$ cargo lab run b\n1:\n  more\n2^C\n^C\n[exit 130]\n```\n";
        let transcripts = Transcript::parse(block, 10).unwrap();
        let [transcript] = transcripts.as_slice() else {
            panic!("{transcripts:?}")
        };
        let steps: Vec<_> = transcript
            .steps
            .iter()
            .map(|step| (step.line, step.terminal, step.expected.join("/"), step.exit))
            .collect();
        let expected = [
            (12, 1, "out 1$/12: not a marker", None),
            (16, 2, "", None),
            (17, 1, "  more", None),
            (19, 2, "", None),
            (20, 1, "", Some(130)),
        ];
        assert_eq!(
            steps,
            expected.map(|(line, terminal, lines, exit)| (line, terminal, lines.to_owned(), exit))
        );
    }

    #[test]
    fn other_blocks_are_skipped_and_several_are_found() {
        let header = "```console\n$ cargo lab run a\n```\n```sh\n$ rm x\n```\n```\nplain\n```\n\n````text\n```console\nx\n```\n````\n```console\n$ cargo lab run b\n```\n";
        let transcripts = Transcript::parse(header, 1).unwrap();
        let programs: Vec<&str> = transcripts.iter().flat_map(Transcript::programs).collect();
        assert_eq!(programs, ["a", "b"]);
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_line() {
        let error = |block: &str| {
            Transcript::parse(&format!("```console\n{block}```\n"), 1)
                .unwrap_err()
                .to_string()
        };
        assert!(
            Transcript::parse("```console\n$ cargo lab run a\n", 5)
                .unwrap_err()
                .to_string()
                .starts_with("5: this block has no end")
        );
        assert!(error("out\n").starts_with("2: a transcript starts with a command"));
        assert!(
            error("$ cargo lab run a\n2^C\n")
                .starts_with("3: no command was started in terminal 2")
        );
        assert!(
            error("$ cargo lab run a\n2:\n").starts_with("3: no command was started in terminal 2")
        );
        assert!(error("$ cargo lab run a\n^C\n1^C\n").starts_with("4: terminal 1 was interrupted"));
        assert!(
            error("$ cargo lab up kafka\nlocalhost:9092\n")
                .starts_with("3: the output of this command")
        );
        assert!(error("$ cargo lab kill kafka\n^C\n").starts_with("3: nothing runs in terminal 1"));
        assert!(error("$ cargo lab run a\n[exit 1]\nout\n").starts_with("4: nothing can follow"));
        assert!(error("$ cargo lab run a\n[exit 1]\n^C\n").starts_with("2: nothing can follow"));
        assert!(error("$ cargo lab run a\n[exit x]\n").starts_with("3: 'x' is no exit status"));
        assert!(
            error("$ cargo lab up kafka\n...\n").starts_with("1: the transcript runs no program")
        );
        assert!(error("$ make\n").starts_with("2: `make`: a transcript can only run"));
    }

    #[test]
    fn patterns_of_a_line() {
        for (line, pattern, expected) in [
            ("", "[..]", true),
            ("abc", "abc", true),
            ("abc", "ab", false),
            ("abc", "a[..]", true),
            ("abc", "[..]c", true),
            ("abc", "[..]b", false),
            ("abc", "b[..]", false),
            ("1000", "[..]0", true),
            ("2 ms, then 3 ms", "[..] ms", true),
            ("a-b-c", "[..]-[..]-[..]", true),
            ("a-b", "[..]-[..]-[..]", false),
            // Pieces don't overlap.
            ("aba", "ab[..]ba", false),
        ] {
            assert_eq!(
                line_matches(line, pattern),
                expected,
                "{line:?} {pattern:?}"
            );
        }
    }
}
