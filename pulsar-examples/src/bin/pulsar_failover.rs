//! Failover: one consumer works, the others stand by, and the order of all orders is kept
//!
//! The broker gives a topic to one consumer of the subscription: the one with the best priority. When it goes, the next
//! takes over, from the first order that was not acknowledged. At least once, in order. A batch is acknowledged after
//! its last order, so a takeover in the middle of one begins at its first.
//!
//! ```console
//! 1$ cargo lab run pulsar_failover main 0
//! main: subscribed with priority 0; Ctrl-C to stop
//! 2$ cargo lab run pulsar_failover standby 1
//! standby: subscribed with priority 1; Ctrl-C to stop
//! 3$ cargo lab run pulsar_failover send 3
//! stored: 3 orders
//! 1:
//! main: order-1
//! main: order-2
//! main: order-3
//! 1^C
//! main: closed, orders done: 3
//! 3$ cargo lab run pulsar_failover send 2
//! stored: 2 orders
//! 2:
//! standby: order-1
//! standby: order-2
//! 2^C
//! standby: closed, orders done: 2
//! ```
//!
//! Notice: the priority is a number where less is more. Between equals the broker decides by a hash of the names, so a
//! consumer that joins may take over from one that works, and what that one has in hand is done twice. On a topic with
//! partitions each partition has its own active consumer. As with Exclusive, a negative ack brings back all that is not
//! acknowledged, and a dead-letter policy never fires.
//!
//! Try: `cargo lab kill pulsar_failover.1`, the active one, in the middle of `send 100`. Start `main 0` again: it takes
//! over from the stand-in.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650). See also: pulsar_exclusive, pulsar_key_shared.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail};
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::InitialPosition;
use pulsar::{Consumer, ConsumerOptions, ProducerOptions, Pulsar, SubType, TokioExecutor};
use tokio::time::{sleep, timeout};

const TOPIC: &str = "persistent://public/default/failover-orders";
const SUBSCRIPTION: &str = "failover-worker";
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["send", count] => send(&pulsar, count.parse().context("N is the number of orders")?).await,
        [] => consume(&pulsar, &address, "consumer", 0).await,
        [name] => consume(&pulsar, &address, name, 0).await,
        [name, priority] => {
            let priority = priority.parse().context("PRIORITY is a number from 0")?;
            consume(&pulsar, &address, name, priority).await
        }
        _ => bail!("usage: pulsar_failover [NAME [PRIORITY]] | send N"),
    }
}

async fn send(pulsar: &Pulsar<TokioExecutor>, count: u32) -> anyhow::Result<()> {
    // Without it, a send fails as soon as a hundred are under way.
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
        receipts.push(
            producer
                .send_non_blocking(format!("order-{number}"))
                .await?,
        );
    }
    for receipt in receipts {
        timeout(PATIENCE, receipt)
            .await
            .context("no receipt; send again")??;
    }
    producer.close().await?;
    println!("stored: {count} orders");
    Ok(())
}

async fn consume(
    pulsar: &Pulsar<TokioExecutor>,
    address: &str,
    name: &str,
    priority: u8,
) -> anyhow::Result<()> {
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_priority_level(priority.into())
        .with_receiver_queue_size(20);
    let mut consumer: Consumer<Vec<u8>, _> = pulsar
        .consumer()
        .with_topic(TOPIC)
        .with_subscription(SUBSCRIPTION)
        .with_subscription_type(SubType::Failover)
        .with_consumer_name(name)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(10)
        .with_options(options)
        .build()
        .await?;
    println!("{name}: subscribed with priority {priority}; Ctrl-C to stop");

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
        println!(
            "{name}: {}",
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
