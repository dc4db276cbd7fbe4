//! Delayed delivery: a reminder that the broker keeps to itself until its time has come
//!
//! `delay` delivers after a time, `deliver_at` at a time. The reminder is stored at once, and the receipt says so, but
//! consumers of a Shared subscription get it only when it is due. At least once; later ones don't hold up earlier ones.
//!
//! ```console
//! 1$ cargo lab run pulsar_delayed_delivery
//! subscribed; Ctrl-C to stop
//! 2$ cargo lab run pulsar_delayed_delivery send
//! stored: at-5s
//! stored: after-2s
//! stored: at-once
//! 1:
//! at-once: not delayed
//! after-2s: [..] ms after its time
//! at-5s: [..] ms after its time
//! 1^C
//! closed; reminders: 3
//! 2$ cargo lab run pulsar_delayed_delivery exclusive
//! exclusive: after-2s came [..] ms before its time
//! ```
//!
//! Notice: on Exclusive and Failover the delay is ignored, without an error. In a batch, too: this client drops the
//! time from a batched message. The broker looks for due messages once in a tick, a second by default, and delivers up
//! to one tick early: nothing is delayed by less than a second. The example waits for the rest itself. Don't lower the
//! tick by a policy of a topic or namespace: broker 4.2 then forgets messages that are due soon, until others come.
//! Delays of days keep the subscription's storage from being freed for as long.
//!
//! Try: `cargo lab kill pulsar` and `cargo lab restart pulsar` while reminders are pending: none is lost, since they
//! are stored.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650). See also: pulsar_retry_backoff.

use std::pin::pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::InitialPosition;
use pulsar::{Consumer, ConsumerOptions, Pulsar, SubType, TokioExecutor};
use tokio::time::{sleep, timeout};

const TOPIC: &str = "public/default/delayed-reminders";
const SUBSCRIPTION: &str = "delayed-reminders";
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    match std::env::args().nth(1).as_deref() {
        None => consume(&pulsar, &address).await,
        Some("send") => send(&pulsar).await,
        Some("exclusive") => exclusive(&pulsar, &address).await,
        Some(_) => bail!("usage: pulsar_delayed_delivery [send | exclusive]"),
    }
}

/// Each stored before the next is sent: the one that is due last comes first.
async fn send(pulsar: &Pulsar<TokioExecutor>) -> anyhow::Result<()> {
    let topic = format!("persistent://{TOPIC}");
    let mut producer = pulsar.producer().with_topic(topic).build().await?;
    let at = SystemTime::now() + Duration::from_secs(5);
    for name in ["at-5s", "after-2s", "at-once"] {
        let message = producer.create_message().with_content(name);
        let message = match name {
            "at-5s" => message.deliver_at(at)?,
            "after-2s" => message.delay(Duration::from_secs(2))?,
            _ => message,
        };
        let receipt = message.send_non_blocking().await?;
        timeout(PATIENCE, receipt)
            .await
            .context("no receipt; send again")??;
        println!("stored: {name}");
    }
    Ok(producer.close().await?)
}

async fn subscribe(
    pulsar: &Pulsar<TokioExecutor>,
    topic: &str,
    kind: SubType,
) -> anyhow::Result<Consumer<Vec<u8>, TokioExecutor>> {
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(20);
    let builder = pulsar
        .consumer()
        .with_topic(format!("persistent://{topic}"))
        .with_subscription(SUBSCRIPTION)
        .with_subscription_type(kind)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(10)
        .with_options(options);
    Ok(builder.build().await?)
}

async fn consume(pulsar: &Pulsar<TokioExecutor>, address: &str) -> anyhow::Result<()> {
    let mut consumer = subscribe(pulsar, TOPIC, SubType::Shared).await?;
    println!("subscribed; Ctrl-C to stop");
    let mut count = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let message = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            message = consumer.try_next() => message?.with_context(|| format!("lost the connection to {address}"))?,
        };
        let name = String::from_utf8_lossy(&message.payload.data);
        match message.metadata().deliver_at_time {
            Some(due) => {
                // At most a tick: longer delays are the broker's, unless somebody has switched them off there.
                let early = u64::try_from(due.saturating_sub(now()?)).unwrap_or_default();
                tokio::select! {
                    biased;
                    // The close gives it back.
                    signal = &mut stop => break signal?,
                    _ = sleep(Duration::from_millis(early)) => {}
                }
                println!("{name}: {} ms after its time", now()?.saturating_sub(due));
            }
            None => println!("{name}: not delayed"),
        }
        if last_of_batch(&message) {
            consumer.ack(&message).await?;
        }
        count += 1;
    }
    close(consumer).await?;
    println!("closed; reminders: {count}");
    Ok(())
}

/// Milliseconds, as in the messages.
fn now() -> anyhow::Result<i64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(now.as_millis().try_into()?)
}

/// The same on a subscription that knows no delays.
async fn exclusive(pulsar: &Pulsar<TokioExecutor>, address: &str) -> anyhow::Result<()> {
    let topic = format!("{TOPIC}-exclusive");
    let mut consumer = subscribe(pulsar, &topic, SubType::Exclusive).await?;
    let mut producer = pulsar
        .producer()
        .with_topic(format!("persistent://{topic}"))
        .build()
        .await?;
    let message = producer
        .create_message()
        .with_content("after-2s")
        .delay(Duration::from_secs(2))?;
    timeout(PATIENCE, message.send_non_blocking().await?)
        .await
        .context("no receipt")??;
    let message = timeout(PATIENCE, consumer.try_next())
        .await
        .context("nothing came")??;
    let message = message.with_context(|| format!("lost the connection to {address}"))?;
    let due = message
        .metadata()
        .deliver_at_time
        .context("no time in the message")?;
    consumer.ack(&message).await?;
    println!(
        "exclusive: after-2s came {} ms before its time",
        due - now()?
    );
    close(consumer).await
}

/// To the broker a batch is one entry, and the ack of one of its messages is the ack of all: only the last may be
/// acknowledged. A message that came alone is the last.
fn last_of_batch<T>(message: &pulsar::consumer::Message<T>) -> bool {
    let index = message.message_id().batch_index.unwrap_or_default();
    let size = message.message_id.batch_size;
    size.is_none_or(|size| index + 1 >= size)
}

/// Gives back what was fetched ahead: while its queue is full, the client's close waits for the client itself. A batch
/// comes whole, however small the queue is: its rest is taken, and if there is yet another, all is tried again.
async fn close(mut consumer: Consumer<Vec<u8>, TokioExecutor>) -> anyhow::Result<()> {
    let closed = async {
        loop {
            let mut whole = true;
            while let Some(Ok(message)) = match whole {
                true => consumer.next().now_or_never().flatten(),
                false => consumer.next().await,
            } {
                whole = last_of_batch(&message);
            }
            if let Ok(closed) = timeout(PATIENCE / 10, consumer.close()).await {
                return closed;
            }
        }
    };
    timeout(PATIENCE, closed)
        .await
        .context("the last acks may not have arrived: no answer to the close")??;
    Ok(())
}

/// Left alone, the client retries for more than a minute, in silence.
async fn connect(address: &str) -> anyhow::Result<Pulsar<TokioExecutor>> {
    let client = Pulsar::builder(address, TokioExecutor).build();
    let connected = timeout(PATIENCE, client).await;
    Ok(connected.with_context(|| {
        format!("no Pulsar broker answers at {address}; `cargo lab up pulsar` starts one")
    })??)
}
