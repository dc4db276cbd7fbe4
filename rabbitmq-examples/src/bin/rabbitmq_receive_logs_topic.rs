//! Routing by pattern: log lines by facility and severity, a subscriber
//!
//! Binds its own queue to a topic exchange, once for each pattern. `*` stands for exactly one word of the key, `#` for
//! any number of words, also none. At most once, as rabbitmq_receive_logs.
//!
//! ```console
//! 1$ cargo lab run rabbitmq_receive_logs_topic 'kern.#' '*.critical'
//! waiting for kern.#, *.critical; Ctrl-C to stop
//! 2$ cargo lab run rabbitmq_emit_log_topic kern.critical 'disk full'
//! sent kern.critical: disk full
//! 2$ cargo lab run rabbitmq_emit_log_topic kern.disk.warning 'disk nearly full'
//! sent kern.disk.warning: disk nearly full
//! 2$ cargo lab run rabbitmq_emit_log_topic auth.info 'user logged in'
//! nobody listens to auth.info: user logged in
//! 1:
//! kern.critical: disk full
//! kern.disk.warning: disk nearly full
//! 1^C
//! stopped; lines: 2
//! ```
//!
//! Notice: both patterns fit `kern.critical`, and still the line comes once: a queue gets one copy, however many of its
//! bindings fit. `#` alone makes a topic exchange a fanout, a pattern without wildcards makes it a direct one.
//!
//! Try: quote the patterns, or the shell expands the `*` and takes the `#` for a comment.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); the arguments are patterns (#). See
//! also: rabbitmq_emit_log_topic, rabbitmq_receive_logs_headers.

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

const EXCHANGE: &str = "topic_logs";
const LONGEST_KEY: usize = 255;
const LONGEST_BACKLOG: i32 = 10_000;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if args.is_empty() {
        args.push("#".into());
    }
    for pattern in &args {
        ensure!(
            pattern.len() <= LONGEST_KEY,
            "a pattern has at most {LONGEST_KEY} bytes"
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
        ConnectionProperties::default().with_connection_name("rabbitmq_receive_logs_topic".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

async fn subscribe(channel: &Channel, patterns: &[String]) -> lapin::Result<Consumer> {
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let no_arguments = FieldTable::default();
    channel
        .exchange_declare(
            EXCHANGE.into(),
            ExchangeKind::Topic,
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
    for pattern in patterns {
        channel
            .queue_bind(
                queue.name().clone(),
                EXCHANGE.into(),
                pattern.as_str().into(),
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
