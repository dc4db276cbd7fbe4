//! Work queue, the sender: tasks that any one of several workers takes
//!
//! Each argument is a task, and each '.' in it a second of work. It ends when the broker has confirmed every task: they
//! are in a durable queue, and a restart of the broker does not lose them. A task that was not confirmed may or may not
//! be there, and is named, so that it can be sent again.
//!
//! ```console
//! $ cargo lab run rabbitmq_new_task 'resize the image..' 'send the mail.'
//! sent and confirmed: resize the image..
//! sent and confirmed: send the mail.
//! ```
//!
//! Notice: all tasks are published before the first confirm is awaited: one round trip for all, not one for each.
//! `mandatory` matters: what no queue takes is confirmed, too, and dropped.
//!
//! Try: start it without workers, restart the broker, then start a worker.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"). See also: rabbitmq_worker,
//! rabbitmq_publisher_confirms.

use std::time::Duration;

use anyhow::{Context, bail};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::time::timeout;

const QUEUE: &str = "work-queue";
const REJECTED: &str = "work-queue.rejected";
const PERSISTENT: u8 = 2;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let mut tasks: Vec<String> = std::env::args().skip(1).collect();
    if tasks.is_empty() {
        tasks.push("Hello...".into());
    }
    let connection = connect(&addr).await?;
    let channel = connection.create_channel().await?;
    declare_queues(&channel).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let mut confirms = Vec::new();
    for task in &tasks {
        let publish = channel.basic_publish(
            "".into(),
            QUEUE.into(),
            BasicPublishOptions {
                mandatory: true,
                ..BasicPublishOptions::default()
            },
            task.as_bytes(),
            BasicProperties::default().with_delivery_mode(PERSISTENT),
        );
        // A broker that is short of memory or disk stops reading, and then this would wait for as long as that lasts.
        let handed_over = timeout(PATIENCE, publish).await;
        confirms.push(handed_over.with_context(|| format!("cannot send {task:?}"))??);
    }
    for (task, confirm) in tasks.iter().zip(confirms) {
        let confirmation = timeout(PATIENCE, confirm)
            .await
            .with_context(|| format!("no confirmation in time; {task:?} may or may not be there"))?
            .with_context(|| format!("connection lost; {task:?} may or may not be there"))?;
        match confirmation {
            Confirmation::Ack(None) => println!("sent and confirmed: {task}"),
            Confirmation::Ack(Some(_)) => bail!("{task:?} came back: no queue took it"),
            Confirmation::Nack(_) => bail!("the broker refused {task:?}"),
            Confirmation::NotRequested => bail!("confirms are not enabled on this channel"),
        }
    }
    connection.close(200, "OK".into()).await?;
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_new_task".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            format!("cannot connect to RabbitMQ at {addr}; `cargo lab up rabbitmq` starts a broker")
        })
}

/// As in rabbitmq_worker: whichever comes first creates the queues, and differing arguments would be an error.
async fn declare_queues(channel: &Channel) -> lapin::Result<()> {
    let mut arguments = FieldTable::default();
    let mut set = |key: &str, value: &str| {
        arguments.insert(key.into(), AMQPValue::LongString(value.into()));
    };
    set("x-dead-letter-exchange", "");
    set("x-dead-letter-routing-key", REJECTED);
    let durable = QueueDeclareOptions::durable();
    channel
        .queue_declare(REJECTED.into(), durable, FieldTable::default())
        .await?;
    channel
        .queue_declare(QUEUE.into(), durable, arguments)
        .await?;
    Ok(())
}
