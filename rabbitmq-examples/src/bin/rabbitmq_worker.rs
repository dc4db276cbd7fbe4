//! Work queue, the workers: tasks are shared out fairly, and a dead worker's task goes to another
//!
//! Each '.' in a task is a second of work. A worker has one task at a time and acknowledges it when the work is done.
//! At least once: the task of a worker that dies goes back to the queue and to the next one that is free.
//!
//! ```console
//! 1$ cargo lab run rabbitmq_worker 3
//! workers waiting: 3; Ctrl-C to stop
//! 2$ cargo lab run rabbitmq_new_task 'resize..' 'mail.' 'report..'
//! ...
//! 1:
//! ...
//! worker [..]: received report..
//! ...
//! worker [..]: done report..
//! ...
//! 1^C
//! ...
//! stopped; tasks done: [..]
//! ```
//!
//! Notice: each worker has a channel of its own with `basic_qos(1)`. Without it the broker pushes the whole queue to
//! whoever connects first, and on a shared channel one slow worker holds what the others could do. A task that is no
//! text, or would take over a minute, is rejected to `work-queue.rejected`; requeued, it would come back at once, for
//! ever.
//!
//! Try: start two of these in two terminals, send some tasks, and `cargo lab kill rabbitmq_worker.1` if the first has
//! the longest, else `.2`. Press Ctrl-C in the middle of a task: it is finished first.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); the argument is the number of workers
//! (1). The queue is a classic one, on a single node. See also: rabbitmq_new_task, rabbitmq_quorum_queue.

use std::num::NonZeroU16;
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
use lapin::{Channel, Connection, ConnectionProperties, Consumer};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

const QUEUE: &str = "work-queue";
const REJECTED: &str = "work-queue.rejected";
const LONGEST: usize = 60;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let count = std::env::args().nth(1).unwrap_or_else(|| "1".into());
    let count: NonZeroU16 = count
        .parse()
        .with_context(|| format!("usage: rabbitmq_worker [NUMBER OF WORKERS], not {count:?}"))?;
    let connection = connect(&addr).await?;
    declare_queues(&connection.create_channel().await?).await?;

    let mut ready = Vec::new();
    for number in 1..=count.get() {
        let channel = connection.create_channel().await?;
        channel.basic_qos(1, BasicQosOptions::default()).await?;
        let (options, no_arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        let deliveries = channel
            .basic_consume(QUEUE.into(), "".into(), options, no_arguments)
            .await?;
        ready.push((number, channel, deliveries));
    }
    println!("workers waiting: {count}; Ctrl-C to stop");
    let stop = CancellationToken::new();
    let mut workers = JoinSet::new();
    for (number, channel, deliveries) in ready {
        workers.spawn(work(number, channel, deliveries, stop.clone()));
    }

    let mut done = 0;
    let mut interrupt = pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            signal = &mut interrupt, if !stop.is_cancelled() => {
                signal?;
                stop.cancel();
            }
            // Before Ctrl-C a worker ends only by an error.
            ended = workers.join_next() => match ended {
                Some(ended) => done += ended??,
                None => break,
            },
        }
    }
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close; what was done last may come back")??;
    println!("stopped; tasks done: {done}");
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties = ConnectionProperties::default().with_connection_name("rabbitmq_worker".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

/// As in rabbitmq_new_task: whichever comes first creates the queues, and differing arguments would be an error.
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

/// Works until told to stop; the number of tasks done.
async fn work(
    number: u16,
    channel: Channel,
    mut deliveries: Consumer,
    stop: CancellationToken,
) -> anyhow::Result<u32> {
    let mut done = 0;
    loop {
        let delivery = tokio::select! {
            () = stop.cancelled() => break,
            delivery = deliveries.next() => delivery
                .context("the broker cancelled the consumer; was the queue deleted?")?
                .context("lost the connection")?,
        };
        // Outside the select: the work is not interrupted.
        done += u32::from(handle(number, &delivery).await?);
    }
    let tag = deliveries.tag();
    let cancel = channel.basic_cancel(tag, BasicCancelOptions::default());
    timeout(PATIENCE, cancel)
        .await
        .context("the broker does not answer the cancel")??;
    // Left to the drop, it would be half closed when the connection is, and that is an error.
    timeout(PATIENCE, channel.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close; what was done last may come back")??;
    Ok(done)
}

/// Does one task and settles it; whether it was one.
async fn handle(number: u16, delivery: &Delivery) -> anyhow::Result<bool> {
    let task = match std::str::from_utf8(&delivery.data) {
        Ok(task) if task.matches('.').count() <= LONGEST => task,
        _ => {
            let options = BasicRejectOptions { requeue: false };
            let rejected = timeout(PATIENCE, delivery.reject(options)).await;
            ensure!(rejected.unwrap_or(Ok(false))?, "lost the connection");
            println!("worker {number}: no task, or too long a one, moved to {REJECTED}");
            return Ok(false);
        }
    };
    let again = if delivery.redelivered {
        " (redelivered)"
    } else {
        ""
    };
    println!("worker {number}: received {task}{again}");
    for _ in task.matches('.') {
        sleep(Duration::from_secs(1)).await; // the work
    }
    // False if the connection went during the work: the broker has given the task to another.
    let ack = delivery.ack(BasicAckOptions::default());
    // Without a limit it may wait for ever: lapin forgets an ack that is under way when the connection is lost.
    let acked = timeout(PATIENCE, ack).await.unwrap_or(Ok(false))?;
    ensure!(acked, "lost the connection; {task:?} is delivered again");
    println!("worker {number}: done {task}");
    Ok(true)
}
