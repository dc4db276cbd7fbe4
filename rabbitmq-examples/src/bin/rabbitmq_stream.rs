//! Stream queue: a log that is read again and again, from any offset or time
//!
//! Reading from a stream takes nothing away: each reader has its own place, and says where to start. At least once for
//! a reader that remembers its offset: the broker does not, over AMQP. The oldest are dropped when it gets too large.
//!
//! ```console
//! $ cargo lab run rabbitmq_stream send created paid
//! stored: created, paid
//! 1$ cargo lab run rabbitmq_stream first
//! reading from first; Ctrl-C to stop
//! offset 0: created
//! offset 1: paid
//! 2$ cargo lab run rabbitmq_stream next
//! reading from next; Ctrl-C to stop
//! 3$ cargo lab run rabbitmq_stream send shipped
//! stored: shipped
//! 1:
//! offset 2: shipped
//! 2:
//! offset 2: shipped
//! 1^C
//! stopped; go on from 3
//! 2^C
//! stopped; go on from 3
//! 1$ cargo lab run rabbitmq_stream 1
//! reading from 1; Ctrl-C to stop
//! offset 1: paid
//! offset 2: shipped
//! 1^C
//! stopped; go on from 3
//! ```
//!
//! Notice: the start is `x-stream-offset`, an argument of the consumer. `last` is the last chunk, not the last message:
//! it may bring some that were stored together with it. A time, too, finds a chunk, and what is older in it comes along;
//! an offset is exact. A prefetch limit is obligatory, and an ack only asks for more: it removes nothing, and there is
//! no redelivery. A confirm of a stream does not wait for the disk on its node. Where you are belongs beside what you
//! have made of it, in one transaction.
//!
//! Try: `rabbitmq_stream last`; a time in seconds such as `@1750000000`, or `@0` for the beginning.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); the argument is first, last, next, an
//! offset, @SECONDS, or `send EVENT ...`. The clients of the stream protocol are faster and can leave their offset with
//! the broker. See also: rabbitmq_emit_log, kafka_replay.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::time::timeout;

const STREAM: &str = "stream.events";
const LARGEST: i64 = 100_000_000;
/// What is dropped is a whole segment, so a segment must be much smaller than the stream.
const SEGMENT: i32 = 10_000_000;
const PERSISTENT: u8 = 2;
const PATIENCE: Duration = Duration::from_secs(5);

const CONFIRMED: &str = "stored";
const REFUSED: &str = "refused, not in the stream";
const UNCONFIRMED: &str = "unconfirmed, may or may not be in the stream";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let start = match args[..] {
        [] => Some(("first", offset("first")?)),
        ["send", _, ..] => None,
        [start] => Some((start, offset(start)?)),
        _ => bail!("usage: rabbitmq_stream [first|last|next|OFFSET|@SECONDS|send EVENT ...]"),
    };
    let connection = connect(&addr).await?;
    let channel = connection.create_channel().await?;
    declare(&channel).await?;
    match start {
        None => send(&channel, &args[1..]).await?,
        Some((name, start)) => read(&channel, name, start).await?,
    }
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close; what was done last may come back")??;
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties = ConnectionProperties::default().with_connection_name("rabbitmq_stream".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

/// The type of the value says what is meant: a text, a number or a time.
fn offset(start: &str) -> anyhow::Result<AMQPValue> {
    if let Some(seconds) = start.strip_prefix('@') {
        let seconds = seconds.parse();
        return Ok(AMQPValue::Timestamp(
            seconds.context("@ is followed by seconds since 1970")?,
        ));
    }
    match start {
        "first" | "last" | "next" => Ok(AMQPValue::LongString(start.into())),
        _ => {
            let offset: i64 = start.parse().with_context(|| {
                format!("{start:?} is not first, last, next, an offset or @SECONDS")
            })?;
            ensure!(offset >= 0, "an offset is not negative");
            Ok(AMQPValue::LongLongInt(offset))
        }
    }
}

async fn declare(channel: &Channel) -> lapin::Result<()> {
    let mut arguments = FieldTable::default();
    let mut set = |key: &str, value: AMQPValue| {
        arguments.insert(key.into(), value);
    };
    set("x-queue-type", AMQPValue::LongString("stream".into()));
    // Without a limit, it grows until the disk is full.
    set("x-max-length-bytes", AMQPValue::LongLongInt(LARGEST));
    set(
        "x-stream-max-segment-size-bytes",
        AMQPValue::LongInt(SEGMENT),
    );
    let durable = QueueDeclareOptions::durable();
    channel
        .queue_declare(STREAM.into(), durable, arguments)
        .await?;
    Ok(())
}

/// Publishes all at once, and says of each what became of it.
async fn send(channel: &Channel, events: &[&str]) -> anyhow::Result<()> {
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let mut answers: FuturesUnordered<_> = (0..)
        .zip(events)
        .map(|(id, event)| async move { (id, publish(channel, id, event).await) })
        .collect();
    let (mut became, mut problem) = (vec![UNCONFIRMED; events.len()], None);
    loop {
        match timeout(PATIENCE * 2, answers.next()).await {
            Ok(Some((id, Ok(confirmation)))) => settle(&mut became, id, confirmation),
            // The others have answers of their own.
            Ok(Some((_, Err(error)))) => problem = Some(error.into()),
            Ok(None) => break,
            Err(_) => {
                problem = Some(anyhow!("no confirms in time"));
                break;
            }
        }
    }
    for what in [CONFIRMED, REFUSED, UNCONFIRMED] {
        let those = events.iter().zip(&became);
        let those = those.filter(|(_, became)| **became == what);
        let those: Vec<&str> = those.map(|(event, _)| *event).collect();
        if !those.is_empty() {
            println!("{what}: {}", those.join(", "));
        }
    }
    if let Some(error) = problem {
        return Err(error.context("send the unconfirmed again"));
    }
    let all = became.iter().all(|became| *became == CONFIRMED);
    ensure!(all, "not all events are confirmed");
    Ok(())
}

async fn publish(channel: &Channel, id: usize, event: &str) -> lapin::Result<Confirmation> {
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
            STREAM.into(),
            options,
            event.as_bytes(),
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

async fn read(channel: &Channel, name: &str, start: AMQPValue) -> anyhow::Result<()> {
    // Refused without: a reader that starts at the beginning would get the whole log at once.
    channel.basic_qos(100, BasicQosOptions::default()).await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-stream-offset".into(), start);
    let mut deliveries = channel
        .basic_consume(
            STREAM.into(),
            "".into(),
            BasicConsumeOptions::default(),
            arguments,
        )
        .await?;
    println!("reading from {name}; Ctrl-C to stop");
    let mut next = None;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let delivery = tokio::select! {
            // In this order, so that Ctrl-C is also heard of during the first one.
            biased;
            signal = &mut stop => break signal?,
            delivery = deliveries.next() => delivery
                .context("the broker cancelled the consumer; was the stream deleted?")?
                .with_context(|| match next {
                    Some(next) => format!("lost the connection; go on from {next}"),
                    None => "lost the connection".to_owned(),
                })?,
        };
        let offset = offset_of(&delivery).context("a delivery without an offset")?;
        println!(
            "offset {offset}: {}",
            String::from_utf8_lossy(&delivery.data)
        );
        let ack = delivery.ack(BasicAckOptions::default());
        // Without a limit it may wait for ever: lapin forgets an ack that is under way when the connection is lost.
        timeout(PATIENCE, ack)
            .await
            .context("lost the connection")??;
        next = Some(offset + 1);
    }
    match next {
        Some(next) => println!("stopped; go on from {next}"),
        None => println!("stopped; nothing was read"),
    }
    Ok(())
}

fn offset_of(delivery: &Delivery) -> Option<i64> {
    let headers = delivery.properties.headers().as_ref()?;
    match headers.inner().get("x-stream-offset")? {
        AMQPValue::LongLongInt(offset) => Some(*offset),
        AMQPValue::LongInt(offset) => Some(i64::from(*offset)),
        AMQPValue::ShortInt(offset) => Some(i64::from(*offset)),
        AMQPValue::ShortShortInt(offset) => Some(i64::from(*offset)),
        AMQPValue::ShortShortUInt(offset) => Some(i64::from(*offset)),
        _ => None,
    }
}
