//! Tenants and namespaces: one broker, several teams, each with rules of its own
//!
//! Creates two tenants with namespaces over the admin interface, gives them a retention, a time to live and a backlog
//! quota, and then looks at each of them as it acts. A rule holds for all topics of its namespace, and for no other.
//!
//! ```console
//! $ cargo lab run pulsar_multi_tenant
//! tenancy-shop: plain, kept, brief; tenancy-lab: bounded
//! retention: read by nobody, plain still has 0 of 5 messages, kept has 5
//! time to live: unread for too long, plain still has 5 of 5 messages, brief has 0
//! backlog quota: bounded refuses another producer: [..]quota[..]
//! backlog quota: once its backlog is read, bounded takes messages again
//! ```
//!
//! Notice: retention is about messages that every subscription has read (or that none is there to read), time to live
//! about those that nobody has read: it is a loss by order. Retention and time to live act at the broker's next check
//! or when a ledger is closed, not to the second, so the example unloads topics and sets rules again to see it now. A
//! producer over the quota is refused when it connects; one that is connected already, at a check once a minute. This
//! client then tries again, for ever and without a word, unless `max_retries` says otherwise.
//!
//! Try: set the policy of the quota to `consumer_backlog_eviction`: the producer is served, and the oldest unread
//! messages are gone.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650), PULSAR_ADMIN_URL (http://localhost:8080). See also:
//! pulsar_backlog_monitor, pulsar_geo_replication.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use futures::TryStreamExt;
use pulsar::consumer::InitialPosition;
use pulsar::{Consumer, ConsumerOptions, OperationRetryOptions, Pulsar, SubType, TokioExecutor};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

const SHOP: &str = "tenancy-shop";
const LAB: &str = "tenancy-lab";
const SUBSCRIPTION: &str = "tenancy-reader";
const MESSAGES: u64 = 5;
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a rule may take to act.
const TIMEOUT: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    let pulsar = connect(&address).await?;
    let admin =
        std::env::var("PULSAR_ADMIN_URL").unwrap_or_else(|_| "http://localhost:8080".into());
    let admin = Admin {
        http: reqwest::Client::builder().timeout(TIMEOUT).build()?,
        url: admin,
    };
    admin.set_up().await?;
    // New topics for each run: what an earlier one left is not counted.
    let run = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    retention(&pulsar, &admin, &format!("retention-{run}")).await?;
    time_to_live(&pulsar, &admin, &format!("ttl-{run}")).await?;
    backlog_quota(&pulsar, &address, &format!("quota-{run}")).await
}

struct Admin {
    http: reqwest::Client,
    url: String,
}

impl Admin {
    /// The answer's JSON, or nothing. That something is there already is no error.
    async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let url = format!("{}/admin/v2/{path}", self.url);
        let mut request = self.http.request(method, &url);
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request
            .send()
            .await
            .with_context(|| format!("cannot ask {url}"))?;
        let status = answer.status();
        let text = answer.text().await?;
        if !status.is_success() && status != StatusCode::CONFLICT {
            bail!("{url}: {status}: {text}");
        }
        Ok(serde_json::from_str(&text).unwrap_or_default())
    }

    async fn set_up(&self) -> anyhow::Result<()> {
        let clusters = self.ask(Method::GET, "clusters", None).await?;
        for tenant in [SHOP, LAB] {
            // Roles matter where clients authenticate: these could administer the tenant.
            let rights = json!({"adminRoles": [tenant], "allowedClusters": clusters});
            self.ask(Method::PUT, &format!("tenants/{tenant}"), Some(&rights))
                .await?;
        }
        for namespace in [
            "tenancy-shop/plain",
            "tenancy-shop/kept",
            "tenancy-shop/brief",
            "tenancy-lab/bounded",
        ] {
            self.ask(Method::PUT, &format!("namespaces/{namespace}"), None)
                .await?;
        }
        let keep = json!({"retentionTimeInMinutes": 60, "retentionSizeInMB": 100});
        self.ask(
            Method::POST,
            "namespaces/tenancy-shop/kept/retention",
            Some(&keep),
        )
        .await?;
        self.expire_after_a_second().await?;
        let quota = json!({"limitSize": 10_000, "limitTime": -1, "policy": "producer_exception"});
        let path =
            "namespaces/tenancy-lab/bounded/backlogQuota?backlogQuotaType=destination_storage";
        self.ask(Method::POST, path, Some(&quota)).await?;
        println!("tenancy-shop: plain, kept, brief; tenancy-lab: bounded");
        Ok(())
    }

    /// A change of its rules has the broker check the topics of a namespace, which else it does every five minutes.
    async fn expire_after_a_second(&self) -> anyhow::Result<()> {
        for seconds in [2, 1] {
            let path = "namespaces/tenancy-shop/brief/messageTTL";
            self.ask(Method::POST, path, Some(&json!(seconds))).await?;
        }
        Ok(())
    }

    async fn stored(&self, topic: &str) -> anyhow::Result<u64> {
        let stats = self
            .ask(
                Method::GET,
                &format!("persistent/{topic}/internalStats"),
                None,
            )
            .await?;
        stats["numberOfEntries"]
            .as_u64()
            .with_context(|| format!("no number in {stats}"))
    }

    async fn backlog(&self, topic: &str) -> anyhow::Result<u64> {
        let stats = self
            .ask(Method::GET, &format!("persistent/{topic}/stats"), None)
            .await?;
        let backlog = stats["subscriptions"][SUBSCRIPTION]["msgBacklog"].as_u64();
        backlog.with_context(|| format!("no backlog in {stats}"))
    }
}

/// What nobody reads: deleted when its ledger is closed, or kept.
async fn retention(
    pulsar: &Pulsar<TokioExecutor>,
    admin: &Admin,
    topic: &str,
) -> anyhow::Result<()> {
    let (plain, kept) = (
        format!("{SHOP}/plain/{topic}"),
        format!("{SHOP}/kept/{topic}"),
    );
    for topic in [&plain, &kept] {
        send(pulsar, topic, MESSAGES as usize).await?;
        // Closes the ledger that is written to. The next question loads the topic again.
        admin
            .ask(Method::PUT, &format!("persistent/{topic}/unload"), None)
            .await?;
    }
    let limit = Instant::now() + TIMEOUT;
    while admin.stored(&plain).await? > 0 {
        for topic in [&plain, &kept] {
            // What the broker does by itself every two minutes.
            let path = format!("persistent/{topic}/trim");
            admin.ask(Method::POST, &path, None).await?;
        }
        ensure!(
            Instant::now() < limit,
            "{plain} is still there after {TIMEOUT:?}"
        );
        sleep(Duration::from_millis(200)).await;
    }
    let (plain, kept) = (admin.stored(&plain).await?, admin.stored(&kept).await?);
    println!(
        "retention: read by nobody, plain still has {plain} of {MESSAGES} messages, kept has {kept}"
    );
    Ok(())
}

/// What a subscription has not read: waits for it, or is dropped.
async fn time_to_live(
    pulsar: &Pulsar<TokioExecutor>,
    admin: &Admin,
    topic: &str,
) -> anyhow::Result<()> {
    let (plain, brief) = (
        format!("{SHOP}/plain/{topic}"),
        format!("{SHOP}/brief/{topic}"),
    );
    for topic in [&plain, &brief] {
        subscribe(pulsar, topic).await?.close().await?;
        send(pulsar, topic, MESSAGES as usize).await?;
    }
    let limit = Instant::now() + TIMEOUT;
    while admin.backlog(&brief).await? > 0 {
        ensure!(
            Instant::now() < limit,
            "{brief} has not expired after {TIMEOUT:?}"
        );
        sleep(Duration::from_secs(1)).await;
        admin.expire_after_a_second().await?;
    }
    let (plain, brief) = (admin.backlog(&plain).await?, admin.backlog(&brief).await?);
    println!(
        "time to live: unread for too long, plain still has {plain} of {MESSAGES} messages, brief has {brief}"
    );
    Ok(())
}

/// More than 10 KB unread, and no new producer is let in.
async fn backlog_quota(
    pulsar: &Pulsar<TokioExecutor>,
    address: &str,
    topic: &str,
) -> anyhow::Result<()> {
    let topic = format!("{LAB}/bounded/{topic}");
    let mut consumer = subscribe(pulsar, &topic).await?;
    send(pulsar, &topic, 20).await?;
    match send(pulsar, &topic, 1).await {
        Ok(()) => bail!("20 KB are unread, and the producer was let in"),
        Err(error) => println!("backlog quota: bounded refuses another producer: {error:#}"),
    }
    for _ in 0..20 {
        let message = timeout(PATIENCE, consumer.try_next())
            .await
            .context("nothing more to read")??;
        let message = message.with_context(|| format!("lost the connection to {address}"))?;
        consumer.ack(&message).await?;
    }
    // The answer to the close comes after the acks before it.
    timeout(PATIENCE, consumer.close())
        .await
        .context("no answer to the close")??;
    let limit = Instant::now() + TIMEOUT;
    while let Err(error) = send(pulsar, &topic, 1).await {
        ensure!(
            Instant::now() < limit,
            "still refused after {TIMEOUT:?}: {error:#}"
        );
        sleep(Duration::from_millis(200)).await;
    }
    println!("backlog quota: once its backlog is read, bounded takes messages again");
    Ok(())
}

async fn send(pulsar: &Pulsar<TokioExecutor>, topic: &str, count: usize) -> anyhow::Result<()> {
    let topic = format!("persistent://{topic}");
    let mut producer = pulsar.producer().with_topic(topic).build().await?;
    for _ in 0..count {
        let receipt = producer.send_non_blocking("x".repeat(1000)).await?;
        timeout(PATIENCE, receipt).await.context("no receipt")??;
    }
    Ok(producer.close().await?)
}

async fn subscribe(
    pulsar: &Pulsar<TokioExecutor>,
    topic: &str,
) -> anyhow::Result<Consumer<Vec<u8>, TokioExecutor>> {
    let options = ConsumerOptions::default().with_initial_position(InitialPosition::Earliest);
    let builder = pulsar
        .consumer()
        .with_topic(format!("persistent://{topic}"))
        .with_subscription(SUBSCRIPTION)
        .with_subscription_type(SubType::Failover)
        .with_options(options);
    Ok(builder.build().await?)
}

/// Left alone, the client retries for more than a minute to connect, and for ever to produce, both in silence.
async fn connect(address: &str) -> anyhow::Result<Pulsar<TokioExecutor>> {
    let once = OperationRetryOptions {
        max_retries: Some(0),
        ..OperationRetryOptions::default()
    };
    let client = Pulsar::builder(address, TokioExecutor)
        .with_operation_retry_options(once)
        .build();
    let connected = timeout(PATIENCE, client).await;
    Ok(connected.with_context(|| {
        format!("no Pulsar broker answers at {address}; `cargo lab up pulsar` starts one")
    })??)
}
