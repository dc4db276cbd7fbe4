//! Partitioned topic: keys choose the partition, and several consumers share the partitions
//!
//! A partitioned topic is several topics under one name. A producer sends all messages of a key to the same partition,
//! where they stay in order; each partition has one active consumer at a time (Failover). At least once, in order per
//! key, as long as the number of partitions stays the same.
//!
//! ```console
//! 1$ cargo lab run pulsar_partitioned_topic anna
//! anna: subscribed to 3 partitions; Ctrl-C to stop
//! 2$ cargo lab run pulsar_partitioned_topic send 6
//! stored: 6 orders of 6 users
//! 1:
//! anna: partition [..]: user-[..] order-[..]
//! anna: partition [..]: user-[..] order-[..]
//! anna: partition [..]: user-[..] order-[..]
//! anna: partition [..]: user-[..] order-[..]
//! anna: partition [..]: user-[..] order-[..]
//! anna: partition [..]: user-[..] order-[..]
//! 1^C
//! anna: closed, orders done: 6
//! ```
//!
//! Notice: by its defaults this client ignores the keys of messages, and deals them out in turn: a routing policy has
//! to be set. Its own hashes in another way than the Java client's default, so that two programs would send one key to
//! two partitions; the policy here chooses as Java does. And a consumer of this client stays with the partitions that
//! were there when it began: when partitions are added, start the consumers anew, before the producers. When the broker
//! stays away, a consumer of several topics is silent: this one asks after a silence, and ends with an error.
//!
//! Try: a second consumer, `ben`: each has some of the partitions. Kill -9 one of them.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650), PULSAR_ADMIN_URL (http://localhost:8080). See also:
//! pulsar_key_shared, which has order per key without partitions; pulsar_failover.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::InitialPosition;
use pulsar::producer::Message;
use pulsar::routing_policy::{CustomRoutingPolicy, RoutingPolicy};
use pulsar::{
    ConnectionRetryOptions, Consumer, ConsumerOptions, ProducerOptions, Pulsar, SubType,
    TokioExecutor,
};
use reqwest::StatusCode;
use tokio::time::{sleep, timeout};

const TOPIC: &str = "public/default/partitioned-orders";
const PARTITIONS: u32 = 3;
const SUBSCRIPTION: &str = "partitioned-worker";
const PATIENCE: Duration = Duration::from_secs(5);
/// For the admin interface.
const ANSWER: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let admin =
        std::env::var("PULSAR_ADMIN_URL").unwrap_or_else(|_| "http://localhost:8080".into());
    create_topic(&admin).await?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["send", count] => send(&pulsar, count.parse().context("N is the number of orders")?).await,
        [] => consume(&pulsar, &address, "consumer").await,
        [name] => consume(&pulsar, &address, name).await,
        _ => bail!("usage: pulsar_partitioned_topic [NAME] | send N"),
    }
}

/// A topic that a producer brings about has no partitions.
async fn create_topic(admin: &str) -> anyhow::Result<()> {
    let url = format!("{admin}/admin/v2/persistent/{TOPIC}/partitions");
    let request = reqwest::Client::new()
        .put(&url)
        .timeout(ANSWER)
        .json(&PARTITIONS);
    let answer = request
        .send()
        .await
        .with_context(|| format!("cannot ask {url}"))?;
    match answer.status() {
        status if status.is_success() => Ok(()),
        StatusCode::CONFLICT => Ok(()), // from an earlier run
        status => bail!("cannot create {TOPIC}: {status}: {}", answer.text().await?),
    }
}

/// As the Java client's default: the hash of Java's strings. Messages without a key are dealt out in turn.
#[derive(Default)]
struct LikeJava {
    next: AtomicUsize,
}

impl CustomRoutingPolicy for LikeJava {
    fn route(&self, message: &Message, partitions: usize) -> usize {
        let Some(key) = &message.partition_key else {
            return self.next.fetch_add(1, Ordering::Relaxed) % partitions;
        };
        let add = |hash: i32, unit: u16| hash.wrapping_mul(31).wrapping_add(unit.into());
        let hash = key.encode_utf16().fold(0, add) & i32::MAX;
        hash.unsigned_abs() as usize % partitions
    }
}

async fn send(pulsar: &Pulsar<TokioExecutor>, count: u32) -> anyhow::Result<()> {
    let options = ProducerOptions {
        routing_policy: Some(RoutingPolicy::Custom(Arc::new(LikeJava::default()))),
        block_queue_if_full: true,
        ..ProducerOptions::default()
    };
    let topic = format!("persistent://{TOPIC}");
    let mut producer = pulsar
        .producer()
        .with_topic(topic)
        .with_options(options)
        .build()
        .await?;
    let mut receipts = Vec::new();
    for number in 1..=count {
        let order = producer
            .create_message()
            .with_key(format!("user-{}", number % 6))
            .with_content(format!("order-{number}"));
        receipts.push(order.send_non_blocking().await?);
    }
    for receipt in receipts {
        timeout(PATIENCE, receipt)
            .await
            .context("no receipt; send again")??;
    }
    producer.close().await?;
    println!("stored: {count} orders of {} users", count.min(6));
    Ok(())
}

async fn consume(pulsar: &Pulsar<TokioExecutor>, address: &str, name: &str) -> anyhow::Result<()> {
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(20);
    let mut consumer: Consumer<Vec<u8>, _> = pulsar
        .consumer()
        .with_topic(format!("persistent://{TOPIC}"))
        .with_subscription(SUBSCRIPTION)
        .with_subscription_type(SubType::Failover)
        .with_consumer_name(name)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(10)
        // A partition whose connection is lost is taken up again after this time. Each time throws away an attempt that
        // is under way, and others would wait for it for ever: longer than all attempts of `connect` together.
        .with_topic_refresh(Duration::from_secs(10))
        .with_options(options)
        .build()
        .await?;
    println!(
        "{name}: subscribed to {} partitions; Ctrl-C to stop",
        consumer.topics().len()
    );

    let mut done = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let message = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            message = timeout(PATIENCE, consumer.try_next()) => match message {
                Ok(message) => message?.with_context(|| format!("lost the connection to {address}"))?,
                Err(_) => {
                    ask(&mut consumer, address).await?;
                    continue;
                }
            },
        };
        sleep(Duration::from_millis(20)).await; // the work
        let partition = message.topic.rsplit('-').next().unwrap_or_default();
        let user = message.key().unwrap_or_else(|| "nobody".into());
        let order = message.deserialize();
        println!(
            "{name}: partition {partition}: {user} {}",
            String::from_utf8_lossy(&order)
        );
        if last_of_batch(&message) {
            consumer.ack(&message).await?;
        }
        done += 1;
    }
    close(consumer).await?;
    println!("{name}: closed, orders done: {done}");
    Ok(())
}

/// Nothing to read, or nobody there? A consumer of several topics never ends its stream.
async fn ask(consumer: &mut Consumer<Vec<u8>, TokioExecutor>, address: &str) -> anyhow::Result<()> {
    let lost = || format!("lost the connection to {address}");
    let answer = timeout(PATIENCE, consumer.check_connection()).await;
    answer.with_context(lost)?.with_context(lost)
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
