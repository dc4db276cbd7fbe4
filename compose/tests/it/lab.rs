//! `lab` as its user meets it: the good cases, the bad ones, and what is left behind. Never on the default ports.

// Clippy's leave for tests does not reach the functions that tests call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use compose::harness::handles;
use compose::home::Home;
use compose::ports;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// A `LAB_HOME` of its own, with the programs of the machine's, so that nothing is fetched again.
struct Lab {
    home: TempDir,
}

impl Lab {
    fn new() -> Lab {
        let home = tempfile::tempdir().unwrap();
        let programs = Home::from_env().unwrap().programs();
        symlink(programs, home.path().join("programs")).unwrap();
        Lab { home }
    }

    fn path(&self) -> &Path {
        self.home.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
        command
            .args(arguments)
            .env("LAB_HOME", self.path())
            .env("LAB_PORTS", "free")
            .stdin(Stdio::null());
        for variable in [
            "LAB_BACKEND",
            "KAFKA_BROKERS",
            "AMQP_ADDR",
            "NATS_URL",
            "PULSAR_ADDRESS",
            "ELASTICSEARCH_URL",
        ] {
            command.env_remove(variable);
        }
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn fails(&self, arguments: &[&str]) -> String {
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
        processes()
            .into_iter()
            .filter(|(_, group)| pids.contains(group))
            .map(|(pid, _)| pid),
    );
    assert!(family.len() > 4, "{family:?}");
    owner.kill().unwrap();
    owner.wait().unwrap();
    eventually("all of them are gone", || {
        !family.iter().any(|pid| lives(*pid))
    });
    assert!(lab.ok(&["status"]).contains("nats        -"));
}

/// Every process with its group.
fn processes() -> Vec<(i32, i32)> {
    let output = Command::new("ps")
        .args(["-A", "-o", "pid=,pgid="])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .filter_map(|line| {
            let mut numbers = line.split_whitespace().map(|number| number.parse().ok());
            Some((numbers.next()??, numbers.next()??))
        })
        .collect()
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
    assert!(lab.entry("nats").is_none());
    assert!(lab.ok(&["status"]).contains("nats        -"));
}

#[test]
fn an_interrupt_reaches_the_example_and_its_exit_code_comes_back() {
    let lab = Lab::new();
    let child = lab
        .command(&["run", "nats_subscribe"])
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
        .command(&["run", "nats_subscribe"])
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
    let parent = lab.id().to_string();
    let output = Command::new("ps")
        .args(["-A", "-o", "pid=,ppid=,args="])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .find(|line| {
            line.contains("nats_subscribe") && line.split_whitespace().nth(1) == Some(&parent)
        })
        .and_then(|line| line.split_whitespace().next()?.parse().ok())
        .expect("the example is a child of lab")
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
        compose::probe::http_get(&page, Duration::from_secs(2))
            .is_some_and(|(_, body)| body.contains("events."))
    });
}

#[test]
fn a_broker_in_use_by_another_run_is_not_taken_away() {
    let lab = Lab::new();
    let first = lab
        .command(&["run", "nats_subscribe"])
        .process_group(0)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let entry = lab.await_entry("nats");
    await_subscription(&entry);
    let mut second = lab
        .command(&["run", "nats_subscribe"])
        .process_group(0)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let web = entry["web"][0].as_str().unwrap().to_owned();
    eventually("both have subscribed", || {
        compose::probe::http_get(&format!("{web}/connz?subs=1"), Duration::from_secs(2))
            .is_some_and(|(_, body)| body.matches("events.").count() >= 2)
    });
    interrupt(&first);
    eventually("the first example has left", || {
        compose::probe::http_get(&format!("{web}/connz?subs=1"), Duration::from_secs(2))
            .is_some_and(|(_, body)| body.matches("events.").count() == 1)
    });
    assert!(lives(node_pid(&entry)));
    interrupt(&second);
    assert!(second.wait().unwrap().success());
    assert!(wait_for_end(first).success());
    assert!(!lives(node_pid(&entry)));
}

#[test]
fn a_port_taken_by_something_else_is_named() {
    let lab = Lab::new();
    let claim = ports::claim().unwrap();
    let _listener = TcpListener::bind(("127.0.0.1", claim.port)).unwrap();
    let mut command = lab.command(&["up", "nats"]);
    command.env("LAB_PORTS", format!("nats={}", claim.port));
    let message = failure(command);
    assert!(
        message.contains(&format!("port {} is taken", claim.port)) && message.contains("NATS_URL"),
        "{message}"
    );
}

#[test]
fn a_broker_that_was_there_before_is_used() {
    let lab = Lab::new();
    let broker = compose::Broker::private(compose::Service::Nats).unwrap();
    let port = broker.address().rsplit(':').next().unwrap().to_owned();
    let mut command = lab.command(&["run", "nats_publish"]);
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
    let version = compose::fetch::versions()
        .into_iter()
        .find(|(name, _)| *name == "nats")
        .unwrap()
        .1;
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
fn a_damaged_program_is_named_when_its_broker_dies() {
    let lab = Lab::new();
    let programs = lab.path().join("programs");
    let real = fs::canonicalize(&programs).unwrap();
    fs::remove_file(&programs).unwrap();
    fs::create_dir(&programs).unwrap();
    // Makes sure that it is there to be copied.
    let kafka = fetch_kafka();
    assert!(kafka.starts_with(&real));
    let folder = kafka
        .strip_prefix(&real)
        .unwrap()
        .components()
        .next()
        .unwrap();
    let status = Command::new("cp")
        .arg("-R")
        .arg(real.join(folder))
        .arg(&programs)
        .status()
        .unwrap();
    assert!(status.success());
    let copy = programs.join(kafka.strip_prefix(&real).unwrap());
    let jar = fs::read_dir(copy)
        .unwrap()
        .filter_map(|file| Some(file.ok()?.path()))
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("kafka_2.13"))
        })
        .unwrap();
    // Of the same size, so that the quick look at each start does not see it.
    let size = usize::try_from(fs::metadata(&jar).unwrap().len()).unwrap();
    fs::write(&jar, vec![0; size]).unwrap();
    let message = lab.fails(&["up", "kafka"]);
    assert!(
        message.contains("damaged") && message.contains("kafka_2.13"),
        "{message}"
    );
}

fn fetch_kafka() -> PathBuf {
    fs::canonicalize(compose::fetch::kafka(&Home::from_env().unwrap()).unwrap()).unwrap()
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
    let mut command = lab.command(&["run", "kafka_async_producer"]);
    let output = command.env("LAB_BACKEND", "mock").output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let stderr = String::from_utf8_lossy(&output.stderr);
    for promise in ["aborted transactions", "durable", "timestamps"] {
        assert!(stderr.contains(promise), "{stderr}");
    }
}
