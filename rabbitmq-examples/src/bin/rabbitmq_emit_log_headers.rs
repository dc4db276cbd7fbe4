//! Routing by headers: log lines by any of their attributes, the publisher
//!
//! Publishes to a headers exchange, which does not look at the routing key but compares the headers of the message with
//! those of each binding. At most once: a line that fits no binding is reported and dropped.
//!
//! ```console
//! 1$ cargo lab run rabbitmq_receive_logs_headers all service=auth level=error
//! waiting for all of service=auth level=error; Ctrl-C to stop
//! 2$ cargo lab run rabbitmq_emit_log_headers service=auth level=error host=a 'login failed'
//! sent service=auth level=error host=a: login failed
//! 2$ cargo lab run rabbitmq_emit_log_headers service=auth level=info 'user logged in'
//! nobody listens to service=auth level=info: user logged in
//! 1:
//! host=a level=error service=auth: login failed
//! 1^C
//! stopped; lines: 1
//! ```
//!
//! Notice: values are compared with their type: the number 5 does not fit the text "5". All of these are texts. Names that
//! start with `x-` take no part in `all` and `any`, so they are refused here.
//!
//! Try: a receiver with `any` in place of `all`.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); the arguments are headers NAME=VALUE and
//! a line. See also: rabbitmq_receive_logs_headers.

use std::time::Duration;

use anyhow::{Context, bail};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, ExchangeKind,
};
use tokio::time::timeout;

const EXCHANGE: &str = "headers_logs";
const LONGEST_NAME: usize = 255;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (line, pairs) = match args.split_last() {
        Some((line, pairs)) if !pairs.is_empty() => (line.clone(), pairs.to_vec()),
        None => (
            "login failed".to_owned(),
            vec!["service=auth".to_owned(), "level=error".to_owned()],
        ),
        Some(_) => bail!("usage: rabbitmq_emit_log_headers NAME=VALUE ... LINE"),
    };
    let (line, headers) = (line.as_str(), table(&pairs)?);
    let connection = connect(&addr).await?;
    let channel = connection.create_channel().await?;
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
            no_arguments,
        )
        .await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let shown = pairs.join(" ");
    let heard = timeout(PATIENCE, emit(&channel, headers, line))
        .await
        .context("no confirmation in time: the line may or may not have been sent")??;
    println!(
        "{} {shown}: {line}",
        if heard { "sent" } else { "nobody listens to" }
    );
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close")??;
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
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_emit_log_headers".into());
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
async fn emit(channel: &Channel, headers: FieldTable, line: &str) -> anyhow::Result<bool> {
    let confirmation = channel
        .basic_publish(
            EXCHANGE.into(),
            "".into(),
            BasicPublishOptions {
                mandatory: true,
                ..BasicPublishOptions::default()
            },
            line.as_bytes(),
            BasicProperties::default().with_headers(headers),
        )
        .await?
        .await?;
    match confirmation {
        Confirmation::Ack(returned) => Ok(returned.is_none()),
        Confirmation::Nack(_) => bail!("the broker refused: {line}"),
        Confirmation::NotRequested => bail!("confirms are not enabled on this channel"),
    }
}
