//! Unroutable messages: dropped and confirmed, or handed back, or caught
//!
//! The same misspelt routing key three times. Plain, the broker drops the message and confirms it. `mandatory` brings it
//! back to the publisher before the confirm. An alternate exchange catches it on the server, for all publishers.
//!
//! ```console
//! $ cargo lab run rabbitmq_mandatory
//! plain: order-1 to orders.eu: confirmed
//! plain: order-2 to order.eu: confirmed, though no queue has it
//! mandatory: order-3 to orders.eu: confirmed
//! mandatory: order-4 to order.eu: came back: NO_ROUTE
//! alternate exchange: order-5 to order.eu: confirmed, and kept in mandatory.unrouted
//! in mandatory.orders: order-1, order-3
//! in mandatory.unrouted: order-5
//! lost: order-2
//! ```
//!
//! Notice: a confirm answers "has the broker dealt with it", and dropping is dealing with it. So a publisher that must
//! not lose anything needs both, confirms and `mandatory`. An alternate exchange counts as a route: what it catches is
//! not handed back. With several messages on their way, tell a returned one by its message id, not by the confirm
//! that it comes with: lapin hands it out with the next confirm of the channel, which may be another message's.
//!
//! Try: unbind `mandatory.orders` in the web console while the program runs.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"). See also: rabbitmq_publisher_confirms.

use std::time::Duration;

use anyhow::{Context, bail};
use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
    ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, ExchangeKind,
};
use tokio::time::timeout;

const EXCHANGE: &str = "mandatory";
/// Routes as `EXCHANGE` does, and what it cannot route to `UNROUTED`.
const SAFE_EXCHANGE: &str = "mandatory.safe";
const CATCH_ALL: &str = "mandatory.catch-all";
const ORDERS: &str = "mandatory.orders";
const UNROUTED: &str = "mandatory.unrouted";
const KEY: &str = "orders.eu";
const TYPO: &str = "order.eu";
const PERSISTENT: u8 = 2;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let connection = connect(&addr).await?;
    let channel = connection.create_channel().await?;
    declare(&channel).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    for (how, exchange, mandatory, order, key) in [
        ("plain", EXCHANGE, false, "order-1", KEY),
        ("plain", EXCHANGE, false, "order-2", TYPO),
        ("mandatory", EXCHANGE, true, "order-3", KEY),
        ("mandatory", EXCHANGE, true, "order-4", TYPO),
        ("alternate exchange", SAFE_EXCHANGE, true, "order-5", TYPO),
    ] {
        let publish = publish(&channel, exchange, mandatory, order, key);
        let outcome = match timeout(PATIENCE, publish)
            .await
            .context("no confirm in time")??
        {
            Some(returned) => format!("came back: {returned}"),
            None if key == KEY => "confirmed".into(),
            None if exchange == SAFE_EXCHANGE => format!("confirmed, and kept in {UNROUTED}"),
            None => "confirmed, though no queue has it".into(),
        };
        println!("{how}: {order} to {key}: {outcome}");
    }
    let routed = take_all(&channel, ORDERS).await?;
    let caught = take_all(&channel, UNROUTED).await?;
    println!("in {ORDERS}: {}", routed.join(", "));
    println!("in {UNROUTED}: {}", caught.join(", "));
    // order-4 is not lost: its publisher has it.
    let all = ["order-1", "order-2", "order-3", "order-5"];
    let lost = all.map(String::from);
    let lost = lost
        .iter()
        .filter(|one| !routed.contains(one) && !caught.contains(one));
    println!(
        "lost: {}",
        lost.map(String::as_str).collect::<Vec<_>>().join(", ")
    );
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close")??;
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_mandatory".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

async fn declare(channel: &Channel) -> lapin::Result<()> {
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let none = FieldTable::default();
    let mut alternate = FieldTable::default();
    let catch_all = AMQPValue::LongString(CATCH_ALL.into());
    alternate.insert("alternate-exchange".into(), catch_all);
    for (name, kind, arguments) in [
        (EXCHANGE, ExchangeKind::Direct, none.clone()),
        (SAFE_EXCHANGE, ExchangeKind::Direct, alternate),
        (CATCH_ALL, ExchangeKind::Fanout, none.clone()),
    ] {
        channel
            .exchange_declare(name.into(), kind, durable, arguments)
            .await?;
    }
    let bindings = [
        (ORDERS, EXCHANGE),
        (ORDERS, SAFE_EXCHANGE),
        (UNROUTED, CATCH_ALL),
    ];
    for (queue, exchange) in bindings {
        let (declare, bind) = (QueueDeclareOptions::durable(), QueueBindOptions::default());
        channel
            .queue_declare(queue.into(), declare, none.clone())
            .await?;
        channel
            .queue_bind(
                queue.into(),
                exchange.into(),
                KEY.into(),
                bind,
                none.clone(),
            )
            .await?;
        // What a run that was cut short has left.
        let purge = QueuePurgeOptions::default();
        channel.queue_purge(queue.into(), purge).await?;
    }
    Ok(())
}

/// The reason for which the message came back, if it did.
async fn publish(
    channel: &Channel,
    exchange: &str,
    mandatory: bool,
    order: &str,
    key: &str,
) -> anyhow::Result<Option<String>> {
    let options = BasicPublishOptions {
        mandatory,
        ..BasicPublishOptions::default()
    };
    let properties = BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_message_id(order.into());
    let confirm = channel
        .basic_publish(
            exchange.into(),
            key.into(),
            options,
            order.as_bytes(),
            properties,
        )
        .await?;
    match confirm.await? {
        Confirmation::Ack(None) => Ok(None),
        Confirmation::Ack(Some(returned)) => Ok(Some(returned.reply_text.to_string())),
        Confirmation::Nack(_) => bail!("the broker refused {order}"),
        // Without confirm_select, this; and a returned message would only show in `wait_for_confirms`.
        Confirmation::NotRequested => bail!("confirms are not enabled on this channel"),
    }
}

async fn take_all(channel: &Channel, queue: &str) -> lapin::Result<Vec<String>> {
    let mut orders = Vec::new();
    let options = BasicGetOptions::default();
    while let Some(message) = channel.basic_get(queue.into(), options).await? {
        orders.push(String::from_utf8_lossy(&message.data).into_owned());
        message.ack(BasicAckOptions::default()).await?;
    }
    Ok(orders)
}
