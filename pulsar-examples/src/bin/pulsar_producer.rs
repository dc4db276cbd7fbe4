//! Produce typed messages to a persistent Pulsar topic, and await the receipts
//!
//! Sends three orders as JSON. A receipt names the place where the broker has stored the message: ledger and entry.
//! Without one (timeout, lost connection) the message may or may not be stored, so sending again gives at least once.
//! One producer's messages on one topic stay in order.
//!
//! ```console
//! $ cargo lab run pulsar_producer
//! order-123: stored as [..]:0
//! order-124: stored as [..]:1
//! order-125: stored as [..]:2
//! ```
//!
//! Notice: `send_non_blocking(..).await` only puts the message into the client's queue; what it gives back has to be
//! awaited too. Stored does not yet mean kept: with no subscription on the topic and no retention policy, the broker
//! may delete at once what it has stored.
//!
//! Try: drop the second await: the program ends without an error and without its orders. Start `pulsar_consumer`, stop
//! it, and produce: its subscription keeps the orders until it is back.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650). See also: pulsar_consumer.

use std::time::Duration;

use anyhow::Context;
use pulsar::producer::Message;
use pulsar::{Error, Pulsar, SerializeMessage, TokioExecutor};
use serde::Serialize;
use tokio::time::timeout;

const TOPIC: &str = "persistent://public/default/orders";
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Order {
    order_id: String,
    user_id: String,
    /// In cents: a binary fraction cannot hold 0.10.
    amount: i64,
    status: &'static str,
}

impl SerializeMessage for Order {
    fn serialize_message(order: Self) -> Result<Message, Error> {
        let payload =
            serde_json::to_vec(&order).map_err(|error| Error::Custom(error.to_string()))?;
        Ok(Message {
            payload,
            ..Message::default()
        })
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let mut producer = pulsar.producer().with_topic(TOPIC).build().await?;

    for number in 123..126 {
        let order_id = format!("order-{number}");
        let order = Order {
            order_id: order_id.clone(),
            user_id: "user-1".into(),
            amount: 4_999,
            status: "created",
        };
        let queued = producer
            .create_message()
            .with_key(&order_id)
            .with_content(order)
            .send_non_blocking()
            .await?;
        let receipt = timeout(PATIENCE, queued).await.with_context(|| {
            format!("{order_id}: no receipt from {address}, it may or may not be stored")
        })??;
        let place = receipt
            .message_id
            .context("a receipt without a message id")?;
        println!(
            "{order_id}: stored as {}:{}",
            place.ledger_id, place.entry_id
        );
    }

    producer.close().await?;
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
