//! Reader: read a topic from the beginning, from a message, or from now on, and leave no trace
//!
//! A reader has no subscription that the broker would keep: where it begins, it says itself, each time. It sees every
//! message from there, in order, and acknowledges nothing; to go on after a restart, it has to remember its position.
//!
//! ```console
//! $ cargo lab run pulsar_reader send red green
//! [..]:0 red: stored
//! [..]:1 green: stored
//! 1$ cargo lab run pulsar_reader earliest
//! [..]:0 red
//! [..]:1 green
//! end reached; what comes now follows, Ctrl-C to stop
//! 2$ cargo lab run pulsar_reader send blue
//! [..]:2 blue: stored
//! 1:
//! [..]:2 blue
//! 1^C
//! read: 3
//! ```
//!
//! Notice: nobody holds a topic without subscriptions, and the broker deletes what nobody holds: the example sets a
//! retention for its topic. `InitialPosition::Earliest` has no effect on a reader of this client, it begins at the end;
//! the earliest position is a message id, as below. A message id stands for "after it", unless it has a batch index.
//! The client's reader takes one topic, not one with partitions.
//!
//! Try: `pulsar_reader LEDGER:ENTRY` with a place that was printed, and `pulsar_reader latest`.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650), PULSAR_ADMIN_URL (http://localhost:8080). See also: pulsar_seek,
//! which moves a subscription; pulsar_compacted_table.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail};
use futures::TryStreamExt;
use pulsar::message::proto::MessageIdData;
use pulsar::reader::Reader;
use pulsar::{ConsumerOptions, Pulsar, TokioExecutor};
use serde_json::json;
use tokio::time::timeout;

const TOPIC: &str = "public/default/reader-colours";
const PATIENCE: Duration = Duration::from_secs(5);
/// For the admin interface.
const ANSWER: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let admin =
        std::env::var("PULSAR_ADMIN_URL").unwrap_or_else(|_| "http://localhost:8080".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["send", ref colours @ ..] => send(&pulsar, &admin, colours).await,
        // On the wire, these two are -1 and the largest number.
        [] | ["earliest"] => read(&pulsar, &address, id(u64::MAX, u64::MAX)).await,
        ["latest"] => read(&pulsar, &address, id(i64::MAX as u64, i64::MAX as u64)).await,
        [place] => {
            let usage = "usage: pulsar_reader [earliest | latest | LEDGER:ENTRY | send COLOUR...]";
            let (ledger, entry) = place.split_once(':').context(usage)?;
            let mut from = id(
                ledger.parse().context(usage)?,
                entry.parse().context(usage)?,
            );
            // "At" the message instead of "after" it.
            from.batch_index = Some(0);
            read(&pulsar, &address, from).await
        }
        _ => bail!("at most one place to begin at"),
    }
}

fn id(ledger_id: u64, entry_id: u64) -> MessageIdData {
    MessageIdData {
        ledger_id,
        entry_id,
        ..MessageIdData::default()
    }
}

async fn send(pulsar: &Pulsar<TokioExecutor>, admin: &str, colours: &[&str]) -> anyhow::Result<()> {
    let topic = format!("persistent://{TOPIC}");
    let mut producer = pulsar.producer().with_topic(topic).build().await?;
    keep(admin).await?;
    for colour in colours {
        let receipt = producer.send_non_blocking(*colour).await?;
        let receipt = timeout(PATIENCE, receipt)
            .await
            .context("no receipt; send again")??;
        let place = receipt
            .message_id
            .context("a receipt without a message id")?;
        println!("{}:{} {colour}: stored", place.ledger_id, place.entry_id);
    }
    Ok(producer.close().await?)
}

/// A topic that no subscription holds is deleted as it is read; this keeps it. For this topic alone; it has to exist.
async fn keep(admin: &str) -> anyhow::Result<()> {
    let url = format!("{admin}/admin/v2/persistent/{TOPIC}/retention");
    let policy = json!({"retentionTimeInMinutes": -1, "retentionSizeInMB": -1});
    let request = reqwest::Client::new()
        .post(&url)
        .timeout(ANSWER)
        .json(&policy);
    let answer = request
        .send()
        .await
        .with_context(|| format!("cannot ask {url}"))?;
    if !answer.status().is_success() {
        bail!(
            "cannot set the retention: {}: {}",
            answer.status(),
            answer.text().await?
        );
    }
    Ok(())
}

async fn read(
    pulsar: &Pulsar<TokioExecutor>,
    address: &str,
    from: MessageIdData,
) -> anyhow::Result<()> {
    let options = ConsumerOptions::default().starting_on_message(from);
    let mut reader: Reader<Vec<u8>, _> = pulsar
        .reader()
        .with_topic(format!("persistent://{TOPIC}"))
        .with_options(options)
        .into_reader()
        .await?;
    let end = timeout(PATIENCE, reader.get_last_message_id())
        .await
        .context("no answer")??;
    // -1: the topic is empty.
    let end = (end.ledger_id as i64, end.entry_id as i64);
    let mut at_end = end.1 < 0;
    let mut read = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    if at_end {
        println!("nothing yet; what comes now follows, Ctrl-C to stop");
    }
    loop {
        let message = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            message = reader.try_next() => message?.with_context(|| format!("lost the connection to {address}"))?,
        };
        let place = message.message_id();
        let place = (place.ledger_id as i64, place.entry_id as i64);
        println!(
            "{}:{} {}",
            place.0,
            place.1,
            String::from_utf8_lossy(&message.deserialize())
        );
        read += 1;
        if place >= end && !at_end {
            at_end = true;
            println!("end reached; what comes now follows, Ctrl-C to stop");
        }
    }
    println!("read: {read}");
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
