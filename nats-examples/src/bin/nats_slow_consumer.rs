//! Slow consumer: see the loss, count it, and avoid it
//!
//! A subscription has a buffer in the client, for 65,536 messages by default. When it is full, what comes next is
//! dropped, and no call returns an error. This program lets one fill up, three times: with a small buffer, with one
//! that fits the burst, and with a JetStream consumer, which asks for messages when it has room for them.
//!
//! ```console
//! $ cargo lab run nats_slow_consumer
//! a buffer of 100: sent 1000, received 100, lost 900
//!     event: slow consumer
//!     gap: after message 100 came 1001
//! a buffer of 2000: sent 1000, received 1000, lost 0
//! JetStream: sent 1000, received 1000, lost 0
//! ```
//!
//! Notice: there are two signs of a loss, and both must be looked for. The event `SlowConsumer` says that it happens
//! now; it is not a count, for the client drops events, too, when there are too many. A number in each message shows
//! gaps, but only when a later message comes: 900 were gone, and nothing but message 1001 shows it. A bigger buffer
//! covers a burst, never a consumer that is slower than its publisher in the long run. The server has a limit, too: it
//! disconnects a client that does not read its socket.
//!
//! Try: make the buffer 1: the client still hands out one message of a thousand, in order.
//!
//! Settings: NATS_URL (nats://localhost:4222). See also: nats_subscribe, jetstream_consumer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use async_nats::jetstream::{self, consumer, stream};
use async_nats::{Client, ConnectOptions, Event, RequestErrorKind};
use futures::StreamExt;
use tokio::time::timeout;

const SUBJECT: &str = "slow.readings";
const STREAM: &str = "SLOW_READINGS";
const STORED: &str = "slow.stored";
const BURST: u64 = 1000;
const EMPTY: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let publisher = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    core(&url, &publisher, 100).await?;
    core(&url, &publisher, 2000).await?;
    persistent(&publisher).await
}

async fn core(url: &str, publisher: &Client, capacity: usize) -> anyhow::Result<()> {
    let slow = Arc::new(AtomicU64::new(0));
    let noted = slow.clone();
    let subscriber = ConnectOptions::new()
        // For each subscription of this client.
        .subscription_capacity(capacity)
        .event_callback(move |event| {
            let noted = noted.clone();
            async move {
                if let Event::SlowConsumer(_) = event {
                    noted.fetch_add(1, Ordering::Relaxed);
                }
            }
        })
        .connect(url)
        .await?;
    // Of this run alone: with the readings of another one, nothing here would add up.
    let subject = format!("{SUBJECT}.{}", subscriber.new_inbox());
    let mut readings = subscriber.subscribe(subject.clone()).await?;
    await_server(&subscriber).await?;

    for number in 1..=BURST {
        publisher
            .publish(subject.clone(), number.to_string().into())
            .await?;
    }
    // First the server has all of it, then this client has all of it, and the consumer has not looked once.
    await_server(publisher).await?;
    await_server(&subscriber).await?;

    // Now it reads. All that was kept is in the buffer, thus this wait is over only when the buffer is empty.
    let (mut received, mut last) = (0, 0);
    while let Ok(reading) = timeout(EMPTY, readings.next()).await {
        last = number(
            &reading
                .context("the client closed the subscription")?
                .payload,
        )?;
        received += 1;
    }
    let lost = BURST.saturating_sub(received);
    println!("a buffer of {capacity}: sent {BURST}, received {received}, lost {lost}");
    if slow.load(Ordering::Relaxed) > 0 {
        println!("    event: slow consumer");
    }

    let after = BURST + 1;
    publisher.publish(subject, after.to_string().into()).await?;
    let reading = timeout(PATIENCE, readings.next()).await?;
    let next = number(
        &reading
            .context("the client closed the subscription")?
            .payload,
    )?;
    if next != last + 1 {
        println!("    gap: after message {last} came {next}");
    }
    Ok(())
}

/// The same burst, stored: what the consumer has no room for waits in the stream.
async fn persistent(client: &Client) -> anyhow::Result<()> {
    let jetstream = jetstream::new(client.clone());
    jetstream
        .create_or_update_stream(stream::Config {
            name: STREAM.into(),
            subjects: vec![format!("{STORED}.>")],
            max_age: Duration::from_secs(60),
            ..Default::default()
        })
        .await?;
    let stream = jetstream.get_stream(STREAM).await?;
    let subject = format!("{STORED}.{}", client.new_inbox());
    let consumer = stream
        .create_consumer(consumer::pull::Config {
            filter_subject: subject.clone(),
            // It has no name to come back to: the server removes it after this time without a client.
            inactive_threshold: Duration::from_secs(60),
            ..Default::default()
        })
        .await?;
    let mut acks = Vec::new();
    for number in 1..=BURST {
        let reading = number.to_string().into();
        acks.push(jetstream.publish(subject.clone(), reading).await?);
    }
    for ack in acks {
        ack.await?;
    }
    let mut messages = consumer
        .stream()
        .max_messages_per_batch(100)
        .messages()
        .await?;
    let (mut received, mut last) = (0, 0);
    while last < BURST {
        let message = timeout(PATIENCE, messages.next()).await?;
        let message = message.context("the client closed the subscription")??;
        let next = number(&message.payload)?;
        ensure!(next == last + 1, "after message {last} came {next}");
        last = next;
        received += 1;
        message.ack().await.map_err(anyhow::Error::from_boxed)?;
    }
    let lost = BURST - received;
    println!("JetStream: sent {BURST}, received {received}, lost {lost}");
    Ok(())
}

fn number(payload: &[u8]) -> anyhow::Result<u64> {
    let text = std::str::from_utf8(payload)?;
    text.parse()
        .with_context(|| format!("not a number: {text:?}"))
}

/// Returns when the server has read all that this client has sent, and this client all that came before the answer.
async fn await_server(client: &Client) -> anyhow::Result<()> {
    // Nobody subscribes to a new inbox, and the server says so, in order with everything else.
    match client.request(client.new_inbox(), "".into()).await {
        Err(error) if error.kind() == RequestErrorKind::NoResponders => Ok(()),
        Err(error) => Err(error).context("the server does not answer"),
        Ok(_) => Ok(()),
    }
}
