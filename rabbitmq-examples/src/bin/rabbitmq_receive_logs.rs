//! Publish/subscribe, a subscriber: a queue of its own, for as long as it is connected
//!
//! Binds a queue that only this connection may use and whose name the server makes up. At most once: lines that are
//! published before the binding or after the end are missed, and a subscriber that stalls loses the oldest lines.
//!
//! ```console
//! 1$ cargo lab run rabbitmq_receive_logs
//! waiting for logs; Ctrl-C to stop
//! 2$ cargo lab run rabbitmq_receive_logs
//! waiting for logs; Ctrl-C to stop
//! 3$ cargo lab run rabbitmq_emit_log 'WARN: High memory'
//! sent: WARN: High memory
//! 1:
//! WARN: High memory
//! 2:
//! WARN: High memory
//! 1^C
//! stopped; lines: 1
//! 2^C
//! stopped; lines: 1
//! ```
//!
//! Notice: the queue goes with the connection, so a crash leaves nothing behind that fills up with nobody to read it.
//! `x-max-length` bounds it all the same: one subscriber that hangs must not fill the broker's memory. Acknowledging,
//! with a prefetch limit, is not for safety here; it keeps what is unread in that bounded queue and not in this process.
//!
//! Try: `rabbitmq_emit_log` before this is started; stop it with SIGSTOP while lines come, then let it go on.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"). A transient queue should be exclusive,
//! as this one is: one that is shared is deprecated, and refused from 4.3 on unless the broker is set to permit it. See
//! also: rabbitmq_emit_log.

use std::pin::pin;
use std::time::Duration;

use anyhow::Context;
use futures::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicQosOptions, ExchangeDeclareOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, Consumer, ExchangeKind};
use tokio::time::timeout;

const EXCHANGE: &str = "logs";
const LONGEST_BACKLOG: i32 = 10_000;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let connection = connect(&addr).await?;
    let mut deliveries = subscribe(&connection.create_channel().await?).await?;
    println!("waiting for logs; Ctrl-C to stop");

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
        println!("{}", String::from_utf8_lossy(&delivery.data));
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
        ConnectionProperties::default().with_connection_name("rabbitmq_receive_logs".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

async fn subscribe(channel: &Channel) -> lapin::Result<Consumer> {
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let no_arguments = FieldTable::default();
    channel
        .exchange_declare(
            EXCHANGE.into(),
            ExchangeKind::Fanout,
            durable,
            no_arguments.clone(),
        )
        .await?;
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
            no_arguments.clone(),
        )
        .await?;
    channel.basic_qos(100, BasicQosOptions::default()).await?;
    let consume = BasicConsumeOptions::default();
    channel
        .basic_consume(queue.name().clone(), "".into(), consume, no_arguments)
        .await
}
