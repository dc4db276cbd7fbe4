//! Publish on NATS, and flush before the program ends
//!
//! Publishes two events on two subjects. Core NATS delivers at most once: whoever subscribes at this moment gets a
//! copy, nobody else ever will, and the publisher is not told. One publisher's messages on one subject arrive in order.
//!
//! ```console
//! $ cargo lab run nats_publish
//! events.user.created: User ID: 123
//! events.user.updated: User ID: 123
//! flushed: both messages are written to the connection
//! ```
//!
//! Notice: nobody was listening, both messages are gone, and yet everything succeeded. `publish` returns when the
//! message is in the client's buffer, `flush` when the buffer is written to the connection. Neither means "stored" or
//! "received": that takes a reply from the receiver, or JetStream.
//!
//! Try: start `nats_subscribe` in another terminal and run this again. Delete the flush: the program may now end
//! before the client has written anything, and the messages are lost with a subscriber waiting for them.
//!
//! Settings: NATS_URL (nats://localhost:4222). See also: nats_subscribe.

use std::time::Duration;

use anyhow::Context;
use tokio::time::timeout;

const EVENTS: [(&str, &str); 2] = [
    ("events.user.created", "User ID: 123"),
    ("events.user.updated", "User ID: 123"),
];

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;

    for (subject, body) in EVENTS {
        client.publish(subject, body.into()).await?;
        println!("{subject}: {body}");
    }

    // When the connection breaks, the client reconnects for as long as it takes and flush waits with it.
    timeout(Duration::from_secs(5), client.flush())
        .await
        .with_context(|| format!("lost the connection to {url}: the events may not be sent"))??;
    println!("flushed: both messages are written to the connection");
    Ok(())
}
