//! Routing by headers: log lines by any of their attributes, a subscriber
//!
//! Binds its own queue to a headers exchange, with the headers it wants and with `x-match`: `all` of them must be there,
//! or `any` one. At most once, as rabbitmq_receive_logs.
//!
//! ```console
//! 1$ cargo lab run rabbitmq_receive_logs_headers any level=error service=payment
//! waiting for any of level=error service=payment; Ctrl-C to stop
//! 2$ cargo lab run rabbitmq_emit_log_headers service=payment level=info 'card charged'
//! sent service=payment level=info: card charged
//! 2$ cargo lab run rabbitmq_emit_log_headers service=auth level=error 'login failed'
//! sent service=auth level=error: login failed
//! 2$ cargo lab run rabbitmq_emit_log_headers service=auth level=info 'user logged in'
//! nobody listens to service=auth level=info: user logged in
//! 1:
//! level=info service=payment: card charged
//! level=error service=auth: login failed
//! 1^C
//! stopped; lines: 2
//! ```
//!
//! Notice: a headers exchange compares every message with every binding; where one name in a key is enough, a topic
//! exchange is cheaper. A binding without headers fits every message with `all` and none with `any`.
//!
//! Try: the same two headers with `all`.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); the arguments are `all` or `any`, and
//! headers NAME=VALUE. With `all-with-x` and `any-with-x`, headers whose names start with `x-` would count, too. See
//! also: rabbitmq_emit_log_headers.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail};
use futures::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicQosOptions, ExchangeDeclareOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, Consumer, ExchangeKind};
use tokio::time::timeout;

const EXCHANGE: &str = "headers_logs";
const LONGEST_NAME: usize = 255;
const LONGEST_BACKLOG: i32 = 10_000;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (matching, pairs) = match args.split_first() {
        Some((how, pairs)) if how == "all" || how == "any" => (how.as_str(), pairs.to_vec()),
        None => ("any", vec!["level=error".to_owned()]),
        Some(_) => bail!("usage: rabbitmq_receive_logs_headers all|any NAME=VALUE ..."),
    };
    let mut wanted = table(&pairs)?;
    wanted.insert("x-match".into(), AMQPValue::LongString(matching.into()));
    let connection = connect(&addr).await?;
    let mut deliveries = subscribe(&connection.create_channel().await?, wanted).await?;
    println!(
        "waiting for {matching} of {}; Ctrl-C to stop",
        pairs.join(" ")
    );

    let mut lines = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let delivery = tokio::select! {
            // In this order, so that Ctrl-C is also heard of during the first one.
            biased;
            signal = &mut stop => break signal?,
            delivery = deliveries.next() => delivery
                .context("the broker cancelled the consumer; was the queue deleted?")?
                .context("lost the connection, and with it the queue")?,
        };
        let line = String::from_utf8_lossy(&delivery.data);
        println!("{}: {line}", headers(&delivery));
        let ack = delivery.ack(BasicAckOptions::default());
        // Without a limit it may wait for ever: lapin forgets an ack that is under way when the connection is lost.
        timeout(PATIENCE, ack)
            .await
            .context("lost the connection")??;
        lines += 1;
    }
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close; what was done last may come back")??;
    println!("stopped; lines: {lines}");
    Ok(())
}

/// `service=auth level=error` as a table of headers.
fn table(pairs: &[String]) -> anyhow::Result<FieldTable> {
    let mut table = FieldTable::default();
    for pair in pairs {
        let (name, value) = pair
            .split_once('=')
            .filter(|(name, _)| {
                !name.is_empty() && name.len() <= LONGEST_NAME && !name.starts_with("x-")
            })
            .with_context(|| format!("{pair:?} is not NAME=VALUE; no name starts with x-"))?;
        table.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    Ok(table)
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties = ConnectionProperties::default()
        .with_connection_name("rabbitmq_receive_logs_headers".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

/// In the order of their names; a table has no other.
fn headers(delivery: &Delivery) -> String {
    let headers = delivery.properties.headers().iter();
    let pairs = headers
        .flat_map(|table| table.inner())
        .map(|(name, value)| {
            let value = match value {
                AMQPValue::LongString(text) => {
                    String::from_utf8_lossy(text.as_bytes()).into_owned()
                }
                other => format!("{other:?}"),
            };
            format!("{name}={value}")
        });
    pairs.collect::<Vec<_>>().join(" ")
}

async fn subscribe(channel: &Channel, wanted: FieldTable) -> lapin::Result<Consumer> {
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let no_arguments = FieldTable::default();
    channel
        .exchange_declare(
            EXCHANGE.into(),
            ExchangeKind::Headers,
            durable,
            no_arguments.clone(),
        )
        .await?;
    // As in rabbitmq_receive_logs: gone with the connection, and bounded while it lasts.
    let mut bounded = FieldTable::default();
    bounded.insert("x-max-length".into(), AMQPValue::LongInt(LONGEST_BACKLOG));
    let queue = channel
        .queue_declare("".into(), QueueDeclareOptions::exclusive(), bounded)
        .await?;
    let bind = QueueBindOptions::default();
    channel
        .queue_bind(
            queue.name().clone(),
            EXCHANGE.into(),
            "".into(),
            bind,
            wanted,
        )
        .await?;
    channel.basic_qos(100, BasicQosOptions::default()).await?;
    let consume = BasicConsumeOptions::default();
    channel
        .basic_consume(queue.name().clone(), "".into(), consume, no_arguments)
        .await
}
