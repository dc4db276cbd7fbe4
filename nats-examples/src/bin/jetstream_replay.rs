//! Read a stream again: from a sequence, from a time, the last per subject; with an ordered consumer
//!
//! A stream keeps what it was given, read or not, so any reader can begin anywhere. An ordered consumer is made for
//! that: in order, without gaps, without acks and without a position on the server. When a message is missing or the
//! server was away, the client makes a new one that begins where the last ended.
//!
//! ```console
//! $ cargo lab run jetstream_replay
//! stored 9 readings of 3 sensors
//! all of them: a1 b1 c1 a2 b2 c2 a3 b3 c3
//! from sequence 7: a3 b3 c3
//! from the time of b2: b2 c2 a3 b3 c3
//! only sensor a: a1 a2 a3
//! the last of each sensor: a3 b3 c3
//! the last of sensor b, without a consumer: b3
//! $ cargo lab run jetstream_replay
//! stored 9 readings of 3 sensors
//! ...
//! ```
//!
//! Notice: "the end" is what there was when the reader looked: each message says how many are to come after it, and
//! a consumer that begins at an empty place must be asked before. A loop over the messages never ends by itself.
//! Reading again takes nothing away from other consumers. For work that has to be done exactly by somebody, a durable
//! consumer is right, with acks: see jetstream_consumer.
//!
//! Try: start `follow` in one terminal, run this in another, restart the server, run this again: `follow` goes on
//! behind the last reading that it has seen. (This empties the stream first: what nobody has read by then is gone.)
//!
//! Settings: NATS_URL (nats://localhost:4222); the argument `follow` goes on behind the end. See also: kafka_replay,
//! jetstream_consumer.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context as _, bail};
use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use async_nats::jetstream::stream::{Config, Stream};
use async_nats::jetstream::{self, Context};
use futures::StreamExt;
use tokio::time::{sleep, timeout};

const STREAM: &str = "REPLAY";
const ALL: &str = "replay.sensor.>";
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    let jetstream = jetstream::new(client);
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => show(&jetstream).await,
        ["follow"] => follow(&declare(&jetstream).await?).await,
        _ => bail!("usage: jetstream_replay [follow]"),
    }
}

async fn declare(jetstream: &Context) -> anyhow::Result<Stream> {
    let config = Config {
        name: STREAM.into(),
        subjects: vec![ALL.into()],
        // For reads without a consumer.
        allow_direct: true,
        ..Default::default()
    };
    Ok(jetstream.get_or_create_stream(config).await?)
}

async fn show(jetstream: &Context) -> anyhow::Result<()> {
    let stream = declare(jetstream).await?;
    stream.purge().await?;
    let mut sequences = Vec::new();
    for number in 1..=3 {
        for sensor in ["a", "b", "c"] {
            let reading = format!("{sensor}{number}").into();
            let ack = jetstream
                .publish(format!("replay.sensor.{sensor}"), reading)
                .await?
                .await?;
            sequences.push(ack.sequence);
        }
    }
    println!("stored {} readings of 3 sensors", sequences.len());

    println!(
        "all of them: {}",
        read(&stream, ALL, DeliverPolicy::All).await?
    );
    // A sequence of the stream, not a count; where the stream begins depends on what it has dropped.
    let seventh = DeliverPolicy::ByStartSequence {
        start_sequence: sequences[6],
    };
    println!("from sequence 7: {}", read(&stream, ALL, seventh).await?);
    // The server's time, at which it stored the message. The publisher's clock plays no part in it.
    let b2 = stream.get_raw_message(sequences[4]).await?;
    let since = DeliverPolicy::ByStartTime {
        start_time: b2.time,
    };
    println!("from the time of b2: {}", read(&stream, ALL, since).await?);
    println!(
        "only sensor a: {}",
        read(&stream, "replay.sensor.a", DeliverPolicy::All).await?
    );
    let last = DeliverPolicy::LastPerSubject;
    println!(
        "the last of each sensor: {}",
        read(&stream, ALL, last).await?
    );
    let b = stream
        .direct_get_last_for_subject("replay.sensor.b")
        .await?;
    println!(
        "the last of sensor b, without a consumer: {}",
        String::from_utf8_lossy(&b.payload)
    );
    Ok(())
}

/// Up to the end as it is now.
async fn read(stream: &Stream, filter: &str, from: DeliverPolicy) -> anyhow::Result<String> {
    let consumer = stream
        .create_consumer(pull::OrderedConfig {
            filter_subject: filter.into(),
            deliver_policy: from,
            ..Default::default()
        })
        .await?;
    let mut readings = Vec::new();
    if consumer.cached_info().num_pending > 0 {
        let mut messages = consumer.messages().await?;
        loop {
            let message = timeout(PATIENCE, messages.next()).await;
            let message = message.context("the server is silent")?;
            let message = message.context("the client closed the subscription")??;
            readings.push(String::from_utf8_lossy(&message.payload).into_owned());
            if message.info().map_err(anyhow::Error::from_boxed)?.pending == 0 {
                break;
            }
        }
    }
    Ok(readings.join(" "))
}

async fn follow(stream: &Stream) -> anyhow::Result<()> {
    println!("following {ALL}; Ctrl-C to stop");
    let (mut next, mut count) = (1, 0);
    let mut stop = pin!(tokio::signal::ctrl_c());
    'follow: loop {
        // Behind the last one seen: after an outage the client does this by itself. When even that fails, we do.
        let from = DeliverPolicy::ByStartSequence {
            start_sequence: next,
        };
        let config = pull::OrderedConfig {
            filter_subject: ALL.into(),
            deliver_policy: from,
            ..Default::default()
        };
        match stream.create_consumer(config).await {
            Ok(consumer) => {
                let mut messages = consumer.messages().await?;
                loop {
                    let message = tokio::select! {
                        // Polled first: only then is Ctrl-C ours, also during the first piece of work.
                        biased;
                        signal = &mut stop => break 'follow signal?,
                        message = messages.next() => message,
                    };
                    match message {
                        Some(Ok(message)) => {
                            let info = message.info().map_err(anyhow::Error::from_boxed)?;
                            println!("{}", String::from_utf8_lossy(&message.payload));
                            next = info.stream_sequence + 1;
                            count += 1;
                        }
                        Some(Err(error)) => {
                            eprintln!("waiting for the server: {error}");
                            break;
                        }
                        None => break,
                    }
                }
            }
            Err(error) => eprintln!("waiting for the server: {error}"),
        }
        tokio::select! {
            signal = &mut stop => break signal?,
            () = sleep(Duration::from_secs(1)) => {}
        }
    }
    println!("stopped after {count} readings");
    Ok(())
}
