//! Idempotent consumer: each payment takes effect once, however often it is delivered
//!
//! Kafka delivers at least once: a payment can be sent twice, or read twice. So the program writes the effect and the
//! payment's id in one SQLite transaction. If the id is there already, the effect is there, too. The effect is exactly
//! once, as long as a duplicate arrives before its id is deleted.
//!
//! ```console
//! 1$ cargo lab run kafka_send -p 0 idempotent-payments '{"payment_id":"p-1","user_id":"eva","cents":100}' oops
//! ...
//! 1$ cargo lab run kafka_send -p 0 idempotent-payments '{"payment_id":"p-1","user_id":"eva","cents":100}'
//! ...
//! 1$ cargo lab run kafka_idempotent_consumer
//! p-1: eva +100 cents, balance 100
//! partition 0 offset 1 skipped: expected value at line 1 column 1
//! p-1: seen before, ignored
//! 1^C
//! ```
//!
//! Notice:
//! - The sender gives the id. An offset recognises a record that is read again, but not a payment that is sent again.
//! - Keep more ids (IDS_KEPT) than arrive while a producer retries, or while offsets may be reset.
//! - A malformed payment is printed and skipped. kafka_manual_commit keeps it in a dead-letter topic.
//!
//! Try: kill it (`kill -9`) while it works, and start it again. Settings: KAFKA_BROKERS (localhost:9092), PAYMENTS_DB
//! (kafka-payments.sqlite), RUST_LOG. See also: kafka_exactly_once.

use std::thread;
use std::time::Duration;

use anyhow::Context;
use futures::{FutureExt, StreamExt, future};
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::{ClientConfig, Message};
use rusqlite::{Connection, OptionalExtension, TransactionBehavior::Immediate, params};
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
";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let path = std::env::var("PAYMENTS_DB").unwrap_or_else(|_| "kafka-payments.sqlite".into());
    let mut database = Connection::open(&path).with_context(|| format!("cannot open {path}"))?;
    database.busy_timeout(6 * TIMEOUT)?; // another member may be writing
    database.pragma_update(None, "journal_mode", "wal")?;
    database.execute_batch(TABLES)?;
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest") // the default, `latest`, skips payments
        // The client commits stored offsets every 5 s. They are never ahead of the database.
        .set("enable.auto.offset.store", "false")
        .set("session.timeout.ms", "10000") // a crashed member keeps its partitions for this long
        .set("allow.auto.create.topics", "true")
        .set("topic.metadata.refresh.interval.ms", "10000") // finds a new topic
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    consumer.fetch_metadata(Some(TOPIC), TIMEOUT).context(tip)?;
    consumer.subscribe(&[TOPIC])?;

    let worked = work(&consumer, &mut database).await;
    // Commits and leaves the group. With the broker down, this can hang (librdkafka issue 3740).
    let (open, closed) = oneshot::channel::<()>();
    thread::spawn(move || drop((consumer, open)));
    let closed = timeout(TIMEOUT, closed).await;
    worked?;
    closed.map(drop).context("cannot close: no broker answers")
}

/// Handles one payment after another. Ends with Ctrl-C or SIGTERM.
async fn work(consumer: &StreamConsumer, database: &mut Connection) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = future::select(interrupt.recv().boxed(), terminate.recv().boxed());
    let mut payments = consumer.stream().take_until(stop);
    while let Some(received) = payments.next().await {
        match received {
            Ok(input) => {
                let at = format!("partition {} offset {}", input.partition(), input.offset());
                match serde_json::from_slice::<Payment>(input.payload().unwrap_or_default()) {
                    Ok(new) if new.payment_id.is_empty() => println!("{at} skipped: no id"),
                    Ok(new) => println!("{}", pay(database, &new)?),
                    Err(error) => println!("{at} skipped: {error}"),
                }
                // Fails when the partition was lost: its new owner repeats the payment.
                let _ = consumer.store_offset_from_message(&input);
            }
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct Payment {
    payment_id: String,
    user_id: String,
    cents: i32, // so that no sum overflows
}

/// The pattern: the id and the effect of a payment are in one transaction. Returns what to print. It blocks, which is
/// fine here: the program does nothing else.
fn pay(database: &mut Connection, payment: &Payment) -> rusqlite::Result<String> {
    let (id, user, cents) = (&payment.payment_id, &payment.user_id, payment.cents);
    // Takes the write lock first. So a second member waits, instead of failing.
    let transaction = database.transaction_with_behavior(Immediate)?;
    let insert = "INSERT INTO seen (id) VALUES (?) ON CONFLICT DO NOTHING RETURNING number";
    let new = transaction.query_row(insert, [id], |row| row.get(0));
    let Some(number): Option<i64> = new.optional()? else {
        return Ok(format!("{id}: seen before, ignored"));
    };
    transaction.execute("DELETE FROM seen WHERE number <= ?", [number - IDS_KEPT])?;
    let effect = "INSERT INTO balances VALUES (?1, ?2, 1)
        ON CONFLICT DO UPDATE SET cents = cents + ?2, payments = payments + 1 RETURNING cents";
    let balance: i64 = transaction.query_row(effect, params![user, cents], |row| row.get(0))?;
    transaction.commit()?;
    Ok(format!("{id}: {user} {cents:+} cents, balance {balance}"))
}

/// The client recovers from these errors by itself. Others, such as a missing permission, are final.
fn is_temporary(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    matches!(code, Some(AllBrokersDown | Resolve | OperationTimedOut))
        || matches!(code, Some(BrokerTransportFailure | UnknownTopicOrPartition))
}
