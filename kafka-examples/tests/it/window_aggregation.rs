//! A view counts in the window in which it happened, a closed window is corrected in time, and later views are reported.

use anyhow::{Result, ensure};
use compose::Broker;
use compose::harness::{Example, Finished, TIMEOUT};
use rdkafka::ClientConfig;
use rdkafka::producer::{FutureProducer, FutureRecord};

use crate::administrator::create_topic;
use crate::shared;

const VIEWS: &str = "page-views";
const START: i64 = 1_767_268_800_000; // 2026-01-01T12:00:00Z

fn windows(kafka: &Broker) -> Result<Finished> {
    let windows = Example::new(env!("CARGO_BIN_EXE_kafka_window_aggregation"));
    windows.broker(kafka).spawn()?.wait(TIMEOUT)
}

/// The lines that it prints for all views of the topic.
fn lines(kafka: &Broker) -> Result<Vec<String>> {
    let ended = windows(kafka)?.ok()?;
    Ok(ended.stdout.lines().map(str::to_owned).collect())
}

fn page(page: &str, at: i64) -> Vec<u8> {
    format!(r#"{{"page":"{page}","at_ms":{}}}"#, START + at).into_bytes()
}

async fn send(kafka: &Broker, partition: i32, payloads: &[Option<&[u8]>]) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    for payload in payloads {
        let record = FutureRecord::<[u8], [u8]> {
            payload: *payload,
            ..FutureRecord::to(VIEWS).partition(partition)
        };
        let sent = producer.send(record, TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
    }
    Ok(())
}

#[tokio::test]
async fn the_watermark_closes_windows_and_late_views_correct_them() -> Result<()> {
    let kafka = shared::kafka(&["kafka_window_aggregation"])?;
    create_topic(&kafka, VIEWS, 1, &[]).await?;
    let views = [
        page("/a", 0),
        page("/b", 4_999),
        // The watermark is 1 ms before the end of the window, so this view is in time.
        page("/c", 6_999),
        page("/a", 4_000),
        // The watermark is at 12:00:05, the end of the first window.
        page("/c", 7_000),
        page("/b", 1_000),
        // The watermark is at 12:00:09.999, the end of the lateness of the first window is at 12:00:10.
        page("/c", 11_999),
        page("/a", 4_999),
        page("/c", 12_000),
        page("/a", 4_999),
        page("/c", 17_000),
    ];
    let views: Vec<_> = views.iter().map(|view| Some(&view[..])).collect();
    send(&kafka, 0, &views).await?;
    assert_eq!(
        lines(&kafka)?,
        [
            "window 12:00:00 /a: 2 views",
            "window 12:00:00 /b: 1 views",
            "window 12:00:00 /b: 2 views, corrected",
            "window 12:00:00 /a: 3 views, corrected",
            "window 12:00:05 /c: 2 views",
            "partition 0 offset 9 not counted: too late: /a of 12:00:04.999, watermark 12:00:10",
            "window 12:00:10 /c: 2 views",
        ]
    );
    Ok(())
}

#[tokio::test]
async fn records_that_are_not_views_are_reported_and_close_no_window() -> Result<()> {
    let kafka = shared::kafka(&["kafka_window_aggregation"])?;
    create_topic(&kafka, VIEWS, 1, &[]).await?;
    let far = format!(r#"{{"page":"/","at_ms":{}}}"#, i64::MAX);
    let year_3000 = r#"{"page":"/","at_ms":32503680000000}"#;
    let ahead = page("/", chrono::Utc::now().timestamp_millis() - START + 180_000);
    let bad: [Option<&[u8]>; 8] = [
        None,
        Some(b""),
        Some(b"\xff\xfe"),
        Some(b"{}"),
        Some(br#"{"page":"/","at_ms":-1}"#),
        Some(far.as_bytes()),
        Some(year_3000.as_bytes()),
        Some(&ahead),
    ];
    send(&kafka, 0, &[Some(&page("/", 0))]).await?;
    send(&kafka, 0, &bad).await?;
    send(&kafka, 0, &[Some(&page("/", 1)), Some(&page("/", 7_000))]).await?;
    let mut lines = lines(&kafka)?;
    let last = lines.pop();
    assert_eq!(last.as_deref(), Some("window 12:00:00 /: 2 views"));
    assert_eq!(lines.len(), bad.len(), "{lines:?}");
    for (offset, line) in (1..).zip(lines) {
        let start = format!("partition 0 offset {offset} not counted: ");
        ensure!(line.starts_with(&start), "{line}");
    }
    Ok(())
}

#[tokio::test]
async fn all_of_six_partitions_are_read() -> Result<()> {
    let kafka = shared::kafka(&["kafka_window_aggregation"])?;
    create_topic(&kafka, VIEWS, 6, &[]).await?;
    for partition in 0..6 {
        let name = format!("/{partition}");
        let views = [page(&name, 0), page(&name, 7_000)];
        let views: Vec<_> = views.iter().map(|view| Some(&view[..])).collect();
        send(&kafka, partition, &views).await?;
    }
    let mut lines = lines(&kafka)?;
    lines.sort();
    let expected = (0..6).map(|partition| format!("window 12:00:00 /{partition}: 1 views"));
    assert_eq!(lines, expected.collect::<Vec<_>>());
    Ok(())
}

#[test]
fn a_missing_topic_is_an_error_and_not_an_empty_topic() -> Result<()> {
    let kafka = shared::kafka(&["kafka_window_aggregation"])?;
    let ended = windows(&kafka)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    let reason = "Error: no topic page-views, or no permission";
    ensure!(ended.stderr.contains(reason), "{}", ended.stderr);
    Ok(())
}
