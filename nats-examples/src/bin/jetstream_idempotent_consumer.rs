//! Idempotent consumer: every payment takes effect once, however often it is delivered
//!
//! JetStream delivers at least once, and a payment can also be sent twice. So the effect and the message's id go into
//! one SQLite transaction, and an id that is already there means that the effect is, too. Exactly-once effect, as long
//! as a duplicate comes before its id is forgotten.
//!
//! ```console
//! 1$ cargo lab run jetstream_idempotent_consumer send 3
//! sent: payment-1, payment-2, payment-3
//! 2$ cargo lab run jetstream_idempotent_consumer
//! payment-1: user-1 +100 cents, balance 100
//! payment-2: user-2 +100 cents, balance 100
//! payment-3: user-1 +100 cents, balance 200
//! 1$ cargo lab run jetstream_idempotent_consumer send 3
//! sent: payment-1, payment-2, payment-3
//! 2:
//! payment-1: seen before, ignored
//! payment-2: seen before, ignored
//! payment-3: seen before, ignored
//! 2^C
//! in the books: 3 payments, 300 cents, 0 rejected
//! ```
//!
//! Notice: the transaction is committed before the ack is sent. The other way round, a crash in between loses the
//! payment. A message id (`Nats-Msg-Id`) and a double ack make repeats rarer, and neither replaces this: the window of
//! the one ends, and the other's confirmation can get lost. A set of ids in memory forgets them in a crash, which is
//! when they are needed, and grows without end. The ids that are kept here are bounded (the newest IDS_KEPT): more than
//! can come in the time for which a sender may repeat itself.
//!
//! Try: `cargo lab kill jetstream_idempotent_consumer` at any moment while it works through 5000 payments, start it
//! again: the sum is right. Set IDS_KEPT=2 and send 3 twice: forgotten ids are paid again.
//!
//! Settings: NATS_URL (nats://localhost:4222); PAYMENTS_DB (jetstream-payments.sqlite in the current folder);
//! IDS_KEPT (100000); the arguments `send N` send payments 1 to N. See also: jetstream_consumer, jetstream_dedup.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context as _, bail};
use async_nats::jetstream::consumer::{PullConsumer, pull};
use async_nats::jetstream::{self, AckKind, Context, Message, stream};
use futures::{FutureExt, StreamExt};
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};

const STREAM: &str = "PAYMENTS";
const SUBJECT: &str = "idempotent.payments";
const CONSUMER: &str = "books";
const ACK_WAIT: Duration = Duration::from_secs(5);
const LARGEST: u64 = 1_000_000_000;
const PATIENCE: Duration = Duration::from_secs(5);

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS balances (user_id TEXT PRIMARY KEY, cents INTEGER NOT NULL, payments INTEGER NOT NULL);
    -- Numbered, so that the oldest are known. Not by AUTOINCREMENT: there, duplicates would use up numbers, too.
    CREATE TABLE IF NOT EXISTS seen (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE);
    -- Messages that are no payments, as they came. A store that is made anew begins again with sequence 1.
    CREATE TABLE IF NOT EXISTS rejected (sequence INTEGER, payload BLOB, reason TEXT, PRIMARY KEY (sequence, payload));
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
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    let mut jetstream = jetstream::new(client);
    jetstream.set_timeout(PATIENCE);
    let stream = jetstream
        .get_or_create_stream(stream::Config {
            name: STREAM.into(),
            subjects: vec![SUBJECT.into()],
            ..Default::default()
        })
        .await?;
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => {}
        ["send", count] => {
            let count = count.parse().context("N is the number of payments")?;
            return send(&jetstream, count).await;
        }
        _ => bail!("usage: jetstream_idempotent_consumer [send N]"),
    }
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.into()),
            ack_wait: ACK_WAIT,
            ..Default::default()
        })
        .await?;
    consume(&jetstream, &consumer).await
}

/// Without a message id: the books must not depend on it.
async fn send(jetstream: &Context, count: u32) -> anyhow::Result<()> {
    let mut sent = Vec::new();
    for number in 1..=count {
        let payment = Payment {
            payment_id: format!("payment-{number}"),
            user_id: format!("user-{}", 2 - number % 2),
            cents: 100,
        };
        let payload = serde_json::to_vec(&payment)?;
        let ack = jetstream.publish(SUBJECT, payload.into()).await?;
        sent.push((payment.payment_id, ack));
    }
    let mut ids = Vec::new();
    for (id, ack) in sent {
        ack.await
            .with_context(|| format!("{id}: no ack; send all again"))?;
        ids.push(id);
    }
    println!("sent: {}", ids.join(", "));
    Ok(())
}

async fn consume(jetstream: &Context, consumer: &PullConsumer) -> anyhow::Result<()> {
    let path = std::env::var("PAYMENTS_DB").unwrap_or_else(|_| "jetstream-payments.sqlite".into());
    let kept = std::env::var("IDS_KEPT").unwrap_or_else(|_| "100000".into());
    let kept = kept
        .parse::<i64>()
        .context("IDS_KEPT is a number of ids")?
        .max(1);
    let mut books = Connection::open(&path).with_context(|| format!("cannot open {path}"))?;
    // Another member may be at it, too.
    books.busy_timeout(Duration::from_secs(30))?;
    books.pragma_update(None, "journal_mode", "wal")?;
    books
        .execute_batch(TABLES)
        .with_context(|| format!("cannot use {path}"))?;

    let mut stop = pin!(tokio::signal::ctrl_c());
    'consume: loop {
        let mut messages = consumer
            .stream()
            .max_messages_per_batch(100)
            .messages()
            .await?;
        loop {
            let message = tokio::select! {
                // Polled first: only then is Ctrl-C ours, also during the first piece of work.
                biased;
                signal = &mut stop => {
                    signal?;
                    // Given back, what was fetched ahead need not wait for the ack wait.
                    while let Some(Some(Ok(message))) = messages.next().now_or_never() {
                        let _ = message.ack_with(AckKind::Nak(None)).await;
                    }
                    break 'consume;
                }
                message = messages.next() => message,
            };
            match message {
                Some(Ok(message)) => {
                    // SQLite blocks, for a write to the disk; this gives other tasks their thread.
                    let said = tokio::task::block_in_place(|| apply(&mut books, &message, kept))?;
                    println!("{said}");
                    // Only now. If it gets lost, the payment comes again, and is known.
                    if let Err(error) = message.ack().await {
                        eprintln!("not acknowledged: {error}");
                    }
                }
                Some(Err(error)) => {
                    eprintln!("waiting for the server: {error}");
                    break;
                }
                None => break,
            }
        }
        // The stream of messages may have ended for good: wait, and make a new one.
        tokio::select! {
            signal = &mut stop => break signal?,
            () = sleep(Duration::from_secs(1)) => {}
        }
    }
    // Acks are messages: written, at least, before the program ends.
    let client = jetstream.client();
    let flushed = timeout(PATIENCE, client.flush()).await;
    if !matches!(flushed, Ok(Ok(()))) {
        eprintln!("the last payments will come again");
    }
    let sums = "SELECT ifnull(sum(payments), 0), ifnull(sum(cents), 0), (SELECT count(*) FROM rejected) FROM balances";
    let (payments, cents, rejected): (i64, i64, i64) =
        books.query_row(sums, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    println!("in the books: {payments} payments, {cents} cents, {rejected} rejected");
    Ok(())
}

/// The pattern: id and effect in one transaction. Returns what to say about it.
fn apply(books: &mut Connection, message: &Message, kept: i64) -> anyhow::Result<String> {
    let info = message.info().map_err(anyhow::Error::from_boxed)?;
    // Immediate: the write lock is taken before anything is read, so that members queue instead of failing.
    let books = books.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let said = match read(&message.payload) {
        Ok(payment) => pay(&books, &payment, kept)?,
        Err(reason) => {
            let sequence = i64::try_from(info.stream_sequence)?;
            let row = params![sequence, &message.payload[..], reason];
            books.execute("INSERT OR IGNORE INTO rejected VALUES (?, ?, ?)", row)?;
            format!("message {sequence}: rejected, no payment: {reason}")
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
