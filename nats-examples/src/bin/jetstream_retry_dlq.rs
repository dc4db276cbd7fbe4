//! Retry with backoff, dead letters that nothing is lost on, and replay
//!
//! An order that fails is delivered again by the consumer's backoff schedule, while others go on. After the last
//! delivery the server gives up with an advisory, and this program moves the order to a dead-letter stream with its
//! origin and the cause, from where it can be replayed. At least once, also for dead letters.
//!
//! ```console
//! 1$ cargo lab run jetstream_retry_dlq send good-1 bad-2 flaky-3
//! stored as 1: good-1
//! stored as 2: bad-2
//! stored as 3: flaky-3
//! 2$ cargo lab run jetstream_retry_dlq
//! retry-processor is ready
//! 1: good-1 done (delivery 1)
//! ...
//! 2: failed (delivery 4): it says that it is bad
//! ...
//! 2: dead letter 1 after 4 deliveries
//! 2^C
//! stopped
//! 1$ cargo lab run jetstream_retry_dlq dead
//! dead letter 1: bad-2 from retry.orders 2, 4 deliveries, cause: it says that it is bad
//! 1$ cargo lab run jetstream_retry_dlq replay
//! dead letter 1: stored again as 4
//! replayed 1
//! ```
//!
//! Notice: a failed order gets no answer, for only silence follows the schedule: a nak without a delay is delivered
//! again at once. The first entry of the schedule is the ack wait, so the work must be faster. The advisory is a core
//! NATS message, gone if nobody listens, so a stream captures it. It names a sequence and not the message: the order is
//! fetched from its stream, and stored with the dead letters, before the advisory is acknowledged. So a stream that
//! drops its old messages too early, or a work queue, would lose it. A worker that dies of an order each time leaves no
//! cause; the advisory is there all the same. The schedule is the server's and has no jitter: orders that failed
//! together come back together. Where that hurts, nak with a delay of your own (jetstream_ack_kinds).
//!
//! Try: `cargo lab kill jetstream_retry_dlq` at any moment, start it again: no order is missing, and a dead letter is
//! there once, also when it was replayed in between. `cargo lab kill nats`, then `cargo lab restart nats`.
//!
//! Settings: NATS_URL (nats://localhost:4222); with HEALED=1 nothing is bad any more; the arguments are `send
//! ORDER...`, `dead`, `replay`. See also: jetstream_ack_kinds, jetstream_work_queue, kafka_retry_dlq.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{PullConsumer, pull};
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::message::{PublishMessage, StreamMessage};
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::stream::{
    Config, RawMessageError, RawMessageErrorKind, RetentionPolicy, Stream,
};
use async_nats::jetstream::{self, AckKind, Context, Message};
use futures::StreamExt;
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

const ORDERS: &str = "RETRY_ORDERS";
const SUBJECT: &str = "retry.orders";
const PROCESSOR: &str = "retry-processor";
const ADVISORIES: &str = "RETRY_ADVISORIES";
const GIVEN_UP: &str = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.RETRY_ORDERS.retry-processor";
const CAUSES: &str = "retry.causes";
/// The header of a note which says that the order was replayed, and as what.
const REPLAYED: &str = "Replayed-As";
const DEAD: &str = "RETRY_DEAD";
/// Followed by the sequence of the order: one subject for each, so that each is there once.
const DEAD_SUBJECT: &str = "retry.dead";
/// How long each delivery waits for an answer; the fourth as long as the third.
const BACKOFF: [Duration; 3] = [
    Duration::from_millis(500),
    Duration::from_millis(1000),
    Duration::from_millis(2000),
];
const DELIVERIES: i64 = 4;
/// In characters: a cause travels in a header, and all headers of a message together are 64 KB at most.
const CAUSE: usize = 200;
const PATIENCE: Duration = Duration::from_secs(5);

/// What there is on the server.
struct Queue {
    jetstream: Context,
    orders: Stream,
    dead: Stream,
    /// The last cause of each order's failure: an advisory says nothing about it. And what was replayed.
    causes: Stream,
    processor: PullConsumer,
    undertaker: PullConsumer,
}

#[derive(Deserialize)]
struct Advisory {
    stream_seq: u64,
    deliveries: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    let mut jetstream = jetstream::new(client);
    jetstream.set_timeout(PATIENCE);
    let queue = Queue::declare(jetstream).await?;
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        [] => queue.run().await,
        ["send", ref orders @ ..] => queue.send(orders).await,
        ["dead"] => queue.dead_letters().await,
        ["replay"] => queue.replay().await,
        _ => bail!("usage: jetstream_retry_dlq [send ORDER... | dead | replay]"),
    }
}

impl Queue {
    async fn declare(jetstream: Context) -> anyhow::Result<Queue> {
        let stream = |name: &str, subject: String, retention| Config {
            name: name.into(),
            subjects: vec![subject],
            retention,
            ..Default::default()
        };
        let limits = RetentionPolicy::Limits;
        let orders = stream(ORDERS, SUBJECT.into(), limits);
        let orders = jetstream.get_or_create_stream(orders).await?;
        let dead = stream(DEAD, format!("{DEAD_SUBJECT}.*"), limits);
        let dead = jetstream.get_or_create_stream(dead).await?;
        // Before the consumer whose advisories it captures.
        let advisories = stream(ADVISORIES, GIVEN_UP.into(), RetentionPolicy::WorkQueue);
        let advisories = jetstream.get_or_create_stream(advisories).await?;
        let causes = Config {
            max_messages_per_subject: 1,
            max_age: Duration::from_secs(24 * 3600),
            ..stream("RETRY_CAUSES", format!("{CAUSES}.*"), limits)
        };
        let causes = jetstream.get_or_create_stream(causes).await?;
        let processor = orders
            .create_consumer(pull::Config {
                durable_name: Some(PROCESSOR.into()),
                backoff: BACKOFF.to_vec(),
                max_deliver: DELIVERIES,
                ..Default::default()
            })
            .await?;
        let undertaker = advisories
            .create_consumer(pull::Config {
                durable_name: Some("undertaker".into()),
                ack_wait: PATIENCE,
                ..Default::default()
            })
            .await?;
        Ok(Queue {
            jetstream,
            orders,
            dead,
            causes,
            processor,
            undertaker,
        })
    }

    async fn send(&self, orders: &[&str]) -> anyhow::Result<()> {
        for order in orders {
            let ack = self
                .jetstream
                .publish(SUBJECT, order.to_string().into())
                .await?;
            let ack = ack.await.with_context(|| format!("{order}: no ack"))?;
            println!("stored as {}: {order}", ack.sequence);
        }
        Ok(())
    }

    async fn run(&self) -> anyhow::Result<()> {
        println!("{PROCESSOR} is ready");
        let (running, stopped) = watch::channel(());
        tokio::spawn(async move {
            let _ = tokio::signal::ctrl_c().await;
            drop(running);
        });
        tokio::join!(
            each(&self.processor, stopped.clone(), async |message| self
                .process(message)
                .await),
            each(&self.undertaker, stopped, async |message| self
                .give_up(message)
                .await),
        );
        println!("stopped");
        Ok(())
    }

    async fn process(&self, message: &Message) -> anyhow::Result<()> {
        let info = message.info().map_err(anyhow::Error::from_boxed)?;
        let (sequence, delivery) = (info.stream_sequence, info.delivered);
        match work(&message.payload, delivery) {
            Ok(order) => {
                let order: String = order.chars().take(40).collect();
                if answer(message, AckKind::Ack).await {
                    println!("{sequence}: {order} done (delivery {delivery})");
                }
            }
            Err(Failure::ForNow(cause)) => {
                println!("{sequence}: failed (delivery {delivery}): {cause}");
                let note = PublishMessage::build().payload(cause.into());
                if let Err(error) = self.store(format!("{CAUSES}.{sequence}"), note).await {
                    eprintln!("{sequence}: the cause is not noted: {error}");
                }
                // And no answer, so that the schedule decides.
            }
            Err(Failure::ForGood(cause)) => {
                println!("{sequence}: failed for good (delivery {delivery}): {cause}");
                let deliveries = delivery.unsigned_abs();
                self.bury(sequence, deliveries, Some(cause)).await?;
                answer(message, AckKind::Term).await;
            }
        }
        Ok(())
    }

    /// The server will not deliver this order again.
    async fn give_up(&self, message: &Message) -> anyhow::Result<()> {
        match serde_json::from_slice::<Advisory>(&message.payload) {
            Ok(advisory) => {
                self.bury(advisory.stream_seq, advisory.deliveries, None)
                    .await?;
            }
            Err(error) => eprintln!("not an advisory: {error}"),
        }
        answer(message, AckKind::Ack).await;
        Ok(())
    }

    /// Returns when the order is with the dead letters. If it can't be, its message is not answered, and comes again.
    async fn bury(
        &self,
        sequence: u64,
        deliveries: u64,
        cause: Option<String>,
    ) -> anyhow::Result<()> {
        let note = found(
            self.causes
                .get_last_raw_message_by_subject(&format!("{CAUSES}.{sequence}"))
                .await,
        );
        let note = note.context("cannot read the cause of a failure")?;
        // Buried, then killed before the answer, and replayed meanwhile.
        if let Some(note) = &note
            && note.headers.get(REPLAYED).is_some()
        {
            println!("{sequence}: was a dead letter, and is replayed");
            return Ok(());
        }
        let noted = note.map(|note| String::from_utf8_lossy(&note.payload).into_owned());
        let cause = cause.or(noted);
        let cause = cause.unwrap_or_else(|| "none noted: its worker died".into());
        // A line break in a header would be the beginning of another one; the client panics of it.
        let cause = cause.replace(['\r', '\n'], " ");
        let cause: String = cause.chars().take(CAUSE).collect();

        let order = found(self.orders.get_raw_message(sequence).await);
        let Some(order) = order.context("cannot fetch a failed order")? else {
            println!("{sequence}: LOST: it is no longer in {ORDERS}");
            return Ok(());
        };
        let letter = |mut headers: HeaderMap| {
            headers.insert("Origin-Subject", order.subject.as_str());
            headers.insert("Origin-Sequence", sequence.to_string());
            headers.insert("Deliveries", deliveries.to_string());
            headers.insert("Cause", cause.as_str());
            // 0: there is none for this order. That makes a second burial harmless as long as the letter is there; and
            // the id, one that is under way while the letter is replayed.
            PublishMessage::build()
                .headers(headers)
                .message_id(format!("{DEAD}-{sequence}"))
                .expected_last_subject_sequence(0)
        };
        let subject = format!("{DEAD_SUBJECT}.{sequence}");
        let whole = letter(own_headers(&order)).payload(order.payload.clone());
        let stored = match self.store(subject.clone(), whole).await {
            // As large as a message or its headers can be, there is no room for ours. So it stays where it is.
            Err(error)
                if matches!(
                    error.kind(),
                    PublishErrorKind::MaxPayloadExceeded | PublishErrorKind::Other
                ) =>
            {
                let empty = letter(HeaderMap::new()).header("Payload", "in the stream");
                self.store(subject, empty).await
            }
            stored => stored,
        };
        match stored {
            Ok(ack) if !ack.duplicate => println!(
                "{sequence}: dead letter {} after {deliveries} deliveries",
                ack.sequence
            ),
            Ok(_) => println!("{sequence}: is a dead letter already"),
            Err(error) if error.kind() == PublishErrorKind::WrongLastSequence => {
                println!("{sequence}: is a dead letter already");
            }
            Err(error) => return Err(error).context("a failed order is not dead-lettered either"),
        }
        Ok(())
    }

    async fn store(
        &self,
        subject: String,
        message: PublishMessage,
    ) -> Result<PublishAck, PublishError> {
        self.jetstream.send_publish(subject, message).await?.await
    }

    async fn dead_letters(&self) -> anyhow::Result<()> {
        for letter in letters(&self.dead).await? {
            let header = |name| letter.headers.get(name).map_or("", |value| value.as_str());
            let order = String::from_utf8_lossy(&letter.payload);
            println!(
                "dead letter {}: {} from {} {}, {} deliveries, cause: {}",
                letter.sequence,
                order.chars().take(40).collect::<String>(),
                header("Origin-Subject"),
                header("Origin-Sequence"),
                header("Deliveries"),
                header("Cause")
            );
        }
        Ok(())
    }

    async fn replay(&self) -> anyhow::Result<()> {
        let (mut replayed, mut left) = (0, 0);
        for letter in letters(&self.dead).await? {
            let number = letter.sequence;
            match self.replay_one(letter).await {
                Ok(sequence) => {
                    println!("dead letter {number}: stored again as {sequence}");
                    replayed += 1;
                }
                // No reason to leave the others where they are.
                Err(error) => {
                    eprintln!("dead letter {number}: not replayed: {error:#}");
                    left += 1;
                }
            }
        }
        println!("replayed {replayed}");
        ensure!(left == 0, "not replayed: {left}");
        Ok(())
    }

    /// Back to where it came from, as a new order. Only when that is acknowledged, the dead letter goes.
    async fn replay_one(&self, letter: StreamMessage) -> anyhow::Result<u64> {
        let number = letter.sequence;
        let header = |name| letter.headers.get(name).map(|value| value.as_str());
        let subject = header("Origin-Subject").context("no origin")?.to_owned();
        let origin: u64 = header("Origin-Sequence").context("no origin")?.parse()?;
        let again = if header("Payload").is_some() {
            let order = self.orders.get_raw_message(origin).await?;
            let again = PublishMessage::build().headers(own_headers(&order));
            again.payload(order.payload)
        } else {
            // A crash before the deletion repeats this; within the window of the stream it makes no second order.
            // Above, there may be no room for an id.
            let again = PublishMessage::build().headers(own_headers(&letter));
            let again = again.message_id(format!("{DEAD}-{number}"));
            again.payload(letter.payload)
        };
        let ack = self.store(subject, again).await?;
        let note = PublishMessage::build().header(REPLAYED, ack.sequence.to_string());
        self.store(format!("{CAUSES}.{origin}"), note).await?;
        self.dead.delete_message(number).await?;
        Ok(ack.sequence)
    }
}

/// Handles what comes, one at a time, until `stopped`. What is in hand is finished. An error is no reason to end: what
/// was not answered comes again.
async fn each(
    consumer: &PullConsumer,
    mut stopped: watch::Receiver<()>,
    handle: impl AsyncFn(&Message) -> anyhow::Result<()>,
) {
    loop {
        let message = tokio::select! {
            _ = stopped.changed() => return,
            message = next(consumer) => message,
        };
        let error = match message {
            Ok(None) => continue,
            Ok(Some(message)) => match handle(&message).await {
                Ok(()) => continue,
                Err(error) => error,
            },
            Err(error) => error,
        };
        eprintln!("trying again soon: {error:#}");
        tokio::select! {
            _ = stopped.changed() => return,
            () = sleep(Duration::from_secs(1)) => {}
        }
    }
}

/// One message, or none if there was none for a while.
async fn next(consumer: &PullConsumer) -> anyhow::Result<Option<Message>> {
    let asked = consumer.batch().max_messages(1).expires(PATIENCE);
    let message = asked.messages().await?.next().await;
    message.transpose().map_err(anyhow::Error::from_boxed)
}

/// None if there is no such message.
fn found(
    read: Result<StreamMessage, RawMessageError>,
) -> Result<Option<StreamMessage>, RawMessageError> {
    match read {
        Ok(message) => Ok(Some(message)),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(error) => Err(error),
    }
}

enum Failure {
    ForNow(String),
    ForGood(String),
}

fn work(payload: &[u8], delivery: i64) -> Result<&str, Failure> {
    // Another try would not make text of it.
    let order =
        std::str::from_utf8(payload).map_err(|error| Failure::ForGood(error.to_string()))?;
    if order.contains("bad") && std::env::var_os("HEALED").is_none() {
        return Err(Failure::ForNow("it says that it is bad".into()));
    }
    if order.contains("flaky") && delivery == 1 {
        return Err(Failure::ForNow("not at the first try".into()));
    }
    Ok(order)
}

/// Whether the server has the answer. If not, the message comes again.
async fn answer(message: &Message, kind: AckKind) -> bool {
    let answered = timeout(PATIENCE, message.double_ack_with(kind)).await;
    let answered = matches!(answered, Ok(Ok(())));
    if !answered {
        eprintln!("the server does not answer: something may be done again");
    }
    answered
}

/// Without ours, and without those that would tell the server what to do with the copy.
fn own_headers(message: &StreamMessage) -> HeaderMap {
    let ours = [
        "Origin-Subject",
        "Origin-Sequence",
        "Deliveries",
        "Cause",
        "Payload",
    ];
    let mut headers = HeaderMap::new();
    for (name, values) in message.headers.iter() {
        let text: &str = name.as_ref();
        if !text.starts_with("Nats-") && !ours.contains(&text) {
            for value in values {
                headers.append(name.clone(), value.clone());
            }
        }
    }
    headers
}

async fn letters(dead: &Stream) -> anyhow::Result<Vec<StreamMessage>> {
    let state = dead.get_info().await?.state;
    let mut letters = Vec::new();
    for sequence in state.first_sequence..=state.last_sequence {
        // What was replayed earlier is gone.
        let letter = found(dead.get_raw_message(sequence).await);
        letters.extend(letter.context("cannot read the dead letters")?);
    }
    Ok(letters)
}
