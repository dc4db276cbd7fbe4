//! Consume from a Pulsar subscription, and acknowledge each message after its work
//!
//! A named subscription is a position that the broker keeps, with or without a consumer. At least once, in order: what
//! is not acknowledged when a consumer goes away is delivered again to the next one. The type `Failover` gives the
//! messages to one consumer at a time and keeps the others as stand-ins.
//!
//! ```console
//! 1$ cargo lab run pulsar_consumer
//! subscribed as order-processor; Ctrl-C to stop
//! 2$ cargo lab run pulsar_producer
//! order-123: stored as [..]
//! ...
//! 1:
//! [..]:0 order-123 of user-1, 4999 cents: acknowledged
//! [..]:1 order-124 of user-1, 4999 cents: acknowledged
//! [..]:2 order-125 of user-1, 4999 cents: acknowledged
//! 1^C
//! closed; orders processed: 3
//! ```
//!
//! Notice: a subscription starts at the topic's end unless it is told `Earliest`, and only when it is new: later
//! consumers go on where it stands. With the type `Exclusive`, this client would not refuse a second consumer but retry
//! for ever without a word. To the broker a batch is one entry, and the ack of one of its messages is the ack of all.
//! So the ack comes after the last of them; when the program ends before, the whole batch comes again, and one that
//! holds a message that is no order stays as a whole. Single acks within a batch (`ack_set`) would not spare the
//! repeats: this client hands out all of a batch that comes again.
//!
//! Try: `cargo lab kill pulsar_consumer` right after it printed an order; the next run may get that order again. Run it
//! twice and stop the first: the second takes over. `cargo lab kill pulsar`, then `cargo lab restart pulsar`: the
//! client comes back by itself, or the program ends with an error, at the latest after about a minute.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650). See also: pulsar_producer.

use std::pin::pin;
use std::time::Duration;

use anyhow::Context;
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::{InitialPosition, Message};
use pulsar::{
    Consumer, ConsumerOptions, DeserializeMessage, Payload, Pulsar, SubType, TokioExecutor,
};
use serde::Deserialize;
use tokio::time::{sleep, timeout};

const TOPIC: &str = "persistent://public/default/orders";
const SUBSCRIPTION: &str = "order-processor";
const PATIENCE: Duration = Duration::from_secs(5);
/// After as long without an order, it asks whether the broker is there.
const SILENCE: Duration = Duration::from_secs(30);

#[derive(Deserialize)]
struct Order {
    order_id: String,
    user_id: String,
    amount: i64,
}

impl DeserializeMessage for Order {
    type Output = serde_json::Result<Self>;

    fn deserialize_message(payload: &Payload) -> Self::Output {
        serde_json::from_slice(&payload.data)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(20);
    let mut consumer: Consumer<Order, _> = pulsar
        .consumer()
        .with_topic(TOPIC)
        .with_subscription(SUBSCRIPTION)
        .with_subscription_type(SubType::Failover)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(10)
        .with_options(options)
        .build()
        .await?;
    println!("subscribed as {SUBSCRIPTION}; Ctrl-C to stop");

    let mut processed = 0;
    // Whether the batch in hand has a message that is no order.
    let mut kept = false;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let message = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            message = timeout(SILENCE, consumer.try_next()) => message,
        };
        let lost = || format!("lost the connection to {address}");
        let Ok(message) = message else {
            // Nothing to read, or nobody there? Left alone, a consumer may be silent for ever.
            let answer = timeout(PATIENCE, consumer.check_connection()).await;
            answer.with_context(lost)?.with_context(lost)?;
            continue;
        };
        // The stream ends when the client has given up reconnecting. To leave the loop then, as for a normal end, would
        // hide it.
        let message = message?.with_context(lost)?;
        // Outside the select: Ctrl-C does not interrupt an order in hand.
        processed += u32::from(handle(&mut consumer, &message, &mut kept).await?);
    }
    close(consumer).await?;
    println!("closed; orders processed: {processed}");
    Ok(())
}

/// Works on one message and settles it; false if it is not an order.
///
/// Such a message is left without an ack: it stays in the subscription's backlog and comes back to the next consumer.
/// A negative ack would bring it back at once, and again, for ever.
async fn handle(
    consumer: &mut Consumer<Order, TokioExecutor>,
    message: &Message<Order>,
    kept: &mut bool,
) -> anyhow::Result<bool> {
    let place = format!(
        "{}:{}",
        message.message_id().ledger_id,
        message.message_id().entry_id
    );
    let order = match message.deserialize() {
        Ok(order) => {
            sleep(Duration::from_millis(100)).await; // the work
            Some(order)
        }
        Err(error) => {
            println!("{place} not an order, kept in the backlog: {error}");
            *kept = true;
            None
        }
    };
    let state = if !last_of_batch(message) {
        "done, the ack waits for the last of the batch"
    } else if std::mem::take(kept) {
        "done, but its batch is kept"
    } else {
        consumer.ack(message).await?;
        "acknowledged"
    };
    if let Some(order) = &order {
        let Order {
            order_id,
            user_id,
            amount,
        } = order;
        println!("{place} {order_id} of {user_id}, {amount} cents: {state}");
    }
    Ok(order.is_some())
}

/// A message that came alone is the last.
fn last_of_batch(message: &Message<Order>) -> bool {
    let index = message.message_id().batch_index.unwrap_or_default();
    let size = message.message_id.batch_size;
    size.is_none_or(|size| index + 1 >= size)
}

/// Gives back what was fetched ahead: while its queue is full, the client's close waits for the client itself. A batch
/// comes whole, however small the queue is: its rest is taken, and if there is yet another, all is tried again.
async fn close(mut consumer: Consumer<Order, TokioExecutor>) -> anyhow::Result<()> {
    let closed = async {
        loop {
            let mut whole = true;
            while let Some(Ok(message)) = match whole {
                true => consumer.next().now_or_never().flatten(),
                false => consumer.next().await,
            } {
                whole = last_of_batch(&message);
            }
            // An ack is only queued by `ack`. The answer to the close comes after the acks before it.
            if let Ok(closed) = timeout(PATIENCE / 10, consumer.close()).await {
                return closed;
            }
        }
    };
    timeout(PATIENCE, closed)
        .await
        .context("the last orders may be delivered again: no answer to the close")??;
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
