//! Makes an installation all or nothing: fetched aside, listed with hashes, moved into place in one step.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::tool::{Log, Progress, say};
use crate::home::Home;

/// Lists what an installed folder must hold. It is written last, before the folder is moved into place.
const MANIFEST: &str = ".manifest.json";

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    /// Changes when the way to fetch changes, so that an old folder of the same version is not taken.
    recipe: String,
    files: BTreeMap<String, Entry>,
}

#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(untagged)]
enum Entry {
    File { size: u64, sha256: String },
    Link { target: String },
}

/// What is to be installed.
pub(super) struct Recipe<'a> {
    /// The folder's name, with the version in it.
    pub(super) id: &'a str,
    /// What the reader calls it.
    pub(super) label: &'a str,
    /// By which tool it comes, for the progress line.
    pub(super) by: &'a str,
    /// Everything that decides the result: a pom, a package list.
    pub(super) inputs: &'a str,
}

impl Recipe<'_> {
    fn fingerprint(&self) -> String {
        hex(&Sha256::digest(self.inputs.as_bytes()))
    }
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
    let dir = home.programs().join(recipe.id);
    matches!(state(&dir, &recipe.fingerprint()), State::Complete).then_some(dir)
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
    let target = programs.join(recipe.id);
    let lock = lock(
        &programs.join(format!(".{}.lock", recipe.id)),
        &format!("{} is being fetched already: waiting for it", recipe.label),
    )?;
    let damage = match state(&target, &recipe.fingerprint()) {
        State::Complete => return Ok(target),
        State::Absent => None,
        State::Damaged(files) => Some(describe(&files)),
    };
    if let Some(damage) = &damage {
        say(&format!(
            "{} in the cache is damaged ({damage}): fetching it again",
            recipe.label
        ));
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
    let progress = Progress::start(recipe.label, recipe.by);

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
        recipe: recipe.fingerprint(),
        files: list(&new)?,
    };
    if manifest.files.is_empty() {
        bail!("{} brought no files", recipe.by);
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
    let bytes = manifest.files.values().map(Entry::size).sum::<u64>();
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
            say(waiting);
            file.lock().with_context(context)?;
        }
        Err(TryLockError::Error(error)) => return Err(error).with_context(context),
    }
    Ok(file)
}

/// Compares names and sizes with the manifest: quick enough for every start.
fn state(dir: &Path, recipe: &str) -> State {
    if !dir.exists() {
        return State::Absent;
    }
    let manifest = match read_manifest(dir) {
        Ok(manifest) => manifest,
        Err(_) => return State::Damaged(vec![format!("{MANIFEST}: missing or unreadable")]),
    };
    if manifest.recipe != recipe {
        return State::Absent;
    }
    let damaged: Vec<String> = manifest
        .files
        .iter()
        .filter_map(|(name, entry)| entry.quick_fault(&dir.join(name), name))
        .collect();
    if damaged.is_empty() {
        State::Complete
    } else {
        State::Damaged(damaged)
    }
}

/// Reads every byte and compares hashes; the error names the files that differ.
pub(super) fn verify(dir: &Path) -> Result<()> {
    let manifest = read_manifest(dir)?;
    let entries: Vec<(&String, &Entry)> = manifest.files.iter().collect();
    let damaged: Vec<String> = in_parallel(&entries, |(name, entry)| {
        let path = dir.join(name);
        if let Some(fault) = entry.quick_fault(&path, name) {
            return Some(fault);
        }
        match entry {
            Entry::Link { .. } => None,
            Entry::File { sha256, .. } => match hash(&path) {
                Ok(found) if found == *sha256 => None,
                Ok(_) => Some(format!("{name}: content differs")),
                Err(error) => Some(format!("{name}: {error}")),
            },
        }
    })
    .into_iter()
    .flatten()
    .collect();
    if !damaged.is_empty() {
        bail!(
            "{} is damaged ({}): delete the folder, it is fetched again when needed",
            dir.display(),
            describe(&damaged)
        );
    }
    Ok(())
}

fn read_manifest(dir: &Path) -> Result<Manifest> {
    let path = dir.join(MANIFEST);
    let bytes = fs::read(&path).with_context(|| {
        format!(
            "{} is not a folder that was fetched: cannot read {MANIFEST}",
            dir.display()
        )
    })?;
    serde_json::from_slice(&bytes).with_context(|| format!("cannot understand {}", path.display()))
}

impl Entry {
    fn size(&self) -> u64 {
        match self {
            Entry::File { size, .. } => *size,
            Entry::Link { .. } => 0,
        }
    }

    fn quick_fault(&self, path: &Path, name: &str) -> Option<String> {
        match self {
            Entry::File { size, .. } => match path.symlink_metadata() {
                Ok(meta) if !meta.is_file() => Some(format!("{name}: not a file")),
                Ok(meta) if meta.len() != *size => {
                    Some(format!("{name}: {} of {size} bytes", meta.len()))
                }
                Ok(_) => None,
                Err(_) => Some(format!("{name}: missing")),
            },
            Entry::Link { target } => match fs::read_link(path) {
                Ok(found) if found.as_os_str() == target.as_str() => None,
                _ => Some(format!("{name}: not a link to {target}")),
            },
        }
    }
}

/// Every file and link under a folder with its hash.
fn list(dir: &Path) -> Result<BTreeMap<String, Entry>> {
    let mut names = Vec::new();
    walk(dir, dir, &mut names)?;
    in_parallel(&names, |name| -> Result<(String, Entry)> {
        let path = dir.join(name);
        let context = || format!("cannot read {}", path.display());
        let meta = path.symlink_metadata().with_context(context)?;
        let entry = if meta.is_symlink() {
            let target = fs::read_link(&path).with_context(context)?;
            Entry::Link {
                target: target.to_string_lossy().into_owned(),
            }
        } else {
            Entry::File {
                size: meta.len(),
                sha256: hash(&path).with_context(context)?,
            }
        };
        Ok((name.clone(), entry))
    })
    .into_iter()
    .collect()
}

fn walk(dir: &Path, base: &Path, names: &mut Vec<String>) -> Result<()> {
    let context = || format!("cannot read {}", dir.display());
    for entry in fs::read_dir(dir).with_context(context)? {
        let entry = entry.with_context(context)?;
        let path = entry.path();
        if entry.file_type().with_context(context)?.is_dir() {
            walk(&path, base, names)?;
        } else {
            let name = path.strip_prefix(base).unwrap_or(&path);
            match name.to_str() {
                Some(name) => names.push(name.to_owned()),
                None => bail!("the name of {} is not UTF-8", path.display()),
            }
        }
    }
    Ok(())
}

/// Hashing is the slow part; the order of the results is that of the items.
fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(8);
    let next = AtomicUsize::new(0);
    let (next, work) = (&next, &work);
    let mut results: Vec<(usize, R)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(move || {
                    let mut mine = Vec::new();
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(item) = items.get(index) else {
                            return mine;
                        };
                        mine.push((index, work(item)));
                    }
                })
            })
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| match worker.join() {
                Ok(mine) => mine,
                Err(panic) => std::panic::resume_unwind(panic),
            })
            .collect()
    });
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

fn hash(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..count]);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
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
