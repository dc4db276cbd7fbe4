//! What the tests share: one broker for all that do not break it, a client, and the broker's own view.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use compose::harness::{Example, Running};
use compose::{Broker, Service};
use futures::StreamExt;
use pulsar::consumer::InitialPosition;
use pulsar::{Consumer, ConsumerOptions, ProducerOptions, Pulsar, SubType, TokioExecutor};
use serde_json::Value;
use tokio::time::{sleep, timeout};

pub use compose::harness::TIMEOUT;

pub type Client = Pulsar<TokioExecutor>;

/// One broker per test process. Each example has topics of its own, so the tests of different examples do not meet. Those
/// of one example take turns by [`own`].
pub fn shared() -> Result<&'static Broker> {
    static BROKER: OnceLock<Result<Broker>> = OnceLock::new();
    let broker = BROKER.get_or_init(|| Broker::private(Service::Pulsar));
    broker.as_ref().map_err(|error| anyhow!("{error:#}"))
}

/// The shared broker with an empty topic, for as long as what is returned with it is kept. Those who want the same topic
/// wait for each other.
pub async fn own(
    name: &'static str,
) -> Result<(&'static Broker, tokio::sync::OwnedMutexGuard<()>)> {
    type Turns = BTreeMap<&'static str, Arc<tokio::sync::Mutex<()>>>;
    static TURNS: LazyLock<Mutex<Turns>> = LazyLock::new(Mutex::default);
    let turn = {
        let mut turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
        turns.entry(name).or_default().clone()
    };
    let turn = turn.lock_owned().await;
    let broker = shared()?;
    let web = broker
        .web()
        .into_iter()
        .next()
        .context("no admin interface")?;
    let url = format!("{web}/admin/v2/persistent/public/default/{name}?force=true");
    let answer = reqwest::Client::new().delete(url).send().await?;
    if answer.status() != reqwest::StatusCode::NOT_FOUND {
        answer.error_for_status()?;
    }
    Ok((broker, turn))
}

pub fn topic(name: &str) -> String {
    format!("persistent://public/default/{name}")
}

pub async fn client(broker: &Broker) -> Result<Client> {
    let client = Pulsar::builder(broker.address(), TokioExecutor).build();
    Ok(client.await?)
}

pub fn start(binary: &str, broker: &Broker, args: &[&str]) -> Result<Running> {
    Example::new(binary).broker(broker).args(args).spawn()
}

/// Runs it to its end and gives its standard output.
pub fn run(binary: &str, broker: &Broker, args: &[&str]) -> Result<String> {
    Ok(start(binary, broker, args)?.wait(TIMEOUT)?.ok()?.stdout)
}

/// Interrupts it, requires an orderly end, and gives all that it has printed.
pub fn stop(running: &mut Running) -> Result<String> {
    running.interrupt()?;
    Ok(running.wait(TIMEOUT)?.ok()?.stdout)
}

pub async fn send(
    client: &Client,
    topic: &str,
    payloads: impl IntoIterator<Item = impl AsRef<[u8]>>,
) -> Result<()> {
    send_keyed(
        client,
        topic,
        payloads.into_iter().map(|payload| (None, payload)),
    )
    .await
}

pub async fn send_keyed(
    client: &Client,
    topic: &str,
    messages: impl IntoIterator<Item = (Option<String>, impl AsRef<[u8]>)>,
) -> Result<()> {
    let options = ProducerOptions {
        block_queue_if_full: true,
        ..ProducerOptions::default()
    };
    let mut producer = client
        .producer()
        .with_topic(topic)
        .with_options(options)
        .build()
        .await?;
    let mut receipts = Vec::new();
    for (key, payload) in messages {
        let message = pulsar::producer::Message {
            payload: payload.as_ref().to_vec(),
            partition_key: key,
            ..Default::default()
        };
        receipts.push(producer.send_non_blocking(message).await?);
    }
    for receipt in receipts {
        receipt.await?;
    }
    Ok(producer.close().await?)
}

/// All of them as one batch, and so as one entry.
pub async fn send_batch(
    client: &Client,
    topic: &str,
    payloads: impl IntoIterator<Item = impl AsRef<[u8]>>,
) -> Result<()> {
    let payloads: Vec<Vec<u8>> = payloads
        .into_iter()
        .map(|payload| payload.as_ref().to_vec())
        .collect();
    let options = ProducerOptions {
        batch_size: Some(u32::try_from(payloads.len())?),
        block_queue_if_full: true,
        ..ProducerOptions::default()
    };
    let mut producer = client
        .producer()
        .with_topic(topic)
        .with_options(options)
        .build()
        .await?;
    let mut receipts = Vec::new();
    for payload in payloads {
        receipts.push(producer.send_non_blocking(payload).await?);
    }
    let mut entries = std::collections::BTreeSet::new();
    for receipt in receipts {
        let place = receipt.await?.message_id.context("no message id")?;
        entries.insert((place.ledger_id, place.entry_id));
    }
    anyhow::ensure!(entries.len() == 1, "not one batch: {entries:?}");
    Ok(producer.close().await?)
}

pub async fn consumer(
    client: &Client,
    topic: &str,
    subscription: &str,
) -> Result<Consumer<Vec<u8>, TokioExecutor>> {
    let options = ConsumerOptions::default().with_initial_position(InitialPosition::Earliest);
    let consumer = client
        .consumer()
        .with_topic(topic)
        .with_subscription(subscription)
        .with_subscription_type(SubType::Shared)
        .with_options(options);
    Ok(consumer.build().await?)
}

pub async fn next(
    consumer: &mut Consumer<Vec<u8>, TokioExecutor>,
) -> Result<pulsar::consumer::Message<Vec<u8>>> {
    let next = timeout(TIMEOUT, consumer.next())
        .await
        .context("no message")?;
    Ok(next.context("the stream ended")??)
}

/// What the admin interface says of a topic.
pub async fn stats(broker: &Broker, topic: &str) -> Result<Value> {
    let web = broker
        .web()
        .into_iter()
        .next()
        .context("no admin interface")?;
    let url = format!("{web}/admin/v2/{}/stats", topic.replace("://", "/"));
    Ok(reqwest::get(url).await?.error_for_status()?.json().await?)
}

/// Messages of the subscription that are not acknowledged.
pub async fn backlog(broker: &Broker, topic: &str, subscription: &str) -> Result<u64> {
    let stats = stats(broker, topic).await?;
    let backlog = stats["subscriptions"][subscription]["msgBacklog"].as_u64();
    backlog.with_context(|| format!("no subscription {subscription} in {stats}"))
}

/// Asks again until it is so.
pub async fn until(what: &str, mut check: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    let mut last = None;
    while Instant::now() < deadline {
        match check().await {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => last = Some(error),
        }
        sleep(Duration::from_millis(100)).await;
    }
    bail!("not so after {TIMEOUT:?}: {what} (last error: {last:?})")
}

/// The numbers behind `prefix` in the lines that have it.
pub fn numbers(lines: &[String], prefix: &str) -> Vec<u32> {
    let number = |line: &String| {
        let digits: String = line
            .split_once(prefix)?
            .1
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        digits.parse().ok()
    };
    lines.iter().filter_map(number).collect()
}
