//! Consumer lag: what each consumer has still to get, what it holds, and what it will never see
//!
//! Asks the server about all consumers of all streams, prints what changes, warns above a threshold, and says when it
//! is over. The lag is what is pending plus what is delivered and not acknowledged: a consumer that hangs has nothing
//! pending and everything unacknowledged. It is right for a consumer that nobody uses, too.
//!
//! ```console
//! 1$ cargo lab run jetstream_work_queue send 20
//! queued 20 jobs; waiting in the queue: 20
//! 1$ WORK_MS=1000 cargo lab run jetstream_work_queue work anna
//! anna is ready
//! 2$ LAG_INTERVAL=1 LAG_THRESHOLD=10 cargo lab run jetstream_lag_monitor
//! watching all consumers every 1 s, threshold 10
//! WORK_QUEUE/workers: pending [..], unacknowledged [..], redelivered 0, lag [..]
//! WARNING: WORK_QUEUE/workers is [..] behind, over the threshold of 10
//! ...
//! recovered: WORK_QUEUE/workers is [..] behind
//! ...
//! 2^C
//! 1^C
//! ...
//! ```
//!
//! Notice: a stream with a limit drops its oldest messages, also those that a consumer was never given. No lag will
//! ever show them, so they are reported as lost; that can be told for consumers that read a whole stream.
//! Unacknowledged stands still at `max_ack_pending`, 1000 by default: beyond that, nothing more is delivered.
//! Redelivered that grows is a consumer that dies or is too slow for its ack wait. Only acks count: an ephemeral
//! consumer is gone, with its lag, soon after its program.
//!
//! Try: `cargo lab kill jetstream_work_queue`; its job shows as unacknowledged, then as redelivered once another has
//! it.
//!
//! Settings: NATS_URL (nats://localhost:4222); LAG_THRESHOLD (10000) per consumer; LAG_INTERVAL (10) in seconds; the
//! argument is a stream to watch alone. See also: jetstream_work_queue, jetstream_stream, kafka_lag_monitor.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::stream::RetentionPolicy;
use async_nats::jetstream::{self, Context};
use futures::TryStreamExt;
use tokio::time::{MissedTickBehavior, interval, timeout};

const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Default, PartialEq)]
struct Backlog {
    pending: u64,
    unacknowledged: u64,
    redelivered: u64,
    /// Dropped by the stream before the consumer was given them.
    lost: u64,
}

impl Backlog {
    fn lag(&self) -> u64 {
        self.pending + self.unacknowledged
    }
}

/// By stream and consumer.
type Backlogs = BTreeMap<(String, String), Backlog>;

#[tokio::main]
async fn main() -> Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let only = std::env::args().nth(1);
    let threshold = setting("LAG_THRESHOLD", 10_000)?;
    let seconds = setting("LAG_INTERVAL", 10)?.max(1);
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    let mut jetstream = jetstream::new(client);
    jetstream.set_timeout(PATIENCE);

    let whose = only.as_deref().unwrap_or("all");
    println!("watching {whose} consumers every {seconds} s, threshold {threshold}");
    let (mut before, mut warned) = (Backlogs::new(), BTreeSet::new());
    let mut tick = interval(Duration::from_secs(seconds));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let read = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => return Ok(signal?),
            read = async {
                tick.tick().await;
                timeout(2 * PATIENCE, read(&jetstream, only.as_deref())).await
            } => read,
        };
        match read {
            Ok(Ok(now)) => {
                report(&before, &now);
                alarm(&now, threshold, &mut warned);
                before = now;
            }
            // Not knowing the lag is no reason to end, nor to say that it is zero.
            Ok(Err(error)) => eprintln!("lag unknown: {error:#}"),
            Err(_) => eprintln!("lag unknown: the server does not answer"),
        }
    }
}

fn setting(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{name} is {text:?}, not a whole number")),
        Err(_) => Ok(default),
    }
}

async fn read(jetstream: &Context, only: Option<&str>) -> Result<Backlogs> {
    let (mut backlogs, mut watched) = (Backlogs::new(), false);
    let mut names = jetstream.stream_names();
    while let Some(name) = names.try_next().await? {
        if only.is_some_and(|only| only != name) {
            continue;
        }
        watched = true;
        let stream = jetstream.get_stream(&name).await?;
        let consumers: Vec<Info> = stream.consumers().try_collect().await?;
        // After the consumers: the other way round, one that reads meanwhile could seem to have skipped something.
        let state = stream.get_info().await?;
        for consumer in consumers {
            let whole = consumer.config.filter_subject.is_empty()
                && consumer.config.filter_subjects.is_empty()
                && state.config.retention == RetentionPolicy::Limits;
            let next = consumer.delivered.stream_sequence + 1;
            let lost = state.state.first_sequence.saturating_sub(next);
            let backlog = Backlog {
                pending: consumer.num_pending,
                unacknowledged: consumer.num_ack_pending as u64,
                redelivered: consumer.num_redelivered as u64,
                lost: if whole { lost } else { 0 },
            };
            backlogs.insert((name.clone(), consumer.name), backlog);
        }
    }
    match only {
        Some(only) if !watched => bail!("there is no stream {only}"),
        _ => Ok(backlogs),
    }
}

/// One line per consumer whose backlog has changed.
fn report(before: &Backlogs, now: &Backlogs) {
    for (of @ (stream, consumer), backlog) in now {
        let known = before.get(of);
        if known == Some(backlog) {
            continue;
        }
        println!(
            "{stream}/{consumer}: pending {}, unacknowledged {}, redelivered {}, lag {}",
            backlog.pending,
            backlog.unacknowledged,
            backlog.redelivered,
            backlog.lag()
        );
        if backlog.lost > known.map_or(0, |known| known.lost) {
            println!(
                "LOST: {stream}/{consumer}: the stream dropped {} messages undelivered",
                backlog.lost
            );
        }
    }
}

/// Says when a lag passes the threshold, and when it is back. In between it is silent.
fn alarm(now: &Backlogs, threshold: u64, warned: &mut BTreeSet<(String, String)>) {
    warned.retain(|of| now.contains_key(of));
    for (of @ (stream, consumer), backlog) in now {
        let lag = backlog.lag();
        if lag > threshold && warned.insert(of.clone()) {
            println!(
                "WARNING: {stream}/{consumer} is {lag} behind, over the threshold of {threshold}"
            );
        } else if lag <= threshold && warned.remove(of) {
            println!("recovered: {stream}/{consumer} is {lag} behind");
        }
    }
}
