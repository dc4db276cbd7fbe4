//! Durable consumer: explicit acks, confirmed, that resume where a crash left off
//!
//! Processes orders from the stream `ORDERS` with the durable pull consumer `order-processor`. At least once: what is
//! not acknowledged within the ack wait comes again, to this process or to the next, and the message says how often it
//! has been delivered. One at a time, so in order, except for what comes again.
//!
//! ```console
//! 1$ cargo lab run jetstream_consumer send order-1 order-2 order-3
//! order-1: stored in ORDERS as 1
//! order-2: stored in ORDERS as 2
//! order-3: stored in ORDERS as 3
//! 2$ cargo lab run jetstream_consumer
//! order-processor: 3 to come, 0 unacknowledged
//! 1: order-1 processing (delivery 1)
//! 1: acknowledged
//! 2: order-2 processing (delivery 1)
//! 2: acknowledged
//! 3: order-3 processing (delivery 1)
//! 3: acknowledged
//! 2^C
//! stopped; acknowledged here: 3
//! ```
//!
//! Notice: `double_ack` waits until the server has the ack; a plain `ack` is a message that can be lost like any other,
//! and then the order comes again. The server remembers the consumer and not the program: nothing here keeps a
//! position. The program asks for one message, and for the next when it has done the work. A client that fetches 200,
//! as is the default, has 200 ack waits running while it works on the first, and those that take too long are delivered
//! again, to another member too. A stream of messages fetches ahead even with batches of one: it asks again when its
//! last question has expired or the server is back, whether or not the program has time.
//!
//! Try: WORK_MS=60000, `cargo lab kill jetstream_consumer` while it processes, start it again: after the ack wait of
//! five seconds the order is there, as delivery 2. Start it twice: the two share the orders. `cargo lab kill nats`,
//! then `cargo lab restart nats`.
//!
//! Settings: NATS_URL (nats://localhost:4222); WORK_MS (100), how long each order takes; the argument `send` stores the
//! orders that follow it. See also: jetstream_stream, jetstream_ack_kinds, jetstream_idempotent_consumer.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context as _, bail};
use async_nats::jetstream::consumer::{PullConsumer, pull};
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::{self, AckKind, Context, Message, stream};
use async_nats::{ConnectOptions, Event};
use futures::{FutureExt, StreamExt};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

const STREAM: &str = "ORDERS";
const CONSUMER: &str = "order-processor";
const ACK_WAIT: Duration = Duration::from_secs(5);
const PING: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let work_ms = std::env::var("WORK_MS").unwrap_or_else(|_| "100".into());
    let work_ms = work_ms
        .parse()
        .context("WORK_MS is a number of milliseconds")?;
    let client = ConnectOptions::new()
        // After three pings without an answer, the client connects again. With the default interval this takes three
        // minutes.
        .ping_interval(PING)
        .event_callback(report_outage)
        .connect(&url)
        .await
        .with_context(|| {
            format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
        })?;
    let mut jetstream = jetstream::new(client);
    jetstream.set_timeout(PATIENCE);
    // Whatever the stream's configuration has become: it is jetstream_stream that owns it.
    let stream = jetstream
        .get_or_create_stream(stream::Config {
            name: STREAM.into(),
            subjects: vec!["orders.*".into()],
            max_messages: 1000,
            ..Default::default()
        })
        .await
        .context("cannot declare ORDERS; is JetStream on?")?;
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["send", ref orders @ ..] => return send(&jetstream, orders).await,
        [] => {}
        _ => bail!("usage: jetstream_consumer [send ORDER...]"),
    }
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.into()),
            ack_wait: ACK_WAIT,
            ..Default::default()
        })
        .await?;
    let info = consumer.cached_info();
    println!(
        "{CONSUMER}: {} to come, {} unacknowledged",
        info.num_pending, info.num_ack_pending
    );
    consume(&consumer, Duration::from_millis(work_ms)).await
}

/// A question without an answer looks like an empty stream. These events do not.
async fn report_outage(event: Event) {
    match event {
        Event::Disconnected => eprintln!("disconnected"),
        Event::Connected => eprintln!("connected"),
        _ => {}
    }
}

async fn send(jetstream: &Context, orders: &[&str]) -> anyhow::Result<()> {
    for order in orders {
        let ack = jetstream
            .publish("orders.created", order.to_string().into())
            .await?;
        let ack = ack.await.map_err(|error| {
            let what = match error.kind() {
                PublishErrorKind::TimedOut | PublishErrorKind::BrokenPipe => {
                    "no ack, it may be stored or not"
                }
                _ => "refused, it is not stored",
            };
            anyhow::Error::new(error).context(format!("{order}: {what}"))
        })?;
        println!("{order}: stored in {} as {}", ack.stream, ack.sequence);
    }
    Ok(())
}

async fn consume(consumer: &PullConsumer, work: Duration) -> anyhow::Result<()> {
    let mut acknowledged = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        // One question, one message. It ends without any after a while, or when an outage has swallowed it.
        let mut asked = consumer
            .batch()
            .max_messages(1)
            .expires(PATIENCE)
            .messages()
            .await?;
        let message = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => {
                signal?;
                // It may have come in this moment. Given back, it need not wait for the ack wait.
                if let Some(Some(Ok(message))) = asked.next().now_or_never() {
                    give_back(&message).await;
                }
                break;
            }
            message = asked.next() => message,
        };
        match message {
            Some(Ok(message)) => acknowledged += handle(&message, work).await?,
            Some(Err(error)) => {
                eprintln!("waiting for the server: {error}");
                tokio::select! {
                    signal = &mut stop => break signal?,
                    () = sleep(Duration::from_secs(1)) => {}
                }
            }
            None => {}
        }
    }
    println!("stopped; acknowledged here: {acknowledged}");
    Ok(())
}

/// Returns how many acks the server has confirmed: 1 or 0.
async fn handle(message: &Message, work: Duration) -> anyhow::Result<u32> {
    let info = message.info().map_err(anyhow::Error::from_boxed)?;
    let sequence = info.stream_sequence;
    let order = String::from_utf8_lossy(&message.payload);
    let order: String = order.chars().take(40).collect();
    println!(
        "{sequence}: {order} processing (delivery {})",
        info.delivered
    );
    work_on(message, work).await;
    match timeout(PATIENCE, message.double_ack()).await {
        Ok(Ok(())) => {
            println!("{sequence}: acknowledged");
            Ok(1)
        }
        // The work is done, but it may be done again: that is what at least once means.
        Ok(Err(error)) => {
            println!("{sequence}: not acknowledged, it may come again: {error}");
            Ok(0)
        }
        Err(_) => {
            println!("{sequence}: not acknowledged, it may come again: no answer");
            Ok(0)
        }
    }
}

/// The work. As long as it takes, the server is told that this is no crash.
async fn work_on(message: &Message, work: Duration) {
    let mut work = pin!(sleep(work));
    let mut alive = interval(ACK_WAIT / 3);
    alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    alive.tick().await; // the first one is at once
    loop {
        tokio::select! {
            () = &mut work => return,
            _ = alive.tick() => {
                if let Err(error) = message.ack_with(AckKind::Progress).await {
                    eprintln!("no word to the server: {error}");
                }
            }
        }
    }
}

async fn give_back(message: &Message) {
    let nak = message.double_ack_with(AckKind::Nak(None));
    if !matches!(timeout(PATIENCE, nak).await, Ok(Ok(()))) {
        eprintln!("not given back: one order comes after the ack wait");
    }
}
