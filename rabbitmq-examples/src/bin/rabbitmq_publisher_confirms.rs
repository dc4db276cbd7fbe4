//! Publisher confirms: one by one, in batches and streaming, with their rates side by side
//!
//! Three ways to learn what the broker has taken over, from slow to fast. At least once, if what is not confirmed is
//! published again: a message without a confirm may or may not be there. If the connection goes, the program says
//! exactly which ones those are.
//!
//! ```console
//! $ cargo lab run rabbitmq_publisher_confirms 1000
//! one by one: 1000 attempted, 1000 confirmed, 0 refused, 0 unconfirmed, [..] per second
//! batches of 100: 1000 attempted, 1000 confirmed, 0 refused, 0 unconfirmed, [..] per second
//! streaming: 1000 attempted, 1000 confirmed, 0 refused, 0 unconfirmed, [..] per second
//! a full queue: 15 attempted, 10 confirmed, 5 refused, 0 unconfirmed
//! refused: 11-15
//! ```
//!
//! Notice: the broker confirms a persistent message when it has written it, and it writes for many messages at a time.
//! To wait after each is to pay for the writing each time. A window of confirms on their way keeps the broker
//! busy, and bounds what is in doubt when the connection goes. Refused (nack) is no doubt: the message is not in the
//! queue, and still the publisher's.
//!
//! Don't overstate it: a confirm does not keep the queue. One that was just declared is gone, with all that was
//! confirmed in it, if its broker is killed before it has written down, a moment later, that there is such a queue.
//!
//! Try: `rabbitmq_publisher_confirms 1000000 streaming`, and `cargo lab kill rabbitmq` or `cargo lab pause rabbitmq`
//! meanwhile.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); the arguments are how many messages
//! (2000), of 1 KB each, and one of `single`, `batches`, `streaming`. The queues are classic ones. See also:
//! rabbitmq_mandatory, rabbitmq_reconnect, rabbitmq_ttl_overflow.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::time::timeout;

const QUEUE: &str = "publisher-confirms";
const FULL: &str = "publisher-confirms.full";
const ROOM: i32 = 10;
const SIZE: usize = 1024;
const BATCH: usize = 100;
const WINDOW: usize = 1000;
const PERSISTENT: u8 = 2;
/// A broker that is short of memory or disk confirms nothing. That must not look like progress.
const PATIENCE: Duration = Duration::from_secs(10);

/// What became of the messages 1 to `attempted`: those in neither set are confirmed.
#[derive(Default)]
struct Outcome {
    attempted: u64,
    refused: BTreeSet<u64>,
    /// On their way, and at the end those that have stayed without an answer.
    unconfirmed: BTreeSet<u64>,
    /// Why it stopped early.
    error: Option<anyhow::Error>,
}

impl Outcome {
    fn confirmed(&self) -> u64 {
        self.attempted - (self.refused.len() + self.unconfirmed.len()) as u64
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let mut args = std::env::args().skip(1);
    let count: u64 = match args.next() {
        Some(count) => count
            .parse()
            .context("the first argument is a number of messages")?,
        None => 2000,
    };
    let ways: &[(&str, usize, bool)] = &[
        ("one by one", 1, false),
        ("batches of 100", BATCH, false),
        ("streaming", WINDOW, true),
    ];
    let ways = match args.next().as_deref() {
        None => ways,
        Some("single") => &ways[..1],
        Some("batches") => &ways[1..2],
        Some("streaming") => &ways[2..],
        Some(other) => bail!("{other:?} is none of single, batches, streaming"),
    };
    let connection = connect(&addr).await?;
    let channel = connection.create_channel().await?;
    declare_queues(&channel).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    for &(name, window, streaming) in ways {
        let purge = QueuePurgeOptions::default();
        channel.queue_purge(QUEUE.into(), purge).await?;
        let started = Instant::now();
        let outcome = publish(&channel, QUEUE, count, window, streaming).await;
        let rate = outcome.confirmed() as f64 / started.elapsed().as_secs_f64();
        report(name, outcome, &format!(", {rate:.0} per second"))?;
    }
    if ways.len() > 1 {
        let purge = QueuePurgeOptions::default();
        channel.queue_purge(FULL.into(), purge).await?;
        report(
            "a full queue",
            publish(&channel, FULL, 15, 1, false).await,
            "",
        )?;
    }
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close")??;
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_publisher_confirms".into());
    let connected = timeout(
        Duration::from_secs(5),
        Connection::connect(addr, properties),
    )
    .await;
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
        .queue_declare(QUEUE.into(), durable, FieldTable::default())
        .await?;
    let mut bounded = FieldTable::default();
    bounded.insert("x-max-length".into(), AMQPValue::LongInt(ROOM));
    // The default, drop-head, would confirm all and throw the oldest away.
    let overflow = AMQPValue::LongString("reject-publish".into());
    bounded.insert("x-overflow".into(), overflow);
    channel.queue_declare(FULL.into(), durable, bounded).await?;
    Ok(())
}

/// Keeps up to `window` messages without their confirm; streaming, a new one goes out as soon as one is confirmed, else
/// only when all are.
async fn publish(
    channel: &Channel,
    queue: &str,
    count: u64,
    window: usize,
    streaming: bool,
) -> Outcome {
    let mut outcome = Outcome::default();
    let mut in_flight = FuturesUnordered::new();
    while outcome.error.is_none() && (outcome.attempted < count || !in_flight.is_empty()) {
        while outcome.attempted < count && in_flight.len() < window {
            outcome.attempted += 1;
            let id = outcome.attempted;
            outcome.unconfirmed.insert(id);
            match timeout(PATIENCE, send(channel, queue, id)).await {
                Ok(Ok(confirm)) => in_flight.push(async move { (id, confirm.await) }),
                // It may have been written all the same, or a part of it.
                failed => {
                    outcome.error = Some(match failed {
                        Ok(Err(error)) => error.into(),
                        _ => anyhow!("the broker takes nothing more"),
                    });
                    break;
                }
            }
        }
        while outcome.error.is_none() {
            match timeout(PATIENCE, in_flight.next()).await {
                Ok(Some((id, answer))) => settle(&mut outcome, id, answer),
                Ok(None) => break,
                Err(_) => outcome.error = Some(anyhow!("no confirm within {PATIENCE:?}")),
            }
            if streaming && outcome.attempted < count {
                break;
            }
        }
    }
    // A lost connection resolves all that were on their way; confirms that had arrived before it count. A broker that is
    // there and silent resolves none.
    while let Ok(Some((id, answer))) = timeout(Duration::from_secs(1), in_flight.next()).await {
        settle(&mut outcome, id, answer);
    }
    outcome
}

async fn send(
    channel: &Channel,
    queue: &str,
    id: u64,
) -> lapin::Result<impl Future<Output = lapin::Result<Confirmation>> + use<>> {
    let body = vec![b'x'; SIZE];
    let properties = BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_message_id(id.to_string().into());
    // This await hands the message to the connection; the confirm is the future that it gives back.
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    channel
        .basic_publish("".into(), queue.into(), options, &body, properties)
        .await
}

fn settle(outcome: &mut Outcome, id: u64, answer: lapin::Result<Confirmation>) {
    let confirmation = match answer {
        Ok(Confirmation::NotRequested) => {
            let error = anyhow!("confirms are not enabled on this channel");
            outcome.error.get_or_insert(error);
            return;
        }
        Ok(confirmation) => confirmation,
        Err(error) => {
            outcome.error.get_or_insert(error.into());
            return;
        }
    };
    outcome.unconfirmed.remove(&id);
    if confirmation.is_nack() {
        outcome.refused.insert(id);
    }
    // What came back may come with another's confirm: only its own properties say which one it is.
    let returned = confirmation.take_message();
    let id = returned.and_then(|message| {
        message
            .properties
            .message_id()
            .as_ref()?
            .as_str()
            .parse()
            .ok()
    });
    if let Some(id) = id {
        outcome.unconfirmed.remove(&id);
        outcome.refused.insert(id);
    }
}

fn report(name: &str, outcome: Outcome, rate: &str) -> anyhow::Result<()> {
    let (attempted, confirmed) = (outcome.attempted, outcome.confirmed());
    let (refused, unconfirmed) = (outcome.refused.len(), outcome.unconfirmed.len());
    println!(
        "{name}: {attempted} attempted, {confirmed} confirmed, {refused} refused, {unconfirmed} unconfirmed{rate}"
    );
    if refused > 0 {
        println!("refused: {}", ranges(&outcome.refused));
    }
    if unconfirmed > 0 {
        println!("unconfirmed: {}", ranges(&outcome.unconfirmed));
    }
    match outcome.error {
        Some(error) => Err(error.context("stopped; publish what is unconfirmed again")),
        None => Ok(()),
    }
}

/// `1-3, 7`
fn ranges(ids: &BTreeSet<u64>) -> String {
    let ids: Vec<u64> = ids.iter().copied().collect();
    let runs = ids.chunk_by(|a, b| a + 1 == *b);
    let runs = runs.map(|run| match run {
        [one] => one.to_string(),
        [first, .., last] => format!("{first}-{last}"),
        [] => String::new(),
    });
    runs.collect::<Vec<_>>().join(", ")
}
