//! Dead letters: what fails again and again is put aside, looked at, and sent back
//!
//! With a dead-letter policy the client moves a message that was redelivered too often to another topic, and only then
//! acknowledges it. At least once: a crash between the two makes a second copy. It works on Shared and Key_Shared
//! alone.
//!
//! ```console
//! 1$ cargo lab run pulsar_dead_letter
//! subscribed; Ctrl-C to stop
//! 2$ cargo lab run pulsar_dead_letter send order-1 broken-2 order-3
//! stored: 3 messages
//! 1:
//! ...
//! broken-2: failed, delivery 2
//! ...
//! 3$ cargo lab run pulsar_dead_letter replay
//! replaying; Ctrl-C to stop
//! broken-2, once [..] of persistent://public/default/dead-letter-orders: sent back
//! 3^C
//! closed; sent back: 1
//! 1:
//! ...
//! broken-2: failed, delivery 4
//! 1^C
//! closed; orders done: 2
//! 2$ cargo lab run pulsar_dead_letter exclusive
//! exclusive: delivered 10 times with a policy of 2, and not moved
//! ```
//!
//! Notice: nobody has subscribed to a dead-letter topic when its first message comes, and what is sent to a topic
//! without a subscription is deleted. So the consumer makes that subscription before it begins. The copies carry the
//! origin, REAL_TOPIC and ORIGIN_MESSAGE_ID, but no reason. The count is the broker's, in its memory: it begins anew
//! when the broker restarts or the consumers leave, so the limit is no exact number. A policy of 2 here means two
//! deliveries: the next redelivery is what goes to the dead-letter topic. On Exclusive and Failover the broker counts
//! nothing, and the policy never acts. A batch is counted, given back and moved as a whole: a message that fails takes
//! the good ones with it.
//!
//! Try: restart the broker while a message is on its way: it gets more deliveries than two.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650). See also: pulsar_retry_backoff, with delays, reasons and exact
//! counts; pulsar_negative_ack.

use std::collections::HashMap;
use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail};
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::{DeadLetterPolicy, InitialPosition};
use pulsar::{Consumer, ConsumerOptions, Pulsar, SubType, TokioExecutor};
use tokio::time::{sleep, timeout};

const TOPIC: &str = "persistent://public/default/dead-letter-orders";
const DEAD: &str = "persistent://public/default/dead-letter-orders-DLQ";
const EXCLUSIVE_TOPIC: &str = "persistent://public/default/dead-letter-exclusive";
const SUBSCRIPTION: &str = "dead-letter-worker";
const KEEPER: &str = "dead-letter-keeper";
const REDELIVERIES: usize = 2;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => consume(&pulsar, &address).await,
        ["send", ref messages @ ..] => {
            send(&pulsar, TOPIC, messages).await?;
            println!("stored: {} messages", messages.len());
            Ok(())
        }
        ["replay"] => replay(&pulsar, &address).await,
        ["exclusive"] => exclusive(&pulsar, &address).await,
        _ => bail!("usage: pulsar_dead_letter [send MESSAGE... | replay | exclusive]"),
    }
}

async fn send(
    pulsar: &Pulsar<TokioExecutor>,
    topic: &str,
    messages: &[&str],
) -> anyhow::Result<()> {
    let mut producer = pulsar.producer().with_topic(topic).build().await?;
    for message in messages {
        let receipt = producer.send_non_blocking(*message).await?;
        timeout(PATIENCE, receipt)
            .await
            .context("no receipt; send again")??;
    }
    Ok(producer.close().await?)
}

async fn subscribe(
    pulsar: &Pulsar<TokioExecutor>,
    topic: &str,
    subscription: &str,
    kind: SubType,
) -> anyhow::Result<Consumer<Vec<u8>, TokioExecutor>> {
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(20);
    let builder = pulsar
        .consumer()
        .with_topic(topic)
        .with_subscription(subscription)
        .with_subscription_type(kind)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(10)
        .with_options(options);
    let policy = DeadLetterPolicy {
        max_redeliver_count: REDELIVERIES,
        dead_letter_topic: DEAD.into(),
    };
    let builder = if topic == DEAD {
        builder
    } else {
        builder.with_dead_letter_policy(policy)
    };
    Ok(builder.build().await?)
}

async fn consume(pulsar: &Pulsar<TokioExecutor>, address: &str) -> anyhow::Result<()> {
    // Before anything can be moved there: from now on, the broker keeps dead letters until they are acknowledged.
    close(subscribe(pulsar, DEAD, KEEPER, SubType::Shared).await?).await?;
    let mut consumer = subscribe(pulsar, TOPIC, SUBSCRIPTION, SubType::Shared).await?;
    println!("subscribed; Ctrl-C to stop");
    let mut deliveries: HashMap<Vec<u8>, u32> = HashMap::new();
    let mut done = 0;
    // Whether a message of the batch in hand has failed.
    let mut failed = false;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let message = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            message = consumer.try_next() => message?.with_context(|| format!("lost the connection to {address}"))?,
        };
        let payload = message.deserialize();
        let name = String::from_utf8_lossy(&payload);
        if work(&payload).await {
            done += 1;
            println!("{name}: done");
        } else {
            failed = true;
            let count = deliveries.entry(payload.clone()).or_default();
            *count += 1;
            println!("{name}: failed, delivery {count}");
        }
        if !last_of_batch(&message) {
            continue;
        }
        match std::mem::take(&mut failed) {
            false => consumer.ack(&message).await?,
            true => consumer.nack(&message).await?,
        }
    }
    close(consumer).await?;
    println!("closed; orders done: {done}");
    Ok(())
}

async fn work(payload: &[u8]) -> bool {
    sleep(Duration::from_millis(10)).await;
    payload.starts_with(b"order-")
}

/// Sends dead letters back to where they came from: the copy is stored before the dead letter is acknowledged.
async fn replay(pulsar: &Pulsar<TokioExecutor>, address: &str) -> anyhow::Result<()> {
    let mut dead = subscribe(pulsar, DEAD, KEEPER, SubType::Shared).await?;
    let mut producer = pulsar.producer().with_topic(TOPIC).build().await?;
    println!("replaying; Ctrl-C to stop");
    let mut sent = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let letter = tokio::select! {
            signal = &mut stop => break signal?,
            letter = dead.try_next() => letter?.with_context(|| format!("lost the connection to {address}"))?,
        };
        let metadata = letter.metadata();
        let all = metadata.properties.iter();
        let mut properties: HashMap<String, String> = all
            .map(|property| (property.key.clone(), property.value.clone()))
            .collect();
        // The moving adds the origin only where there is none: left in, it would name the first one for ever.
        let mut take = |name| properties.remove(name).unwrap_or_else(|| "?".into());
        let (origin, topic) = (take("ORIGIN_MESSAGE_ID"), take("REAL_TOPIC"));
        properties.insert("REPLAYED".into(), origin.clone());
        let copy = pulsar::producer::Message {
            payload: letter.payload.data.clone(),
            properties,
            partition_key: metadata.partition_key.clone(),
            partition_key_b64_encoded: metadata.partition_key_b64_encoded,
            ordering_key: metadata.ordering_key.clone(),
            event_time: metadata.event_time,
            ..Default::default()
        };
        let receipt = producer.send_non_blocking(copy).await?;
        timeout(PATIENCE, receipt)
            .await
            .context("no receipt: the dead letter is kept")??;
        if last_of_batch(&letter) {
            dead.ack(&letter).await?;
        }
        sent += 1;
        let name = String::from_utf8_lossy(&letter.payload.data);
        println!("{name}, once {origin} of {topic}: sent back");
    }
    close(dead).await?;
    println!("closed; sent back: {sent}");
    Ok(())
}

/// The same policy where it does nothing.
async fn exclusive(pulsar: &Pulsar<TokioExecutor>, address: &str) -> anyhow::Result<()> {
    let mut consumer = subscribe(pulsar, EXCLUSIVE_TOPIC, SUBSCRIPTION, SubType::Exclusive).await?;
    send(pulsar, EXCLUSIVE_TOPIC, &["broken-1"]).await?;
    for delivery in 1..=10 {
        let message = timeout(PATIENCE, consumer.try_next())
            .await
            .with_context(|| format!("no delivery {delivery}"))??
            .with_context(|| format!("lost the connection to {address}"))?;
        if delivery < 10 {
            consumer.nack(&message).await?;
        } else {
            consumer.ack(&message).await?;
        }
    }
    close(consumer).await?;
    println!("exclusive: delivered 10 times with a policy of {REDELIVERIES}, and not moved");
    Ok(())
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
