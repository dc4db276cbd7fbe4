//! Backlog: how far each subscription is behind, with a warning before it hurts
//!
//! The backlog of a subscription is what is stored for it and not acknowledged; a part of it may be with consumers at
//! the moment ("in work"). Both are asked of the broker, so they are right for a subscription without consumers, too.
//! It prints what changes, warns above a threshold, and says when it is over.
//!
//! ```console
//! 1$ cargo lab run pulsar_shared worker
//! worker: subscribed; Ctrl-C to stop
//! 1^C
//! worker: closed, orders done: 0
//! 1$ cargo lab run pulsar_shared send 30
//! stored: 30 orders
//! 2$ BACKLOG_INTERVAL=1 BACKLOG_THRESHOLD=10 cargo lab run pulsar_backlog_monitor
//! watching public/default every 1 s, threshold 10
//! shared-orders / shared-worker: backlog 30, in work 0, consumers 0
//! WARNING: shared-orders / shared-worker is 30 behind, over the threshold of 10, and nobody consumes
//! 1$ cargo lab run pulsar_shared worker
//! ...
//! worker: order-30
//! 2:
//! ...
//! recovered: shared-orders / shared-worker is [..] behind
//! ...
//! 1^C
//! worker: closed, orders done: 30
//! 2^C
//! ...
//! ```
//!
//! Notice: the broker counts entries, and a batch of a thousand messages is one. A subscription that nobody uses any
//! more holds all messages since, and the disk fills: its backlog is the one to look for. Topics that the broker has
//! not loaded are loaded by the question. Prometheus finds the same numbers at `/metrics/` of the admin interface, as
//! `pulsar_subscription_back_log`.
//!
//! Try: another namespace as the argument.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650), PULSAR_ADMIN_URL (http://localhost:8080); BACKLOG_THRESHOLD
//! (10000) per subscription; BACKLOG_INTERVAL (10) in seconds. See also: pulsar_multi_tenant, where a quota acts on it.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::time::Duration;

use anyhow::Context;
use pulsar::{Pulsar, TokioExecutor};
use serde::Deserialize;
use tokio::time::{interval, timeout};

const PATIENCE: Duration = Duration::from_secs(5);

/// What the admin interface says of a topic; the rest of it is left out.
#[derive(Deserialize)]
struct Topic {
    subscriptions: BTreeMap<String, Subscription>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Subscription {
    msg_backlog: u64,
    unacked_messages: u64,
    consumers: Vec<serde::de::IgnoredAny>,
}

/// By topic and subscription.
type Backlogs = BTreeMap<(String, String), Subscription>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let admin =
        std::env::var("PULSAR_ADMIN_URL").unwrap_or_else(|_| "http://localhost:8080".into());
    drop(pulsar); // It was to say whether there is a broker. The numbers come by HTTP.
    let namespace = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "public/default".into());
    let threshold = setting("BACKLOG_THRESHOLD", 10_000)?;
    let seconds = setting("BACKLOG_INTERVAL", 10)?.max(1);
    let http = reqwest::Client::builder().timeout(PATIENCE).build()?;
    let mut before = read(&http, &admin, &namespace).await?;
    println!("watching {namespace} every {seconds} s, threshold {threshold}");
    report(&Backlogs::new(), &before);
    let mut warned = BTreeSet::new();
    alarm(&before, threshold, &mut warned);

    let mut tick = interval(Duration::from_secs(seconds));
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            biased;
            signal = &mut stop => return Ok(signal?),
            _ = tick.tick() => {}
        }
        match read(&http, &admin, &namespace).await {
            Ok(now) => {
                report(&before, &now);
                alarm(&now, threshold, &mut warned);
                before = now;
            }
            // Not knowing the backlog is no reason to end, nor to say that it is zero.
            Err(error) => eprintln!("backlog unknown: {error:#}"),
        }
    }
}

fn setting(name: &str, default: u64) -> anyhow::Result<u64> {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{name} is {text:?}, not a whole number")),
        Err(_) => Ok(default),
    }
}

async fn read(http: &reqwest::Client, admin: &str, namespace: &str) -> anyhow::Result<Backlogs> {
    // The partitions of a partitioned topic are in the list, each by itself.
    let topics: Vec<String> =
        get(http, &format!("{admin}/admin/v2/persistent/{namespace}")).await?;
    let mut backlogs = Backlogs::new();
    for topic in topics {
        let path = topic.replacen("://", "/", 1);
        let stats: Topic = match get(http, &format!("{admin}/admin/v2/{path}/stats")).await {
            Ok(stats) => stats,
            Err(error) if gone(&error) => continue, // deleted since the list was made
            Err(error) => return Err(error),
        };
        let name = path.rsplit('/').next().unwrap_or_default();
        for (subscription, state) in stats.subscriptions {
            backlogs.insert((name.to_owned(), subscription), state);
        }
    }
    Ok(backlogs)
}

async fn get<T: serde::de::DeserializeOwned>(
    http: &reqwest::Client,
    url: &str,
) -> anyhow::Result<T> {
    let answer = http
        .get(url)
        .send()
        .await
        .with_context(|| format!("cannot ask {url}"))?;
    Ok(answer.error_for_status()?.json().await?)
}

fn gone(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<reqwest::Error>();
    error.is_some_and(|error| error.status() == Some(reqwest::StatusCode::NOT_FOUND))
}

/// One line per subscription that has changed.
fn report(before: &Backlogs, now: &Backlogs) {
    for (of @ (topic, subscription), state) in now {
        let seen = |state: &Subscription| {
            (
                state.msg_backlog,
                state.unacked_messages,
                state.consumers.len(),
            )
        };
        if before.get(of).map(seen) != Some(seen(state)) {
            let (backlog, unacked, consumers) = seen(state);
            println!(
                "{topic} / {subscription}: backlog {backlog}, in work {unacked}, consumers {consumers}"
            );
        }
    }
}

/// Says when a backlog passes the threshold, and when it is back. In between it is silent.
fn alarm(now: &Backlogs, threshold: u64, warned: &mut BTreeSet<(String, String)>) {
    warned.retain(|of| now.contains_key(of));
    for (of @ (topic, subscription), state) in now {
        let backlog = state.msg_backlog;
        if backlog > threshold && warned.insert(of.clone()) {
            let nobody = if state.consumers.is_empty() {
                ", and nobody consumes"
            } else {
                ""
            };
            println!(
                "WARNING: {topic} / {subscription} is {backlog} behind, over the threshold of {threshold}{nobody}"
            );
        } else if backlog <= threshold && warned.remove(of) {
            println!("recovered: {topic} / {subscription} is {backlog} behind");
        }
    }
}

/// Left alone, the client retries for more than a minute, in silence.
async fn connect(address: &str) -> anyhow::Result<Pulsar<TokioExecutor>> {
    let client = Pulsar::builder(address, TokioExecutor).build();
    let connected = timeout(PATIENCE, client).await;
    Ok(connected.with_context(|| {
        format!("no Pulsar broker answers at {address}; `cargo lab up pulsar` starts one")
    })??)
}
