//! Schema: the broker knows the shape of the messages, and refuses a producer that would break the readers
//!
//! A producer brings its schema, and the broker compares it with those before, by the strategy of the namespace:
//! BACKWARD means that who knows the new one can read what the old ones wrote. A field with a default may come; a
//! field may not change its type.
//!
//! ```console
//! 1$ cargo lab run pulsar_schema
//! subscribed; Ctrl-C to stop
//! 2$ cargo lab run pulsar_schema send v1
//! v1: stored order-1
//! 2$ cargo lab run pulsar_schema send v2
//! v2: stored order-2
//! 2$ cargo lab run pulsar_schema send incompatible
//! [exit 1]
//! 1:
//! order-1: 4999 EUR, schema version 0
//! order-2: 4999 USD, schema version 1
//! 1^C
//! closed; orders: 2
//! ```
//!
//! Notice: for JSON, too, the broker wants the schema as an Avro record. It compares schemas and never looks at a
//! message: a program may bring the right schema and send anything, so the reader still has to expect it (try `send
//! rubbish`). The client writes neither the schema nor the messages by itself: here a constant and a struct have to
//! agree, and a test is what keeps them together. A producer without a schema is let in unless the namespace enforces
//! validation. In a batch, all messages have the producer's version.
//!
//! Try: set the strategy to ALWAYS_COMPATIBLE, and see what the reader makes of `incompatible`.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650), PULSAR_ADMIN_URL (http://localhost:8080). See also:
//! pulsar_consumer.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail};
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::InitialPosition;
use pulsar::message::proto::{Schema, schema};
use pulsar::{Consumer, ConsumerOptions, ProducerOptions, Pulsar, SubType, TokioExecutor};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::timeout;

const NAMESPACE: &str = "public/schema-example";
const TOPIC: &str = "persistent://public/schema-example/orders";
const SUBSCRIPTION: &str = "schema-reader";
const PATIENCE: Duration = Duration::from_secs(5);
/// For the admin interface.
const ANSWER: Duration = Duration::from_secs(30);

const V1: &str = r#"{"type": "record", "name": "Order", "fields": [
    {"name": "order_id", "type": "string"},
    {"name": "cents", "type": "long"}]}"#;
const V2: &str = r#"{"type": "record", "name": "Order", "fields": [
    {"name": "order_id", "type": "string"},
    {"name": "cents", "type": "long"},
    {"name": "currency", "type": "string", "default": "EUR"}]}"#;
const INCOMPATIBLE: &str = r#"{"type": "record", "name": "Order", "fields": [
    {"name": "order_id", "type": "string"},
    {"name": "cents", "type": "string"}]}"#;

/// The reader knows the newest version. The default stands in the schema for the broker, and here for the program.
#[derive(Deserialize)]
struct Order {
    order_id: String,
    cents: i64,
    #[serde(default = "euro")]
    currency: String,
}

fn euro() -> String {
    "EUR".into()
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let admin =
        std::env::var("PULSAR_ADMIN_URL").unwrap_or_else(|_| "http://localhost:8080".into());
    set_up(&admin).await?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => consume(&pulsar, &address).await,
        ["send", "v1"] => {
            send(
                &pulsar,
                "v1",
                V1,
                json!({"order_id": "order-1", "cents": 4999}),
            )
            .await
        }
        ["send", "v2"] => {
            let order = json!({"order_id": "order-2", "cents": 4999, "currency": "USD"});
            send(&pulsar, "v2", V2, order).await
        }
        ["send", "incompatible"] => {
            let order = json!({"order_id": "order-3", "cents": "much"});
            send(&pulsar, "incompatible", INCOMPATIBLE, order).await
        }
        ["send", "rubbish"] => send(&pulsar, "rubbish", V2, json!({"order_id": 4})).await,
        _ => bail!("usage: pulsar_schema [send v1 | v2 | incompatible | rubbish]"),
    }
}

/// A namespace of its own, since the strategy is the namespace's.
async fn set_up(admin: &str) -> anyhow::Result<()> {
    let strategy = format!("namespaces/{NAMESPACE}/schemaCompatibilityStrategy");
    for (path, body) in [
        (format!("namespaces/{NAMESPACE}"), None),
        (strategy, Some(json!("BACKWARD"))),
    ] {
        let url = format!("{admin}/admin/v2/{path}");
        let mut request = reqwest::Client::new()
            .request(Method::PUT, &url)
            .timeout(ANSWER);
        if let Some(body) = &body {
            request = request.json(body);
        }
        let answer = request
            .send()
            .await
            .with_context(|| format!("cannot ask {url}"))?;
        let status = answer.status();
        if !status.is_success() && status != StatusCode::CONFLICT {
            bail!("{url}: {status}: {}", answer.text().await?);
        }
    }
    Ok(())
}

fn schema(definition: &str) -> Schema {
    Schema {
        name: "Order".into(),
        schema_data: definition.into(),
        r#type: schema::Type::Json.into(),
        ..Schema::default()
    }
}

async fn send(
    pulsar: &Pulsar<TokioExecutor>,
    version: &str,
    definition: &str,
    order: Value,
) -> anyhow::Result<()> {
    let options = ProducerOptions {
        schema: Some(schema(definition)),
        ..ProducerOptions::default()
    };
    let builder = pulsar.producer().with_topic(TOPIC).with_options(options);
    // The first one makes the topic and stores the schema, on a broker that may be starting.
    let producer = timeout(4 * PATIENCE, builder.build())
        .await
        .context("no answer")?;
    let mut producer =
        producer.with_context(|| format!("the broker refuses the schema {version}"))?;
    let receipt = producer.send_non_blocking(order.to_string()).await?;
    timeout(PATIENCE, receipt)
        .await
        .context("no receipt; send again")??;
    producer.close().await?;
    println!(
        "{version}: stored {}",
        order["order_id"].as_str().unwrap_or("something")
    );
    Ok(())
}

async fn consume(pulsar: &Pulsar<TokioExecutor>, address: &str) -> anyhow::Result<()> {
    // Without a schema of its own, so that it may start before any producer has brought one.
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(20);
    let mut consumer: Consumer<Vec<u8>, _> = pulsar
        .consumer()
        .with_topic(TOPIC)
        .with_subscription(SUBSCRIPTION)
        .with_subscription_type(SubType::Failover)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(10)
        .with_options(options)
        .build()
        .await?;
    println!("subscribed; Ctrl-C to stop");
    let mut orders = 0;
    let mut kept = false;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let message = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            message = consumer.try_next() => message?.with_context(|| format!("lost the connection to {address}"))?,
        };
        let version = match message
            .metadata()
            .schema_version
            .as_deref()
            .map(TryInto::try_into)
        {
            Some(Ok(bytes)) => format!("schema version {}", i64::from_be_bytes(bytes)),
            _ => "no schema".into(),
        };
        match serde_json::from_slice(&message.payload.data) {
            Ok(Order {
                order_id,
                cents,
                currency,
            }) => {
                orders += 1;
                println!("{order_id}: {cents} {currency}, {version}");
            }
            Err(error) => {
                kept = true;
                println!("not an order, kept in the backlog ({version}): {error}");
            }
        }
        // Left without an ack, it stays in the backlog, and with it the batch that it came in.
        if last_of_batch(&message) && !std::mem::take(&mut kept) {
            consumer.ack(&message).await?;
        }
    }
    close(consumer).await?;
    println!("closed; orders: {orders}");
    Ok(())
}

/// To the broker a batch is one entry, and the ack of one of its messages is the ack of all: only the last may be
/// acknowledged. A message that came alone is the last.
fn last_of_batch<T>(message: &pulsar::consumer::Message<T>) -> bool {
    let index = message.message_id().batch_index.unwrap_or_default();
    let size = message.message_id.batch_size;
    size.is_none_or(|size| index + 1 >= size)
}

/// Gives back what was fetched ahead: while its queue is full, the client's close waits for the client itself. A batch
/// comes whole, however small the queue is: its rest is taken, and if there is yet another, all is tried again.
async fn close(mut consumer: Consumer<Vec<u8>, TokioExecutor>) -> anyhow::Result<()> {
    let closed = async {
        loop {
            let mut whole = true;
            while let Some(Ok(message)) = match whole {
                true => consumer.next().now_or_never().flatten(),
                false => consumer.next().await,
            } {
                whole = last_of_batch(&message);
            }
            if let Ok(closed) = timeout(PATIENCE / 10, consumer.close()).await {
                return closed;
            }
        }
    };
    timeout(PATIENCE, closed)
        .await
        .context("the last acks may not have arrived: no answer to the close")??;
    Ok(())
}

/// Left alone, the client retries for more than a minute, in silence.
async fn connect(address: &str) -> anyhow::Result<Pulsar<TokioExecutor>> {
    let client = Pulsar::builder(address, TokioExecutor).build();
    let connected = timeout(PATIENCE, client).await;
    Ok(connected.with_context(|| {
        format!("no Pulsar broker answers at {address}; `cargo lab up pulsar` starts one")
    })??)
}
