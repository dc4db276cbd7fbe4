//! Finds a Java, or brings one.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use anyhow::{Context, Result, bail};

use super::apt::{self, Packages};
use super::{Advice, tool, truststore};
use crate::home::Home;

/// What the brokers ask for at least.
const OLDEST: u32 = 17;

pub(crate) const ADVICE: Advice = Advice {
    program: "Java",
    debian: "default-jre-headless",
    fedora: "java-21-openjdk-headless",
    brew: "openjdk@21",
};

#[derive(Clone)]
pub(crate) struct Java {
    pub(crate) program: PathBuf,
    /// What JAVA_HOME must be for this one. Not always the program's grandparent: it may be a shim.
    pub(crate) home: PathBuf,
}

pub(crate) fn find_or_fetch(home: &Home) -> Result<Java> {
    let too_old = match find() {
        Ok(java) => return Ok(java),
        Err(too_old) => too_old,
    };
    if apt::available() {
        let root = package().install(home)?;
        let program = program_in(&root)
            .with_context(|| format!("no bin/java in {}/usr/lib/jvm", root.display()))?;
        return match ask(&program) {
            Some((_, java)) => Ok(java),
            None => bail!(
                "{} does not run: install a Java of the system (apt install {})",
                program.display(),
                ADVICE.debian
            ),
        };
    }
    match too_old {
        Some((version, program)) => bail!(
            "{} is Java {version}, and {OLDEST} or newer is needed. {ADVICE}",
            program.display()
        ),
        None => bail!("{ADVICE}"),
    }
}

/// What [`find`] has found: asking takes a part of a second each time.
static FOUND: LazyLock<Result<Java, Option<(u32, PathBuf)>>> = LazyLock::new(search);

/// The machine's own Java; in the error case the one that is too old, if there is one.
pub(crate) fn find() -> Result<Java, Option<(u32, PathBuf)>> {
    FOUND.clone()
}

fn search() -> Result<Java, Option<(u32, PathBuf)>> {
    let from_home = env::var_os("JAVA_HOME")
        .filter(|home| !home.is_empty())
        .map(|home| Path::new(&home).join("bin/java"))
        .filter(|program| tool::is_program(program));
    let mut too_old = None;
    for program in from_home.into_iter().chain(tool::which("java")) {
        match ask(&program) {
            Some((version, java)) if version >= OLDEST => return Ok(java),
            Some((version, _)) => {
                too_old.get_or_insert((version, program));
            }
            None => {}
        }
    }
    Err(too_old)
}

/// Asks a Java for its version and its home. None if it does not run, like macOS's placeholder.
fn ask(program: &Path) -> Option<(u32, Java)> {
    let output = Command::new(program)
        .args(["-XshowSettings:properties", "-version"])
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stderr);
    let properties: BTreeMap<&str, &str> = text
        .lines()
        .filter_map(|line| line.trim().split_once(" = "))
        .collect();
    let version = properties.get("java.specification.version")?;
    // Up to Java 8 it reads 1.8.
    let version = version.strip_prefix("1.").unwrap_or(version);
    let java = Java {
        program: program.to_owned(),
        home: PathBuf::from(*properties.get("java.home")?),
    };
    Some((version.parse().ok()?, java))
}

/// Newer Debians have no 17.
pub(crate) fn package() -> Packages {
    Packages {
        name: "java",
        label: "Java",
        suite: None,
        candidates: &[
            "openjdk-17-jre-headless",
            "openjdk-21-jre-headless",
            "default-jre-headless",
        ],
        // The libraries that it also names are for fonts, printers and smart cards; what it needs to run, apt needs too.
        keep: |package, _| package.starts_with("openjdk-"),
        finish: |root, _| {
            let program = program_in(root).context("the package holds no java")?;
            let cacerts = program
                .ancestors()
                .nth(2)
                .map(|home| home.join("lib/security/cacerts"))
                .context("the package holds no lib/security")?;
            // Debian makes this file when it installs the package. Here it is a link to nowhere.
            let _ = fs::remove_file(&cacerts);
            truststore::write(&cacerts)
        },
    }
}

fn program_in(root: &Path) -> Option<PathBuf> {
    let mut homes: Vec<PathBuf> = fs::read_dir(root.join("usr/lib/jvm"))
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|home| !home.is_symlink())
        .collect();
    homes.sort();
    homes
        .into_iter()
        .map(|home| home.join("bin/java"))
        .find(|program| tool::is_program(program))
}
