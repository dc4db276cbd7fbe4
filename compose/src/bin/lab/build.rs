//! Builds an example and says where its program is.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use cargo_metadata::Message;
use compose::workspace::Workspace;

/// Cargo's own output goes to the terminal as it is.
///
/// # Errors
/// There is no such example, or it does not compile.
pub fn build(workspace: &Workspace, name: &str, release: bool) -> Result<PathBuf> {
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
    } else {
        // The default features of a package are those of all its binaries, and bring crates that this one does not use.
        command.args(["--package", &example.package, "--no-default-features"]);
        command.args(["--features", &example.features.join(",")]);
    }
    if release {
        command.arg("--release");
    }
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo to build the example")?;
    if !output.status.success() {
        bail!("{name} does not build; see above");
    }
    for message in Message::parse_stream(output.stdout.as_slice()) {
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
