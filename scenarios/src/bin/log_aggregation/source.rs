//! Where entries come from: a generator, a log file that may grow and be rotated, or standard input.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::entry::{Entry, MAX_LINE, Origin};

/// How often a followed file is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How long a file that was rotated away is still read: its writer goes on until it is told to reopen.
const AFTERLIFE: Duration = Duration::from_secs(2);
/// A file is known again by its inode and by its beginning, up to this many bytes.
const HEAD: u64 = 1024;

/// How far a source was read. It is stored in the same transaction as the entries.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// Bytes of the current file, or made-up entries, that are dealt with.
    pub offset: u64,
    /// Lines of the current file.
    pub line: u64,
    /// Parts of an overlong line that are dealt with, while in the middle of one.
    part: u32,
    file: Option<FileId>,
    /// The time of the last entry that had one.
    time: Option<String>,
}

/// Knows a file again, also under another name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct FileId {
    device: u64,
    inode: u64,
    /// A hash of the file's first `length` bytes: an inode is given to another file once it is free.
    head: u64,
    length: u64,
}

impl FileId {
    fn of(file: &File, read: u64) -> io::Result<FileId> {
        let metadata = file.metadata()?;
        let length = read.min(HEAD);
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(FileId {
            device: metadata.dev(),
            inode: metadata.ino(),
            head: hash(&bytes),
            length,
        })
    }

    /// Whether `file` begins with what was read, and is as long as that at least.
    fn is(&self, file: &File, read: u64) -> bool {
        let long_enough = file
            .metadata()
            .is_ok_and(|metadata| metadata.len() >= read && metadata.is_file());
        long_enough && FileId::of(file, self.length).is_ok_and(|found| found == *self)
    }
}

/// FNV-1a. It has to be the same in every version of this program, which the standard library's is not.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// What one batch holds, and where it ends.
pub struct Batch {
    pub entries: Vec<Entry>,
    /// Lines that ended in this batch; an overlong one is several entries.
    pub lines: u64,
    pub position: Position,
    /// Nothing follows.
    pub last: bool,
}

pub enum Source {
    Generated(Generator),
    Lines(Box<Lines>),
}

impl Source {
    pub fn next_batch(&mut self, run: &str, most: usize, linger: Duration) -> Result<Batch> {
        match self {
            Source::Generated(generator) => Ok(generator.next_batch(run, most)),
            Source::Lines(lines) => lines.next_batch(run, most, linger),
        }
    }
}

pub struct Generator {
    pub seed: u64,
    pub next: u64,
    pub entries: u64,
    /// The entries are spread over the ten minutes before, or, where they have a rate, from now on.
    pub spread: bool,
}

const SERVICES: [&str; 4] = ["api", "inventory", "payment", "shipping"];

impl Generator {
    fn next_batch(&mut self, run: &str, most: usize) -> Batch {
        let end = self.entries.min(self.next + most as u64);
        let now = Utc::now();
        let entries: Vec<Entry> = (self.next..end)
            .map(|index| self.make(run, index, now))
            .collect();
        self.next = end;
        Batch {
            lines: entries.len() as u64,
            entries,
            position: Position {
                offset: end,
                line: end,
                ..Position::default()
            },
            last: end == self.entries,
        }
    }

    /// What it says depends on the seed and the number alone.
    fn make(&self, run: &str, index: u64, now: DateTime<Utc>) -> Entry {
        let seed = self.seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut random = fastrand::Rng::with_seed(fastrand::Rng::with_seed(seed).u64(..));
        let age = if self.spread {
            TimeDelta::milliseconds((600_000 * (self.entries - index) / self.entries) as i64)
        } else {
            TimeDelta::zero()
        };
        let service = SERVICES[random.usize(0..SERVICES.len())];
        let (order, millis) = (random.u32(1..100_000), random.u32(1..900));
        // Payment has the most trouble, so that there is something to find.
        let trouble = random.u32(0..100) + if service == "payment" { 8 } else { 0 };
        let (level, message) = match trouble {
            0..30 => (
                "DEBUG",
                format!("order {order}: cache hit in {millis} microseconds"),
            ),
            30..90 => ("INFO", format!("order {order} handled in {millis} ms")),
            90..97 => (
                "WARN",
                format!("order {order} was slow: {} ms", millis + 1000),
            ),
            _ => (
                "ERROR",
                format!("order {order} failed: connection reset after {millis} ms"),
            ),
        };
        Entry::made_up(now - age, service, level, message, run)
    }
}

/// What lines come from.
enum Input {
    File {
        path: PathBuf,
        file: File,
        follow: bool,
        /// Since when another file has the path.
        replaced: Option<Instant>,
    },
    Stdin(Receiver<io::Result<Vec<u8>>>),
}

/// What has come of an attempt to read.
#[derive(PartialEq)]
enum Filled {
    Some,
    /// Nothing now.
    Nothing,
    /// Nothing more of this file or stream: what is left of a line is a line.
    End,
    /// Nothing more of this file, and another one has its name.
    Next,
    /// The file was cut short, and begins anew.
    Truncated,
}

pub struct Lines {
    name: String,
    service: String,
    input: Input,
    /// Read, and not yet an entry. It begins at the position.
    buffer: Vec<u8>,
    /// How much of the buffer was found to hold no line end.
    searched: usize,
    at: Position,
    ended: bool,
}

impl Lines {
    /// Goes on at `at` in the file at `path`, or in the file that had this path then and was renamed since.
    pub fn file(path: &Path, service: Option<&str>, follow: bool, at: Position) -> Result<Lines> {
        let name = path.display().to_string();
        let open = || File::open(path).with_context(|| format!("cannot open {name}"));
        let mut at = at;
        let file = match &at.file {
            None => open()?,
            Some(known) => match find(path, known, at.offset) {
                Some(file) => file,
                None => {
                    let file = open()?;
                    // Nothing may be missing: the last one may have been read to its end.
                    tracing::warn!(
                        "{name} is not the file of which {} bytes were ingested, and that file is not beside it: \
                         beginning at the top; what may have been added to the old one is not known",
                        at.offset
                    );
                    at = Position {
                        time: at.time.take(),
                        ..Position::default()
                    };
                    file
                }
            },
        };
        if !file.metadata()?.is_file() {
            bail!("{name} is no ordinary file; pipe it in with `-`");
        }
        (&file).seek(SeekFrom::Start(at.offset))?;
        let stem = path.file_stem().map(|stem| stem.to_string_lossy());
        let service = service.map_or_else(
            || stem.map_or_else(|| "log".into(), |stem| stem.into_owned()),
            str::to_owned,
        );
        let input = Input::File {
            path: path.to_owned(),
            file,
            follow,
            replaced: None,
        };
        Ok(Lines::new(name, service, input, at))
    }

    /// Standard input cannot be rewound: what was ingested of it is read again, compared, and left out.
    pub fn stdin(name: &str, service: Option<&str>, at: Position) -> Result<Lines> {
        let (sender, receiver) = sync_channel(16);
        let skip = at.clone();
        thread::spawn(move || {
            let mut input = io::stdin().lock();
            let forward = (|| -> io::Result<()> {
                if let Some(known) = &skip.file {
                    let mut head = vec![0; known.length as usize];
                    input.read_exact(&mut head)?;
                    if hash(&head) != known.head {
                        return Err(io::Error::other(
                            "it does not begin as it did when it was ingested in part under this --name",
                        ));
                    }
                    let rest = skip.offset - known.length;
                    let skipped = io::copy(&mut input.by_ref().take(rest), &mut io::sink())?;
                    if skipped < rest {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                loop {
                    let mut chunk = vec![0; 1 << 16];
                    let size = input.read(&mut chunk)?;
                    chunk.truncate(size);
                    if size == 0 || sender.send(Ok(chunk)).is_err() {
                        return Ok(());
                    }
                }
            })();
            if let Err(error) = forward {
                let _ = sender.send(Err(error));
            }
        });
        let service = service.unwrap_or("stdin").to_owned();
        Ok(Lines::new(
            name.to_owned(),
            service,
            Input::Stdin(receiver),
            at,
        ))
    }

    fn new(name: String, service: String, input: Input, at: Position) -> Lines {
        Lines {
            name,
            service,
            input,
            buffer: Vec::new(),
            searched: 0,
            at,
            ended: false,
        }
    }

    /// At most `most` entries, as many as there are within `linger`.
    fn next_batch(&mut self, run: &str, most: usize, linger: Duration) -> Result<Batch> {
        let deadline = Instant::now() + linger;
        let mut entries = Vec::new();
        let mut lines = 0;
        let mut size = 0;
        while !self.ended && entries.len() < most && size < 4 * MAX_LINE {
            if let Some((bytes, whole)) = self.cut(false) {
                size += bytes.len();
                lines += u64::from(whole);
                entries.push(self.entry(run, &bytes, whole));
                continue;
            }
            let name = self.name.clone();
            let filled = self
                .fill(deadline)
                .with_context(|| format!("cannot read {name}"))?;
            if filled == Filled::Nothing {
                break;
            }
            if filled == Filled::Some {
                continue;
            }
            if let Some((bytes, _)) = self.cut(true) {
                lines += 1;
                entries.push(self.entry(run, &bytes, true));
            }
            match filled {
                Filled::End => self.ended = true,
                _ => self.begin_file()?,
            }
            // A batch ends with its file, so that a position is one of one file.
            break;
        }
        if let (Input::File { file, .. }, false) = (&self.input, self.at.offset == 0) {
            let known = self.at.file.as_ref().map_or(0, |known| known.length);
            if known < HEAD.min(self.at.offset) {
                self.at.file = FileId::of(file, self.at.offset).ok();
            }
        }
        Ok(Batch {
            entries,
            lines,
            position: self.at.clone(),
            last: self.ended,
        })
    }

    /// A line out of the buffer and whether it is the end of one; what is left, if `all`.
    fn cut(&mut self, all: bool) -> Option<(Vec<u8>, bool)> {
        let end = self.buffer[self.searched..]
            .iter()
            .position(|byte| *byte == b'\n')
            .map(|at| self.searched + at);
        let (length, consumed, whole) = match end {
            Some(end) if end <= MAX_LINE => (end, end + 1, true),
            _ if self.buffer.len() > MAX_LINE => (MAX_LINE, MAX_LINE, false),
            _ if all && !self.buffer.is_empty() => (self.buffer.len(), self.buffer.len(), true),
            _ => {
                self.searched = self.buffer.len();
                return None;
            }
        };
        let bytes: Vec<u8> = self.buffer.drain(..consumed).collect();
        self.searched = 0;
        if let (Input::Stdin(_), None) = (&self.input, &self.at.file) {
            self.at.file = Some(FileId {
                device: 0,
                inode: 0,
                head: hash(&bytes[..consumed.min(HEAD as usize)]),
                length: consumed.min(HEAD as usize) as u64,
            });
        }
        self.at.offset += consumed as u64;
        let mut line = &bytes[..length];
        if whole {
            line = line.strip_suffix(b"\r").unwrap_or(line);
        }
        Some((line.to_vec(), whole))
    }

    fn entry(&mut self, run: &str, bytes: &[u8], whole: bool) -> Entry {
        let part = (!whole || self.at.part > 0).then_some(self.at.part + 1);
        let known = self.at.time.as_deref();
        let time = known
            .and_then(|time| DateTime::parse_from_rfc3339(time).ok())
            .unwrap_or_else(|| Utc::now().fixed_offset());
        let origin = Origin {
            run,
            source: &self.name,
            line: self.at.line + 1,
            part,
            service: &self.service,
            time,
        };
        // Editors on Windows put a byte-order mark before the first line.
        let line = match bytes.strip_prefix("\u{feff}".as_bytes()) {
            Some(rest) if self.at.line == 0 => rest,
            _ => bytes,
        };
        let entry = Entry::from_line(line, origin);
        if entry.parsed {
            self.at.time = Some(entry.time.to_rfc3339());
        }
        self.at.part = if whole { 0 } else { self.at.part + 1 };
        self.at.line += u64::from(whole);
        entry
    }

    fn fill(&mut self, deadline: Instant) -> io::Result<Filled> {
        match &mut self.input {
            Input::Stdin(receiver) => {
                match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                    Ok(chunk) => {
                        self.buffer.extend(chunk?);
                        Ok(Filled::Some)
                    }
                    Err(RecvTimeoutError::Timeout) => Ok(Filled::Nothing),
                    Err(RecvTimeoutError::Disconnected) => Ok(Filled::End),
                }
            }
            Input::File {
                path,
                file,
                follow,
                replaced,
            } => {
                // A file that was cut short and has grown again beyond the position begins with other lines.
                let read = self.at.offset + self.buffer.len() as u64;
                let other = self
                    .at
                    .file
                    .as_ref()
                    .is_some_and(|known| !known.is(file, self.at.offset));
                if *follow && (other || file.metadata()?.len() < read) {
                    return Ok(Filled::Truncated);
                }
                let mut chunk = vec![0; 1 << 16];
                let size = file.read(&mut chunk)?;
                if size > 0 {
                    self.buffer.extend(&chunk[..size]);
                    // Somebody writes to it still.
                    *replaced = replaced.map(|_| Instant::now());
                    return Ok(Filled::Some);
                }
                let metadata = file.metadata()?;
                let another = match fs::metadata(&*path) {
                    Ok(named) => (named.dev(), named.ino()) != (metadata.dev(), metadata.ino()),
                    // Renamed, and the new one is not there yet.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                    Err(error) => return Err(error),
                };
                match (*follow, another) {
                    (false, true) => return Ok(Filled::Next),
                    (false, false) => return Ok(Filled::End),
                    (true, true) => {
                        if replaced.get_or_insert_with(Instant::now).elapsed() > AFTERLIFE {
                            return Ok(Filled::Next);
                        }
                    }
                    (true, false) => {}
                }
                thread::sleep(LOOK.min(deadline.saturating_duration_since(Instant::now())));
                Ok(Filled::Nothing)
            }
        }
    }

    /// Begins at the top of the file that has the path now.
    fn begin_file(&mut self) -> Result<()> {
        if let Input::File {
            path,
            file,
            replaced,
            ..
        } = &mut self.input
        {
            tracing::info!("{}: rotated or cut short, reading it anew", self.name);
            *file = File::open(&*path).with_context(|| format!("cannot open {}", self.name))?;
            *replaced = None;
        }
        self.at = Position {
            time: self.at.time.take(),
            ..Position::default()
        };
        self.buffer.clear();
        self.searched = 0;
        Ok(())
    }
}

/// The known file: at `path`, or renamed in the same folder.
fn find(path: &Path, known: &FileId, read: u64) -> Option<File> {
    let is_it = |path: &Path| {
        let metadata = fs::metadata(path).ok()?;
        if (metadata.dev(), metadata.ino()) != (known.device, known.inode) {
            return None;
        }
        File::open(path).ok().filter(|file| known.is(file, read))
    };
    is_it(path).or_else(|| {
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        let entries = fs::read_dir(folder.unwrap_or(Path::new("."))).ok()?;
        entries.flatten().find_map(|entry| is_it(&entry.path()))
    })
}
