//! Receive tasks from RabbitMQ one at a time, and acknowledge each after its work
//!
//! Takes a task, works on it for two seconds, then acknowledges it. At least once: a task whose worker dies before the
//! ack goes back to the queue and is delivered again, so work may be done twice, but never lost.
//!
//! ```console
//! 1$ cargo lab run rabbitmq_receive
//! waiting for tasks; Ctrl-C to stop
//! 2$ cargo lab run rabbitmq_send
//! sent and confirmed: Task: Process order #123
//! 1:
//! received: Process order #123
//! done: Process order #123
//! 1^C
//! stopped; tasks done: 1
//! ```
//!
//! Notice: a body that is no task is rejected to the queue `tasks.rejected`, where it waits for a person. Requeueing it
//! would deliver it again at once, for ever. `basic_qos(1)` keeps the other tasks in the queue, where a second worker
//! can take them; without it, the broker pushes the whole queue to the first worker that connects. When the network goes
//! silent and no connection is closed, missing heartbeats are the only sign: this takes two minutes and more with the
//! broker's default of 60 seconds, and seconds with `?heartbeat=5` at the end of AMQP_ADDR.
//!
//! Try: `cargo lab kill rabbitmq_receive` between "received" and "done", start it again: the task comes back, marked as
//! redelivered. Press Ctrl-C during the work: the task is finished and acknowledged first.
//! `cargo lab run rabbitmq_send nonsense` sends a body that is no task. `cargo lab down rabbitmq`: the program ends
//! with an error instead of waiting for ever.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"). See also: rabbitmq_send.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, BasicRejectOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties};
use tokio::time::{sleep, timeout};

const QUEUE: &str = "tasks";
const REJECTED: &str = "tasks.rejected";
const CONSUMER_TAG: &str = "rabbitmq_receive";
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let connection = connect(&addr).await.with_context(|| {
        let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
        format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
    })?;
    let channel = connection.create_channel().await?;
    declare_queues(&channel).await?;
    channel.basic_qos(1, BasicQosOptions::default()).await?;
    let mut deliveries = channel
        .basic_consume(
            QUEUE.into(),
            CONSUMER_TAG.into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    println!("waiting for tasks; Ctrl-C to stop");

    let mut done = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let delivery = tokio::select! {
            // In this order, so that Ctrl-C is also heard of during the first task.
            biased;
            signal = &mut stop => break signal?,
            // An error is a lost connection. The end of the stream is a consumer cancelled by the broker.
            // A loop of `while let Some(Ok(..))` would take both for a normal end.
            delivery = deliveries.next() => delivery
                .context("the broker cancelled the consumer; was the queue deleted?")?
                .context("lost the connection")?,
        };
        // Outside the select: Ctrl-C does not interrupt a task in hand.
        if handle(&delivery)
            .await
            .context("the task was not acknowledged and will be delivered again")?
        {
            done += 1;
        }
    }

    // After the cancel no new task arrives; one that was already on its way goes back to the queue at the close.
    let cancel = channel.basic_cancel(CONSUMER_TAG.into(), BasicCancelOptions::default());
    timeout(PATIENCE, cancel)
        .await
        .context("the broker does not answer the cancel")??;
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close; what was done last may come back")??;
    println!("stopped; tasks done: {done}");
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_receive".into());
    Ok(timeout(PATIENCE, Connection::connect(addr, properties)).await??)
}

/// Sender and receiver declare the queue with the same arguments: whichever comes first creates it.
/// `rabbitmq_send` says why it is a classic one.
async fn declare_queues(channel: &Channel) -> lapin::Result<()> {
    let mut tasks = FieldTable::default();
    let mut set = |key: &str, value: &str| {
        tasks.insert(key.into(), AMQPValue::LongString(value.into()));
    };
    set("x-dead-letter-exchange", "");
    set("x-dead-letter-routing-key", REJECTED);

    let durable = QueueDeclareOptions::durable();
    let no_arguments = FieldTable::default();
    channel
        .queue_declare(REJECTED.into(), durable, no_arguments)
        .await?;
    channel.queue_declare(QUEUE.into(), durable, tasks).await?;
    Ok(())
}

/// Works on one task and settles it; false if it was no task.
async fn handle(delivery: &Delivery) -> anyhow::Result<bool> {
    let body = String::from_utf8_lossy(&delivery.data);
    let Some(task) = body.strip_prefix("Task: ") else {
        let options = BasicRejectOptions { requeue: false };
        let rejected = timeout(PATIENCE, delivery.reject(options)).await;
        ensure!(rejected.unwrap_or(Ok(false))?, "lost the connection");
        println!("not a task, moved to {REJECTED}: {body}");
        return Ok(false);
    };
    let again = if delivery.redelivered {
        " (redelivered)"
    } else {
        ""
    };
    println!("received: {task}{again}");
    sleep(Duration::from_secs(2)).await; // the work
    // False if the connection went during the work. It is no error, and looks like success.
    let ack = delivery.ack(BasicAckOptions::default());
    // Without a limit it may wait for ever: lapin forgets an ack that is under way when the connection is lost.
    let acked = timeout(PATIENCE, ack).await.unwrap_or(Ok(false))?;
    ensure!(acked, "lost the connection during the work");
    println!("done: {task}");
    Ok(true)
}
