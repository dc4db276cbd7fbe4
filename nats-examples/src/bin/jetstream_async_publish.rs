//! Publish fast and miss no failure: a window of acks in flight
//!
//! Stores 5000 messages twice: awaiting each ack before the next message, and with up to 256 acks in flight. Each
//! message has an id, so one whose ack is lost is sent again without being stored twice: exactly once in the stream,
//! within its window of two minutes. A message that the server refuses is reported, and stops nothing.
//!
//! ```console
//! $ cargo lab run jetstream_async_publish
//! one by one: 5000 acknowledged, [..] sent again, 1 refused, [..] messages/s
//! 256 in flight: 5000 acknowledged, [..] sent again, 1 refused, [..] messages/s
//! [..] times as fast
//! in the stream: 10000
//! ```
//!
//! Notice: one by one, each message waits for the way to the server and back; in a network that is all it does.
//! Publishing without awaiting any ack is faster still, and loses what is refused or under way when the connection
//! breaks. With acks in flight, a message that is sent again may be stored after later ones: where order counts, await
//! each, or let the server check it (jetstream_dedup).
//!
//! Try: `cargo lab kill nats` in the middle of 1000000, then `cargo lab restart nats`. Make the window 1, or 5000.
//!
//! Settings: NATS_URL (nats://localhost:4222); the arguments are the number of messages (5000) and the window (256).
//! See also: jetstream_stream, jetstream_dedup, nats_reconnect.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::Config;
use async_nats::jetstream::{self, Context};
use futures::{StreamExt, stream};
use tokio::time::sleep;

const STREAM: &str = "ASYNC_PUBLISH";
const SUBJECT: &str = "async-publish.readings";
const LARGEST: usize = 1024;
/// Together far less than the stream's window for message ids.
const TRIES: u32 = 20;
const ACK_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Default)]
struct Outcome {
    acknowledged: u32,
    sent_again: u32,
    refused: u32,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let mut args = std::env::args().skip(1);
    let mut number = |default: u32| args.next().map_or(Ok(default), |text| text.parse());
    let count = number(5000).context("the first argument is a number of messages")?;
    let window = number(256).context("the second argument is a number of acks in flight")?;
    ensure!(window > 0, "a window of 0 lets nothing through");
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    let mut jetstream = jetstream::new(client);
    jetstream.set_timeout(ACK_TIMEOUT);
    let mut stream = jetstream
        .get_or_create_stream(Config {
            name: STREAM.into(),
            subjects: vec![SUBJECT.into()],
            max_message_size: i32::try_from(LARGEST)?,
            duplicate_window: Duration::from_secs(120),
            ..Default::default()
        })
        .await?;
    stream.purge().await?;
    // The ids of an earlier run are still remembered, so they must differ from ours.
    let run = stream.info().await?.state.last_sequence;

    let slow = publish_all(&jetstream, &format!("{run}-slow"), count, 1, "one by one").await?;
    let label = format!("{window} in flight");
    let fast = publish_all(
        &jetstream,
        &format!("{run}-fast"),
        count,
        window as usize,
        &label,
    )
    .await?;
    println!("{:.1} times as fast", fast / slow);
    println!("in the stream: {}", stream.info().await?.state.messages);
    Ok(())
}

/// Returns the rate.
async fn publish_all(
    jetstream: &Context,
    run: &str,
    count: u32,
    window: usize,
    label: &str,
) -> anyhow::Result<f64> {
    let started = Instant::now();
    let mut outcome = Outcome::default();
    // One more, and that one is too large for the stream.
    let mut sends = stream::iter(0..=count)
        .map(|number| {
            let payload = vec![b'x'; if number == count { LARGEST + 1 } else { 100 }];
            publish(jetstream, format!("{run}-{number}"), payload)
        })
        .buffer_unordered(window);
    while let Some(sent) = sends.next().await {
        let sent = sent?;
        outcome.sent_again += sent.again;
        match sent.refused {
            None => outcome.acknowledged += 1,
            Some(reason) => {
                eprintln!("{}: refused: {reason}", sent.id);
                outcome.refused += 1;
            }
        }
    }
    let rate = f64::from(count) / started.elapsed().as_secs_f64();
    let Outcome {
        acknowledged,
        sent_again,
        refused,
    } = outcome;
    println!(
        "{label}: {acknowledged} acknowledged, {sent_again} sent again, {refused} refused, {rate:.0} messages/s"
    );
    Ok(rate)
}

struct Sent {
    id: String,
    again: u32,
    refused: Option<String>,
}

/// Until there is an ack or a refusal. An error means that after many tries neither is known.
async fn publish(jetstream: &Context, id: String, payload: Vec<u8>) -> anyhow::Result<Sent> {
    let mut again = 0;
    loop {
        let message = PublishMessage::build()
            .message_id(&id)
            .payload(payload.clone().into());
        let ack = match jetstream.send_publish(SUBJECT, message).await {
            Ok(ack) => ack.await,
            Err(error) => Err(error),
        };
        let error = match ack {
            Ok(_) => {
                return Ok(Sent {
                    id,
                    again,
                    refused: None,
                });
            }
            Err(error) => error,
        };
        match error.kind() {
            // Lost connections end in a timeout. A server that is just back has no streams yet for a moment.
            PublishErrorKind::TimedOut
            | PublishErrorKind::BrokenPipe
            | PublishErrorKind::StreamNotFound
                if again < TRIES =>
            {
                again += 1;
                sleep(Duration::from_millis(200)).await;
            }
            PublishErrorKind::Other | PublishErrorKind::MaxPayloadExceeded => {
                let refused = Some(error.to_string());
                return Ok(Sent { id, again, refused });
            }
            _ => {
                return Err(error)
                    .with_context(|| format!("{id}: no ack, it may be stored or not"));
            }
        }
    }
}
