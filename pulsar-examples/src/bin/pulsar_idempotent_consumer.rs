//! Idempotent consumer: every payment takes effect once, and the broker stores each only once, too
//!
//! Consumer: the effect and the payment's id go into one SQLite transaction, and an id that is already there means
//! that the effect is, too. Producer: the broker drops what it has already stored of the same producer name and
//! sequence number, so a run that was cut off is repeated under the same name. Exactly-once effect, as long as a
//! duplicate comes before its id is forgotten.
//!
//! ```console
//! 1$ cargo lab run pulsar_idempotent_consumer send monday 3
//! monday: stored 3, dropped by the broker 0
//! 2$ cargo lab run pulsar_idempotent_consumer
//! monday-1: user-1 +100 cents, balance 100
//! monday-2: user-2 +100 cents, balance 100
//! monday-3: user-1 +100 cents, balance 200
//! 1$ cargo lab run pulsar_idempotent_consumer send monday 4
//! monday: stored 1, dropped by the broker 3
//! 2:
//! monday-4: user-2 +100 cents, balance 200
//! 1$ cargo lab run pulsar_idempotent_consumer again monday 4
//! monday: stored 4, dropped by the broker 0
//! 2:
//! monday-1: seen before, ignored
//! monday-2: seen before, ignored
//! monday-3: seen before, ignored
//! monday-4: seen before, ignored
//! 2^C
//! in the books: 4 payments, 400 cents, 0 rejected
//! ```
//!
//! Notice: this client numbers a producer's messages from 0, every time, and cannot be told otherwise. So a name
//! stands for one list of payments that begins at its beginning, here a day's; a service that keeps its name over a
//! restart, with deduplication on, would have its first new messages dropped, and receipts for them. The receipt of a
//! dropped message has no place: its ledger is -1. Without batches: their number would be the batch's. A batch of
//! somebody else is acknowledged after its last payment, and may come whole again: the ids know. `again` sends under a
//! new name, as another program would: only the consumer can know those.
//!
//! Try: `cargo lab kill pulsar_idempotent_consumer` during `send monday 5000`, and repeat that; the same to the
//! consumer at any moment: the sum is right. IDS_KEPT=2 and `again`: forgotten ids are paid again.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650), PULSAR_ADMIN_URL (http://localhost:8080); PAYMENTS_DB
//! (pulsar-payments.sqlite in the current folder); IDS_KEPT (100000). See also: pulsar_consumer.

use std::pin::pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::{InitialPosition, Message};
use pulsar::{Consumer, ConsumerOptions, ProducerOptions, Pulsar, SubType, TokioExecutor};
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};

const TOPIC: &str = "public/default/idempotent-payments";
const SUBSCRIPTION: &str = "idempotent-payments";
const LARGEST: u64 = 1_000_000_000;
const PATIENCE: Duration = Duration::from_secs(5);
/// For the admin interface.
const ANSWER: Duration = Duration::from_secs(30);
/// For a receipt: it waits behind all that were sent before.
const RECEIPT: Duration = Duration::from_secs(60);

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS balances (user_id TEXT PRIMARY KEY, cents INTEGER NOT NULL, payments INTEGER NOT NULL);
    -- Numbered, so that the oldest are known. Not by AUTOINCREMENT: there, duplicates would use up numbers, too.
    CREATE TABLE IF NOT EXISTS seen (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE);
    -- Messages that are no payments, as they came.
    CREATE TABLE IF NOT EXISTS rejected (ledger INTEGER, entry INTEGER, batch INTEGER, payload BLOB, reason TEXT,
        PRIMARY KEY (ledger, entry, batch));
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
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let admin =
        std::env::var("PULSAR_ADMIN_URL").unwrap_or_else(|_| "http://localhost:8080".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => consume(&pulsar, &address).await,
        [mode @ ("send" | "again"), list, count] => {
            let count = count.parse().context("N is the number of payments")?;
            let moment = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros();
            let name = match mode {
                "send" => list.to_owned(),
                _ => format!("{list}-{moment}"),
            };
            deduplicate(&pulsar, &admin).await?;
            send(&pulsar, list, &name, count).await
        }
        _ => bail!("usage: pulsar_idempotent_consumer [send LIST N | again LIST N]"),
    }
}

/// For this topic alone; it has to exist.
async fn deduplicate(pulsar: &Pulsar<TokioExecutor>, admin: &str) -> anyhow::Result<()> {
    let mut any = pulsar
        .producer()
        .with_topic(format!("persistent://{TOPIC}"))
        .build()
        .await?;
    any.close().await?;
    let url = format!("{admin}/admin/v2/persistent/{TOPIC}/deduplicationEnabled");
    let request = reqwest::Client::new()
        .post(&url)
        .timeout(ANSWER)
        .json(&true);
    let answer = request
        .send()
        .await
        .with_context(|| format!("cannot ask {url}"))?;
    if !answer.status().is_success() {
        bail!(
            "cannot set the deduplication: {}: {}",
            answer.status(),
            answer.text().await?
        );
    }
    await_deduplication(admin).await
}

/// The policy takes a moment to reach the topic; until then, nothing is dropped. In force it shows as a cursor.
async fn await_deduplication(admin: &str) -> anyhow::Result<()> {
    let url = format!("{admin}/admin/v2/persistent/{TOPIC}/internalStats");
    let http = reqwest::Client::builder().timeout(ANSWER).build()?;
    let in_force = async {
        loop {
            let stats = http.get(&url).send().await?.error_for_status()?;
            if stats.text().await?.contains("pulsar.dedup") {
                return anyhow::Ok(());
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(RECEIPT, in_force)
        .await
        .with_context(|| format!("the deduplication is not in force after a minute; see {url}"))?
        .with_context(|| format!("cannot ask {url}"))
}

async fn send(
    pulsar: &Pulsar<TokioExecutor>,
    list: &str,
    name: &str,
    count: u32,
) -> anyhow::Result<()> {
    let options = ProducerOptions {
        block_queue_if_full: true,
        ..ProducerOptions::default()
    };
    let mut producer = pulsar
        .producer()
        .with_topic(format!("persistent://{TOPIC}"))
        // While another producer has the name, this waits.
        .with_name(name)
        .with_options(options)
        .build()
        .await?;
    let mut receipts = Vec::new();
    for number in 1..=count {
        let payment = Payment {
            payment_id: format!("{list}-{number}"),
            user_id: format!("user-{}", 2 - number % 2),
            cents: 100,
        };
        // The client gives it the next sequence number: payment N always the same one.
        receipts.push(
            producer
                .send_non_blocking(serde_json::to_vec(&payment)?)
                .await?,
        );
    }
    let (mut stored, mut dropped) = (0, 0);
    for receipt in receipts {
        let receipt = timeout(RECEIPT, receipt)
            .await
            .context("no receipt; send all again")??;
        let place = receipt
            .message_id
            .context("a receipt without a message id")?;
        match place.ledger_id as i64 {
            -1 => dropped += 1,
            _ => stored += 1,
        }
    }
    producer.close().await?;
    println!("{list}: stored {stored}, dropped by the broker {dropped}");
    Ok(())
}

async fn consume(pulsar: &Pulsar<TokioExecutor>, address: &str) -> anyhow::Result<()> {
    let path = std::env::var("PAYMENTS_DB").unwrap_or_else(|_| "pulsar-payments.sqlite".into());
    let kept = match std::env::var("IDS_KEPT") {
        Ok(kept) => kept.parse().context("IDS_KEPT is a number of ids")?,
        Err(_) => 100_000_i64,
    };
    let mut books = Connection::open(&path).with_context(|| format!("cannot open {path}"))?;
    // Another consumer may be at it, too.
    books.busy_timeout(Duration::from_secs(30))?;
    books.pragma_update(None, "journal_mode", "wal")?;
    books
        .execute_batch(TABLES)
        .with_context(|| format!("cannot use {path}"))?;

    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(200);
    let mut consumer: Consumer<Vec<u8>, _> = pulsar
        .consumer()
        .with_topic(format!("persistent://{TOPIC}"))
        .with_subscription(SUBSCRIPTION)
        .with_subscription_type(SubType::Failover)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(100)
        .with_options(options)
        .build()
        .await?;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let message = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            message = consumer.try_next() => message?.with_context(|| format!("lost the connection to {address}"))?,
        };
        // SQLite blocks, for a write to the disk; this gives other tasks their thread.
        println!(
            "{}",
            tokio::task::block_in_place(|| apply(&mut books, &message, kept.max(1)))?
        );
        if last_of_batch(&message) {
            consumer.ack(&message).await?;
        }
    }
    if let Err(error) = close(consumer).await {
        // Nothing is wrong with the books: they will know what comes again.
        eprintln!("{error:#}");
    }
    let sums = "SELECT ifnull(sum(payments), 0), ifnull(sum(cents), 0), (SELECT count(*) FROM rejected) FROM balances";
    let (payments, cents, rejected): (i64, i64, i64) =
        books.query_row(sums, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    println!("in the books: {payments} payments, {cents} cents, {rejected} rejected");
    Ok(())
}

/// The pattern: id and effect in one transaction. Returns what to say about it.
fn apply(
    books: &mut Connection,
    message: &Message<Vec<u8>>,
    kept: i64,
) -> rusqlite::Result<String> {
    // Immediate: the write lock is taken before anything is read, so that consumers queue instead of failing.
    let books = books.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let said = match read(&message.payload.data) {
        Ok(payment) => pay(&books, &payment, kept)?,
        Err(reason) => {
            let place = message.message_id();
            let (ledger, entry) = (place.ledger_id as i64, place.entry_id as i64);
            let batch = place.batch_index.unwrap_or(-1);
            let row = params![ledger, entry, batch, message.payload.data, reason];
            books.execute("INSERT OR IGNORE INTO rejected VALUES (?, ?, ?, ?, ?)", row)?;
            format!("{ledger}:{entry}: rejected, no payment: {reason}")
        }
    };
    books.commit()?;
    Ok(said)
}

fn read(payload: &[u8]) -> Result<Payment, String> {
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

/// To the broker a batch is one entry, and the ack of one of its messages is the ack of all: only the last may be
/// acknowledged. A message that came alone is the last.
fn last_of_batch<T>(message: &pulsar::consumer::Message<T>) -> bool {
    let index = message.message_id().batch_index.unwrap_or_default();
    let size = message.message_id.batch_size;
    size.is_none_or(|size| index + 1 >= size)
}

/// Gives back what was fetched ahead: while its queue is full, the client's close waits for the client itself. A batch
/// comes whole, however small the queue is: its rest is taken, and if there is yet another, all is tried again.
async fn close(mut consumer: Consumer<Vec<u8>, TokioExecutor>) -> anyhow::Result<()> {
    let closed = async {
        loop {
            let mut whole = true;
            while let Some(Ok(message)) = match whole {
                true => consumer.next().now_or_never().flatten(),
                false => consumer.next().await,
            } {
                whole = last_of_batch(&message);
            }
            if let Ok(closed) = timeout(PATIENCE / 10, consumer.close()).await {
                return closed;
            }
        }
    };
    timeout(PATIENCE, closed)
        .await
        .context("the last acks may not have arrived: no answer to the close")??;
    Ok(())
}

/// Left alone, the client retries for more than a minute, in silence.
async fn connect(address: &str) -> anyhow::Result<Pulsar<TokioExecutor>> {
    let client = Pulsar::builder(address, TokioExecutor).build();
    let connected = timeout(PATIENCE, client).await;
    Ok(connected.with_context(|| {
        format!("no Pulsar broker answers at {address}; `cargo lab up pulsar` starts one")
    })??)
}
