//! Routing by pattern: log lines by facility and severity, the publisher
//!
//! Publishes to a topic exchange. The routing key is words with dots between them, such as `kern.critical`; who listens
//! chooses by patterns. At most once: a key that fits no pattern is reported and dropped.
//!
//! ```console
//! 1$ cargo lab run rabbitmq_receive_logs_topic 'kern.*'
//! waiting for kern.*; Ctrl-C to stop
//! 2$ cargo lab run rabbitmq_emit_log_topic kern.critical 'disk full'
//! sent kern.critical: disk full
//! 2$ cargo lab run rabbitmq_emit_log_topic kern.disk.critical 'disk full'
//! nobody listens to kern.disk.critical: disk full
//! 1:
//! kern.critical: disk full
//! 1^C
//! stopped; lines: 1
//! ```
//!
//! Notice: `*` is exactly one word, so `kern.*` does not fit the longer key. Order the words from the general to the
//! particular, since listeners pick prefixes (`kern.#`). A key may have 255 bytes; a longer one is refused here.
//!
//! Try: `rabbitmq_receive_logs_topic '#'` for all lines, `'*.critical'` for one severity.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); the arguments are a key and a line. See
//! also: rabbitmq_receive_logs_topic, rabbitmq_emit_log_headers.

use std::time::Duration;

use anyhow::{Context, bail};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions};
use lapin::types::FieldTable;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, ExchangeKind,
};
use tokio::time::timeout;

const EXCHANGE: &str = "topic_logs";
const LONGEST_KEY: usize = 255;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (key, line) = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => ("kern.critical", "A critical kernel error"),
        [key, line] if key.len() <= LONGEST_KEY => (key, line),
        [_, _] => bail!("a routing key has at most {LONGEST_KEY} bytes"),
        _ => bail!("usage: rabbitmq_emit_log_topic FACILITY.SEVERITY LINE"),
    };
    let connection = connect(&addr).await?;
    let channel = connection.create_channel().await?;
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let no_arguments = FieldTable::default();
    channel
        .exchange_declare(EXCHANGE.into(), ExchangeKind::Topic, durable, no_arguments)
        .await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let heard = timeout(PATIENCE, emit(&channel, key, line))
        .await
        .context("no confirmation in time: the line may or may not have been sent")??;
    println!(
        "{} {key}: {line}",
        if heard { "sent" } else { "nobody listens to" }
    );
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close")??;
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_emit_log_topic".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

/// Whether the line reached at least one queue.
async fn emit(channel: &Channel, key: &str, line: &str) -> anyhow::Result<bool> {
    let confirmation = channel
        .basic_publish(
            EXCHANGE.into(),
            key.into(),
            BasicPublishOptions {
                mandatory: true,
                ..BasicPublishOptions::default()
            },
            line.as_bytes(),
            BasicProperties::default(),
        )
        .await?
        .await?;
    match confirmation {
        Confirmation::Ack(returned) => Ok(returned.is_none()),
        Confirmation::Nack(_) => bail!("the broker refused: {line}"),
        Confirmation::NotRequested => bail!("confirms are not enabled on this channel"),
    }
}
