//! Pattern subscription: one consumer for all topics whose names match, those to come included
//!
//! The client asks the broker for the topics of a namespace, subscribes to each that matches, and asks again every two
//! seconds. At least once; in order within a topic. A topic that was found late is read from its beginning.
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
//! queue of its own, so a thousand topics hold a thousand queues. Topics that stop are dropped and found again, and the
//! stream never ends: when the broker stays away for long, it is silent, and may remain so when the broker is back. So
//! after a silence the broker is asked, and without an answer client and consumer are made anew.
//!
//! Try: `cargo lab kill pulsar`, and a minute later `cargo lab restart pulsar`.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650). See also: pulsar_partitioned_topic.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::InitialPosition;
use pulsar::{ConnectionRetryOptions, Consumer, ConsumerOptions, Pulsar, SubType, TokioExecutor};
use regex::Regex;
use tokio::time::{sleep, timeout};

const PREFIX: &str = "persistent://public/default/multi-topic-";
const SUBSCRIPTION: &str = "multi-topic-display";
/// Longer than an attempt to connect may take: a refresh throws away the one that is under way, and others would wait
/// for it for ever.
const REFRESH: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => consume(&address).await,
        ["send", room, reading] => send(&connect(&address).await?, room, reading).await,
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

async fn subscribe(address: &str) -> anyhow::Result<Consumer<Vec<u8>, TokioExecutor>> {
    let pulsar = connect(address).await?;
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(20);
    let builder = pulsar
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
        .with_options(options);
    Ok(timeout(PATIENCE, builder.build())
        .await
        .context("no consumer in time")??)
}

async fn consume(address: &str) -> anyhow::Result<()> {
    // A broker that was never there is a mistake to be told; one that goes is not.
    let mut consumer = subscribe(address).await?;
    println!("subscribed; Ctrl-C to stop");

    let mut readings = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            lost = display(&mut consumer, &mut readings) => eprintln!("made anew: {lost:#}"),
        }
        consumer = tokio::select! {
            signal = &mut stop => {
                signal?;
                println!("closed without the broker; readings: {readings}");
                return Ok(());
            }
            anew = subscribe_again(address) => anew,
        };
        eprintln!("back");
    }
    let topics = consumer.topics().len();
    close(consumer).await?;
    println!("closed; topics: {topics}, readings: {readings}");
    Ok(())
}

async fn subscribe_again(address: &str) -> Consumer<Vec<u8>, TokioExecutor> {
    loop {
        if let Ok(consumer) = subscribe(address).await {
            return consumer;
        }
        sleep(REFRESH).await;
    }
}

/// Returns why the client has to be replaced.
async fn display(
    consumer: &mut Consumer<Vec<u8>, TokioExecutor>,
    readings: &mut u32,
) -> anyhow::Error {
    loop {
        let message = match timeout(PATIENCE, consumer.try_next()).await {
            Ok(Ok(Some(message))) => message,
            Ok(Ok(None)) => return anyhow!("the stream has ended"),
            Ok(Err(error)) => return error.into(),
            // Nothing to read, or nobody there?
            Err(_) => match timeout(PATIENCE, consumer.check_connection()).await {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => return error.into(),
                Err(_) => return anyhow!("silence, and no answer to a ping"),
            },
        };
        let room = message.topic.trim_start_matches(PREFIX);
        println!("{room}: {}", String::from_utf8_lossy(&message.payload.data));
        *readings += 1;
        if !last_of_batch(&message) {
            continue;
        }
        // Fails if the topic's connection was lost in between; then the reading comes again.
        if let Err(error) = consumer.ack(&message).await {
            eprintln!("{room}: not acknowledged: {error}");
        }
    }
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

/// Left alone, the client retries for more than a minute, in silence. Here `subscribe_again` does.
async fn connect(address: &str) -> anyhow::Result<Pulsar<TokioExecutor>> {
    let connections = ConnectionRetryOptions {
        max_retries: 0,
        connection_timeout: Duration::from_secs(1),
        // A minute by default, for which a broker that hangs is not noticed.
        keep_alive: Duration::from_secs(2),
        ..ConnectionRetryOptions::default()
    };
    let client = Pulsar::builder(address, TokioExecutor)
        .with_connection_retry_options(connections)
        .build();
    timeout(PATIENCE, client)
        .await
        .context("the connection takes too long")
        .and_then(|connected| Ok(connected?))
        .with_context(|| {
            format!("no Pulsar broker answers at {address}; `cargo lab up pulsar` starts one")
        })
}
