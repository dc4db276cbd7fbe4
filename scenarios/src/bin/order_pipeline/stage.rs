//! What all stages share: consume, make the effect once, produce what follows.
//!
//! A stage keeps nothing in memory that it could not lose. Its position is in Kafka, its effects are in
//! the books, so the answer to every failure is the same: throw the session away and begin a new one.

use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rdkafka::Message;
use rdkafka::consumer::Consumer;
use rdkafka::message::{Header, OwnedHeaders, OwnedMessage};
use rusqlite::Transaction;

use crate::books::{self, Books, Known, Origin};
use crate::event::{self, DEAD_LETTERS, ORDERS, Order, Status};
use crate::kafka::{self, Kafka, Link, Outgoing, Positions, Reader, Transactions};
use crate::shutdown::Stop;

/// What is particular to one service.
pub trait Service {
    const NAME: &'static str;
    /// Which events it acts on: the topic and the status there.
    const TAKES: &'static [(&'static str, Status)];
    /// Its tables, in SQL.
    const TABLES: &'static str;

    /// Decides what becomes of the order and makes the effect, inside the given transaction.
    fn apply(&self, books: &Transaction<'_>, order: &Order) -> rusqlite::Result<Status>;
}

/// How large a batch may grow. All of a batch is one Kafka transaction: its cost, some milliseconds
/// whatever it holds, is shared. A transaction per order would make it the price of every order.
#[derive(Clone, Copy, clap::Args)]
pub struct Batching {
    /// Most records in one transaction
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub batch: u32,
    /// Longest wait for a batch to fill, in milliseconds
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(0..=10_000))]
    pub linger_ms: u64,
}

/// Where a stage's time has gone.
#[derive(Default)]
pub struct Meter(Mutex<Times>);

#[derive(Clone, Copy, Default)]
pub struct Times {
    pub transactions: u32,
    pub events: u64,
    pub waiting: Duration,
    pub books: Duration,
    pub kafka: Duration,
    /// Whether it has had partitions to read.
    pub assigned: bool,
}

impl Meter {
    fn add(&self, change: impl FnOnce(&mut Times)) {
        change(
            &mut self
                .0
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner),
        );
    }

    pub fn times(&self) -> Times {
        *self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

pub struct Stage<'a, S> {
    pub service: S,
    pub kafka: &'a Kafka,
    pub state: &'a Path,
    pub instance: u32,
    pub batching: Batching,
    pub meter: &'a Meter,
    pub stop: &'a Stop,
}

impl<S: Service> Stage<'_, S> {
    /// Works until it is told to stop. An error is final: another process has taken over, or the books
    /// cannot be opened.
    pub fn run(&self) -> Result<()> {
        let identity = format!("order-pipeline-{}-{}", S::NAME, self.instance);
        let mut books = Books::open(self.state, S::NAME, S::TABLES)?;
        books.claim(&identity)?;
        let link = Link::new(S::NAME);
        let mut fencings = Vec::new();
        loop {
            let Err(error) = self.session(&identity, &mut books, &link) else {
                return Ok(());
            };
            if !books.holds(&identity)? {
                bail!(
                    "{}: another process has taken over as instance {}; give each its own --instance",
                    S::NAME,
                    self.instance
                );
            }
            if kafka::is_fencing(&error) {
                fencings.retain(|at: &Instant| at.elapsed() < Duration::from_secs(60));
                fencings.push(Instant::now());
                if fencings.len() >= 5 {
                    return Err(error.context(format!(
                        "{}: fenced off again and again: is another process at work as instance {} \
                         with other books (--state)?",
                        S::NAME,
                        self.instance
                    )));
                }
            }
            link.lost(&format!("{error:#}"));
            if self.stop.within(Duration::from_millis(500)) {
                return Ok(());
            }
        }
    }

    fn session(&self, identity: &str, books: &mut Books, link: &Link) -> Result<()> {
        // First the producer: what an earlier self left open is settled now, and only then are the
        // positions read that it may have moved.
        let producer = self.kafka.transactional(identity)?;
        let mut topics: Vec<&str> = S::TAKES.iter().map(|(topic, _)| *topic).collect();
        topics.dedup();
        let group = format!("order-pipeline-{}", S::NAME);
        let consumer = self.kafka.member(&group, identity, &topics)?;
        let ended = self.work(&producer, &consumer, books, link);
        kafka::retire((producer, consumer));
        ended
    }

    fn work(
        &self,
        producer: &Transactions,
        consumer: &Reader,
        books: &mut Books,
        link: &Link,
    ) -> Result<()> {
        // Read, but not committed; committed, but not noted in the books.
        let (mut positions, mut confirmed) = (Positions::new(), Positions::new());
        let mut assigned = false;
        loop {
            let stopping = self.stop.is_set();
            let begun = Instant::now();
            let batch = if stopping {
                Vec::new()
            } else {
                self.gather(consumer, &mut positions, link)?
            };
            self.meter.add(|times| times.waiting += begun.elapsed());
            if !assigned && consumer.assignment()?.count() > 0 {
                assigned = true;
                self.meter.add(|times| times.assigned = true);
            }

            let begun = Instant::now();
            for record in &batch {
                positions.insert(
                    (record.topic().to_owned(), record.partition()),
                    record.offset() + 1,
                );
            }
            let outgoing = self.settle(books, &batch, &mut confirmed)?;
            self.meter.add(|times| {
                times.books += begun.elapsed();
                times.events += batch.len() as u64;
            });

            // Most of what a stage reads is for others. A batch of only that needs no transaction yet:
            // its positions go with the next one, or as soon as it is quiet.
            let due = !outgoing.is_empty() || (batch.is_empty() && !positions.is_empty());
            if due {
                let begun = Instant::now();
                let group = consumer.group_metadata().context("not in the group yet")?;
                producer.commit(outgoing, Some((&positions, &group)))?;
                confirmed.extend(positions.drain());
                link.fine();
                self.meter.add(|times| {
                    times.kafka += begun.elapsed();
                    times.transactions += 1;
                });
            }
            if stopping {
                self.settle(books, &[], &mut confirmed)?;
                return Ok(());
            }
        }
    }

    /// Up to `batch` records, as many as there are within `linger_ms` of the first; none if it is quiet.
    fn gather(
        &self,
        consumer: &Reader,
        positions: &mut Positions,
        link: &Link,
    ) -> Result<Vec<OwnedMessage>> {
        let mut batch = Vec::new();
        let mut deadline = Instant::now() + Duration::from_millis(100);
        while batch.len() < self.batching.batch as usize {
            let left = deadline.saturating_duration_since(Instant::now());
            let next = consumer.poll(left);
            // A rebalance happens inside of poll. What was read before it may be another member's by
            // now, and everything of ours comes again from the committed positions: forget it all.
            if consumer.context().was_revoked() {
                batch.clear();
                positions.clear();
            }
            match next {
                None => break,
                Some(Ok(record)) => {
                    if batch.is_empty() {
                        deadline = Instant::now() + Duration::from_millis(self.batching.linger_ms);
                    }
                    batch.push(record.detach());
                }
                Some(Err(error)) if kafka::is_passing(&error) => link.lost(&error),
                Some(Err(error)) => return Err(error.into()),
            }
        }
        Ok(batch)
    }

    /// All effects of a batch in one SQLite transaction; returns what is to be written to Kafka.
    fn settle(
        &self,
        books: &mut Books,
        batch: &[OwnedMessage],
        confirmed: &mut Positions,
    ) -> Result<Vec<Outgoing>> {
        if batch.is_empty() && confirmed.is_empty() {
            return Ok(Vec::new());
        }
        let books = books.transaction()?;
        books::tell(&books, confirmed)?;
        let mut outgoing = Vec::new();
        let mut replays = 0;
        for record in batch {
            let order = match Order::from_record(record) {
                Ok(order) => order,
                Err(reason) => {
                    if event::owner(record.topic(), record.payload()) == S::NAME {
                        outgoing.push(dead_letter(S::NAME, record, &reason));
                    }
                    continue;
                }
            };
            if !S::TAKES.contains(&(record.topic(), order.status)) {
                continue;
            }
            let origin = Origin {
                topic: record.topic().to_owned(),
                partition: record.partition(),
                offset: record.offset(),
            };
            // An order's events stay in the partition of its first one, even when that was written
            // by a program with another partitioner, or before partitions were added.
            let home = match record.topic() {
                ORDERS => Some(record.partition()),
                _ => books::home(&books, &order.order_id)?,
            };
            let Some(home) = home else {
                outgoing.push(dead_letter(
                    S::NAME,
                    record,
                    "no such order was ever reserved",
                ));
                continue;
            };
            let outcome = match books::look_up(&books, &order.order_id, order.status, &origin)? {
                Known::New => {
                    let outcome = self.service.apply(&books, &order)?;
                    books::note(&books, &order.order_id, order.status, outcome, &origin)?;
                    outcome
                }
                Known::Replay(outcome) => {
                    replays += 1;
                    outcome
                }
                Known::Told => {
                    replays += 1;
                    continue;
                }
                Known::Duplicate => continue,
            };
            outgoing.push(Outgoing {
                topic: outcome.topic(),
                partition: (outcome.topic() == ORDERS).then_some(home),
                key: Some(order.user_id.clone().into_bytes()),
                payload: Some(order.json(outcome)?),
                headers: event::follow(record.headers()),
            });
        }
        if replays > 0 {
            books.execute("INSERT INTO replays VALUES (?1)", [replays])?;
        }
        books.commit()?;
        confirmed.clear();
        Ok(outgoing)
    }
}

/// The record as it came, with the reason and where it came from in the headers.
fn dead_letter(stage: &str, record: &OwnedMessage, reason: &str) -> Outgoing {
    tracing::warn!(
        "{stage}: {}/{} offset {} goes to {DEAD_LETTERS}: {reason}",
        record.topic(),
        record.partition(),
        record.offset()
    );
    // It may quote the record.
    let reason: String = reason.chars().take(500).collect();
    let partition = record.partition().to_string();
    let offset = record.offset().to_string();
    let payload = record.payload().map(<[u8]>::to_vec);
    Outgoing {
        topic: DEAD_LETTERS,
        partition: None,
        key: record.key().map(<[u8]>::to_vec),
        headers: [
            ("reason", reason.as_str()),
            ("stage", stage),
            ("topic", record.topic()),
            ("partition", &partition),
            ("offset", &offset),
        ]
        .into_iter()
        .fold(event::follow(record.headers()), |all, (key, value)| {
            all.insert(Header {
                key,
                value: Some(value),
            })
        }),
        payload,
    }
    .trimmed()
}

impl Outgoing {
    /// A record can be as large as the topic allows; with the dead letter's headers it would be larger.
    fn trimmed(mut self) -> Outgoing {
        let size =
            self.payload.as_ref().map_or(0, Vec::len) + self.key.as_ref().map_or(0, Vec::len);
        if size > 2 * event::MAX_EVENT {
            let original = size.to_string();
            if let Some(payload) = &mut self.payload {
                payload.truncate(event::MAX_EVENT);
            }
            if let Some(key) = &mut self.key {
                key.truncate(event::MAX_EVENT);
            }
            let headers = std::mem::replace(&mut self.headers, OwnedHeaders::new());
            self.headers = headers.insert(Header {
                key: "truncated_from",
                value: Some(&original),
            });
        }
        self
    }
}
