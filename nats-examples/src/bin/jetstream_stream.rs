//! A stream: acknowledged publishing, and what happens to the oldest order when it is full
//!
//! Declares `ORDERS` for `orders.*` with at most 1000 messages, and stores orders. At least once from here to the
//! stream: an order counts as stored when its ack is here, and without one it may be stored or not. A full stream drops
//! its oldest message, processed or not, unless it is told to refuse new ones.
//!
//! ```console
//! $ cargo lab run jetstream_stream
//! ORDERS takes orders.*, keeps 1000, discards old
//! orders.created order-1: stored in ORDERS as 1
//! orders.created order-2: stored in ORDERS as 2
//! orders.eu.created: no stream takes it, no ack
//! stored 1000 more: ORDERS holds 1000, from 3 to 1002
//! a consumer that starts now begins with 3: 2 are gone, processed or not
//! create_stream with discard new: refused, [..]
//! create_or_update_stream with discard new: done
//! order-1003: refused, maximum messages exceeded (code [..])
//! ORDERS holds 1000, from 3 to 1002
//! ORDERS is emptied, and discards old again
//! $ cargo lab run jetstream_stream
//! ORDERS takes orders.*, keeps 1000, discards old
//! orders.created order-1: stored in ORDERS as 1003
//! ...
//! ```
//!
//! Notice: `publish` has two awaits. The first puts the message into the client's buffer, the second waits for the ack;
//! without it, the order to `orders.eu.created` would be lost without a word. `discard new` is for orders that matter:
//! the publisher then has to cope with a refusal. Work-queue retention, which drops what is acknowledged, keeps a
//! stream from filling up with what is done. `create_stream` is for programs that must agree on a configuration, and
//! fails when it differs; `create_or_update_stream` lets the last one win.
//!
//! Try: start jetstream_consumer before the last line: what it has not fetched yet is purged under it.
//!
//! Settings: NATS_URL (nats://localhost:4222). See also: jetstream_consumer, jetstream_work_queue, jetstream_dedup.

use std::time::Duration;

use anyhow::{Context as _, bail};
use async_nats::jetstream::context::{CreateStreamErrorKind, PublishErrorKind};
use async_nats::jetstream::stream::{Config, DiscardPolicy, Stream};
use async_nats::jetstream::{self, Context};

const LIMIT: i64 = 1000;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    let mut jetstream = jetstream::new(client);
    // For the answers of the server and for acks. Without a server they are awaited for this long.
    jetstream.set_timeout(PATIENCE);

    jetstream
        .create_or_update_stream(orders(DiscardPolicy::Old))
        .await
        .context("cannot declare ORDERS; is JetStream on?")?;
    let mut stream = jetstream.get_stream("ORDERS").await?;
    println!("ORDERS takes orders.*, keeps {LIMIT}, discards old");
    let state = &stream.info().await?.state;
    // What an earlier run has left is counted on.
    if state.messages > 0 {
        println!("ORDERS holds {} from before", state.messages);
    }
    let oldest = if state.messages > 0 {
        state.first_sequence
    } else {
        state.last_sequence + 1
    };

    for order in ["order-1", "order-2"] {
        let ack = jetstream
            .publish("orders.created", order.into())
            .await?
            .await;
        let ack = ack.with_context(|| format!("{order}: no ack, it may be stored or not"))?;
        println!(
            "orders.created {order}: stored in {} as {}",
            ack.stream, ack.sequence
        );
    }
    // One token too many for orders.*.
    match jetstream
        .publish("orders.eu.created", "order".into())
        .await?
        .await
    {
        Err(error) if error.kind() == PublishErrorKind::StreamNotFound => {
            println!("orders.eu.created: no stream takes it, no ack");
        }
        Err(error) => return Err(error).context("orders.eu.created: no ack"),
        Ok(ack) => bail!(
            "orders.eu.created: another stream, {}, takes it",
            ack.stream
        ),
    }

    fill(&jetstream).await?;
    let first = report(&mut stream, &format!("stored {LIMIT} more: ")).await?;
    let gone = first - oldest.min(first);
    println!("a consumer that starts now begins with {first}: {gone} are gone, processed or not");

    // The same name with another configuration.
    match jetstream.create_stream(orders(DiscardPolicy::New)).await {
        Err(error) if matches!(error.kind(), CreateStreamErrorKind::JetStream(_)) => {
            println!("create_stream with discard new: refused, {error}");
        }
        Err(error) => return Err(error).context("the server does not answer"),
        Ok(_) => bail!("ORDERS has been deleted meanwhile"),
    }
    jetstream
        .create_or_update_stream(orders(DiscardPolicy::New))
        .await?;
    println!("create_or_update_stream with discard new: done");
    match jetstream
        .publish("orders.created", "order-1003".into())
        .await?
        .await
    {
        Err(error) if error.kind() == PublishErrorKind::Other => {
            println!("order-1003: refused, {}", reason(&error));
        }
        Err(error) => return Err(error).context("order-1003: no ack"),
        Ok(_) => bail!("somebody made room in ORDERS meanwhile"),
    }
    report(&mut stream, "").await?;

    jetstream
        .create_or_update_stream(orders(DiscardPolicy::Old))
        .await?;
    stream.purge().await?;
    println!("ORDERS is emptied, and discards old again");
    Ok(())
}

fn orders(discard: DiscardPolicy) -> Config {
    Config {
        name: "ORDERS".into(),
        subjects: vec!["orders.*".into()],
        max_messages: LIMIT,
        discard,
        ..Default::default()
    }
}

/// A window of acks: all are awaited, but not one by one.
async fn fill(jetstream: &Context) -> anyhow::Result<()> {
    let mut acks = Vec::new();
    for number in 3..3 + LIMIT {
        let order = format!("order-{number}");
        acks.push(jetstream.publish("orders.created", order.into()).await?);
    }
    for ack in acks {
        ack.await
            .context("no ack: some orders may be stored or not")?;
    }
    Ok(())
}

/// Returns the first sequence that is still there.
async fn report(stream: &mut Stream, what: &str) -> anyhow::Result<u64> {
    let state = &stream.info().await?.state;
    let (first, last) = (state.first_sequence, state.last_sequence);
    println!(
        "{what}ORDERS holds {}, from {first} to {last}",
        state.messages
    );
    Ok(first)
}

/// What the server says, without the words around it.
fn reason(error: &(dyn std::error::Error + 'static)) -> String {
    match error.source() {
        Some(source) => reason(source),
        None => error.to_string(),
    }
}
