//! Idempotent consumer: every payment takes effect once, however often it is delivered
//!
//! RabbitMQ delivers at least once: a publisher sends again what was not confirmed, the broker delivers again what was
//! not acknowledged. So the effect and the message's id go into one SQLite transaction, and the ack comes after it. An
//! id that is already there means that the effect is, too. Exactly-once effect, as long as a duplicate comes before its
//! id is forgotten.
//!
//! ```console
//! 1$ cargo lab run rabbitmq_idempotent_consumer send 3
//! sent: payment-1, payment-2, payment-3
//! 2$ cargo lab run rabbitmq_idempotent_consumer
//! waiting for payments; Ctrl-C to stop
//! payment-1: user-1 +100 cents, balance 100
//! payment-2: user-2 +100 cents, balance 100
//! payment-3: user-1 +100 cents, balance 200
//! 1$ cargo lab run rabbitmq_idempotent_consumer send 3
//! sent: payment-1, payment-2, payment-3
//! 2:
//! payment-1: seen before, ignored
//! payment-2: seen before, ignored
//! payment-3: seen before, ignored
//! 2^C
//! in the books: 3 payments, 300 cents
//! ```
//!
//! Notice: "look up, then do, then remember" has two gaps: a crash after the doing repeats it, and two consumers that
//! look up at the same time both do it. Here the database's unique id decides, and there is no time between. The flag
//! `redelivered` decides nothing: a payment that was published twice does not have it, and one that has it may never
//! have been worked on. The id is the sender's `message_id`, the same however often it is sent; a message without one is
//! rejected to the dead letters. The ids that are kept are bounded (the newest IDS_KEPT): keep more than can come in the
//! time for which a publisher may retry or a message wait in a queue.
//!
//! Try: `cargo lab kill rabbitmq_idempotent_consumer` at any moment while it works through 5000 payments, start it
//! again: the sum is right. Set IDS_KEPT=2 and send 3 twice: forgotten ids are paid again.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); PAYMENTS_DB (rabbitmq-payments.sqlite
//! in the current folder); IDS_KEPT (100000); the arguments `send N` send payments 1 to N. See also:
//! rabbitmq_reconnect, kafka_idempotent_consumer.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use futures::future::try_join_all;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    BasicRejectOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use rusqlite::{OptionalExtension, TransactionBehavior, params};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

const QUEUE: &str = "idempotent-payments";
const DEAD: &str = "idempotent-payments.dead";
const LARGEST: u64 = 1_000_000_000;
const WINDOW: u32 = 1000;
const PERSISTENT: u8 = 2;
const PATIENCE: Duration = Duration::from_secs(5);

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS balances (user_id TEXT PRIMARY KEY, cents INTEGER NOT NULL, payments INTEGER NOT NULL);
    -- Numbered, so that the oldest are known. Not by AUTOINCREMENT: there, duplicates would use up numbers, too.
    CREATE TABLE IF NOT EXISTS seen (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE);
";

#[derive(Serialize, Deserialize)]
struct Payment {
    user_id: String,
    cents: i64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let count: Option<u32> = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => None,
        ["send", count] => Some(count.parse().context("N is the number of payments")?),
        _ => bail!("usage: rabbitmq_idempotent_consumer [send N]"),
    };
    let connection = connect(&addr).await?;
    let channel = connection.create_channel().await?;
    declare_queues(&channel).await?;
    match count {
        Some(count) => send(&channel, count).await?,
        None => consume(&channel).await?,
    }
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close; what was done last may come back")??;
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_idempotent_consumer".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

async fn declare_queues(channel: &Channel) -> lapin::Result<()> {
    let durable = QueueDeclareOptions::durable();
    channel
        .queue_declare(DEAD.into(), durable, FieldTable::default())
        .await?;
    let mut payments = FieldTable::default();
    let mut set = |key: &str, value: &str| {
        payments.insert(key.into(), AMQPValue::LongString(value.into()));
    };
    set("x-dead-letter-exchange", "");
    set("x-dead-letter-routing-key", DEAD);
    channel
        .queue_declare(QUEUE.into(), durable, payments)
        .await?;
    Ok(())
}

async fn send(channel: &Channel, count: u32) -> anyhow::Result<()> {
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let numbers: Vec<u32> = (1..=count).collect();
    for window in numbers.chunks(WINDOW as usize) {
        let confirms = try_join_all(window.iter().map(|number| publish(channel, *number)));
        timeout(PATIENCE * 2, confirms)
            .await
            .context("no confirms in time; send all again")?
            .context("send all again")?;
    }
    let ids: Vec<_> = numbers
        .iter()
        .map(|number| format!("payment-{number}"))
        .collect();
    println!("sent: {}", ids.join(", "));
    Ok(())
}

async fn publish(channel: &Channel, number: u32) -> anyhow::Result<()> {
    let payment = Payment {
        user_id: format!("user-{}", 2 - number % 2),
        cents: 100,
    };
    let body = serde_json::to_vec(&payment)?;
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    // Given once by whoever causes the payment; a number that the sending program counts would not do.
    let properties = BasicProperties::default()
        .with_message_id(format!("payment-{number}").into())
        .with_delivery_mode(PERSISTENT);
    let confirm = channel
        .basic_publish("".into(), QUEUE.into(), options, &body, properties)
        .await?;
    match confirm.await? {
        Confirmation::Ack(None) => Ok(()),
        other => bail!("payment-{number} was not taken: {other:?}"),
    }
}

async fn consume(channel: &Channel) -> anyhow::Result<()> {
    let path = std::env::var("PAYMENTS_DB").unwrap_or_else(|_| "rabbitmq-payments.sqlite".into());
    let kept = match std::env::var("IDS_KEPT") {
        Ok(kept) => kept.parse().context("IDS_KEPT is a number of ids")?,
        Err(_) => 100_000_i64,
    };
    let kept = kept.max(1);
    let opened = rusqlite::Connection::open(&path);
    let mut books = opened.with_context(|| format!("cannot open {path}"))?;
    // Another consumer may be at it, too.
    books.busy_timeout(Duration::from_secs(30))?;
    books.pragma_update(None, "journal_mode", "wal")?;
    books
        .execute_batch(TABLES)
        .with_context(|| format!("cannot use {path}"))?;

    channel.basic_qos(100, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let mut deliveries = channel
        .basic_consume(QUEUE.into(), "".into(), options, FieldTable::default())
        .await?;
    println!("waiting for payments; Ctrl-C to stop");
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let delivery = tokio::select! {
            // In this order, so that Ctrl-C is also heard of during the first one.
            biased;
            signal = &mut stop => break signal?,
            delivery = deliveries.next() => delivery
                .context("the broker cancelled the consumer; was the queue deleted?")?
                .context("lost the connection")?,
        };
        let settled = match read(&delivery) {
            Ok((id, payment)) => {
                // SQLite blocks, for a write to the disk; this gives other tasks their thread.
                let paid = tokio::task::block_in_place(|| pay(&mut books, id, &payment, kept));
                println!("{}", paid?);
                // Killed before this line, it is delivered again, and ignored.
                timeout(PATIENCE, delivery.ack(BasicAckOptions::default())).await
            }
            Err(reason) => {
                println!("no payment, moved to {DEAD}: {reason}");
                let options = BasicRejectOptions { requeue: false };
                timeout(PATIENCE, delivery.reject(options)).await
            }
        };
        // Without a limit it may wait for ever: lapin forgets an ack that is under way when the connection is lost.
        let settled = settled.unwrap_or(Ok(false))?;
        ensure!(settled, "lost the connection; it is delivered again");
    }
    let cancel = channel.basic_cancel(deliveries.tag(), BasicCancelOptions::default());
    timeout(PATIENCE, cancel)
        .await
        .context("the broker does not answer the cancel")??;
    let sums = "SELECT ifnull(sum(payments), 0), ifnull(sum(cents), 0) FROM balances";
    let (payments, cents): (i64, i64) =
        books.query_row(sums, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
    println!("in the books: {payments} payments, {cents} cents");
    Ok(())
}

fn read(delivery: &Delivery) -> Result<(&str, Payment), String> {
    let id = delivery
        .properties
        .message_id()
        .as_ref()
        .map(|id| id.as_str());
    let id = id
        .filter(|id| !id.is_empty())
        .ok_or("it has no message_id")?;
    let payment: Payment =
        serde_json::from_slice(&delivery.data).map_err(|error| format!("{id}: {error}"))?;
    // SQLite's sums turn into floating point when they overflow.
    if payment.cents.unsigned_abs() > LARGEST {
        return Err(format!(
            "{id}: {} cents is beyond all reason",
            payment.cents
        ));
    }
    Ok((id, payment))
}

/// The pattern: id and effect in one transaction. Returns what to say about it.
fn pay(
    books: &mut rusqlite::Connection,
    id: &str,
    payment: &Payment,
    kept: i64,
) -> rusqlite::Result<String> {
    // Immediate: the write lock is taken before anything is read, so that consumers queue instead of failing.
    let books = books.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let insert = "INSERT INTO seen (id) VALUES (?) ON CONFLICT DO NOTHING RETURNING number";
    let number: Option<i64> = books
        .prepare_cached(insert)?
        .query_row([id], |row| row.get(0))
        .optional()?;
    let Some(number) = number else {
        return Ok(format!("{id}: seen before, ignored"));
    };
    let Payment { user_id, cents } = payment;
    let effect = "INSERT INTO balances VALUES (?1, ?2, 1)
        ON CONFLICT DO UPDATE SET cents = cents + ?2, payments = payments + 1 RETURNING cents";
    let balance: i64 = books
        .prepare_cached(effect)?
        .query_row(params![user_id, cents], |row| row.get(0))?;
    books
        .prepare_cached("DELETE FROM seen WHERE number <= ?")?
        .execute([number - kept])?;
    books.commit()?;
    Ok(format!(
        "{id}: {user_id} {cents:+} cents, balance {balance}"
    ))
}
