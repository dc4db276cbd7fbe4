//! Every page view is counted once in the window in which it happened, or is in the topic of rejected ones.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::harness::{Example, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use crate::reader::{read, send_large};
use crate::shared;

const VIEWS: &str = "page-views";
const COUNTS: &str = "page-views.counts";
const REJECTED: &str = "page-views.rejected";
const START: i64 = 1_767_268_800_000; // 2026-01-01T12:00:00Z

fn generate(kafka: &Broker, start: &str) -> Result<String> {
    let views = Example::new(env!("CARGO_BIN_EXE_kafka_page_views"));
    let mut views = views.args([start]).broker(kafka).spawn()?;
    Ok(views.wait(TIMEOUT)?.ok()?.stdout)
}

/// Small transactions, so that a kill finds one open.
fn aggregation(kafka: &Broker, idle_ms: &str) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_window_aggregation"))
        .env("IDLE_MS", idle_ms)
        .env("BATCH", "10")
        .broker(kafka)
        .spawn()
}

/// The number after `"name":`.
fn number(payload: &str, name: &str) -> Result<i64> {
    let (_, rest) = payload
        .split_once(&format!("\"{name}\":"))
        .with_context(|| format!("no {name} in {payload}"))?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    Ok(digits.parse()?)
}

type Window = (String, i64);

#[derive(Debug, Default, PartialEq)]
struct Expected {
    /// The views of each page in each window that is closed.
    counts: BTreeMap<Window, i64>,
    /// How many results there are: first ones and corrections.
    results: usize,
    /// Where the views are that are too late.
    late: BTreeSet<(i32, i64)>,
}

/// What follows from the views alone, in the order of their offsets: 5 s windows, 2 s behind, 5 s of lateness.
fn expected(views: &[OwnedMessage]) -> Result<Expected> {
    let mut expected = Expected::default();
    let mut open: BTreeMap<Window, i64> = BTreeMap::new();
    let mut latest: BTreeMap<i32, i64> = BTreeMap::new();
    for view in views {
        let at = number(
            std::str::from_utf8(view.payload().context("empty")?)?,
            "at_ms",
        )?;
        let page = String::from_utf8(view.key().context("no key")?.to_vec())?;
        let latest = latest.entry(view.partition()).or_insert(i64::MIN / 2);
        let start = at - at % 5_000;
        if start + 10_000 <= *latest - 2_000 {
            expected.late.insert((view.partition(), view.offset()));
            continue;
        }
        *open.entry((page.clone(), start)).or_default() += 1;
        // Closed already: a correction.
        expected.results += usize::from(start + 5_000 <= *latest - 2_000);
        *latest = at.max(*latest);
    }
    for ((page, start), count) in open {
        let partition = views
            .iter()
            .find(|view| view.key() == Some(page.as_bytes()))
            .context("no such page")?
            .partition();
        if start + 5_000 <= latest[&partition] - 2_000 {
            expected.results += 1;
            expected.counts.insert((page, start), count);
        }
    }
    Ok(expected)
}

/// The sum of each window over the last counts of all partitions, and the number of all counts.
fn counts(kafka: &Broker, isolation: &str) -> Result<(BTreeMap<Window, i64>, usize)> {
    let results = read(kafka, COUNTS, isolation)?;
    let mut last = BTreeMap::new();
    for result in &results {
        let payload = std::str::from_utf8(result.payload().context("empty")?)?;
        let (_, page) = payload.split_once("\"page\":\"").context("no page")?;
        let page = page.split('"').next().unwrap_or_default();
        let window = (page.to_owned(), number(payload, "window_ms")?);
        // The key is what compaction goes by.
        last.insert(result.key(), (window, number(payload, "views")?));
    }
    let mut counts = BTreeMap::new();
    for (window, views) in last.into_values() {
        *counts.entry(window).or_default() += views;
    }
    Ok((counts, results.len()))
}

fn header(record: &OwnedMessage, name: &str) -> Result<String> {
    let mut headers = record.headers().into_iter().flat_map(Headers::iter);
    let header = headers.find(|one| one.key == name).context("no header")?;
    Ok(String::from_utf8(
        header.value.unwrap_or_default().to_vec(),
    )?)
}

/// Waits until the position has reached the end of all partitions.
fn wait_until_done(kafka: &Broker, running: &mut Running) -> Result<()> {
    let judge: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "window-aggregation")
        .create()?;
    let left = || -> Result<i64> {
        let mut left = 0;
        for partition in 0..2 {
            let mut at = TopicPartitionList::new();
            at.add_partition(VIEWS, partition);
            let position = match judge.committed_offsets(at, TIMEOUT)?.elements()[0].offset() {
                Offset::Offset(position) => position,
                _ => 0,
            };
            left += judge.fetch_watermarks(VIEWS, partition, TIMEOUT)?.1 - position;
        }
        Ok(left)
    };
    let deadline = Instant::now() + 2 * TIMEOUT;
    loop {
        // An error is what a broker that has just started answers.
        let left = left();
        if matches!(left, Ok(0)) {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline && running.try_wait()?.is_none(),
            "views are left: {left:?}, {:?}",
            running.lines()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn over_kills_and_a_restart_each_view_counts_once_or_is_rejected() -> Result<()> {
    let mut chance = compose::harness::chance()?;
    let kafka = Broker::private(Service::Kafka)?;
    let minutes = ["12:00", "12:02", "12:04", "12:06"];
    for minute in minutes {
        generate(&kafka, &format!("2026-01-01T{minute}:00Z"))?;
    }
    // Nothing is idle for an hour: what counts follows from the views alone.
    for round in 0..5 {
        let mut running = aggregation(&kafka, "3600000")?;
        running.wait_for("window ", TIMEOUT)?;
        std::thread::sleep(Duration::from_millis(chance.u64(0..50)));
        running.kill()?;
        running.wait(TIMEOUT)?;
        if round == 2 {
            kafka.kill(1)?;
            kafka.restart(1)?;
        }
    }
    let mut running = aggregation(&kafka, "3600000")?;
    wait_until_done(&kafka, &mut running)?;
    running.interrupt()?;
    running.wait(TIMEOUT)?.ok()?;

    let views = read(&kafka, VIEWS, "read_committed")?;
    assert_eq!(views.len(), 4 * 183);
    let expected = expected(&views)?;
    // The generator keeps its promise: there is something of each kind.
    assert!(expected.results > expected.counts.len(), "no corrections");
    assert!(expected.late.len() >= 4, "nothing is too late");
    let (found, results) = counts(&kafka, "read_committed")?;
    assert_eq!(found, expected.counts);
    assert_eq!(results, expected.results, "a result is missing or doubled");
    let mut late = BTreeSet::new();
    for record in read(&kafka, REJECTED, "read_committed")? {
        let place = (
            header(&record, "partition")?.parse()?,
            header(&record, "offset")?.parse()?,
        );
        assert!(late.insert(place), "rejected twice: {place:?}");
        assert!(header(&record, "reason")?.starts_with("too late: "));
    }
    assert_eq!(late, expected.late);

    // The same again is too late, all but what is still in open windows.
    generate(&kafka, "2026-01-01T12:00:00Z")?;
    let mut running = aggregation(&kafka, "3600000")?;
    wait_until_done(&kafka, &mut running)?;
    running.interrupt()?;
    running.wait(TIMEOUT)?.ok()?;
    assert_eq!(counts(&kafka, "read_committed")?, (found, results));
    assert_eq!(
        read(&kafka, REJECTED, "read_committed")?.len(),
        late.len() + 183
    );
    Ok(())
}

async fn view(producer: &FutureProducer, partition: i32, payload: Option<&[u8]>) -> Result<()> {
    let record = FutureRecord::<[u8], [u8]> {
        payload,
        ..FutureRecord::to(VIEWS).partition(partition)
    };
    let sent = producer.send(record, TIMEOUT).await;
    sent.map_err(|(error, _)| error)?;
    Ok(())
}

#[tokio::test]
async fn idle_partitions_go_along_bad_views_go_aside_and_a_zombie_is_fenced_off() -> Result<()> {
    let kafka = shared::kafka(&["kafka_window_aggregation"])?;
    let mut running = aggregation(&kafka, "500")?;
    running.wait_for("partition 1: from offset 0", TIMEOUT)?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("message.max.bytes", "2000000")
        .create()?;
    // Partition 0 has seen only this, and would wait for ever.
    view(&producer, 0, Some(page("/quiet", 1_000).as_bytes())).await?;
    view(&producer, 1, Some(page("/busy", 20_000).as_bytes())).await?;
    running.wait_for("window 12:00:00 /quiet: 1 views", TIMEOUT)?;

    let huge = vec![b'x'; 1_048_400];
    // This one would close all windows for the next thousand years.
    let future = format!(r#"{{"page":"/","at_ms":{}}}"#, i64::MAX);
    let long = page(&"p".repeat(2000), 20_000);
    let bad: [Option<&[u8]>; 8] = [
        None,
        Some(b""),
        Some(b"\xff\xfe"),
        Some(b"{}"),
        Some(br#"{"page":"/","at_ms":-1}"#),
        Some(future.as_bytes()),
        Some(long.as_bytes()),
        Some(&huge),
    ];
    for payload in bad {
        view(&producer, 1, payload).await?;
    }
    for _ in bad {
        running.wait_for("not a page view: ", TIMEOUT)?;
    }
    view(&producer, 1, Some(page("/busy", 20_001).as_bytes())).await?;
    view(&producer, 1, Some(page("/busy", 40_000).as_bytes())).await?;
    running.wait_for("window 12:00:20 /busy: 2 views", TIMEOUT)?;
    let rejected = read(&kafka, REJECTED, "read_committed")?;
    assert_eq!(rejected.len(), bad.len());
    for payload in bad {
        let same = |record: &&OwnedMessage| record.payload() == payload;
        assert_eq!(rejected.iter().filter(same).count(), 1);
    }

    running.pause()?;
    let mut successor = aggregation(&kafka, "500")?;
    successor.wait_for("partition 1: from offset 11", TIMEOUT)?;
    view(&producer, 1, Some(page("/busy", 60_000).as_bytes())).await?;
    successor.wait_for("window 12:00:40 /busy: 1 views", TIMEOUT)?;
    running.resume()?;
    let ended = running.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    assert!(
        ended.stderr.contains("Error: fenced off: "),
        "{}",
        ended.stderr
    );
    successor.interrupt()?;
    successor.wait(TIMEOUT)?.ok()?;
    let (found, results) = counts(&kafka, "read_committed")?;
    assert_eq!(results, 3);
    assert_eq!(found.values().sum::<i64>(), 4);
    Ok(())
}

fn page(page: &str, at: i64) -> String {
    format!(r#"{{"page":"{page}","at_ms":{}}}"#, START + at)
}

/// The views, all of them in flight at once.
async fn views(kafka: &Broker, views: impl IntoIterator<Item = (i32, String)>) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("enable.idempotence", "true")
        .create()?;
    let mut reports = Vec::new();
    for (partition, payload) in views {
        let record = FutureRecord::<str, str>::to(VIEWS)
            .partition(partition)
            .payload(&payload);
        reports.push(producer.send_result(record).map_err(|(error, _)| error)?);
    }
    for report in reports {
        report.await?.map_err(|(error, _)| error)?;
    }
    Ok(())
}

#[tokio::test]
async fn a_backlog_is_not_late_and_a_page_in_two_partitions_is_the_sum_of_both() -> Result<()> {
    let kafka = shared::kafka(&["kafka_window_aggregation"])?;
    let mut creator = aggregation(&kafka, "500")?;
    creator.wait_for("partition 1: from offset 0", TIMEOUT)?;
    creator.interrupt()?;
    creator.wait(TIMEOUT)?.ok()?;
    // Ten minutes of the same page in both, in order. With ten in a transaction, either takes longer than IDLE_MS.
    let seconds = |partition| (0..600).map(move |second| (partition, page("/both", 1000 * second)));
    views(&kafka, seconds(0).chain(seconds(1))).await?;
    let mut running = aggregation(&kafka, "500")?;
    wait_until_done(&kafka, &mut running)?;
    running.interrupt()?;
    running.wait(TIMEOUT)?.ok()?;
    assert_eq!(read(&kafka, REJECTED, "read_committed")?.len(), 0);
    let (found, results) = counts(&kafka, "read_committed")?;
    // The last window is open.
    assert_eq!((found.len(), results), (119, 2 * 119));
    assert!(found.values().all(|views| *views == 10), "{found:?}");
    for partition in 0..2 {
        let (mut first, mut last) = (i64::MAX, 0);
        for count in read(&kafka, COUNTS, "read_committed")? {
            let payload = std::str::from_utf8(count.payload().context("empty")?)?;
            if number(payload, "partition")? == partition {
                let at = count.timestamp().to_millis().context("no time")?;
                (first, last) = (first.min(at), last.max(at));
            }
        }
        ensure!(
            last - first > 500,
            "too fast to prove it: {first} to {last}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn what_is_deleted_unread_is_reported_and_the_rest_is_counted() -> Result<()> {
    let kafka = shared::kafka(&["kafka_window_aggregation"])?;
    let mut running = aggregation(&kafka, "3600000")?;
    running.wait_for("partition 1: from offset 0", TIMEOUT)?;
    views(&kafka, (0..3).map(|at| (0, page("/", at)))).await?;
    wait_until_done(&kafka, &mut running)?;
    running.interrupt()?;
    running.wait(TIMEOUT)?.ok()?;

    views(&kafka, (3..10).map(|at| (0, page("/", at)))).await?;
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let mut until = TopicPartitionList::new();
    until.add_partition_offset(VIEWS, 0, Offset::Offset(5))?;
    let deleted = admin.delete_records(&until, &AdminOptions::new()).await?;
    deleted.elements()[0].error()?;

    let mut running = aggregation(&kafka, "3600000")?;
    running.wait_for("partition 0: LOST 2 offsets", TIMEOUT)?;
    running.wait_for("partition 0: from offset 5, 1 windows open", TIMEOUT)?;
    views(&kafka, [(0, page("/", 60_000))]).await?;
    running.wait_for("window 12:00:00 /: 8 views", TIMEOUT)?;

    // Deleted under it while it is frozen, once its last request has been answered.
    running.pause()?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    views(&kafka, (0..4).map(|at| (0, page("/", 61_000 + at)))).await?;
    until.set_partition_offset(VIEWS, 0, Offset::Offset(14))?;
    let deleted = admin.delete_records(&until, &AdminOptions::new()).await?;
    deleted.elements()[0].error()?;
    running.resume()?;
    running.wait_for("partition 0: LOST 3 offsets", TIMEOUT)?;
    views(&kafka, [(0, page("/", 90_000))]).await?;
    running.wait_for("window 12:01:00 /: 2 views", TIMEOUT)?;
    Ok(())
}

#[tokio::test]
async fn pages_beyond_the_bound_and_large_views_are_rejected_and_windows_go_on() -> Result<()> {
    let kafka = shared::kafka(&["kafka_window_aggregation"])?;
    let mut running = aggregation(&kafka, "3600000")?;
    running.wait_for("partition 1: from offset 0", TIMEOUT)?;
    running.interrupt()?;
    running.wait(TIMEOUT)?.ok()?;
    let large = send_large(&kafka, VIEWS).await?;
    // 1000 bytes each, of the kind that JSON makes six of.
    let long = |number| page(&format!(r"{number:06}{}", r"\u0001".repeat(994)), 1000);
    views(&kafka, (0..3000).map(|number| (0, long(number)))).await?;
    views(
        &kafka,
        [(0, page("/next", 60_000)), (0, page("/next", 90_000))],
    )
    .await?;

    let mut running = Example::new(env!("CARGO_BIN_EXE_kafka_window_aggregation"))
        .env("BATCH", "500")
        .broker(&kafka)
        .spawn()?;
    running.wait_for("window 12:01:00 /next: 1 views", TIMEOUT)?;
    running.interrupt()?;
    running.wait(TIMEOUT)?.ok()?;
    let rejected = read(&kafka, REJECTED, "read_committed")?;
    let is_large = |record: &&OwnedMessage| record.payload() == Some(&large);
    assert_eq!(rejected.iter().filter(is_large).count(), 1);
    for record in rejected.iter().filter(|record| !is_large(record)) {
        let reason = header(record, "reason")?;
        assert!(reason.starts_with("no room: "), "{reason}");
    }
    let (found, _) = counts(&kafka, "read_committed")?;
    assert_eq!(found.len() + rejected.len(), 3002);
    assert!(found.len() > 900, "{}", found.len());
    Ok(())
}
