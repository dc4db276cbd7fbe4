//! Limits of a queue: time to live, maximum length, and a full queue as backpressure
//!
//! Four limits, each shown by what becomes of the messages: one message's time to live, that of a whole queue's, a queue
//! that goes when nobody uses it, and a maximum length with either of its overflows. By default a full queue confirms
//! the new message and drops the oldest. With `reject-publish` it refuses the new one, and the publisher waits.
//!
//! ```console
//! $ cargo lab run rabbitmq_ttl_overflow
//! message TTL 100 ms: the short-lived one is gone, left: long-lived
//! queue TTL 100 ms: 3 published, left: 0
//! expires 1500 ms unused: the queue is gone
//! drop-head, room for 3: 5 confirmed, 0 refused, left: order-3, order-4, order-5
//! reject-publish, room for 3: 3 confirmed, 2 refused, left: order-1, order-2, order-3
//! backpressure, room for 3: 20 of 20 confirmed, refused on the way: some, lost: 0
//! ```
//!
//! Notice: `drop-head` loses what was confirmed, without a word to anyone, unless the queue has a dead-letter exchange.
//! `reject-publish` needs confirms on: without them, what it refuses is dropped as silently. A message's own time to
//! live is looked at when it reaches the head; behind one that lives longer it stays, dead, and takes room.
//!
//! Try: rabbitmq_dead_letter, to keep what these drop. Give the quick publisher a slower consumer.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"). The queues are classic ones. A few
//! messages more than the maximum may get in while publishers are fast. See also: rabbitmq_dead_letter,
//! rabbitmq_publisher_confirms, rabbitmq_retry_backoff.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions,
    BasicQosOptions, ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, ErrorKind};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

const ROOM: i32 = 3;
const MANY: usize = 20;
const PERSISTENT: u8 = 2;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let connection = connect(&addr).await?;
    let channel = connection.create_channel().await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    message_ttl(&channel).await?;
    queue_ttl(&channel).await?;
    unused_queue(&connection).await?;
    overflow(&channel, "drop-head").await?;
    overflow(&channel, "reject-publish").await?;
    backpressure(&connection, &channel).await?;
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close")??;
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_ttl_overflow".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

async fn message_ttl(channel: &Channel) -> anyhow::Result<()> {
    let queue = declare(channel, "ttl-overflow.message", &[]).await?;
    // A text, in milliseconds.
    let short = BasicProperties::default().with_expiration("100".into());
    publish(channel, &queue, "short-lived", short).await?;
    publish(channel, &queue, "long-lived", BasicProperties::default()).await?;
    await_count(channel, &queue, 1).await?;
    let left = take_all(channel, &queue).await?;
    println!(
        "message TTL 100 ms: the short-lived one is gone, left: {}",
        left.join(", ")
    );
    Ok(())
}

async fn queue_ttl(channel: &Channel) -> anyhow::Result<()> {
    let ttl = [("x-message-ttl", AMQPValue::LongInt(100))];
    let queue = declare(channel, "ttl-overflow.queue", &ttl).await?;
    for number in 1..=3 {
        publish(
            channel,
            &queue,
            &format!("order-{number}"),
            BasicProperties::default(),
        )
        .await?;
    }
    await_count(channel, &queue, 0).await?;
    println!("queue TTL 100 ms: 3 published, left: 0");
    Ok(())
}

/// Not the messages expire but the queue, with all that is in it, when it had no consumer for so long.
async fn unused_queue(connection: &Connection) -> anyhow::Result<()> {
    let channel = connection.create_channel().await?;
    let expires = [("x-expires", AMQPValue::LongInt(1500))];
    let queue = declare(&channel, "ttl-overflow.unused", &expires).await?;
    let gone = async {
        loop {
            // To ask about it by a declaration would be to use it, so look for where it is not: here, a longer pause.
            sleep(Duration::from_millis(2500)).await;
            let channel = connection.create_channel().await?;
            match count(&channel, &queue).await {
                Ok(_) => {}
                // The question for a queue that is not there closes the channel.
                Err(error) => match error.kind() {
                    ErrorKind::ProtocolError(error) if error.get_id() == 404 => {
                        return anyhow::Ok(());
                    }
                    _ => bail!(error),
                },
            }
        }
    };
    timeout(PATIENCE * 4, gone)
        .await
        .context("the queue is still there")??;
    println!("expires 1500 ms unused: the queue is gone");
    Ok(())
}

async fn overflow(channel: &Channel, how: &str) -> anyhow::Result<()> {
    let limits = [
        ("x-max-length", AMQPValue::LongInt(ROOM)),
        ("x-overflow", AMQPValue::LongString(how.into())),
    ];
    let queue = declare(channel, &format!("ttl-overflow.{how}"), &limits).await?;
    let (mut confirmed, mut refused) = (0, 0);
    for number in 1..=5 {
        let order = format!("order-{number}");
        match publish(channel, &queue, &order, BasicProperties::default()).await? {
            true => confirmed += 1,
            false => refused += 1,
        }
    }
    let left = take_all(channel, &queue).await?.join(", ");
    println!("{how}, room for {ROOM}: {confirmed} confirmed, {refused} refused, left: {left}");
    Ok(())
}

/// A fast publisher and a slow consumer: what is refused is tried again, later each time.
async fn backpressure(connection: &Connection, channel: &Channel) -> anyhow::Result<()> {
    let limits = [
        ("x-max-length", AMQPValue::LongInt(ROOM)),
        ("x-overflow", AMQPValue::LongString("reject-publish".into())),
    ];
    let queue = declare(channel, "ttl-overflow.backpressure", &limits).await?;
    let slow = connection.create_channel().await?;
    slow.basic_qos(1, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let mut deliveries = slow
        .basic_consume(
            queue.as_str().into(),
            "".into(),
            options,
            FieldTable::default(),
        )
        .await?;
    // A consumer that is quick enough would leave nothing to be refused.
    let full = Arc::new(Notify::new());
    let until_full = full.clone();
    let consumer = tokio::spawn(async move {
        let mut got = Vec::new();
        while got.len() < MANY {
            let order = timeout(PATIENCE * 2, deliveries.next()).await;
            let order = order
                .context("no order comes")?
                .context("consumer cancelled")??;
            got.push(String::from_utf8_lossy(&order.data).into_owned());
            match got.len() {
                1 => timeout(PATIENCE, until_full.notified())
                    .await
                    .context("nothing is refused")?,
                _ => sleep(Duration::from_millis(20)).await, // the work
            }
            order.ack(BasicAckOptions::default()).await?;
        }
        anyhow::Ok((got, deliveries))
    });
    let mut refusals = 0;
    let mut orders = Vec::new();
    for number in 1..=MANY {
        let order = format!("order-{number}");
        let mut pause = Duration::from_millis(5);
        while !publish(channel, &queue, &order, BasicProperties::default()).await? {
            refusals += 1;
            full.notify_one();
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(200));
        }
        orders.push(order);
    }
    let (got, deliveries) = consumer.await??;
    // Left to the drop, it would be cancelled in the background, and the channel may be closing by then: an error.
    slow.basic_cancel(deliveries.tag(), BasicCancelOptions::default())
        .await?;
    slow.close(200, "OK".into()).await?;
    let lost = orders.iter().filter(|order| !got.contains(order)).count();
    let refused = if refusals > 0 { "some" } else { "none" };
    println!(
        "backpressure, room for {ROOM}: {} of {MANY} confirmed, refused on the way: {refused}, lost: {lost}",
        orders.len()
    );
    ensure!(lost == 0, "a confirmed order is lost");
    Ok(())
}

/// Empty, whatever an earlier run has left.
async fn declare(
    channel: &Channel,
    queue: &str,
    limits: &[(&str, AMQPValue)],
) -> lapin::Result<String> {
    let mut arguments = FieldTable::default();
    for (name, value) in limits {
        arguments.insert((*name).into(), value.clone());
    }
    let durable = QueueDeclareOptions::durable();
    channel
        .queue_declare(queue.into(), durable, arguments)
        .await?;
    let purge = QueuePurgeOptions::default();
    channel.queue_purge(queue.into(), purge).await?;
    Ok(queue.to_owned())
}

/// False if the queue is full.
async fn publish(
    channel: &Channel,
    queue: &str,
    body: &str,
    properties: BasicProperties,
) -> anyhow::Result<bool> {
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let properties = properties.with_delivery_mode(PERSISTENT);
    let publish = channel.basic_publish(
        "".into(),
        queue.into(),
        options,
        body.as_bytes(),
        properties,
    );
    let confirmation = timeout(PATIENCE, async { publish.await?.await }).await;
    match confirmation.context("no confirm in time")?? {
        Confirmation::Ack(None) => Ok(true),
        Confirmation::Nack(_) => Ok(false),
        Confirmation::Ack(Some(returned)) => bail!("{queue}: {}", returned.reply_text),
        Confirmation::NotRequested => bail!("confirms are not enabled on this channel"),
    }
}

async fn count(channel: &Channel, queue: &str) -> lapin::Result<u32> {
    let passive = QueueDeclareOptions::durable().passive();
    let queue = channel
        .queue_declare(queue.into(), passive, FieldTable::default())
        .await?;
    Ok(queue.message_count())
}

async fn await_count(channel: &Channel, queue: &str, expected: u32) -> anyhow::Result<()> {
    let asking = async {
        while count(channel, queue).await? != expected {
            sleep(Duration::from_millis(20)).await;
        }
        anyhow::Ok(())
    };
    timeout(PATIENCE * 2, asking)
        .await
        .with_context(|| format!("{queue} never has {expected} messages"))?
}

async fn take_all(channel: &Channel, queue: &str) -> lapin::Result<Vec<String>> {
    let mut bodies = Vec::new();
    let options = BasicGetOptions::default();
    while let Some(message) = channel.basic_get(queue.into(), options).await? {
        bodies.push(String::from_utf8_lossy(&message.data).into_owned());
        message.ack(BasicAckOptions::default()).await?;
    }
    Ok(bodies)
}
