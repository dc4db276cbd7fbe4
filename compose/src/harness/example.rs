//! A program under observation: start it, wait for what it prints, send it signals, see how it ends.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Once;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use std::{fmt, thread};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::Proxy;
use crate::Broker;
use crate::process::Supervised;

/// How often to look whether a silent program has ended: an exit is no event on its pipes as long as a descendant
/// holds them open.
const TICK: Duration = Duration::from_millis(20);

/// A program to run under observation.
#[derive(Debug)]
pub struct Example {
    command: Command,
    stdin: Input,
}

#[derive(Debug)]
enum Input {
    Bytes(Vec<u8>),
    Open,
}

/// Sees to it that programs started from here can be interrupted.
///
/// A shell starts what it puts in the background with SIGINT ignored, and so do some CI systems; programs inherit that,
/// and one that is a shell script can't undo it. A handler, unlike an ignored signal, is not inherited.
fn let_interrupts_through() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if has_signal("self", "SigIgn:", Signal::SIGINT) == Some(true) {
            let _ = ctrlc::set_handler(|| std::process::exit(130));
        }
    });
}

impl Example {
    /// A program by its path, in a test `env!("CARGO_BIN_EXE_…")`. Its standard input is empty.
    pub fn new(program: impl AsRef<Path>) -> Example {
        let mut command = Command::new(program.as_ref());
        // Built with the whole workspace, the log of an example can have colours.
        command.env("NO_COLOR", "1");
        Example {
            command,
            stdin: Input::Bytes(Vec::new()),
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Example {
        self.command.args(args);
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Example {
        self.command.env(name, value);
        self
    }

    /// Tells it where the broker is.
    #[must_use]
    pub fn broker(mut self, broker: &Broker) -> Example {
        self.command.envs(broker.env());
        self
    }

    /// Tells it to go to the broker through this proxy.
    #[must_use]
    pub fn proxy(mut self, proxy: &Proxy) -> Example {
        self.command.envs(proxy.env());
        self
    }

    /// What it reads from standard input.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Example {
        self.stdin = Input::Bytes(bytes.into());
        self
    }

    /// Keeps its standard input open for [`Running::write_stdin`].
    #[must_use]
    pub fn open_stdin(mut self) -> Example {
        self.stdin = Input::Open;
        self
    }

    /// The folder that it runs in.
    #[must_use]
    pub fn current_dir(mut self, folder: impl AsRef<Path>) -> Example {
        self.command.current_dir(folder);
        self
    }

    /// Starts it. It ends when the [`Running`] is dropped, or when this process ends, even by SIGKILL.
    ///
    /// # Errors
    /// There is no such program, or it cannot be started.
    pub fn spawn(self) -> Result<Running> {
        let program = PathBuf::from(self.command.get_program());
        ensure!(
            program.is_file(),
            "there is no program {}",
            program.display()
        );
        let_interrupts_through();
        let mut process = Supervised::spawn(&self.command, Stdio::piped(), Stdio::piped(), None)?;
        let mut stdin = process.take_stdin();
        if let Input::Bytes(bytes) = self.stdin
            && let Some(mut pipe) = stdin.take()
            && !bytes.is_empty()
        {
            // A program that never reads would block the test; one that ends early is not a fault of its input.
            thread::spawn(move || pipe.write_all(&bytes).ok());
        }
        let (sender, events) = channel();
        let stdout = process
            .take_stdout()
            .context("standard output is not piped")?;
        let stderr = process
            .take_stderr()
            .context("standard error is not piped")?;
        forward(Stream::Stdout, stdout, sender.clone());
        forward(Stream::Stderr, stderr, sender);
        Ok(Running {
            name: program
                .file_name()
                .unwrap_or(program.as_os_str())
                .to_owned(),
            process,
            stdin,
            events,
            open: 2,
            status: None,
            output: Vec::new(),
            searched: [0, 0],
        })
    }
}

/// A running program and what it has printed. Dropping it kills the program.
#[derive(Debug)]
pub struct Running {
    name: OsString,
    process: Supervised,
    stdin: Option<ChildStdin>,
    events: Receiver<Event>,
    /// How many of the two output pipes have not reached their end.
    open: usize,
    pub(super) status: Option<ExitStatus>,
    output: Vec<(Stream, String)>,
    /// For each stream the index in `output` before which lines are used up by earlier waits.
    searched: [usize; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    Stdout,
    Stderr,
}

#[derive(Debug)]
enum Event {
    Line(Stream, String),
    End,
}

/// What a wait ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// There may be new lines.
    Output,
    /// The program has ended, and all of its output is there.
    Ended,
    /// The time is up.
    Nothing,
}

fn forward(stream: Stream, pipe: impl Read + Send + 'static, sender: Sender<Event>) {
    thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&line);
            let text = text.strip_suffix('\r').unwrap_or(&text).to_owned();
            // Fails when nobody observes any more; go on so that the program does not block.
            let _ = sender.send(Event::Line(stream, text));
        }
        let _ = sender.send(Event::End);
    });
}

impl Running {
    /// The process id of the program.
    pub fn id(&self) -> u32 {
        self.process.pid()
    }

    /// Waits for a line, on either stream, that contains `text`, and returns it.
    ///
    /// It and the lines before it on the same stream are used up: a later wait looks behind them.
    ///
    /// # Errors
    /// There is no such line before the program ends or the time is up. The error shows the last lines of the output.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<String> {
        self.wait_for_line(
            |line| line.contains(text),
            &format!("a line with {text:?}"),
            limit,
        )
    }

    /// Like [`Running::wait_for`], for a line that `accepts`; `what` names it in errors.
    ///
    /// # Errors
    /// As for [`Running::wait_for`].
    pub fn wait_for_line(
        &mut self,
        accepts: impl Fn(&str) -> bool,
        what: &str,
        limit: Duration,
    ) -> Result<String> {
        let deadline = Instant::now() + limit;
        let mut from = self.searched;
        loop {
            for (at, (stream, line)) in self.output.iter().enumerate() {
                let stream = *stream as usize;
                if at >= from[stream] && accepts(line) {
                    self.searched[stream] = at + 1;
                    return Ok(line.clone());
                }
            }
            from = [self.output.len(); 2];
            match self.advance(deadline)? {
                Progress::Output if Instant::now() < deadline => {}
                Progress::Ended => bail!("{} ended without {what}{}", self.name(), self.report()),
                _ => bail!(
                    "no {what} after {limit:?}; {} is still running{}",
                    self.name(),
                    self.report()
                ),
            }
        }
    }

    /// All lines so far, of both streams, in the order in which they came.
    pub fn lines(&mut self) -> Vec<String> {
        self.take_in();
        self.output.iter().map(|(_, line)| line.clone()).collect()
    }

    /// Waits until the program has ended.
    ///
    /// # Errors
    /// It is still running when the time is up. The error shows the last lines of the output.
    pub fn wait(&mut self, limit: Duration) -> Result<Finished> {
        let deadline = Instant::now() + limit;
        loop {
            match self.advance(deadline)? {
                Progress::Output if Instant::now() < deadline => {}
                Progress::Ended => break,
                _ => bail!(
                    "{} has not ended after {limit:?}{}",
                    self.name(),
                    self.report()
                ),
            }
        }
        let status = self.status.context("an ended program has a status")?;
        let text =
            |lines: &mut dyn Iterator<Item = &str>| lines.map(|line| format!("{line}\n")).collect();
        Ok(Finished {
            name: self.name().to_string(),
            status,
            stdout: text(&mut self.stdout()),
            stderr: text(&mut self.stderr()),
        })
    }

    /// The exit status, if the program has ended. Some of its output may still be on the way; [`Running::wait`] waits
    /// for that too.
    ///
    /// # Errors
    /// The system refuses to say.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.status = self.process.try_wait()?;
        Ok(self.status)
    }

    /// SIGKILL; returns when the program is gone.
    ///
    /// # Errors
    /// It had ended before.
    pub fn kill(&mut self) -> Result<()> {
        self.still_runs("SIGKILL")?;
        self.status = Some(self.process.kill()?);
        Ok(())
    }

    /// SIGSTOP; returns when no thread of it runs any more.
    ///
    /// # Errors
    /// It had ended before.
    pub fn pause(&mut self) -> Result<()> {
        self.still_runs("SIGSTOP")?;
        self.process.pause()
    }

    /// SIGCONT: lets it go on.
    ///
    /// # Errors
    /// It had ended before.
    pub fn resume(&mut self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// SIGINT, as Ctrl-C sends it; once the program has a handler for it, see [`handles`].
    ///
    /// # Errors
    /// It had ended before.
    pub fn interrupt(&mut self) -> Result<()> {
        self.await_handler(Signal::SIGINT)?;
        self.signal(Signal::SIGINT)
    }

    /// SIGTERM, as service managers send it; once the program has a handler for it, see [`handles`].
    ///
    /// # Errors
    /// It had ended before.
    pub fn terminate(&mut self) -> Result<()> {
        self.await_handler(Signal::SIGTERM)?;
        self.signal(Signal::SIGTERM)
    }

    /// Waits, for some seconds at most, until the program has a handler for the signal. It installs that a moment after it
    /// has said that it is ready. No reader is so quick, but a test is, and would see the program end without a word.
    /// Where the system does not tell, this returns at once.
    ///
    /// # Errors
    /// It had ended before.
    fn await_handler(&mut self, signal: Signal) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.try_wait()?.is_none()
            && Instant::now() < deadline
            && !handles(self.process.pid(), signal)
        {
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Writes to its standard input, which [`Example::open_stdin`] has left open.
    ///
    /// # Errors
    /// The input is closed, here or there.
    pub fn write_stdin(&mut self, bytes: impl AsRef<[u8]>) -> Result<()> {
        let stdin = self
            .stdin
            .as_mut()
            .context("standard input is not open; Example::open_stdin keeps it open")?;
        stdin
            .write_all(bytes.as_ref())
            .with_context(|| format!("{} reads no more", self.name.display()))
    }

    /// Ends its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    fn signal(&mut self, signal: Signal) -> Result<()> {
        self.still_runs(signal.as_str())?;
        self.process.signal(signal)
    }

    /// A test that breaks a program which has ended already would prove nothing, so that is an error.
    fn still_runs(&mut self, signal: &str) -> Result<()> {
        if let Some(status) = self.try_wait()? {
            // For the report.
            self.wait(TICK * 50)?;
            bail!(
                "{} has ended ({status}) before it got {signal}{}",
                self.name(),
                self.report()
            );
        }
        Ok(())
    }

    pub(super) fn name(&self) -> impl fmt::Display {
        self.name.display()
    }

    pub(super) fn stdout(&self) -> impl Iterator<Item = &str> {
        self.of(Stream::Stdout)
    }

    pub(super) fn stderr(&self) -> impl Iterator<Item = &str> {
        self.of(Stream::Stderr)
    }

    fn of(&self, wanted: Stream) -> impl Iterator<Item = &str> {
        self.output
            .iter()
            .filter(move |(stream, _)| *stream == wanted)
            .map(|(_, line)| line.as_str())
    }

    /// Waits for new output, for the end, or for the deadline.
    pub(super) fn advance(&mut self, deadline: Instant) -> Result<Progress> {
        loop {
            if self.take_in() {
                return Ok(Progress::Output);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if self.open == 0 {
                self.status = self.process.wait_for(left)?;
                return Ok(if self.status.is_some() {
                    Progress::Ended
                } else {
                    Progress::Nothing
                });
            }
            let ended = self.try_wait()?.is_some();
            if ended {
                // Descendants that outlive the program hold its pipes; without them the pipes end.
                self.process.signal(Signal::SIGKILL)?;
            }
            match self
                .events
                .recv_timeout(if ended { TICK * 50 } else { left.min(TICK) })
            {
                Ok(event) => {
                    self.take(event);
                    return Ok(Progress::Output);
                }
                Err(RecvTimeoutError::Timeout) if !ended && left.is_zero() => {
                    return Ok(Progress::Nothing);
                }
                Err(RecvTimeoutError::Timeout) if !ended => {}
                // A descendant has left the process group, and keeps the pipes.
                Err(_) => self.open = 0,
            }
        }
    }

    /// Takes in what has arrived, or a part of it if there is no end to it; whether anything has.
    fn take_in(&mut self) -> bool {
        let mut any = false;
        for _ in 0..10_000 {
            let Ok(event) = self.events.try_recv() else {
                break;
            };
            self.take(event);
            any = true;
        }
        any
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Line(stream, line) => self.output.push((stream, line)),
            Event::End => self.open = self.open.saturating_sub(1),
        }
    }

    fn report(&self) -> String {
        if self.output.is_empty() {
            return "; it has printed nothing".to_owned();
        }
        let lines = self.output.iter().map(|(stream, line)| match stream {
            Stream::Stdout => format!("  out| {line}"),
            Stream::Stderr => format!("  err| {line}"),
        });
        format!("; its output so far:\n{}", last_lines(lines))
    }
}

/// A program that has ended.
#[derive(Clone, Debug)]
pub struct Finished {
    name: String,
    /// How it ended.
    pub status: ExitStatus,
    /// All that it wrote to standard output.
    pub stdout: String,
    /// All that it wrote to standard error.
    pub stderr: String,
}

impl Finished {
    /// Requires exit status 0.
    ///
    /// # Errors
    /// It was another one. The error shows the last lines of the output.
    pub fn ok(self) -> Result<Finished> {
        ensure!(
            self.status.success(),
            "{} failed: {}\nstandard error:\n{}\nstandard output:\n{}",
            self.name,
            self.status,
            last_lines(self.stderr.lines()),
            last_lines(self.stdout.lines())
        );
        Ok(self)
    }

    /// The exit status as a shell reports it: 128 and the signal's number if a signal ended it.
    pub fn code(&self) -> i32 {
        exit_code(self.status)
    }
}

/// The reason for a failure is in the last lines. Long output is cut here, so that no reader of a log cuts off its end.
fn last_lines(lines: impl Iterator<Item = impl Into<String>>) -> String {
    const SHOWN: usize = 100;
    let mut lines: Vec<String> = lines.map(Into::into).collect();
    if let Some(left_out) = lines.len().checked_sub(SHOWN).filter(|count| *count > 0) {
        lines.splice(..left_out, [format!("({left_out} lines before)")]);
    }
    lines.join("\n")
}

pub(super) fn exit_code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

/// Whether a process has a handler for the signal; true where the system does not tell, and of one that is not there.
pub fn handles(pid: impl fmt::Display, signal: Signal) -> bool {
    has_signal(pid, "SigCgt:", signal).unwrap_or(true)
}

/// Whether the signal is in this set of a process; `None` where the system does not tell.
fn has_signal(pid: impl fmt::Display, set: &str, signal: Signal) -> Option<bool> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let mask = status.lines().find_map(|line| line.strip_prefix(set))?;
    let mask = u64::from_str_radix(mask.trim(), 16).ok()?;
    Some(mask & 1 << (signal as i32 - 1) != 0)
}
