//! Request and reply, the client: concurrent calls, each with an answer or a reason within its time
//!
//! Sends all requests at once over one channel and gives each its reply by its correlation id. Each call ends within its
//! time limit: with the answer, with the server's error, or with the reason why there is none. A call without an answer
//! may still have been carried out.
//!
//! ```console
//! $ cargo lab run rabbitmq_rpc_client 30
//! fib(30): no server: NO_ROUTE
//! [exit 1]
//! 1$ cargo lab run rabbitmq_rpc_server
//! waiting for requests; Ctrl-C to stop
//! 2$ cargo lab run rabbitmq_rpc_client 10 90 many
//! fib(10) = 55
//! fib(90) = 2880067194370816120
//! fib(many): the server says: "many" is not a number from 0 to 93
//! [exit 1]
//! 1:
//! ...
//! 1^C
//! ...
//! stopped; requests answered: 3
//! ```
//!
//! Notice: direct reply-to needs no reply queue: `amq.rabbitmq.reply-to` is a name that the broker replaces by this
//! channel. It must be consumed without acknowledgements, and before the first request, on the same channel.
//! `mandatory` brings a request back that reaches no server. `expiration` takes it out of the queue when its time is
//! up, so that no server works for a client that no longer waits.
//!
//! Try: stop the server with SIGSTOP, call, and let it go on: the late requests are not carried out.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); RPC_TIMEOUT_MS (3000); the arguments
//! are the numbers (30). See also: rabbitmq_rpc_server.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use futures::StreamExt;
use futures::future::join_all;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer};
use tokio::sync::oneshot;
use tokio::time::timeout;

const QUEUE: &str = "rpc_queue";
const REPLY_TO: &str = "amq.rabbitmq.reply-to";
const PATIENCE: Duration = Duration::from_secs(5);

/// The server's answer or its error, or why there is none.
type Reply = anyhow::Result<String>;
/// Who waits for which reply.
type Waiting = Arc<Mutex<HashMap<String, oneshot::Sender<Reply>>>>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let limit = std::env::var("RPC_TIMEOUT_MS").unwrap_or_else(|_| "3000".into());
    let limit: u32 = limit.parse().context("RPC_TIMEOUT_MS is a number")?;
    let mut numbers: Vec<String> = std::env::args().skip(1).collect();
    if numbers.is_empty() {
        numbers.push("30".into());
    }
    let connection = connect(&addr).await?;
    let client = Client::new(&connection, limit).await?;

    // They run at the same time; only the printing is in order.
    let calls = numbers.iter().enumerate();
    let calls = join_all(calls.map(|(id, number)| client.call(id.to_string(), number))).await;
    let mut failed = 0;
    for (number, answer) in numbers.iter().zip(calls) {
        match answer {
            Ok(value) => println!("fib({number}) = {value}"),
            Err(reason) => {
                failed += 1;
                println!("fib({number}): {reason:#}");
            }
        }
    }
    // What is left of it is of no more use, even if the broker does not answer.
    let _ = timeout(PATIENCE, connection.close(200, "OK".into())).await;
    ensure!(failed == 0, "{failed} of {} calls failed", numbers.len());
    Ok(())
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_rpc_client".into());
    let connected = timeout(PATIENCE, Connection::connect(addr, properties)).await;
    connected
        .map_err(anyhow::Error::from)
        .and_then(|result| Ok(result?))
        .with_context(|| {
            let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })
}

struct Client {
    channel: Channel,
    waiting: Waiting,
    limit_ms: u32,
}

impl Client {
    async fn new(connection: &Connection, limit_ms: u32) -> anyhow::Result<Client> {
        let channel = connection.create_channel().await?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        let options = BasicConsumeOptions {
            no_ack: true,
            ..BasicConsumeOptions::default()
        };
        let replies = channel
            .basic_consume(REPLY_TO.into(), "".into(), options, FieldTable::default())
            .await?;
        let waiting = Waiting::default();
        tokio::spawn(hand_out(replies, waiting.clone()));
        Ok(Client {
            channel,
            waiting,
            limit_ms,
        })
    }

    /// `id` must not be that of another call that is under way.
    async fn call(&self, id: String, request: &str) -> anyhow::Result<String> {
        let (sender, reply) = oneshot::channel();
        lock(&self.waiting).insert(id.clone(), sender);
        let limit = Duration::from_millis(self.limit_ms.into());
        let answered = timeout(limit, async {
            self.send(&id, request).await?;
            reply.await.context("nobody takes replies any more")
        });
        let answered = answered.await;
        lock(&self.waiting).remove(&id);
        match answered {
            Ok(reply) => reply?,
            Err(_) => bail!("no reply within {} ms", self.limit_ms),
        }
    }

    async fn send(&self, id: &str, request: &str) -> anyhow::Result<()> {
        let options = BasicPublishOptions {
            mandatory: true,
            ..BasicPublishOptions::default()
        };
        let properties = BasicProperties::default()
            .with_reply_to(REPLY_TO.into())
            .with_correlation_id(id.into())
            .with_expiration(self.limit_ms.to_string().into());
        let publish = self.channel.basic_publish(
            "".into(),
            QUEUE.into(),
            options,
            request.as_bytes(),
            properties,
        );
        match publish.await?.await? {
            Confirmation::Ack(None) => Ok(()),
            // With calls in parallel lapin may hand the returned message of one to another; all went to the same queue.
            Confirmation::Ack(Some(returned)) => bail!("no server: {}", returned.reply_text),
            Confirmation::Nack(_) => bail!("the broker refused the request"),
            Confirmation::NotRequested => bail!("confirms are not enabled on this channel"),
        }
    }
}

/// Gives each reply to the call that waits for it. A reply that comes too late finds nobody.
async fn hand_out(mut replies: Consumer, waiting: Waiting) {
    let reason = loop {
        let reply = match replies.next().await {
            Some(Ok(reply)) => reply,
            Some(Err(error)) => break format!("lost the connection: {error}"),
            None => break "the broker cancelled the consumer of the replies".to_owned(),
        };
        let id = reply.properties.correlation_id().as_ref();
        let call = id.and_then(|id| lock(&waiting).remove(id.as_str()));
        let body = String::from_utf8_lossy(&reply.data).into_owned();
        let is_error = reply.properties.kind().as_ref().map(|kind| kind.as_str()) == Some("error");
        if let Some(call) = call {
            let _ = call.send(match is_error {
                true => Err(anyhow!("the server says: {body}")),
                false => Ok(body),
            });
        }
    };
    // All who wait are told; no more replies come.
    for (_, call) in lock(&waiting).drain() {
        let _ = call.send(Err(anyhow!("{reason}")));
    }
}

fn lock(waiting: &Waiting) -> std::sync::MutexGuard<'_, HashMap<String, oneshot::Sender<Reply>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}
