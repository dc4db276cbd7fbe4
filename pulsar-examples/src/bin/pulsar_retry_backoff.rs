//! Retry with backoff: failed orders wait in a retry topic, and the hopeless ones end as dead letters with their cause
//!
//! An order that fails is copied to a retry topic, to be delivered after 100 ms, 200 ms, 400 ms and so on, each a
//! little longer by chance; after five attempts it goes to a dead-letter topic. The original is acknowledged only when
//! the copy is stored: at least once, and a crash in between makes a second copy. Other orders flow meanwhile.
//!
//! ```console
//! 1$ cargo lab run pulsar_retry_backoff
//! subscribed; Ctrl-C to stop
//! 2$ cargo lab run pulsar_retry_backoff send order-1 flaky-2 broken-3
//! stored: 3 messages
//! 1:
//! order-1: done at attempt 1
//! flaky-2: attempt 1 failed, again in 1[..] ms: the bank does not answer
//! ...
//! broken-3: attempt 5 failed, now a dead letter: no such account
//! 1^C
//! closed; done 2, retried 6, dead 1
//! 2$ cargo lab run pulsar_retry_backoff dead
//! dead letters; Ctrl-C to stop
//! broken-3: no such account, after 5 attempts, once [..] of persistent://public/default/retry-orders
//! 2^C
//! ```
//!
//! Notice: the client has a dead-letter policy, but nothing for retries: this file is what they take. The count of
//! attempts travels in the properties, so it survives what the broker's own count of redeliveries does not: restarts.
//! The names are those of the Java client, RECONSUMETIMES for one. The broker delivers a delayed message up to a second
//! before its time: left to it, the first three retries would not wait at all. So the worker waits for the rest.
//!
//! Try: `cargo lab kill pulsar_retry_backoff` in the middle of many flaky orders: each is done in the end, some twice.
//! `cargo lab kill pulsar` and `cargo lab restart pulsar`: what waits is stored. The worker ends with an error when the
//! broker stays away; start it again.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650). See also: pulsar_dead_letter, pulsar_delayed_delivery.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::pin::pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::{InitialPosition, Message};
use pulsar::{
    ConnectionRetryOptions, Consumer, ConsumerOptions, Producer, Pulsar, SubType, TokioExecutor,
};
use tokio::time::{sleep, timeout};

const TOPIC: &str = "persistent://public/default/retry-orders";
const RETRY: &str = "persistent://public/default/retry-orders-retry-worker-RETRY";
const DEAD: &str = "persistent://public/default/retry-orders-retry-worker-DLQ";
const SUBSCRIPTION: &str = "retry-worker";
const KEEPER: &str = "retry-keeper";
const ATTEMPTS: u32 = 5;
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => consume(&pulsar, &address).await,
        ["send", ref messages @ ..] => send(&pulsar, messages).await,
        ["dead"] => dead_letters(&pulsar, &address).await,
        _ => bail!("usage: pulsar_retry_backoff [send MESSAGE... | dead]"),
    }
}

async fn send(pulsar: &Pulsar<TokioExecutor>, messages: &[&str]) -> anyhow::Result<()> {
    let mut producer = pulsar.producer().with_topic(TOPIC).build().await?;
    for message in messages {
        let receipt = producer.send_non_blocking(*message).await?;
        timeout(PATIENCE, receipt)
            .await
            .context("no receipt; send again")??;
    }
    producer.close().await?;
    println!("stored: {} messages", messages.len());
    Ok(())
}

async fn subscribe(
    pulsar: &Pulsar<TokioExecutor>,
    topics: &[&str],
    subscription: &str,
) -> anyhow::Result<Consumer<Vec<u8>, TokioExecutor>> {
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(20);
    let builder = pulsar
        .consumer()
        .with_topics(topics)
        .with_subscription(subscription)
        // Only Shared and Key_Shared know delays.
        .with_subscription_type(SubType::Shared)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(10)
        // A topic whose connection is lost is taken up again after this time. Each time throws away an attempt that is
        // under way, and others would wait for it for ever: longer than all attempts of `connect` together.
        .with_topic_refresh(Duration::from_secs(10))
        .with_options(options);
    Ok(builder.build().await?)
}

struct Worker {
    consumer: Consumer<Vec<u8>, TokioExecutor>,
    retry: Producer<TokioExecutor>,
    dead: Producer<TokioExecutor>,
}

async fn consume(pulsar: &Pulsar<TokioExecutor>, address: &str) -> anyhow::Result<()> {
    // Before anything can be moved there: a topic without a subscription keeps nothing.
    close(subscribe(pulsar, &[DEAD], KEEPER).await?).await?;
    let mut worker = Worker {
        consumer: subscribe(pulsar, &[TOPIC, RETRY], SUBSCRIPTION).await?,
        retry: pulsar.producer().with_topic(RETRY).build().await?,
        dead: pulsar.producer().with_topic(DEAD).build().await?,
    };
    println!("subscribed; Ctrl-C to stop");
    let mut waiting = FuturesUnordered::new();
    let (mut done, mut retried, mut dead) = (0, 0, 0);
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let message = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            Some(message) = waiting.next() => message,
            message = timeout(PATIENCE, worker.consumer.try_next()) => match message {
                Ok(message) => message?.with_context(|| format!("lost the connection to {address}"))?,
                Err(_) => {
                    ask(&mut worker.consumer, address).await?;
                    continue;
                }
            },
        };
        let early = early(&message)?;
        if !early.is_zero() {
            // Other orders flow meanwhile. Not acknowledged: should this program end, it is delivered again.
            waiting.push(async move {
                sleep(early).await;
                message
            });
            continue;
        }
        match worker.handle(&message).await? {
            Outcome::Done => done += 1,
            Outcome::Retried => retried += 1,
            Outcome::Dead => dead += 1,
        }
    }
    close(worker.consumer).await?;
    println!("closed; done {done}, retried {retried}, dead {dead}");
    Ok(())
}

/// Nothing to read, or nobody there? A consumer of several topics never ends its stream.
async fn ask(consumer: &mut Consumer<Vec<u8>, TokioExecutor>, address: &str) -> anyhow::Result<()> {
    let lost = || format!("lost the connection to {address}");
    let answer = timeout(PATIENCE, consumer.check_connection()).await;
    answer.with_context(lost)?.with_context(lost)
}

enum Outcome {
    Done,
    Retried,
    Dead,
}

impl Worker {
    async fn handle(&mut self, message: &Message<Vec<u8>>) -> anyhow::Result<Outcome> {
        let name = String::from_utf8_lossy(&message.payload.data);
        // Not a number: somebody else's property. The first attempt, then.
        let before: u32 = property(message, "RECONSUMETIMES")
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        let attempt = before.saturating_add(1);
        let outcome = match work(&name, attempt).await {
            Ok(()) => {
                println!("{name}: done at attempt {attempt}");
                Outcome::Done
            }
            Err(cause) if attempt < ATTEMPTS => {
                let delay = delay(before);
                pass_on(&mut self.retry, message, attempt, cause, Some(delay)).await?;
                println!(
                    "{name}: attempt {attempt} failed, again in {} ms: {cause}",
                    delay.as_millis()
                );
                Outcome::Retried
            }
            Err(cause) => {
                pass_on(&mut self.dead, message, attempt, cause, None).await?;
                println!("{name}: attempt {attempt} failed, now a dead letter: {cause}");
                Outcome::Dead
            }
        };
        // Done, or in safe hands.
        if last_of_batch(message) {
            self.consumer.ack(message).await?;
        }
        Ok(outcome)
    }
}

async fn work(name: &str, attempt: u32) -> Result<(), &'static str> {
    sleep(Duration::from_millis(10)).await;
    match name.split('-').next() {
        Some("order") => Ok(()),
        Some("flaky") if attempt > 2 => Ok(()),
        Some("flaky") => Err("the bank does not answer"),
        Some("broken") => Err("no such account"),
        _ => Err("not an order"),
    }
}

/// Doubled with each attempt. Up to a fifth is added, by chance: all that failed together would come back together.
fn delay(before: u32) -> Duration {
    let delay = FIRST_DELAY
        .saturating_mul(2_u32.saturating_pow(before))
        .min(LONGEST_DELAY);
    let percent = RandomState::new().hash_one(before) % 21;
    delay.mul_f64(1.0 + percent as f64 / 100.0)
}

/// Returns when the broker has stored the copy.
async fn pass_on(
    producer: &mut Producer<TokioExecutor>,
    message: &Message<Vec<u8>>,
    attempt: u32,
    cause: &str,
    delay: Option<Duration>,
) -> anyhow::Result<()> {
    let id = message.message_id();
    let mut properties: HashMap<String, String> = HashMap::new();
    for property in &message.metadata().properties {
        properties.insert(property.key.clone(), property.value.clone());
    }
    // The first origin stays, over all retries.
    properties
        .entry("REAL_TOPIC".into())
        .or_insert_with(|| message.topic.clone());
    properties
        .entry("ORIGIN_MESSAGE_ID".into())
        .or_insert_with(|| format!("{}:{}", id.ledger_id, id.entry_id));
    properties.insert("RECONSUMETIMES".into(), attempt.to_string());
    properties.insert("CAUSE".into(), cause.into());
    let due = delay.map(|delay| (SystemTime::now() + delay).duration_since(UNIX_EPOCH));
    let due = due.transpose()?.map(|due| due.as_millis().try_into());
    let copy = pulsar::producer::Message {
        payload: message.payload.data.clone(),
        partition_key: message.metadata().partition_key.clone(),
        partition_key_b64_encoded: message.metadata().partition_key_b64_encoded,
        ordering_key: message.metadata().ordering_key.clone(),
        event_time: message.metadata().event_time,
        properties,
        deliver_at_time: due.transpose()?,
        ..Default::default()
    };
    let receipt = producer.send_non_blocking(copy).await?;
    timeout(PATIENCE, receipt)
        .await
        .context("no receipt for the copy; the original is kept")??;
    Ok(())
}

fn property<'a>(message: &'a Message<Vec<u8>>, name: &str) -> Option<&'a str> {
    let mut all = message.metadata().properties.iter();
    all.find(|property| property.key == name)
        .map(|property| property.value.as_str())
}

/// How long the broker has delivered it before its time.
fn early(message: &Message<Vec<u8>>) -> anyhow::Result<Duration> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    let due = message.metadata().deliver_at_time.unwrap_or_default();
    let early = u128::try_from(due).unwrap_or_default().saturating_sub(now);
    Ok(Duration::from_millis(early.try_into()?))
}

/// Shows what has been given up, and takes it away.
async fn dead_letters(pulsar: &Pulsar<TokioExecutor>, address: &str) -> anyhow::Result<()> {
    let mut consumer = subscribe(pulsar, &[DEAD], KEEPER).await?;
    println!("dead letters; Ctrl-C to stop");
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let message = tokio::select! {
            signal = &mut stop => break signal?,
            message = consumer.try_next() => message?.with_context(|| format!("lost the connection to {address}"))?,
        };
        let name = String::from_utf8_lossy(&message.payload.data);
        let known = |name| property(&message, name).unwrap_or("unknown");
        let (cause, attempts) = (known("CAUSE"), known("RECONSUMETIMES"));
        let (origin, topic) = (known("ORIGIN_MESSAGE_ID"), known("REAL_TOPIC"));
        println!("{name}: {cause}, after {attempts} attempts, once {origin} of {topic}");
        if last_of_batch(&message) {
            consumer.ack(&message).await?;
        }
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
    let connections = ConnectionRetryOptions {
        max_retries: 2,
        connection_timeout: Duration::from_secs(2),
        ..ConnectionRetryOptions::default()
    };
    let client = Pulsar::builder(address, TokioExecutor)
        .with_connection_retry_options(connections)
        .build();
    timeout(PATIENCE, client)
        .await
        .context("the connection takes too long")
        .and_then(|connected| Ok(connected?))
        .with_context(|| {
            format!("no Pulsar broker answers at {address}; `cargo lab up pulsar` starts one")
        })
}
