//! Request and reply: a question with a reply topic and a correlation id, and its answer
//!
//! The request names in its properties where the answer is to go and which question it belongs to. Requests are stored
//! and acknowledged after the answer was sent: at least once, so a question may be worked on twice. Answers go
//! through a topic that is not stored: at most once, for nobody but the one that waits needs them.
//!
//! ```console
//! 1$ cargo lab run pulsar_request_reply serve
//! serving; Ctrl-C to stop
//! 2$ cargo lab run pulsar_request_reply 7 twelve 12
//! 7 squared is 49
//! twelve: no number
//! 12 squared is 144
//! 1:
//! 7: answered
//! twelve: answered
//! 12: answered
//! 1^C
//! closed; answered: 3
//! ```
//!
//! Notice: the asker subscribes to its reply topic before it asks, or the answer would be gone before it listens. A
//! question without an answer in time may or may not have been worked on. The server answers only to topics with the
//! agreed prefix and a plain name: a message could name any. A place that takes no answer costs it five seconds. One
//! producer per reply topic is kept: to make one for each answer, as `Pulsar::send` invites to, does not scale.
//!
//! Try: ask with no server there: it gives up after twenty seconds, and a server that starts later works on the stored
//! question all the same; its answer goes nowhere.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650). See also: pulsar_shared: several servers share the questions.

use std::collections::HashMap;
use std::pin::pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::InitialPosition;
use pulsar::{Consumer, ConsumerOptions, Pulsar, SubType, TokioExecutor};
use tokio::time::{sleep, timeout};

const REQUESTS: &str = "persistent://public/default/request-reply-questions";
const REPLIES: &str = "non-persistent://public/default/request-reply-answers-";
const SUBSCRIPTION: &str = "request-reply-server";
const PATIENCE: Duration = Duration::from_secs(5);
/// For all answers together: others may be asking, too.
const ANSWERS: Duration = Duration::from_secs(20);
const MOST_ASKERS: usize = 100;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => bail!("usage: pulsar_request_reply serve | QUESTION..."),
        ["serve"] => serve(&pulsar, &address).await,
        ref questions => ask(&pulsar, &address, questions).await,
    }
}

async fn subscribe(
    pulsar: &Pulsar<TokioExecutor>,
    topic: &str,
    kind: SubType,
) -> anyhow::Result<Consumer<Vec<u8>, TokioExecutor>> {
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(20);
    let builder = pulsar
        .consumer()
        .with_topic(topic)
        .with_subscription(SUBSCRIPTION)
        .with_subscription_type(kind)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(10)
        .with_options(options);
    Ok(builder.build().await?)
}

async fn ask(
    pulsar: &Pulsar<TokioExecutor>,
    address: &str,
    questions: &[&str],
) -> anyhow::Result<()> {
    let started = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros();
    let reply_to = format!("{REPLIES}{}-{started}", std::process::id());
    let mut replies = subscribe(pulsar, &reply_to, SubType::Exclusive).await?;
    let mut producer = pulsar.producer().with_topic(REQUESTS).build().await?;
    let mut open: HashMap<String, &str> = HashMap::new();
    for (number, question) in questions.iter().enumerate() {
        let id = format!("{started}-{number}");
        let request = producer
            .create_message()
            .with_content(*question)
            .with_property("reply_to", &reply_to)
            .with_property("correlation_id", &id);
        let receipt = request.send_non_blocking().await?;
        timeout(PATIENCE, receipt)
            .await
            .context("no receipt; ask again")??;
        open.insert(id, question);
    }
    let mut limit = pin!(sleep(ANSWERS));
    while !open.is_empty() {
        let reply = tokio::select! {
            reply = replies.try_next() => reply?.with_context(|| format!("lost the connection to {address}"))?,
            _ = &mut limit => break,
        };
        replies.ack(&reply).await?;
        // A second answer, after a redelivery of the question, finds nothing open.
        if let Some(question) = property(&reply, "correlation_id").and_then(|id| open.remove(id)) {
            println!("{question}{}", String::from_utf8_lossy(&reply.payload.data));
        }
    }
    producer.close().await?;
    close(replies).await?;
    if !open.is_empty() {
        bail!(
            "{} questions without an answer within {ANSWERS:?}: is a server running?",
            open.len()
        );
    }
    Ok(())
}

async fn serve(pulsar: &Pulsar<TokioExecutor>, address: &str) -> anyhow::Result<()> {
    let mut requests = subscribe(pulsar, REQUESTS, SubType::Shared).await?;
    let mut producer = pulsar.producer().build_multi_topic();
    println!("serving; Ctrl-C to stop");
    let mut answered = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let request = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            request = requests.try_next() => request?.with_context(|| format!("lost the connection to {address}"))?,
        };
        let question = String::from_utf8_lossy(&request.payload.data);
        let reply_to = property(&request, "reply_to").filter(|topic| agreed(topic));
        match (reply_to, property(&request, "correlation_id")) {
            (Some(topic), Some(id)) => {
                let reply = pulsar::producer::Message {
                    payload: answer(&question).into(),
                    properties: [("correlation_id".to_owned(), id.to_owned())].into(),
                    ..Default::default()
                };
                // Askers come and go; their producers would stay.
                if producer.topics().len() >= MOST_ASKERS {
                    producer = pulsar.producer().build_multi_topic();
                }
                // Left alone, the client tries for ever to get a producer.
                let sent = async { Ok(producer.send_non_blocking(topic, reply).await?.await?) };
                match timeout(PATIENCE, sent)
                    .await
                    .context("no receipt")
                    .and_then(|sent| sent)
                {
                    Ok(_) => {
                        answered += 1;
                        println!("{question}: answered");
                    }
                    // Nobody waits for it any longer, and the next time it would fail again.
                    Err(error) => {
                        println!("{question}: not answered: {error:#}");
                        producer = pulsar.producer().build_multi_topic();
                    }
                }
            }
            // It will not have a place for an answer the next time either.
            _ => println!("{question}: dropped, it does not say where to answer"),
        }
        if last_of_batch(&request) {
            requests.ack(&request).await?;
        }
    }
    close(requests).await?;
    println!("closed; answered: {answered}");
    Ok(())
}

/// A topic of an asker: the prefix, and a name that cannot lead to anywhere else.
fn agreed(topic: &str) -> bool {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || letter == '-';
    topic
        .strip_prefix(REPLIES)
        .is_some_and(|name| !name.is_empty() && name.chars().all(plain))
}

fn answer(question: &str) -> String {
    match question.parse::<i32>() {
        Ok(number) => format!(" squared is {}", i64::from(number) * i64::from(number)),
        Err(_) => ": no number".into(),
    }
}

fn property<'a>(message: &'a pulsar::consumer::Message<Vec<u8>>, name: &str) -> Option<&'a str> {
    let mut all = message.metadata().properties.iter();
    all.find(|property| property.key == name)
        .map(|property| property.value.as_str())
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

/// Left alone, the client retries for more than a minute, in silence.
async fn connect(address: &str) -> anyhow::Result<Pulsar<TokioExecutor>> {
    let client = Pulsar::builder(address, TokioExecutor).build();
    let connected = timeout(PATIENCE, client).await;
    Ok(connected.with_context(|| {
        format!("no Pulsar broker answers at {address}; `cargo lab up pulsar` starts one")
    })??)
}
