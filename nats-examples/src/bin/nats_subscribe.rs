//! Subscribe on NATS with wildcards, and drain before the program ends
//!
//! Prints every message whose subject matches a pattern. At most once: what is published while this program is not
//! connected, or reads too slowly, is lost. One publisher's messages on one subject arrive in order.
//!
//! ```console
//! 1$ cargo lab run nats_subscribe
//! listening on events.>; Ctrl-C to stop
//! 2$ cargo lab run nats_publish
//! ...
//! flushed: both messages are written to the connection
//! 1:
//! events.user.created: User ID: 123
//! events.user.updated: User ID: 123
//! 1^C
//! drained; messages handled: 2
//! ```
//!
//! Notice: `*` stands for exactly one token and `>`, only at the end, for one or more. So `events.user.*` takes
//! `events.user.created`, but neither `events.user` nor `events.user.email.changed`; `events.>` takes all three. A network
//! that goes silent without closing the connection is noticed by pings without an answer; `ping_interval` says how soon.
//!
//! Try: stop this program, publish, start it again: nothing arrives. Run it twice: both get every message. Other
//! patterns: `cargo lab run nats_subscribe 'events.*.created'`, in quotes, or the shell expands the star.
//!
//! Settings: NATS_URL (nats://localhost:4222). See also: nats_publish.

use std::pin::pin;
use std::time::Duration;

use anyhow::Context;
use async_nats::{ConnectOptions, Event};
use futures::StreamExt;
use tokio::time::timeout;

const PING: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let pattern = std::env::args().nth(1).unwrap_or_else(|| "events.>".into());

    let client = ConnectOptions::new()
        // After three pings without an answer, the client connects again. Nothing else shows that a connection is dead
        // if nobody closes it, and with the default interval this takes three minutes.
        .ping_interval(PING)
        .event_callback(report_loss)
        .connect(&url)
        .await
        .with_context(|| {
            format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
        })?;
    let mut messages = client.subscribe(pattern.clone()).await?;
    // Like a publish, a subscription is only buffered, and a flush would only write it. The server reads in order, so
    // when it says that nobody is there to answer this, it has read the subscription, too.
    let _ = client.request(client.new_inbox(), "".into()).await;
    println!("listening on {pattern}; Ctrl-C to stop");

    let mut handled = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            message = messages.next() => {
                handle(&message.context("the client closed the subscription")?);
                handled += 1;
            }
        }
    }

    // Drain stops new messages and hands out those that are already here. It returns at once: the end of the stream
    // is what says that it is done, so leaving now would drop what is still buffered.
    client.drain().await?;
    let rest = async {
        while let Some(message) = messages.next().await {
            handle(&message);
            handled += 1;
        }
    };
    // Without a connection there would be no end to it.
    if timeout(PATIENCE, rest).await.is_err() {
        eprintln!("the server does not answer; what it still had for this program is lost");
    }
    println!("drained; messages handled: {handled}");
    Ok(())
}

fn handle(message: &async_nats::Message) {
    // A payload is any bytes: text that is not UTF-8 is shown with replacement characters.
    let body = String::from_utf8_lossy(&message.payload);
    println!("{}: {body}", message.subject);
}

/// Losing messages raises no error anywhere. These two events are the only sign of it.
async fn report_loss(event: Event) {
    match event {
        Event::SlowConsumer(_) => eprintln!("too slow: the buffer is full, messages were dropped"),
        Event::Disconnected => eprintln!("disconnected: what is published now is missed"),
        Event::Connected => eprintln!("connected"),
        _ => {}
    }
}
