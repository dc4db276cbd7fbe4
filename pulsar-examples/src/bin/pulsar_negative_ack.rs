//! Negative ack: a job that fails comes back, later and later, and holds up no other
//!
//! A negative ack gives a message back to the subscription, and the broker delivers it again, here or to another
//! consumer. At least once, in no order (Shared). What is neither acknowledged nor given back stays with its consumer
//! until that is gone.
//!
//! ```console
//! 1$ cargo lab run pulsar_negative_ack
//! subscribed; Ctrl-C to stop
//! 2$ cargo lab run pulsar_negative_ack send job-1 flaky-2 job-3
//! stored: 3 jobs
//! 1:
//! job-1: done at attempt 1
//! flaky-2: attempt 1 failed, again in 100 ms
//! job-3: done at attempt 1
//! flaky-2: attempt 2 failed, again in 200 ms
//! flaky-2: done at attempt 3
//! 1^C
//! closed; jobs done: 3
//! ```
//!
//! Notice: this client gives a message back at once and the broker delivers it at once, so a job that fails at once
//! would be in a hot loop; the delay before `nack` is the example's own. The broker counts the redeliveries, but the
//! client does not show the count, so the attempts are counted here and forgotten with the process. In a batch, the
//! negative ack of one message brings back all of them, and none is acknowledged before all are done.
//!
//! Try: send `broken-1`, which always fails, and stop: it is still in the backlog. After how many attempts a job should
//! be put aside is the subject of pulsar_dead_letter.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650). See also: pulsar_dead_letter; pulsar_retry_backoff, whose delays
//! survive the process.

use std::collections::HashMap;
use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::InitialPosition;
use pulsar::{Consumer, ConsumerOptions, ProducerOptions, Pulsar, SubType, TokioExecutor};
use tokio::time::{sleep, timeout};

const TOPIC: &str = "persistent://public/default/negative-ack-jobs";
const SUBSCRIPTION: &str = "negative-ack-worker";
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first() {
        None => consume(&pulsar, &address).await,
        Some((first, jobs)) if first == "send" => send(&pulsar, jobs).await,
        Some(_) => bail!("usage: pulsar_negative_ack [send JOB...]"),
    }
}

async fn send(pulsar: &Pulsar<TokioExecutor>, jobs: &[String]) -> anyhow::Result<()> {
    let options = ProducerOptions {
        // Or more jobs than its queue holds would be an error.
        block_queue_if_full: true,
        ..ProducerOptions::default()
    };
    let builder = pulsar.producer().with_topic(TOPIC).with_options(options);
    let mut producer = builder.build().await?;
    let mut receipts = Vec::new();
    for job in jobs {
        receipts.push(producer.send_non_blocking(job).await?);
    }
    for receipt in receipts {
        timeout(PATIENCE, receipt)
            .await
            .context("no receipt; send again")??;
    }
    producer.close().await?;
    println!("stored: {} jobs", jobs.len());
    Ok(())
}

async fn consume(pulsar: &Pulsar<TokioExecutor>, address: &str) -> anyhow::Result<()> {
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(20);
    let mut consumer: Consumer<Vec<u8>, _> = pulsar
        .consumer()
        .with_topic(TOPIC)
        .with_subscription(SUBSCRIPTION)
        .with_subscription_type(SubType::Shared)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(10)
        .with_options(options)
        .build()
        .await?;
    println!("subscribed; Ctrl-C to stop");

    let mut attempts: HashMap<(u64, u64), u32> = HashMap::new();
    let mut waiting = FuturesUnordered::new();
    let mut done = 0;
    // Whether a job of the batch in hand has failed: then the others of it come again, too.
    let mut failed = false;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let message = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            Some(id) = waiting.next() => {
                consumer.nack_with_id(TOPIC, id).await?;
                continue;
            }
            message = consumer.try_next() => message?.with_context(|| format!("lost the connection to {address}"))?,
        };
        let id = message.message_id().clone();
        let place = (id.ledger_id, id.entry_id);
        let attempt = attempts.get(&place).map_or(1, |before| before + 1);
        let job = String::from_utf8_lossy(&message.payload.data);
        if work(&job, attempt).await {
            if last_of_batch(&message) && !std::mem::take(&mut failed) {
                consumer.ack(&message).await?;
                attempts.remove(&place);
            }
            done += 1;
            println!("{job}: done at attempt {attempt}");
        } else {
            failed = !last_of_batch(&message);
            attempts.insert(place, attempt);
            let delay = FIRST_DELAY
                .saturating_mul(2_u32.saturating_pow(attempt - 1))
                .min(LONGEST_DELAY);
            println!(
                "{job}: attempt {attempt} failed, again in {} ms",
                delay.as_millis()
            );
            // Meanwhile it counts as in work here, and other messages flow.
            waiting.push(async move {
                sleep(delay).await;
                id
            });
        }
    }
    // What waits for its next attempt is given back by the close.
    close(consumer).await?;
    println!("closed; jobs done: {done}");
    Ok(())
}

async fn work(job: &str, attempt: u32) -> bool {
    sleep(Duration::from_millis(10)).await;
    match job.split('-').next() {
        Some("job") => true,
        Some("flaky") => attempt > 2,
        _ => false,
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

/// Left alone, the client retries for more than a minute, in silence.
async fn connect(address: &str) -> anyhow::Result<Pulsar<TokioExecutor>> {
    let client = Pulsar::builder(address, TokioExecutor).build();
    let connected = timeout(PATIENCE, client).await;
    Ok(connected.with_context(|| {
        format!("no Pulsar broker answers at {address}; `cargo lab up pulsar` starts one")
    })??)
}
