//! `lab` as its user meets it: the good cases, the bad ones, and what is left behind. Never on the default ports.

// Clippy's leave for tests does not reach the functions that tests call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use compose::harness::{Workspace, handles, http_get};
use compose::{Broker, Service};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// A `LAB_HOME` of its own, with the programs of the machine's, so that nothing is fetched again.
pub struct Lab {
    home: TempDir,
}

/// Where the machine's programs are, from what `lab doctor` says.
static PROGRAMS: LazyLock<PathBuf> = LazyLock::new(|| {
    let output = Command::new(env!("CARGO_BIN_EXE_lab"))
        .arg("doctor")
        .output();
    let said = String::from_utf8(output.unwrap().stdout).unwrap();
    let home = said
        .lines()
        .find_map(|line| line.strip_prefix("brokers are kept in "));
    let programs = Path::new(home.unwrap()).join("programs");
    fs::canonicalize(programs).unwrap()
});

impl Lab {
    pub fn new() -> Lab {
        let home = tempfile::tempdir().unwrap();
        symlink(&*PROGRAMS, home.path().join("programs")).unwrap();
        Lab { home }
    }

    pub fn path(&self) -> &Path {
        self.home.path()
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
        command
            .args(arguments)
            .env("LAB_HOME", self.path())
            .env("LAB_PORTS", "free")
            .stdin(Stdio::null());
        command.env_remove("LAB_BACKEND");
        for service in Service::ALL {
            command.env_remove(service.variable());
        }
        command
    }

    /// `lab run`, without a build.
    pub fn example(&self, name: &str) -> Command {
        self.with_cargo(&BUILT, &["run", name])
    }

    fn with_cargo(&self, cargo: &Stub, arguments: &[&str]) -> Command {
        let mut command = self.command(arguments);
        command.env("CARGO", cargo.program());
        // No other cargo builds into this folder, so nothing is waited for.
        command.env("CARGO_TARGET_DIR", self.path().join("target"));
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn fails(&self, arguments: &[&str]) -> String {
        failure(self.command(arguments))
    }

    fn entry(&self, service: &str) -> Option<Value> {
        let text = fs::read(self.path().join("run").join(format!("{service}.json"))).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Waits until the service is published, which is when it serves.
    fn await_entry(&self, service: &str) -> Value {
        let mut found = None;
        eventually(&format!("{service} is published"), || {
            found = self.entry(service);
            found.is_some()
        });
        found.unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.run(&["down"]);
    }
}

/// A `lab` that runs beside the test, out of reach of a terminal's Ctrl-C. What it says on standard error is collected.
struct Running {
    child: Child,
    said: Arc<Mutex<String>>,
    reader: JoinHandle<()>,
}

impl Running {
    fn start(command: &mut Command) -> Running {
        let mut child = command
            .process_group(0)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let (lines, collected) = (child.stderr.take().unwrap(), Arc::clone(&said));
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(lines).lines().map_while(Result::ok) {
                let mut collected = collected.lock().unwrap();
                collected.push_str(&line);
                collected.push('\n');
            }
        });
        Running {
            child,
            said,
            reader,
        }
    }

    fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    fn await_line(&mut self, line: &str) {
        eventually(&format!("lab says '{line}'"), || {
            let said = self.said();
            let ended = self.child.try_wait().unwrap();
            assert!(said.contains(line) || ended.is_none(), "{ended:?}\n{said}");
            said.contains(line)
        });
    }

    fn interrupt(&self) {
        let lab = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(lab, Signal::SIGINT).unwrap();
    }

    #[track_caller]
    fn ends_with(mut self, code: i32) -> String {
        let mut status = None;
        eventually("lab ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        // Also what it has started must have let go of its standard error.
        eventually("all that lab said is read", || self.reader.is_finished());
        let said = self.said();
        assert_eq!(status.unwrap().code(), Some(code), "{said}");
        assert!(!said.contains("panicked"), "{said}");
        said
    }
}

impl Drop for Running {
    /// A test that fails leaves nothing behind.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder with a program of the test's own, which writes its process id beside itself.
struct Stub {
    folder: TempDir,
    name: String,
}

impl Stub {
    fn new(name: &str, script: &str) -> Stub {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        let pid = folder.path().join("pid");
        let new = folder.path().join("pid.new");
        // Renamed, so that it is never seen half written.
        let note = format!(
            "echo $$ >'{0}' && mv '{0}' '{1}'",
            new.display(),
            pid.display()
        );
        fs::write(&path, format!("#!/bin/sh\n{note}\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Stub {
            folder,
            name: name.to_owned(),
        }
    }

    fn program(&self) -> PathBuf {
        self.folder.path().join(&self.name)
    }

    /// In front of all others.
    fn path(&self) -> std::ffi::OsString {
        let mut folders = vec![self.folder.path().to_owned()];
        folders.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap()));
        std::env::join_paths(folders).unwrap()
    }

    fn await_pid(&self) -> i32 {
        let mut pid = None;
        eventually("the stub runs", || {
            let text = fs::read_to_string(self.folder.path().join("pid"));
            pid = text.ok().and_then(|text| text.trim().parse().ok());
            pid.is_some()
        });
        pid.unwrap()
    }
}

fn failure(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("error: "), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

fn text(output: &Output) -> String {
    format!(
        "{}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Long, as cargo runs one build at a time, and other tests build too.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(400);
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn node_pid(entry: &Value) -> i32 {
    i32::try_from(entry["nodes"][0]["pid"].as_i64().unwrap()).unwrap()
}

/// Whether a process is there; one that has ended and only waits to be reaped is not.
fn lives(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    match stat {
        Ok(stat) => !stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .trim_start()
            .starts_with('Z'),
        // Elsewhere than on Linux.
        Err(_) => kill(Pid::from_raw(pid), None).is_ok() && !Path::new("/proc/self").exists(),
    }
}

fn wait_for_end(mut child: Child) -> std::process::ExitStatus {
    let mut status = None;
    eventually("the process ends", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

#[test]
fn a_detached_broker_obeys_until_it_is_taken_down() {
    let lab = Lab::new();
    assert!(
        lab.ok(&["up", "nats", "--detach"])
            .contains("nats://127.0.0.1:")
    );
    let entry = lab.await_entry("nats");
    let address = entry["env"][0][1].as_str().unwrap().to_owned();
    assert!(lab.ok(&["status"]).contains(&address));

    let again = lab.ok(&["up", "nats", "--detach"]);
    assert!(
        again.contains(&address) && again.contains("runs already"),
        "{again}"
    );
    assert!(lab.ok(&["up", "nats"]).contains("runs already"));

    assert_eq!(lab.ok(&["kill", "nats"]), "nats: killed\n");
    assert!(!lives(node_pid(&entry)));
    assert!(lab.ok(&["status"]).contains("node 1: ended"));
    assert!(lab.fails(&["pause", "nats"]).contains("not running"));
    lab.ok(&["restart", "nats"]);
    lab.ok(&["pause", "nats"]);
    assert!(lab.ok(&["status"]).contains("node 1: paused"));
    lab.ok(&["resume", "nats"]);
    assert!(lab.ok(&["status"]).contains("node 1: running"));
    assert!(lab.ok(&["logs", "nats"]).contains("Server is ready"));
    assert!(
        lab.fails(&["kill", "nats.2"])
            .contains("nats has no node 2")
    );

    let entry = lab.await_entry("nats");
    assert_eq!(lab.ok(&["down"]), "nats: stopped\n");
    assert!(!lives(node_pid(&entry)));
    let owner = i32::try_from(entry["owner"].as_i64().unwrap()).unwrap();
    eventually("the background process ends", || !lives(owner));
    assert_eq!(lab.ok(&["down"]), "nothing to stop\n");
    assert!(lab.fails(&["down", "nats"]).contains("no nats runs here"));
}

/// A cargo that answers the builds of these examples with these programs, and asks the real one for everything else.
fn cargo_that_builds(programs: &[(&str, &Path)]) -> Stub {
    let mut answers = String::new();
    for (name, program) in programs {
        let artifact = serde_json::json!({
            "reason": "compiler-artifact",
            "package_id": "path+file:///stub#0.1.0",
            "target": {
                "name": name, "kind": ["bin"], "crate_types": ["bin"], "src_path": "/stub.rs", "edition": "2024",
            },
            "profile": {
                "opt_level": "0", "debug_assertions": true, "overflow_checks": true, "test": false,
            },
            "features": [],
            "filenames": [],
            "executable": program,
            "fresh": true,
        });
        answers += &format!("*' --bin {name} '*) echo '{artifact}';;\n");
    }
    let real = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let script = format!("case \"$* \" in\n{answers}*) exec '{real}' \"$@\";;\nesac");
    Stub::new("cargo", &script)
}

/// Real examples, built once: cargo runs one build at a time, and tests of `lab` have nothing to learn from waiting.
static BUILT: LazyLock<Stub> = LazyLock::new(|| {
    let workspace = Workspace::load().unwrap();
    let names = [
        "nats_publish",
        "nats_subscribe",
        "kafka_async_producer",
        "kafka_mock_cluster",
    ];
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        // With the features of the README's test command: others would build all again.
        .args([
            "build",
            "--workspace",
            "--features",
            "kafka-examples/secure",
        ])
        .args(names.iter().flat_map(|name| ["--bin", name]))
        .current_dir(workspace.root());
    // What cargo has told this test about its own package would have build scripts run again.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PKG_")
            || name.to_string_lossy().starts_with("CARGO_MANIFEST_")
        {
            cargo.env_remove(name);
        }
    }
    assert!(cargo.status().unwrap().success());
    let folder = workspace.target_directory().join("debug");
    let programs = names.map(|name| folder.join(name));
    let pairs: Vec<_> = names
        .iter()
        .copied()
        .zip(programs.iter().map(PathBuf::as_path))
        .collect();
    cargo_that_builds(&pairs)
});

/// Long, so that a test fails and does not pass when nothing ends it.
const FOREVER: &str = "exec sleep 1000";

#[test]
fn ctrl_c_ends_the_wait_for_another_cargo_and_the_build() {
    let lab = Lab::new();
    let target = tempfile::tempdir().unwrap();
    fs::create_dir(target.path().join("debug")).unwrap();
    let other_cargo = File::create(target.path().join("debug/.cargo-lock")).unwrap();
    other_cargo.lock().unwrap();
    let start = || {
        let mut command = lab.command(&["run", "nats_publish"]);
        let mut lab = Running::start(command.env("CARGO_TARGET_DIR", target.path()));
        lab.await_line("waiting for another cargo to finish…");
        lab
    };
    let first = start();
    first.interrupt();
    first.ends_with(130);

    let mut second = start();
    other_cargo.unlock().unwrap();
    second.await_line("building nats_publish…");
    second.await_line("Compiling");
    let children = children_of(second.child.id());
    assert!(!children.is_empty());
    second.interrupt();
    second.ends_with(130);
    let target = target.path().display().to_string();
    eventually("neither cargo nor a compiler goes on", || {
        !children.iter().any(|pid| lives(*pid))
            && !process_list()
                .iter()
                .any(|(.., args)| args.contains(&target))
    });
}

#[test]
fn ctrl_c_ends_a_fetch() {
    let lab = Lab::new();
    fs::remove_file(lab.path().join("programs")).unwrap();
    // No nats-server is found, and its builder never comes to an end.
    let go = Stub::new("go", FOREVER);
    for tool in ["sleep", "mv"] {
        let folders = std::env::var_os("PATH").unwrap();
        let mut places = std::env::split_paths(&folders).map(|folder| folder.join(tool));
        let place = places.find(|place| place.is_file()).unwrap();
        symlink(place, go.folder.path().join(tool)).unwrap();
    }
    let mut command = lab.command(&["up", "nats"]);
    let mut lab = Running::start(command.env("PATH", go.folder.path()));
    lab.await_line("fetching nats-server");
    let pid = go.await_pid();
    lab.interrupt();
    lab.ends_with(130);
    eventually("go is gone", || !lives(pid));
}

#[test]
fn ctrl_c_ends_the_start_of_a_broker_also_of_a_detached_one() {
    let lab = Lab::new();
    for arguments in [&["up", "nats"][..], &["up", "nats", "--detach"]] {
        let silent = Stub::new("nats-server", FOREVER);
        let mut command = lab.command(arguments);
        let mut running = Running::start(command.env("PATH", silent.path()));
        running.await_line("starting nats…");
        let pid = silent.await_pid();
        assert!(lab.ok(&["status"]).contains("nats        starting"));
        running.interrupt();
        running.ends_with(130);
        eventually("the broker is gone", || !lives(pid));
    }
    let left = fs::read_dir(lab.path().join("run")).unwrap().flatten();
    let left: Vec<_> = left
        .map(|file| file.file_name())
        .filter(|name| !name.to_string_lossy().ends_with(".lock"))
        .collect();
    // The background process was killed, and could not remove its socket; the next owner does.
    assert!(left.len() <= 1, "{left:?}");
}

#[test]
fn a_second_ctrl_c_ends_a_slow_stop() {
    let lab = Lab::new();
    // What a real one runs from.
    let broker = Broker::private(Service::Nats).unwrap();
    let pid = broker.pid(1).unwrap().unwrap();
    let real = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    // It takes no order to end, so that an orderly stop takes 20 seconds.
    let stubborn = Stub::new(
        "nats-server",
        &format!(
            "trap '' TERM\n'{}' \"$@\" &\nwhile :; do wait; sleep 1; done",
            real.display()
        ),
    );
    let (output, writer) = std::io::pipe().unwrap();
    let mut command = lab.command(&["up", "nats"]);
    command.env("PATH", stubborn.path()).stdout(writer);
    let mut running = Running::start(&mut command);
    // From that line on it is a stop, and before it the end of a start.
    let mut lines = BufReader::new(output).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.starts_with("Ctrl-C stops")));
    let pid = stubborn.await_pid();
    running.interrupt();
    running.await_line("stopping nats…");
    running.interrupt();
    running.ends_with(130);
    eventually("the broker is gone", || !lives(pid));
}

#[test]
fn a_third_ctrl_c_kills_an_example_that_does_not_end() {
    let lab = Lab::new();
    let deaf = Stub::new("nats_publish", &format!("trap '' INT\n{FOREVER}"));
    let cargo = cargo_that_builds(&[("nats_publish", &deaf.program())]);
    let mut command = lab.with_cargo(&cargo, &["run", "nats_publish"]);
    command.env("NATS_URL", "nats://127.0.0.1:1");
    let mut running = Running::start(&mut command);
    let pid = deaf.await_pid();
    let has_state = |state: &str| {
        let line = format!("nats_publish.1: {state}, process {pid}\n");
        eventually(&line, || lab.ok(&["status"]).contains(&line));
    };
    has_state("running");
    assert_eq!(lab.ok(&["pause", "nats_publish"]), "nats_publish: paused\n");
    has_state("paused");
    // A frozen example could not hear it, and is woken up.
    running.interrupt();
    has_state("running");
    running.interrupt();
    running.await_line("one more Ctrl-C kills it");
    assert!(lives(pid));
    running.interrupt();
    running.ends_with(1);
    assert!(!lives(pid));
}

#[test]
fn help_takes_no_broker() {
    let lab = Lab::new();
    let header = lab.ok(&["show", "nats_publish"]);
    assert!(header.starts_with("Publish on NATS"), "{header}");
    assert!(header.contains("$ cargo lab run nats_publish"), "{header}");
    assert!(
        header.ends_with("\nnats-examples/src/bin/nats_publish.rs\n"),
        "{header}"
    );
    for help in ["--help", "-h"] {
        let output = lab.run(&["run", "nats_publish", help]);
        assert_eq!(String::from_utf8_lossy(&output.stdout), header);
        assert!(output.stderr.is_empty(), "{}", text(&output));
    }

    let program = Stub::new("order_pipeline", "echo usage: $*");
    let cargo = cargo_that_builds(&[("order_pipeline", &program.program())]);
    let mut command = lab.with_cargo(&cargo, &["run", "order_pipeline", "--help"]);
    let output = command.output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "usage: --help\n",
        "{}",
        text(&output)
    );
    assert!(!text(&output).contains("starting"), "{}", text(&output));
}

#[test]
fn a_list_fits_the_usual_terminal() {
    let lab = Lab::new();
    let all = lab.ok(&["list"]);
    assert!(all.lines().all(|line| line.chars().count() <= 80), "{all}");
    for example in Workspace::load().unwrap().examples() {
        let line = format!("  {} ", example.name);
        assert!(all.contains(&line), "{all}");
    }
    let some = lab.ok(&["list", "dead letters"]);
    assert!(some.contains("  kafka_dlq_replay "), "{some}");
    assert!(!some.contains("nats_publish"), "{some}");
    assert!(lab.fails(&["list", "zebra"]).contains("'zebra'"));
}

#[test]
fn a_copy_says_what_to_change_first() {
    let lab = Lab::new();
    let project = lab.path().join("copy");
    let said = lab.ok(&["new", "kafka_manual_commit", project.to_str().unwrap()]);
    let source = fs::read_to_string(project.join("src/main.rs")).unwrap();
    let named: Vec<_> = said
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("src/main.rs:"))
        .collect();
    assert!(
        named.iter().any(|line| line.contains("const TOPIC: ")),
        "{said}"
    );
    assert!(
        named.iter().any(|line| line.contains("const GROUP: ")),
        "{said}"
    );
    for line in named {
        let (number, text) = line.split_once("  ").unwrap();
        let number: usize = number.parse().unwrap();
        assert_eq!(source.lines().nth(number - 1), Some(text), "{said}");
    }
    assert!(said.contains("KAFKA_BROKERS"), "{said}");
    // The copy brings the sender of its transcript.
    assert!(said.contains("`cargo run --bin kafka_send`"), "{said}");
    assert!(project.join("src/bin/kafka_send.rs").is_file());

    // The workspace and the copy end with the same readable errors.
    let config = fs::read_to_string(project.join(".cargo/config.toml")).unwrap();
    let workspace = Workspace::load().unwrap();
    let own = fs::read_to_string(workspace.root().join(".cargo/config.toml")).unwrap();
    let setting = config.strip_prefix("[env]\n").unwrap();
    assert!(setting.contains("RUST_LIB_BACKTRACE = \"0\""), "{config}");
    assert!(own.contains(setting), "{own}");
}

#[test]
fn running_examples_are_listed_killed_and_frozen() {
    let lab = Lab::new();
    lab.ok(&["up", "nats", "--detach"]);
    let start = || {
        let mut command = lab.example("nats_subscribe");
        Running::start(command.arg("events.user.*").stdout(Stdio::null()))
    };
    let pid_of = |name: &str| {
        let (mut pid, line) = (None, format!("  {name}: running, process "));
        eventually(&format!("{name} is listed"), || {
            let status = lab.ok(&["status"]);
            let after = status.lines().find_map(|found| found.strip_prefix(&line));
            let number = after.map(|rest| rest.strip_suffix(", arguments: events.user.*").unwrap());
            pid = number.map(|pid| pid.parse::<i32>().unwrap());
            pid.is_some()
        });
        pid.unwrap()
    };
    let first = start();
    let first_pid = pid_of("nats_subscribe.1");
    let mut second = start();
    let second_pid = pid_of("nats_subscribe.2");
    assert_ne!(first_pid, second_pid);

    let error = lab.fails(&["kill", "nats_subscribe"]);
    assert!(
        error.contains("nats_subscribe.1, nats_subscribe.2"),
        "{error}"
    );
    let error = lab.fails(&["kill", "nats_subscribe.7"]);
    assert!(error.contains("only nats_subscribe.1"), "{error}");
    assert_eq!(
        lab.ok(&["kill", "nats_subscribe.1"]),
        "nats_subscribe.1: killed\n"
    );
    assert!(!lives(first_pid));
    let said = first.ends_with(1);
    assert!(
        said.contains("nats_subscribe was ended by a signal"),
        "{said}"
    );
    let status = lab.ok(&["status"]);
    assert!(!status.contains("nats_subscribe.1"), "{status}");

    // Who started later has the higher number, also when a lower one is free.
    let third = start();
    let third_pid = pid_of("nats_subscribe.3");
    lab.ok(&["kill", "nats_subscribe.3"]);
    assert!(!lives(third_pid));
    third.ends_with(1);

    lab.ok(&["pause", "nats_subscribe"]);
    assert!(lab.ok(&["status"]).contains("nats_subscribe.2: paused"));
    assert!(lives(second_pid));
    lab.ok(&["resume", "nats_subscribe"]);
    assert_eq!(pid_of("nats_subscribe.2"), second_pid);

    // A killed `lab` takes its example along, and its entry is not believed any more.
    second.child.kill().unwrap();
    second.child.wait().unwrap();
    let status = lab.ok(&["status"]);
    assert!(!status.contains("nats_subscribe"), "{status}");
    eventually("the example is gone", || !lives(second_pid));
    let error = lab.fails(&["kill", "nats_subscribe"]);
    assert!(error.contains("is called 'nats_subscribe'"), "{error}");
    assert!(
        lab.fails(&["kill", "nast"])
            .contains("did you mean 'nats'?")
    );
}

#[test]
fn a_reader_that_has_left_is_no_error() {
    let lab = Lab::new();
    // Nobody reads, from the first line on.
    let closed = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Stdio::from(writer)
    };
    let running = Running::start(lab.command(&["up", "nats"]).stdout(closed()));
    let entry = lab.await_entry("nats");
    for arguments in [
        &["list"][..],
        &["show", "nats_publish"],
        &["status"],
        &["logs", "nats"],
        &["run", "nats_publish", "--help"],
        &["pause", "nats"],
        &["resume", "nats"],
        &["up", "nats"],
    ] {
        let mut command = lab.command(arguments);
        let output = command.stdout(closed()).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("panicked"), "{arguments:?}: {said}");
    }
    // With nobody to say it to, either.
    let silent = Stub::new("nats_publish", "exit 0");
    let cargo = cargo_that_builds(&[("nats_publish", &silent.program())]);
    let other = Lab::new();
    let mut command = other.with_cargo(&cargo, &["run", "nats_publish"]);
    let status = command.stdout(closed()).stderr(closed()).status();
    assert!(status.unwrap().success());
    let mut command = lab.command(&["kill", "nats.2"]);
    let status = command.stdout(closed()).stderr(closed()).status().unwrap();
    assert_eq!(status.code(), Some(1));
    // Of this only the loop takes note that also waits for Ctrl-C, and it has something to say then.
    kill(Pid::from_raw(node_pid(&entry)), Signal::SIGKILL).unwrap();
    eventually("the end of the broker is noticed", || {
        lab.ok(&["status"]).contains("node 1: ended")
    });
    running.interrupt();
    let said = running.ends_with(0);
    assert!(said.contains("stopping nats…"), "{said}");
}

#[test]
fn nothing_outlives_an_owner_that_is_killed() {
    let lab = Lab::new();
    let mut owner = lab
        .command(&["up", "kafka", "rabbitmq", "nats"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let pids: Vec<_> = ["kafka", "rabbitmq", "nats"]
        .map(|service| node_pid(&lab.await_entry(service)))
        .into();
    // RabbitMQ's Erlang has its name server beside it, and all of them have children.
    let mut family = pids.clone();
    family.extend(
        process_list()
            .into_iter()
            .filter(|(_, _, group, _)| pids.contains(group))
            .map(|(pid, ..)| pid),
    );
    assert!(family.len() > 4, "{family:?}");
    owner.kill().unwrap();
    owner.wait().unwrap();
    eventually("all of them are gone", || {
        !family.iter().any(|pid| lives(*pid))
    });
    assert!(lab.ok(&["status"]).contains("nats        -"));
}

/// Every process: its id, its parent's, its group's, and its command line.
fn process_list() -> Vec<(i32, i32, i32, String)> {
    let output = Command::new("ps")
        .args(["-A", "-ww", "-o", "pid=,ppid=,pgid=,args="])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        let mut number = || words.next()?.parse().ok();
        let (pid, parent, group) = (number()?, number()?, number()?);
        Some((pid, parent, group, words.collect::<Vec<_>>().join(" ")))
    };
    text.lines().filter_map(parse).collect()
}

fn children_of(parent: u32) -> Vec<i32> {
    let parent = i32::try_from(parent).unwrap();
    let children = process_list()
        .into_iter()
        .filter(|process| process.1 == parent);
    children.map(|process| process.0).collect()
}

#[test]
fn an_example_runs_on_a_broker_that_goes_with_it() {
    let lab = Lab::new();
    let output = lab.run(&["run", "nats_publish"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("events.user.created"),
        "{}",
        text(&output)
    );
    let said = String::from_utf8_lossy(&output.stderr);
    let mut steps = said.lines().filter(|line| line.ends_with('…'));
    let mut step = || steps.next().unwrap_or_default();
    // Another test's cargo may be building.
    let mut first = step();
    if first.contains("another cargo") {
        first = step();
    }
    assert_eq!(
        [first, step(), step()],
        ["building nats_publish…", "starting nats…", "stopping nats…"],
        "{said}"
    );
    assert!(lab.entry("nats").is_none());
    assert!(lab.ok(&["status"]).contains("nats        -"));
}

#[test]
fn an_example_that_needs_tls_runs_on_a_secured_broker() {
    let lab = Lab::new();
    let script =
        "echo $KAFKA_SECURITY_PROTOCOL $KAFKA_SASL_USERNAME ${#KAFKA_SASL_PASSWORD} \"$1\"";
    let program = Stub::new("kafka_secure", script);
    let cargo = cargo_that_builds(&[("kafka_secure", &program.program())]);
    let run = || lab.with_cargo(&cargo, &["run", "kafka_secure", "an argument"]);
    let secret = |output: &Output| {
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        let words: Vec<&str> = printed.split_whitespace().collect();
        let length: usize = words[2].parse().unwrap();
        assert!(length > 10, "{printed}");
        assert_eq!(words[..2], ["SASL_SSL", "application"]);
        assert_eq!(words[3..], ["an", "argument"]);
    };
    // Started for it, or there already.
    let output = run().output().unwrap();
    secret(&output);
    lab.ok(&["up", "kafka", "--secure", "--detach"]);
    secret(&run().output().unwrap());
    lab.ok(&["down"]);
    lab.ok(&["up", "kafka", "--detach"]);
    let said = failure(run());
    assert!(said.contains("kafka_secure needs kafka with TLS"), "{said}");
    assert!(said.contains("cargo lab down kafka"), "{said}");
}

#[test]
fn an_interrupt_reaches_the_example_and_its_exit_code_comes_back() {
    let lab = Lab::new();
    let child = lab
        .example("nats_subscribe")
        // In the terminal's foreground, Ctrl-C would be taken for one that the example has got from there as well.
        .process_group(0)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let entry = lab.await_entry("nats");
    await_subscription(&entry);
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    eventually("the broker is gone", || !lives(node_pid(&entry)));
}

#[test]
fn an_example_dies_with_a_lab_that_is_killed() {
    let lab = Lab::new();
    let mut child = lab
        .example("nats_subscribe")
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let entry = lab.await_entry("nats");
    await_subscription(&entry);
    let example = example_of(&child);
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("broker and example are gone", || {
        !lives(node_pid(&entry)) && !lives(example)
    });
}

/// The process of the example that this `lab` runs.
fn example_of(lab: &Child) -> i32 {
    let lab = i32::try_from(lab.id()).unwrap();
    process_list()
        .into_iter()
        .find(|(_, parent, _, args)| *parent == lab && args.contains("nats_subscribe"))
        .expect("the example is a child of lab")
        .0
}

/// Ctrl-C for `lab`, as soon as its example listens for it, which is a moment after it has subscribed.
fn interrupt(lab: &Child) {
    let example = example_of(lab);
    eventually("the example listens for Ctrl-C", || {
        handles(example, Signal::SIGINT)
    });
    let lab = Pid::from_raw(i32::try_from(lab.id()).unwrap());
    kill(lab, Signal::SIGINT).unwrap();
}

/// Waits until the server has a subscription, other than its own, by its own account.
fn await_subscription(entry: &Value) {
    let web = entry["web"][0].as_str().unwrap();
    let page = format!("{web}/connz?subs=1");
    eventually("the example has subscribed", || {
        http_get(&page, Duration::from_secs(2)).is_some_and(|(_, body)| body.contains("events."))
    });
}

#[test]
fn a_run_on_the_broker_of_another_run_is_told_that_it_goes_with_that() {
    let lab = Lab::new();
    let first = lab
        .example("nats_subscribe")
        .process_group(0)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let entry = lab.await_entry("nats");
    await_subscription(&entry);
    let output = lab.example("nats_publish").output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("the one of `cargo lab run nats_subscribe`"),
        "{said}"
    );
    assert!(!said.contains("stopping"), "{said}");
    assert!(lives(node_pid(&entry)));
    interrupt(&first);
    assert!(wait_for_end(first).success());
    assert!(!lives(node_pid(&entry)));
}

#[test]
fn a_broker_that_has_gone_during_the_build_is_replaced() {
    let lab = Lab::new();
    lab.ok(&["up", "nats", "--detach"]);
    let (flag, built) = (lab.path().join("flag"), BUILT.program());
    let wait = format!("while [ ! -e '{}' ]; do sleep 0.05; done", flag.display());
    let slow = Stub::new(
        "cargo",
        &format!(
            "case \"$* \" in *' --bin '*) {wait};; esac\nexec '{}' \"$@\"",
            built.display()
        ),
    );
    let mut command = lab.with_cargo(&slow, &["run", "nats_publish"]);
    let mut running = Running::start(command.stdout(Stdio::null()));
    running.await_line("building nats_publish…");
    lab.ok(&["down", "nats"]);
    fs::write(flag, "").unwrap();
    let said = running.ends_with(0);
    assert!(said.contains("starting nats…"), "{said}");
}

#[test]
fn a_schema_that_was_registered_is_read_back() {
    let lab = Lab::new();
    let said = lab.ok(&["up", "registry", "--detach"]);
    assert!(said.contains("version 3."), "{said}");
    let entry = lab.await_entry("registry");
    let url = entry["env"][0][1].as_str().unwrap();
    assert_eq!(entry["env"][0][0], "SCHEMA_REGISTRY_URL");
    let schema = r#"{"type":"record","name":"Order","fields":[{"name":"id","type":"string"}]}"#;
    let body = serde_json::json!({ "schema": schema }).to_string();
    let mut answer = ureq::post(format!("{url}/subjects/orders-value/versions"))
        .content_type("application/vnd.schemaregistry.v1+json")
        .send(body)
        .unwrap();
    let answer: Value = serde_json::from_str(&answer.body_mut().read_to_string().unwrap()).unwrap();
    let id = answer["id"].as_i64().unwrap();
    let (status, read) =
        http_get(&format!("{url}/schemas/ids/{id}"), Duration::from_secs(10)).unwrap();
    assert_eq!(status, 200, "{read}");
    let read: Value = serde_json::from_str(&read).unwrap();
    assert_eq!(read["schema"], schema);
}

/// An older RabbitMQ than 4 is out of support, so it is left aside where another can be had, on Debian 12 and older.
#[test]
fn a_rabbitmq_of_the_machine_is_used_if_it_is_supported() {
    let system = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let is_old_debian = ["11", "12"].iter().any(|number| {
        let release = format!("VERSION_ID=\"{number}\"\n");
        system.contains("\nID=debian\n") && system.contains(&release)
    });
    let lab = Lab::new();
    for (version, is_used) in [("4.1.2", true), ("3.13.7", !is_old_debian)] {
        let server = tempfile::tempdir().unwrap();
        let scripts = server.path().join("sbin");
        let plugin = server.path().join(format!("plugins/rabbit-{version}"));
        fs::create_dir_all(plugin).unwrap();
        let own = Stub::new("rabbitmq-server", FOREVER);
        fs::create_dir(&scripts).unwrap();
        fs::copy(own.program(), scripts.join("rabbitmq-server")).unwrap();
        let mut folders = vec![scripts.clone()];
        folders.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap()));
        let mut command = lab.command(&["doctor"]);
        command.env("PATH", std::env::join_paths(folders).unwrap());
        let output = command.output().unwrap();
        let line = format!("rabbitmq-server {}", scripts.display());
        assert_eq!(text(&output).contains(&line), is_used, "{}", text(&output));
    }
}

#[test]
fn a_port_taken_by_something_else_is_named() {
    let lab = Lab::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut command = lab.command(&["up", "nats"]);
    command.env("LAB_PORTS", format!("nats={port}"));
    let message = failure(command);
    assert!(
        message.contains(&format!("port {port} is taken")) && message.contains("NATS_URL"),
        "{message}"
    );
}

#[test]
fn a_broker_that_was_there_before_is_used() {
    let lab = Lab::new();
    let broker = Broker::private(Service::Nats).unwrap();
    let port = broker.address().rsplit(':').next().unwrap().to_owned();
    let mut command = lab.example("nats_publish");
    command.env("LAB_PORTS", format!("nats={port}"));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("using the one that listens"),
        "{}",
        text(&output)
    );
}

#[test]
fn the_last_words_of_a_broker_that_dies_at_start_are_shown() {
    let lab = Lab::new();
    let version = Service::Nats.version();
    let node = lab.path().join(format!("data/nats-{version}/node-1"));
    fs::create_dir_all(&node).unwrap();
    fs::write(node.join("data"), "a file where a folder should be").unwrap();
    let message = lab.fails(&["up", "nats"]);
    assert!(
        message.contains("nats died at start") && message.contains("not a directory"),
        "{message}"
    );
    assert!(
        lab.fails(&["up", "nats", "--detach"])
            .contains("nats died at start")
    );
}

#[test]
fn wrong_names_get_a_suggestion() {
    let lab = Lab::new();
    assert!(
        lab.fails(&["run", "nats_pubish"])
            .contains("Did you mean nats_publish")
    );
    let output = lab.run(&["up", "kafak"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output).contains("did you mean 'kafka'?"),
        "{}",
        text(&output)
    );
}

#[test]
fn a_backend_that_cannot_be_is_refused() {
    let lab = Lab::new();
    let with = |backend: &str, service: &str| {
        let mut command = lab.command(&["up", service]);
        command.env("LAB_BACKEND", backend);
        command
    };
    assert!(failure(with("podman", "nats")).contains("it can be native, docker or mock"));
    assert!(failure(with("mock", "nats")).contains("no mock of nats"));
    let mut docker = with("docker", "nats");
    docker.env("PATH", "/nonexistent");
    assert!(failure(docker).contains("no Docker engine answers"));
    let error = lab.fails(&["up", "opensearch", "--nodes", "3"]);
    assert!(
        error.contains("opensearch runs on 1 node here, not on 3"),
        "{error}"
    );
}

/// The JVM leaves its classes behind at an orderly end, beside the programs, and the next one takes them up, if they are whole.
#[test]
fn a_broker_that_ended_well_starts_faster_the_next_time() {
    let lab = Lab::new();
    // A folder of its own, in which no archive is yet.
    let machines = lab.path().join("programs").canonicalize().unwrap();
    fs::remove_file(lab.path().join("programs")).unwrap();
    let programs = lab.path().join("programs");
    fs::create_dir(&programs).unwrap();
    for program in fs::read_dir(machines).unwrap().flatten() {
        if program.path().is_dir() {
            symlink(program.path(), programs.join(program.file_name())).unwrap();
        }
    }
    let command_line = || {
        lab.ok(&["up", "kafka", "--detach"]);
        let pid = node_pid(&lab.await_entry("kafka")).to_string();
        let mut ps = Command::new("ps");
        let output = ps.args(["-ww", "-o", "args=", "-p", &pid]).output();
        let line = String::from_utf8(output.unwrap().stdout).unwrap();
        assert_eq!(lab.ok(&["down"]), "kafka: stopped\n");
        line
    };
    let first = command_line();
    assert!(!first.contains("SharedArchiveFile"), "{first}");
    let archives = || {
        let all = fs::read_dir(&programs).unwrap().flatten();
        all.map(|entry| entry.path())
            .filter(|path| path.is_file())
            .collect::<Vec<_>>()
    };
    let archive = match archives().as_slice() {
        [archive] => archive.clone(),
        others => panic!("{others:?}"),
    };
    let use_it = format!("-XX:SharedArchiveFile={}", archive.display());
    let second = command_line();
    assert!(second.contains(&use_it), "{second}");
    fs::remove_file(&archive).unwrap();
    fs::write(&archive, "damaged").unwrap();
    command_line();
}

#[test]
fn the_mock_says_what_it_does_not_guarantee() {
    let lab = Lab::new();
    let mut command = lab.example("kafka_async_producer");
    let output = command.env("LAB_BACKEND", "mock").output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let stderr = String::from_utf8_lossy(&output.stderr);
    for promise in ["aborted transactions", "durable", "timestamps"] {
        assert!(stderr.contains(promise), "{stderr}");
    }
}
