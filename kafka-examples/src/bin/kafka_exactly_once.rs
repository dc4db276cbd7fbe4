//! Exactly once: consume, transform and produce in Kafka transactions
//!
//! Orders become invoices. A batch's invoices and the group's position are one transaction: both are there or neither, so
//! whoever reads with `read_committed` sees one invoice per order, in order per key, whatever is killed and whenever.
//! It holds from Kafka to Kafka. An effect elsewhere, a mail or a charge, is repeated when a batch is.
//!
//! ```console
//! 1$ cargo lab run kafka_exactly_once send 3 nonsense 3
//! sent: 7 records
//! 1$ cargo lab run kafka_exactly_once
//! working as exactly-once-1
//! aborted, nothing of it counts: partition 0 offset 3 is no order: expected ident at line 1 column 2
//! committed: 6 invoices, 1 dead letter
//! 2$ cargo lab run kafka_exactly_once
//! working as exactly-once-1
//! 1:
//! ...
//! [exit 1]
//! 1$ cargo lab run kafka_exactly_once send 2
//! sent: 2 records
//! 2:
//! committed: 2 invoices, 0 dead letters
//! 2^C
//! stopped; transactions: 1 committed, 0 aborted
//! ```
//!
//! Notice: the second program took over the `transactional.id`, and the first is fenced off: it ends with an error, and
//! what it had in work is not written. This is what makes a zombie harmless, a program that was frozen long enough to
//! be replaced, and goes on. The dead letter is part of the transaction, too, so there is one. An error of a commit says
//! nothing about its outcome: the only repair is a new producer, whose `init_transactions` makes the broker settle the
//! matter, and to read the positions after that. `send` twice makes two orders and two invoices: Kafka knows records, not
//! orders, and to know those is the part of kafka_idempotent_consumer.
//!
//! Try: WORK_MS=10 with `send 1000`, `cargo lab kill kafka_exactly_once` in the middle, start it again, then read
//! `exactly-once.invoices` to its end with isolation.level `read_uncommitted` and `read_committed`, and count. A second
//! program that shares the work, instead of taking it over, needs its own TRANSACTIONAL_ID.
//!
//! Settings: KAFKA_BROKERS (localhost:9092); TRANSACTIONAL_ID (exactly-once-1); BATCH (100) records, or what comes in
//! BATCH_MS (200), make a transaction, but no more than 5 seconds of work; WORK_MS (0) is how long an order takes, at
//! most 5000; `send` and numbers send so many orders, and other words as they are.
//! See also: kafka_window_aggregation, order_pipeline.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext, Rebalance};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{BaseRecord, FutureProducer, FutureRecord, Producer, ThreadedProducer};
use rdkafka::{ClientConfig, ClientContext, Message, Offset, TopicPartitionList};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

const ORDERS: &str = "exactly-once.orders";
const INVOICES: &str = "exactly-once.invoices";
const DEAD_LETTERS: &str = "exactly-once.orders.dlq";
const GROUP: &str = "exactly-once";
/// The same for orders and invoices: an order's key is the key of its invoice.
const PARTITIONS: i32 = 2;
/// A record may be as large as the broker lets it be. With the headers of a dead letter it is larger still, and another
/// compression may have done better. An order, whose invoice has to fit, too, is never that large.
const LARGEST_DEAD_LETTER: &str = "10485760";
const LARGEST_ORDER: usize = 100_000;
/// Of work in a transaction. The broker aborts one that takes longer than `transaction.timeout.ms`, and fences us off.
const MOST_WORK: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(5);
const FORGOTTEN: Duration = Duration::from_secs(30);

#[derive(Serialize, Deserialize)]
struct Order {
    order_id: String,
    user_id: String,
    cents: i64,
}

#[derive(Clone)]
struct Settings {
    brokers: String,
    id: String,
    batch: usize,
    batch_time: Duration,
    work: Duration,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let settings = Settings {
        brokers: std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into()),
        id: std::env::var("TRANSACTIONAL_ID").unwrap_or_else(|_| "exactly-once-1".into()),
        // Below the 100,000 that fit into the producer's queue.
        batch: usize::try_from(setting("BATCH", 100)?)?.clamp(1, 10_000),
        // Well below transaction.timeout.ms.
        batch_time: Duration::from_millis(setting("BATCH_MS", 200)?.min(5_000)),
        work: Duration::from_millis(setting("WORK_MS", 0)?).min(MOST_WORK),
    };
    create_topics(&settings.brokers).await?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["send", ref what @ ..] => return send(&settings.brokers, what).await,
        [] => {}
        _ => bail!("usage: kafka_exactly_once [send N|WORD...]"),
    }
    // The calls of a transaction block, so the work has a thread of its own.
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let mut worker = tokio::task::spawn_blocking(move || work(&settings, &stopped));
    tokio::select! {
        ended = &mut worker => ended?,
        signal = tokio::signal::ctrl_c() => {
            signal?;
            stop.cancel();
            worker.await?
        }
    }
}

fn setting(name: &str, default: u64) -> anyhow::Result<u64> {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{name} is {text:?}, not a whole number")),
        Err(_) => Ok(default),
    }
}

async fn send(brokers: &str, what: &[&str]) -> anyhow::Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "30000")
        .create()?;
    let mut payloads = Vec::new();
    let mut number = 0;
    for word in what {
        let Ok(count) = word.parse::<u32>() else {
            payloads.push(((*word).to_owned(), "user-1".to_owned()));
            continue;
        };
        for _ in 0..count {
            number += 1;
            let order = Order {
                order_id: format!("order-{number}"),
                user_id: format!("user-{}", number % 5),
                cents: 1000 + number,
            };
            payloads.push((serde_json::to_string(&order)?, order.user_id));
        }
    }
    let mut deliveries = Vec::new();
    for (payload, user) in &payloads {
        let mut record = FutureRecord::to(ORDERS).key(user).payload(payload);
        // So that the transcript is the same each time. Usually the key alone decides.
        record.partition = (payloads.len() < 10).then_some(0);
        deliveries.push(producer.send_result(record).map_err(|(error, _)| error)?);
    }
    for delivery in deliveries {
        let report = delivery.await?.map_err(|(error, _)| error);
        report.with_context(|| format!("a record has no delivery report from {brokers}"))?;
    }
    println!("sent: {} records", payloads.len());
    Ok(())
}

/// Begins again after every error but one. What is committed is in Kafka, and nothing else matters.
fn work(settings: &Settings, stop: &CancellationToken) -> anyhow::Result<()> {
    let mut counts = Counts::default();
    while !stop.is_cancelled() {
        let Err(error) = session(settings, stop, &mut counts) else {
            break;
        };
        if is_fenced(&error) {
            return Err(error).context(format!(
                "fenced off: another program works as {0}, or the broker gave up on this one's transaction; \
                 nothing that was in work here has been written",
                settings.id
            ));
        }
        eprintln!("beginning again from what is committed: {error:#}");
        sleep(Duration::from_millis(500));
    }
    let Counts { committed, aborted } = counts;
    println!("stopped; transactions: {committed} committed, {aborted} aborted");
    Ok(())
}

#[derive(Default)]
struct Counts {
    committed: u32,
    aborted: u32,
}

type Transactions = ThreadedProducer<rdkafka::producer::DefaultProducerContext>;

fn session(
    settings: &Settings,
    stop: &CancellationToken,
    counts: &mut Counts,
) -> anyhow::Result<()> {
    let producer: Transactions = ClientConfig::new()
        .set("bootstrap.servers", &settings.brokers)
        // The same after a restart, and only one program's at a time.
        .set("transactional.id", &settings.id)
        // After that the broker aborts what a dead program left open. Until then its readers wait.
        .set("transaction.timeout.ms", "15000")
        .set("message.timeout.ms", "15000")
        // The broker's limit is for what is compressed, the client's for what is not: a record that was small enough
        // for the one can be too large for the other, and would fail every transaction.
        .set("compression.type", "zstd")
        .set("message.max.bytes", "1000000000")
        // A batch is complete when it is sent.
        .set("linger.ms", "0")
        .create()?;
    // Fences off whoever used this id before, and aborts what that one left open. Only after this are the positions
    // final, so the consumer comes second.
    producer.init_transactions(PATIENCE)?;
    let consumer: BaseConsumer<Revoked> = ClientConfig::new()
        .set("bootstrap.servers", &settings.brokers)
        .set("group.id", GROUP)
        // A static member is known by name: after a crash it has its partitions back at once.
        .set("group.instance.id", &settings.id)
        .set("session.timeout.ms", "10000")
        .set("socket.timeout.ms", "5000")
        .set("isolation.level", "read_committed")
        .set("auto.offset.reset", "earliest")
        // The position moves with the transaction, and in no other way.
        .set("enable.auto.commit", "false")
        .create_with_context(Revoked::default())?;
    consumer.subscribe(&[ORDERS])?;
    println!("working as {}", settings.id);

    batches(&producer, &consumer, settings, stop, counts).map_err(|error| {
        // After a fatal error every call says only that there was one.
        match producer.client().fatal_error() {
            Some((code, _)) => error.context(KafkaError::Global(code)),
            None => error,
        }
    })
}

fn batches(
    producer: &Transactions,
    consumer: &BaseConsumer<Revoked>,
    settings: &Settings,
    stop: &CancellationToken,
    counts: &mut Counts,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    let (mut batch, mut poison) = (Vec::new(), BTreeMap::new());
    while !stop.is_cancelled() {
        gather(consumer, settings, &mut batch)?;
        if batch.is_empty() {
            // A group whose broker was killed may forget a member that waits for its partitions.
            if begun.elapsed() > FORGOTTEN && consumer.assignment()?.count() == 0 {
                bail!("no partitions to read for {} s", FORGOTTEN.as_secs());
            }
            continue;
        }
        // Each round gets some of it done, or finds records that it cannot be done with.
        let done = loop {
            match transact(producer, consumer, &batch, &poison, settings)? {
                Ok(done) => break done,
                Err(bad) => {
                    producer.abort_transaction(PATIENCE)?;
                    counts.aborted += 1;
                    for ((partition, offset), reason) in &bad {
                        println!(
                            "aborted, nothing of it counts: partition {partition} offset {offset} is no order: {reason}"
                        );
                    }
                    poison.extend(bad);
                }
            }
        };
        let letters = batch
            .drain(..done)
            .filter(|record| poison.remove(&place(record)).is_some())
            .count();
        counts.committed += 1;
        println!(
            "committed: {} invoices, {letters} dead letter{}",
            done - letters,
            if letters == 1 { "" } else { "s" }
        );
    }
    Ok(())
}

/// Up to BATCH records, as many as come within BATCH_MS of the first; none if it is quiet. What the last transaction
/// has left over comes first.
fn gather(
    consumer: &BaseConsumer<Revoked>,
    settings: &Settings,
    batch: &mut Vec<OwnedMessage>,
) -> anyhow::Result<()> {
    let wait = if batch.is_empty() { 100 } else { 0 };
    let mut deadline = Instant::now() + Duration::from_millis(wait);
    while batch.len() < settings.batch {
        let next = consumer.poll(deadline.saturating_duration_since(Instant::now()));
        // A rebalance happens inside of poll. What was read before is another member's by now, or comes again.
        if consumer.context().0.swap(false, Ordering::Relaxed) {
            batch.clear();
        }
        match next {
            Some(Ok(record)) => {
                if batch.is_empty() {
                    deadline = Instant::now() + settings.batch_time;
                }
                batch.push(record.detach());
            }
            Some(Err(error @ KafkaError::MessageConsumptionFatal(_))) => bail!(error),
            // A lost connection, for example: the client tries again by itself.
            Some(Err(error)) => eprintln!("waiting for the broker: {error}"),
            None => break,
        }
    }
    Ok(())
}

type Place = (i32, i64);

fn place(record: &OwnedMessage) -> Place {
    (record.partition(), record.offset())
}

/// The pattern: all that a batch leads to, and the position behind it, in one transaction. Returns how many of its
/// records are done with; the rest is for the next one.
///
/// If there are records that cannot be transformed, it returns those, and why. The transaction is then still open, and
/// some of it is written.
fn transact(
    producer: &Transactions,
    consumer: &BaseConsumer<Revoked>,
    batch: &[OwnedMessage],
    poison: &BTreeMap<Place, String>,
    settings: &Settings,
) -> anyhow::Result<Result<usize, BTreeMap<Place, String>>> {
    producer.begin_transaction()?;
    let begun = Instant::now();
    let (mut done, mut next, mut bad) = (0, BTreeMap::new(), BTreeMap::new());
    for record in batch {
        if begun.elapsed() > MOST_WORK {
            break;
        }
        if let Some(reason) = poison.get(&place(record)) {
            bury(producer, record, reason)?;
        } else {
            match invoice(record.payload()) {
                Ok(invoice) if bad.is_empty() => {
                    sleep(settings.work);
                    let mut outgoing = BaseRecord::<[u8], [u8]>::to(INVOICES).payload(&invoice);
                    outgoing.key = record.key();
                    producer.send(outgoing).map_err(|(error, _)| error)?;
                }
                Ok(_) => {} // of no use any more
                Err(reason) => {
                    bad.insert(place(record), reason);
                }
            }
        }
        next.insert(record.partition(), record.offset() + 1);
        done += 1;
    }
    if !bad.is_empty() {
        return Ok(Err(bad));
    }
    let mut positions = TopicPartitionList::new();
    for (partition, next) in next {
        positions.add_partition_offset(ORDERS, partition, Offset::Offset(next))?;
    }
    // With the member's name and generation: the broker refuses one that has lost its partitions meanwhile.
    let member = consumer.group_metadata().context("not in the group")?;
    producer.send_offsets_to_transaction(&positions, &member, PATIENCE)?;
    // The commit would wait for the delivery reports, too, but in steps of 100 ms.
    let deadline = Instant::now() + PATIENCE;
    while producer.in_flight_count() > 0 && Instant::now() < deadline {
        sleep(Duration::from_millis(1));
    }
    // A record that was not delivered makes this fail.
    producer.commit_transaction(PATIENCE)?;
    Ok(Ok(done))
}

/// The transformation. Bytes from a topic can be anything.
fn invoice(payload: Option<&[u8]>) -> Result<Vec<u8>, String> {
    let payload = payload.ok_or("it has no payload")?;
    if payload.len() > LARGEST_ORDER {
        return Err(format!("it has {} bytes", payload.len()));
    }
    let order: Order = serde_json::from_slice(payload).map_err(|error| error.to_string())?;
    if order.order_id.is_empty() {
        return Err("its order_id is empty".into());
    }
    serde_json::to_vec(&order).map_err(|error| error.to_string())
}

/// The record as it came, with where it came from and why it failed.
fn bury(producer: &Transactions, record: &OwnedMessage, reason: &str) -> anyhow::Result<()> {
    let (partition, offset) = (record.partition().to_string(), record.offset().to_string());
    let origin = [
        ("reason", reason),
        ("topic", record.topic()),
        ("partition", &partition),
        ("offset", &offset),
    ];
    let known = record.headers().cloned().unwrap_or_else(OwnedHeaders::new);
    let headers = origin.into_iter().fold(known, |headers, (key, value)| {
        headers.insert(Header {
            key,
            value: Some(value),
        })
    });
    let mut letter = BaseRecord::<[u8], [u8]>::to(DEAD_LETTERS).headers(headers);
    (letter.key, letter.payload) = (record.key(), record.payload());
    producer.send(letter).map_err(|(error, _)| error)?;
    Ok(())
}

/// The broker has a newer user of this id: as a producer, or as a member of the group.
fn is_fenced(error: &anyhow::Error) -> bool {
    use RDKafkaErrorCode::{Fenced, FencedInstanceId, InvalidProducerEpoch, ProducerFenced};
    let code = match error.downcast_ref() {
        Some(KafkaError::Transaction(error)) => error.code(),
        Some(KafkaError::MessageConsumptionFatal(code)) => *code,
        Some(error) => error
            .rdkafka_error_code()
            .unwrap_or(RDKafkaErrorCode::Unknown),
        None => return false,
    };
    matches!(
        code,
        Fenced | FencedInstanceId | InvalidProducerEpoch | ProducerFenced
    )
}

/// Whether partitions were taken away.
#[derive(Default)]
struct Revoked(AtomicBool);

impl ClientContext for Revoked {}

impl ConsumerContext for Revoked {
    fn pre_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Revoke(_) = rebalance {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// Left to the broker, the topics would be created by their first record, with the broker's settings.
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
    // -1 is the broker's default replication factor.
    let orders = NewTopic::new(ORDERS, PARTITIONS, TopicReplication::Fixed(-1));
    let invoices = NewTopic::new(INVOICES, PARTITIONS, TopicReplication::Fixed(-1));
    let dead_letters = NewTopic::new(DEAD_LETTERS, 1, TopicReplication::Fixed(-1))
        .set("max.message.bytes", LARGEST_DEAD_LETTER);
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin
        .create_topics([&orders, &invoices, &dead_letters], &options)
        .await
    {
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
