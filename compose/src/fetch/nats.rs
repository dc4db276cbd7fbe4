//! The NATS server: one binary, built by Go or packaged by Debian.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::install::{self, Recipe, Work};
use super::{debian, missing, tool};
use crate::home::Home;

const PROGRAM: &str = "nats-server";

pub(super) struct Module<'a> {
    id: String,
    label: String,
    module: &'a str,
}

impl<'a> Module<'a> {
    pub(super) fn new(module: &'a str, version: &str) -> Module<'a> {
        Module {
            id: format!("{PROGRAM}-{version}"),
            label: format!("{PROGRAM} {version}"),
            module,
        }
    }

    fn recipe(&self) -> Recipe<'_> {
        Recipe {
            id: &self.id,
            label: &self.label,
            by: "Go",
            inputs: self.module,
        }
    }

    pub(super) fn installed(&self, home: &Home) -> Option<PathBuf> {
        Some(install::installed(home, &self.recipe())?.join(PROGRAM))
    }

    pub(super) fn install(&self, home: &Home) -> Result<PathBuf> {
        if let Some(program) = tool::which(PROGRAM).or_else(|| self.installed(home)) {
            return Ok(program);
        }
        let Some(go) = tool::which("go") else {
            if !debian::available() {
                bail!("{}", missing(PROGRAM));
            }
            return packaged(home);
        };
        let error = match install::install(home, &self.recipe(), |work| {
            go_install(work, &go, self.module)
        }) {
            Ok(dir) => return Ok(dir.join(PROGRAM)),
            Err(error) => error,
        };
        // A network or a disk that stopped Go would stop apt as well; a Go that is too old does not.
        match error.downcast_ref::<tool::Failure>() {
            Some(failure) if failure.cause == tool::Cause::Other && debian::available() => {
                tool::say(&format!(
                    "Go here cannot build {} ({}): taking Debian's package instead",
                    self.label,
                    failure.words.join("; ")
                ));
                packaged(home)
            }
            _ => Err(error),
        }
    }
}

fn packaged(home: &Home) -> Result<PathBuf> {
    Ok(program_in(&package().install(home)?))
}

pub(super) fn package() -> debian::Packages {
    debian::Packages {
        name: PROGRAM,
        label: PROGRAM,
        candidates: &[PROGRAM],
        keep: |package, _| package == PROGRAM,
        finish: |root| match program_in(root) {
            program if tool::is_program(&program) => Ok(()),
            program => bail!("the package holds no {}", program.display()),
        },
    }
}

pub(super) fn program_in(root: &Path) -> PathBuf {
    ["usr/sbin", "usr/bin"]
        .iter()
        .map(|folder| root.join(folder).join(PROGRAM))
        .find(|program| program.exists())
        .unwrap_or_else(|| root.join("usr/bin").join(PROGRAM))
}

fn go_install(work: &mut Work, go: &Path, module: &str) -> Result<()> {
    // A Go that is killed leaves its scratch files behind; here they are deleted with the rest.
    let scratch = work.partial.join("go/tmp");
    install::remove(&scratch)?;
    fs::create_dir_all(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
    let mut command = Command::new(go);
    command
        // Without what only a debugger reads, which takes a tenth of the time and a third of the size.
        .args(["install", "-v", "-trimpath", "-ldflags=-s -w"])
        .args(["-gcflags=all=-dwarf=false", module])
        .current_dir(&work.partial)
        .env("GOBIN", &work.new)
        .env("GOPATH", work.partial.join("go"))
        .env("GOMODCACHE", work.partial.join("go/pkg/mod"))
        .env("GOTMPDIR", &scratch)
        .env("GOCACHE", work.partial.join("go/build"))
        .env("CGO_ENABLED", "0")
        // Go makes what it downloads read-only, and then it cannot be deleted.
        .env("GOFLAGS", "-modcacherw")
        // The server must run here, whatever else is being built.
        .env_remove("GOOS")
        .env_remove("GOARCH");
    let progress = work.progress;
    progress.show("asking for the module");
    let mut compiled = 0_u32;
    tool::run("Go", &mut command, work.log, |line| {
        if let Some(module) = line.strip_prefix("go: downloading ") {
            progress.show(format!("downloading {module}"));
        } else if !line.starts_with("go: ") {
            compiled += 1;
            progress.show(format!("compiled {compiled} packages"));
        }
    })?;
    let program = work.new.join(PROGRAM);
    fs::metadata(&program).with_context(|| format!("Go built no {}", program.display()))?;
    Ok(())
}
