//! Dead letters: rejected, expired and overflowing messages, with their story, and back again
//!
//! One queue, three ways to die, one dead-letter queue. `x-death` in the headers says of each message where it died, why
//! and how often. `inspect` looks and takes nothing; `replay` sends back what is there, at least once: a dead letter is
//! only removed after its copy is confirmed in the queue it came from.
//!
//! ```console
//! $ cargo lab run rabbitmq_dead_letter
//! order-1: rejected by its consumer
//! order-2: not read for 100 ms
//! order-3: the oldest of four in a queue for three
//! dead letters: 3
//! $ cargo lab run rabbitmq_dead_letter inspect
//! order-1: rejected in dead-letter.work, 1 time
//! order-2: expired in dead-letter.work, 1 time
//! order-3: maxlen in dead-letter.work, 1 time
//! dead letters: 3
//! $ cargo lab run rabbitmq_dead_letter replay
//! order-1: back in dead-letter.work
//! order-2: back in dead-letter.work
//! order-3: back in dead-letter.work
//! replayed: 3, left: 0
//! ```
//!
//! Notice: `reject` with `requeue` would not help, the message would come back at once. The name of the message's
//! death is the broker's: rejected, expired, maxlen, delivery_limit. A dead letter has lost its `expiration`, so a
//! replayed one does not expire again. Replaying stops after those that were there at the start, or one that dies again
//! would be replayed for ever.
//!
//! Don't overstate it: a classic queue hands dead letters on without waiting for a confirm, and if the broker dies
//! right then, one may be lost. Quorum queues can wait (`x-dead-letter-strategy: at-least-once`).
//!
//! Try: replay with nobody at the work queue, five times: the queue holds three, so the oldest die again.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); the argument is nothing, `inspect` or
//! `replay`. See also: rabbitmq_retry_backoff, rabbitmq_quorum_queue, rabbitmq_ttl_overflow.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicPublishOptions, BasicRejectOptions,
    ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::time::{sleep, timeout};

const WORK: &str = "dead-letter.work";
const DEAD: &str = "dead-letter.dead";
const ROOM: i32 = 3;
const PERSISTENT: u8 = 2;
const PATIENCE: Duration = Duration::from_secs(5);

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
        None => die(&channel).await?,
        Some("inspect") => inspect(&channel).await?,
        Some("replay") => replay(&channel).await?,
        Some(_) => bail!("usage: rabbitmq_dead_letter [inspect|replay]"),
    }
    // Whatever was taken and not acknowledged goes back to where it was.
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close; what was done last may come back")??;
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_dead_letter".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

/// The exchange "" leads straight to the queue that the routing key names. Without `x-dead-letter-routing-key` the
/// message keeps its own key, which here would lead back to where it died.
async fn declare_queues(channel: &Channel) -> lapin::Result<()> {
    let durable = QueueDeclareOptions::durable();
    channel
        .queue_declare(DEAD.into(), durable, FieldTable::default())
        .await?;
    let mut work = FieldTable::default();
    work.insert("x-max-length".into(), AMQPValue::LongInt(ROOM));
    let mut set = |key: &str, value: &str| {
        work.insert(key.into(), AMQPValue::LongString(value.into()));
    };
    set("x-dead-letter-exchange", "");
    set("x-dead-letter-routing-key", DEAD);
    channel.queue_declare(WORK.into(), durable, work).await?;
    Ok(())
}

/// Three messages, three deaths.
async fn die(channel: &Channel) -> anyhow::Result<()> {
    // What earlier runs have left is done with first.
    while let Some(message) = get(channel, WORK).await? {
        message.ack(BasicAckOptions::default()).await?;
    }
    let before = count(channel, DEAD).await?;
    let order = |id: &str| BasicProperties::default().with_message_id(id.into());

    publish(channel, WORK, order("order-1"), b"an order").await?;
    let taken = get(channel, WORK).await?.context("order-1 is not there")?;
    taken.reject(BasicRejectOptions { requeue: false }).await?;
    println!("order-1: rejected by its consumer");
    becomes(channel, before + 1).await?;

    let short_lived = order("order-2").with_expiration("100".into());
    publish(channel, WORK, short_lived, b"an order").await?;
    becomes(channel, before + 2).await?;
    println!("order-2: not read for 100 ms");

    for id in ["order-3", "order-4", "order-5", "order-6"] {
        publish(channel, WORK, order(id), b"an order").await?;
    }
    becomes(channel, before + 3).await?;
    println!("order-3: the oldest of four in a queue for three");
    while let Some(message) = get(channel, WORK).await? {
        message.ack(BasicAckOptions::default()).await?;
    }
    println!("dead letters: {}", count(channel, DEAD).await?);
    Ok(())
}

/// Takes all without acknowledging any: at the close they are back, in their order, though marked as redelivered.
async fn inspect(channel: &Channel) -> anyhow::Result<()> {
    let mut found = 0;
    while let Some(message) = get(channel, DEAD).await? {
        found += 1;
        let story = match last_death(&message) {
            Some(death) => format!(
                "{} in {}, {} time{}",
                death.reason,
                death.queue,
                death.count,
                if death.count == 1 { "" } else { "s" }
            ),
            None => "without x-death: it was published here".into(),
        };
        println!("{}: {story}", name(&message));
    }
    println!("dead letters: {found}");
    Ok(())
}

async fn replay(channel: &Channel) -> anyhow::Result<()> {
    let (mut replayed, mut left) = (0, Vec::new());
    for _ in 0..count(channel, DEAD).await? {
        let Some(message) = get(channel, DEAD).await? else {
            break;
        };
        let Some(death) = last_death(&message) else {
            println!("{}: without x-death, stays", name(&message));
            left.push(message); // held until the end, or it would come again
            continue;
        };
        // The story stays with the dead, and a copy begins its own. 3.x would go on counting in the old one; 4.x would
        // show it to consumers as if it were the copy's.
        let mut properties = message.properties.clone();
        if let Some(headers) = properties.headers() {
            let mut kept = FieldTable::default();
            for (key, value) in headers.inner() {
                let death = ["x-death", "x-first-death-", "x-last-death-"];
                if !death.iter().any(|prefix| key.as_str().starts_with(prefix)) {
                    kept.insert(key.clone(), value.clone());
                }
            }
            properties = properties.with_headers(kept);
        }
        match publish(channel, &death.queue, properties, &message.data).await {
            Ok(()) => {}
            Err(reason) => {
                println!("{}: stays: {reason:#}", name(&message));
                left.push(message);
                continue;
            }
        }
        // A crash before this line repeats the message; the other way round would lose it.
        let ack = message.ack(BasicAckOptions::default());
        // Without a limit it may wait for ever: lapin forgets an ack that is under way when the connection is lost.
        let acked = timeout(PATIENCE, ack).await.unwrap_or(Ok(false))?;
        ensure!(
            acked,
            "lost the connection; {} is there twice",
            name(&message)
        );
        println!("{}: back in {}", name(&message), death.queue);
        replayed += 1;
    }
    println!("replayed: {replayed}, left: {}", left.len());
    Ok(())
}

struct Death {
    queue: String,
    reason: String,
    count: i64,
}

/// The first entry of `x-death` is the latest.
fn last_death(message: &Delivery) -> Option<Death> {
    let headers = message.properties.headers().as_ref()?;
    let AMQPValue::FieldArray(deaths) = headers.inner().get("x-death")? else {
        return None;
    };
    let AMQPValue::FieldTable(death) = deaths.as_slice().first()? else {
        return None;
    };
    let text = |key: &str| match death.inner().get(key)? {
        AMQPValue::LongString(text) => Some(String::from_utf8_lossy(text.as_bytes()).into_owned()),
        _ => None,
    };
    let count = match death.inner().get("count")? {
        AMQPValue::LongLongInt(count) => *count,
        _ => 1,
    };
    // A queue's name has at most 255 bytes; a header that a client made up may have more.
    let queue = text("queue").filter(|queue| queue.len() <= 255)?;
    Some(Death {
        queue,
        reason: text("reason")?,
        count,
    })
}

fn name(message: &Delivery) -> String {
    let id = message.properties.message_id().as_ref();
    id.map_or_else(
        || String::from_utf8_lossy(&message.data).into_owned(),
        ToString::to_string,
    )
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

async fn get(channel: &Channel, queue: &str) -> lapin::Result<Option<Delivery>> {
    let options = BasicGetOptions::default();
    let message = channel.basic_get(queue.into(), options).await?;
    Ok(message.map(|message| message.delivery))
}

async fn count(channel: &Channel, queue: &str) -> lapin::Result<u32> {
    let passive = QueueDeclareOptions::durable().passive();
    let queue = channel
        .queue_declare(queue.into(), passive, FieldTable::default())
        .await?;
    Ok(queue.message_count())
}

/// A death is no answer to anything: the queue has to be asked until it is there.
async fn becomes(channel: &Channel, expected: u32) -> anyhow::Result<()> {
    let asking = async {
        while count(channel, DEAD).await? < expected {
            sleep(Duration::from_millis(20)).await;
        }
        anyhow::Ok(())
    };
    timeout(PATIENCE, asking)
        .await
        .with_context(|| format!("{DEAD} does not get {expected} messages"))?
}
