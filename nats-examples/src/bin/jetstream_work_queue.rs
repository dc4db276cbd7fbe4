//! Work queue: every job to one worker, gone when it is done, and taken over when a worker dies
//!
//! A stream with work-queue retention removes a message when it is acknowledged. The workers share one durable pull
//! consumer, and a worker gets a job when it asks for one. At least once: a job whose worker dies comes to another one
//! after the ack wait.
//!
//! ```console
//! 1$ cargo lab run jetstream_work_queue send 100
//! queued 100 jobs; waiting in the queue: 100
//! 2$ cargo lab run jetstream_work_queue work anna
//! anna is ready
//! anna: job-[..] done
//! 3$ cargo lab run jetstream_work_queue work ben
//! ben is ready
//! ben: job-[..] done
//! 2:
//! ...
//! 2^C
//! ...
//! anna did [..] jobs
//! 3^C
//! ...
//! ben did [..] jobs
//! ```
//!
//! Notice: fair by itself, for a slow worker asks for less. A core queue group hands out at random, asked or not. A
//! worker that takes long says so, and keeps its job. One that is frozen for longer than the ack wait can't: another
//! does its job meanwhile, and when it wakes up, it finishes what is done already. So a job must bear being done twice.
//! With this retention the subjects of two consumers must not overlap, or the second is refused: whose ack would
//! remove the message? What was given to a worker that has died waits for the ack wait, here five seconds.
//!
//! Try: `cargo lab kill jetstream_work_queue`. Start ten workers. Look at the queue:
//! `cargo lab run jetstream_lag_monitor`.
//!
//! Settings: NATS_URL (nats://localhost:4222); WORK_MS (100), how long a job takes; the arguments are `work NAME` or
//! `send N`. See also: nats_queue_group, jetstream_consumer, jetstream_retry_dlq.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context as _, bail};
use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::stream::{Config, RetentionPolicy, Stream};
use async_nats::jetstream::{self, AckKind, Context, Message};
use futures::{FutureExt, StreamExt};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

const STREAM: &str = "WORK_QUEUE";
const SUBJECT: &str = "work-queue.jobs";
const CONSUMER: &str = "workers";
const ACK_WAIT: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    let mut jetstream = jetstream::new(client);
    jetstream.set_timeout(PATIENCE);
    let mut stream = jetstream
        .get_or_create_stream(Config {
            name: STREAM.into(),
            subjects: vec![SUBJECT.into()],
            retention: RetentionPolicy::WorkQueue,
            ..Default::default()
        })
        .await?;
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => work(&stream, "worker").await,
        ["work", name] => work(&stream, name).await,
        ["send", count] => {
            send(
                &jetstream,
                count.parse().context("N is the number of jobs")?,
            )
            .await?;
            let waiting = stream.info().await?.state.messages;
            println!("queued {count} jobs; waiting in the queue: {waiting}");
            Ok(())
        }
        _ => bail!("usage: jetstream_work_queue [work NAME | send N]"),
    }
}

async fn send(jetstream: &Context, count: u32) -> anyhow::Result<()> {
    let mut acks = Vec::new();
    for number in 1..=count {
        let job = format!("job-{number}");
        acks.push(jetstream.publish(SUBJECT, job.into()).await?);
    }
    for ack in acks {
        ack.await
            .context("no ack: some jobs may be queued or not")?;
    }
    Ok(())
}

async fn work(stream: &Stream, name: &str) -> anyhow::Result<()> {
    let work_ms = std::env::var("WORK_MS").unwrap_or_else(|_| "100".into());
    let work_ms: u64 = work_ms
        .parse()
        .context("WORK_MS is a number of milliseconds")?;
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.into()),
            ack_wait: ACK_WAIT,
            ..Default::default()
        })
        .await?;
    println!("{name} is ready");

    let mut done = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        // One at a time: what a worker has fetched ahead, nobody else can do meanwhile.
        let mut asked = consumer
            .batch()
            .max_messages(1)
            .expires(PATIENCE)
            .messages()
            .await?;
        let job = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => {
                signal?;
                if let Some(Some(Ok(job))) = asked.next().now_or_never() {
                    finish(&job, AckKind::Nak(None)).await;
                }
                break;
            }
            job = asked.next() => job,
        };
        match job {
            Some(Ok(job)) => {
                work_on(&job, Duration::from_millis(work_ms)).await;
                if finish(&job, AckKind::Ack).await {
                    println!("{name}: {} done", String::from_utf8_lossy(&job.payload));
                    done += 1;
                }
            }
            Some(Err(error)) => {
                eprintln!("waiting for the server: {error}");
                tokio::select! {
                    signal = &mut stop => break signal?,
                    () = sleep(Duration::from_secs(1)) => {}
                }
            }
            // None for a while.
            None => {}
        }
    }
    println!("{name} did {done} jobs");
    Ok(())
}

/// The work. As long as it takes, the server is told that this is no crash.
async fn work_on(job: &Message, work: Duration) {
    let mut work = pin!(sleep(work));
    let mut alive = interval(ACK_WAIT / 3);
    alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    alive.tick().await; // the first one is at once
    loop {
        tokio::select! {
            () = &mut work => return,
            _ = alive.tick() => {
                if let Err(error) = job.ack_with(AckKind::Progress).await {
                    eprintln!("no word to the server: {error}");
                }
            }
        }
    }
}

/// Whether the server has the answer. If not, the job comes again, even if it was done.
async fn finish(job: &Message, kind: AckKind) -> bool {
    let answered = matches!(
        timeout(PATIENCE, job.double_ack_with(kind)).await,
        Ok(Ok(()))
    );
    if !answered {
        eprintln!("the server does not answer: a job may be done again");
    }
    answered
}
