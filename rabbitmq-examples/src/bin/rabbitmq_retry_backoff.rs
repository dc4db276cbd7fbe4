//! Retry with exponential backoff: a queue per delay, then the dead letters, and nothing waits behind a failure
//!
//! A payment that fails goes to a queue in which it can only wait: its time to live is the delay, and expired it goes
//! back to the payments. Those behind it go on at once. After five attempts, or at once if no attempt can help, it goes
//! to the dead letters, with the reason. At least once as far as the program goes: a payment is acknowledged only after
//! its copy is confirmed where it goes. Order is given up: a payment that is retried is overtaken.
//!
//! ```console
//! 1$ cargo lab run rabbitmq_retry_backoff
//! waiting for payments; Ctrl-C to stop
//! 2$ cargo lab run rabbitmq_retry_backoff send
//! sent: payment-1, payment-2 (fails twice), payment-3 (fails always), payment-4 (no payment at all)
//! 1:
//! ...
//! payment-2: attempt 1 failed: the bank does not answer; again in [..] ms
//! ...
//! payment-2: paid at attempt 3
//! ...
//! payment-3: attempt 5 failed: the bank does not answer; dead letter
//! 1^C
//! stopped; paid: 2, to be retried: 6, dead letters: 2
//! ```
//!
//! Notice: to sleep and try again in place blocks the consumer, and all that it has prefetched; `nack` with `requeue`
//! brings the message back at once, as fast as the machine can. One waiting queue for all delays does not work either:
//! only its head expires, so a message with 100 ms stands behind one with 60 s. Here all in a queue have the same delay,
//! less a jitter of at most a fifth, and that is also the most by which one holds up another. Without the jitter, all
//! that failed together would come back together.
//!
//! Don't overstate it: the way back is the broker's. A classic queue hands on what has expired without waiting for a
//! confirm, and if the broker dies right then, that payment may be lost. Quorum queues can wait
//! (`x-dead-letter-strategy: at-least-once`).
//!
//! Try: send while it is stopped; `cargo lab kill rabbitmq_retry_backoff` while payment-3 is on its way, and start it
//! again.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"). A quorum queue for the payments would
//! count deliveries, too (limit 20 by default). See also: rabbitmq_dead_letter, rabbitmq_quorum_queue.

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use serde::Deserialize;
use tokio::time::timeout;

const PAYMENTS: &str = "retry-backoff.payments";
const DEAD: &str = "retry-backoff.dead";
const ATTEMPTS: u32 = 5;
/// Before attempt 2. It doubles with each attempt, up to the cap.
const FIRST_DELAY_MS: u32 = 100;
const MAX_DELAY_MS: u32 = 500;
const PERSISTENT: u8 = 2;
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Deserialize)]
struct Payment {
    payment_id: String,
    /// How often the bank will not answer: what a real one does not tell.
    #[serde(default)]
    fails: u32,
}

#[derive(Default)]
struct Counts {
    paid: u32,
    retried: u32,
    dead: u32,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let command = std::env::args().nth(1);
    let connection = connect(&addr).await?;
    let channel = connection.create_channel().await?;
    declare_queues(&channel).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    match command.as_deref() {
        None => work(&channel).await?,
        Some("send") => send(&channel).await?,
        Some(_) => bail!("usage: rabbitmq_retry_backoff [send]"),
    }
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close; what was done last may come back")??;
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_retry_backoff".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

/// The delay after this attempt, without the jitter.
fn delay_ms(attempt: u32) -> u32 {
    let doubled = 1_u32.checked_shl(attempt.saturating_sub(1));
    let delay = doubled.and_then(|factor| FIRST_DELAY_MS.checked_mul(factor));
    delay.map_or(MAX_DELAY_MS, |delay| delay.min(MAX_DELAY_MS))
}

/// The delay is in the name: a queue's arguments cannot be changed, so a new delay needs a new queue.
fn waiting_queue(attempt: u32) -> String {
    format!("{PAYMENTS}.wait-{}ms", delay_ms(attempt))
}

async fn declare_queues(channel: &Channel) -> lapin::Result<()> {
    let durable = QueueDeclareOptions::durable();
    for queue in [PAYMENTS, DEAD] {
        channel
            .queue_declare(queue.into(), durable, FieldTable::default())
            .await?;
    }
    for attempt in 1..ATTEMPTS {
        let mut arguments = FieldTable::default();
        let ttl = AMQPValue::LongUInt(delay_ms(attempt));
        arguments.insert("x-message-ttl".into(), ttl);
        let mut set = |key: &str, value: &str| {
            arguments.insert(key.into(), AMQPValue::LongString(value.into()));
        };
        set("x-dead-letter-exchange", "");
        set("x-dead-letter-routing-key", PAYMENTS);
        channel
            .queue_declare(waiting_queue(attempt).into(), durable, arguments)
            .await?;
    }
    Ok(())
}

async fn send(channel: &Channel) -> anyhow::Result<()> {
    for body in [
        r#"{"payment_id":"payment-1"}"#,
        r#"{"payment_id":"payment-2","fails":2}"#,
        r#"{"payment_id":"payment-3","fails":1000}"#,
        "payment-4",
    ] {
        publish(
            channel,
            PAYMENTS,
            BasicProperties::default(),
            body.as_bytes(),
        )
        .await?;
    }
    println!(
        "sent: payment-1, payment-2 (fails twice), payment-3 (fails always), payment-4 (no payment at all)"
    );
    Ok(())
}

async fn work(channel: &Channel) -> anyhow::Result<()> {
    channel.basic_qos(10, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let mut deliveries = channel
        .basic_consume(PAYMENTS.into(), "".into(), options, FieldTable::default())
        .await?;
    println!("waiting for payments; Ctrl-C to stop");

    let mut counts = Counts::default();
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
        handle(channel, &delivery, &mut counts)
            .await
            .context("the payment was not acknowledged and will be delivered again")?;
    }
    let cancel = channel.basic_cancel(deliveries.tag(), BasicCancelOptions::default());
    timeout(PATIENCE, cancel)
        .await
        .context("the broker does not answer the cancel")??;
    let Counts {
        paid,
        retried,
        dead,
    } = counts;
    println!("stopped; paid: {paid}, to be retried: {retried}, dead letters: {dead}");
    Ok(())
}

async fn handle(channel: &Channel, delivery: &Delivery, counts: &mut Counts) -> anyhow::Result<()> {
    let attempt = attempts_before(delivery).saturating_add(1);
    match serde_json::from_slice::<Payment>(&delivery.data) {
        Err(error) => {
            let text = String::from_utf8_lossy(&delivery.data);
            println!("{text}: no payment: {error}; dead letter");
            let properties = noted(delivery, attempt, &error.to_string());
            publish(channel, DEAD, properties, &delivery.data).await?;
            counts.dead += 1;
        }
        Ok(payment) if attempt > payment.fails => {
            println!("{}: paid at attempt {attempt}", payment.payment_id);
            counts.paid += 1;
        }
        Ok(Payment { payment_id, .. }) => {
            let reason = "the bank does not answer";
            let properties = noted(delivery, attempt, reason);
            if attempt >= ATTEMPTS {
                println!("{payment_id}: attempt {attempt} failed: {reason}; dead letter");
                publish(channel, DEAD, properties, &delivery.data).await?;
                counts.dead += 1;
            } else {
                // The shorter of this and the queue's time to live counts.
                let delay = delay_ms(attempt) - fastrand::u32(0..=delay_ms(attempt) / 5);
                println!("{payment_id}: attempt {attempt} failed: {reason}; again in {delay} ms");
                let properties = properties.with_expiration(delay.to_string().into());
                let queue = waiting_queue(attempt);
                publish(channel, &queue, properties, &delivery.data).await?;
                counts.retried += 1;
            }
        }
    }
    // Killed before this line, the payment is delivered again, beside its copy. The other way round it would be lost.
    let ack = delivery.ack(BasicAckOptions::default());
    // Without a limit it may wait for ever: lapin forgets an ack that is under way when the connection is lost.
    let acked = timeout(PATIENCE, ack).await.unwrap_or(Ok(false))?;
    ensure!(acked, "the connection was lost before the acknowledgement");
    Ok(())
}

/// The program's own count. `x-death` counts too, but only what the broker has moved.
fn attempts_before(delivery: &Delivery) -> u32 {
    let headers = delivery.properties.headers().as_ref();
    match headers.and_then(|headers| headers.inner().get("attempts")) {
        Some(AMQPValue::LongUInt(attempts)) => *attempts,
        _ => 0,
    }
}

/// The properties that are texts, but two: with the sender's `expiration` a dead letter would vanish, and the broker
/// refuses a `user_id` that is not that of the connection. (lapin can set a property, but take none away.)
const TEXTS: [Text; 7] = [
    (Properties::content_type, Properties::with_content_type),
    (
        Properties::content_encoding,
        Properties::with_content_encoding,
    ),
    (Properties::correlation_id, Properties::with_correlation_id),
    (Properties::reply_to, Properties::with_reply_to),
    (Properties::message_id, Properties::with_message_id),
    (Properties::kind, Properties::with_type),
    (Properties::app_id, Properties::with_app_id),
];
type Properties = BasicProperties;
type Text = (
    fn(&Properties) -> &Option<ShortString>,
    fn(Properties, ShortString) -> Properties,
);

/// What the sender has said of the payment goes with it, and beside it what became of it.
fn noted(delivery: &Delivery, attempts: u32, reason: &str) -> BasicProperties {
    let sent = &delivery.properties;
    let headers = sent.headers().as_ref();
    let mut headers = headers.map_or_else(BTreeMap::new, |headers| headers.inner().clone());
    headers.remove("CC"); // more addressees, who have had it
    headers.insert("attempts".into(), AMQPValue::LongUInt(attempts));
    headers.insert("reason".into(), AMQPValue::LongString(reason.into()));
    let mut properties = BasicProperties::default().with_headers(headers.into());
    for (get, set) in TEXTS {
        if let Some(text) = get(sent) {
            properties = set(properties, text.clone());
        }
    }
    if let Some(priority) = sent.priority() {
        properties = properties.with_priority(*priority);
    }
    if let Some(timestamp) = sent.timestamp() {
        properties = properties.with_timestamp(*timestamp);
    }
    properties
}

/// Returns when the message is in the queue.
async fn publish(
    channel: &Channel,
    queue: &str,
    properties: BasicProperties,
    body: &[u8],
) -> anyhow::Result<()> {
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let properties = properties.with_delivery_mode(PERSISTENT);
    let publish = channel.basic_publish("".into(), queue.into(), options, body, properties);
    let confirmation = timeout(PATIENCE, async { publish.await?.await }).await;
    match confirmation.context("no confirm in time")?? {
        Confirmation::Ack(None) => Ok(()),
        Confirmation::Ack(Some(returned)) => bail!("{queue}: {}", returned.reply_text),
        Confirmation::Nack(_) => bail!("{queue} refused it"),
        Confirmation::NotRequested => bail!("confirms are not enabled on this channel"),
    }
}
