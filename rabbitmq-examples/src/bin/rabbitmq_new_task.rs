//! Work queue, the sender: tasks that any one of several workers takes
//!
//! Each argument is a task, and each '.' in it a second of work. It ends when the broker has confirmed every task: they
//! are in a durable queue, and a restart of the broker does not lose them. If not all are confirmed, it says of each
//! what became of it: what is unconfirmed may or may not be there, and is yours to send again.
//!
//! ```console
//! $ cargo lab run rabbitmq_new_task 'resize the image..' 'send the mail.'
//! sent and confirmed: resize the image..
//! sent and confirmed: send the mail.
//! ```
//!
//! Notice: all tasks are published before the first confirm is awaited: one round trip for all, not one for each.
//! `mandatory` matters: what no queue takes is confirmed, too, and dropped. And one that fails says nothing of the
//! others: the confirms that had come before the connection was lost are as good as any.
//!
//! Try: start it without workers, restart the broker, then start a worker.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"). See also: rabbitmq_worker,
//! rabbitmq_publisher_confirms.

use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::time::timeout;

const QUEUE: &str = "work-queue";
const REJECTED: &str = "work-queue.rejected";
const PERSISTENT: u8 = 2;
const PATIENCE: Duration = Duration::from_secs(5);

const CONFIRMED: &str = "sent and confirmed";
const REFUSED: &str = "refused, not in the queue";
const UNCONFIRMED: &str = "unconfirmed, may or may not be in the queue";

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
    send(&channel, &tasks).await?;
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close")??;
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
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
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

async fn send(channel: &Channel, tasks: &[String]) -> anyhow::Result<()> {
    let mut answers: FuturesUnordered<_> = (0..)
        .zip(tasks)
        .map(|(id, task)| async move { (id, publish(channel, id, task).await) })
        .collect();
    let (mut became, mut problem) = (vec![UNCONFIRMED; tasks.len()], None);
    loop {
        // A broker that is short of memory or disk neither reads nor confirms, for as long as that lasts.
        match timeout(PATIENCE, answers.next()).await {
            Ok(Some((id, Ok(confirmation)))) => settle(&mut became, id, confirmation),
            Ok(Some((_, Err(error)))) => problem = Some(error.into()),
            Ok(None) => break,
            Err(_) => {
                problem = Some(anyhow!("no confirms in time"));
                break;
            }
        }
    }
    for (task, became) in tasks.iter().zip(&became) {
        println!("{became}: {task}");
    }
    if let Some(error) = problem {
        return Err(error.context("send the unconfirmed again"));
    }
    let all = became.iter().all(|became| *became == CONFIRMED);
    ensure!(all, "not all tasks are confirmed");
    Ok(())
}

async fn publish(channel: &Channel, id: usize, task: &str) -> lapin::Result<Confirmation> {
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let properties = BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_message_id(id.to_string().into());
    // The first await hands the message to the connection, the second is its confirm.
    channel
        .basic_publish(
            "".into(),
            QUEUE.into(),
            options,
            task.as_bytes(),
            properties,
        )
        .await?
        .await
}

fn settle(became: &mut [&str], id: usize, answer: Confirmation) {
    match answer {
        Confirmation::Ack(_) if became[id] == UNCONFIRMED => became[id] = CONFIRMED,
        Confirmation::Nack(_) => became[id] = REFUSED,
        // It had come back before; or confirms are not enabled, and nothing is known.
        Confirmation::Ack(_) | Confirmation::NotRequested => {}
    }
    // What came back may come with another's confirm: only its own properties say which one it is.
    let returned = answer.take_message();
    let id = returned.and_then(|message| {
        message
            .properties
            .message_id()
            .as_ref()?
            .as_str()
            .parse()
            .ok()
    });
    if let Some(became) = id.and_then(|id: usize| became.get_mut(id)) {
        *became = REFUSED;
    }
}
