//! From Kafka to the store: batches of 100 entries or of one second, whichever comes first.
//!
//! One thread polls Kafka, whatever happens, so that the group keeps this member. Requests to the store are
//! tasks beside it, a few at a time. A position is committed when every batch before it was answered.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use backon::{BackoffBuilder, ExponentialBuilder};
use chrono::{DateTime, Utc};
use rdkafka::consumer::{CommitMode, Consumer};
use rdkafka::message::OwnedMessage;
use rdkafka::{Message, Timestamp};
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::task::JoinSet;

use crate::entry::{self, UNPARSED};
use crate::kafka::{self, Kafka, Link, Offsets, Outgoing, Reader, Transactions};
use crate::shutdown::Stop;
use crate::store::{Answer, Store, Verdict};

/// When a batch is sent, and how many may be on their way.
#[derive(Clone, Copy, clap::Args)]
pub struct Batching {
    /// Entries in one bulk request
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub batch: u32,
    /// Longest wait of an entry for its batch to fill, in milliseconds
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub linger_ms: u64,
    /// Bulk requests on their way at the same time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub in_flight: u32,
}

/// A batch is sent when it has this many bytes, too: stores limit the size of a request.
const MAX_BULK: usize = 8 << 20;
/// Positions are committed this often. What a crash makes it read again is replaced by itself.
const COMMIT: Duration = Duration::from_millis(100);
/// A dead letter that would be larger than this is cut. A record that was written compressed can be larger than what
/// Kafka takes of this program.
const MAX_LETTER: usize = 8 << 20;
/// How much is then kept of its payload, of its key and of its headers each.
const KEPT: usize = 1 << 20;
/// A store that is silent for so long is not waited for: the partitions are paused.
const PATIENCE: Duration = Duration::from_secs(1);

/// What was done so far, for whoever watches.
#[derive(Clone, Default)]
pub struct Tally {
    pub stored: u64,
    /// Of these, how many had been stored before a crash or a rebalance.
    pub replaced: u64,
    pub dead_letters: u64,
    pub by_size: u64,
    pub by_time: u64,
    pub retries: u64,
    pub pauses: u64,
    /// Whether it has had partitions to read.
    pub assigned: bool,
    pub last: Option<Instant>,
}

#[derive(Clone, Default)]
pub struct Meter(Arc<Mutex<Tally>>);

impl Meter {
    fn add(&self, change: impl FnOnce(&mut Tally)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub fn get(&self) -> Tally {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// One document on its way.
pub struct Document {
    pub index: String,
    pub id: String,
    /// On one line.
    pub source: Vec<u8>,
}

impl Document {
    pub fn write(&self, body: &mut Vec<u8>) {
        let action = json!({ "index": { "_index": self.index, "_id": self.id } });
        body.extend(action.to_string().into_bytes());
        body.push(b'\n');
        body.extend(&self.source);
        body.push(b'\n');
    }

    /// The document of a record. It must be an object with a timestamp; anything else is kept as UNPARSED at
    /// the time that Kafka gave it, which is the same when it is read again.
    fn of(record: &OwnedMessage, prefix: &str) -> Document {
        let id = format!(
            "{}-{}-{}",
            record.topic(),
            record.partition(),
            record.offset()
        );
        let payload = record.payload().unwrap_or_default();
        let (time, source) = match entry::time_of(payload) {
            // Outside of its strings, JSON may have line breaks, where a bulk request may not.
            Ok(time) => {
                let on_one_line = payload
                    .iter()
                    .map(|byte| if b"\r\n".contains(byte) { b' ' } else { *byte });
                (time, on_one_line.collect())
            }
            Err(reason) => {
                let time = match record.timestamp() {
                    Timestamp::CreateTime(millis) | Timestamp::LogAppendTime(millis) => {
                        DateTime::from_timestamp_millis(millis).unwrap_or_default()
                    }
                    Timestamp::NotAvailable => DateTime::default(),
                };
                let time = Some(time.fixed_offset())
                    .filter(entry::is_sane)
                    .unwrap_or_default();
                (time, unreadable(record, time.with_timezone(&Utc), &reason))
            }
        };
        let day = time.with_timezone(&Utc).format("%Y.%m.%d");
        Document {
            index: format!("{prefix}-{day}"),
            id,
            source,
        }
    }
}

fn unreadable(record: &OwnedMessage, time: DateTime<Utc>, reason: &str) -> Vec<u8> {
    use base64::Engine;
    let payload = record.payload().unwrap_or_default();
    let mut ingested = json!({ "source": "kafka", "format": "unparsed", "reason": reason });
    if std::str::from_utf8(payload).is_err() {
        let raw = base64::engine::general_purpose::STANDARD.encode(payload);
        ingested["raw_base64"] = Value::from(raw);
    }
    let key = record.key().map(String::from_utf8_lossy);
    json!({
        "timestamp": time.to_rfc3339(),
        "service": key.as_deref().unwrap_or("unknown"),
        "level": UNPARSED,
        "message": String::from_utf8_lossy(payload),
        "ingested": ingested,
    })
    .to_string()
    .into_bytes()
}

/// What a request to the store reports to the thread that polls.
enum Event {
    /// The store does not take it now.
    Away(String),
    Done {
        batch: u64,
        stored: u64,
        replaced: u64,
        /// Which documents the store refuses, and why.
        refused: Vec<(usize, String)>,
    },
    Fatal(anyhow::Error),
}

/// A batch that was sent.
struct Flight {
    batch: u64,
    /// Of each partition in it, the offset behind its last record.
    positions: Offsets,
    records: Vec<OwnedMessage>,
    /// The dead letters it left, once it was answered.
    answered: Option<Vec<Outgoing>>,
}

pub struct Aggregator<'a> {
    pub kafka: &'a Kafka,
    pub store: &'a Store,
    pub batching: Batching,
    /// Tells apart several aggregators that keep their partitions over a restart.
    pub instance: Option<String>,
    pub meter: &'a Meter,
    pub stop: &'a Stop,
    pub runtime: Handle,
}

/// The group's name: one per prefix of indices, as each gets all entries.
pub fn group(store: &Store) -> String {
    format!("log-aggregation-{}", store.index)
}

impl Aggregator<'_> {
    /// Works until it is told to stop. An error is final.
    pub fn run(&self) -> Result<()> {
        let link = Link::new("aggregator: Kafka");
        let mut fencings = 0;
        loop {
            let error = match self.session(&link) {
                Ok(()) => return Ok(()),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(error)) => error,
            };
            if kafka::is_fencing(&error) {
                fencings += 1;
                if fencings >= 3 {
                    return Err(error.context(
                        "another aggregator has this --instance; give each its own, or none",
                    ));
                }
            }
            link.lost(&format!("{error:#}"));
            if self.stop.within(Duration::from_millis(500)) {
                return Ok(());
            }
        }
    }

    fn session(&self, link: &Link) -> Result<(), Failure> {
        let group = group(self.store);
        let consumer = self.kafka.member(&group, self.instance.as_deref())?;
        let mut work = Work {
            aggregator: self,
            consumer: &consumer,
            link,
            store_link: Link::new("aggregator: the store"),
            hand: Hand::new(),
            paused: false,
            assigned: false,
            undertaker: None,
        };
        let ended = work.run();
        if let Some(undertaker) = work.undertaker.take() {
            kafka::retire(undertaker);
        }
        drop(work);
        kafka::retire(consumer);
        ended
    }
}

/// Why a session ends.
enum Failure {
    /// The next one may fare better.
    Passing(anyhow::Error),
    Final(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Failure {
        let error = error.into();
        if kafka::is_final(&error) {
            return Failure::Final(error.context("Kafka does not allow the aggregator's work"));
        }
        Failure::Passing(error)
    }
}

/// All that is read and not committed. It can be thrown away at any time: it will be read again.
struct Hand {
    batch: Vec<OwnedMessage>,
    bytes: usize,
    since: Instant,
    flights: VecDeque<Flight>,
    next: u64,
    /// Behind the last record before which everything is answered.
    positions: Offsets,
    /// Whether they have changed since the last commit.
    moved: bool,
    committed: Instant,
    /// When the store took something last, or was given something to take.
    heard: Instant,
    /// Whether it has refused to take anything since.
    away: bool,
    /// Dropped with the rest, which ends the requests.
    tasks: JoinSet<()>,
    sender: Sender<Event>,
    events: Receiver<Event>,
}

impl Hand {
    fn new() -> Hand {
        let (sender, events) = channel();
        Hand {
            batch: Vec::new(),
            bytes: 0,
            since: Instant::now(),
            flights: VecDeque::new(),
            next: 0,
            positions: Offsets::new(),
            moved: false,
            committed: Instant::now(),
            heard: Instant::now(),
            away: false,
            tasks: JoinSet::new(),
            sender,
            events,
        }
    }
}

struct Work<'a> {
    aggregator: &'a Aggregator<'a>,
    consumer: &'a Reader,
    link: &'a Link,
    store_link: Link,
    hand: Hand,
    paused: bool,
    assigned: bool,
    /// Writes dead letters; made when there are any.
    undertaker: Option<Transactions>,
}

impl Work<'_> {
    fn run(&mut self) -> Result<(), Failure> {
        let batching = self.aggregator.batching;
        let meter = self.aggregator.meter;
        let linger = Duration::from_millis(batching.linger_ms);
        let mut stopping = None;
        loop {
            while let Ok(event) = self.hand.events.try_recv() {
                self.take(event)?;
            }
            self.settle(false)?;
            if self.aggregator.stop.is_set() {
                // What is on its way may arrive; what is not sent is read again by the next one.
                let deadline = *stopping.get_or_insert(Instant::now() + Duration::from_secs(5));
                if self.hand.flights.is_empty() || self.paused || Instant::now() > deadline {
                    return self.settle(true);
                }
                if let Ok(event) = self.hand.events.recv_timeout(Duration::from_millis(50)) {
                    self.take(event)?;
                }
                continue;
            }

            let full = self.hand.flights.len() >= batching.in_flight as usize;
            let size =
                self.hand.batch.len() >= batching.batch as usize || self.hand.bytes >= MAX_BULK;
            let time = !self.hand.batch.is_empty() && self.hand.since.elapsed() >= linger;
            if (size || time) && !full {
                meter.add(|tally| {
                    tally.by_size += u64::from(size);
                    tally.by_time += u64::from(!size);
                });
                self.send();
                continue;
            }
            if full && !self.paused && self.hand.heard.elapsed() < PATIENCE {
                // Normal: the store is slower than Kafka. Pausing would throw away what was read ahead.
                if let Ok(event) = self.hand.events.recv_timeout(Duration::from_millis(50)) {
                    self.take(event)?;
                }
                continue;
            }
            let silent = self.paused || self.hand.heard.elapsed() >= PATIENCE;
            self.pause((full || self.hand.away) && silent)?;

            let due = self.hand.since + linger;
            let patience = if self.hand.batch.is_empty() && self.hand.flights.is_empty() {
                Duration::from_millis(100)
            } else if self.hand.batch.is_empty() {
                Duration::from_millis(5)
            } else {
                due.saturating_duration_since(Instant::now())
                    .min(Duration::from_millis(5))
            };
            let polled = self.consumer.poll(patience);
            // A rebalance happens inside of poll. What was read before it may be another member's by now,
            // and comes again from the committed positions.
            if self.consumer.context().was_revoked() {
                self.hand = Hand::new();
                self.paused = false;
            }
            if !self.assigned && self.consumer.assignment()?.count() > 0 {
                self.assigned = true;
                meter.add(|tally| tally.assigned = true);
            }
            match polled {
                Some(Ok(record)) => {
                    self.link.fine();
                    if self.hand.batch.is_empty() {
                        self.hand.since = Instant::now();
                    }
                    self.hand.bytes += record.payload_len();
                    self.hand.batch.push(record.detach());
                }
                Some(Err(error)) if kafka::is_passing(&error) => self.link.lost(&error),
                Some(Err(error)) => return Err(error.into()),
                None => {}
            }
        }
    }

    /// Stops or starts the flow of records, but not the polling: a member that does not poll is put out of
    /// its group after `max.poll.interval.ms`.
    fn pause(&mut self, pause: bool) -> Result<()> {
        if pause == self.paused {
            return Ok(());
        }
        let all = self.consumer.assignment()?;
        if pause {
            tracing::warn!("aggregator: the store does not take more, partitions paused");
            self.consumer.pause(&all)?;
            self.aggregator.meter.add(|tally| tally.pauses += 1);
        } else {
            tracing::info!("aggregator: the store takes entries again, partitions resumed");
            self.consumer.resume(&all)?;
        }
        self.paused = pause;
        Ok(())
    }

    fn send(&mut self) {
        let records = std::mem::take(&mut self.hand.batch);
        self.hand.bytes = 0;
        let mut positions = Offsets::new();
        for record in &records {
            positions.insert(record.partition(), record.offset() + 1);
        }
        let prefix = &self.aggregator.store.index;
        let documents: Vec<Document> = records
            .iter()
            .map(|record| Document::of(record, prefix))
            .collect();
        if self.hand.flights.is_empty() {
            self.hand.heard = Instant::now();
        }
        let batch = self.hand.next;
        self.hand.next += 1;
        self.hand.flights.push_back(Flight {
            batch,
            positions,
            records,
            answered: None,
        });
        let store = self.aggregator.store.clone();
        let sender = self.hand.sender.clone();
        let task = async move {
            let event = deliver(&store, batch, &documents, &sender).await;
            let _ = sender.send(event.unwrap_or_else(Event::Fatal));
        };
        self.hand.tasks.spawn_on(task, &self.aggregator.runtime);
    }

    fn take(&mut self, event: Event) -> Result<(), Failure> {
        match event {
            Event::Away(reason) => {
                self.aggregator.meter.add(|tally| tally.retries += 1);
                self.store_link.lost(&reason);
                self.hand.away = true;
            }
            Event::Fatal(error) => {
                let address = self.aggregator.store.address();
                return Err(Failure::Final(
                    error.context(format!("the store at {address} refuses to work")),
                ));
            }
            Event::Done {
                batch,
                stored,
                replaced,
                refused,
            } => {
                self.store_link.fine();
                self.hand.heard = Instant::now();
                self.hand.away = false;
                // Collects the task that has just ended.
                while self.hand.tasks.try_join_next().is_some() {}
                self.aggregator.meter.add(|tally| {
                    tally.stored += stored;
                    tally.replaced += replaced;
                    tally.last = Some(Instant::now());
                });
                let topic = &self.aggregator.kafka.topics.dead_letters;
                let flight = self.hand.flights.iter_mut().find(|one| one.batch == batch);
                if let Some(flight) = flight {
                    let letters = refused
                        .into_iter()
                        .map(|(at, reason)| dead_letter(topic, &flight.records[at], &reason));
                    flight.answered = Some(letters.collect());
                    flight.records = Vec::new();
                }
            }
        }
        Ok(())
    }

    /// Commits as far as everything was answered; to the very end and waiting for it, if these are the `last`.
    fn settle(&mut self, last: bool) -> Result<(), Failure> {
        let topic = &self.aggregator.kafka.topics.logs;
        let before = self.hand.positions.clone();
        let mut letters = Vec::new();
        while let Some(flight) = self.hand.flights.front_mut() {
            let Some(answered) = flight.answered.take() else {
                break;
            };
            letters.extend(answered);
            self.hand.positions.extend(&flight.positions);
            self.hand.moved = true;
            self.hand.flights.pop_front();
        }
        if self.consumer.context().commit_failed() {
            self.hand.moved = true;
        }
        if !letters.is_empty() {
            // A commit that is on its way must not arrive behind this one, and set it back.
            if !before.is_empty() {
                let list = kafka::list(topic, &before)?;
                self.consumer.commit(&list, CommitMode::Sync)?;
            }
            // Dead letters and positions in one transaction: not one letter is lost or written twice.
            let metadata = self.consumer.group_metadata().context("not in the group")?;
            self.undertaker()?;
            let positions = Some((topic.as_str(), &self.hand.positions, &metadata));
            if let Some(undertaker) = &self.undertaker {
                undertaker.commit(&letters, positions)?;
            }
            self.aggregator
                .meter
                .add(|tally| tally.dead_letters += letters.len() as u64);
        } else if self.hand.moved && (last || self.hand.committed.elapsed() >= COMMIT) {
            let list = kafka::list(topic, &self.hand.positions)?;
            if !last {
                self.consumer.commit(&list, CommitMode::Async)?;
            } else if let Err(error) = self.consumer.commit(&list, CommitMode::Sync) {
                // Kafka may be away, or others have the partitions by now. Nothing is lost by it.
                tracing::warn!("aggregator: the last positions are not committed: {error}");
            }
        } else {
            return Ok(());
        }
        self.hand.moved = false;
        self.hand.committed = Instant::now();
        Ok(())
    }

    /// Makes the producer of dead letters, unless there is one.
    fn undertaker(&mut self) -> Result<()> {
        if self.undertaker.is_none() {
            let name = self.aggregator.instance.clone();
            let name = name.unwrap_or_else(crate::ingest::new_run);
            let identity = format!("{}-{name}", group(self.aggregator.store));
            self.undertaker = Some(self.aggregator.kafka.transactional(&identity)?);
        }
        Ok(())
    }
}

/// Sends the documents until the store has taken or refused each.
async fn deliver(
    store: &Store,
    batch: u64,
    documents: &[Document],
    events: &Sender<Event>,
) -> Result<Event> {
    let (mut stored, mut replaced, mut refused) = (0, 0, Vec::new());
    // Parts of the batch, by the indices of their documents. There is one, unless the store refuses it whole.
    let mut parts: VecDeque<Vec<usize>> = VecDeque::from([(0..documents.len()).collect()]);
    let waits = || {
        ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(Duration::from_secs(3))
            .with_jitter()
            .without_max_times()
            .build()
    };
    let mut wait = waits();
    while let Some(part) = parts.pop_front() {
        let mut body = Vec::new();
        for at in &part {
            documents[*at].write(&mut body);
        }
        let later = match store.bulk(body).await? {
            Answer::Later(reason) => Some((part, reason)),
            Answer::Refused(reason) if part.len() == 1 => {
                refused.push((part[0], reason));
                None
            }
            // One of them is to blame, or there are too many: find out.
            Answer::Refused(_) => {
                let (left, right) = part.split_at(part.len() / 2);
                parts.push_front(right.to_vec());
                parts.push_front(left.to_vec());
                None
            }
            Answer::Verdicts(verdicts) if verdicts.len() != part.len() => Some((
                part,
                format!("{} answers for that many documents", verdicts.len()),
            )),
            Answer::Verdicts(verdicts) => {
                let mut later: Option<(Vec<usize>, String)> = None;
                for (at, verdict) in part.into_iter().zip(verdicts) {
                    match verdict {
                        Verdict::Stored { replaced: again } => {
                            stored += 1;
                            replaced += u64::from(again);
                        }
                        Verdict::Refused(reason) => refused.push((at, reason)),
                        Verdict::Later(reason) => {
                            later.get_or_insert_with(|| (Vec::new(), reason)).0.push(at);
                        }
                    }
                }
                later
            }
        };
        match later {
            None => wait = waits(),
            Some((part, reason)) => {
                parts.push_front(part);
                let _ = events.send(Event::Away(reason));
                tokio::time::sleep(wait.next().unwrap_or(Duration::from_secs(3))).await;
            }
        }
    }
    refused.sort_by_key(|(at, _)| *at);
    Ok(Event::Done {
        batch,
        stored,
        replaced,
        refused,
    })
}

/// The record as it came, with the store's reason and where it came from in the headers.
fn dead_letter(topic: &str, record: &OwnedMessage, reason: &str) -> Outgoing {
    tracing::warn!(
        "aggregator: {}/{} offset {} goes to {topic}: {reason}",
        record.topic(),
        record.partition(),
        record.offset()
    );
    let mut headers: Vec<(String, Vec<u8>)> = kafka::readable(record.headers())
        .map(|header| {
            let value = header.value.unwrap_or_default().to_vec();
            (header.key.to_owned(), value)
        })
        .collect();
    let mut key = record.key().map(<[u8]>::to_vec);
    let mut payload = record.payload().map(<[u8]>::to_vec);
    let in_headers: usize = headers
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum();
    let size = in_headers + key.as_ref().map_or(0, Vec::len) + payload.as_ref().map_or(0, Vec::len);
    if size > MAX_LETTER {
        for part in [&mut key, &mut payload].into_iter().flatten() {
            part.truncate(KEPT);
        }
        if in_headers > KEPT {
            headers.clear();
        }
        headers.push(("truncated_from".to_owned(), size.to_string().into_bytes()));
    }
    for (name, value) in [
        ("reason", reason.to_owned()),
        ("topic", record.topic().to_owned()),
        ("partition", record.partition().to_string()),
        ("offset", record.offset().to_string()),
    ] {
        headers.push((name.to_owned(), value.into_bytes()));
    }
    Outgoing {
        topic: topic.to_owned(),
        key,
        payload,
        headers,
    }
}
