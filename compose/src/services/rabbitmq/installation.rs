//! Where RabbitMQ and its Erlang come from.
//!
//! The machine's own is taken if it is supported. Else it is unpacked from Debian packages, and on a Debian with an older
//! RabbitMQ from those of a newer Debian, which bring all libraries along, down to the C library and its loader.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::super::setup::put_first;
use crate::fetch::apt::{self, Packages};
use crate::fetch::{self, Advice, Source};
use crate::files;
use crate::home::Home;
use crate::terminal::say;

/// Older ones are out of support. They are taken only where no other can be had.
const OLDEST_MAJOR: u32 = 4;

/// The release of Debian with that version. An older one has an older RabbitMQ.
const SUITE: apt::Suite = apt::Suite {
    codename: "trixie",
    number: 13,
};

/// For so long after it was tried in vain it is not tried again, where there is an older one.
const PAUSE: Duration = Duration::from_secs(60 * 60);

const ADVICE: Advice = Advice {
    program: "RabbitMQ",
    debian: "rabbitmq-server",
    fedora: "rabbitmq-server",
    brew: "rabbitmq",
};

/// Debian puts a wrapper on PATH that insists on root; the scripts behind it do not.
const DEBIAN_SCRIPTS: &str = "usr/lib/rabbitmq/bin";
const DEBIAN_ERLANG: &str = "usr/lib/erlang";

/// RabbitMQ as it is on this machine, and what its scripts need to find their Erlang.
pub(super) struct Installation {
    pub(super) version: String,
    /// The folder with `rabbitmq-server`, `rabbitmqctl`, `rabbitmq-plugins`.
    scripts: PathBuf,
    /// To go first on PATH: the folder with `erl` and `epmd`. None if Erlang is on PATH already.
    erlang: Option<PathBuf>,
    /// Where the libraries are that Erlang needs, if the machine's own are not enough.
    libraries: Vec<PathBuf>,
}

impl Installation {
    /// Where it will come from. Nothing is fetched for the answer.
    pub(super) fn source(home: &Home) -> Source {
        match Installation::of_machine() {
            Some(own) if !own.has_better() => Source::Machine(own.scripts),
            _ => best_packages().source(home, ADVICE),
        }
    }

    pub(super) fn find_or_fetch(home: &Home) -> Result<Installation> {
        match Installation::of_machine() {
            Some(own) if !own.has_better() => Ok(own),
            own if apt::available() => Installation::fetch(home, best_packages(), own),
            _ => bail!("{ADVICE}"),
        }
    }

    /// These packages, else the machine's own, else those of this release of the system.
    fn fetch(home: &Home, best: Packages, own: Option<Installation>) -> Result<Installation> {
        let unpack = |packages: &Packages| {
            ensure!(
                !home.programs().to_string_lossy().contains([' ', '\'', '"']),
                "RabbitMQ's scripts fail in a folder with a space or a quote in its path, which {} has: set LAB_HOME to another one",
                home.root().display()
            );
            Installation::unpacked(&packages.install(home)?, packages.suite.is_some())
        };
        let old = || own.map_or_else(|| unpack(&packages_of_this_release()), Ok);
        let tried = home.programs().join(".rabbitmq-in-vain");
        let age = tried.metadata().and_then(|meta| meta.modified());
        if age.is_ok_and(|time| time.elapsed().is_ok_and(|age| age < PAUSE)) {
            return old();
        }
        match unpack(&best) {
            Err(error) if best.suite.is_some() && !fetch::is_interrupt(&error) => {
                let old = old().with_context(|| format!("{error:#}"))?;
                say!("{error:#}\ntaking RabbitMQ {} instead", old.version);
                let _ = fs::write(&tried, "");
                Ok(old)
            }
            result => result,
        }
    }

    /// Whether another one can be had, and is to be taken.
    fn has_better(&self) -> bool {
        let major = self.version.split('.').next().unwrap_or_default();
        let is_supported = major.parse().is_ok_and(|major: u32| major >= OLDEST_MAJOR);
        !is_supported && SUITE.is_newer_than_this() && apt::available()
    }

    /// The machine's own.
    fn of_machine() -> Option<Installation> {
        let on_path = fetch::which("rabbitmq-server");
        let unwrapped = Path::new("/").join(DEBIAN_SCRIPTS);
        let scripts = match &on_path {
            Some(program) if !program.starts_with("/usr/sbin") && !program.starts_with("/sbin") => {
                program.parent()?.to_owned()
            }
            // On Debian /usr/sbin is often not on a user's PATH.
            _ if fetch::is_program(&unwrapped.join("rabbitmq-server")) => unwrapped,
            Some(program) => program.parent()?.to_owned(),
            None => return None,
        };
        Some(Installation {
            // One that does not tell it is used all the same.
            version: version_of(&scripts).unwrap_or_else(|| "unknown".to_owned()),
            scripts,
            erlang: None,
            libraries: Vec::new(),
        })
    }

    /// In the root of unpacked packages.
    fn unpacked(root: &Path, has_own_loader: bool) -> Result<Installation> {
        let scripts = root.join(DEBIAN_SCRIPTS);
        Ok(Installation {
            version: version_of(&scripts)
                .with_context(|| format!("no RabbitMQ is in {}", root.display()))?,
            scripts,
            erlang: Some(root.join(DEBIAN_ERLANG).join("bin")),
            libraries: match has_own_loader {
                true => Vec::new(),
                false => apt::library_folders(root)?,
            },
        })
    }

    /// A program of RabbitMQ or of its Erlang.
    pub(super) fn command(&self, name: &str) -> Command {
        let folders = [self.erlang.as_deref(), Some(self.scripts.as_path())];
        let mut own = folders.iter().flatten().map(|folder| folder.join(name));
        let mut command = Command::new(
            own.find(|path| path.exists())
                .unwrap_or_else(|| name.into()),
        );
        put_first(&mut command, "PATH", self.erlang.as_slice());
        put_first(&mut command, "LD_LIBRARY_PATH", &self.libraries);
        command
    }
}

/// From the name of a folder: `../lib/rabbitmq_server-4.0.5` in Linux packages, `../plugins/rabbit-4.0.5` elsewhere.
/// `rabbitmqctl version` would leave a daemon behind, Erlang's name server, and a cookie in the user's home.
fn version_of(scripts: &Path) -> Option<String> {
    let script = fs::canonicalize(scripts.join("rabbitmq-server")).ok()?;
    let server = script.parent()?.parent()?;
    let places = [("lib", "rabbitmq_server-"), ("plugins", "rabbit-")];
    places.iter().find_map(|(folder, start)| {
        let entries = fs::read_dir(server.join(folder)).ok()?.flatten();
        let mut names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.find_map(|name| {
            let version = name.strip_prefix(start)?.trim_end_matches(".ez");
            version
                .starts_with(|c: char| c.is_ascii_digit())
                .then(|| version.to_owned())
        })
    })
}

/// Those with a supported RabbitMQ.
fn best_packages() -> Packages {
    if !SUITE.is_newer_than_this() {
        return packages_of_this_release();
    }
    Packages {
        suite: Some(SUITE),
        // All libraries, as its Erlang takes none of this system's.
        keep: |package, _| is_needed(package),
        finish: |root, target| {
            finish(root, target)?;
            use_own_loader(root, target)
        },
        ..packages_of_this_release()
    }
}

fn packages_of_this_release() -> Packages {
    Packages {
        name: "rabbitmq",
        label: "RabbitMQ",
        suite: None,
        candidates: &["rabbitmq-server"],
        // An Erlang of the system is left aside: the two must fit. Libraries are needed where they lack.
        keep: |package, installed| is_needed(package) && !(installed && is_library(package)),
        finish,
    }
}

/// The closure's other programs (cron, logrotate, perl) serve an installed server only.
fn is_needed(package: &str) -> bool {
    package.starts_with("erlang") || package.starts_with("rabbitmq") || is_library(package)
}

fn is_library(package: &str) -> bool {
    let for_others = [
        "libperl",
        "libpython",
        "libpam",
        "libdb5",
        "libsemanage",
        "libsepol",
    ];
    package == "zlib1g"
        || package.starts_with("lib")
            && !package.ends_with("-perl")
            && !for_others.iter().any(|prefix| package.starts_with(prefix))
}

fn finish(root: &Path, target: &Path) -> Result<()> {
    for program in ["rabbitmq-server", "rabbitmqctl", "rabbitmq-plugins"] {
        let path = root.join(DEBIAN_SCRIPTS).join(program);
        ensure!(
            fetch::is_program(&path),
            "the package holds no {DEBIAN_SCRIPTS}/{program}"
        );
    }
    // Erlang's start scripts name the folder that they are in.
    let moved = target.join(DEBIAN_ERLANG);
    let moved = moved
        .to_str()
        .with_context(|| format!("{} is not UTF-8", moved.display()))?;
    for script in files::all_in(&root.join(DEBIAN_ERLANG))? {
        let is_start = script
            .file_name()
            .is_some_and(|name| name == "erl" || name == "start");
        if is_start && starts_with(&script, b"#!") {
            fs::read_to_string(&script)
                .and_then(|text| {
                    fs::write(&script, text.replace(&format!("/{DEBIAN_ERLANG}"), moved))
                })
                .with_context(|| format!("cannot change {}", script.display()))?;
        }
    }
    Ok(())
}

/// Erlang's programs are made for a newer C library than this system has. They are started by the loader that came with
/// that library: each is replaced by a script that does so.
fn use_own_loader(root: &Path, target: &Path) -> Result<()> {
    let loader = apt::library_folders(root)?.into_iter().find_map(|folder| {
        let entries = fs::read_dir(folder).ok()?.flatten();
        let mut paths = entries.map(|entry| entry.path());
        // ld-linux-x86-64.so.2, ld-linux-aarch64.so.1, ld64.so.2
        paths.find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("ld") && name.contains(".so.")
        })
    });
    let loader = loader.context("the packages hold no loader")?;
    let libraries = loader.parent().context("the loader is in no folder")?;
    let moved = |path: &Path| target.join(path.strip_prefix(root).unwrap_or(path));
    for program in files::all_in(&root.join(DEBIAN_ERLANG))? {
        let name = program
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if program.is_symlink()
            || !fetch::is_program(&program)
            || name.contains(".so")
            || !starts_with(&program, b"\x7fELF")
        {
            continue;
        }
        let elf = program.with_file_name(format!("{name}.elf"));
        let script = format!(
            "#!/bin/sh\nexec '{}' --library-path '{}' --argv0 \"$0\" '{}' \"$@\"\n",
            moved(&loader).display(),
            moved(libraries).display(),
            moved(&elf).display()
        );
        fs::rename(&program, &elf)
            .and_then(|()| fs::write(&program, script))
            .and_then(|()| fs::set_permissions(&program, fs::Permissions::from_mode(0o755)))
            .with_context(|| format!("cannot replace {}", program.display()))?;
    }
    Ok(())
}

fn starts_with(file: &Path, bytes: &[u8]) -> bool {
    let mut start = vec![0; bytes.len()];
    fs::File::open(file).is_ok_and(|mut file| file.read_exact(&mut start).is_ok()) && start == bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_debians_suite_cannot_be_reached_this_release_has_the_broker() {
        assert!(apt::available(), "this needs a machine with apt");
        let folder = tempfile::tempdir().unwrap();
        let nowhere = apt::Suite {
            codename: "no-such-release",
            ..SUITE
        };
        let packages = Packages {
            suite: Some(nowhere),
            ..packages_of_this_release()
        };
        let home = Home::at(folder.path());
        let installation = Installation::fetch(&home, packages, None).unwrap();
        assert!(installation.scripts.starts_with(home.programs()));
        assert!(!installation.version.is_empty());
        let mut erlang = installation.command("erl");
        let ended = erlang.args(["-noshell", "-eval", "halt(7)."]).status();
        assert_eq!(ended.unwrap().code(), Some(7));
    }
}
