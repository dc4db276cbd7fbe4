//! A view counts in the window in which it happened, a closed window is corrected in time, and later views are reported.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{FutureProducer, FutureRecord};

use crate::administrator::create_topic;
use crate::shared;

const VIEWS: &str = "page-views";
const START: i64 = 1_767_268_800_000; // 2026-01-01T12:00:00Z

fn windows(kafka: &Broker) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_window_aggregation"))
        .broker(kafka)
        .spawn()
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

/// The last count of each window and page that these lines tell.
fn counts(lines: &[String]) -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    for line in lines {
        if let Some((window, views)) = line.split_once(": ")
            && let Some((views, _)) = views.split_once(" views")
            && let Ok(views) = views.parse()
        {
            counts.insert(window.to_owned(), views);
        }
    }
    counts
}

#[tokio::test]
async fn the_watermark_closes_windows_and_late_views_correct_them() -> Result<()> {
    let kafka = shared::kafka(&["kafka_window_aggregation"])?;
    create_topic(&kafka, VIEWS, 1, &[]).await?;
    let mut running = windows(&kafka)?;
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
    running.wait_for("window 12:00:10 /c: 2 views", TIMEOUT)?;
    let lines: Vec<_> = running.lines();
    assert_eq!(
        lines,
        [
            "window 12:00:00 /a: 2 views",
            "window 12:00:00 /b: 1 views",
            "window 12:00:00 /b: 2 views, corrected",
            "window 12:00:00 /a: 3 views, corrected",
            "window 12:00:05 /c: 2 views",
            "too late: /a of 12:00:04, the watermark is at 12:00:10",
            "window 12:00:10 /c: 2 views",
        ]
    );
    running.terminate()?;
    let ended = running.wait(TIMEOUT)?.ok()?;
    assert!(ended.stdout.ends_with("left the group\n"));
    Ok(())
}

#[tokio::test]
async fn records_that_are_not_views_are_reported_and_close_no_window() -> Result<()> {
    let kafka = shared::kafka(&["kafka_window_aggregation"])?;
    create_topic(&kafka, VIEWS, 1, &[]).await?;
    let mut running = windows(&kafka)?;
    let far = format!(r#"{{"page":"/","at_ms":{}}}"#, i64::MAX);
    let year_3000 = r#"{"page":"/","at_ms":32503680000000}"#;
    let bad: [Option<&[u8]>; 7] = [
        None,
        Some(b""),
        Some(b"\xff\xfe"),
        Some(b"{}"),
        Some(br#"{"page":"/","at_ms":-1}"#),
        Some(far.as_bytes()),
        Some(year_3000.as_bytes()),
    ];
    send(&kafka, 0, &[Some(&page("/", 0))]).await?;
    send(&kafka, 0, &bad).await?;
    send(&kafka, 0, &[Some(&page("/", 1)), Some(&page("/", 7_000))]).await?;
    for offset in 1..=bad.len() {
        running.wait_for(
            &format!("partition 0 offset {offset} not counted: "),
            TIMEOUT,
        )?;
    }
    running.wait_for("window 12:00:00 /: 2 views", TIMEOUT)?;
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
    let mut running = windows(&kafka)?;
    for _ in 0..6 {
        running.wait_for("window 12:00:00 /", TIMEOUT)?;
    }
    let expected = (0..6).map(|partition| (format!("window 12:00:00 /{partition}"), 1));
    assert_eq!(counts(&running.lines()), expected.collect());
    Ok(())
}

/// The topic does not exist at the start. Each partition has a window of its own, which the next view closes.
#[tokio::test]
async fn a_rebalance_or_a_restart_counts_no_view_twice() -> Result<()> {
    let kafka = shared::kafka(&["kafka_window_aggregation"])?;
    let mut first = windows(&kafka)?;
    let views = Example::new(env!("CARGO_BIN_EXE_kafka_page_views"));
    let mut views = views
        .args(["2026-01-01T12:00:00Z"])
        .broker(&kafka)
        .spawn()?;
    views.wait(TIMEOUT)?.ok()?;
    for partition in 0..3 {
        let name = format!("/{partition}");
        let views = [page(&name, 200_000), page(&name, 207_000)];
        let views: Vec<_> = views.iter().map(|view| Some(&view[..])).collect();
        send(&kafka, partition, &views).await?;
    }
    let is_last = |line: &&String| line.starts_with("window 12:03:20 /");
    let await_last = |first: &mut Running, second: &mut Running, from: usize| {
        let deadline = Instant::now() + 2 * TIMEOUT;
        loop {
            let seen = [&first.lines()[from..], &second.lines()].concat();
            if seen.iter().filter(is_last).count() >= 3 {
                return Ok(seen);
            }
            ensure!(Instant::now() < deadline, "{seen:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    for _ in 0..3 {
        first.wait_for("window 12:03:20 /", TIMEOUT)?;
    }
    let lines = first.lines();
    let expected = counts(&lines);
    let late = lines.iter().filter(|line| line.starts_with("too late: "));
    assert!(late.count() >= 3, "{lines:?}");

    // All partitions are taken from the first member. Each member gets at least one of them.
    let mut second = windows(&kafka)?;
    let seen = await_last(&mut first, &mut second, lines.len())?;
    assert_eq!(counts(&seen), expected);
    second.interrupt()?;
    second.wait(TIMEOUT)?.ok()?;
    first.interrupt()?;
    first.wait(TIMEOUT)?.ok()?;
    let mut third = windows(&kafka)?;
    for _ in 0..3 {
        third.wait_for("window 12:03:20 /", TIMEOUT)?;
    }
    assert_eq!(counts(&third.lines()), expected);
    Ok(())
}

#[tokio::test]
async fn a_member_with_another_assignor_ends_the_program_with_the_reason() -> Result<()> {
    let kafka = shared::kafka(&["kafka_window_aggregation"])?;
    create_topic(&kafka, VIEWS, 1, &[]).await?;
    let other: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "window-aggregation")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .create()?;
    other.subscribe(&[VIEWS])?;
    let deadline = Instant::now() + TIMEOUT;
    while other.assignment()?.count() == 0 {
        ensure!(Instant::now() < deadline, "not a member");
        other.poll(Duration::from_millis(100));
    }
    let ended = windows(&kafka)?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    assert!(
        ended.stderr.contains("InconsistentGroupProtocol"),
        "{}",
        ended.stderr
    );
    Ok(())
}
