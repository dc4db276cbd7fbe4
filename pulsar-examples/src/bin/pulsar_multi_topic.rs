//! Pattern subscription: one consumer for all topics whose names match, those to come included
//!
//! The client asks the broker for the topics of a namespace, subscribes to each that matches, and asks again every
//! second. At least once; in order within a topic. A topic that was found late is read from its beginning.
//!
//! ```console
//! 1$ cargo lab run pulsar_multi_topic
//! subscribed; Ctrl-C to stop
//! 2$ cargo lab run pulsar_multi_topic send kitchen 21.5
//! stored in multi-topic-kitchen
//! 1:
//! kitchen: 21.5
//! 2$ cargo lab run pulsar_multi_topic send garden 8.0
//! stored in multi-topic-garden
//! 1:
//! garden: 8.0
//! 1^C
//! closed; topics: 2, readings: 2
//! ```
//!
//! Notice: the client looks for new topics every 30 seconds unless told otherwise, and only while somebody polls the
//! stream. Its pattern is searched for anywhere in the full name: without `^` and `$` it also matches the dead-letter
//! topic of one that was meant. `Earliest` is what makes the first messages of a new topic arrive; until it is found,
//! no subscription holds them, so a namespace whose ledgers roll over often needs a retention, too. Each topic has a
//! queue of its own, so a thousand topics hold a thousand queues. Topics that stop are dropped and found again: such a
//! consumer outlives a restart of the broker, and its stream never ends.
//!
//! Try: kill and restart the broker under it.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650). See also: pulsar_partitioned_topic.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::InitialPosition;
use pulsar::{Consumer, ConsumerOptions, Pulsar, SubType, TokioExecutor};
use regex::Regex;
use tokio::time::timeout;

const PREFIX: &str = "persistent://public/default/multi-topic-";
const SUBSCRIPTION: &str = "multi-topic-display";
const REFRESH: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => consume(&pulsar).await,
        ["send", room, reading] => send(&pulsar, room, reading).await,
        _ => bail!("usage: pulsar_multi_topic [send ROOM READING]"),
    }
}

async fn send(pulsar: &Pulsar<TokioExecutor>, room: &str, reading: &str) -> anyhow::Result<()> {
    let plain = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit();
    ensure!(
        room.chars().all(plain),
        "the name of a room is of letters a to z and digits"
    );
    let mut producer = pulsar
        .producer()
        .with_topic(format!("{PREFIX}{room}"))
        .build()
        .await?;
    let receipt = producer.send_non_blocking(reading).await?;
    timeout(PATIENCE, receipt)
        .await
        .context("no receipt; send again")??;
    producer.close().await?;
    println!("stored in multi-topic-{room}");
    Ok(())
}

async fn consume(pulsar: &Pulsar<TokioExecutor>) -> anyhow::Result<()> {
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(20);
    let mut consumer: Consumer<Vec<u8>, _> = pulsar
        .consumer()
        .with_topic_regex(Regex::new(&format!(
            "^{}[a-z0-9]+$",
            regex::escape(PREFIX)
        ))?)
        .with_lookup_namespace("public/default")
        .with_topic_refresh(REFRESH)
        .with_subscription(SUBSCRIPTION)
        .with_subscription_type(SubType::Shared)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(10)
        .with_options(options)
        .build()
        .await?;
    println!("subscribed; Ctrl-C to stop");

    let mut readings = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let message = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            message = consumer.try_next() => message?.context("the stream ended")?,
        };
        let room = message.topic.trim_start_matches(PREFIX);
        println!("{room}: {}", String::from_utf8_lossy(&message.payload.data));
        readings += 1;
        // Fails if the topic's connection was lost in between; then the reading comes again.
        if let Err(error) = consumer.ack(&message).await {
            eprintln!("{room}: not acknowledged: {error}");
        }
    }
    let topics = consumer.topics().len();
    close(consumer).await?;
    println!("closed; topics: {topics}, readings: {readings}");
    Ok(())
}

/// Gives back what was fetched ahead. With a full queue, the client's close would wait for ever for the client itself.
async fn close(mut consumer: Consumer<Vec<u8>, TokioExecutor>) -> anyhow::Result<()> {
    while consumer.next().now_or_never().flatten().is_some() {}
    timeout(PATIENCE, consumer.close())
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
