//! Graceful shutdown: stop taking, finish what is in hand, give back the rest, close
//!
//! On Ctrl-C, or SIGTERM as service managers and Kubernetes send it. The tasks that have begun get GRACE_SECONDS to end
//! and are acknowledged; those that were prefetched and not begun go back to the queue at once, for another worker. At
//! least once: what does not end in time goes back as well, and is done again.
//!
//! ```console
//! 1$ cargo lab run rabbitmq_graceful_shutdown send 6
//! sent: 6
//! 2$ TASK_SECONDS=6 cargo lab run rabbitmq_graceful_shutdown
//! working on 2 at a time; Ctrl-C or SIGTERM to stop
//! task-[..]: begun
//! task-[..]: begun
//! 2^C
//! stopping: no more tasks; in hand 2, given back 2
//! ...
//! stopped; done 2, given back 2, cut short 0
//! ```
//!
//! Notice: the order counts. First cancel the consumer, or the broker sends a new task for each that is acknowledged.
//! Then give back what has not begun: the prefetched ones would wait for the slowest task in hand, and then be done by
//! nobody. Acknowledge on the channel that the tasks came from, and close it last: closing takes back all that is not
//! acknowledged. Closing answers when the broker has dealt with all before it, the acks too.
//!
//! Try: send SIGTERM; set GRACE_SECONDS=1, and see what is cut short come back. A second Ctrl-C ends it at once.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); GRACE_SECONDS (20), to be shorter than
//! what your service manager allows; TASK_SECONDS (2), the work; the arguments `send N` send tasks. A quorum queue
//! counts what comes back as failed deliveries, after a close and after a `nack`, and has a limit (20 by default); from
//! 4.3 on, a `nack` does not count. See also: rabbitmq_worker.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions,
    BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

const QUEUE: &str = "graceful-shutdown";
const AT_A_TIME: usize = 2;
/// More than are worked on, so that a free hand need not wait for the broker.
const PREFETCH: u16 = 4;
const PERSISTENT: u8 = 2;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let count: Option<u32> = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => None,
        ["send", count] => Some(count.parse().context("N is the number of tasks")?),
        _ => bail!("usage: rabbitmq_graceful_shutdown [send N]"),
    };
    let connection = connect(&addr).await?;
    let channel = connection.create_channel().await?;
    let durable = QueueDeclareOptions::durable();
    channel
        .queue_declare(QUEUE.into(), durable, FieldTable::default())
        .await?;
    match count {
        Some(count) => send(&channel, count).await?,
        None => work(&channel).await?,
    }
    // Takes back what is not acknowledged.
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close; what was done may come back")??;
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_graceful_shutdown".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

fn seconds(name: &str, default: u64) -> anyhow::Result<Duration> {
    let seconds = match std::env::var(name) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{name} is a number of seconds"))?,
        Err(_) => default,
    };
    Ok(Duration::from_secs(seconds))
}

async fn work(channel: &Channel) -> anyhow::Result<()> {
    let (grace, work) = (seconds("GRACE_SECONDS", 20)?, seconds("TASK_SECONDS", 2)?);
    // Registered before the first task is taken, so that no signal is missed.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    let options = BasicConsumeOptions::default();
    let mut deliveries = channel
        .basic_consume(QUEUE.into(), "".into(), options, FieldTable::default())
        .await?;
    println!("working on {AT_A_TIME} at a time; Ctrl-C or SIGTERM to stop");

    let mut done = 0;
    let mut in_hand = JoinSet::new();
    loop {
        tokio::select! {
            // The order of the branches counts: with a signal there, nothing more is begun.
            biased;
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            Some(ended) = in_hand.join_next() => {
                ended??;
                done += 1;
            }
            delivery = deliveries.next(), if in_hand.len() < AT_A_TIME => {
                let delivery = delivery
                    .context("the broker cancelled the consumer; was the queue deleted?")?
                    .context("lost the connection")?;
                in_hand.spawn(handle(delivery, work));
            }
        }
    }

    let mut given_back = 0;
    // All of it has to end in time: a broker that is there and silent does not even answer the cancel.
    let finish = async {
        channel
            .basic_cancel(deliveries.tag(), BasicCancelOptions::default())
            .await?;
        // After the cancel, the stream ends behind what had been prefetched.
        while let Some(delivery) = deliveries.next().await {
            let options = BasicNackOptions {
                requeue: true,
                ..BasicNackOptions::default()
            };
            let delivery = delivery?;
            let returned = timeout(PATIENCE, delivery.nack(options)).await;
            ensure!(returned.unwrap_or(Ok(false))?, "lost the connection");
            given_back += 1;
        }
        println!(
            "stopping: no more tasks; in hand {}, given back {given_back}",
            in_hand.len()
        );
        while let Some(ended) = in_hand.join_next().await {
            ended??;
            done += 1;
        }
        anyhow::Ok(())
    };
    let finished = tokio::select! {
        finished = timeout(grace, finish) => finished,
        _ = interrupt.recv() => Ok(Ok(())),
        _ = terminate.recv() => Ok(Ok(())),
    };
    if let Ok(ended) = finished {
        ended?;
    }
    // Those that have ended meanwhile.
    while let Some(ended) = in_hand.try_join_next() {
        ended??;
        done += 1;
    }
    // Not acknowledged, so the close gives them back. Nothing of them may go on meanwhile.
    let cut_short = in_hand.len();
    in_hand.shutdown().await;
    println!("stopped; done {done}, given back {given_back}, cut short {cut_short}");
    Ok(())
}

async fn handle(delivery: Delivery, work: Duration) -> anyhow::Result<()> {
    let task = String::from_utf8_lossy(&delivery.data);
    println!("{task}: begun");
    sleep(work).await; // the work
    let ack = delivery.ack(BasicAckOptions::default());
    // Without a limit it may wait for ever: lapin forgets an ack that is under way when the connection is lost.
    let acked = timeout(PATIENCE, ack).await.unwrap_or(Ok(false))?;
    ensure!(acked, "lost the connection; {task} is delivered again");
    println!("{task}: done");
    Ok(())
}

async fn send(channel: &Channel, count: u32) -> anyhow::Result<()> {
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    for number in 1..=count {
        let options = BasicPublishOptions {
            mandatory: true,
            ..BasicPublishOptions::default()
        };
        let body = format!("task-{number}");
        let properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
        let publish = channel.basic_publish(
            "".into(),
            QUEUE.into(),
            options,
            body.as_bytes(),
            properties,
        );
        let confirmation = timeout(PATIENCE, async { publish.await?.await }).await;
        let confirmation = confirmation.context("no confirm in time")??;
        let taken = confirmation.is_ack() && confirmation.take_message().is_none();
        ensure!(taken, "{body} was not taken");
    }
    println!("sent: {count}");
    Ok(())
}
