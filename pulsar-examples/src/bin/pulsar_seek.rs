//! Seek: set a subscription back and work through the past again
//!
//! A subscription is a position, and `seek` moves it: to a message, to a time, to the beginning. For all its consumers,
//! and for good: what lies after the new position is delivered again, acknowledged or not. At least once, in order.
//!
//! ```console
//! $ cargo lab run pulsar_seek send red green blue
//! [..]:0 red: stored
//! [..]:1 green: stored
//! [..]:2 blue: stored
//! $ cargo lab run pulsar_seek read 3
//! [..]:0 red
//! [..]:1 green
//! [..]:2 blue
//! $ cargo lab run pulsar_seek to earliest
//! the subscription is set back
//! $ cargo lab run pulsar_seek read 2
//! [..]:0 red
//! [..]:1 green
//! $ cargo lab run pulsar_seek ago 3600
//! the subscription is set back
//! 1$ cargo lab run pulsar_seek read
//! [..]:0 red
//! [..]:1 green
//! [..]:2 blue
//! 1^C
//! ```
//!
//! Notice: at a seek the broker throws all consumers of the subscription out. This client then makes a second consumer
//! while its first comes back; with Exclusive they would block each other for ever. The example seeks with a consumer
//! that reads nothing, of type Failover, closes it, and reads with another. Acknowledged messages are only there to
//! come back to if the topic has a retention, which is set here. A time is the broker's or the producer's clock at
//! sending, in milliseconds.
//!
//! Try: `to LEDGER:ENTRY` with a place that was printed: it begins at that message.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650), PULSAR_ADMIN_URL (http://localhost:8080). See also:
//! pulsar_reader, which needs no subscription.

use std::pin::pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::InitialPosition;
use pulsar::message::proto::MessageIdData;
use pulsar::{Consumer, ConsumerOptions, Pulsar, SubType, TokioExecutor};
use serde_json::json;
use tokio::time::timeout;

const TOPIC: &str = "public/default/seek-colours";
const SUBSCRIPTION: &str = "seek-painter";
const PATIENCE: Duration = Duration::from_secs(5);
/// For the admin interface.
const ANSWER: Duration = Duration::from_secs(30);
const USAGE: &str = "usage: pulsar_seek read [COUNT] | to earliest | to LEDGER:ENTRY | ago SECONDS | send COLOUR...";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let admin =
        std::env::var("PULSAR_ADMIN_URL").unwrap_or_else(|_| "http://localhost:8080".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["send", ref colours @ ..] => send(&pulsar, &admin, colours).await,
        [] | ["read"] => read(&pulsar, &address, None).await,
        ["read", count] => read(&pulsar, &address, Some(count.parse().context(USAGE)?)).await,
        // On the wire, this is -1.
        ["to", "earliest"] => seek(&pulsar, Some(id(u64::MAX, u64::MAX)), None).await,
        ["to", place] => {
            let (ledger, entry) = place.split_once(':').context(USAGE)?;
            let place = id(
                ledger.parse().context(USAGE)?,
                entry.parse().context(USAGE)?,
            );
            seek(&pulsar, Some(place), None).await
        }
        ["ago", seconds] => {
            let ago = Duration::from_secs(seconds.parse().context(USAGE)?);
            let since = SystemTime::now()
                .checked_sub(ago)
                .context("so long ago there was no time")?;
            let since = since.duration_since(UNIX_EPOCH)?.as_millis().try_into()?;
            seek(&pulsar, None, Some(since)).await
        }
        _ => bail!(USAGE),
    }
}

fn id(ledger_id: u64, entry_id: u64) -> MessageIdData {
    MessageIdData {
        ledger_id,
        entry_id,
        ..MessageIdData::default()
    }
}

async fn send(pulsar: &Pulsar<TokioExecutor>, admin: &str, colours: &[&str]) -> anyhow::Result<()> {
    let topic = format!("persistent://{TOPIC}");
    let mut producer = pulsar.producer().with_topic(topic).build().await?;
    keep(admin).await?;
    for colour in colours {
        let receipt = producer.send_non_blocking(*colour).await?;
        let receipt = timeout(PATIENCE, receipt)
            .await
            .context("no receipt; send again")??;
        let place = receipt
            .message_id
            .context("a receipt without a message id")?;
        println!("{}:{} {colour}: stored", place.ledger_id, place.entry_id);
    }
    Ok(producer.close().await?)
}

/// A topic that no subscription holds is deleted as it is read; this keeps it. For this topic alone; it has to exist.
async fn keep(admin: &str) -> anyhow::Result<()> {
    let url = format!("{admin}/admin/v2/persistent/{TOPIC}/retention");
    let policy = json!({"retentionTimeInMinutes": -1, "retentionSizeInMB": -1});
    let request = reqwest::Client::new()
        .post(&url)
        .timeout(ANSWER)
        .json(&policy);
    let answer = request
        .send()
        .await
        .with_context(|| format!("cannot ask {url}"))?;
    if !answer.status().is_success() {
        bail!(
            "cannot set the retention: {}: {}",
            answer.status(),
            answer.text().await?
        );
    }
    Ok(())
}

async fn subscribe(
    pulsar: &Pulsar<TokioExecutor>,
) -> anyhow::Result<Consumer<Vec<u8>, TokioExecutor>> {
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(20);
    let builder = pulsar
        .consumer()
        .with_topic(format!("persistent://{TOPIC}"))
        .with_subscription(SUBSCRIPTION)
        .with_subscription_type(SubType::Failover)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(10)
        .with_options(options);
    Ok(builder.build().await?)
}

async fn seek(
    pulsar: &Pulsar<TokioExecutor>,
    to: Option<MessageIdData>,
    since: Option<u64>,
) -> anyhow::Result<()> {
    let mut consumer = subscribe(pulsar).await?;
    timeout(2 * PATIENCE, consumer.seek(None, to, since, pulsar.clone()))
        .await
        .context("no answer to the seek; it may have been done")??;
    close(consumer).await?;
    println!("the subscription is set back");
    Ok(())
}

async fn read(
    pulsar: &Pulsar<TokioExecutor>,
    address: &str,
    count: Option<u32>,
) -> anyhow::Result<()> {
    let mut consumer = subscribe(pulsar).await?;
    let mut stop = pin!(tokio::signal::ctrl_c());
    let mut read = 0;
    while count.is_none_or(|count| read < count) {
        let message = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => { signal?; break }
            message = consumer.try_next() => message?.with_context(|| format!("lost the connection to {address}"))?,
        };
        if last_of_batch(&message) {
            consumer.ack(&message).await?;
        }
        let place = message.message_id();
        let colour = message.deserialize();
        println!(
            "{}:{} {}",
            place.ledger_id,
            place.entry_id,
            String::from_utf8_lossy(&colour)
        );
        read += 1;
    }
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
