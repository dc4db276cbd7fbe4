//! Inspect dead letters, and send them back once their cause is gone
//!
//! Lists what `kafka_retry_dlq` has given up on, with cause, attempts and origin; `replay` sends it back to where it
//! first came from. Each letter is replayed exactly once: it is written and the position in the dead letters moved in
//! one transaction, so a replay that is killed goes on where it was. A letter that fails again is a new dead letter.
//!
//! ```console
//! 1$ cargo lab run kafka_retry_dlq
//! waiting for payments
//! 2$ cargo lab run kafka_retry_dlq send
//! sent: [..]
//! 1:
//! ...
//! payment-3: attempt 5 failed: the bank does not answer; dead letter
//! 2$ cargo lab run kafka_dlq_replay
//! ...
//! [..]: key payment-3, attempts 5, cause: the bank does not answer
//!   from retry-dlq.payments/[..], 0 replays before: {"payment_id":"payment-3","fails":99}
//! ...
//! dead letters: 2
//! 2$ cargo lab run kafka_dlq_replay replay
//! ...
//! replayed: 2
//! 1:
//! ...
//! payment-3: attempt 1 failed: the bank does not answer; again in [..] ms
//! ...
//! payment-3: attempt 5 failed: the bank does not answer; dead letter
//! 1^C
//! ...
//! stopped; [..]
//! 2$ cargo lab run kafka_dlq_replay
//! ...
//!   from retry-dlq.payments/[..], 1 replays before: {"payment_id":"payment-3","fails":99}
//! ...
//! dead letters: 2
//! ```
//!
//! Notice: the letters stay in the log until its retention ends, replayed or not. What is listed is what lies behind
//! the group's position, up to the end at the time of asking: a replay does not chase the letters that it causes.
//!
//! Try: look at the dead letters before you replay them: one that is no payment will be none the next time either.
//!
//! Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_retry_dlq.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Header, Headers, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

const PAYMENTS: &str = "retry-dlq.payments";
const DEAD_LETTERS: &str = "retry-dlq.payments.dlq";
const GROUP: &str = "retry-dlq.replay";
const BATCH: usize = 100;
const PATIENCE: Duration = Duration::from_secs(5);
const TRANSACTION: Duration = Duration::from_secs(10);

fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let replay = match std::env::args().nth(1).as_deref() {
        None => false,
        Some("replay") => true,
        Some(_) => bail!("usage: kafka_dlq_replay [replay]"),
    };
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("enable.auto.commit", "false")
        .create()?;
    let partitions = partitions(&consumer, &brokers)?;
    // The producer before the positions: if another replay is at work, it is fenced off, and what it has left open is
    // settled.
    let producer = replay.then(|| transactional(&brokers)).transpose()?;
    let mut waiting = Waiting::find(&consumer, &partitions)?;
    let mut count = 0;
    loop {
        let letters = waiting.next(&consumer)?;
        if letters.is_empty() {
            break;
        }
        count += letters.len();
        letters.iter().for_each(show);
        if let Some(producer) = &producer {
            send_back(producer, &consumer, &letters)
                .context("nothing of the last batch counts as replayed; run it again")?;
        }
    }
    let what = if replay { "replayed" } else { "dead letters" };
    println!("{what}: {count}");
    Ok(())
}

/// Of the dead letters; none as long as nobody has created the topic.
fn partitions(consumer: &BaseConsumer, brokers: &str) -> anyhow::Result<Vec<i32>> {
    let metadata = consumer
        .fetch_metadata(Some(DEAD_LETTERS), PATIENCE)
        .with_context(|| {
            format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one")
        })?;
    let topics = metadata.topics().iter();
    Ok(topics
        .flat_map(|topic| topic.partitions())
        .map(|partition| partition.id())
        .collect())
}

/// The letters from the group's position up to the end, per partition.
struct Waiting(BTreeMap<i32, std::ops::Range<i64>>);

impl Waiting {
    fn find(consumer: &BaseConsumer, partitions: &[i32]) -> anyhow::Result<Waiting> {
        let mut list = TopicPartitionList::new();
        for partition in partitions {
            list.add_partition(DEAD_LETTERS, *partition);
        }
        let committed = match list.count() {
            0 => list,
            _ => committed(consumer, &list)?,
        };
        let mut ranges = BTreeMap::new();
        let mut starts = TopicPartitionList::new();
        for entry in committed.elements() {
            let partition = entry.partition();
            let (low, high) = consumer.fetch_watermarks(DEAD_LETTERS, partition, PATIENCE)?;
            let start = match entry.offset() {
                // What retention has deleted in the meantime cannot be replayed.
                Offset::Offset(next) => next.max(low),
                _ => low,
            };
            if start < high {
                ranges.insert(partition, start..high);
                starts.add_partition_offset(DEAD_LETTERS, partition, Offset::Offset(start))?;
            }
        }
        consumer.assign(&starts)?;
        Ok(Waiting(ranges))
    }

    /// Up to a batch of them; empty at the end.
    fn next(&mut self, consumer: &BaseConsumer) -> anyhow::Result<Vec<OwnedMessage>> {
        let mut letters = Vec::new();
        while letters.len() < BATCH && !self.0.is_empty() {
            match consumer.poll(PATIENCE) {
                Some(Ok(record)) => {
                    let Some(range) = self.0.get_mut(&record.partition()) else {
                        continue; // behind the end as it was
                    };
                    if range.contains(&record.offset()) {
                        letters.push(record.detach());
                    }
                    range.start = record.offset() + 1;
                    if range.is_empty() {
                        self.0.remove(&record.partition());
                    }
                }
                Some(Err(error)) => bail!("cannot read {DEAD_LETTERS}: {error}"),
                None => bail!("cannot read {DEAD_LETTERS} to its end"),
            }
        }
        Ok(letters)
    }
}

/// A broker that has just started looks for the group's coordinator first, and refuses until it has found it. Nor does
/// it tell a position that a killed replay was about to move, until it has given up on that one's transaction: it looks
/// for those every ten seconds.
fn committed(
    consumer: &BaseConsumer,
    list: &TopicPartitionList,
) -> anyhow::Result<TopicPartitionList> {
    let deadline = Instant::now() + 2 * TRANSACTION + PATIENCE;
    loop {
        let committed = consumer.committed_offsets(list.clone(), PATIENCE);
        let error = match &committed {
            // Each partition has an error of its own.
            Ok(all) => all.elements().iter().find_map(|at| at.error().err()),
            Err(error) => Some(error.clone()),
        };
        match error {
            None => return Ok(committed?),
            Some(error) if Instant::now() > deadline => return Err(error.into()),
            Some(_) => sleep(Duration::from_millis(100)),
        }
    }
}

fn show(letter: &OwnedMessage) {
    let text = |bytes: &[u8]| -> String {
        let text = String::from_utf8_lossy(bytes);
        text.chars().take(200).collect()
    };
    let headers = headers(letter);
    let header = |key| last(headers.as_deref(), key).map_or("unknown".into(), text);
    println!(
        "{}/{}: key {}, attempts {}, cause: {}",
        letter.partition(),
        letter.offset(),
        letter.key().map_or("none".into(), text),
        header("attempts"),
        header("cause"),
    );
    if headers.is_none() {
        println!("  its headers cannot be read: the name of one is not UTF-8");
    }
    println!(
        "  from {}/{}/{}, {} replays before: {}",
        header("origin.topic"),
        header("origin.partition"),
        header("origin.offset"),
        replays(headers.as_deref()),
        letter.payload().map_or("null".into(), text),
    );
}

type Bytes<'a> = Header<'a, &'a [u8]>;

/// None if they cannot be read: the crate panics on a header whose name is not UTF-8, which any other client can write.
fn headers(letter: &OwnedMessage) -> Option<Vec<Bytes<'_>>> {
    let all = letter.headers();
    let read = AssertUnwindSafe(|| all.into_iter().flat_map(Headers::iter).collect());
    catch_unwind(read).ok()
}

/// The value of the last one under this key.
fn last<'a>(headers: Option<&[Bytes<'a>]>, key: &str) -> Option<&'a [u8]> {
    headers?.iter().rfind(|header| header.key == key)?.value
}

fn replays(headers: Option<&[Bytes<'_>]>) -> u32 {
    let value = last(headers, "replays").and_then(|value| std::str::from_utf8(value).ok());
    value.and_then(|value| value.parse().ok()).unwrap_or(0)
}

fn transactional(brokers: &str) -> anyhow::Result<BaseProducer> {
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("transactional.id", GROUP)
        .set(
            "transaction.timeout.ms",
            TRANSACTION.as_millis().to_string(),
        )
        .set("message.timeout.ms", "10000")
        // The broker's limit is for what is compressed, the client's for what is not: both as for the dead letters.
        .set("compression.type", "zstd")
        .set("message.max.bytes", "1000000000")
        .create()?;
    producer.init_transactions(Duration::from_secs(10))?;
    Ok(producer)
}

/// All of them, and the position behind them, or nothing.
fn send_back(
    producer: &BaseProducer,
    consumer: &BaseConsumer,
    letters: &[OwnedMessage],
) -> anyhow::Result<()> {
    producer.begin_transaction()?;
    let mut positions = BTreeMap::new();
    for letter in letters {
        positions.insert(letter.partition(), letter.offset() + 1);
        let known = headers(letter);
        let replays = replays(known.as_deref()).saturating_add(1).to_string();
        // What was its history is that of the next attempt now; the sender's own headers go along.
        let ours = ["attempts", "cause", "replays"];
        let theirs =
            |header: &Bytes<'_>| !ours.contains(&header.key) && !header.key.starts_with("origin.");
        let headers = match known {
            Some(all) => all
                .into_iter()
                .filter(theirs)
                .fold(OwnedHeaders::new(), OwnedHeaders::insert),
            // Its history goes along as well, for nobody can tell it from the rest.
            None => letter.headers().cloned().unwrap_or_default(),
        };
        let mut record = BaseRecord::<[u8], [u8]>::to(PAYMENTS).headers(headers.insert(Header {
            key: "replays",
            value: Some(&replays),
        }));
        (record.key, record.payload) = (letter.key(), letter.payload());
        producer.send(record).map_err(|(error, _)| error)?;
    }
    let mut offsets = TopicPartitionList::new();
    for (partition, next) in positions {
        offsets.add_partition_offset(DEAD_LETTERS, partition, Offset::Offset(next))?;
    }
    let group = consumer.group_metadata().context("no group")?;
    producer.send_offsets_to_transaction(&offsets, &group, PATIENCE)?;
    producer.commit_transaction(PATIENCE)?;
    Ok(())
}
