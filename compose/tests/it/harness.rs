//! The harness itself, on shell scripts: what it must notice, and that it leaves nothing running.

// Clippy's leave for tests does not reach the functions that tests call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::cell::RefCell;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Result;
use compose::harness::Example;
use compose::harness::transcript::{Fault, Stage, Transcript};
use nix::sys::signal::kill;
use nix::unistd::Pid;
use tempfile::TempDir;

/// Long enough on a busy machine; no test waits this long unless it fails.
const LIMIT: Duration = Duration::from_secs(20);
/// For what must run into a limit.
const SHORT: Duration = Duration::from_millis(700);

/// Runs until Ctrl-C, and says when that can be sent. A loop of short sleeps, because a shell heeds a trap only between
/// commands: a Ctrl-C just before a long sleep would have to wait for its end.
const CONSUMER: &str = "trap 'echo bye; exit 0' INT; echo ready; while :; do sleep 0.05; done";

/// Scripts in a folder of their own, in which they also run.
struct Scripts {
    folder: TempDir,
    names: Vec<String>,
}

impl Scripts {
    fn new(scripts: &[(&str, &str)]) -> Scripts {
        let folder = tempfile::tempdir().unwrap();
        for (name, script) in scripts {
            // Written by another process: a file that this one has open for writing may be inherited by a program that
            // another test is just starting, and could then not be executed.
            let mut writer = Command::new("/bin/sh")
                .args(["-c", r#"cat >"$0" && chmod +x "$0""#])
                .arg(folder.path().join(name))
                .stdin(Stdio::piped())
                .spawn()
                .unwrap();
            writer
                .stdin
                .take()
                .unwrap()
                .write_all(format!("#!/bin/sh\n{script}\n").as_bytes())
                .unwrap();
            assert!(writer.wait().unwrap().success());
        }
        Scripts {
            folder,
            names: scripts.iter().map(|(name, _)| (*name).to_owned()).collect(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn example(&self, name: &str) -> Example {
        Example::new(self.path(name)).current_dir(self.folder.path())
    }

    fn transcript(&self, block: &str, limit: Duration) -> Result<(), String> {
        self.transcript_with(block, limit, &|_, _, _| panic!("no fault was asked for"))
    }

    fn transcript_with(
        &self,
        block: &str,
        limit: Duration,
        fault: &dyn Fn(Fault, &str, u16) -> Result<()>,
    ) -> Result<(), String> {
        let header = format!("Title.\n```console\n{block}```\n");
        let stage = Stage {
            programs: self.folder.path(),
            allowed: &self.names,
            folder: self.folder.path(),
            env: &[("BROKER".to_owned(), "here:1".to_owned())],
            fault,
            limit,
        };
        let transcripts = Transcript::parse(&header, 1).map_err(|failure| failure.to_string())?;
        transcripts
            .iter()
            .try_for_each(|transcript| transcript.run(&stage))
            .map_err(|failure| failure.to_string())
    }
}

/// Runs one script with a transcript that is not true of it, and returns the failure.
#[track_caller]
fn failure(script: &str, block: &str, limit: Duration) -> String {
    Scripts::new(&[("a", script)])
        .transcript(block, limit)
        .expect_err("the transcript was taken for true")
}

#[track_caller]
fn assert_has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in:\n{text}");
    }
}

fn is_alive(pid: u32) -> bool {
    kill(Pid::from_raw(pid.try_into().unwrap()), None).is_ok()
}

/// Waits until the file is there and has a line: what the script wrote into it.
fn written(path: &Path) -> String {
    let deadline = Instant::now() + LIMIT;
    loop {
        match fs::read_to_string(path) {
            Ok(text) if text.ends_with('\n') => return text.trim().to_owned(),
            _ => assert!(
                Instant::now() < deadline,
                "{} was not written",
                path.display()
            ),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_true_transcript() {
    let scripts = Scripts::new(&[
        (
            "producer",
            "echo \"to $BROKER as $NAME\"; for word in \"$@\"; do echo \"sent $word\"; done; echo warning >&2; echo",
        ),
        ("consumer", CONSUMER),
    ]);
    let block = "\
        1$ cargo lab up kafka\n\
        2$ cargo lab run consumer\n\
        ready\n\
        \n\
        3$ NAME=me cargo lab run producer 'a  b' c\n\
        to [..]:1 as me\n\
        sent a  b\n\
        ...\n\
        2^C\n\
        bye\n\
        1^C\n";
    scripts.transcript(block, LIMIT).unwrap();
}

#[test]
fn a_missing_line() {
    let text = failure(
        "echo a; echo c; echo oops >&2",
        "$ cargo lab run a\na\nb\nc\n",
        LIMIT,
    );
    assert_has(
        &text,
        &["3: a printed something else: \"c\" does not fit", "- b"],
    );
    let text = failure("echo a; echo oops >&2", "$ cargo lab run a\na\nb\n", LIMIT);
    assert_has(
        &text,
        &[
            "3: a ended (exit status: 0) before it printed all of this",
            "- b",
            "standard error:\n  oops",
        ],
    );
}

#[test]
fn an_extra_line() {
    let text = failure("echo a; echo x; echo b", "$ cargo lab run a\na\nb\n", LIMIT);
    assert_has(
        &text,
        &["3: a printed something else: \"x\" does not fit", "+ x"],
    );
    let text = failure("echo a; echo b; echo x", "$ cargo lab run a\na\nb\n", LIMIT);
    assert_has(&text, &["\"x\" does not fit", "+ x"]);
    let text = failure(CONSUMER, "$ cargo lab run a\nready\n^C\n", LIMIT);
    assert_has(
        &text,
        &["5: a printed something else: \"bye\" does not fit"],
    );
}

#[test]
fn a_wrong_order_is_noticed_at_once() {
    let started = Instant::now();
    let text = failure(
        "echo b; echo a; sleep 100",
        "$ cargo lab run a\na\nb\n",
        LIMIT,
    );
    assert_has(&text, &["3: a printed something else: \"b\" does not fit"]);
    assert!(
        started.elapsed() < LIMIT,
        "it waited for the end of the time limit"
    );
}

#[test]
fn any_lines() {
    let scripts = Scripts::new(&[("a", "for i in 1 2 3 4 5; do echo \"line $i\"; done")]);
    let run = |lines: &str| scripts.transcript(&format!("$ cargo lab run a\n{lines}"), LIMIT);
    run("...\n").unwrap();
    run("...\nline 3\n...\n").unwrap();
    run("line 1\n...\nline 5\n").unwrap();
    run("...\nline 1\nline 2\nline 3\nline 4\nline 5\n...\n").unwrap();
    // The first line that fits the end of the gap need not be the one.
    run("line 1\n...\nline [..]\nline 5\n").unwrap();
    run("line 1\n...\nline 4\n").unwrap_err();
    run("...\nline 3\n...\nline 2\n...\n").unwrap_err();
}

#[test]
fn the_exit_status() {
    let text = failure(
        "echo a; echo why >&2; exit 3",
        "$ cargo lab run a\na\n",
        LIMIT,
    );
    assert_has(
        &text,
        &[
            "3: a ended with exit status 3 instead of 0",
            "standard error:\n  why",
        ],
    );
    let text = failure("echo a", "$ cargo lab run a\na\n[exit 3]\n", LIMIT);
    assert_has(&text, &["3: a ended with exit status 0 instead of 3"]);
    let text = failure("kill -TERM $$", "$ cargo lab run a\n", LIMIT);
    assert_has(&text, &["3: a ended with exit status 143 instead of 0"]);
    Scripts::new(&[("a", "echo a; exit 3")])
        .transcript("$ cargo lab run a\na\n[exit 3]\n", LIMIT)
        .unwrap();
}

#[test]
fn a_program_that_hangs() {
    let text = failure("echo a; exec sleep 100", "$ cargo lab run a\na\nb\n", SHORT);
    assert_has(
        &text,
        &["3: a has not printed all of this after 700ms", "- b"],
    );
    let text = failure("echo a; exec sleep 100", "$ cargo lab run a\na\n", SHORT);
    assert_has(&text, &["3: a is still running after 700ms", "needs a ^C"]);
    let text = failure(
        "trap '' INT; echo a; exec sleep 100",
        "$ cargo lab run a\na\n^C\n",
        SHORT,
    );
    assert_has(&text, &["5: a is still running after 700ms"]);
}

#[test]
fn a_program_that_goes_on_printing_has_no_more_time() {
    let started = Instant::now();
    let text = failure(
        "while :; do echo a; done",
        "$ cargo lab run a\n...\nb\n",
        SHORT,
    );
    assert_has(&text, &["3: a has not printed all of this after 700ms"]);
    assert!(started.elapsed() < LIMIT);
}

#[test]
#[cfg(target_os = "linux")]
fn ctrl_c_needs_something_to_interrupt() {
    let scripts = Scripts::new(&[("a", "echo $$ >pid; echo a")]);
    let await_end = |_: Fault, _: &str, _: u16| {
        let pid = written(&scripts.path("pid")).parse()?;
        let deadline = Instant::now() + LIMIT;
        while is_alive(pid) && !is_zombie(pid) {
            anyhow::ensure!(Instant::now() < deadline, "a does not end");
            std::thread::yield_now();
        }
        Ok(())
    };
    let block = "1$ cargo lab run a\na\n2$ cargo lab kill kafka\n1^C\n";
    let text = scripts
        .transcript_with(block, LIMIT, &await_end)
        .unwrap_err();
    assert_has(
        &text,
        &["6: a has ended (exit status: 0) before it got SIGINT"],
    );
}

#[test]
fn a_part_is_awaited_before_the_next() {
    let scripts = Scripts::new(&[
        (
            "slow",
            "trap 'echo got $(cat sent); exit 0' INT; sleep 0.3; echo >flag; echo ready; while :; do sleep 0.05; done",
        ),
        (
            "fast",
            "[ -e flag ] || echo too early; echo it >sent; echo sent",
        ),
    ]);
    let block = "1$ cargo lab run slow\nready\n2$ cargo lab run fast\nsent\n1^C\ngot it\n";
    scripts.transcript(block, LIMIT).unwrap();
    // Without a line to wait for, the second command does not wait.
    let scripts = Scripts::new(&[
        (
            "slow",
            "while [ ! -e flag ]; do sleep 0.05; done; echo ready",
        ),
        ("fast", "echo >flag"),
    ]);
    scripts
        .transcript(
            "1$ cargo lab run slow\n2$ cargo lab run fast\n1:\nready\n",
            LIMIT,
        )
        .unwrap();
}

#[test]
fn lines_may_come_before_their_marker() {
    let scripts = Scripts::new(&[("a", "echo a; echo b"), ("b", "echo c")]);
    scripts
        .transcript(
            "1$ cargo lab run a\na\n2$ cargo lab run b\nc\n1:\nb\n",
            LIMIT,
        )
        .unwrap();
}

#[test]
fn a_terminal_runs_one_program_at_a_time() {
    let scripts = Scripts::new(&[
        ("a", "echo a; sleep 0.3; echo >flag; echo b"),
        ("b", "[ -e flag ] && echo c"),
    ]);
    scripts
        .transcript("$ cargo lab run a\n...\n$ cargo lab run b\nc\n", LIMIT)
        .unwrap();
    let text = scripts
        .transcript("$ cargo lab run a\na\n$ cargo lab run b\nc\n", LIMIT)
        .unwrap_err();
    assert_has(&text, &["3: a printed something else: \"b\" does not fit"]);
}

#[test]
fn faults_come_in_their_place() {
    let scripts = Scripts::new(&[(
        "a",
        "trap 'cat log; exit 0' INT; echo ready; while :; do sleep 0.05; done",
    )]);
    let log = scripts.path("log");
    let seen = RefCell::new(Vec::new());
    let fault = |fault: Fault, service: &str, node: u16| {
        seen.borrow_mut().push((fault, service.to_owned(), node));
        Ok(fs::write(
            &log,
            format!("{} faults\n", seen.borrow().len()),
        )?)
    };
    let block = "1$ cargo lab run a\nready\n2$ cargo lab kill kafka.2\n...\n2$ cargo lab restart kafka\n1^C\n2 faults\n";
    scripts.transcript_with(block, LIMIT, &fault).unwrap();
    assert_eq!(
        seen.into_inner(),
        [
            (Fault::Kill, "kafka".to_owned(), 2),
            (Fault::Restart, "kafka".to_owned(), 1)
        ]
    );

    let broken = |_: Fault, _: &str, _: u16| anyhow::bail!("no such service");
    let text = scripts.transcript_with(block, LIMIT, &broken).unwrap_err();
    assert_has(&text, &["5: no such service"]);
}

#[test]
fn only_programs_of_the_package() {
    let text = failure("echo a", "$ cargo lab run other\n", LIMIT);
    assert_has(&text, &["3: other is no binary of this package"]);
}

#[test]
fn a_failed_transcript_leaves_nothing_running() {
    let scripts = Scripts::new(&[
        (
            "a",
            "echo $$ >pid; sleep 100 & echo $! >child; echo a; wait",
        ),
        ("b", "exit 1"),
    ]);
    scripts
        .transcript("1$ cargo lab run a\na\n2$ cargo lab run b\nb\n", LIMIT)
        .unwrap_err();
    assert!(!is_alive(written(&scripts.path("pid")).parse().unwrap()));
    let child: u32 = written(&scripts.path("child")).parse().unwrap();
    let deadline = Instant::now() + LIMIT;
    // Whoever adopts orphans here may take a moment to reap it.
    while is_alive(child) && !is_zombie(child) {
        assert!(Instant::now() < deadline, "a descendant is left running");
        std::thread::yield_now();
    }
}

fn is_zombie(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

#[test]
fn waits_look_behind_what_was_found() {
    let scripts = Scripts::new(&[(
        "a",
        "echo one; echo two >&2; echo three; echo two; echo four",
    )]);
    let mut running = scripts.example("a").spawn().unwrap();
    assert_eq!(running.wait_for("t", LIMIT).unwrap().as_bytes()[0], b't');
    running.wait_for("four", LIMIT).unwrap();
    let error = running.wait_for("three", LIMIT).unwrap_err().to_string();
    assert_has(
        &error,
        &[
            "a ended without a line with \"three\"",
            "out| one",
            "err| two",
            "out| four",
        ],
    );
    let mut lines = running.lines();
    lines.sort();
    assert_eq!(lines, ["four", "one", "three", "two", "two"]);
    let finished = running.wait(LIMIT).unwrap().ok().unwrap();
    assert_eq!(
        (finished.stdout.as_str(), finished.stderr.as_str()),
        ("one\nthree\ntwo\nfour\n", "two\n")
    );
}

#[test]
fn a_wait_ends_with_its_time() {
    let scripts = Scripts::new(&[("a", "echo one; exec sleep 100")]);
    let mut running = scripts.example("a").spawn().unwrap();
    let error = running
        .wait_for_line(|line| line == "two", "two", SHORT)
        .unwrap_err()
        .to_string();
    assert_has(
        &error,
        &["no two after 700ms; a is still running", "out| one"],
    );
    assert!(running.try_wait().unwrap().is_none());
    let error = running.wait(SHORT).unwrap_err().to_string();
    assert_has(&error, &["a has not ended after 700ms", "out| one"]);
}

#[test]
fn signals_reach_the_program() {
    let script = "trap 'echo int' INT; trap 'echo term; exit 4' TERM; echo \"$$ ready\"; while :; do sleep 0.05; done";
    let scripts = Scripts::new(&[("a", script)]);
    let mut running = scripts.example("a").spawn().unwrap();
    let line = running.wait_for("ready", LIMIT).unwrap();
    assert_eq!(line, format!("{} ready", running.id()));
    running.pause().unwrap();
    running.interrupt().unwrap();
    running
        .wait_for("int", SHORT)
        .expect_err("a frozen program answered");
    running.resume().unwrap();
    running.wait_for("int", LIMIT).unwrap();
    running.terminate().unwrap();
    let finished = running.wait(LIMIT).unwrap();
    assert_eq!(finished.code(), 4);
    assert_has(
        &finished.ok().unwrap_err().to_string(),
        &["a failed: exit status: 4", "term"],
    );

    let mut running = scripts.example("a").spawn().unwrap();
    running.wait_for("ready", LIMIT).unwrap();
    running.pause().unwrap();
    running.kill().unwrap();
    assert!(!is_alive(running.id()));
    assert_eq!(running.wait(LIMIT).unwrap().code(), 137);
    assert_has(
        &running.interrupt().unwrap_err().to_string(),
        &["a has ended", "before it got SIGINT"],
    );
}

/// A shell that has just forked cannot stop before its child runs, and the child is stopped as well.
#[test]
fn a_program_that_is_just_starting_another_can_be_paused() {
    let script = "trap 'exit 0' TERM; echo ready; while :; do /bin/true; done";
    let scripts = Scripts::new(&[("a", script)]);
    let mut running = scripts.example("a").spawn().unwrap();
    running.wait_for("ready", LIMIT).unwrap();
    // At ever other moments of its life: a child takes about a millisecond.
    for moment in 0..300 {
        std::thread::sleep(Duration::from_micros(moment * 37 % 2000));
        running.pause().unwrap();
        running.resume().unwrap();
    }
    running.terminate().unwrap();
    running.wait(LIMIT).unwrap().ok().unwrap();
}

#[test]
fn a_request_to_end_waits_until_the_program_listens() {
    // Not SIGINT, for which the shell itself has a handler.
    let script =
        "echo ready; sleep 0.3; trap 'echo bye; exit 0' TERM; while :; do sleep 0.05; done";
    let scripts = Scripts::new(&[("a", script)]);
    let mut running = scripts.example("a").spawn().unwrap();
    running.wait_for("ready", LIMIT).unwrap();
    running.terminate().unwrap();
    running.wait_for("bye", LIMIT).unwrap();
    running.wait(LIMIT).unwrap().ok().unwrap();
}

#[test]
fn dropping_kills() {
    let scripts = Scripts::new(&[("a", CONSUMER)]);
    let mut running = scripts.example("a").spawn().unwrap();
    running.wait_for("ready", LIMIT).unwrap();
    let pid = running.id();
    assert!(is_alive(pid));
    drop(running);
    assert!(!is_alive(pid));
}

#[test]
fn standard_input() {
    let scripts = Scripts::new(&[(
        "echo",
        "while read -r line; do echo \"got $line\"; done; echo end",
    )]);
    let text = |example: Example| {
        example
            .spawn()
            .unwrap()
            .wait(LIMIT)
            .unwrap()
            .ok()
            .unwrap()
            .stdout
    };
    assert_eq!(text(scripts.example("echo")), "end\n");
    assert_eq!(
        text(scripts.example("echo").stdin("a\nb\n")),
        "got a\ngot b\nend\n"
    );
    let mut running = scripts.example("echo").open_stdin().spawn().unwrap();
    running.write_stdin("a\n").unwrap();
    running.wait_for("got a", LIMIT).unwrap();
    running.write_stdin("b\n").unwrap();
    running.wait_for("got b", LIMIT).unwrap();
    running.close_stdin();
    running.wait(LIMIT).unwrap().ok().unwrap();
    assert_has(
        &running.write_stdin("c").unwrap_err().to_string(),
        &["Example::open_stdin"],
    );
}

#[test]
fn long_output_of_a_failed_program_is_cut_at_its_beginning() {
    let script = "seq 1000; read -r _; echo reason >&2; read -r _; exit 3";
    let scripts = Scripts::new(&[("chatty", script)]);
    let mut running = scripts.example("chatty").open_stdin().spawn().unwrap();
    running.wait_for("1000", LIMIT).unwrap();
    running.write_stdin("go on\n").unwrap();
    running.wait_for("reason", LIMIT).unwrap();
    let waited = running.wait_for("never", SHORT).unwrap_err().to_string();
    let shown = [
        "(901 lines before)\n  out| 902\n",
        "  out| 1000\n  err| reason",
    ];
    assert_has(&waited, &shown);
    running.write_stdin("end\n").unwrap();
    let failed = running.wait(LIMIT).unwrap().ok().unwrap_err().to_string();
    let shown = [
        "standard error:\nreason\nstandard output:\n",
        "(900 lines before)\n901\n",
        "\n1000",
    ];
    assert_has(&failed, &shown);
}

#[test]
fn a_descendant_that_keeps_the_pipes_does_not_delay_the_end() {
    let scripts = Scripts::new(&[("a", "sleep 100 & echo done")]);
    let started = Instant::now();
    let finished = scripts
        .example("a")
        .spawn()
        .unwrap()
        .wait(LIMIT)
        .unwrap()
        .ok()
        .unwrap();
    assert_eq!(finished.stdout, "done\n");
    assert!(started.elapsed() < LIMIT);
}

#[test]
fn a_missing_program_is_named() {
    let error = Example::new("/no/such/program")
        .spawn()
        .unwrap_err()
        .to_string();
    assert_eq!(error, "there is no program /no/such/program");
}

/// The one that is killed in the next test.
#[test]
#[ignore = "run by a_killed_owner_takes_its_programs_along"]
fn owner() {
    let scripts = Scripts::new(&[("a", "echo $$; sleep 100")]);
    let mut running = scripts.example("a").spawn().unwrap();
    // The end of the spawning thread must not be the end of the program, so look at it from another one.
    let line = std::thread::spawn(move || running.wait_for("", LIMIT).map(|line| (line, running)))
        .join()
        .unwrap();
    let (line, running) = line.unwrap();
    fs::write(std::env::var("HARNESS_OWNER").unwrap(), format!("{line}\n")).unwrap();
    // Until it is killed.
    drop((std::io::stdin().read_line(&mut String::new()), running));
}

#[test]
fn a_killed_owner_takes_its_programs_along() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pid");
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "harness::owner", "--ignored"])
        .env("HARNESS_OWNER", &file)
        // Where the scripts of the killed owner are: nobody else removes them.
        .env("TMPDIR", folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid: u32 = written(&file).parse().unwrap();
    assert!(is_alive(pid));
    owner.kill().unwrap();
    owner.wait().unwrap();
    let deadline = Instant::now() + LIMIT;
    while is_alive(pid) && !is_zombie(pid) {
        assert!(
            Instant::now() < deadline,
            "the program has outlived its owner"
        );
        std::thread::yield_now();
    }
}
