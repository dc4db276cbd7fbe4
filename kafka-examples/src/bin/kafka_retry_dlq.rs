//! Retry without blocking: a topic per delay, exponential backoff with jitter, then the dead-letter topic
//!
//! A payment that fails goes to a retry topic, where it waits its time, and those behind it go on. After five attempts,
//! or at once if no attempt can help, it goes to the dead letters, with the cause, the attempts and its origin in the
//! headers. At least once: a record is committed where it was after it was written where it goes. Order per key is
//! given up: a payment that is retried is overtaken.
//!
//! ```console
//! 1$ cargo lab run kafka_retry_dlq
//! waiting for payments
//! 2$ cargo lab run kafka_retry_dlq send
//! sent: payment-1, payment-2 (fails twice), payment-3 (fails always), payment-4 (no payment at all)
//! 1:
//! ...
//! payment-2: attempt 1 failed: the bank does not answer; again in [..] ms
//! ...
//! payment-2: paid at attempt 3
//! ...
//! payment-3: attempt 5 failed: the bank does not answer; dead letter
//! ^C
//! ...
//! stopped; paid: 2, to be retried: 6, dead letters: 2
//! $ cargo lab run kafka_dlq_replay
//! ...
//! [..]: key payment-3, attempts 5, cause: the bank does not answer
//! ...
//! dead letters: 2
//! ```
//!
//! Notice: to sleep and try again in place would hold up the whole partition, and for longer than
//! `max.poll.interval.ms` it would cost the membership. Here each delay has its own topic, group and consumer, so what
//! is at its head is due first, give or take the jitter, and to sleep until then holds up nobody. Without the jitter,
//! all that failed together would come back together.
//!
//! Try: send while it is stopped; `cargo lab kill kafka_retry_dlq` while payment-3 is on its way, and start it again.
//!
//! Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_dlq_replay, kafka_manual_commit.

use std::fmt::Display;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{
    BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance, StreamConsumer,
};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Header, Headers, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, ClientContext, Message};
use serde::Deserialize;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const PAYMENTS: &str = "retry-dlq.payments";
const DEAD_LETTERS: &str = "retry-dlq.payments.dlq";
const PARTITIONS: i32 = 3;
const ATTEMPTS: u32 = 5;
/// Before attempt 2. It doubles with each attempt, up to the cap.
const FIRST_DELAY_MS: u64 = 100;
const MAX_DELAY_MS: u64 = 500;
const PATIENCE: Duration = Duration::from_secs(5);
/// Time for the last commit.
const LEAVING: Duration = Duration::from_secs(15);

#[derive(Deserialize)]
struct Payment {
    payment_id: String,
    /// How often the bank will not answer: what a real one does not tell.
    #[serde(default)]
    fails: u32,
}

enum Failure {
    /// The next attempt may succeed.
    Passing(String),
    /// No attempt will: the record itself is at fault.
    Lasting(String),
}

/// Attempt 1 is made at the topic itself, each further one at a topic of its own.
fn topic_of(attempt: u32) -> String {
    match attempt {
        1 => PAYMENTS.into(),
        _ => format!("{PAYMENTS}.retry-{}", attempt - 1),
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    create_topics(&brokers).await?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "30000")
        // The broker's limit is for what is compressed, the client's for what is not: a payment that was small enough
        // for the one can be too large for the other, and would be tried again for ever.
        .set("compression.type", "zstd")
        .set("message.max.bytes", "1000000000")
        .create()?;
    match std::env::args().nth(1).as_deref() {
        None => {}
        Some("send") => return send(&producer).await,
        Some(_) => bail!("usage: kafka_retry_dlq [send]"),
    }

    let stop = CancellationToken::new();
    let counts = Arc::new(Counts::default());
    let mut stages = JoinSet::new();
    // Before anything else runs, so that no Ctrl-C is missed.
    let mut interrupt = std::pin::pin!(tokio::signal::ctrl_c());
    tokio::select! {
        biased;
        signal = &mut interrupt => signal?,
        () = async {} => {}
    }
    for attempt in 1..=ATTEMPTS {
        let stage = Stage {
            attempt,
            producer: producer.clone(),
            counts: counts.clone(),
            stop: stop.clone(),
        };
        let brokers = brokers.clone();
        stages.spawn(async move { stage.run(&brokers).await });
    }
    tokio::select! {
        signal = &mut interrupt => signal?,
        // None ends by itself, except by an error.
        Some(ended) = stages.join_next() => ended??,
    }
    stop.cancel();
    while let Some(ended) = stages.join_next().await {
        ended??;
    }
    let [paid, retries, dead] =
        [&counts.paid, &counts.retries, &counts.dead].map(|count| count.load(Ordering::Relaxed));
    println!("stopped; paid: {paid}, to be retried: {retries}, dead letters: {dead}");
    Ok(())
}

#[derive(Default)]
struct Counts {
    paid: AtomicU32,
    retries: AtomicU32,
    dead: AtomicU32,
}

/// The consumer of one attempt.
struct Stage {
    attempt: u32,
    producer: FutureProducer,
    counts: Arc<Counts>,
    stop: CancellationToken,
}

impl Stage {
    async fn run(&self, brokers: &str) -> anyhow::Result<()> {
        let topic = topic_of(self.attempt);
        let consumer: StreamConsumer<Narrator> = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("group.id", format!("{topic}.payer"))
            .set("auto.offset.reset", "earliest")
            .set("enable.auto.commit", "true")
            .set("auto.commit.interval.ms", "1000")
            // Commit what was dealt with, and not what was merely read.
            .set("enable.auto.offset.store", "false")
            .set("session.timeout.ms", "10000")
            .set("socket.timeout.ms", "5000")
            .create_with_context(Narrator(self.attempt))?;
        consumer.subscribe(&[&topic])?;
        let worked = self.work(&consumer).await;
        let left = tokio::task::block_in_place(|| leave(consumer));
        worked.and(left)
    }

    async fn work(&self, consumer: &StreamConsumer<Narrator>) -> anyhow::Result<()> {
        loop {
            let received = tokio::select! {
                () = self.stop.cancelled() => break,
                received = consumer.recv() => received,
            };
            match received {
                Ok(record) => {
                    // Not yet handled: it is read again, and waits again, after the next start.
                    tokio::select! {
                        () = self.stop.cancelled() => break,
                        () = until_due(&record) => {}
                    }
                    self.handle(&record).await?;
                    consumer.store_offset_from_message(&record)?;
                }
                Err(error @ KafkaError::MessageConsumptionFatal(_)) => bail!(error),
                Err(error) => eprintln!("waiting for the broker: {error}"),
            }
        }
        Ok(())
    }

    /// Returns when the record was paid, or is safe in another topic.
    async fn handle(&self, record: &BorrowedMessage<'_>) -> anyhow::Result<()> {
        let attempt = self.attempt;
        let key = String::from_utf8_lossy(record.key().unwrap_or_default()).into_owned();
        let mut headers = Labels::of(record);
        let paid = match headers.unread {
            Some(_) => Err(Failure::Lasting("the name of a header is not UTF-8".into())),
            None => pay(record.payload().unwrap_or_default(), attempt),
        };
        let (cause, lasting) = match paid {
            Ok(()) => {
                self.counts.paid.fetch_add(1, Ordering::Relaxed);
                println!("{key}: paid at attempt {attempt}");
                return Ok(());
            }
            Err(Failure::Passing(cause)) => (cause, false),
            Err(Failure::Lasting(cause)) => (cause, true),
        };

        if attempt == 1 {
            // Whatever the sender has put there.
            headers.set("origin.topic", record.topic());
            headers.set("origin.partition", record.partition());
            headers.set("origin.offset", record.offset());
        }
        headers.set("attempts", attempt);
        headers.set("cause", &cause);
        let (topic, count, verdict) = if lasting || attempt == ATTEMPTS {
            headers.remove("due");
            (
                DEAD_LETTERS.into(),
                &self.counts.dead,
                "dead letter".to_owned(),
            )
        } else {
            let delay = (FIRST_DELAY_MS << (attempt - 1)).min(MAX_DELAY_MS);
            let delay = fastrand::u64(delay / 2..=delay);
            headers.set("due", now_ms() + delay);
            (
                topic_of(attempt + 1),
                &self.counts.retries,
                format!("again in {delay} ms"),
            )
        };
        let mut outgoing = FutureRecord::<[u8], [u8]>::to(&topic).headers(headers.into_owned());
        (outgoing.key, outgoing.payload) = (record.key(), record.payload());
        let delivery = self.producer.send(outgoing, PATIENCE).await;
        delivery
            .map_err(|(error, _)| error)
            .with_context(|| format!("cannot write to {topic}; {key} is tried again at restart"))?;
        count.fetch_add(1, Ordering::Relaxed);
        println!("{key}: attempt {attempt} failed: {cause}; {verdict}");
        Ok(())
    }
}

/// The work. A real one would ask the bank, under the payment's id: the same attempt may come twice.
fn pay(payload: &[u8], attempt: u32) -> Result<(), Failure> {
    let payment: Payment = serde_json::from_slice(payload)
        .map_err(|error| Failure::Lasting(format!("not a payment: {error}")))?;
    if payment.payment_id.is_empty() {
        return Err(Failure::Lasting("not a payment: no id".into()));
    }
    if attempt <= payment.fails {
        return Err(Failure::Passing("the bank does not answer".into()));
    }
    Ok(())
}

async fn until_due(record: &BorrowedMessage<'_>) {
    let due = Labels::of(record)
        .get("due")
        .and_then(|due| due.parse().ok());
    // Never longer than the longest delay, whatever the header and the clocks of other machines say.
    let left = due.unwrap_or(0_u64).saturating_sub(now_ms());
    tokio::time::sleep(Duration::from_millis(left.min(MAX_DELAY_MS))).await;
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(0))
}

/// Headers of which each key has one value. Kafka's are a list, in which a key may occur again and again.
#[derive(Default)]
struct Labels {
    list: Vec<(String, Option<Vec<u8>>)>,
    /// All that the record came with, if it cannot be read.
    unread: Option<OwnedHeaders>,
}

impl Labels {
    fn of(record: &BorrowedMessage<'_>) -> Labels {
        let Some(all) = record.headers() else {
            return Labels::default();
        };
        let copy = |one: Header<'_, &[u8]>| (one.key.to_owned(), one.value.map(<[u8]>::to_vec));
        // The crate panics on a header whose name is not UTF-8, which any other client can write.
        let list = catch_unwind(AssertUnwindSafe(|| all.iter().map(copy).collect()));
        let unread = list.is_err().then(|| all.detach());
        let list = list.unwrap_or_default();
        Labels { list, unread }
    }

    fn get(&self, key: &str) -> Option<String> {
        let (_, value) = self.list.iter().rfind(|(name, _)| name == key)?;
        String::from_utf8(value.clone()?).ok()
    }

    fn remove(&mut self, key: &str) {
        self.list.retain(|(name, _)| name != key);
    }

    fn set(&mut self, key: &str, value: impl Display) {
        self.remove(key);
        self.list
            .push((key.to_owned(), Some(value.to_string().into_bytes())));
    }

    fn into_owned(self) -> OwnedHeaders {
        let unread = self.unread.unwrap_or_default();
        self.list.iter().fold(unread, |headers, (key, value)| {
            let value = value.as_ref();
            headers.insert(Header { key, value })
        })
    }
}

/// Commits what is done and leaves the group: the others take over now and not after session.timeout.ms.
///
/// With the broker gone, either takes as long as that time, and sometimes never ends (librdkafka 2.12; see its issue 3740
/// for the close). Hence a thread that can be left behind.
fn leave(consumer: StreamConsumer<Narrator>) -> anyhow::Result<()> {
    let (done, answers) = mpsc::channel();
    thread::spawn(move || {
        done.send(consumer.commit_consumer_state(CommitMode::Sync))?;
        drop(consumer);
        done.send(Ok(()))
    });
    let committed = answers.recv_timeout(LEAVING);
    if committed.is_err() || answers.recv_timeout(PATIENCE).is_err() {
        eprintln!("left without a word to the group: no broker answers");
    }
    match committed {
        // No offset: all was committed already.
        Ok(Ok(()) | Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset))) => Ok(()),
        Ok(Err(error)) => bail!("the last payments will be tried again: {error}"),
        Err(_) => bail!("the last payments will be tried again, unless the commit has arrived"),
    }
}

struct Narrator(u32);

impl ClientContext for Narrator {}

impl ConsumerContext for Narrator {
    fn post_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let (1, Rebalance::Assign(list)) = (self.0, rebalance)
            && list.count() > 0
        {
            // `println!` would panic on a closed pipe, in the middle of a rebalance.
            let _ = writeln!(io::stdout(), "waiting for payments");
        }
    }
}

async fn send(producer: &FutureProducer) -> anyhow::Result<()> {
    for (key, payload) in [
        ("payment-1", r#"{"payment_id":"payment-1"}"#),
        ("payment-2", r#"{"payment_id":"payment-2","fails":2}"#),
        ("payment-3", r#"{"payment_id":"payment-3","fails":99}"#),
        ("payment-4", r#"{"payment_id":"#),
    ] {
        let record = FutureRecord::to(PAYMENTS).key(key).payload(payload);
        let delivery = producer.send(record, PATIENCE).await;
        delivery.map_err(|(error, _)| error)?;
    }
    println!(
        "sent: payment-1, payment-2 (fails twice), payment-3 (fails always), payment-4 (no payment at all)"
    );
    Ok(())
}

async fn create_topics(brokers: &str) -> anyhow::Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    // It blocks, but nothing else runs yet.
    admin
        .inner()
        .fetch_metadata(None, PATIENCE)
        .with_context(|| {
            format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one")
        })?;
    let mut names: Vec<String> = (2..=ATTEMPTS).map(topic_of).collect();
    names.push(DEAD_LETTERS.into());
    // -1 is the broker's default replication factor.
    let topic = |name| NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(-1));
    // Room for the largest payment and the headers that it gets.
    let roomy = |name| topic(name).set("max.message.bytes", "10485760");
    let mut topics: Vec<NewTopic<'_>> = names.iter().map(|name| roomy(name.as_str())).collect();
    // More than the megabyte that clients send by default: a replay adds a header here, too.
    topics.push(topic(PAYMENTS).set("max.message.bytes", "5242880"));
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin.create_topics(&topics, &options).await {
        Ok(results) => {
            for result in results {
                match result {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                    Err((topic, code)) => bail!("cannot create topic {topic}: {code}"),
                }
            }
        }
        // Not every cluster lets its clients create topics; librdkafka's mock does not.
        Err(error) => eprintln!("leaving the topics to the broker: {error}"),
    }
    Ok(())
}
