//! Page views that arrive out of order and late: the input for the window examples
//!
//! Three pages are viewed once per second for one minute. A view carries the time at which it happened (`at_ms`). Most
//! views arrive immediately, some after 1.5 seconds, and a few after 6 or 14 seconds. A view counts as sent when all
//! in-sync replicas have it.
//!
//! ```console
//! $ cargo lab run kafka_page_views 2026-01-01T12:00:00Z
//! sent: 183 page views of 12:00:00 to 12:01:20
//! ```
//!
//! Notice:
//! - The key is the page, so all views of a page are in one partition.
//! - The event time is in the payload. The record's own timestamp can be replaced by the broker (`LogAppendTime`).
//! - The last three views happen 20 seconds after the others. They close all earlier windows.
//!
//! Try: run it twice with the same start while kafka_crash_safe_windows runs. In the second run, only the last three views
//! are not too late.
//! Usage: kafka_page_views [START], by default the current minute. Settings: KAFKA_BROKERS (localhost:9092).
//! See also: kafka_window_aggregation, kafka_crash_safe_windows.

use std::time::Duration;

use anyhow::Context;
use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use rdkafka::ClientConfig;
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use serde_json::json;

const TOPIC: &str = "page-views";
const PAGES: [&str; 3] = ["/home", "/docs", "/pricing"];
const SECONDS: i64 = 60;
const TIMEOUT: Duration = Duration::from_secs(5);

type Time = DateTime<Utc>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let start: Time = match std::env::args().nth(1) {
        Some(text) => text
            .parse()
            .with_context(|| format!("{text:?} is not a time like 2026-01-01T12:00:00Z"))?,
        None => Utc::now(),
    };
    let start = start.duration_trunc(TimeDelta::minutes(1))?;
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        // Without it, a retry can change the order of the views.
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "30000")
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(Some(TOPIC), TIMEOUT);
    metadata.context(tip)?;

    let views = views(start);
    let mut reports = Vec::new();
    for (time, page) in &views {
        let view = json!({"page": page, "at_ms": time.timestamp_millis()}).to_string();
        let record = FutureRecord::to(TOPIC).key(*page).payload(&view);
        // Not awaited here, so that all views are in flight at the same time, in the order of their arrival.
        reports.push(producer.send_result(record).map_err(|(error, _)| error)?);
    }
    for report in reports {
        let report = report.await?.map_err(|(error, _)| error);
        report.context("not confirmed, a view may or may not be written")?;
    }
    let last = views.last().map_or(start, |(time, _)| *time);
    let (count, first, last) = (views.len(), start.time(), last.time());
    println!("sent: {count} page views of {first} to {last}");
    Ok(())
}

/// The views in the order of their arrival.
fn views(start: Time) -> Vec<(Time, &'static str)> {
    let pages = (0..SECONDS).flat_map(|second| PAGES.map(|page| (second, page)));
    let mut arrivals = Vec::new();
    for (number, (second, page)) in (0..).zip(pages) {
        let delay = match number % 20 {
            13 => 14_000, // after the allowed lateness
            7 => 6_000,   // after the first count, within the allowed lateness
            n if n % 4 == 3 => 1_500,
            _ => 0,
        };
        let time = start + TimeDelta::seconds(second);
        arrivals.push((time + TimeDelta::milliseconds(delay), (time, page)));
    }
    let end = start + TimeDelta::seconds(SECONDS + 20);
    arrivals.extend(PAGES.map(|page| (end, (end, page))));
    // The sort is stable: views that arrive at the same time stay in their order.
    arrivals.sort_by_key(|(arrival, _)| *arrival);
    arrivals.into_iter().map(|(_, view)| view).collect()
}
