//! Idempotent consumer: each payment takes effect once, however often it is delivered
//!
//! Kafka delivers at least once: a producer can send a payment twice, a consumer can read it twice. So the effect and
//! the payment's id are written in one SQLite transaction. If the id is there already, the effect is there too. The
//! effect is exactly once, as long as a duplicate arrives before its id is deleted.
//!
//! ```console
//! 1$ cargo lab run kafka_send -p 0 idempotent-payments '{"payment_id":"p-1","user_id":"eva","cents":100}' oops
//! ...
//! 2$ cargo lab run kafka_idempotent_consumer
//! p-1: eva +100 cents, balance 100
//! partition 0 offset 1 rejected: expected value at line 1 column 1
//! 1$ cargo lab run kafka_send -p 0 idempotent-payments '{"payment_id":"p-1","user_id":"eva","cents":100}'
//! ...
//! 2:
//! p-1: seen before, ignored
//! 2^C
//! left the group
//! ```
//!
//! Notice:
//! - "Look up, work, remember" has gaps: a crash or a second consumer fits between the steps. A unique id has no gap.
//! - The sender gives the id. An offset recognises a record that is read again, but not a payment that is sent again.
//! - Only the newest IDS_KEPT ids are kept. Keep more than arrive while a producer retries or offsets may be reset.
//! - A malformed payment is written to the table `rejected`, once and in the same way. It does not block the others.
//!
//! Try: `kill -9` it while it works on many payments, and start it again: the balances are right. Settings:
//! KAFKA_BROKERS (localhost:9092), PAYMENTS_DB (kafka-payments.sqlite), RUST_LOG. See also: kafka_exactly_once.

use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;
use rdkafka::{ClientConfig, Message};
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;

const TOPIC: &str = "idempotent-payments";
const GROUP: &str = "idempotent-payments";
const IDS_KEPT: i64 = 100_000;
const TIMEOUT: Duration = Duration::from_secs(5);
const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS balances (user_id TEXT PRIMARY KEY, cents INTEGER, payments INTEGER);
    CREATE TABLE IF NOT EXISTS seen (number INTEGER PRIMARY KEY, id TEXT UNIQUE);
    -- A topic that is created again has the same offsets with other timestamps.
    CREATE TABLE IF NOT EXISTS rejected (partition, offset, timestamp, key BLOB, payload BLOB, reason TEXT,
        PRIMARY KEY (partition, offset, timestamp));
";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let path = std::env::var("PAYMENTS_DB").unwrap_or_else(|_| "kafka-payments.sqlite".into());
    let mut database = Connection::open(&path).with_context(|| format!("cannot open {path}"))?;
    // Another member may be writing.
    database.busy_timeout(Duration::from_secs(30))?;
    database.pragma_update(None, "journal_mode", "wal")?;
    database.execute_batch(TABLES)?;
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        // After a crash its partitions are given to another member after this time.
        .set("session.timeout.ms", "10000")
        // Stored offsets are committed every 5 s and at the end. They may lag the database, but never lead it.
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "true")
        .create()?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer
        .fetch_metadata(Some(TOPIC), TIMEOUT)
        .context(hint)?;
    consumer.subscribe(&[TOPIC])?;

    let worked = work(&consumer, &mut database).await;
    // Leave the group, so that another member takes over at once. With the broker down, the close can hang
    // (librdkafka issue 3740): wait no longer than TIMEOUT.
    let (done, closed) = oneshot::channel();
    thread::spawn(move || {
        drop(consumer);
        done.send(())
    });
    let closed = timeout(TIMEOUT, closed).await;
    worked?;
    closed.context("closed without leaving the group: no broker answers")??;
    println!("left the group");
    Ok(())
}

async fn work(consumer: &StreamConsumer, database: &mut Connection) -> anyhow::Result<()> {
    let mut stop = pin!(shutdown());
    loop {
        let received = tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            received = consumer.recv() => received,
        };
        match received {
            Ok(record) => {
                // It blocks. That is no harm: this task has nothing else to do, and the client has its own threads.
                println!("{}", apply(database, &record)?);
                if let Err(error) = consumer.store_offset_from_message(&record) {
                    println!("partition lost, the payment is delivered again: {error}");
                }
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The pattern: the id and the effect of a payment in one transaction. Returns what to print.
fn apply(database: &mut Connection, record: &BorrowedMessage<'_>) -> rusqlite::Result<String> {
    // Takes the write lock at once, so that two members wait for each other instead of failing.
    let transaction = database.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let parsed = serde_json::from_slice::<Payment>(record.payload().unwrap_or_default());
    let outcome = match parsed {
        Ok(payment) if payment.payment_id.is_empty() => {
            reject(&transaction, record, "no payment_id")?
        }
        Ok(payment) => pay(&transaction, payment)?,
        Err(error) => reject(&transaction, record, &error.to_string())?,
    };
    transaction.commit()?;
    Ok(outcome)
}

#[derive(Deserialize)]
struct Payment {
    payment_id: String,
    user_id: String,
    /// So small that no sum overflows.
    cents: i32,
}

fn pay(database: &Connection, payment: Payment) -> rusqlite::Result<String> {
    let (id, user, cents) = (payment.payment_id, payment.user_id, payment.cents);
    let insert = "INSERT INTO seen (id) VALUES (?) ON CONFLICT DO NOTHING RETURNING number";
    let new = database.query_row(insert, [&id], |row| row.get(0));
    let Some(number): Option<i64> = new.optional()? else {
        return Ok(format!("{id}: seen before, ignored"));
    };
    let oldest = number - IDS_KEPT;
    database.execute("DELETE FROM seen WHERE number <= ?", [oldest])?;
    let effect = "INSERT INTO balances VALUES (?1, ?2, 1)
        ON CONFLICT DO UPDATE SET cents = cents + ?2, payments = payments + 1 RETURNING cents";
    let balance: i64 = database.query_row(effect, params![user, cents], |row| row.get(0))?;
    Ok(format!("{id}: {user} {cents:+} cents, balance {balance}"))
}

fn reject(
    database: &Connection,
    record: &BorrowedMessage<'_>,
    reason: &str,
) -> rusqlite::Result<String> {
    let (partition, offset) = (record.partition(), record.offset());
    let time = record.timestamp().to_millis().unwrap_or_default();
    let values = params![
        partition,
        offset,
        time,
        record.key(),
        record.payload(),
        reason
    ];
    database.execute(
        "INSERT OR IGNORE INTO rejected VALUES (?, ?, ?, ?, ?, ?)",
        values,
    )?;
    Ok(format!(
        "partition {partition} offset {offset} rejected: {reason}"
    ))
}

/// The client reconnects by itself after these errors. Others, such as authorization, do not heal by waiting.
fn is_temporary(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::*;
    matches!(
        error.rdkafka_error_code(),
        Some(AllBrokersDown | BrokerTransportFailure | OperationTimedOut | UnknownTopicOrPartition)
    )
}

/// Ctrl-C, or SIGTERM, which Docker, Kubernetes and systemd send.
async fn shutdown() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupt = tokio::signal::ctrl_c() => interrupt,
        _ = terminate.recv() => Ok(()),
    }
}
