//! Fetching programs into the cache: cut off, damaged, doubled, offline, and on a machine that has next to nothing.
//!
//! A pom with one small jar stands for a broker. What depends on the environment runs in a process of
//! its own, which is this test binary again.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::java;
use super::maven::Jars;
use crate::Service;
use crate::home::Home;

const POM: &str = r#"<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>lab</groupId>
  <artifactId>small</artifactId>
  <version>1</version>
  <packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.slf4j</groupId>
      <artifactId>slf4j-api</artifactId>
      <version>2.0.17</version>
    </dependency>
  </dependencies>
</project>
"#;
const JAR: &str = "slf4j-api-2.0.17.jar";

fn fetch_small(home: &Home) -> anyhow::Result<PathBuf> {
    Jars::of_pom("small", POM).install(home)
}

/// Fetched once, and kept for the next run; copied for each test that needs a program in its cache.
static FETCHED: LazyLock<PathBuf> = LazyLock::new(|| {
    // Beside the folder of this program, target/debug/deps.
    let program = std::env::current_exe().unwrap();
    let target = program.ancestors().nth(3).unwrap();
    fetch_small(&Home::at(target.join("tmp/fetched"))).unwrap()
});

fn home_with_small() -> (TempDir, Home, PathBuf) {
    let folder = TempDir::new().unwrap();
    let home = Home::at(folder.path());
    let target = home.programs().join("small-1");
    fs::create_dir(&target).unwrap();
    for entry in fs::read_dir(FETCHED.as_path()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), target.join(entry.file_name())).unwrap();
    }
    (folder, home, target)
}

/// Everything about a process that looks at the machine: its home, PATH, proxies.
fn worker(home: &Path, what: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--ignored",
            "--exact",
            "--nocapture",
            "fetch::tests::fetches_what_it_is_told",
        ])
        .env("FETCH_HOME", home)
        .env("FETCH_WHAT", what)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

#[test]
#[ignore = "the other tests run it, in a process of its own"]
fn fetches_what_it_is_told() {
    let Some(home) = std::env::var_os("FETCH_HOME") else {
        return;
    };
    let home = Home::at(home);
    let result = match std::env::var("FETCH_WHAT").unwrap().as_str() {
        "small" => fetch_small(&home),
        "toxiproxy" => crate::harness::proxy::program(&home),
        "java" => java::find_or_fetch(&home).map(|java| java.program),
        // Where it is, is seen in the folder.
        service => {
            let service: Service = service.parse().unwrap();
            service
                .spec()
                .program()
                .fetch(&home)
                .map(|()| home.programs())
        }
    };
    match result {
        Ok(path) => println!("\nresult={}", path.display()),
        Err(error) => {
            eprintln!("{error:#}");
            std::process::exit(1);
        }
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn result(output: &Output) -> PathBuf {
    assert!(output.status.success(), "{}", stderr(output));
    let text = String::from_utf8_lossy(&output.stdout);
    let path = text.lines().find_map(|line| line.strip_prefix("result="));
    PathBuf::from(path.expect("the worker names the folder"))
}

#[track_caller]
fn error(output: &Output) -> String {
    assert!(!output.status.success(), "it must fail: {}", stderr(output));
    stderr(output)
}

#[test]
fn a_truncated_jar_is_noticed_and_fetched_again() {
    let (_folder, home, dir) = home_with_small();
    let jar = dir.join(JAR);
    let whole = fs::read(&jar).unwrap();
    let file = OpenOptions::new().write(true).open(&jar).unwrap();
    file.set_len(100).unwrap();

    let output = worker(home.root(), "small").output().unwrap();

    assert_eq!(result(&output), dir);
    let said = stderr(&output);
    let damage = format!("damaged ({JAR}: 100 of {} bytes)", whole.len());
    assert!(said.contains(&damage), "{said}");
    assert_eq!(fs::read(&jar).unwrap(), whole);
}

#[test]
fn what_was_cut_off_is_never_taken_for_complete() {
    let folder = TempDir::new().unwrap();
    let home = Home::at(folder.path());
    // A fetch that died, and a folder in the right place that no fetch has finished.
    let partial = home.programs().join(".partial-small-1/new-1");
    let target = home.programs().join("small-1");
    for dir in [&partial, &target] {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("half.jar"), "half").unwrap();
    }

    let dir = fetch_small(&home).unwrap();

    assert_eq!(dir, target);
    assert!(!dir.join("half.jar").exists());
    assert!(dir.join(JAR).is_file());
    assert!(!home.programs().join(".partial-small-1").exists());
}

#[test]
fn a_changed_pom_is_fetched_again() {
    let (_folder, home, dir) = home_with_small();
    fs::write(dir.join("marker"), "of the old folder").unwrap();
    let changed = POM.replace("2.0.17", "2.0.16").leak();

    assert_eq!(Jars::of_pom("small", changed).install(&home).unwrap(), dir);

    assert!(dir.join("slf4j-api-2.0.16.jar").is_file());
    assert!(!dir.join(JAR).exists() && !dir.join("marker").exists());
}

#[test]
fn of_two_at_once_one_fetches_and_the_other_waits() {
    let folder = TempDir::new().unwrap();
    let workers = [(); 2].map(|()| worker(folder.path(), "small").spawn().unwrap());

    let outputs = workers.map(|worker| worker.wait_with_output().unwrap());

    let dir = folder.path().join("programs/small-1");
    for output in &outputs {
        assert_eq!(result(output), dir);
    }
    let said: String = outputs.iter().map(stderr).collect();
    assert_eq!(
        said.matches("fetching small 1 by Maven").count(),
        1,
        "{said}"
    );
    assert_eq!(said.matches("waiting for it").count(), 1, "{said}");
}

#[test]
fn a_machine_without_anything_is_told_what_to_install() {
    let folder = TempDir::new().unwrap();
    let empty = TempDir::new().unwrap();
    for (what, program) in [
        ("kafka", "default-jre-headless"),
        ("nats", "nats-server"),
        ("toxiproxy", "golang"),
    ] {
        let output = worker(folder.path(), what)
            .env("PATH", empty.path())
            .env_remove("JAVA_HOME")
            .output()
            .unwrap();
        let error = error(&output);
        for platform in [
            &format!("`sudo apt install {program}` (Debian"),
            "`sudo dnf install",
            "`brew install",
        ] {
            assert!(error.contains(platform), "{error}");
        }
    }
}

/// A port on which nothing listens, as a proxy for Maven.
fn offline(command: &mut Command) -> &mut Command {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let options = ["http", "https"]
        .map(|scheme| format!("-D{scheme}.proxyHost=127.0.0.1 -D{scheme}.proxyPort={port}"));
    command.env("MAVEN_OPTS", options.join(" "))
}

#[test]
fn without_a_network_the_message_says_so_and_where_to_read_more() {
    let folder = TempDir::new().unwrap();

    let output = offline(&mut worker(folder.path(), "small"))
        .output()
        .unwrap();

    let error = error(&output);
    assert!(
        error.contains("cannot fetch small 1: Maven failed") && error.contains("the network"),
        "{error}"
    );
    // Maven's own words, and all of them in the log.
    assert!(error.contains("[ERROR]"), "{error}");
    let log = folder.path().join("logs/fetch-small-1.log");
    assert!(error.contains(log.to_str().unwrap()), "{error}");
    assert!(fs::read_to_string(log).unwrap().contains("[ERROR]"));
    assert!(!folder.path().join("programs/small-1").exists());
}

#[test]
fn damage_that_cannot_be_healed_offline_is_named_with_what_to_delete() {
    let (_folder, home, dir) = home_with_small();
    fs::remove_file(dir.join(JAR)).unwrap();

    let output = offline(&mut worker(home.root(), "small")).output().unwrap();

    let error = error(&output);
    assert!(error.contains(&format!("{JAR}: missing")), "{error}");
    assert!(error.contains("could not be fetched again"), "{error}");
    assert!(error.contains(dir.to_str().unwrap()), "{error}");
    assert!(error.contains("Connection refused"), "{error}");
}

#[test]
fn a_home_that_cannot_be_written_to_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = Home::at(file.path()).check().unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains(file.path().to_str().unwrap()), "{error}");
    assert!(error.contains("LAB_HOME"), "{error}");
}

#[test]
fn what_a_service_takes_is_told_and_nothing_fetched() {
    let folder = TempDir::new().unwrap();
    let home = Home::at(folder.path());
    for service in Service::ALL {
        let parts = service.spec().program().parts(&home);
        assert!(!parts.is_empty(), "{service}");
        for part in parts {
            assert!(!part.to_string().contains("fetched ("), "{service}: {part}");
        }
    }
    assert_eq!(fs::read_dir(home.programs()).unwrap().count(), 0);
}

/// The processes whose command line names this path.
#[cfg(target_os = "linux")]
fn processes_at(path: &Path) -> Vec<u32> {
    let path = path.to_str().unwrap();
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(path)
        })
        .collect()
}

/// Checks until it holds; there is no event for another process's end.
#[cfg(target_os = "linux")]
#[track_caller]
fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_killed_fetch_takes_its_tool_along_and_the_next_one_succeeds() {
    let folder = TempDir::new().unwrap();
    let mut worker: Child = worker(folder.path(), "small").spawn().unwrap();
    let mut lines = BufReader::new(worker.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("fetching small 1")));
    eventually("Maven runs", || !processes_at(folder.path()).is_empty());

    worker.kill().unwrap();
    worker.wait().unwrap();

    eventually("Maven is gone", || processes_at(folder.path()).is_empty());
    let dir = folder.path().join("programs/small-1");
    assert!(!dir.exists());
    fetch_small(&Home::at(folder.path())).unwrap();
}

/// A PATH with all that the system's own folders hold except for these programs.
fn path_without(hidden: &[&str]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for dir in ["/usr/bin", "/bin", "/usr/sbin", "/sbin"] {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name();
            if !hidden.iter().any(|hidden| name == *hidden) {
                // The folders are often one and the same.
                let _ = symlink(entry.path(), folder.path().join(name));
            }
        }
    }
    folder
}

#[test]
fn on_debian_java_maven_and_nats_come_without_any_of_them() {
    assert!(super::apt::available(), "this needs a machine with apt");
    let path = path_without(&["java", "mvn", "go", "nats-server"]);
    let folder = TempDir::new().unwrap();
    let fetched = |what: &str| {
        let output = worker(folder.path(), what)
            .env("PATH", path.path())
            .env_remove("JAVA_HOME")
            .output()
            .unwrap();
        result(&output)
    };

    // By the fetched Maven on the fetched Java, which therefore trusts the server.
    let small = fetched("small");
    assert!(small.join(JAR).is_file());

    let java = fetched("java");
    assert!(java.starts_with(folder.path()), "{}", java.display());
    let version = Command::new(java).arg("-version").output().unwrap();
    assert!(stderr(&version).contains("OpenJDK"), "{}", stderr(&version));

    let programs = fetched("nats");
    let packages = fs::read_dir(programs).unwrap().flatten();
    let mut roots = packages.map(|package| package.path());
    let root = roots.find(|path| path.join("usr/sbin/nats-server").exists());
    let nats = root
        .expect("an unpacked nats-server")
        .join("usr/sbin/nats-server");
    let version = Command::new(nats).arg("--version").output().unwrap();
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    assert!(version.contains("nats-server"), "{version}");
}
