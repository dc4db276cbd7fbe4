//! Builds an example and says where its program is.

use std::fs::{File, TryLockError};
use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::path::PathBuf;
use std::process::{ChildStderr, Command, Stdio};

use anyhow::{Context, Result, bail};
use cargo_metadata::Message;

use crate::process::Supervised;
use crate::terminal::{Progress, say};
use crate::workspace::{SECURE, Workspace};

/// Cargo's own output goes to the terminal as it is; unless a broker is being `fetched` at the same time, and both would
/// draw on the same line.
///
/// # Errors
/// There is no such example, or it does not compile.
pub(super) fn build(
    workspace: &Workspace,
    name: &str,
    release: bool,
    fetched: bool,
) -> Result<PathBuf> {
    let example = workspace.find(name)?;
    let whole = workspace.is_built_as_a_whole(release);
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--message-format", "json-render-diagnostics"])
        .args(["--bin", name])
        .current_dir(workspace.root());
    // What the cargo that runs `lab` has told it about its own package would be news to build scripts: they would run
    // again, now and at the next build without `lab`.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"]
            .iter()
            .any(|start| text.starts_with(start))
        {
            command.env_remove(&name);
        }
    }
    if whole {
        // The features of dependencies are then those that all packages together want: what `cargo test --workspace` has
        // built is used, and not built a second time.
        command.arg("--workspace");
        if example.features.iter().any(|feature| feature == SECURE)
            || workspace.is_built_with_tls(release)
        {
            command.args(["--features", &workspace.secure_features().join(",")]);
        }
    } else {
        // The default features of a package are those of all its binaries, and bring crates that this one does not use.
        command.args(["--package", &example.package, "--no-default-features"]);
        command.args(["--features", &example.features.join(",")]);
    }
    if release {
        command.arg("--release");
    }
    await_other_cargo(workspace, release);
    let stderr = if fetched {
        Stdio::piped()
    } else {
        say!("building {name}…");
        Stdio::inherit()
    };
    // With a watcher and in a process group of its own: when an interrupt ends this process, no compiler goes on.
    let mut process = Supervised::spawn(&command, Stdio::piped(), stderr, None)
        .context("cannot run cargo to build the example")?;
    let shown = process.take_stderr().map(|stderr| {
        let name = name.to_owned();
        std::thread::spawn(move || show(&name, stderr))
    });
    let mut messages = Vec::new();
    process
        .take_stdout()
        .context("cargo has no standard output")?
        .read_to_end(&mut messages)
        .context("cargo's messages cannot be read")?;
    let status = process.wait()?;
    if let Some(shown) = shown {
        // All that cargo complains about stands before the error.
        let _ = shown.join();
    }
    if !status.success() {
        bail!("{name} does not build; see above");
    }
    for message in Message::parse_stream(messages.as_slice()) {
        if let Message::CompilerArtifact(artifact) =
            message.context("cargo's messages cannot be read")?
            && artifact.target.name == name
            && let Some(program) = artifact.executable
        {
            return Ok(program.into_std_path_buf());
        }
    }
    bail!("cargo built no program called {name}")
}

/// Shows what cargo says, beside the bar of a fetch.
fn show(name: &str, stderr: ChildStderr) {
    let progress = Progress::titled(name, &format!("building {name}…"));
    let on_terminal = std::io::stderr().is_terminal();
    let mut compiled = 0;
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        match line.trim_start().strip_prefix("Compiling ") {
            Some(package) if on_terminal => {
                compiled += 1;
                progress.show(format!("building, {compiled} crates, {package}"));
            }
            _ => say!("{line}"),
        }
    }
}

/// Waits as cargo itself would, but says so in plain words. If it cannot be told whether another cargo builds, that is
/// left to cargo.
fn await_other_cargo(workspace: &Workspace, release: bool) {
    let profile = if release { "release" } else { "debug" };
    let lock = workspace
        .target_directory()
        .join(profile)
        .join(".cargo-lock");
    // Without this file nothing has been built here yet.
    let Ok(lock) = File::open(lock) else { return };
    if let Err(TryLockError::WouldBlock) = lock.try_lock_shared() {
        say!("waiting for another cargo to finish…");
        let _ = lock.lock_shared();
    }
}
