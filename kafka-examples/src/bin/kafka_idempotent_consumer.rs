//! Idempotent consumer: every payment takes effect once, however often it is delivered
//!
//! Kafka delivers at least once: a producer sends again what it is unsure of, a consumer reads again what it had not
//! committed. So the effect and the message's id go into one SQLite transaction, and an id that is already there means
//! that the effect is, too. Exactly-once effect, as long as a duplicate comes before its id is forgotten.
//!
//! ```console
//! 1$ cargo lab run kafka_idempotent_consumer send 3
//! sent: payment-1, payment-2, payment-3
//! 2$ cargo lab run kafka_idempotent_consumer
//! payment-1: user-1 +100 cents, balance 100
//! payment-2: user-2 +100 cents, balance 100
//! payment-3: user-1 +100 cents, balance 200
//! 1$ cargo lab run kafka_idempotent_consumer send 3
//! sent: payment-1, payment-2, payment-3
//! 2:
//! payment-1: seen before, ignored
//! payment-2: seen before, ignored
//! payment-3: seen before, ignored
//! 2^C
//! in the books: 3 payments, 300 cents, 0 rejected
//! ```
//!
//! Notice: "look up, then do, then remember" has two gaps: a crash after the doing repeats it, and two members that
//! look up at the same time both do it. Here the database's unique id decides, and there is no time between. The id
//! comes from the sender: topic, partition and offset would recognise a record that is read again, but not a payment
//! that is sent again. The ids that are kept are bounded (the newest IDS_KEPT): keep more than can come in
//! the time for which a producer may retry, or the group may be set back.
//!
//! Try: `cargo lab kill kafka_idempotent_consumer` at any moment while it works through 5000 payments, start it again:
//! the sum is right. Set IDS_KEPT=2 and send 3 twice: forgotten ids are paid again.
//!
//! Settings: KAFKA_BROKERS (localhost:9092); PAYMENTS_DB (kafka-payments.sqlite in the current folder); IDS_KEPT
//! (100000); the arguments `send N` send payments 1 to N. See also: kafka_manual_commit, order_pipeline.

use std::pin::pin;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{CommitMode, Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message};
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use serde::{Deserialize, Serialize};

const TOPIC: &str = "idempotent-payments";
/// One, so that the output is in order. With more, the database still sees to it that each payment counts once.
const PARTITIONS: i32 = 1;
const GROUP: &str = "idempotent-payments";
const LARGEST: u64 = 1_000_000_000;
const PATIENCE: Duration = Duration::from_secs(5);
/// Time for the last commit.
const LEAVING: Duration = Duration::from_secs(15);

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS balances (user_id TEXT PRIMARY KEY, cents INTEGER NOT NULL, payments INTEGER NOT NULL);
    -- Numbered, so that the oldest are known. Not by AUTOINCREMENT: there, duplicates would use up numbers, too.
    CREATE TABLE IF NOT EXISTS seen (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE);
    -- Records that are no payments, as they came.
    CREATE TABLE IF NOT EXISTS no_payments (
        topic TEXT, partition INTEGER, offset INTEGER, timestamp INTEGER, key BLOB, payload BLOB, reason TEXT);
    -- A topic that is made anew begins again at offset 0. SQLite takes a null for different from every other null.
    CREATE UNIQUE INDEX IF NOT EXISTS each_once
        ON no_payments (topic, partition, offset, timestamp, ifnull(payload, 'null'));
";

#[derive(Serialize, Deserialize)]
struct Payment {
    /// Given once by whoever causes the payment, and the same however often it is sent.
    payment_id: String,
    user_id: String,
    cents: i64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    create_topic(&brokers).await?;
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => consume(&brokers).await,
        ["send", count] => {
            let count = count.parse().context("N is the number of payments")?;
            send(&brokers, count).await
        }
        _ => bail!("usage: kafka_idempotent_consumer [send N]"),
    }
}

async fn send(brokers: &str, count: u32) -> anyhow::Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // It prevents doubles by the client's own retries, not those of a program that is started again.
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    let mut sent = Vec::new();
    for number in 1..=count {
        let payment = Payment {
            payment_id: format!("payment-{number}"),
            user_id: format!("user-{}", 2 - number % 2),
            cents: 100,
        };
        let payload = serde_json::to_string(&payment)?;
        let record = FutureRecord::to(TOPIC)
            .key(&payment.user_id)
            .payload(&payload);
        // Queued here, confirmed below: no round trip for each.
        let delivery = producer.send_result(record).map_err(|(error, _)| error)?;
        sent.push((payment.payment_id, delivery));
    }
    let mut ids = Vec::new();
    for (id, delivery) in sent {
        let report = delivery.await?.map_err(|(error, _)| error);
        report.with_context(|| format!("{id}: no delivery report; send all again"))?;
        ids.push(id);
    }
    println!("sent: {}", ids.join(", "));
    Ok(())
}

async fn consume(brokers: &str) -> anyhow::Result<()> {
    let path = std::env::var("PAYMENTS_DB").unwrap_or_else(|_| "kafka-payments.sqlite".into());
    let kept = match std::env::var("IDS_KEPT") {
        Ok(kept) => kept.parse().context("IDS_KEPT is a number of ids")?,
        Err(_) => 100_000_i64,
    };
    let kept = kept.max(1);
    let mut books = Connection::open(&path).with_context(|| format!("cannot open {path}"))?;
    // Another member may be at it, too.
    books.busy_timeout(Duration::from_secs(30))?;
    books.pragma_update(None, "journal_mode", "wal")?;
    books
        .execute_batch(TABLES)
        .with_context(|| format!("cannot use {path}"))?;

    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        // The position may lag behind the books, for they know what is done. It must never lead.
        .set("enable.auto.commit", "true")
        .set("auto.commit.interval.ms", "1000")
        .set("enable.auto.offset.store", "false")
        .set("session.timeout.ms", "10000")
        .set("socket.timeout.ms", "5000")
        .create()?;
    consumer.subscribe(&[TOPIC])?;
    let worked = work(&consumer, &mut books, kept).await;
    let left = leave(consumer);
    worked?;
    if let Err(error) = left {
        // Nothing is wrong with the books: they will know what comes again.
        eprintln!("{error:#}");
    }
    let sums =
        "SELECT ifnull(sum(payments), 0), ifnull(sum(cents), 0), (SELECT count(*) FROM no_payments)
        FROM balances";
    let (payments, cents, rejected): (i64, i64, i64) =
        books.query_row(sums, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    println!("in the books: {payments} payments, {cents} cents, {rejected} rejected");
    Ok(())
}

/// Until Ctrl-C.
async fn work(consumer: &StreamConsumer, books: &mut Connection, kept: i64) -> anyhow::Result<()> {
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let received = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            received = consumer.recv() => received,
        };
        match received {
            Ok(record) => {
                // SQLite blocks, for a write to the disk; this gives other tasks their thread.
                println!(
                    "{}",
                    tokio::task::block_in_place(|| apply(books, &record, kept))?
                );
                consumer.store_offset_from_message(&record)?;
            }
            Err(error @ KafkaError::MessageConsumptionFatal(_)) => bail!(error),
            // A lost connection, for example: the client tries again by itself, and says so each time.
            Err(error) => eprintln!("waiting for the broker: {error}"),
        }
    }
    Ok(())
}

/// Commits what is done and leaves the group: the others take over now and not after session.timeout.ms.
///
/// With the broker gone, either takes as long as that time, and sometimes never ends (librdkafka 2.12; see its issue 3740
/// for the close). Hence a thread that can be left behind.
fn leave(consumer: StreamConsumer) -> anyhow::Result<()> {
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
        Ok(Err(error)) => bail!("the last payments will be read again: {error}"),
        Err(_) => bail!("the last payments will be read again, unless the commit has arrived"),
    }
}

/// The pattern: id and effect in one transaction. Returns what to say about it.
fn apply(
    books: &mut Connection,
    record: &BorrowedMessage<'_>,
    kept: i64,
) -> rusqlite::Result<String> {
    // Immediate: the write lock is taken before anything is read, so that members queue instead of failing.
    let books = books.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let said = match read(record) {
        Ok(payment) => pay(&books, &payment, kept)?,
        Err(reason) => {
            let (topic, partition, offset) = (record.topic(), record.partition(), record.offset());
            let row = params![
                topic,
                partition,
                offset,
                record.timestamp().to_millis().unwrap_or(0),
                record.key(),
                record.payload(),
                reason
            ];
            books.execute(
                "INSERT OR IGNORE INTO no_payments VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )?;
            format!("partition {partition} offset {offset}: rejected, no payment: {reason}")
        }
    };
    books.commit()?;
    Ok(said)
}

fn read(record: &BorrowedMessage<'_>) -> Result<Payment, String> {
    let payload = record.payload().ok_or("it has no payload")?;
    let payment: Payment = serde_json::from_slice(payload).map_err(|error| error.to_string())?;
    if payment.payment_id.is_empty() {
        return Err("its payment_id is empty".into());
    }
    // SQLite's sums turn into floating point when they overflow.
    if payment.cents.unsigned_abs() > LARGEST {
        return Err(format!("{} cents is beyond all reason", payment.cents));
    }
    Ok(payment)
}

fn pay(books: &Connection, payment: &Payment, kept: i64) -> rusqlite::Result<String> {
    let Payment {
        payment_id,
        user_id,
        cents,
    } = payment;
    let insert = "INSERT INTO seen (id) VALUES (?) ON CONFLICT DO NOTHING RETURNING number";
    let number: Option<i64> = books
        .prepare_cached(insert)?
        .query_row([payment_id], |row| row.get(0))
        .optional()?;
    let Some(number) = number else {
        return Ok(format!("{payment_id}: seen before, ignored"));
    };
    let effect = "INSERT INTO balances VALUES (?1, ?2, 1)
        ON CONFLICT DO UPDATE SET cents = cents + ?2, payments = payments + 1 RETURNING cents";
    let balance: i64 = books
        .prepare_cached(effect)?
        .query_row(params![user_id, cents], |row| row.get(0))?;
    books
        .prepare_cached("DELETE FROM seen WHERE number <= ?")?
        .execute([number - kept])?;
    Ok(format!(
        "{payment_id}: {user_id} {cents:+} cents, balance {balance}"
    ))
}

/// Left to the broker, the topic would be created by the first record, with the broker's settings.
async fn create_topic(brokers: &str) -> anyhow::Result<()> {
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
    let topic = NewTopic::new(TOPIC, PARTITIONS, TopicReplication::Fixed(-1));
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin.create_topics([&topic], &options).await {
        Ok(results) => {
            for result in results {
                match result {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                    Err((topic, code)) => bail!("cannot create topic {topic}: {code}"),
                }
            }
        }
        // Not every cluster lets its clients create topics; librdkafka's mock does not.
        Err(error) => eprintln!("leaving topic {TOPIC} to the broker: {error}"),
    }
    Ok(())
}
