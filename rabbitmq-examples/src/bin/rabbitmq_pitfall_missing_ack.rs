//! Pitfall: the forgotten ack, and the requeue that loops, each with its cure
//!
//! `wrong` works through ten tasks and never acknowledges: they pile up as unacknowledged, and all come back when the
//! program ends. `right` acknowledges each after its work. `loop` gives a poison message back with `nack(requeue)`:
//! the broker delivers it again at once, for as long as the machine holds out. `cure` bounds that by a delivery limit.
//!
//! ```console
//! $ cargo lab run rabbitmq_pitfall_missing_ack
//! wrong: tasks done: 10; the broker says: ready 0, unacknowledged 10
//! wrong: after the end of the connection: ready 10, unacknowledged 0; delivered again: 10
//! right: tasks done: 10; the broker says: ready 0, unacknowledged 0
//! right: after the end of the connection: ready 0, unacknowledged 0; delivered again: 0
//! loop: one poison message, given back [..] times in 1 s, and no end
//! cure: one poison message, delivered 4 times, then in pitfall-missing-ack.dead
//! ```
//!
//! Notice: `wrong` works while it is watched. With a prefetch limit it stops after so many messages, without one the
//! broker's memory fills, and after half an hour the broker closes the channel (`consumer_timeout`; from 4.3 on not for
//! classic queues such as this one). Depth alone does not show it: the messages are not ready, they are unacknowledged,
//! so watch both. The usual advice, to `nack` with `requeue` what has failed, is the loop: a failure that does not go
//! away costs a whole core on both sides.
//!
//! Try: `rabbitmq_pitfall_missing_ack loop`, and look at the broker's CPU in the meantime.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"), also for the name and the password of
//! the HTTP API; RABBITMQ_MANAGEMENT_URL (http://localhost:15672); the argument is one of wrong, right, loop, cure. The
//! delivery limit of a quorum queue that sets none is 20, and in 3.x there is none. From 4.3 on `nack` does not count
//! as a failed delivery, and `reject` still does: the cure uses `reject`. See also: rabbitmq_queue_monitor,
//! rabbitmq_quorum_queue, rabbitmq_dead_letter.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicNackOptions, BasicPublishOptions,
    BasicQosOptions, BasicRejectOptions, ConfirmSelectOptions, QueueDeclareOptions,
    QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::uri::AMQPUri;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use serde::Deserialize;
use tokio::time::{sleep, timeout};

const TASKS: &str = "pitfall-missing-ack";
const LIMITED: &str = "pitfall-missing-ack.limited";
const DEAD: &str = "pitfall-missing-ack.dead";
const COUNT: usize = 10;
const DELIVERY_LIMIT: i32 = 3;
const PERSISTENT: u8 = 2;
const PATIENCE: Duration = Duration::from_secs(5);
/// The HTTP API's numbers are up to five seconds old.
const STATISTICS: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let which = std::env::args().nth(1);
    let ways = match which.as_deref() {
        None => vec!["wrong", "right", "loop", "cure"],
        Some(one @ ("wrong" | "right" | "loop" | "cure")) => vec![one],
        Some(_) => bail!("usage: rabbitmq_pitfall_missing_ack [wrong|right|loop|cure]"),
    };
    for way in ways {
        let connection = connect(&addr).await?;
        let channel = connection.create_channel().await?;
        declare_queues(&channel).await?;
        match way {
            "wrong" | "right" => acknowledge(&addr, connection, channel, way).await?,
            "loop" => requeue_for_ever(&channel).await?,
            _ => requeue_with_a_limit(&channel).await?,
        }
    }
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_pitfall_missing_ack".into());
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
    let durable = QueueDeclareOptions::durable();
    for queue in [TASKS, DEAD] {
        channel
            .queue_declare(queue.into(), durable, FieldTable::default())
            .await?;
    }
    let mut limited = FieldTable::default();
    let limit = AMQPValue::LongInt(DELIVERY_LIMIT);
    limited.insert("x-delivery-limit".into(), limit);
    let mut set = |key: &str, value: &str| {
        limited.insert(key.into(), AMQPValue::LongString(value.into()));
    };
    set("x-queue-type", "quorum"); // classic queues do not count deliveries
    set("x-dead-letter-exchange", "");
    set("x-dead-letter-routing-key", DEAD);
    channel
        .queue_declare(LIMITED.into(), durable, limited)
        .await?;
    for queue in [TASKS, LIMITED, DEAD] {
        let purge = QueuePurgeOptions::default();
        channel.queue_purge(queue.into(), purge).await?;
    }
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await
}

async fn acknowledge(
    addr: &str,
    connection: Connection,
    channel: Channel,
    way: &str,
) -> anyhow::Result<()> {
    for number in 1..=COUNT {
        publish(&channel, TASKS, &format!("task-{number}")).await?;
    }
    let mut tasks = consume(&channel, TASKS).await?;
    for _ in 0..COUNT {
        let task = next(&mut tasks).await?;
        if way == "right" {
            task.ack(BasicAckOptions::default()).await?;
        }
    }
    let held = if way == "wrong" { COUNT as u64 } else { 0 };
    let depth = await_depth(addr, [0, held]).await?;
    println!("{way}: tasks done: {COUNT}; the broker says: {depth}");

    // What a crash would do, too.
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close")??;
    let depth = await_depth(addr, [held, 0]).await?;
    let connection = connect(addr).await?;
    let channel = connection.create_channel().await?;
    let mut again = 0;
    let options = BasicGetOptions::default();
    while let Some(task) = channel.basic_get(TASKS.into(), options).await? {
        again += usize::from(task.redelivered);
        task.ack(BasicAckOptions::default()).await?;
    }
    println!("{way}: after the end of the connection: {depth}; delivered again: {again}");
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close")??;
    Ok(())
}

async fn requeue_for_ever(channel: &Channel) -> anyhow::Result<()> {
    publish(channel, TASKS, "poison").await?;
    let mut tasks = consume(channel, TASKS).await?;
    let started = Instant::now();
    let mut times = 0;
    while started.elapsed() < Duration::from_secs(1) {
        let task = next(&mut tasks).await?;
        let options = BasicNackOptions {
            requeue: true,
            ..BasicNackOptions::default()
        };
        task.nack(options).await?;
        times += 1;
    }
    // The end, here: it is taken out.
    next(&mut tasks)
        .await?
        .ack(BasicAckOptions::default())
        .await?;
    println!("loop: one poison message, given back {times} times in 1 s, and no end");
    Ok(channel.close(200, "OK".into()).await?)
}

async fn requeue_with_a_limit(channel: &Channel) -> anyhow::Result<()> {
    publish(channel, LIMITED, "poison").await?;
    let mut tasks = consume(channel, LIMITED).await?;
    let mut dead = consume(channel, DEAD).await?;
    let mut times = 0;
    loop {
        tokio::select! {
            task = next(&mut tasks) => {
                task?.reject(BasicRejectOptions { requeue: true }).await?;
                times += 1;
            }
            letter = next(&mut dead) => {
                letter?.ack(BasicAckOptions::default()).await?;
                break;
            }
        }
    }
    println!("cure: one poison message, delivered {times} times, then in {DEAD}");
    Ok(channel.close(200, "OK".into()).await?)
}

async fn consume(channel: &Channel, queue: &str) -> lapin::Result<Consumer> {
    channel.basic_qos(100, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    channel
        .basic_consume(queue.into(), "".into(), options, FieldTable::default())
        .await
}

async fn next(tasks: &mut Consumer) -> anyhow::Result<lapin::message::Delivery> {
    let task = timeout(PATIENCE * 4, tasks.next()).await;
    Ok(task
        .context("no task comes")?
        .context("the consumer was cancelled")??)
}

async fn publish(channel: &Channel, queue: &str, body: &str) -> anyhow::Result<()> {
    let properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let publish = channel.basic_publish(
        "".into(),
        queue.into(),
        options,
        body.as_bytes(),
        properties,
    );
    let confirmation = timeout(PATIENCE, async { publish.await?.await }).await;
    let confirmation = confirmation.context("no confirm in time")??;
    ensure!(
        confirmation.is_ack() && confirmation.take_message().is_none(),
        "{queue} did not take the message"
    );
    Ok(())
}

/// From the HTTP API: over AMQP a client only sees what is ready.
#[derive(Deserialize)]
struct Depth {
    /// Missing for as long as there are no statistics.
    messages_ready: Option<u64>,
    messages_unacknowledged: Option<u64>,
}

/// Asks until the statistics have caught up with what is so.
async fn await_depth(addr: &str, expected: [u64; 2]) -> anyhow::Result<String> {
    let uri: AMQPUri = addr.parse().map_err(anyhow::Error::msg)?;
    let base = std::env::var("RABBITMQ_MANAGEMENT_URL");
    let mut url = reqwest::Url::parse(&base.unwrap_or_else(|_| "http://localhost:15672".into()))
        .context("RABBITMQ_MANAGEMENT_URL is no URL")?;
    // Segments are escaped: the virtual host "/" becomes %2F.
    let segments = ["api", "queues", &uri.vhost, TASKS];
    url.path_segments_mut()
        .map_err(|()| anyhow::anyhow!("RABBITMQ_MANAGEMENT_URL is no http:// address"))?
        .pop_if_empty()
        .extend(segments);
    let client = reqwest::Client::builder().timeout(PATIENCE).build()?;
    let user = &uri.authority.userinfo;
    let asking = async {
        loop {
            let request = client.get(url.clone());
            let request = request.basic_auth(&user.username, Some(&user.password));
            let answer = request
                .send()
                .await
                .and_then(|answer| answer.error_for_status());
            let answer = answer.with_context(|| format!("the HTTP API at {url} refuses"))?;
            let depth: Depth = answer.json().await?;
            let depth = [depth.messages_ready, depth.messages_unacknowledged]
                .map(|n| n.unwrap_or(u64::MAX));
            if depth == expected {
                let [ready, unacked] = depth;
                return anyhow::Ok(format!("ready {ready}, unacknowledged {unacked}"));
            }
            sleep(Duration::from_millis(200)).await;
        }
    };
    timeout(STATISTICS, asking)
        .await
        .with_context(|| format!("the broker's statistics never say {expected:?}"))?
}
