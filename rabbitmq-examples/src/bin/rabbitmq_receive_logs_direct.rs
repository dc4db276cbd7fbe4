//! Routing by an exact key: log lines by severity, a subscriber
//!
//! Binds its own queue to a direct exchange, once for each severity it wants. At most once, as rabbitmq_receive_logs.
//!
//! ```console
//! 1$ cargo lab run rabbitmq_receive_logs_direct warning error
//! waiting for warning, error; Ctrl-C to stop
//! 2$ cargo lab run rabbitmq_emit_log_direct info 'all is well'
//! nobody listens to info: all is well
//! 2$ cargo lab run rabbitmq_emit_log_direct warning 'disk nearly full'
//! sent warning: disk nearly full
//! 1:
//! warning: disk nearly full
//! 1^C
//! stopped; lines: 1
//! ```
//!
//! Notice: one queue with several bindings, not one queue for each: the lines keep their order, and one acknowledgement
//! and one limit hold for all of them.
//!
//! Try: a second receiver with `info` only.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); the arguments are severities (all
//! three). See also: rabbitmq_emit_log_direct, rabbitmq_receive_logs_topic.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicQosOptions, ExchangeDeclareOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, Consumer, ExchangeKind};
use tokio::time::timeout;

const EXCHANGE: &str = "direct_logs";
const SEVERITIES: [&str; 3] = ["info", "warning", "error"];
const LONGEST_BACKLOG: i32 = 10_000;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if args.is_empty() {
        args = SEVERITIES.map(String::from).into();
    }
    for severity in &args {
        ensure!(
            SEVERITIES.contains(&severity.as_str()),
            "{severity:?} is none of {SEVERITIES:?}"
        );
    }
    let connection = connect(&addr).await?;
    let mut deliveries = subscribe(&connection.create_channel().await?, &args).await?;
    println!("waiting for {}; Ctrl-C to stop", args.join(", "));

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
        println!("{}: {line}", delivery.routing_key);
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

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_receive_logs_direct".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

async fn subscribe(channel: &Channel, severities: &[String]) -> lapin::Result<Consumer> {
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let no_arguments = FieldTable::default();
    channel
        .exchange_declare(
            EXCHANGE.into(),
            ExchangeKind::Direct,
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
    for severity in severities {
        channel
            .queue_bind(
                queue.name().clone(),
                EXCHANGE.into(),
                severity.as_str().into(),
                QueueBindOptions::default(),
                no_arguments.clone(),
            )
            .await?;
    }
    channel.basic_qos(100, BasicQosOptions::default()).await?;
    let consume = BasicConsumeOptions::default();
    channel
        .basic_consume(queue.name().clone(), "".into(), consume, no_arguments)
        .await
}
