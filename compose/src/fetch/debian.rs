//! Debian packages without root: apt works out the closure and fetches it, dpkg-deb unpacks it into the cache.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::install::{self, Recipe, Work};
use super::tool::{self, Log};
use crate::home::Home;

/// Package lists are taken as they are for this long; after that, or after a failure, they are fetched again.
const FRESH: Duration = Duration::from_secs(24 * 60 * 60);

/// apt reads this after the machine's own files. It takes out hooks that would act on the system, and
/// lists that are of no use here; mirrors, proxies and keys stay as they are.
const CONFIGURATION: &str = "\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets::deb::CNF;
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::DEP-11-icons;
#clear Acquire::IndexTargets::deb::DEP-11-icons-small;
#clear Acquire::IndexTargets::deb::DEP-11-icons-large;
#clear Acquire::IndexTargets::deb::DEP-11-icons-hidpi;
#clear Acquire::IndexTargets::deb::DEP-11-icons-large-hidpi;
#clear Acquire::IndexTargets::deb-src;
Acquire::Languages \"none\";
APT::Sandbox::User \"root\";
Debug::NoLocking \"true\";
Dir::Cache::pkgcache \"\";
Dir::Cache::srcpkgcache \"\";
";

/// Whether this is a machine with apt.
pub(super) fn available() -> bool {
    ["apt-get", "dpkg-deb", "dpkg-query"]
        .iter()
        .all(|name| tool::which(name).is_some())
}

/// A program that comes as Debian packages.
pub(super) struct Packages {
    pub(super) name: &'static str,
    pub(super) label: &'static str,
    /// The package to ask for; the first that this release has.
    pub(super) candidates: &'static [&'static str],
    /// Which packages of the closure are unpacked, given the name and whether the system has it.
    pub(super) keep: fn(&str, bool) -> bool,
    /// What the packages' installation scripts would have done.
    pub(super) finish: fn(&Path) -> Result<()>,
}

impl Packages {
    /// What was left out because the system has it must come from the same release.
    fn id(&self) -> String {
        format!("{}-{}", self.name, release())
    }

    fn inputs(&self, home: &Home) -> String {
        // Scripts in some packages must be told where they are.
        let target = home.programs().join(self.id());
        format!("2\n{:?}\n{}", self.candidates, target.display())
    }

    pub(super) fn installed(&self, home: &Home) -> Option<PathBuf> {
        install::installed(
            home,
            &Recipe {
                id: &self.id(),
                label: self.label,
                by: "Debian packages",
                inputs: &self.inputs(home),
            },
        )
    }

    pub(super) fn install(&self, home: &Home) -> Result<PathBuf> {
        install::install(
            home,
            &Recipe {
                id: &self.id(),
                label: self.label,
                by: "Debian packages",
                inputs: &self.inputs(home),
            },
            |work| self.fetch(home, work),
        )
    }

    fn fetch(&self, home: &Home, work: &mut Work) -> Result<()> {
        let folder = home.programs().join(".apt");
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let lock = install::lock(
            &folder.join("lock"),
            "other packages are being fetched: waiting for them",
        )?;
        let apt = Apt::new(folder)?;
        let debs = work.partial.join("packages");
        install::remove(&debs)?;
        fs::create_dir_all(&debs).with_context(|| format!("cannot create {}", debs.display()))?;

        let fresh = apt.lists_are_fresh();
        let mut update = if fresh {
            String::new()
        } else {
            apt.update(work)?
        };
        let mut outcome = self.download(&apt, &debs, work, &update);
        if fresh && outcome.as_ref().is_err_and(|error| !interrupted(error)) {
            // Lists of yesterday may name packages that the mirror has replaced since.
            update = apt.update(work)?;
            outcome = self.download(&apt, &debs, work, &update);
        }
        outcome?;
        drop(lock);

        let mut files: Vec<PathBuf> = fs::read_dir(&debs)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .with_context(|| format!("cannot read {}", debs.display()))?;
        files.sort();
        work.progress.steps(files.len());
        work.progress.show("unpacking");
        for file in &files {
            let mut command = Command::new("dpkg-deb");
            command.arg("--extract").arg(file).arg(&work.new);
            tool::run("dpkg-deb", &mut command, work.log, |_| {})?;
            work.progress.step();
        }
        point_links_inside(&work.new, &work.new)?;
        (self.finish)(&work.new)?;
        move_scripts(&work.new, &work.target)
    }

    fn download(&self, apt: &Apt, debs: &Path, work: &mut Work, update: &str) -> Result<()> {
        let packages = self.closure(apt, work, update)?;
        work.progress.steps(packages.len());
        work.progress.show("packages");
        let progress = work.progress;
        let mut command = apt.command();
        command.arg("download").args(&packages).current_dir(debs);
        tool::run("apt", &mut command, work.log, |line| {
            if line.starts_with("Get:") {
                progress.step();
            }
        })?;
        Ok(())
    }

    fn closure(&self, apt: &Apt, work: &mut Work, update: &str) -> Result<Vec<String>> {
        let installed = system_packages(work.log)?;
        work.progress.show("working out what it needs");
        let mut last = None;
        for candidate in self.candidates {
            let mut command = apt.command();
            command.args([
                "--simulate",
                "install",
                "--no-install-recommends",
                candidate,
            ]);
            match tool::run("apt", &mut command, work.log, |_| {}) {
                Ok(said) => {
                    let packages: Vec<String> = simulated(&said)
                        .filter(|name| (self.keep)(name, installed.contains(*name)))
                        .map(str::to_owned)
                        .collect();
                    if packages.is_empty() {
                        bail!("apt knows {candidate} but names no package to fetch for it");
                    }
                    return Ok(packages);
                }
                Err(error) => last = Some(error),
            }
        }
        // apt calls an update without a single list a success; then the package is not the trouble.
        if update.lines().any(|line| line.starts_with("Err:")) {
            return Err(tool::failure("apt", None, update, work.log).into());
        }
        Err(last.map_or_else(
            || anyhow::anyhow!("no package to ask for"),
            |error| error.context(format!("this release has no {}", self.candidates[0])),
        ))
    }
}

/// apt on lists and caches of our own, and with no package installed.
struct Apt {
    folder: PathBuf,
}

impl Apt {
    fn new(folder: PathBuf) -> Result<Apt> {
        for name in ["lists/partial", "cache/archives/partial", "state", "log"] {
            let path = folder.join(name);
            fs::create_dir_all(&path)
                .with_context(|| format!("cannot create {}", path.display()))?;
        }
        for (name, content) in [("status", ""), ("apt.conf", CONFIGURATION)] {
            let path = folder.join(name);
            fs::write(&path, content)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(Apt { folder })
    }

    fn command(&self) -> Command {
        let mut command = Command::new("apt-get");
        // The answers are parsed.
        command.env("LC_ALL", "C");
        command.arg("-c").arg(self.folder.join("apt.conf"));
        for (key, name) in [
            ("Dir::State", "state"),
            ("Dir::State::Lists", "lists"),
            ("Dir::State::status", "status"),
            ("Dir::Cache", "cache"),
            ("Dir::Log", "log"),
        ] {
            let mut option = OsString::from(format!("{key}="));
            option.push(self.folder.join(name));
            command.arg("-o").arg(option);
        }
        command
    }

    fn stamp(&self) -> PathBuf {
        self.folder.join("updated")
    }

    fn lists_are_fresh(&self) -> bool {
        let modified = self.stamp().metadata().and_then(|meta| meta.modified());
        modified.is_ok_and(|time| time.elapsed().is_ok_and(|age| age < FRESH))
    }

    /// Some source that fails is no reason to stop: the package may come from another.
    fn update(&self, work: &mut Work) -> Result<String> {
        let stamp = self.stamp();
        let _ = fs::remove_file(&stamp);
        work.progress.no_steps();
        work.progress.show("package lists");
        match tool::run("apt", self.command().arg("update"), work.log, |_| {}) {
            Ok(said) => {
                if !said.lines().any(|line| line.starts_with("Err:")) {
                    File::create(&stamp)
                        .with_context(|| format!("cannot write {}", stamp.display()))?;
                }
                Ok(said)
            }
            Err(error) if interrupted(&error) => Err(error),
            Err(error) => match error.downcast_ref::<tool::Failure>() {
                Some(failure) => Ok(format!("Err:\n{}", failure.words.join("\n"))),
                None => Err(error),
            },
        }
    }
}

fn interrupted(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<tool::Failure>()
        .is_some_and(|failure| failure.cause == tool::Cause::Interrupted)
}

/// The packages in apt's plan, whose lines read `Inst name (version …) […]`.
fn simulated(said: &str) -> impl Iterator<Item = &str> {
    said.lines()
        .filter_map(|line| line.strip_prefix("Inst "))
        .filter_map(|rest| rest.split_whitespace().next())
}

fn system_packages(log: &mut Log) -> Result<BTreeSet<String>> {
    let mut command = Command::new("dpkg-query");
    command
        .args(["--show", "--showformat", "${db:Status-Status} ${Package}\n"])
        .stdin(Stdio::null());
    let output = command.output().context("cannot start dpkg-query")?;
    log.line(&format!("$ {command:?} ({})", output.status));
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.strip_prefix("installed "))
        .map(str::to_owned)
        .collect())
}

/// The name of the distribution's release, for a folder's name.
fn release() -> String {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let value = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .map(|value| value.trim_matches('"').to_owned())
            .filter(|value| !value.is_empty())
    };
    value("VERSION_CODENAME")
        .or_else(|| value("ID"))
        .unwrap_or_else(|| "debian".into())
        .replace(|c: char| !c.is_ascii_alphanumeric(), "-")
}

/// Packages link to absolute paths, most into /etc. Where the unpacked tree has that path, point there instead.
fn point_links_inside(folder: &Path, root: &Path) -> Result<()> {
    let context = || format!("cannot read {}", folder.display());
    for entry in fs::read_dir(folder).with_context(context)? {
        let path = entry.with_context(context)?.path();
        if path.is_symlink() {
            let target = fs::read_link(&path).with_context(context)?;
            let Ok(inner) = target.strip_prefix("/") else {
                continue;
            };
            if root.join(inner).symlink_metadata().is_err() {
                continue;
            }
            // Relative, because the tree is about to be moved.
            let depth = folder.strip_prefix(root).map_or(0, |sub| {
                sub.components()
                    .filter(|part| matches!(part, Component::Normal(_)))
                    .count()
            });
            let mut relative = PathBuf::new();
            relative.extend(std::iter::repeat_n("..", depth));
            relative.push(inner);
            fs::remove_file(&path)
                .and_then(|()| symlink(&relative, &path))
                .with_context(|| format!("cannot change the link {}", path.display()))?;
        } else if path.is_dir() {
            point_links_inside(&path, root)?;
        }
    }
    Ok(())
}

/// Erlang's start scripts name the folder that they are in.
fn move_scripts(new: &Path, target: &Path) -> Result<()> {
    const OLD: &str = "/usr/lib/erlang";
    let erlang = new.join("usr/lib/erlang");
    let Ok(entries) = fs::read_dir(&erlang) else {
        return Ok(());
    };
    let mut folders = vec![erlang.join("bin")];
    folders.extend(
        entries
            .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
            .filter(|bin| bin.is_dir()),
    );
    let moved = target.join("usr/lib/erlang");
    let moved = moved
        .to_str()
        .with_context(|| format!("{} is not UTF-8", moved.display()))?;
    for script in folders
        .iter()
        .flat_map(|bin| ["erl", "start"].map(|name| bin.join(name)))
        .filter(|script| script.is_file())
    {
        fs::read_to_string(&script)
            .and_then(|text| fs::write(&script, text.replace(OLD, moved)))
            .with_context(|| format!("cannot change {}", script.display()))?;
    }
    Ok(())
}
