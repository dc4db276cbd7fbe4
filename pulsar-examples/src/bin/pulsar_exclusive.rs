//! Exclusive: one consumer at a time, all orders in their order, and no second one
//!
//! The broker refuses a second consumer of the subscription. At least once, in order: when the holder goes, whoever
//! comes next gets what it had not acknowledged, and then the rest.
//!
//! ```console
//! 1$ cargo lab run pulsar_exclusive first
//! first: subscribed; Ctrl-C to stop
//! 2$ cargo lab run pulsar_exclusive send 2
//! stored: 2 orders
//! 1:
//! first: order-1
//! first: order-2
//! 2$ cargo lab run pulsar_exclusive second
//! [exit 1]
//! 2$ cargo lab run pulsar_exclusive third wait
//! third: waiting, another consumer has the subscription
//! 1^C
//! first: closed
//! 2:
//! third: subscribed; Ctrl-C to stop
//! 3$ cargo lab run pulsar_exclusive send 2
//! stored: 2 orders
//! 2:
//! third: order-1
//! third: order-2
//! 2^C
//! third: closed
//! ```
//!
//! Notice: by its defaults, this client tries for ever, every five seconds and without a word, to get a subscription
//! that another has: the second program would just stand there. `max_retries` of the operations makes the refusal an
//! error. `wait` tries again by itself and says so. A negative ack is not for one message here: the broker delivers
//! everything again from the first that is not acknowledged, and never counts, so no dead-letter policy ever fires.
//!
//! Try: `cargo lab kill pulsar_exclusive.1`, the holder, in the middle of `send 100`: the waiting one goes on, with the
//! order that was in hand.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650). See also: pulsar_failover, whose stand-ins take over at once.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail};
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::InitialPosition;
use pulsar::error::{ConnectionError, ConsumerError};
use pulsar::message::proto::ServerError;
use pulsar::{
    Consumer, ConsumerOptions, Error, OperationRetryOptions, ProducerOptions, Pulsar, SubType,
    TokioExecutor,
};
use tokio::time::{sleep, timeout};

const TOPIC: &str = "persistent://public/default/exclusive-orders";
const SUBSCRIPTION: &str = "exclusive-worker";
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["send", count] => send(&pulsar, count.parse().context("N is the number of orders")?).await,
        [] => consume(&pulsar, &address, "consumer", false).await,
        [name] => consume(&pulsar, &address, name, false).await,
        [name, "wait"] => consume(&pulsar, &address, name, true).await,
        _ => bail!("usage: pulsar_exclusive [NAME [wait]] | send N"),
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
    wait: bool,
) -> anyhow::Result<()> {
    let mut stop = pin!(tokio::signal::ctrl_c());
    let mut said = false;
    let mut consumer = loop {
        match subscribe(pulsar, name).await {
            Ok(consumer) => break consumer,
            Err(error) if !taken(&error) => return Err(error.into()),
            Err(_) if !wait => bail!("another consumer has the subscription {SUBSCRIPTION}"),
            Err(_) if !said => println!("{name}: waiting, another consumer has the subscription"),
            Err(_) => {}
        }
        said = true;
        tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => return Ok(signal?),
            _ = sleep(Duration::from_millis(500)) => {}
        }
    };
    println!("{name}: subscribed; Ctrl-C to stop");
    loop {
        let message = tokio::select! {
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
    }
    close(consumer).await?;
    println!("{name}: closed");
    Ok(())
}

async fn subscribe(
    pulsar: &Pulsar<TokioExecutor>,
    name: &str,
) -> Result<Consumer<Vec<u8>, TokioExecutor>, Error> {
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(20);
    pulsar
        .consumer()
        .with_topic(TOPIC)
        .with_subscription(SUBSCRIPTION)
        .with_subscription_type(SubType::Exclusive)
        .with_consumer_name(name)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(10)
        .with_options(options)
        .build()
        .await
}

fn taken(error: &Error) -> bool {
    let busy = Some(ServerError::ConsumerBusy);
    match error {
        Error::Connection(ConnectionError::PulsarError(kind, _))
        | Error::Consumer(ConsumerError::Connection(ConnectionError::PulsarError(kind, _))) => {
            *kind == busy
        }
        _ => false,
    }
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

/// Left alone, the client retries for more than a minute to connect, and for ever to subscribe, both in silence.
async fn connect(address: &str) -> anyhow::Result<Pulsar<TokioExecutor>> {
    let once = OperationRetryOptions {
        max_retries: Some(0),
        ..OperationRetryOptions::default()
    };
    let client = Pulsar::builder(address, TokioExecutor)
        .with_operation_retry_options(once)
        .build();
    let connected = timeout(PATIENCE, client).await;
    Ok(connected.with_context(|| {
        format!("no Pulsar broker answers at {address}; `cargo lab up pulsar` starts one")
    })??)
}
