//! Publish/subscribe, the publisher: every subscriber gets a copy of every line
//!
//! Publishes to a fanout exchange, which copies each line into every queue that is bound to it. At most once: who is not
//! connected gets nothing, and nothing is kept for later. That nobody listens is reported, and is not an error.
//!
//! ```console
//! $ cargo lab run rabbitmq_emit_log 'INFO: Server started'
//! nobody listens: INFO: Server started
//! 1$ cargo lab run rabbitmq_receive_logs
//! waiting for logs; Ctrl-C to stop
//! 2$ cargo lab run rabbitmq_emit_log
//! sent: INFO: Server started
//! sent: WARN: High memory
//! sent: ERROR: Connection lost
//! 1:
//! INFO: Server started
//! WARN: High memory
//! ERROR: Connection lost
//! 1^C
//! stopped; lines: 3
//! ```
//!
//! Notice: without `mandatory` the first line would have been dropped without a word: an exchange stores nothing, and a
//! line that comes before the queue is bound is gone. Who must not miss any needs a durable queue that exists before
//! the publisher starts, or a stream.
//!
//! Try: several subscribers, and one that is started late.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); the arguments are lines, in place of
//! the three above. See also: rabbitmq_receive_logs, rabbitmq_mandatory, rabbitmq_stream.

use std::time::Duration;

use anyhow::{Context, bail};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions};
use lapin::types::FieldTable;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, ExchangeKind,
};
use tokio::time::timeout;

const EXCHANGE: &str = "logs";
const LINES: [&str; 3] = [
    "INFO: Server started",
    "WARN: High memory",
    "ERROR: Connection lost",
];
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let mut lines: Vec<String> = std::env::args().skip(1).collect();
    if lines.is_empty() {
        lines = LINES.map(String::from).into();
    }
    let connection = connect(&addr).await?;
    let channel = connection.create_channel().await?;
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    channel
        .exchange_declare(
            EXCHANGE.into(),
            ExchangeKind::Fanout,
            durable,
            FieldTable::default(),
        )
        .await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    for line in &lines {
        let heard = timeout(PATIENCE, emit(&channel, line))
            .await
            .with_context(|| format!("no confirmation in time for: {line}"))??;
        println!("{}: {line}", if heard { "sent" } else { "nobody listens" });
    }
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close")??;
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_emit_log".into());
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
async fn emit(channel: &Channel, line: &str) -> anyhow::Result<bool> {
    let confirmation = channel
        .basic_publish(
            EXCHANGE.into(),
            "".into(), // a fanout exchange does not look at the routing key
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
