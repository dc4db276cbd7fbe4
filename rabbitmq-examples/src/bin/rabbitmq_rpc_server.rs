//! Request and reply, the server: Fibonacci numbers over RabbitMQ
//!
//! Takes a request from `rpc_queue`, sends the answer to where the request says, and acknowledges the request only when
//! the answer is confirmed. A request may be worked on twice, if the server dies in between, so the work should be
//! harmless to repeat. What cannot be computed is answered with an error: a client should not wait for nothing.
//!
//! ```console
//! 1$ cargo lab run rabbitmq_rpc_server
//! waiting for requests; Ctrl-C to stop
//! 2$ cargo lab run rabbitmq_rpc_client 30
//! fib(30) = 832040
//! 1:
//! fib(30) = 832040
//! 1^C
//! stopped; requests answered: 1
//! ```
//!
//! Notice: the queue lasts as long as one server is there (`auto_delete`), so that a request for which there is no
//! server comes back to its client at once, instead of waiting in a queue that nobody reads.
//!
//! Try: start several servers: they share the requests. `cargo lab kill rabbitmq_rpc_server.1`.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"). The queue is durable because a
//! transient queue that is shared is deprecated, and refused from 4.3 on unless the broker is set to permit it. See
//! also: rabbitmq_rpc_client.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    BasicRejectOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use tokio::time::timeout;

const QUEUE: &str = "rpc_queue";
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let connection = connect(&addr).await?;
    let channel = connection.create_channel().await?;
    let durable = QueueDeclareOptions::durable().auto_delete();
    let no_arguments = FieldTable::default();
    channel
        .queue_declare(QUEUE.into(), durable, no_arguments.clone())
        .await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    channel.basic_qos(1, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let mut requests = channel
        .basic_consume(QUEUE.into(), "".into(), options, no_arguments)
        .await?;
    println!("waiting for requests; Ctrl-C to stop");

    let mut answered = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let request = tokio::select! {
            // In this order, so that Ctrl-C is also heard of during the first one.
            biased;
            signal = &mut stop => break signal?,
            request = requests.next() => request
                .context("the broker cancelled the consumer; was the queue deleted?")?
                .context("lost the connection")?,
        };
        answered += u32::from(answer(&channel, &request).await?);
    }
    // Other servers take what comes from now on. The last one's cancel deletes the queue, with what is in it.
    let cancel = channel.basic_cancel(requests.tag(), BasicCancelOptions::default());
    timeout(PATIENCE, cancel)
        .await
        .context("the broker does not answer the cancel")??;
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close; what was done last may come back")??;
    println!("stopped; requests answered: {answered}");
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_rpc_server".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

/// Whether it was a request that can be answered at all.
async fn answer(channel: &Channel, request: &Delivery) -> anyhow::Result<bool> {
    let Some(reply_to) = request.properties.reply_to().clone() else {
        println!("a message without reply_to, dropped");
        let options = BasicRejectOptions { requeue: false };
        let rejected = timeout(PATIENCE, request.reject(options)).await;
        ensure!(rejected.unwrap_or(Ok(false))?, "lost the connection");
        return Ok(false);
    };
    let (kind, body) = match compute(&request.data) {
        Ok((n, value)) => {
            println!("fib({n}) = {value}");
            ("result", value.to_string())
        }
        Err(reason) => {
            println!("error: {reason}");
            ("error", reason)
        }
    };
    let mut properties = BasicProperties::default().with_type(kind.into());
    if let Some(id) = request.properties.correlation_id() {
        properties = properties.with_correlation_id(id.clone());
    }
    let options = BasicPublishOptions::default();
    let publish = channel.basic_publish("".into(), reply_to, options, body.as_bytes(), properties);
    // Confirmed also if the client is gone by now; then there is nobody to tell.
    timeout(PATIENCE, async { publish.await?.await })
        .await
        .context("the reply was not confirmed in time")??;
    let ack = request.ack(BasicAckOptions::default());
    // Without a limit it may wait for ever: lapin forgets an ack that is under way when the connection is lost.
    let acked = timeout(PATIENCE, ack).await.unwrap_or(Ok(false))?;
    ensure!(acked, "lost the connection after the reply");
    Ok(true)
}

fn compute(request: &[u8]) -> Result<(u32, u64), String> {
    let text = String::from_utf8_lossy(request);
    let number = text.trim().parse::<u32>().ok();
    let (n, value) = number
        .and_then(|n| Some((n, fib(n)?)))
        .ok_or_else(|| format!("{text:?} is not a number from 0 to 93"))?;
    Ok((n, value))
}

/// None if it does not fit.
fn fib(n: u32) -> Option<u64> {
    let (mut this, mut next) = (0_u64, Some(1_u64));
    for _ in 0..n {
        (this, next) = (next?, next?.checked_add(this));
    }
    Some(this)
}
