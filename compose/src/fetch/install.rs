//! Makes an installation all or nothing: fetched aside, listed with sizes, moved into place in one step.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::tool::Log;
use crate::files;
use crate::home::Home;
use crate::terminal::{Progress, say};

/// Lists what an installed folder must hold. It is written last, before the folder is moved into place.
const MANIFEST: &str = ".manifest.json";

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    /// Changes when the way to fetch changes, so that an old folder of the same version is not taken.
    inputs: String,
    /// The size of each file in bytes; of a link, that of its text.
    files: BTreeMap<String, u64>,
}

/// What is to be installed.
pub(super) struct Recipe {
    /// The folder's name, with the version in it.
    pub(super) id: String,
    /// What the reader calls it.
    pub(super) label: String,
    /// How it comes, for the progress line: `by Maven`.
    pub(super) by: &'static str,
    /// Everything that decides the result: a pom, a package list.
    pub(super) inputs: String,
}

/// What a fetch has to work with.
pub(super) struct Work<'a> {
    /// Stays if the fetch fails, so that a tool that can resume does.
    pub(super) partial: PathBuf,
    /// Empty at the start; becomes the installed folder.
    pub(super) new: PathBuf,
    /// Where `new` will stand in the end.
    pub(super) target: PathBuf,
    pub(super) progress: &'a Progress,
    pub(super) log: &'a mut Log,
}

enum State {
    Absent,
    Complete,
    Damaged(Vec<String>),
}

/// The folder of a program if it is installed and whole, judged by names and sizes.
pub(super) fn installed(home: &Home, recipe: &Recipe) -> Option<PathBuf> {
    let dir = home.programs().join(&recipe.id);
    matches!(state(&dir, &recipe.inputs), State::Complete).then_some(dir)
}

/// The folder of a program, fetched if it is not there or not whole.
pub(super) fn install(
    home: &Home,
    recipe: &Recipe,
    fetch: impl FnOnce(&mut Work) -> Result<()>,
) -> Result<PathBuf> {
    if let Some(dir) = installed(home, recipe) {
        return Ok(dir);
    }
    home.check()?;
    let programs = home.programs();
    let target = programs.join(&recipe.id);
    let lock = lock(
        &programs.join(format!(".{}.lock", recipe.id)),
        &format!("{} is being fetched already: waiting for it", recipe.label),
    )?;
    let damage = match state(&target, &recipe.inputs) {
        State::Complete => return Ok(target),
        State::Absent => None,
        State::Damaged(files) => Some(describe(&files)),
    };
    if let Some(damage) = &damage {
        say!(
            "{} in the cache is damaged ({damage}): fetching it again",
            recipe.label
        );
    }

    let result = fetch_aside(home, recipe, &target, fetch);
    drop(lock);
    match (result, damage) {
        (Ok(()), _) => Ok(target),
        (Err(error), None) => Err(error.context(format!("cannot fetch {}", recipe.label))),
        (Err(error), Some(damage)) => Err(error.context(format!(
            "{} is damaged ({damage}) and could not be fetched again; it is in {}, which may be deleted",
            recipe.label,
            target.display()
        ))),
    }
}

fn fetch_aside(
    home: &Home,
    recipe: &Recipe,
    target: &Path,
    fetch: impl FnOnce(&mut Work) -> Result<()>,
) -> Result<()> {
    let programs = home.programs();
    let partial = programs.join(format!(".partial-{}", recipe.id));
    // A tool of a process that was killed may still be at work for a moment, on the name of that process.
    let new = partial.join(format!("new-{}", std::process::id()));
    remove_older(&partial)?;
    fs::create_dir_all(&new).with_context(|| format!("cannot create {}", new.display()))?;
    let mut log = Log::create(home.logs().join(format!("fetch-{}.log", recipe.id)))?;
    let title = format!("fetching {} {}", recipe.label, recipe.by);
    let progress = Progress::titled(&recipe.label, &title);

    fetch(&mut Work {
        partial: partial.clone(),
        new: new.clone(),
        target: target.to_owned(),
        progress: &progress,
        log: &mut log,
    })?;

    progress.no_steps();
    progress.show("listing what came");
    let manifest = Manifest {
        inputs: recipe.inputs.clone(),
        files: list(&new)?,
    };
    if manifest.files.is_empty() {
        bail!("nothing came");
    }
    let path = new.join(MANIFEST);
    fs::write(&path, serde_json::to_vec_pretty(&manifest)?)
        .with_context(|| format!("cannot write {}", path.display()))?;

    // A broker may be running from the old folder; what it holds open stays until it ends.
    let old = programs.join(format!(".old-{}", recipe.id));
    remove(&old)?;
    if target.exists() {
        fs::rename(target, &old).with_context(|| format!("cannot replace {}", target.display()))?;
    }
    fs::rename(&new, target).with_context(|| format!("cannot create {}", target.display()))?;
    remove(&old)?;
    remove(&partial)?;
    let bytes = manifest.files.values().sum::<u64>();
    progress.done(&format!(
        "fetched {}: {} files, {:.0} MB,",
        recipe.label,
        manifest.files.len(),
        bytes as f64 / 1e6
    ));
    Ok(())
}

/// Takes a lock that the system gives back when this process ends, however it ends.
pub(super) fn lock(path: &Path, waiting: &str) -> Result<File> {
    let context = || format!("cannot lock {}", path.display());
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(context)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            say!("{waiting}");
            file.lock().with_context(context)?;
        }
        Err(TryLockError::Error(error)) => return Err(error).with_context(context),
    }
    Ok(file)
}

/// Compares names and sizes with the manifest: quick enough for every start.
fn state(dir: &Path, inputs: &str) -> State {
    if !dir.exists() {
        return State::Absent;
    }
    let Ok(text) = fs::read(dir.join(MANIFEST)) else {
        return State::Damaged(vec![format!("{MANIFEST}: missing")]);
    };
    // One of another form is of an older way to fetch.
    let Ok(manifest) = serde_json::from_slice::<Manifest>(&text) else {
        return State::Absent;
    };
    if manifest.inputs != inputs {
        return State::Absent;
    }
    let damaged: Vec<String> = manifest
        .files
        .iter()
        .filter_map(|(name, size)| match dir.join(name).symlink_metadata() {
            Ok(meta) if meta.is_dir() => Some(format!("{name}: not a file")),
            Ok(meta) if meta.len() != *size => {
                Some(format!("{name}: {} of {size} bytes", meta.len()))
            }
            Ok(_) => None,
            Err(_) => Some(format!("{name}: missing")),
        })
        .collect();
    if damaged.is_empty() {
        State::Complete
    } else {
        State::Damaged(damaged)
    }
}

/// Every file and link under a folder with its size.
fn list(dir: &Path) -> Result<BTreeMap<String, u64>> {
    let sizes = files::all_in(dir)?.into_iter().map(|path| {
        let name = path.strip_prefix(dir).unwrap_or(&path).to_str();
        let name = name.with_context(|| format!("the name of {} is not UTF-8", path.display()))?;
        let meta = path.symlink_metadata();
        let meta = meta.with_context(|| format!("cannot read {}", path.display()))?;
        Ok((name.to_owned(), meta.len()))
    });
    sizes.collect()
}

fn describe(files: &[String]) -> String {
    const MOST: usize = 5;
    let mut text = files[..files.len().min(MOST)].join(", ");
    if files.len() > MOST {
        text.push_str(&format!(" and {} more", files.len() - MOST));
    }
    text
}

/// Deletes what earlier attempts had unpacked or copied; what they had downloaded stays.
fn remove_older(partial: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(partial) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with("new-") {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Deletes a folder; one that is not there is deleted already.
pub(super) fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot delete {}", dir.display()))
        }
        _ => Ok(()),
    }
}
