//! Exactly-once publishing: a message id, the window in which it is remembered, and its limits
//!
//! Publishes each order three times, as a publisher does that gets no ack and tries again. With a message id the server
//! stores it once, as long as the tries come within the stream's window. Without an id, or after the window, it is
//! stored again. Where a window is not enough, the publisher says which sequence it expects to be the last.
//!
//! ```console
//! $ cargo lab run jetstream_dedup
//! DEDUP remembers message ids for 2 s
//! without an id: acks 1, 2, 3; stored 3 times
//! with id order-1: acks 4, 4 (duplicate), 4 (duplicate); stored once
//! with id order-1 after the window: ack 5; stored again
//! expecting 5 to be the last: ack 6
//! the same again: refused, wrong last sequence: 6 (code [..])
//! expecting no event of account-1 yet: ack 7
//! the same again: refused, wrong last sequence: 7 (code [..])
//! ```
//!
//! Notice: a duplicate is acknowledged as the first try was, with the same sequence and the mark `duplicate`: for the
//! publisher that is success. The id must come from what is published, and be the same in the next run of a program
//! that crashed: a random id per try deduplicates nothing. The ids of a window are kept in memory, so a long window of
//! a busy stream costs. An expected sequence has no window: of two writers that saw the same state, one is refused, and
//! must look again. Deliveries can still repeat; see jetstream_idempotent_consumer. The tries end in time, but one that
//! finds no server waits in the client's buffer: after an outage that is longer than the window, it is stored again.
//!
//! Try: `cargo lab kill nats` and `cargo lab restart nats` between two tries: the server reads the ids of the window
//! back from its store.
//!
//! Settings: NATS_URL (nats://localhost:4222); WINDOW_S (2, and 120 to `send`); the arguments `send ID N` publish one
//! order N times with that id. See also: jetstream_stream, jetstream_async_publish.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::stream::Config;
use async_nats::jetstream::{self, Context};
use tokio::time::sleep;

const STREAM: &str = "DEDUP";
const SUBJECT: &str = "dedup.orders";
const ACCOUNT: &str = "dedup.account-1";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    let mut jetstream = jetstream::new(client);
    jetstream.set_timeout(Duration::from_secs(2));
    // The server's default is two minutes. Who shows that an id is forgotten has no time for that.
    let default = if args.is_empty() { "2" } else { "120" };
    let window = std::env::var("WINDOW_S").unwrap_or_else(|_| default.into());
    let window = Duration::from_secs(window.parse().context("WINDOW_S is a number of seconds")?);
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => show(&jetstream, window).await,
        ["send", id, times] => {
            // Without an id there is no deduplication, and the client panics of a line break in a header.
            let line = !id.trim().is_empty() && !id.contains(['\r', '\n']);
            ensure!(line, "ID is one line of text");
            declare(&jetstream, window).await?;
            for _ in 0..times.parse::<u32>().context("N is a number of times")? {
                let ack = publish_once(&jetstream, id, window).await?;
                println!("{id}: stored as {}{}", ack.sequence, mark(&ack));
            }
            Ok(())
        }
        _ => bail!("usage: jetstream_dedup [send ID N]"),
    }
}

async fn declare(jetstream: &Context, window: Duration) -> anyhow::Result<()> {
    let config = Config {
        name: STREAM.into(),
        subjects: vec!["dedup.*".into()],
        duplicate_window: window,
        ..Default::default()
    };
    jetstream.create_or_update_stream(config).await?;
    Ok(())
}

/// The pattern: the same id with every try, until there is an ack, and no try when the window may be over.
async fn publish_once(
    jetstream: &Context,
    id: &str,
    window: Duration,
) -> anyhow::Result<PublishAck> {
    let begun = Instant::now();
    loop {
        let message = PublishMessage::build()
            .message_id(id)
            .payload("order".into());
        let ack = match jetstream.send_publish(SUBJECT, message).await {
            Ok(ack) => ack.await,
            Err(error) => Err(error),
        };
        let error = match ack {
            Ok(ack) => return Ok(ack),
            Err(error) => error,
        };
        match error.kind() {
            // Lost connections end in a timeout. A server that is just back has no streams yet for a moment.
            PublishErrorKind::TimedOut
            | PublishErrorKind::BrokenPipe
            | PublishErrorKind::StreamNotFound => {
                if begun.elapsed() > window / 2 {
                    return Err(error)
                        .with_context(|| format!("{id}: no ack, it may be stored or not"));
                }
                eprintln!("{id}: no ack, another try follows: {error}");
                sleep(Duration::from_millis(200)).await;
            }
            _ => return Err(error).with_context(|| format!("{id}: refused")),
        }
    }
}

async fn show(jetstream: &Context, window: Duration) -> anyhow::Result<()> {
    // So that a second run counts from 1 again, and remembers no ids.
    let _ = jetstream.delete_stream(STREAM).await;
    declare(jetstream, window).await?;
    println!("{STREAM} remembers message ids for {} s", window.as_secs());

    let mut acks = Vec::new();
    for _ in 0..3 {
        let ack = jetstream.publish(SUBJECT, "order".into()).await?.await?;
        acks.push(ack.sequence.to_string());
    }
    println!("without an id: acks {}; stored 3 times", acks.join(", "));

    let mut acks = Vec::new();
    for _ in 0..3 {
        let ack = publish_once(jetstream, "order-1", window).await?;
        acks.push(format!("{}{}", ack.sequence, mark(&ack)));
    }
    println!("with id order-1: acks {}; stored once", acks.join(", "));

    // Well past the window: the server forgets ids in its own time.
    sleep(2 * window).await;
    let ack = publish_once(jetstream, "order-1", window).await?;
    println!(
        "with id order-1 after the window: ack {}{}; stored again",
        ack.sequence,
        mark(&ack)
    );

    let expecting_last = PublishMessage::build().expected_last_sequence(ack.sequence);
    let ack = jetstream
        .send_publish(SUBJECT, expecting_last)
        .await?
        .await?;
    println!(
        "expecting {} to be the last: ack {}",
        ack.sequence - 1,
        ack.sequence
    );
    let the_same = PublishMessage::build().expected_last_sequence(ack.sequence - 1);
    refused(jetstream, SUBJECT, the_same).await?;

    // 0: there is none. This is how an event-sourced aggregate is kept consistent, without a lock.
    let expecting_none = PublishMessage::build().expected_last_subject_sequence(0);
    let ack = jetstream
        .send_publish(ACCOUNT, expecting_none)
        .await?
        .await?;
    println!("expecting no event of account-1 yet: ack {}", ack.sequence);
    let the_same = PublishMessage::build().expected_last_subject_sequence(0);
    refused(jetstream, ACCOUNT, the_same).await
}

async fn refused(
    jetstream: &Context,
    subject: &'static str,
    message: PublishMessage,
) -> anyhow::Result<()> {
    match jetstream.send_publish(subject, message).await?.await {
        Err(error) if error.kind() == PublishErrorKind::WrongLastSequence => {
            let mut reason: &dyn std::error::Error = &error;
            while let Some(source) = reason.source() {
                reason = source;
            }
            println!("the same again: refused, {reason}");
            Ok(())
        }
        Err(error) => Err(error).context("no ack"),
        Ok(ack) => bail!(
            "stored as {}, although the sequence was wrong",
            ack.sequence
        ),
    }
}

fn mark(ack: &PublishAck) -> &'static str {
    if ack.duplicate { " (duplicate)" } else { "" }
}
