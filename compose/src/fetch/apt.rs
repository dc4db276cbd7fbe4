//! Debian packages without root: apt works out the closure and fetches it, dpkg-deb unpacks it into the cache.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::install::{self, Recipe, Work};
use super::tool::{self, Log, is_interrupt};
use super::{Advice, Source};
use crate::files;
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
pub(crate) fn available() -> bool {
    ["apt-get", "dpkg-deb", "dpkg-query"]
        .iter()
        .all(|name| tool::which(name).is_some())
}

/// A program that comes as Debian packages.
pub(crate) struct Packages {
    pub(crate) name: &'static str,
    pub(crate) label: &'static str,
    /// Another release of Debian that they are of, instead of this machine's.
    pub(crate) suite: Option<Suite>,
    /// The package to ask for; the first that the release has.
    pub(crate) candidates: &'static [&'static str],
    /// Which packages of the closure are unpacked; `is_installed` if the system has it.
    pub(crate) keep: fn(package: &str, is_installed: bool) -> bool,
    /// What the packages' installation scripts would have done, given the folder, and the one that it will be.
    pub(crate) finish: fn(root: &Path, target: &Path) -> Result<()>,
}

/// A release of Debian.
#[derive(Clone, Copy)]
pub(crate) struct Suite {
    pub(crate) codename: &'static str,
    pub(crate) number: u32,
}

impl Suite {
    /// Whether this machine runs an older release of Debian.
    pub(crate) fn is_newer_than_this(self) -> bool {
        let number = os_release("VERSION_ID").and_then(|number| number.parse().ok());
        os_release("ID").as_deref() == Some("debian")
            && number.is_some_and(|number: u32| number < self.number)
    }

    /// The machine's own mirrors, asked for this release.
    fn sources(self) -> Result<String> {
        let keyring = ["gpg", "pgp"]
            .map(|end| format!("/usr/share/keyrings/debian-archive-keyring.{end}"))
            .into_iter()
            .find(|path| Path::new(path).exists())
            .context(
                "the keys of Debian's archive are not here (package debian-archive-keyring)",
            )?;
        let output = Command::new("apt-get")
            .args(["indextargets", "Created-By: Packages", "Component: main"])
            // Also of a machine that has not fetched its lists.
            .args(["--no-release-info", "--format", "$(REPO_URI) $(RELEASE)"])
            .stdin(Stdio::null())
            .output()
            .context("cannot start apt-get")?;
        let own = os_release("VERSION_CODENAME").unwrap_or_default();
        let said = String::from_utf8_lossy(&output.stdout);
        let lines: BTreeSet<String> = said
            .lines()
            .filter_map(|line| line.split_once(' '))
            // bookworm, stable, bookworm-updates, bookworm-security
            .filter_map(|(mirror, release)| {
                let names = [own.as_str(), "stable", "oldstable", "oldoldstable"];
                let part = names.iter().find_map(|name| release.strip_prefix(name))?;
                (part.is_empty() || part.starts_with('-')).then_some((mirror, part))
            })
            .map(|(mirror, part)| {
                format!(
                    "deb [signed-by={keyring}] {mirror} {}{part} main\n",
                    self.codename
                )
            })
            .collect();
        ensure!(
            !lines.is_empty(),
            "apt has no mirror of {own}, which {} could come from as well",
            self.codename
        );
        Ok(lines.into_iter().collect())
    }
}

impl Packages {
    fn recipe(&self, home: &Home) -> Recipe {
        // What was left out because the system has it must come from the same release.
        let release = self
            .suite
            .map_or_else(release, |suite| suite.codename.to_owned());
        let id = format!("{}-{release}", self.name);
        // Scripts in some packages must be told where they are.
        let target = home.programs().join(&id);
        let foreign = self.suite.is_some();
        Recipe {
            label: self.label.to_owned(),
            by: "from Debian packages",
            // The number is to be raised whenever `keep` or `finish` of some packages changes.
            inputs: format!("3\n{:?}\n{foreign}\n{}", self.candidates, target.display()),
            id,
        }
    }

    /// Where they come from.
    pub(crate) fn source(&self, home: &Home, advice: Advice) -> Source {
        match install::installed(home, &self.recipe(home)) {
            Some(root) => Source::Cache(root),
            None if available() => Source::Debian,
            None => Source::Missing(advice),
        }
    }

    pub(crate) fn install(&self, home: &Home) -> Result<PathBuf> {
        install::install(home, &self.recipe(home), |work| self.unpack(home, work))
    }

    fn unpack(&self, home: &Home, work: &mut Work) -> Result<()> {
        let (name, sources) = match self.suite {
            Some(suite) => (format!(".apt-{}", suite.codename), Some(suite.sources()?)),
            None => (".apt".to_owned(), None),
        };
        let folder = home.programs().join(name);
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let lock = install::lock(
            &folder.join("lock"),
            "other packages are being fetched: waiting for them",
        )?;
        let apt = Apt::new(folder, sources)?;
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
        if fresh && outcome.as_ref().is_err_and(|error| !is_interrupt(error)) {
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
            tool::run("dpkg-deb", &command, work.log, |_| {})?;
            work.progress.step();
        }
        point_links_inside(&work.new)?;
        (self.finish)(&work.new, &work.target)
    }

    fn download(&self, apt: &Apt, debs: &Path, work: &mut Work, update: &str) -> Result<()> {
        let packages = self.closure(apt, work, update)?;
        work.progress.steps(packages.len());
        work.progress.show("packages");
        let progress = work.progress;
        let mut command = apt.command();
        command.arg("download").args(&packages).current_dir(debs);
        tool::run("apt", &command, work.log, |line| {
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
            match tool::run("apt", &command, work.log, |_| {}) {
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
        let error = last.context("no package to ask for")?;
        Err(error.context(format!("apt finds no {}", self.candidates[0])))
    }
}

/// apt on lists and caches of our own, and with no package installed.
struct Apt {
    folder: PathBuf,
    /// Instead of the machine's sources.
    sources: Option<PathBuf>,
}

impl Apt {
    fn new(folder: PathBuf, sources: Option<String>) -> Result<Apt> {
        for name in ["lists/partial", "cache/archives/partial", "state", "log"] {
            let path = folder.join(name);
            fs::create_dir_all(&path)
                .with_context(|| format!("cannot create {}", path.display()))?;
        }
        let write = |name: &str, content: &str| {
            let path = folder.join(name);
            fs::write(&path, content)
                .with_context(|| format!("cannot write {}", path.display()))?;
            anyhow::Ok(path)
        };
        write("status", "")?;
        write("apt.conf", CONFIGURATION)?;
        let sources = sources
            .map(|text| write("sources.list", &text))
            .transpose()?;
        Ok(Apt { folder, sources })
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
        if let Some(sources) = &self.sources {
            command
                .arg("-o")
                .arg(format!("Dir::Etc::SourceList={}", sources.display()));
            command.args(["-o", "Dir::Etc::SourceParts=/dev/null"]);
            command.args(["-o", "APT::Default-Release="]);
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
            Err(error) if is_interrupt(&error) => Err(error),
            Err(error) => match error.downcast_ref::<tool::Failure>() {
                Some(failure) => Ok(format!("Err:\n{}", failure.words.join("\n"))),
                None => Err(error),
            },
        }
    }
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
    os_release("VERSION_CODENAME")
        .or_else(|| os_release("ID"))
        .unwrap_or_else(|| "debian".into())
        .replace(|c: char| !c.is_ascii_alphanumeric(), "-")
}

fn os_release(key: &str) -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
    let value = value.trim_matches('"');
    (!value.is_empty()).then(|| value.to_owned())
}

/// Packages link to absolute paths, most into /etc. Where the unpacked tree has that path, point there instead.
fn point_links_inside(root: &Path) -> Result<()> {
    for path in files::all_in(root)? {
        let Ok(target) = fs::read_link(&path) else {
            continue;
        };
        let Ok(inner) = target.strip_prefix("/") else {
            continue;
        };
        if root.join(inner).symlink_metadata().is_err() {
            continue;
        }
        // Relative, because the tree is about to be moved: as many folders up as the link is below the root.
        let depth = path.components().count() - root.components().count() - 1;
        let mut relative: PathBuf = std::iter::repeat_n("..", depth).collect();
        relative.push(inner);
        fs::remove_file(&path)
            .and_then(|()| symlink(&relative, &path))
            .with_context(|| format!("cannot change the link {}", path.display()))?;
    }
    Ok(())
}

/// Where unpacked packages have their libraries: `usr/lib/x86_64-linux-gnu` and its like.
pub(crate) fn library_folders(root: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(root.join("usr/lib"))
        .with_context(|| format!("cannot read {}", root.display()))?;
    let paths = entries.flatten().map(|entry| entry.path());
    let is_for_a_machine = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().contains("-linux-")
    };
    Ok(paths.filter(is_for_a_machine).collect())
}
