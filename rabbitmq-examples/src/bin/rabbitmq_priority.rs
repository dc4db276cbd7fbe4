//! Priority queue: the urgent task first, unless a prefetch has already taken the others
//!
//! A queue with `x-max-priority` delivers what is urgent before what came earlier; among equals, the order in which they
//! came. It can only choose among messages that are still in the queue, so a prefetch of 10 undoes it: ten ordinary
//! tasks are then with the consumer, and the urgent one is behind them. Both, side by side.
//!
//! ```console
//! $ cargo lab run rabbitmq_priority
//! prefetch 1: task-1, urgent, task-2, task-3, task-4
//! prefetch 10: task-1, task-2, task-3, task-4, urgent
//! ```
//!
//! Notice: task-1 is first in both: it is in hand when the urgent one comes, and nothing interrupts it. Priorities above
//! the maximum count as the maximum, a message without one has the lowest. Each level costs the broker memory and time:
//! take two or three, not 255. Ordinary tasks can starve: as long as urgent ones come, nothing else is delivered.
//!
//! Try: change PREFETCHES to 2 and 3. Take two queues with consumers of their own instead: nothing starves.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"). `x-max-priority` is for classic
//! queues. Quorum queues have levels without being asked. From 4.0 to 4.2 there are two: up to 4 is normal, 5 and more
//! is high, and two high ones come for each normal one. From 4.3 on there are 32, and the higher one always comes
//! first. In 3.x there are none. See also: rabbitmq_worker.

use std::time::Duration;

use anyhow::{Context, ensure};
use futures::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use tokio::time::timeout;

const QUEUE: &str = "priority.tasks";
const ORDINARY: u8 = 0;
const URGENT: u8 = 2;
const PREFETCHES: [u16; 2] = [1, 10];
const TASKS: u16 = 4;
const PERSISTENT: u8 = 2;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let connection = connect(&addr).await?;
    for prefetch in PREFETCHES {
        let order = run(&connection, prefetch).await?;
        println!("prefetch {prefetch}: {}", order.join(", "));
    }
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close")??;
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_priority".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

/// In which order one worker does them, if the urgent one comes while it has its hands full.
async fn run(connection: &Connection, prefetch: u16) -> anyhow::Result<Vec<String>> {
    let channel = connection.create_channel().await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-priority".into(), AMQPValue::ShortShortUInt(URGENT));
    let durable = QueueDeclareOptions::durable();
    channel
        .queue_declare(QUEUE.into(), durable, arguments)
        .await?;
    let purge = QueuePurgeOptions::default();
    channel.queue_purge(QUEUE.into(), purge).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    channel
        .basic_qos(prefetch, BasicQosOptions::default())
        .await?;

    let options = BasicConsumeOptions::default();
    let mut deliveries = channel
        .basic_consume(QUEUE.into(), "".into(), options, FieldTable::default())
        .await?;
    for number in 1..=TASKS {
        publish(&channel, &format!("task-{number}"), ORDINARY).await?;
    }
    // What the broker pushes, the worker holds before it starts on the first.
    let mut held = Vec::new();
    for _ in 0..prefetch.min(TASKS) {
        held.push(next(&mut deliveries).await?);
    }
    publish(&channel, "urgent", URGENT).await?;

    let mut order = Vec::new();
    let mut held = held.into_iter();
    while order.len() <= usize::from(TASKS) {
        let task = match held.next() {
            Some(task) => task,
            None => next(&mut deliveries).await?,
        };
        order.push(String::from_utf8_lossy(&task.data).into_owned());
        let ack = task.ack(BasicAckOptions::default());
        // Without a limit it may wait for ever: lapin forgets an ack that is under way when the connection is lost.
        let acked = timeout(PATIENCE, ack).await.unwrap_or(Ok(false))?;
        ensure!(acked, "lost the connection");
    }
    let cancel = channel.basic_cancel(deliveries.tag(), BasicCancelOptions::default());
    timeout(PATIENCE, cancel)
        .await
        .context("the broker does not answer the cancel")??;
    timeout(PATIENCE, channel.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close")??;
    Ok(order)
}

async fn publish(channel: &Channel, task: &str, priority: u8) -> anyhow::Result<()> {
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let properties = BasicProperties::default()
        .with_priority(priority)
        .with_delivery_mode(PERSISTENT);
    let publish = channel.basic_publish(
        "".into(),
        QUEUE.into(),
        options,
        task.as_bytes(),
        properties,
    );
    let confirmation = timeout(PATIENCE, async { publish.await?.await }).await;
    let confirmation = confirmation.context("no confirm in time")??;
    let taken = confirmation.is_ack() && confirmation.take_message().is_none();
    ensure!(taken, "{task} was not taken");
    Ok(())
}

async fn next(deliveries: &mut Consumer) -> anyhow::Result<Delivery> {
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    let delivery = delivery.context("no task comes; has the queue another consumer?")?;
    Ok(delivery.context("the broker cancelled the consumer")??)
}
