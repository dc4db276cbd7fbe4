//! RabbitMQ with the Erlang that it runs on.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{debian, missing, tool};
use crate::home::Home;

/// Where RabbitMQ is and what its scripts need to find their Erlang.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RabbitMq {
    /// The folder with `rabbitmq-server`, `rabbitmqctl`, `rabbitmq-plugins`.
    pub sbin: PathBuf,
    /// To go first on PATH: the folder with `erl` and `epmd`. None if Erlang is on PATH already.
    pub erlang_bin: Option<PathBuf>,
    /// Further environment for all of them.
    pub env: Vec<(OsString, OsString)>,
}

/// Debian puts a wrapper on PATH that insists on root; the scripts behind it do not.
const DEBIAN_SCRIPTS: &str = "usr/lib/rabbitmq/bin";

pub(super) fn find() -> Option<RabbitMq> {
    let on_path = tool::which("rabbitmq-server");
    let unwrapped = Path::new("/").join(DEBIAN_SCRIPTS);
    let sbin = match &on_path {
        Some(program) if !program.starts_with("/usr/sbin") && !program.starts_with("/sbin") => {
            program.parent()?.to_owned()
        }
        // On Debian /usr/sbin is often not on a user's PATH.
        _ if tool::is_program(&unwrapped.join("rabbitmq-server")) => unwrapped,
        Some(program) => program.parent()?.to_owned(),
        None => return None,
    };
    Some(RabbitMq {
        sbin,
        erlang_bin: None,
        env: Vec::new(),
    })
}

pub(super) fn find_or_fetch(home: &Home) -> Result<RabbitMq> {
    if let Some(found) = find() {
        return Ok(found);
    }
    if !debian::available() {
        bail!("{}", missing("RabbitMQ"));
    }
    if home.programs().to_string_lossy().contains(' ') {
        bail!(
            "RabbitMQ's scripts fail in a folder with a space in its path, which {} has: set LAB_HOME to another one",
            home.root().display()
        );
    }
    inside(&package().install(home)?)
}

pub(super) fn inside(root: &Path) -> Result<RabbitMq> {
    let libraries: Vec<PathBuf> = fs::read_dir(root.join("usr/lib"))
        .with_context(|| format!("cannot read {}", root.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.to_string_lossy().contains("-linux-"))
        .collect();
    let mut env = Vec::new();
    if !libraries.is_empty() {
        let own = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let all = libraries
            .into_iter()
            .chain(std::env::split_paths(&own).filter(|path| !path.as_os_str().is_empty()));
        env.push(("LD_LIBRARY_PATH".into(), std::env::join_paths(all)?));
    }
    Ok(RabbitMq {
        sbin: root.join(DEBIAN_SCRIPTS),
        erlang_bin: Some(root.join("usr/lib/erlang/bin")),
        env,
    })
}

pub(super) fn package() -> debian::Packages {
    debian::Packages {
        name: "rabbitmq",
        label: "RabbitMQ",
        candidates: &["rabbitmq-server"],
        // An Erlang of the system is left aside: the two must fit. The closure's other programs
        // (cron, logrotate, perl) serve an installed server only; its libraries are needed where they lack.
        keep: |package, installed| {
            package.starts_with("erlang")
                || package.starts_with("rabbitmq")
                || (!installed
                    && package.starts_with("lib")
                    && !package.ends_with("-perl")
                    && !["libperl", "libpython", "libpam"]
                        .iter()
                        .any(|prefix| package.starts_with(prefix)))
        },
        finish: |root| {
            for program in ["rabbitmq-server", "rabbitmqctl", "rabbitmq-plugins"] {
                let path = root.join(DEBIAN_SCRIPTS).join(program);
                if !tool::is_program(&path) {
                    bail!("the package holds no {DEBIAN_SCRIPTS}/{program}");
                }
            }
            Ok(())
        },
    }
}
