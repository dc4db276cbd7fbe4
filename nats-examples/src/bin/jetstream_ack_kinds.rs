//! Four answers to a message, and what comes of giving none
//!
//! Stores five messages and answers each in another way: ack, nak with a delay, in progress, term, and silence. The
//! consumer's info tells what the server makes of it. At least once: only ack and term end a message's deliveries, and
//! term means that nobody will process it.
//!
//! ```console
//! $ cargo lab run jetstream_ack_kinds
//! ack wait 5 s, at most 5 deliveries
//! ack: delivery 1, done
//! nak: delivery 1, wanted again in 500 ms
//! nak: delivery 2 after [..] ms, done
//! progress: delivery 1, works for 6 s and says so every second
//! progress: done after [..] ms
//! term: delivery 1, never again
//! silence: delivery 1, no answer
//! silence: delivery 2 after [..] ms, done
//! 5 messages in 7 deliveries; unacknowledged 0, to come 0
//! ```
//!
//! Notice: a nak without a delay comes back at once, which for a message that can't be processed is a hot loop. A nak
//! does not follow the `backoff` of the consumer either: that is for silence. The ack wait runs from the delivery, and
//! not from the moment when the program looks at the message. After `max_deliver` deliveries the message stays in the
//! stream, and is never delivered again: see jetstream_retry_dlq for what to do about it.
//!
//! Try: leave out the progress: delivery 2 comes while delivery 1 is being worked on.
//!
//! Settings: NATS_URL (nats://localhost:4222). See also: jetstream_consumer, jetstream_retry_dlq.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::{self, AckKind, Message, stream};
use futures::StreamExt;
use tokio::time::{sleep, timeout};

const STREAM: &str = "ACK_KINDS";
const ACK_WAIT: Duration = Duration::from_secs(5);
const DELAY: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    let jetstream = jetstream::new(client);
    let mut stream = jetstream
        .get_or_create_stream(stream::Config {
            name: STREAM.into(),
            subjects: vec!["ack-kinds.*".into()],
            ..Default::default()
        })
        .await?;
    // An earlier run may have been stopped in the middle.
    stream.purge().await?;
    let before = stream.info().await?.state.last_sequence;
    let mut consumer = stream
        .create_consumer(pull::Config {
            ack_wait: ACK_WAIT,
            max_deliver: 5,
            inactive_threshold: Duration::from_secs(60),
            ..Default::default()
        })
        .await?;
    println!("ack wait 5 s, at most 5 deliveries");
    let mut messages = consumer
        .stream()
        .max_messages_per_batch(1)
        .messages()
        .await?;
    for kind in ["ack", "nak", "progress", "term", "silence"] {
        jetstream
            .publish(format!("ack-kinds.{kind}"), kind.into())
            .await?
            .await?;
        let message = next(&mut messages, kind).await?;
        let since = Instant::now();
        match kind {
            "nak" => {
                println!("nak: delivery 1, wanted again in {} ms", DELAY.as_millis());
                answer(&message, AckKind::Nak(Some(DELAY))).await?;
                second(&mut messages, kind, since).await?;
            }
            "progress" => {
                println!("progress: delivery 1, works for 6 s and says so every second");
                for _ in 0..6 {
                    sleep(Duration::from_secs(1)).await;
                    answer(&message, AckKind::Progress).await?;
                }
                answer(&message, AckKind::Ack).await?;
                println!("progress: done after {} ms", since.elapsed().as_millis());
            }
            "term" => {
                println!("term: delivery 1, never again");
                answer(&message, AckKind::Term).await?;
            }
            "silence" => {
                println!("silence: delivery 1, no answer");
                second(&mut messages, kind, since).await?;
            }
            _ => {
                println!("ack: delivery 1, done");
                answer(&message, AckKind::Ack).await?;
            }
        }
    }
    let info = consumer.info().await?;
    println!(
        "{} messages in {} deliveries; unacknowledged {}, to come {}",
        info.delivered.stream_sequence - before,
        info.delivered.consumer_sequence,
        info.num_ack_pending,
        info.num_pending
    );
    Ok(())
}

/// The next message, which must be the one that is waited for: a delivery too many would be noticed here.
async fn next(messages: &mut pull::Stream, kind: &str) -> anyhow::Result<Message> {
    let message = timeout(PATIENCE, messages.next()).await;
    let message = message.with_context(|| format!("{kind} does not come"))?;
    let message = message.context("the client closed the subscription")??;
    ensure!(
        message.payload == kind,
        "{} comes instead of {kind}",
        String::from_utf8_lossy(&message.payload)
    );
    Ok(message)
}

async fn second(messages: &mut pull::Stream, kind: &str, since: Instant) -> anyhow::Result<()> {
    let message = next(messages, kind).await?;
    let after = since.elapsed().as_millis();
    let delivery = message.info().map_err(anyhow::Error::from_boxed)?.delivered;
    answer(&message, AckKind::Ack).await?;
    println!("{kind}: delivery {delivery} after {after} ms, done");
    Ok(())
}

/// Waits until the server has the answer.
async fn answer(message: &Message, kind: AckKind) -> anyhow::Result<()> {
    let answered = message.double_ack_with(kind).await;
    answered.map_err(anyhow::Error::from_boxed)
}
