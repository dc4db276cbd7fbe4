//! Routing by an exact key: log lines by severity, the publisher
//!
//! Publishes to a direct exchange with the severity as routing key; each queue that is bound with that very key gets a
//! copy. At most once: a severity that nobody listens to is reported and dropped.
//!
//! ```console
//! $ cargo lab run rabbitmq_emit_log_direct error 'disk full'
//! nobody listens to error: disk full
//! 1$ cargo lab run rabbitmq_receive_logs_direct error
//! waiting for error; Ctrl-C to stop
//! 2$ cargo lab run rabbitmq_emit_log_direct error 'disk full'
//! sent error: disk full
//! 2$ cargo lab run rabbitmq_emit_log_direct info 'all is well'
//! nobody listens to info: all is well
//! 1:
//! error: disk full
//! 1^C
//! stopped; lines: 1
//! ```
//!
//! Notice: keys are compared as they are: `Error` is not `error`. So the program knows its severities and refuses a
//! misspelt one, which the broker would drop in silence.
//!
//! Try: two receivers of the same severity: both get the line. Bound to one queue, they would share.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); the arguments are a severity (info,
//! warning, error) and a line. See also: rabbitmq_receive_logs_direct, rabbitmq_emit_log_topic.

use std::time::Duration;

use anyhow::{Context, bail};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions};
use lapin::types::FieldTable;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, ExchangeKind,
};
use tokio::time::timeout;

const EXCHANGE: &str = "direct_logs";
const SEVERITIES: [&str; 3] = ["info", "warning", "error"];
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (severity, line) = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => ("error", "Connection lost"),
        [severity, line] if SEVERITIES.contains(&severity) => (severity, line),
        _ => bail!("usage: rabbitmq_emit_log_direct info|warning|error LINE"),
    };
    let connection = connect(&addr).await?;
    let channel = connection.create_channel().await?;
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let no_arguments = FieldTable::default();
    channel
        .exchange_declare(EXCHANGE.into(), ExchangeKind::Direct, durable, no_arguments)
        .await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let heard = timeout(PATIENCE, emit(&channel, severity, line))
        .await
        .context("no confirmation in time: the line may or may not have been sent")??;
    println!(
        "{} {severity}: {line}",
        if heard { "sent" } else { "nobody listens to" }
    );
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close")??;
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_emit_log_direct".into());
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
async fn emit(channel: &Channel, severity: &str, line: &str) -> anyhow::Result<bool> {
    let confirmation = channel
        .basic_publish(
            EXCHANGE.into(),
            severity.into(),
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
