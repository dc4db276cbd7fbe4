//! Key-value: compare-and-set, watch, history, and keys that expire
//!
//! A bucket is a stream with a subject for each key, and a revision is a sequence in it. An update that names the
//! revision it has seen is refused when another came first, so nobody overwrites what he has not read: with it,
//! several programs can sell from one stock without a lock, and never sell more than there is.
//!
//! ```console
//! 1$ cargo lab run nats_kv watch
//! watching inventory; Ctrl-C to stop
//! 2$ cargo lab run nats_kv
//! created apples = 10 at revision [..]
//! created again: refused, key already exists
//! updated to 9 at revision [..]
//! updated to 8 on revision [..]: refused, wrong last revision
//! deleted; read: nothing
//! history of apples: purged at [..], 10 at [..], 9 at [..], deleted at [..]
//! a coupon for 2 s: SAVE10, and later nothing
//! 2$ cargo lab run nats_kv stock 5
//! pears = 5
//! 2$ cargo lab run nats_kv buy 7
//! bought 5, conflicts 0: sold out
//! 1:
//! ...
//! apples = 10 at [..]
//! apples = 9 at [..]
//! apples is gone at [..]
//! ...
//! pears = 0 at [..]
//! 1^C
//! stopped
//! ```
//!
//! Notice: `put` overwrites whatever is there; `create` and `update` do not. A watch begins with the last value of each
//! key and goes on with what changes: nothing is missed in between. A key that expires appears as gone. An update whose
//! ack does not come may be stored or not, so a counter must not simply be tried again then. The history is limited by
//! the bucket, at most 64 for each key; a purge removes it, a delete puts a mark on top.
//!
//! Try: run `buy 1000` three times at the same time, with 2000 in stock.
//!
//! Settings: NATS_URL (nats://localhost:4222); the arguments are `watch`, `stock N` or `buy N`. A time to live for a
//! single key needs server 2.11; one for all keys of a bucket (`max_age`) does not: see nats_leader_election.

use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use async_nats::jetstream::kv::{self, CreateErrorKind, Operation, Store, UpdateErrorKind};
use async_nats::jetstream::{self, Context, stream};
use futures::{StreamExt, TryStreamExt};
use tokio::time::sleep;

const BUCKET: &str = "inventory";
const TTL: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    // An older server would ignore the setting, and keep the key for ever.
    let expires = client.is_server_compatible(2, 11, 0);
    let mut jetstream = jetstream::new(client);
    jetstream.set_timeout(PATIENCE);
    let config = kv::Config {
        bucket: BUCKET.into(),
        history: 10,
        // Lets single keys expire, and leaves a mark for watchers for this long. No key lives shorter than that: the
        // server raises a smaller TTL without a word.
        limit_markers: expires.then_some(TTL),
        ..Default::default()
    };
    let bucket = declare(&jetstream, config).await?;
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => show(&bucket, expires).await,
        ["watch"] => watch(&bucket).await,
        ["stock", count] => {
            let count: u32 = count.parse().context("N is a number of pears")?;
            bucket.put("pears", count.to_string().into()).await?;
            println!("pears = {count}");
            Ok(())
        }
        ["buy", count] => buy(&bucket, count.parse().context("N is a number of pears")?).await,
        _ => bail!("usage: nats_kv [watch | stock N | buy N]"),
    }
}

async fn declare(jetstream: &Context, config: kv::Config) -> anyhow::Result<Store> {
    if jetstream.client().is_server_compatible(2, 10, 0) {
        return Ok(jetstream.create_or_update_key_value(config).await?);
    }
    // This client can't read what an older server says of the account, which it asks first. A bucket is such a stream:
    let stream = stream::Config {
        name: format!("KV_{}", config.bucket),
        subjects: vec![format!("$KV.{}.>", config.bucket)],
        max_messages_per_subject: config.history,
        max_age: config.max_age,
        allow_rollup: true,
        deny_delete: true,
        allow_direct: true,
        discard: stream::DiscardPolicy::New,
        ..Default::default()
    };
    jetstream.create_or_update_stream(stream).await?;
    Ok(jetstream.get_key_value(config.bucket).await?)
}

async fn show(bucket: &Store, expires: bool) -> anyhow::Result<()> {
    // From an earlier run.
    bucket.purge("apples").await?;
    let first = bucket.create("apples", "10".into()).await?;
    println!("created apples = 10 at revision {first}");
    match bucket.create("apples", "10".into()).await {
        Err(error) if error.kind() == CreateErrorKind::AlreadyExists => {
            println!("created again: refused, {}", error.kind());
        }
        other => bail!("created again: {other:?}"),
    }
    let second = bucket.update("apples", "9".into(), first).await?;
    println!("updated to 9 at revision {second}");
    match bucket.update("apples", "8".into(), first).await {
        Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => {
            println!(
                "updated to 8 on revision {first}: refused, {}",
                error.kind()
            );
        }
        other => bail!("updated on an old revision: {other:?}"),
    }
    bucket.delete("apples").await?;
    let read = bucket.get("apples").await?;
    println!(
        "deleted; read: {}",
        if read.is_none() {
            "nothing"
        } else {
            "still there"
        }
    );
    let history: Vec<_> = bucket.history("apples").await?.try_collect().await?;
    let history = history.iter().map(|entry| match entry.operation {
        Operation::Put => format!(
            "{} at {}",
            String::from_utf8_lossy(&entry.value),
            entry.revision
        ),
        Operation::Delete => format!("deleted at {}", entry.revision),
        Operation::Purge => format!("purged at {}", entry.revision),
    });
    println!(
        "history of apples: {}",
        history.collect::<Vec<_>>().join(", ")
    );

    if !expires {
        println!("a coupon for 2 s: not on this server, it is older than 2.11");
        return Ok(());
    }
    // A new key each time: where the mark of an expired one is left, this client stores the value without its TTL.
    let key = format!("coupon-{first}");
    bucket.create_with_ttl(&key, "SAVE10".into(), TTL).await?;
    let coupon = bucket
        .get(&key)
        .await?
        .context("the coupon has expired already")?;
    let started = Instant::now();
    while bucket.get(&key).await?.is_some() {
        ensure!(started.elapsed() < 10 * TTL, "the coupon does not expire");
        sleep(TTL / 10).await;
    }
    println!(
        "a coupon for 2 s: {}, and later nothing",
        String::from_utf8_lossy(&coupon)
    );
    Ok(())
}

async fn watch(bucket: &Store) -> anyhow::Result<()> {
    // The last value of each key, and from there on all changes.
    let mut changes = bucket.watch_with_history(">").await?;
    println!("watching {BUCKET}; Ctrl-C to stop");
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let change = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            change = changes.next() => change,
        };
        match change {
            Some(Ok(change)) => match change.operation {
                Operation::Put => println!(
                    "{} = {} at {}",
                    change.key,
                    String::from_utf8_lossy(&change.value),
                    change.revision
                ),
                Operation::Delete | Operation::Purge => {
                    println!("{} is gone at {}", change.key, change.revision);
                }
            },
            Some(Err(error)) => eprintln!("waiting for the server: {error}"),
            None => bail!("the watch has ended"),
        }
    }
    println!("stopped");
    Ok(())
}

/// One pear after the other, each only if nobody else has changed the stock since it was read.
async fn buy(bucket: &Store, wanted: u32) -> anyhow::Result<()> {
    let (mut bought, mut conflicts) = (0, 0);
    while bought < wanted {
        let stock = bucket.entry("pears").await?;
        let stock = stock.filter(|entry| entry.operation == Operation::Put);
        let Some(stock) = stock else { break };
        let text = String::from_utf8_lossy(&stock.value);
        let left: u32 = text
            .parse()
            .with_context(|| format!("pears = {text:?} is no number"))?;
        let Some(left) = left.checked_sub(1) else {
            break;
        };
        match bucket
            .update("pears", left.to_string().into(), stock.revision)
            .await
        {
            Ok(_) => bought += 1,
            // Somebody else was faster: look again.
            Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => conflicts += 1,
            Err(error) => {
                return Err(error).with_context(|| {
                    format!("bought {bought}, and there is no ack for one more: bought or not")
                });
            }
        }
    }
    let end = if bought < wanted { ": sold out" } else { "" };
    println!("bought {bought}, conflicts {conflicts}{end}");
    Ok(())
}
