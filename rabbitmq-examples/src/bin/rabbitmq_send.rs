//! Send a task to a durable RabbitMQ queue, and wait until the broker has taken responsibility
//!
//! Publishes one persistent message and ends only when the broker has confirmed it. Confirmed means: the queue has it
//! and a restart of the broker does not lose it. Without a confirm (timeout, lost connection) it may or may not be
//! there, so sending again gives at least once: the program says so, and its exit status is 1.
//!
//! ```console
//! $ cargo lab run rabbitmq_send
//! sent and confirmed: Task: Process order #123
//! ```
//!
//! Notice: surviving a restart takes three things: a durable queue, a persistent message (delivery mode 2) and the
//! awaited confirm. A confirm alone is not proof of delivery to a queue: the broker also confirms what it could route
//! nowhere and dropped. `mandatory` makes it hand such a message back first.
//!
//! Try: send to `TYPO` instead of `QUEUE` in `basic_publish`: the message comes back as NO_ROUTE and the exit status
//! is 1. Take `mandatory` away as well: the loss now looks like success.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); the first argument replaces the body.
//! See also: rabbitmq_receive.

use std::time::Duration;

use anyhow::{Context, bail};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::time::timeout;

const QUEUE: &str = "tasks";
const REJECTED: &str = "tasks.rejected";
const PATIENCE: Duration = Duration::from_secs(5);
const PERSISTENT: u8 = 2;
const REFUSED: &str = "the broker refused the task";
const UNCONFIRMED: &str = "no confirmation: the task may or may not be in the queue";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let body = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "Task: Process order #123".into());

    let connection = connect(&addr).await.with_context(|| {
        let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
        format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
    })?;
    let channel = connection.create_channel().await?;
    declare_queues(&channel).await?;
    // Without this, the "confirmation" below resolves at once, as `NotRequested`.
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;

    // A broker that is short of memory or disk stops reading from publishers, which then wait for as long as it lasts.
    timeout(PATIENCE, send(&channel, &body))
        .await
        .context(UNCONFIRMED)??;
    println!("sent and confirmed: {body}");

    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close")??;
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties = ConnectionProperties::default().with_connection_name("rabbitmq_send".into());
    Ok(timeout(PATIENCE, Connection::connect(addr, properties)).await??)
}

/// Sender and receiver declare the queue with the same arguments: whichever comes first creates it.
///
/// Without `x-queue-type` it is a classic queue: durable, on one node. Work that has to outlive a node belongs in a
/// cluster's quorum queues, with a dead-letter target like the one here: without one, they drop what came back more
/// than 20 times.
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

async fn send(channel: &Channel, body: &str) -> anyhow::Result<()> {
    // The first await hands the message to the connection, the second waits for the broker's answer.
    // The exchange "" routes to the queue that is named like the routing key.
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let properties = BasicProperties::default()
        .with_content_type("text/plain".into())
        .with_delivery_mode(PERSISTENT);
    let publish = channel.basic_publish(
        "".into(),
        QUEUE.into(),
        options,
        body.as_bytes(),
        properties,
    );
    let confirmation = async { publish.await?.await }.await;
    let confirmation = confirmation.map_err(|error| {
        // A message that is too large, for example. After any other error, the broker may have it.
        let refused = error.is_amqp_soft_error();
        let what = if refused { REFUSED } else { UNCONFIRMED };
        anyhow::Error::new(error).context(what)
    })?;
    match confirmation {
        Confirmation::Ack(None) => Ok(()),
        Confirmation::Ack(Some(returned)) => {
            bail!("no queue took the task: {}", returned.reply_text)
        }
        Confirmation::Nack(_) => bail!(REFUSED),
        Confirmation::NotRequested => bail!("confirms are not enabled on this channel"),
    }
}
