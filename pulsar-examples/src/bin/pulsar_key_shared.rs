//! Key_Shared: many consumers, and still the orders of each user in their order
//!
//! The broker gives all messages of one key to the same consumer, as long as it is there; several keys share one. At
//! least once, in order per key: when a consumer goes, its keys move to the others, from the first message that it had
//! not acknowledged.
//!
//! ```console
//! 1$ cargo lab run pulsar_key_shared anna
//! anna: subscribed; Ctrl-C to stop
//! 2$ cargo lab run pulsar_key_shared ben
//! ben: subscribed; Ctrl-C to stop
//! 3$ cargo lab run pulsar_key_shared send 40
//! stored: 40 orders of 8 users
//! 1:
//! anna: user-[..] order-[..]
//! ...
//! 2:
//! ben: user-[..] order-[..]
//! ...
//! 1^C
//! ...
//! anna: closed, orders done: [..]
//! 2^C
//! ...
//! ben: closed, orders done: [..]
//! ```
//!
//! Notice: the messages must not be batched. This client batches whatever comes together, of all keys, the broker sees
//! one entry without a key, and the order per key is gone without an error. A Java producer may batch by key; such a
//! batch goes to one consumer as a whole, and is acknowledged after its last message. A message without a key goes
//! anywhere. One that is acknowledged out of turn is passed: the broker keeps the order of deliveries, not that of your
//! tasks.
//!
//! Try: `cargo lab kill pulsar_key_shared.1` in the middle of `send 400`, and look at a single user's orders.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650). See also: pulsar_shared, pulsar_partitioned_topic.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail};
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::InitialPosition;
use pulsar::{Consumer, ConsumerOptions, ProducerOptions, Pulsar, SubType, TokioExecutor};
use tokio::time::{sleep, timeout};

const TOPIC: &str = "persistent://public/default/key-shared-orders";
const SUBSCRIPTION: &str = "key-shared-worker";
const USERS: u32 = 8;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["send", count] => send(&pulsar, count.parse().context("N is the number of orders")?).await,
        [] => consume(&pulsar, &address, "consumer").await,
        [name] => consume(&pulsar, &address, name).await,
        _ => bail!("usage: pulsar_key_shared [NAME] | send N"),
    }
}

async fn send(pulsar: &Pulsar<TokioExecutor>, count: u32) -> anyhow::Result<()> {
    // No batches, see above. Without `block_queue_if_full`, a send fails as soon as a hundred are under way.
    let options = ProducerOptions {
        block_queue_if_full: true,
        ..ProducerOptions::default()
    };
    let mut producer = pulsar
        .producer()
        .with_topic(TOPIC)
        .with_options(options)
        .build()
        .await?;
    let mut receipts = Vec::new();
    for number in 1..=count {
        let order = producer
            .create_message()
            .with_key(format!("user-{}", number % USERS))
            .with_content(format!("order-{number}"));
        receipts.push(order.send_non_blocking().await?);
    }
    for receipt in receipts {
        timeout(PATIENCE, receipt)
            .await
            .context("no receipt; send again")??;
    }
    producer.close().await?;
    println!("stored: {count} orders of {USERS} users");
    Ok(())
}

async fn consume(pulsar: &Pulsar<TokioExecutor>, address: &str, name: &str) -> anyhow::Result<()> {
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(20);
    let mut consumer: Consumer<Vec<u8>, _> = pulsar
        .consumer()
        .with_topic(TOPIC)
        .with_subscription(SUBSCRIPTION)
        .with_subscription_type(SubType::KeyShared)
        .with_consumer_name(name)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(10)
        .with_options(options)
        .build()
        .await?;
    println!("{name}: subscribed; Ctrl-C to stop");

    let mut done = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let message = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            message = consumer.try_next() => message?.with_context(|| format!("lost the connection to {address}"))?,
        };
        sleep(Duration::from_millis(20)).await; // the work
        let user = message.key().unwrap_or_else(|| "nobody".into());
        println!(
            "{name}: {user} {}",
            String::from_utf8_lossy(&message.deserialize())
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
