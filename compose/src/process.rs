//! Processes that never outlive their owner, even if the owner is killed with SIGKILL.
//!
//! A killed owner runs no clean-up, and Linux's parent-death signal follows the *thread* that spawned the child, which
//! under a test runner ends long before the test program does. So every process gets a watcher: a few lines of shell
//! reading a pipe whose other end only the owner holds. The kernel closes that end however the owner dies, the watcher
//! reads end-of-file, and kills the process together with its descendants.

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Reads whom to watch, then waits. `done` lets them go in peace; end-of-file means that the owner is dead.
/// The arguments are a command to run after the kill, for what a kill cannot reach: a temporary folder, a container.
const WATCHER: &str = r#"
read -r target || exit 0
read -r word
[ "$word" = done ] && exit 0
kill -KILL "$target" 2>/dev/null
[ $# -gt 0 ] && "$@" >/dev/null 2>&1
exit 0
"#;

/// Holds the program back until its watcher knows it: an owner killed in between leaves neither behind.
const GATE: &str = r#"read -r go && exec "$@""#;

/// How long the system may take to carry out a signal that a program cannot refuse.
const SIGNAL_LIMIT: Duration = Duration::from_secs(60);
/// How often to look whether it has.
const TICK: Duration = Duration::from_millis(2);

/// A process that is killed when its owner ends.
#[derive(Debug)]
pub(crate) struct Supervised {
    child: Child,
    /// Negative for a whole process group, as kill(2) has it.
    target: Pid,
    watcher: Child,
    lifeline: Option<ChildStdin>,
    status: Option<ExitStatus>,
}

impl Supervised {
    /// Starts `command` as the leader of a process group of its own: a Ctrl-C in the terminal does not reach it, and
    /// signals sent here reach its descendants too. Its standard input is a pipe, see [`Supervised::take_stdin`].
    ///
    /// The command's own settings of the three standard streams are not used. `farewell` is what the watcher runs if
    /// it had to kill.
    ///
    /// # Errors
    /// The program or `/bin/sh` cannot be started. A program that does not exist is noticed only later, as an exit
    /// with status 127: it is the shell that looks for it.
    pub(crate) fn spawn(
        command: &Command,
        stdout: Stdio,
        stderr: Stdio,
        farewell: Option<&Command>,
    ) -> Result<Supervised> {
        let (watcher, mut lifeline) = watch(farewell)?;
        let mut gated = behind("/bin/sh", &["-c", GATE, "gate"], command);
        let mut child = gated
            .stdin(Stdio::piped())
            .stdout(stdout)
            .stderr(stderr)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let target = Pid::from_raw(-i32::try_from(child.id())?);
        writeln!(lifeline, "{target}").context("the watcher is gone")?;
        let stdin = child
            .stdin
            .as_mut()
            .context("the child has no standard input")?;
        writeln!(stdin, "go").context("the child is gone")?;
        Ok(Supervised {
            child,
            target,
            watcher,
            lifeline: Some(lifeline),
            status: None,
        })
    }

    /// Starts `command` in the foreground: in the owner's process group and with its standard streams, so that it can
    /// read from the terminal and a Ctrl-C there reaches it.
    ///
    /// # Errors
    /// The program cannot be started.
    pub(crate) fn foreground(command: &mut Command) -> Result<Supervised> {
        let (watcher, mut lifeline) = watch(None)?;
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        // No gate here, since the program has the terminal as its input: an owner killed in this very instant leaves it.
        let target = Pid::from_raw(i32::try_from(child.id())?);
        writeln!(lifeline, "{target}").context("the watcher is gone")?;
        Ok(Supervised {
            child,
            target,
            watcher,
            lifeline: Some(lifeline),
            status: None,
        })
    }

    /// The id of the program itself, which is also that of its process group unless it runs in the foreground.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The program's standard input, once.
    pub(crate) fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// The program's standard output, once, if it was piped.
    pub(crate) fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// The program's standard error, once, if it was piped.
    pub(crate) fn take_stderr(&mut self) -> Option<ChildStderr> {
        self.child.stderr.take()
    }

    /// Sends a signal to the program and, unless it runs in the foreground, to all in its process group. A program
    /// that has ended already is no error.
    ///
    /// # Errors
    /// The system refuses.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        if self.status.is_some() && signal != Signal::SIGKILL {
            return Ok(());
        }
        match kill(self.target, signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno)
                .with_context(|| format!("cannot send {signal} to process {}", self.pid())),
        }
    }

    /// SIGSTOP, and returns when it holds: the system stops a program thread by thread, and a broker with some hundred of
    /// them answers for a moment longer.
    ///
    /// # Errors
    /// The system refuses, or a thread still runs after a minute.
    pub(crate) fn pause(&self) -> Result<()> {
        // A thread that waits inside the kernel (D) stops before it runs any code of its own again. It may stay there: a
        // shell that has just forked waits for its child, which is stopped before it could begin.
        self.signal_all(Signal::SIGSTOP, |state| matches!(state, 'T' | 't' | 'D'))
    }

    /// Sends the signal until every thread is in a state that `holds`, or has ended.
    fn signal_all(&self, signal: Signal, holds: impl Fn(char) -> bool) -> Result<()> {
        let deadline = Instant::now() + SIGNAL_LIMIT;
        loop {
            // Again in each round: a process may just have been forked.
            self.signal(signal)?;
            let states = self.thread_states();
            if states
                .iter()
                .all(|state| "ZX".contains(*state) || holds(*state))
            {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "process {} does not obey {signal}: its threads are in the states {states:?}",
                self.pid()
            );
            std::thread::sleep(TICK);
        }
    }

    /// The state of each thread of the program and, unless it runs in the foreground, of all in its process group.
    /// Empty where the system does not tell.
    fn thread_states(&self) -> Vec<char> {
        let group = self.target.as_raw();
        let of_group = |process: &str| {
            // After the name: the state, the parent, the process group.
            let fields = after_name(&format!("/proc/{process}/stat")).unwrap_or_default();
            fields.split_whitespace().nth(2) == Some(&(-group).to_string())
        };
        let processes = if group > 0 {
            vec![group.to_string()]
        } else {
            let all = names("/proc").filter(|name| name.starts_with(|c: char| c.is_ascii_digit()));
            all.filter(|process| of_group(process)).collect()
        };
        let threads = processes.iter().flat_map(|process| {
            names(format!("/proc/{process}/task"))
                .map(move |thread| format!("/proc/{process}/task/{thread}/stat"))
        });
        threads
            .filter_map(|stat| after_name(&stat)?.chars().next())
            .collect()
    }

    /// The exit status, if the program has ended.
    ///
    /// # Errors
    /// The system refuses to say.
    pub(crate) fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Waits until the program has ended.
    ///
    /// # Errors
    /// The system refuses to wait.
    pub(crate) fn wait(&mut self) -> Result<ExitStatus> {
        let status = self.child.wait()?;
        self.status = Some(status);
        Ok(status)
    }

    /// Waits until the program has ended, or the time is up (`None`).
    ///
    /// # Errors
    /// The system refuses to wait.
    pub(crate) fn wait_for(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGKILL, and returns when nothing is left of the program and its process group: no port is open any more, and
    /// no file is written.
    ///
    /// # Errors
    /// The system refuses, or something still runs after a minute.
    pub(crate) fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGKILL)?;
        let status = self.wait()?;
        if self.target.as_raw() < 0 {
            self.signal_all(Signal::SIGKILL, |_| false)?;
        }
        Ok(status)
    }

    /// SIGTERM, and SIGKILL for what is still there after `grace`.
    ///
    /// # Errors
    /// The system refuses.
    pub(crate) fn stop(&mut self, grace: Duration) -> Result<ExitStatus> {
        // A stopped process would not see the SIGTERM.
        self.signal(Signal::SIGCONT)?;
        self.signal(Signal::SIGTERM)?;
        self.wait_for(grace)?;
        // Also when the program itself has gone: it may have left children in its group.
        self.kill()
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        // In a group there may be descendants although the program itself has ended.
        if self.status.is_none() || self.target.as_raw() < 0 {
            let _ = self.kill();
        }
        if let Some(mut lifeline) = self.lifeline.take() {
            let _ = lifeline.write_all(b"done\n");
        }
        let _ = self.watcher.wait();
    }
}

/// The names in a folder; none if it cannot be read.
fn names(folder: impl AsRef<std::path::Path>) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

/// What a `stat` of Linux's `/proc` says after the name of the program, which may contain anything.
fn after_name(stat: &str) -> Option<String> {
    let text = fs::read_to_string(stat).ok()?;
    Some(text.rsplit_once(')')?.1.trim_start().to_owned())
}

fn watch(farewell: Option<&Command>) -> Result<(Child, ChildStdin)> {
    let mut command = match farewell {
        Some(farewell) => behind("/bin/sh", &["-c", WATCHER, "watcher"], farewell),
        None => {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", WATCHER, "watcher"]);
            command
        }
    };
    let mut watcher = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Out of reach of a Ctrl-C and of a kill of the owner's whole group.
        .process_group(0)
        .spawn()
        .context("cannot start /bin/sh, which watches over the brokers")?;
    let lifeline = watcher
        .stdin
        .take()
        .context("the watcher has no standard input")?;
    Ok((watcher, lifeline))
}

/// `front…` followed by the words, the environment and the folder of `command`.
fn behind(program: &str, front: &[&str], command: &Command) -> Command {
    let mut whole = Command::new(program);
    whole
        .args(front)
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => whole.env(name, value),
            None => whole.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        whole.current_dir(folder);
    }
    whole
}
