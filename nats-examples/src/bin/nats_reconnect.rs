//! Reconnect: what a client does while the server is away, and what it does not
//!
//! Publishes numbered ticks and receives them itself. When the server goes away, the client connects again, for as long
//! as it takes, and subscribes again. At most once all the while: ticks that are published meanwhile wait in a buffer
//! of limited size, and what the server had in hand when it died is lost.
//!
//! ```console
//! 1$ cargo lab run nats_reconnect
//! event: connected
//! received: tick 1
//! ...
//! received: tick 5
//! 2$ cargo lab kill nats
//! 1:
//! ...
//! event: disconnected
//! ...
//! the buffer is full: tick [..] is not sent
//! 2$ cargo lab restart nats
//! 1:
//! ...
//! event: connected
//! ...
//! received: tick [..]
//! 1^C
//! ...
//! ticks published [..], not sent [..], received [..], lost [..]
//! ```
//!
//! Notice: the buffer is the client's queue of commands, 2048 by default and 20 here. When it is full, `publish` does
//! not fail but waits, so a program that must not stand still puts a time limit on it, as this one does. JetStream
//! publishing differs: its acks time out, and what is not acknowledged may be stored, or not. The first connection is a
//! different matter: `connect` fails at once, unless `retry_on_initial_connect` is set; then it returns at once, and
//! the event is what says that there is a connection.
//!
//! Try: start it with no server, and the server within five seconds. Let the server be away for a minute.
//!
//! Settings: NATS_URL (nats://localhost:4222). See also: nats_subscribe, jetstream_async_publish.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail};
use async_nats::{Client, ConnectOptions, Event, Subscriber};
use futures::StreamExt;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, timeout};

const BUFFER: usize = 20;
const TICK: Duration = Duration::from_millis(50);
/// What a publisher is willing to wait for room in the buffer.
const WILLING: Duration = Duration::from_millis(500);
const FIRST_CONNECT: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let (connected, mut on_connected) = watch::channel(false);
    let client = ConnectOptions::new()
        .retry_on_initial_connect()
        .client_capacity(BUFFER)
        // The default grows to four seconds. With many clients, leave it, or all of them come back at the same time.
        .reconnect_delay_callback(|attempt| Duration::from_millis(100 * attempt.min(10) as u64))
        .event_callback(move |event| {
            let connected = connected.clone();
            async move {
                match event {
                    Event::Connected => {
                        println!("event: connected");
                        connected.send_replace(true);
                    }
                    Event::Disconnected => println!("event: disconnected"),
                    Event::SlowConsumer(_) => println!("event: slow consumer"),
                    // Each attempt that fails, among others.
                    _ => {}
                }
            }
        })
        .connect(&url)
        .await
        .with_context(|| format!("{url} is no address of a server"))?;
    // The client would try for ever. A program that can do nothing without its server should say so, and end.
    let first = on_connected.wait_for(|connected| *connected);
    // Not kept: what it returns locks the value, and the next event would wait for ever.
    let first = timeout(FIRST_CONNECT, first)
        .await
        .is_ok_and(|event| event.is_ok());
    if !first {
        bail!(
            "cannot connect to NATS at {url} within {FIRST_CONNECT:?}; `cargo lab up nats` starts a server"
        );
    }
    run(&client).await
}

#[derive(Default)]
struct Counts {
    published: u32,
    not_sent: u32,
    received: u32,
    /// The number that should come next. Gaps are counted when a later tick comes.
    next: u32,
}

async fn run(client: &Client) -> anyhow::Result<()> {
    // Of this run alone: the ticks of another one would be counted as ours.
    let subject = format!("reconnect.ticks.{}", client.new_inbox());
    let mut ticks = client.subscribe(subject.clone()).await?;
    let mut counts = Counts {
        next: 1,
        ..Default::default()
    };
    let mut clock = interval(TICK);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            message = ticks.next() => {
                counts.note(&message.context("the client closed the subscription")?.payload);
            }
            _ = clock.tick() => {
                let number = counts.published + 1;
                match timeout(WILLING, client.publish(subject.clone(), number.to_string().into())).await {
                    Ok(sent) => {
                        sent?;
                        counts.published = number;
                    }
                    // The same number is used for the next try.
                    Err(_) => {
                        println!("the buffer is full: tick {number} is not sent");
                        counts.not_sent += 1;
                    }
                }
            }
        }
    }
    finish(client, ticks, &mut counts).await;
    let Counts {
        published,
        not_sent,
        received,
        ..
    } = counts;
    let lost = published.saturating_sub(received);
    println!("ticks published {published}, not sent {not_sent}, received {received}, lost {lost}");
    Ok(())
}

impl Counts {
    fn note(&mut self, payload: &[u8]) {
        let text = String::from_utf8_lossy(payload);
        // Another program may publish here, too.
        let Ok(number) = text.parse::<u32>() else {
            eprintln!("not a tick: {text:?}");
            return;
        };
        println!("received: tick {number}");
        self.received += 1;
        if number > self.next {
            println!("lost: ticks {} to {}", self.next, number - 1);
        }
        self.next = number.saturating_add(1);
    }
}

/// What is under way still arrives, if there is a server.
async fn finish(client: &Client, mut ticks: Subscriber, counts: &mut Counts) {
    let last = counts.published;
    let arrive = async {
        if client.flush().await.is_err() {
            return;
        }
        while counts.next <= last {
            match ticks.next().await {
                Some(message) => counts.note(&message.payload),
                None => return,
            }
        }
    };
    if timeout(PATIENCE, arrive).await.is_err() {
        eprintln!("the last ticks did not come back");
    }
}
