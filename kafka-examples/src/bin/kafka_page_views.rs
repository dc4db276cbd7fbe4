//! Page views: events that arrive out of order and late, as real ones do, for kafka_window_aggregation
//!
//! Three pages are viewed once a second for a minute. A view carries the time at which it happened; most arrive at once,
//! some a little later, a few much later. It is the same each time but for the start. Each view is confirmed by the
//! broker. Views of a page keep the order in which they are sent, which is not the order in which they happened.
//!
//! ```console
//! $ cargo lab run kafka_page_views 2026-01-01T12:00:00Z
//! sent: 183 page views of 12:00:00 to 12:01:20; 53 of them overtaken by a later one
//! ```
//!
//! Notice: the key is the page, so all views of a page are in one partition, and whoever reads it can count them
//! alone. The time of the event is in the payload. A record's own timestamp would do, too, unless its topic is set to
//! `LogAppendTime`, which replaces it by the time of arrival. The last three views, twenty seconds after all others, are
//! there to close the windows before them: nothing but a later event tells that time has passed.
//!
//! Try: run it twice with the same start, while kafka_window_aggregation runs: all of the second run is too late.
//!
//! Settings: KAFKA_BROKERS (localhost:9092); the argument is the start (the current minute).
//! See also: kafka_window_aggregation.

use std::time::Duration;

use anyhow::{Context, bail};
use chrono::{DateTime, SubsecRound, Utc};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde::Serialize;

const TOPIC: &str = "page-views";
const PARTITIONS: i32 = 2;
const PAGES: [&str; 3] = ["/home", "/docs", "/pricing"];
const SECONDS: i64 = 60;
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct View {
    page: &'static str,
    at_ms: i64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let start: DateTime<Utc> = match std::env::args().nth(1) {
        Some(text) => text
            .parse()
            .with_context(|| format!("{text:?} is no start like 2026-01-01T12:00:00Z"))?,
        None => Utc::now().trunc_subsecs(0),
    };
    let start_ms = start.timestamp().div_euclid(60) * 60_000;
    create_topic(&brokers).await?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        // Without it, a retry could change the order once more.
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    let views = views(start_ms);
    let mut deliveries = Vec::new();
    let (mut latest, mut overtaken) = (i64::MIN, 0);
    for view in &views {
        let payload = serde_json::to_string(view)?;
        let record = FutureRecord::to(TOPIC).key(view.page).payload(&payload);
        deliveries.push(producer.send_result(record).map_err(|(error, _)| error)?);
        overtaken += u32::from(view.at_ms < latest);
        latest = latest.max(view.at_ms);
    }
    for delivery in deliveries {
        let report = delivery.await?.map_err(|(error, _)| error);
        report.with_context(|| format!("a view has no delivery report from {brokers}"))?;
    }
    let time = |ms| DateTime::from_timestamp_millis(ms).map(|time| time.format("%H:%M:%S"));
    let (first, last) = time(start_ms).zip(time(latest)).context("no such time")?;
    println!(
        "sent: {} page views of {first} to {last}; {overtaken} of them overtaken by a later one",
        views.len()
    );
    Ok(())
}

/// In the order of their arrival.
fn views(start_ms: i64) -> Vec<View> {
    let mut arrivals = Vec::new();
    let pages = (0..SECONDS).flat_map(|second| PAGES.map(|page| (second, page)));
    for (number, (second, page)) in (0..).zip(pages) {
        let at_ms = start_ms + 1000 * second;
        let delay = match number % 20 {
            // Too late for every window: a phone that was in a tunnel, for example.
            13 => 14_000,
            // After the first result, in time for a corrected one.
            7 => 6_000,
            n if n % 4 == 3 => 1_500,
            _ => 0,
        };
        arrivals.push((at_ms + delay, View { page, at_ms }));
    }
    let end = start_ms + 1000 * (SECONDS + 20);
    arrivals.extend(PAGES.map(|page| (end, View { page, at_ms: end })));
    // Stable: what arrives at the same time stays in order.
    arrivals.sort_by_key(|(arrival, _)| *arrival);
    arrivals.into_iter().map(|(_, view)| view).collect()
}

/// Left to the broker, the topic would be created by the first record, with the broker's settings.
async fn create_topic(brokers: &str) -> anyhow::Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    // It blocks, but nothing else runs yet.
    admin
        .inner()
        .fetch_metadata(None, PATIENCE)
        .with_context(|| {
            format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one")
        })?;
    // -1 is the broker's default replication factor.
    let topic = NewTopic::new(TOPIC, PARTITIONS, TopicReplication::Fixed(-1));
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin.create_topics([&topic], &options).await {
        Ok(results) => {
            for result in results {
                match result {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                    Err((topic, code)) => bail!("cannot create topic {topic}: {code}"),
                }
            }
        }
        // Not every cluster lets its clients create topics; librdkafka's mock does not.
        Err(error) => eprintln!("leaving topic {TOPIC} to the broker: {error}"),
    }
    Ok(())
}
