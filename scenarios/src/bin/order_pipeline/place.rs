//! Placing orders, each exactly once, even when this process is killed and started again.
//!
//! How far a run has got is written to Kafka in the same transaction as the orders themselves, so the
//! two cannot disagree. The same holds for what the books say was placed: every row carries the number
//! of its batch, and rows of a batch that Kafka does not know were never placed.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rdkafka::Message;
use rdkafka::message::{Header, OwnedHeaders};
use rusqlite::{OptionalExtension, Transaction, params};
use serde::{Deserialize, Serialize};

use crate::books::Books;
use crate::event::{self, DEAD_LETTERS, ORDERS, Order, PROGRESS, RUN, Status};
use crate::kafka::{self, Kafka, Link, Outgoing, Starts, Transactions};
use crate::shutdown::Stop;
use crate::source::{Line, Source};

/// What to place.
#[derive(Clone, clap::Args)]
pub struct What {
    /// How many orders to make up
    #[arg(long, default_value_t = 1000)]
    pub orders: u64,
    /// Place the orders of this file of JSON Lines instead, `-` for standard input
    #[arg(long, value_name = "FILE")]
    pub from: Option<PathBuf>,
    /// The made-up orders follow from this number
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Name the run: placing a run that is complete places nothing
    #[arg(long, value_name = "ID")]
    pub run: Option<String>,
    /// Orders per second, as fast as possible by default
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub rate: Option<u64>,
}

impl What {
    /// The same arguments mean the same run, as long as it is not complete.
    fn key(&self) -> String {
        match (&self.run, &self.from) {
            (Some(run), _) => format!("run {run}"),
            (None, Some(path)) if !self.is_stdin() => {
                let path = path.canonicalize().unwrap_or_else(|_| path.clone());
                format!("from {}", path.display())
            }
            (None, Some(_)) => "from -".into(),
            (None, None) => format!("{} orders, seed {}", self.orders, self.seed),
        }
    }

    fn is_stdin(&self) -> bool {
        self.from
            .as_ref()
            .is_some_and(|path| path.as_os_str() == "-")
    }
}

/// How far a run has got.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Progress {
    pub run: String,
    /// Transactions so far under this key. It never falls, not even when a new run begins.
    batch: i64,
    /// Lines of the source that are dealt with.
    lines: u64,
    pub placed: u64,
    pub dead: u64,
    pub suppressed: u64,
    pub done: bool,
    /// Where the topic ended when the run began: who looks for its orders need not look before.
    #[serde(default)]
    pub starts: Starts,
}

/// The newest progress, for whoever watches.
#[derive(Default)]
pub struct Placing(Mutex<Progress>);

impl Placing {
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

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS placed (
        order_id TEXT PRIMARY KEY, line BLOB NOT NULL, key TEXT NOT NULL, batch INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS placed_by_key ON placed (key, batch);
";

pub struct Place<'a> {
    pub kafka: &'a Kafka,
    pub state: &'a Path,
    pub what: &'a What,
    pub placing: &'a Placing,
    pub stop: &'a Stop,
}

const BATCH: usize = 500;
const LINGER: Duration = Duration::from_millis(50);

impl Place<'_> {
    /// Places what is left of the run. Returns how far it has got: all the way, or told to stop.
    pub fn run(&self) -> Result<Progress> {
        let key = self.what.key();
        let identity = format!("order-pipeline-place {key}");
        let link = Link::new("place");
        let mut books = Books::open(self.state, "place", TABLES)?;
        books.claim(&identity)?;
        let Some((mut producer, found)) = self.connect(&identity, &key, &books, &link)? else {
            return Ok(Progress::default());
        };
        let mut progress = self.begin(found)?;
        self.placing.set(&progress);
        books.transaction().and_then(|books| {
            let undone = params![key, progress.batch];
            books.execute("DELETE FROM placed WHERE key = ?1 AND batch > ?2", undone)?;
            books.commit()
        })?;

        let mut source = match &self.what.from {
            // Standard input cannot be rewound. What was placed of it is known by its ids.
            Some(path) if self.what.is_stdin() => Source::lines(path, 0)?,
            Some(path) => Source::lines(path, progress.lines)?,
            None => Source::generated(
                &progress.run,
                self.what.seed,
                self.what.orders,
                progress.lines,
            ),
        };
        let begun = Instant::now();
        let mut sent = 0;
        while !progress.done {
            let allowed = match self.what.rate {
                Some(rate) => {
                    let due = (begun.elapsed().as_secs_f64() * rate as f64) as u64;
                    (due.saturating_sub(sent) as usize).min(BATCH)
                }
                None => BATCH,
            };
            let (lines, last) = match allowed {
                0 => (Vec::new(), false),
                most => source.next_batch(most, LINGER)?,
            };
            sent += lines.len() as u64;
            if !lines.is_empty() || last {
                let mut next = progress.clone();
                next.batch += 1;
                next.done = last;
                let records = self.write_down(&mut books, &key, &source, &lines, &mut next)?;
                // The batch stays in hand until Kafka says what became of it.
                while let Err(error) =
                    producer.commit(self.with_progress(&records, &key, &next)?, None)
                {
                    self.check_owner(&books, &identity)?;
                    link.lost(&format!("{error:#}"));
                    kafka::retire(producer);
                    let Some((again, found)) = self.connect(&identity, &key, &books, &link)? else {
                        return Ok(progress);
                    };
                    producer = again;
                    if found.is_some_and(|found| found.batch >= next.batch) {
                        break;
                    }
                }
                link.fine();
                progress = next;
                self.placing.set(&progress);
            }
            let pause = if self.what.rate.is_some() {
                Duration::from_millis(10)
            } else {
                Duration::ZERO
            };
            if !progress.done && self.stop.within(pause) {
                break;
            }
        }
        Ok(progress)
    }

    fn check_owner(&self, books: &Books, identity: &str) -> Result<()> {
        if !books.holds(identity)? {
            bail!("place: another process has taken over this run");
        }
        Ok(())
    }

    /// A producer, and how far the run has got; None when told to stop first.
    fn connect(
        &self,
        identity: &str,
        key: &str,
        books: &Books,
        link: &Link,
    ) -> Result<Option<(Transactions, Option<Progress>)>> {
        loop {
            // In this order: the first settles what is still open, the second reads the result.
            let attempt = self
                .kafka
                .transactional(identity)
                .and_then(|producer| Ok((producer, read_progress(self.kafka, key, self.stop)?)));
            match attempt {
                Ok(connected) => return Ok(Some(connected)),
                Err(error) => {
                    self.check_owner(books, identity)?;
                    link.lost(&format!("{error:#}"));
                }
            }
            if self.stop.within(Duration::from_millis(500)) {
                return Ok(None);
            }
        }
    }

    /// The run to go on with, or a new one.
    fn begin(&self, found: Option<Progress>) -> Result<Progress> {
        Ok(match found {
            Some(found) if !found.done || self.what.run.is_some() => found,
            earlier => Progress {
                run: self.what.run.clone().unwrap_or_else(new_run),
                batch: earlier.map_or(0, |earlier| earlier.batch),
                starts: self.kafka.ends(ORDERS)?,
                ..Progress::default()
            },
        })
    }

    /// Decides what becomes of each line, in one transaction of the books.
    fn write_down(
        &self,
        books: &mut Books,
        key: &str,
        source: &Source,
        lines: &[Line],
        next: &mut Progress,
    ) -> Result<Vec<Record>> {
        let books = books.transaction()?;
        let mut records = Vec::new();
        for line in lines {
            let order = match line.cut_from {
                Some(size) => Err(format!("{size} bytes, the limit is {}", event::MAX_EVENT)),
                None => Order::from_line(&line.bytes),
            };
            let verdict = match order {
                // Made-up ids carry the run's own, which nobody else has.
                Ok(order) if self.what.from.is_none() => Ok(Some(order)),
                Ok(order) => match remember(
                    &books,
                    &order.order_id,
                    &order.json(Status::Created)?,
                    key,
                    next.batch,
                )? {
                    Memory::New => Ok(Some(order)),
                    Memory::Same => Ok(None),
                    Memory::Different => Err(format!(
                        "order_id {} was placed with other content",
                        order.order_id
                    )),
                },
                Err(reason) => Err(reason),
            };
            match verdict {
                Ok(Some(order)) => {
                    next.placed += 1;
                    records.push(Record::order(&order, &next.run)?);
                }
                Ok(None) => next.suppressed += 1,
                Err(reason) => {
                    // Standard input that is piped in again has the same bad lines again.
                    let name = format!("{} line {}", next.run, line.number);
                    if self.what.is_stdin()
                        && matches!(
                            remember(&books, &name, &line.bytes, key, next.batch)?,
                            Memory::Same
                        )
                    {
                        next.suppressed += 1;
                        continue;
                    }
                    next.dead += 1;
                    tracing::warn!(
                        "place: {} line {} goes to {DEAD_LETTERS}: {reason}",
                        source.name(),
                        line.number
                    );
                    records.push(Record::dead(line, source.name(), &reason, &next.run));
                }
            }
        }
        if let Some(line) = lines.last() {
            next.lines = line.number;
        }
        books.commit()?;
        Ok(records)
    }

    fn with_progress(
        &self,
        records: &[Record],
        key: &str,
        next: &Progress,
    ) -> Result<Vec<Outgoing>> {
        let mut outgoing: Vec<Outgoing> = records.iter().map(Record::outgoing).collect();
        outgoing.push(Outgoing {
            topic: PROGRESS,
            partition: None,
            key: Some(key.as_bytes().to_vec()),
            payload: Some(serde_json::to_vec(next)?),
            headers: OwnedHeaders::new(),
        });
        Ok(outgoing)
    }
}

/// A record of a batch in hand: it may have to be sent again.
struct Record {
    topic: &'static str,
    key: Option<Vec<u8>>,
    payload: Vec<u8>,
    headers: Vec<(&'static str, String)>,
}

impl Record {
    fn order(order: &Order, run: &str) -> Result<Record> {
        Ok(Record {
            topic: ORDERS,
            key: Some(order.user_id.clone().into_bytes()),
            payload: order.json(Status::Created)?,
            headers: vec![(RUN, run.to_owned())],
        })
    }

    fn dead(line: &Line, source: &str, reason: &str, run: &str) -> Record {
        let mut headers = vec![
            ("reason", reason.to_owned()),
            ("stage", "place".to_owned()),
            ("source", source.to_owned()),
            ("line", line.number.to_string()),
            (RUN, run.to_owned()),
        ];
        headers.extend(
            line.cut_from
                .map(|size| ("truncated_from", size.to_string())),
        );
        Record {
            topic: DEAD_LETTERS,
            key: None,
            payload: line.bytes.clone(),
            headers,
        }
    }

    fn outgoing(&self) -> Outgoing {
        Outgoing {
            topic: self.topic,
            partition: None,
            key: self.key.clone(),
            payload: Some(self.payload.clone()),
            headers: self
                .headers
                .iter()
                .fold(event::follow(None), |all, (key, value)| {
                    all.insert(Header {
                        key,
                        value: Some(value),
                    })
                }),
        }
    }
}

enum Memory {
    New,
    Same,
    Different,
}

/// Notes that `id` is placed by this batch, unless it was placed before.
fn remember(
    books: &Transaction<'_>,
    id: &str,
    line: &[u8],
    key: &str,
    batch: i64,
) -> Result<Memory> {
    let known: Option<Vec<u8>> = books
        .prepare_cached("SELECT line FROM placed WHERE order_id = ?1")?
        .query_row([id], |row| row.get(0))
        .optional()?;
    Ok(match known {
        Some(known) if known == line => Memory::Same,
        Some(_) => Memory::Different,
        None => {
            books
                .prepare_cached("INSERT INTO placed VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![id, line, key, batch])?;
            Memory::New
        }
    })
}

/// A name that no other run has: the time, and chance for two runs of the same second.
fn new_run() -> String {
    let chance: String = std::iter::repeat_with(fastrand::lowercase)
        .take(6)
        .collect();
    format!("{}-{chance}", chrono::Utc::now().format("%y%m%d-%H%M%S"))
}

/// The newest committed progress under `key`.
fn read_progress(kafka: &Kafka, key: &str, stop: &Stop) -> Result<Option<Progress>> {
    // Another run's open transaction would hide what comes after it, ours perhaps. It is open for
    // milliseconds, or, when its owner was killed, until the broker aborts it.
    let deadline = Instant::now() + Duration::from_secs(60);
    while !kafka.is_settled(PROGRESS)? {
        if stop.within(Duration::from_millis(50)) || Instant::now() > deadline {
            bail!("a transaction on {PROGRESS} stays open");
        }
    }
    let mut newest = None;
    kafka.read_to_end(PROGRESS, &Starts::new(), |record| {
        if record.key() == Some(key.as_bytes()) {
            newest = record.payload().map(<[u8]>::to_vec);
        }
    })?;
    newest
        .map(|json| serde_json::from_slice(&json).context("unreadable progress"))
        .transpose()
}
