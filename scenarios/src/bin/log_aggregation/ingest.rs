//! Writing entries to Kafka, each once, even when this process is killed and started again.
//!
//! How far a source was read goes to Kafka in the same transaction as the entries, so the two cannot
//! disagree. It is what Kafka Connect does for its exactly-once sources.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rdkafka::Message;
use serde::{Deserialize, Serialize};

use crate::kafka::{self, Kafka, Link, Offsets, Outgoing, RUN, Transactions};
use crate::shutdown::Stop;
use crate::source::{Batch, Generator, Lines, Position, Source};

/// How many entries, and how long a wait for them, make one transaction.
const BATCH: usize = 1000;
const LINGER: Duration = Duration::from_millis(50);

/// What to ingest.
#[derive(Clone)]
pub enum What {
    Generated {
        entries: u64,
        seed: u64,
        rate: Option<u64>,
    },
    File {
        path: PathBuf,
        service: Option<String>,
        follow: bool,
    },
    Stdin {
        name: Option<String>,
        service: Option<String>,
    },
}

impl What {
    /// The same arguments mean the same source, and so the same position.
    fn key(&self) -> Result<String> {
        Ok(match self {
            What::Generated { entries, seed, .. } => format!("{entries} entries, seed {seed}"),
            What::File { path, .. } => {
                let path = path
                    .canonicalize()
                    .with_context(|| format!("cannot open {}", path.display()))?;
                format!("file {}", path.display())
            }
            What::Stdin {
                name: Some(name), ..
            } => format!("stdin {name}"),
            What::Stdin { name: None, .. } => format!("stdin of {}", new_run()),
        })
    }

    fn open(&self, at: &Position) -> Result<Source> {
        Ok(match self {
            What::Generated {
                entries,
                seed,
                rate,
            } => Source::Generated(Generator {
                seed: *seed,
                next: at.offset,
                entries: *entries,
                spread: rate.is_none(),
            }),
            What::File {
                path,
                service,
                follow,
            } => Source::Lines(Box::new(Lines::file(
                path,
                service.as_deref(),
                *follow,
                at.clone(),
            )?)),
            What::Stdin { name, service } => {
                let name = name.as_deref().unwrap_or("-");
                let service = service.as_deref();
                Source::Lines(Box::new(Lines::stdin(name, service, at.clone())?))
            }
        })
    }

    fn rate(&self) -> Option<u64> {
        match self {
            What::Generated { rate, .. } => *rate,
            _ => None,
        }
    }
}

/// How far a run has got.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Progress {
    pub run: String,
    /// Transactions so far under this key. It never falls, not even when a new run begins.
    batch: i64,
    position: Position,
    pub entries: u64,
    pub lines: u64,
    pub unparsed: u64,
    pub done: bool,
    /// Where the topic ended when the run began: who looks for its entries need not look before.
    #[serde(default)]
    pub starts: Offsets,
}

/// The newest progress, for whoever watches.
#[derive(Default)]
pub struct Ingested(Mutex<Progress>);

impl Ingested {
    pub fn get(&self) -> Progress {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, progress: &Progress) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = progress.clone();
    }
}

pub struct Ingest<'a> {
    pub kafka: &'a Kafka,
    pub what: &'a What,
    /// Forget how far the source was read before.
    pub anew: bool,
    pub ingested: &'a Ingested,
    pub stop: &'a Stop,
}

impl Ingest<'_> {
    /// Ingests what is left of the source. Returns how far it has got: all the way, or told to stop.
    pub fn run(&self) -> Result<Progress> {
        let key = self.what.key()?;
        let identity = format!("{}-ingest {key}", self.kafka.topics.logs);
        let link = Link::new("ingest");
        let mut fencings = 0;
        let Some((mut producer, found)) = self.connect(&identity, &key, &link, &mut fencings)?
        else {
            return Ok(Progress::default());
        };
        let mut progress = self.begin(found)?;
        let mut source = self.what.open(&progress.position)?;
        self.ingested.set(&progress);
        let begun = Instant::now();
        let mut sent = 0;
        while !progress.done && !self.stop.is_set() {
            let most = match self.what.rate() {
                Some(rate) => {
                    let due = (begun.elapsed().as_secs_f64() * rate as f64) as u64;
                    due.saturating_sub(sent).min(BATCH as u64) as usize
                }
                None => BATCH,
            };
            if most == 0 {
                self.stop.within(Duration::from_millis(10));
                continue;
            }
            let batch = source.next_batch(&progress.run, most, LINGER)?;
            sent += batch.entries.len() as u64;
            if batch.position == progress.position && !batch.last {
                continue;
            }
            let next = progress.after(&batch);
            let records = self.records(&key, &batch, &next)?;
            // The batch stays in hand until Kafka says what became of it.
            while let Err(error) = producer.commit(&records, None) {
                if kafka::is_final(&error) {
                    return Err(error.context("Kafka does not take what was read"));
                }
                fencings += i32::from(kafka::is_fencing(&error));
                link.lost(&format!("{error:#}"));
                kafka::retire(producer);
                let Some((again, found)) = self.connect(&identity, &key, &link, &mut fencings)?
                else {
                    return Ok(progress);
                };
                producer = again;
                if let Some(found) = found.filter(|found| found.batch >= next.batch) {
                    if found.batch > next.batch || found.position != next.position {
                        bail!("another process ingests the same source");
                    }
                    break;
                }
            }
            link.fine();
            progress = next;
            self.ingested.set(&progress);
        }
        Ok(progress)
    }

    /// A producer, and how far the source was read; None when told to stop first.
    fn connect(
        &self,
        identity: &str,
        key: &str,
        link: &Link,
        fencings: &mut i32,
    ) -> Result<Option<(Transactions, Option<Progress>)>> {
        loop {
            // Once may be the broker, which fences an owner off whose transaction has taken too long. Two
            // processes that fence each other off in turn would go on for ever.
            if *fencings >= 3 {
                bail!("another process ingests the same source");
            }
            // In this order: the first settles what is still open, the second reads the result.
            let attempt = self
                .kafka
                .transactional(identity)
                .and_then(|producer| Ok((producer, self.read_progress(key)?)));
            match attempt {
                Ok(connected) => return Ok(Some(connected)),
                Err(error) if kafka::is_final(&error) => {
                    return Err(error.context("Kafka does not allow to ingest"));
                }
                Err(error) => {
                    *fencings += i32::from(kafka::is_fencing(&error));
                    link.lost(&format!("{error:#}"));
                }
            }
            if self.stop.within(Duration::from_millis(500)) {
                return Ok(None);
            }
        }
    }

    /// The run to go on with, or a new one that goes on where the last one ended.
    fn begin(&self, found: Option<Progress>) -> Result<Progress> {
        let found = found.unwrap_or_default();
        let generated = matches!(self.what, What::Generated { .. });
        let new = found.run.is_empty() || found.done || self.anew;
        if !new {
            return Ok(found);
        }
        Ok(Progress {
            run: new_run(),
            batch: found.batch,
            position: if generated || self.anew {
                Position::default()
            } else {
                found.position
            },
            starts: self.kafka.ends(&self.kafka.topics.logs, false)?,
            ..Progress::default()
        })
    }

    fn records(&self, key: &str, batch: &Batch, next: &Progress) -> Result<Vec<Outgoing>> {
        let run = || vec![(RUN.to_owned(), next.run.clone().into_bytes())];
        let mut records: Vec<Outgoing> = batch
            .entries
            .iter()
            .map(|entry| Outgoing {
                topic: self.kafka.topics.logs.clone(),
                key: Some(entry.service.clone().into_bytes()),
                payload: Some(entry.json.clone().into_bytes()),
                headers: run(),
            })
            .collect();
        records.push(Outgoing {
            topic: self.kafka.topics.positions.clone(),
            key: Some(key.as_bytes().to_vec()),
            payload: Some(serde_json::to_vec(next)?),
            headers: Vec::new(),
        });
        Ok(records)
    }

    /// The newest committed progress under `key`.
    fn read_progress(&self, key: &str) -> Result<Option<Progress>> {
        // Another source's open transaction would hide what comes after it, ours perhaps. It is open for
        // milliseconds, or, when its owner was killed, until the broker aborts it.
        let topic = &self.kafka.topics.positions;
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.kafka.ends(topic, true)? < self.kafka.ends(topic, false)? {
            if self.stop.within(Duration::from_millis(50)) || Instant::now() > deadline {
                bail!("a transaction on {topic} stays open");
            }
        }
        let mut newest = None;
        self.kafka.read_to_end(topic, &Offsets::new(), |record| {
            if record.key() == Some(key.as_bytes()) {
                newest = record.payload().map(<[u8]>::to_vec);
            }
        })?;
        newest
            .map(|json| serde_json::from_slice(&json).context("unreadable progress"))
            .transpose()
    }
}

impl Progress {
    fn after(&self, batch: &Batch) -> Progress {
        let mut next = self.clone();
        next.batch += 1;
        next.position = batch.position.clone();
        next.entries += batch.entries.len() as u64;
        next.lines += batch.lines;
        next.unparsed += batch.entries.iter().filter(|entry| !entry.parsed).count() as u64;
        next.done = batch.last;
        next
    }
}

/// A name that no other run has: the time, and chance for two runs of the same second.
pub fn new_run() -> String {
    let chance: String = std::iter::repeat_with(fastrand::lowercase)
        .take(6)
        .collect();
    format!("{}-{chance}", chrono::Utc::now().format("%y%m%d-%H%M%S"))
}
