//! Quorum queue: replicated, safe through a broker's SIGKILL, and with a limit for poison messages
//!
//! A quorum queue keeps its messages on several nodes, and confirms when a majority has written them. It counts how
//! often a message was given back, and after the delivery limit it moves it to the dead letters: at least once from
//! end to end, without a message that comes back for ever. `send` says of each job whether it is confirmed; what is
//! not may or may not be in the queue, and is to be sent again.
//!
//! ```console
//! 1$ cargo lab run rabbitmq_quorum_queue
//! waiting for jobs; Ctrl-C to stop
//! 2$ cargo lab run rabbitmq_quorum_queue send job-1 poison
//! sent and confirmed: job-1, poison
//! 1:
//! job-1: done
//! poison: failed; given back
//! poison: failed, failures before: 1; given back
//! poison: failed, failures before: 2; given back
//! poison: failed, failures before: 3; given back
//! 2$ cargo lab run rabbitmq_quorum_queue send job-2
//! sent and confirmed: job-2
//! 1:
//! job-2: done
//! 1^C
//! stopped; jobs done: 2, failures: 4
//! 2$ cargo lab run rabbitmq_quorum_queue dead
//! poison: delivery_limit, from quorum-queue.jobs
//! dead letters: 1
//! ```
//!
//! Notice: a limit without a dead-letter exchange drops the message when it is reached. `at-least-once` dead-lettering
//! waits until the dead letter is confirmed, which takes `reject-publish` as overflow. A worker that crashes counts as a
//! failed delivery of all that it held: with a high prefetch, four crashes move everything to the dead letters.
//! Killing a process does not prove that a power failure is survived; quorum queues call fsync before they confirm. The
//! exception is a queue that was just declared: a single node that is killed within half a second has not written down
//! yet that it has the queue, and comes back without it and its messages.
//!
//! A queue that sets no delivery limit has one of 20, and -1 turns it off; in 3.x it has none. Up to 4.2 whatever comes
//! back counts as a failure. From 4.3 on only `reject` and lost consumers do; `nack` gives a message back without
//! counting. This program uses `reject`, which counts everywhere. Mirrored classic queues, the old way to replicate,
//! are gone since 4.0.
//!
//! Try: `cargo lab kill rabbitmq` and `cargo lab restart rabbitmq` between send and receive;
//! `cargo lab up rabbitmq --nodes 3`, and `cargo lab kill rabbitmq.2` or `cargo lab kill rabbitmq.3` in the middle of a
//! send: two of three are a majority, and all is confirmed. (AMQP_ADDR is the first; a program that is connected to the
//! node that dies ends with an error.)
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); the arguments are `send JOB ...`,
//! `dead`, or nothing to work. A job is said to fail if its name contains "poison". See also: rabbitmq_dead_letter,
//! rabbitmq_pitfall_missing_ack.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions,
    BasicQosOptions, BasicRejectOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::time::timeout;

const JOBS: &str = "quorum-queue.jobs";
const DEAD: &str = "quorum-queue.dead";
const DELIVERY_LIMIT: i32 = 3;
const PERSISTENT: u8 = 2;
const PATIENCE: Duration = Duration::from_secs(5);

const CONFIRMED: &str = "sent and confirmed";
const REFUSED: &str = "refused, not in the queue";
const UNCONFIRMED: &str = "unconfirmed, may or may not be in the queue";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let connection = connect(&addr).await?;
    let channel = connection.create_channel().await?;
    declare_queues(&channel).await?;
    match args.split_first() {
        None => work(&channel).await?,
        Some((send_it, jobs)) if send_it == "send" && !jobs.is_empty() => {
            send(&channel, jobs).await?
        }
        Some((dead, [])) if dead == "dead" => show_dead(&channel).await?,
        Some(_) => bail!("usage: rabbitmq_quorum_queue [send JOB ...|dead]"),
    }
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close; what was done last may come back")??;
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_quorum_queue".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

async fn declare_queues(channel: &Channel) -> lapin::Result<()> {
    let mut jobs = FieldTable::default();
    let limit = AMQPValue::LongInt(DELIVERY_LIMIT);
    jobs.insert("x-delivery-limit".into(), limit);
    let mut set = |key: &str, value: &str| {
        jobs.insert(key.into(), AMQPValue::LongString(value.into()));
    };
    set("x-queue-type", "quorum");
    set("x-dead-letter-exchange", "");
    set("x-dead-letter-routing-key", DEAD);
    set("x-dead-letter-strategy", "at-least-once");
    set("x-overflow", "reject-publish");
    let durable = QueueDeclareOptions::durable(); // quorum queues are never anything else
    // A classic queue: a quorum queue would count each look at the dead as a failure, and drop them after more than 20.
    channel
        .queue_declare(DEAD.into(), durable, FieldTable::default())
        .await?;
    channel.queue_declare(JOBS.into(), durable, jobs).await?;
    Ok(())
}

/// Publishes all at once, and says of each what became of it.
async fn send(channel: &Channel, jobs: &[String]) -> anyhow::Result<()> {
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let mut answers: FuturesUnordered<_> = (0..)
        .zip(jobs)
        .map(|(id, job)| async move { (id, publish(channel, id, job).await) })
        .collect();
    let (mut became, mut problem) = (vec![UNCONFIRMED; jobs.len()], None);
    loop {
        match timeout(PATIENCE * 2, answers.next()).await {
            Ok(Some((id, Ok(confirmation)))) => settle(&mut became, id, confirmation),
            // The others have answers of their own.
            Ok(Some((_, Err(error)))) => problem = Some(error.into()),
            Ok(None) => break,
            Err(_) => {
                problem = Some(anyhow!(
                    "no confirms in time; has the queue lost its majority?"
                ));
                break;
            }
        }
    }
    for what in [CONFIRMED, REFUSED, UNCONFIRMED] {
        let those = jobs.iter().zip(&became);
        let those = those.filter(|(_, became)| **became == what);
        let those: Vec<&str> = those.map(|(job, _)| job.as_str()).collect();
        if !those.is_empty() {
            println!("{what}: {}", those.join(", "));
        }
    }
    if let Some(error) = problem {
        return Err(error.context("send the unconfirmed again"));
    }
    let all = became.iter().all(|became| *became == CONFIRMED);
    ensure!(all, "not all jobs are confirmed");
    Ok(())
}

async fn publish(channel: &Channel, id: usize, job: &str) -> lapin::Result<Confirmation> {
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let properties = BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_message_id(id.to_string().into());
    // The first await hands the message to the connection, the second is its confirm.
    channel
        .basic_publish("".into(), JOBS.into(), options, job.as_bytes(), properties)
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

async fn work(channel: &Channel) -> anyhow::Result<()> {
    channel.basic_qos(1, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let mut deliveries = channel
        .basic_consume(JOBS.into(), "".into(), options, FieldTable::default())
        .await?;
    println!("waiting for jobs; Ctrl-C to stop");
    let (mut done, mut failures) = (0, 0);
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
        let job = String::from_utf8_lossy(&delivery.data);
        let settled = if job.contains("poison") {
            let before = match failures_before(&delivery) {
                0 => String::new(),
                count => format!(", failures before: {count}"),
            };
            println!("{job}: failed{before}; given back");
            failures += 1;
            let options = BasicRejectOptions { requeue: true };
            timeout(PATIENCE, delivery.reject(options)).await
        } else {
            println!("{job}: done");
            done += 1;
            timeout(PATIENCE, delivery.ack(BasicAckOptions::default())).await
        };
        // Without a limit it may wait for ever: lapin forgets an ack that is under way when the connection is lost.
        let settled = settled.unwrap_or(Ok(false));
        let settled = settled.context("lost the connection")?;
        ensure!(settled, "lost the connection; {job} is delivered again");
    }
    let cancel = channel.basic_cancel(deliveries.tag(), BasicCancelOptions::default());
    timeout(PATIENCE, cancel)
        .await
        .context("the broker does not answer the cancel")??;
    println!("stopped; jobs done: {done}, failures: {failures}");
    Ok(())
}

/// Only a quorum queue sets it, and only from the second delivery on.
fn failures_before(delivery: &Delivery) -> i64 {
    let headers = delivery.properties.headers().as_ref();
    match headers.and_then(|headers| headers.inner().get("x-delivery-count")) {
        Some(AMQPValue::LongLongInt(count)) => *count,
        Some(AMQPValue::LongInt(count)) => i64::from(*count),
        Some(AMQPValue::ShortInt(count)) => i64::from(*count),
        Some(AMQPValue::ShortShortInt(count)) => i64::from(*count),
        Some(AMQPValue::ShortShortUInt(count)) => i64::from(*count),
        _ => 0,
    }
}

/// Looks at all, and leaves them where they are: the close gives them back.
async fn show_dead(channel: &Channel) -> anyhow::Result<()> {
    let mut count = 0;
    let options = BasicGetOptions::default();
    while let Some(letter) = channel.basic_get(DEAD.into(), options).await? {
        count += 1;
        let headers = letter.properties.headers().as_ref();
        let text = |key: &str| match headers.and_then(|headers| headers.inner().get(key)) {
            Some(AMQPValue::LongString(text)) => {
                String::from_utf8_lossy(text.as_bytes()).into_owned()
            }
            _ => "unknown".to_owned(),
        };
        let job = String::from_utf8_lossy(&letter.data);
        let (reason, queue) = (text("x-first-death-reason"), text("x-first-death-queue"));
        println!("{job}: {reason}, from {queue}");
    }
    println!("dead letters: {count}");
    Ok(())
}
