//! Geo-replication: what is published in one cluster is read in another
//!
//! Two clusters are made known to each other, and share a namespace. Each stores what is published in it, and copies it
//! to the other in the background. At least once, in order per producer: while one of them is down, the other takes
//! orders, and copies them when it is back.
//!
//! ```console
//! $ cargo lab up pulsar --nodes 2 --detach
//! 1$ cargo lab run pulsar_geo_replication
//! geo/orders is replicated between standalone and standalone-2
//! standalone-2: subscribed; Ctrl-C to stop
//! 2$ cargo lab run pulsar_geo_replication send 2
//! standalone: stored 2 orders
//! 1:
//! standalone-2: order-1, published in standalone
//! standalone-2: order-2, published in standalone
//! 1^C
//! standalone-2: closed, orders: 2
//! 2$ cargo lab kill pulsar.2
//! 2$ cargo lab run pulsar_geo_replication send 1
//! standalone: stored 1 orders
//! 2$ cargo lab restart pulsar.2
//! 1$ cargo lab run pulsar_geo_replication
//! ...
//! standalone-2: order-1, published in standalone
//! ...
//! 1^C
//! ...
//! standalone-2: closed, orders: [..]
//! ```
//!
//! Notice: a broker that was killed may have forgotten the last acks, so earlier orders can come again. A receipt says
//! that the order is stored in its own cluster, and nothing of the other. A cluster that is lost for good takes with it
//! what was not copied yet. The clusters copy messages, not positions: a subscription of the same name in the other
//! cluster stands somewhere else. And what arrives where no subscription holds it is deleted, so subscribe in the other
//! cluster first. The wait for copies is a backlog of its own, of `replication` in the stats.
//!
//! Try: `cargo lab kill pulsar.1` right after a `send 1000`, then `cargo lab restart pulsar.1`: all of them arrive.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650) and PULSAR_ADMIN_URL (http://localhost:8080) for the first
//! cluster; PULSAR_ADDRESS_B (pulsar://localhost:6651) and PULSAR_ADMIN_URL_B (http://localhost:8081) for the second.
//! See also: pulsar_multi_tenant.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail};
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::InitialPosition;
use pulsar::{Consumer, ConsumerOptions, ProducerOptions, Pulsar, SubType, TokioExecutor};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time::timeout;

const TENANT: &str = "geo";
const NAMESPACE: &str = "geo/orders";
const TOPIC: &str = "persistent://geo/orders/orders";
const SUBSCRIPTION: &str = "geo-reader";
const PATIENCE: Duration = Duration::from_secs(5);
/// For the admin interface.
const ANSWER: Duration = Duration::from_secs(30);

/// Where one of the clusters is.
struct Cluster {
    address: String,
    admin: String,
    name: String,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let setting =
        |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.into());
    let address = setting("PULSAR_ADDRESS", "pulsar://localhost:6650");
    let admin = setting("PULSAR_ADMIN_URL", "http://localhost:8080");
    let first = connect(&address).await?;
    let first_cluster = Cluster {
        name: cluster_name(&admin).await?,
        address,
        admin,
    };
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        // The other cluster may be down.
        ["send", count] => {
            let count = count.parse().context("N is the number of orders")?;
            send(&first, &first_cluster.name, count).await
        }
        [] => {
            let address = setting("PULSAR_ADDRESS_B", "pulsar://localhost:6651");
            let admin = setting("PULSAR_ADMIN_URL_B", "http://localhost:8081");
            let second = connect(&address).await.context(
                "the second cluster is missing; `cargo lab up pulsar --nodes 2` starts two",
            )?;
            let second_cluster = Cluster {
                name: cluster_name(&admin).await?,
                address,
                admin,
            };
            replicate(&first_cluster, &second_cluster).await?;
            consume(&second, &second_cluster.address, &second_cluster.name).await
        }
        _ => bail!("usage: pulsar_geo_replication [send N]"),
    }
}

async fn cluster_name(admin: &str) -> anyhow::Result<String> {
    let url = format!("{admin}/admin/v2/brokers/configuration/runtime");
    let answer = reqwest::Client::new()
        .get(&url)
        .timeout(ANSWER)
        .send()
        .await
        .with_context(|| format!("cannot ask {url}"))?;
    let settings: Value = answer.error_for_status()?.json().await?;
    let name = settings["clusterName"].as_str();
    Ok(name
        .with_context(|| format!("{url} names no cluster"))?
        .to_owned())
}

/// Tells each cluster of the other, and both of the namespace. Done again, it changes nothing.
async fn replicate(a: &Cluster, b: &Cluster) -> anyhow::Result<()> {
    if a.name == b.name {
        bail!(
            "both clusters are called {}: no copy would ever leave",
            a.name
        );
    }
    let names = json!([a.name, b.name]);
    for (here, there) in [(a, b), (b, a)] {
        let other = json!({"serviceUrl": there.admin, "brokerServiceUrl": there.address});
        put(here, &format!("clusters/{}", there.name), &other).await?;
        let tenant = json!({"adminRoles": [], "allowedClusters": names});
        put(here, &format!("tenants/{TENANT}"), &tenant).await?;
    }
    for here in [a, b] {
        let namespace = format!("namespaces/{NAMESPACE}");
        let status = ask(
            here,
            Method::PUT,
            &namespace,
            &json!({"replication_clusters": names}),
        )
        .await?;
        if status == StatusCode::CONFLICT {
            ask(
                here,
                Method::POST,
                &format!("{namespace}/replication"),
                &names,
            )
            .await?;
        }
    }
    println!(
        "{NAMESPACE} is replicated between {} and {}",
        a.name, b.name
    );
    Ok(())
}

/// Creates it, or if it is there, changes it: the address may be another one than the last time.
async fn put(cluster: &Cluster, path: &str, body: &Value) -> anyhow::Result<()> {
    if ask(cluster, Method::PUT, path, body).await? == StatusCode::CONFLICT {
        ask(cluster, Method::POST, path, body).await?;
    }
    Ok(())
}

async fn ask(
    cluster: &Cluster,
    method: Method,
    path: &str,
    body: &Value,
) -> anyhow::Result<StatusCode> {
    let url = format!("{}/admin/v2/{path}", cluster.admin);
    let request = reqwest::Client::new()
        .request(method, &url)
        .timeout(ANSWER)
        .json(body);
    let answer = request
        .send()
        .await
        .with_context(|| format!("cannot ask {url}"))?;
    let status = answer.status();
    if !status.is_success() && status != StatusCode::CONFLICT {
        bail!("{url}: {status}: {}", answer.text().await?);
    }
    Ok(status)
}

async fn send(pulsar: &Pulsar<TokioExecutor>, cluster: &str, count: u32) -> anyhow::Result<()> {
    let options = ProducerOptions {
        block_queue_if_full: true,
        ..ProducerOptions::default()
    };
    let producer = pulsar
        .producer()
        .with_topic(TOPIC)
        .with_options(options)
        .build()
        .await;
    let mut producer =
        producer.context("is there the namespace? The consumer makes it; start it once")?;
    let mut receipts = Vec::new();
    for number in 1..=count {
        receipts.push(
            producer
                .send_non_blocking(format!("order-{number}"))
                .await?,
        );
    }
    for receipt in receipts {
        timeout(PATIENCE, receipt)
            .await
            .context("no receipt; send again")??;
    }
    producer.close().await?;
    println!("{cluster}: stored {count} orders");
    Ok(())
}

async fn consume(
    pulsar: &Pulsar<TokioExecutor>,
    address: &str,
    cluster: &str,
) -> anyhow::Result<()> {
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(20);
    let mut consumer: Consumer<Vec<u8>, _> = pulsar
        .consumer()
        .with_topic(TOPIC)
        .with_subscription(SUBSCRIPTION)
        .with_subscription_type(SubType::Failover)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(10)
        .with_options(options)
        .build()
        .await?;
    println!("{cluster}: subscribed; Ctrl-C to stop");
    let mut count = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        let message = tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            message = consumer.try_next() => message?.with_context(|| format!("lost the connection to {address}"))?,
        };
        if last_of_batch(&message) {
            consumer.ack(&message).await?;
        }
        let origin = message
            .metadata()
            .replicated_from
            .as_deref()
            .unwrap_or(cluster);
        let order = message.deserialize();
        println!(
            "{cluster}: {}, published in {origin}",
            String::from_utf8_lossy(&order)
        );
        count += 1;
    }
    close(consumer).await?;
    println!("{cluster}: closed, orders: {count}");
    Ok(())
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
