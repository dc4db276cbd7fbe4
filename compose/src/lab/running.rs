//! Which brokers and examples run under `cargo lab`, who owns each, and how to ask the owner for something.
//!
//! The owner holds a lock on a file for as long as it lives, so a crash cannot leave a claim behind; what it writes beside
//! the lock is believed only while the lock is held. Orders go to the owner over a Unix socket: only it can start its
//! broker again, and only it knows for sure that a process id is still that of its child.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Service;
use crate::broker::Access;
use crate::home::Home;
use crate::security::{self, without_password};

/// What the owner of a broker says of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// The owner's process id.
    pub(super) owner: u32,
    /// The command that the owner is, such as `up --detach`, or `run` with the name of an example.
    #[serde(default)]
    pub(super) command: String,
    /// `native`, `docker` or `mock`.
    pub(super) backend: String,
    /// The version of what runs, if it is known.
    pub(super) version: Option<String>,
    /// The environment that an example needs to find the broker.
    pub(super) env: Vec<(String, String)>,
    /// The web consoles.
    pub(super) web: Vec<String>,
    /// If it is secured: how to connect.
    #[serde(default)]
    pub(super) access: Vec<Access>,
    /// Its nodes.
    pub(super) nodes: Vec<EntryNode>,
    /// Where it stores.
    pub(super) folder: PathBuf,
    /// Where the owner takes orders.
    pub(super) socket: PathBuf,
}

impl Entry {
    /// The address in the form of the service's environment variable.
    pub(super) fn address(&self) -> &str {
        self.env.first().map_or("", |(_, address)| address)
    }

    /// The address, the consoles and the version; if it is secured, how to connect in further lines.
    pub(super) fn describe(&self) -> String {
        let mut text = without_password(self.address());
        for web in &self.web {
            text += &format!("   {web}");
        }
        if let Some(version) = &self.version {
            text += &format!("   version {version}");
        }
        if self.backend != "native" {
            text += &format!("   ({})", self.backend);
        }
        for access in &self.access {
            text += &format!("\n  {}: . '{}'", access.title, access.file);
            for export in &access.exports {
                text += &format!("\n    {export}");
            }
        }
        text
    }
}

/// One node of an [`Entry`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct EntryNode {
    /// From 1.
    pub(super) number: u16,
    /// Its process, while there is one.
    pub(super) pid: Option<u32>,
    /// `running`, `paused` or `ended`.
    pub(super) state: String,
    /// The file with its output.
    pub(super) log: PathBuf,
}

/// An example that a `lab run` has started, in the words of that `lab run`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Run {
    /// The example.
    pub(super) name: String,
    /// From 1, in the order of their starts, for those of the same example that run at the same time.
    pub(super) number: u16,
    /// What it was started with.
    pub(super) args: Vec<String>,
    /// The example's process.
    pub(super) pid: u32,
    /// `running` or `paused`.
    pub(super) state: String,
    /// The process id of the `lab run`.
    pub(super) owner: u32,
    /// Where the owner takes orders.
    pub(super) socket: PathBuf,
}

/// An order to the owner of a broker or of an example.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verb {
    /// SIGKILL a node or an example.
    Kill,
    /// SIGSTOP a node or an example.
    Pause,
    /// SIGCONT a node or an example.
    Resume,
    /// Start a node again on its storage.
    Restart,
    /// Stop the service.
    Down,
}

/// What is sent over the socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Order {
    /// What to do.
    pub(super) verb: Verb,
    /// With which service or example, by name.
    pub(super) service: String,
    /// With which node, or which run of the example.
    pub(super) node: u16,
}

/// The right to run something of this name under this `LAB_HOME`, held until dropped: a lock, and beside it the file
/// that is believed for as long as the lock is held.
#[derive(Debug)]
pub(super) struct Lease {
    entry: PathBuf,
    _lock: File,
}

impl Lease {
    /// For a service. `None` if another process holds it.
    pub(super) fn of_service(home: &Home, service: Service) -> Result<Option<Lease>> {
        Lease::acquire(&run_folder(home)?, service.name())
    }

    /// For one more run of an example, and its number: the one after the highest that is in use. So the numbers tell who
    /// started first, and none changes while its example runs.
    pub(super) fn of_run(home: &Home, name: &str) -> Result<(Lease, u16)> {
        let folder = run_folder(home)?;
        let mut number = 1;
        for (other, used) in numbers(&folder)? {
            if other == name && used >= number && is_held(&folder, &run_name(name, used))? {
                number = used + 1;
            }
        }
        loop {
            // Another one may be faster by a moment.
            if let Some(lease) = Lease::acquire(&folder, &run_name(name, number))? {
                return Ok((lease, number));
            }
            number += 1;
        }
    }

    fn acquire(folder: &Path, name: &str) -> Result<Option<Lease>> {
        let lock = open_lock(&folder.join(format!("{name}.lock")))?;
        // Others take the lock for a moment to see whether it is held.
        let deadline = Instant::now() + Duration::from_millis(300);
        while matches!(lock.try_lock(), Err(TryLockError::WouldBlock)) && Instant::now() < deadline
        {
            std::thread::sleep(Duration::from_millis(10));
        }
        match lock.try_lock() {
            Ok(()) => {
                let entry = folder.join(format!("{name}.json"));
                // Left by an owner that was killed.
                let _ = fs::remove_file(&entry);
                Ok(Some(Lease { entry, _lock: lock }))
            }
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => {
                Err(error).context("cannot lock the list of what runs")
            }
        }
    }

    /// Says to all what runs. Readers see the old text or the new one, never half of it.
    pub(super) fn publish(&self, entry: &impl Serialize) -> Result<()> {
        let new = self.entry.with_extension("new");
        // There may be a password in an address.
        security::write(&new, &serde_json::to_string_pretty(entry)?)?;
        fs::rename(&new, &self.entry)
            .with_context(|| format!("cannot write {}", self.entry.display()))
    }

    /// From now on nobody takes it for something that runs. Others wait until the lease is given up.
    pub(super) fn withdraw(&self) {
        let _ = fs::remove_file(&self.entry);
    }

    /// The file that says to all what runs.
    pub(super) fn file(&self) -> &Path {
        &self.entry
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.withdraw();
    }
}

/// What the holder of a lease has published. Right after it took the lock it may not have: that counts as none.
fn read<T: DeserializeOwned>(folder: &Path, name: &str) -> Result<Option<T>> {
    if !is_held(folder, name)? {
        return Ok(None);
    }
    match fs::read(folder.join(format!("{name}.json"))) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text).with_context(|| {
            format!("{name}.json in {} is damaged", folder.display())
        })?)),
        Err(_) => Ok(None),
    }
}

fn is_held(folder: &Path, name: &str) -> Result<bool> {
    let lock = open_lock(&folder.join(format!("{name}.lock")))?;
    Ok(lock.try_lock_shared().is_err())
}

/// The examples that run now, by name and number.
pub(super) fn runs(home: &Home) -> Result<Vec<Run>> {
    let folder = run_folder(home)?;
    let mut runs = Vec::new();
    for (name, number) in numbers(&folder)? {
        runs.extend(read::<Run>(&folder, &run_name(&name, number))?);
    }
    runs.sort_by(|a, b| (&a.name, a.number).cmp(&(&b.name, b.number)));
    Ok(runs)
}

fn run_name(example: &str, number: u16) -> String {
    format!("{example}.{number}")
}

/// The runs, of now and of before, that have left a file: `kafka_admin.2.lock` is the second of `kafka_admin`.
fn numbers(folder: &Path) -> Result<Vec<(String, u16)>> {
    let files =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let parse = |file: fs::DirEntry| {
        let file = file.file_name().into_string().ok()?;
        let (name, number) = file.strip_suffix(".lock")?.rsplit_once('.')?;
        Some((name.to_owned(), number.parse().ok()?))
    };
    Ok(files.flatten().filter_map(parse).collect())
}

/// What the service's owner says, if it has one that lives. Right after its start the owner may not have said anything
/// yet: that counts as none.
pub(super) fn find(home: &Home, service: Service) -> Result<Option<Entry>> {
    read(&run_folder(home)?, service.name())
}

/// Whether some process owns the service, be it ready or still starting.
pub(super) fn is_owned(home: &Home, service: Service) -> Result<bool> {
    is_held(&run_folder(home)?, service.name())
}

/// Waits until a service that another process is starting has been published, and returns `None` if its owner gave up.
pub(super) fn await_entry(home: &Home, service: Service, limit: Duration) -> Result<Option<Entry>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(entry) = find(home, service)? {
            return Ok(Some(entry));
        }
        if !is_owned(home, service)? {
            return Ok(None);
        }
        if Instant::now() > deadline {
            bail!(
                "another lab has been starting {service} for {} seconds",
                limit.as_secs()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Sends the order to the owner, which listens at `socket`, and waits until it is carried out.
pub(super) fn send(owner: u32, socket: &Path, order: &Order) -> Result<()> {
    let mut stream = UnixStream::connect(socket).with_context(|| {
        format!(
            "process {owner}, which runs {}, does not answer",
            order.service
        )
    })?;
    writeln!(stream, "{}", serde_json::to_string(order)?)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    match answer.trim_end() {
        "ok" => Ok(()),
        "" => bail!(
            "process {owner}, which runs {}, ended without an answer",
            order.service
        ),
        error => Err(anyhow!(
            "{}",
            serde_json::from_str::<String>(error).unwrap_or_else(|_| error.to_owned())
        )),
    }
}

/// Where an owner takes orders. The file goes with it.
#[derive(Debug)]
pub(super) struct Desk {
    /// To be told to others, in [`Entry::socket`].
    pub(super) path: PathBuf,
    listener: UnixListener,
}

impl Desk {
    /// Opens the desk of this process.
    pub(super) fn open(home: &Home) -> Result<Desk> {
        let folder = run_folder(home)?;
        // Owners that were killed left theirs.
        for path in fs::read_dir(&folder)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
        {
            if path.extension().is_some_and(|end| end == "sock")
                && UnixStream::connect(&path).is_err()
            {
                let _ = fs::remove_file(&path);
            }
        }
        let name = format!("lab-{}.sock", std::process::id());
        let mut path = folder.join(&name);
        // The system's limit for the path of a socket is about a hundred bytes.
        if path.as_os_str().len() > 100 {
            path = std::env::temp_dir().join(&name);
        }
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)
            .with_context(|| format!("cannot make the socket {}", path.display()))?;
        Ok(Desk { path, listener })
    }

    /// Answers orders, one after the other, for as long as the process lives. `busy` is locked from the moment an order
    /// comes until it has been answered.
    pub(super) fn serve(self, busy: &Mutex<()>, mut handle: impl FnMut(Order) -> Result<()>) {
        for stream in self.listener.incoming().flatten() {
            let _busy = busy.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = answer(stream, &mut handle);
        }
    }
}

fn answer(mut stream: UnixStream, handle: &mut impl FnMut(Order) -> Result<()>) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut line = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut line)?;
    let result = serde_json::from_str(&line)
        .context("not an order")
        .and_then(handle);
    match result {
        Ok(()) => writeln!(stream, "ok")?,
        Err(error) => writeln!(stream, "{}", serde_json::to_string(&format!("{error:#}"))?)?,
    }
    Ok(())
}

fn run_folder(home: &Home) -> Result<PathBuf> {
    let folder = home.run();
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

fn open_lock(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))
}
