//! Every page view is counted once in the window in which it happened, or is printed with the reason.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::harness::{Example, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::admin::{AdminOptions, NewPartitions};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::message::OwnedMessage;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use crate::administrator::{admin, create_topic, tool};
use crate::reader::{await_markers, left, read, send_large};
use crate::shared;

const VIEWS: &str = "page-views";
const COUNTS: &str = "page-views.counts";
const START: i64 = 1_767_268_800_000; // 2026-01-01T12:00:00Z

fn generate(kafka: &Broker, start: &str) -> Result<String> {
    let views = Example::new(env!("CARGO_BIN_EXE_kafka_page_views"));
    let mut views = views.args([start]).broker(kafka).spawn()?;
    Ok(views.wait(TIMEOUT)?.ok()?.stdout)
}

fn windows(kafka: &Broker) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_crash_safe_windows"))
        .broker(kafka)
        .spawn()
}

/// Runs until all views are read.
fn run(kafka: &Broker) -> Result<Vec<String>> {
    let mut running = windows(kafka)?;
    wait_until_done(kafka, &mut running)?;
    running.interrupt()?;
    let ended = running.wait(TIMEOUT)?.ok()?;
    Ok(ended.stdout.lines().map(str::to_owned).collect())
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
    /// The views of each page in each window.
    counts: BTreeMap<Window, i64>,
    /// The places of the views that are too late.
    late: BTreeSet<(i32, i64)>,
}

/// What follows from the views alone, in the order of their offsets: 5 s windows, 2 s out of order, 5 s of lateness.
fn expected(views: &[OwnedMessage]) -> Result<Expected> {
    let mut expected = Expected::default();
    let mut latest: BTreeMap<i32, i64> = BTreeMap::new();
    for view in views {
        let payload = std::str::from_utf8(view.payload().context("empty")?)?;
        let at = number(payload, "at_ms")?;
        let page = String::from_utf8(view.key().context("no key")?.to_vec())?;
        let latest = latest.entry(view.partition()).or_insert(i64::MIN / 2);
        let start = at - at % 5_000;
        if start + 10_000 <= *latest - 2_000 {
            expected.late.insert((view.partition(), view.offset()));
            continue;
        }
        *expected.counts.entry((page, start)).or_default() += 1;
        *latest = at.max(*latest);
    }
    Ok(expected)
}

/// The sum of each window over the last counts of all partitions. Fails if a count is missing or repeated: under each key
/// the counts are 1, 2, 3 and so on.
fn counts(kafka: &Broker) -> Result<BTreeMap<Window, i64>> {
    let mut last = BTreeMap::new();
    for record in read(kafka, COUNTS, "read_committed")? {
        let payload = std::str::from_utf8(record.payload().context("empty")?)?;
        let (_, page) = payload.split_once("\"page\":\"").context("no page")?;
        let page = page.split('"').next().unwrap_or_default();
        let window = (page.to_owned(), number(payload, "window_ms")?);
        let views = number(payload, "views")?;
        let key = record.key().context("no key")?.to_vec();
        let before = last.insert(key, (window, views));
        let before = before.map_or(0, |(_, views)| views);
        ensure!(views == before + 1, "{views} after {before}: {payload}");
    }
    let mut counts = BTreeMap::new();
    for (window, views) in last.into_values() {
        *counts.entry(window).or_default() += views;
    }
    Ok(counts)
}

/// The places of the views that the program has not counted. A crash can repeat a line.
fn not_counted<S: AsRef<str>>(lines: &[S], reason: &str) -> Result<BTreeSet<(i32, i64)>> {
    let mut places = BTreeSet::new();
    for line in lines {
        let Some((place, found)) = line.as_ref().split_once(" not counted: ") else {
            continue;
        };
        ensure!(found.starts_with(reason), "{found}");
        let place = place.strip_prefix("partition ");
        let place = place.and_then(|place| place.split_once(" offset "));
        let (partition, offset) = place.context("no place")?;
        places.insert((partition.parse()?, offset.parse()?));
    }
    Ok(places)
}

fn judge(kafka: &Broker) -> Result<BaseConsumer> {
    Ok(ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "crash-safe-windows")
        .create()?)
}

fn wait_until_done(kafka: &Broker, running: &mut Running) -> Result<()> {
    let judge = judge(kafka)?;
    let deadline = Instant::now() + 2 * TIMEOUT;
    loop {
        // A broker that has just started answers with an error.
        let left = left(&judge, VIEWS);
        if matches!(left, Ok(0)) {
            // The positions can be visible a moment before the results.
            return await_markers(kafka, COUNTS);
        }
        ensure!(
            Instant::now() < deadline && running.try_wait()?.is_none(),
            "views are left: {left:?}, {:?}",
            running.lines()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn page(page: &str, at: i64) -> String {
    format!(r#"{{"page":"{page}","at_ms":{}}}"#, START + at)
}

/// The views, all of them in flight at once.
async fn send(kafka: &Broker, views: impl IntoIterator<Item = (i32, String)>) -> Result<()> {
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

#[test]
fn after_kills_and_a_broker_restart_each_view_is_counted_once_or_printed() -> Result<()> {
    let mut chance = compose::harness::chance()?;
    let kafka = Broker::private(Service::Kafka)?;
    for minute in 0..8 {
        generate(&kafka, &format!("2026-01-01T12:{:02}:00Z", 2 * minute))?;
    }
    let (mut interrupted, mut lines) = (0, Vec::new());
    for round in 0..5 {
        let mut running = windows(&kafka)?;
        running.wait_for("window ", TIMEOUT)?;
        std::thread::sleep(Duration::from_millis(chance.u64(0..50)));
        running.kill()?;
        running.wait(TIMEOUT)?;
        lines.extend(running.lines());
        interrupted += i32::from(left(&judge(&kafka)?, VIEWS)? > 0);
        if round == 2 {
            kafka.kill(1)?;
            kafka.restart(1)?;
        }
    }
    assert!(interrupted >= 3, "the kills came too late");
    lines.extend(run(&kafka)?);

    let views = read(&kafka, VIEWS, "read_committed")?;
    assert_eq!(views.len(), 8 * 183);
    let expected = expected(&views)?;
    assert!(expected.late.len() >= 8, "nothing is too late");
    assert_eq!(counts(&kafka)?, expected.counts);
    assert_eq!(not_counted(&lines, "too late: ")?, expected.late);

    // The same views again are too late.
    generate(&kafka, "2026-01-01T12:00:00Z")?;
    let again = run(&kafka)?;
    assert_eq!(counts(&kafka)?, expected.counts);
    assert_eq!(not_counted(&again, "too late: ")?.len(), 183);
    Ok(())
}

async fn view(producer: &FutureProducer, payload: Option<&[u8]>) -> Result<()> {
    let record = FutureRecord::<[u8], [u8]> {
        payload,
        ..FutureRecord::to(VIEWS).partition(1).key(&b"\xff"[..])
    };
    let sent = producer.send(record, TIMEOUT).await;
    sent.map_err(|(error, _)| error)?;
    Ok(())
}

#[tokio::test]
async fn records_that_are_not_views_are_printed_and_not_counted() -> Result<()> {
    let kafka = shared::kafka(&["kafka_crash_safe_windows"])?;
    create_topic(&kafka, VIEWS, 2, &[]).await?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("message.max.bytes", "2000000")
        .create()?;
    // This view would close all windows of the next thousand years.
    let future = format!(r#"{{"page":"/","at_ms":{}}}"#, i64::MAX / 2);
    let now = chrono::Utc::now().timestamp_millis() - START;
    let ahead = page("/", now + 180_000);
    let large = vec![b'x'; 1_048_300];
    let long = page(&"p".repeat(2000), 20_000);
    let bad: [Option<&[u8]>; 9] = [
        None,
        Some(b""),
        Some(b"\xff\xfe"),
        Some(b"{}"),
        Some(br#"{"page":"/","at_ms":-1}"#),
        Some(future.as_bytes()),
        Some(ahead.as_bytes()),
        Some(long.as_bytes()),
        Some(&large),
    ];
    for payload in bad {
        view(&producer, payload).await?;
    }
    send_large(&kafka, VIEWS).await?;
    let mut running = windows(&kafka)?;
    view(&producer, Some(page("/good", 20_001).as_bytes())).await?;
    running.wait_for("window 12:00:20 /good: 1 views", TIMEOUT)?;
    wait_until_done(&kafka, &mut running)?;
    running.terminate()?;
    running.wait(TIMEOUT)?.ok()?;

    let expected = (0..9).map(|offset| (1, offset)).chain([(0, 0)]);
    let places = not_counted(&running.lines(), "")?;
    assert_eq!(places, expected.collect());
    let good = ("/good".to_owned(), START + 20_000);
    assert_eq!(counts(&kafka)?, BTreeMap::from([(good, 1)]));
    Ok(())
}

#[tokio::test]
async fn a_second_instance_takes_over_and_the_first_ends() -> Result<()> {
    let kafka = shared::kafka(&["kafka_crash_safe_windows"])?;
    create_topic(&kafka, VIEWS, 2, &[]).await?;
    send(&kafka, [(1, page("/", 1_000))]).await?;
    let mut running = windows(&kafka)?;
    running.wait_for("window 12:00:00 /: 1 views", TIMEOUT)?;
    running.pause()?;
    let mut successor = windows(&kafka)?;
    successor.wait_for("partition 1: continues at offset 1", TIMEOUT)?;
    send(&kafka, [(1, page("/", 2_000))]).await?;
    successor.wait_for("window 12:00:00 /: 2 views", TIMEOUT)?;
    running.resume()?;
    let ended = running.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    assert!(
        ended
            .stderr
            .contains("Error: the transaction is not written: ")
            && ended.stderr.to_lowercase().contains("fence"),
        "{}",
        ended.stderr
    );
    send(&kafka, [(1, page("/", 3_000))]).await?;
    successor.wait_for("window 12:00:00 /: 3 views", TIMEOUT)?;
    let window = ("/".to_owned(), START);
    assert_eq!(counts(&kafka)?, BTreeMap::from([(window, 3)]));
    Ok(())
}

#[tokio::test]
async fn a_backlog_is_not_late_and_a_page_in_two_partitions_is_the_sum_of_both() -> Result<()> {
    let kafka = shared::kafka(&["kafka_crash_safe_windows"])?;
    create_topic(&kafka, VIEWS, 2, &[]).await?;
    // Ten minutes of the same page in both, in order.
    let seconds = |partition| (0..600).map(move |second| (partition, page("/both", 1000 * second)));
    send(&kafka, seconds(0).chain(seconds(1))).await?;
    let lines = run(&kafka)?;
    let found = counts(&kafka)?;
    assert_eq!(found.len(), 120);
    assert!(found.values().all(|views| *views == 10), "{found:?}");
    assert!(not_counted(&lines, "")?.is_empty());
    Ok(())
}

#[tokio::test]
async fn deleted_views_are_reported_and_the_others_are_counted() -> Result<()> {
    let kafka = shared::kafka(&["kafka_crash_safe_windows"])?;
    create_topic(&kafka, VIEWS, 1, &[]).await?;
    let delete = async |before| -> Result<()> {
        let mut until = TopicPartitionList::new();
        until.add_partition_offset(VIEWS, 0, Offset::Offset(before))?;
        let deleted = admin(&kafka)?
            .delete_records(&until, &AdminOptions::new())
            .await?;
        Ok(deleted.elements()[0].error()?)
    };
    send(&kafka, (0..3).map(|at| (0, page("/", at)))).await?;
    run(&kafka)?;
    // The program is not running. The deleted views are three that are counted in an open window, and two not counted yet.
    send(&kafka, (3..10).map(|at| (0, page("/", at)))).await?;
    delete(5).await?;
    let mut running = windows(&kafka)?;
    let said = "partition 0: views before offset 5 are deleted, 2 are LOST";
    running.wait_for(said, TIMEOUT)?;
    send(&kafka, [(0, page("/", 60_000))]).await?;
    running.wait_for("window 12:01:00 /: 1 views", TIMEOUT)?;
    // The open window could not be rebuilt. Its count stays, and each other view is printed.
    let first = ("/".to_owned(), START);
    let mut expected = BTreeMap::from([(first, 3), (("/".to_owned(), START + 60_000), 1)]);
    assert_eq!(counts(&kafka)?, expected);
    assert_eq!(not_counted(&running.lines(), "too late: ")?.len(), 5);

    // Deleted while the program is frozen, after the answer to its last request.
    running.pause()?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    send(&kafka, (0..4).map(|at| (0, page("/", 61_000 + at)))).await?;
    delete(14).await?;
    running.resume()?;
    let ended = running.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}{}", ended.stdout, ended.stderr);
    let mut running = windows(&kafka)?;
    let said = "partition 0: views before offset 14 are deleted, 3 are LOST";
    running.wait_for(said, TIMEOUT)?;
    send(&kafka, [(0, page("/", 90_000))]).await?;
    running.wait_for("window 12:01:30 /: 1 views", TIMEOUT)?;
    expected.insert(("/".to_owned(), START + 90_000), 1);
    assert_eq!(counts(&kafka)?, expected);
    Ok(())
}

#[tokio::test]
async fn all_of_six_partitions_are_read_and_an_added_one_after_a_restart() -> Result<()> {
    let kafka = shared::kafka(&["kafka_crash_safe_windows"])?;
    create_topic(&kafka, VIEWS, 6, &[]).await?;
    generate(&kafka, "2026-01-01T12:00:00Z")?;
    let mut running = windows(&kafka)?;
    wait_until_done(&kafka, &mut running)?;
    let views = read(&kafka, VIEWS, "read_committed")?;
    let partitions: BTreeSet<i32> = views.iter().map(Message::partition).collect();
    assert!(
        partitions.iter().any(|partition| *partition > 2),
        "{partitions:?}"
    );
    let expected = expected(&views)?;
    assert_eq!(counts(&kafka)?, expected.counts);
    let late = not_counted(&running.lines(), "too late: ")?;
    assert_eq!(late, expected.late);

    let more = NewPartitions::new(VIEWS, 7);
    admin(&kafka)?
        .create_partitions([&more], &AdminOptions::new())
        .await?;
    // A new client asks for the partitions. The broker knows the new one a moment later.
    let deadline = Instant::now() + TIMEOUT;
    while let Err(error) = send(&kafka, [(6, page("/added", 0))]).await {
        ensure!(Instant::now() < deadline, "{error}");
    }
    running.terminate()?;
    running.wait(TIMEOUT)?.ok()?;
    let mut running = windows(&kafka)?;
    running.wait_for("partition 6: continues at offset 0", TIMEOUT)?;
    running.wait_for("window 12:00:00 /added: 1 views", TIMEOUT)?;
    Ok(())
}

#[tokio::test]
async fn a_position_after_the_end_of_the_topic_ends_the_program() -> Result<()> {
    let kafka = shared::kafka(&["kafka_crash_safe_windows"])?;
    create_topic(&kafka, VIEWS, 1, &[]).await?;
    send(&kafka, (0..3).map(|at| (0, page("/", at)))).await?;
    let other: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "crash-safe-windows")
        .create()?;
    let mut position = TopicPartitionList::new();
    position.add_partition_offset(VIEWS, 0, Offset::Offset(100))?;
    other.commit(&position, CommitMode::Sync)?;
    let ended = windows(&kafka)?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    let reason = "partition 0 ends at 3, before 100";
    assert!(ended.stderr.contains(reason), "{}", ended.stderr);
    Ok(())
}

/// The broker deletes the positions with the topic.
#[tokio::test]
async fn a_topic_that_was_created_again_is_counted_from_its_start() -> Result<()> {
    let kafka = shared::kafka(&["kafka_crash_safe_windows"])?;
    create_topic(&kafka, VIEWS, 1, &[]).await?;
    send(&kafka, (0..3).map(|at| (0, page("/", at)))).await?;
    run(&kafka)?;
    let deleted = admin(&kafka)?
        .delete_topics(&[VIEWS], &AdminOptions::new())
        .await?;
    ensure!(deleted.iter().all(Result::is_ok), "{deleted:?}");
    // The name is free again a moment later.
    let deadline = Instant::now() + TIMEOUT;
    while create_topic(&kafka, VIEWS, 1, &[]).await.is_err()
        && !matches!(left(&judge(&kafka)?, VIEWS), Ok(0))
    {
        ensure!(Instant::now() < deadline, "not created again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    send(&kafka, [(0, page("/", 0)), (0, page("/", 1))]).await?;
    let mut running = windows(&kafka)?;
    running.wait_for("partition 0: continues at offset 0", TIMEOUT)?;
    running.wait_for("window 12:00:00 /: 2 views", TIMEOUT)?;
    Ok(())
}

#[tokio::test]
async fn without_the_permission_to_create_existing_topics_are_used() -> Result<()> {
    let kafka = Broker::secure(Service::Kafka)?;
    let ended = windows(&kafka)?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    assert!(
        ended
            .stderr
            .contains("no topic page-views, or no permission"),
        "{}",
        ended.stderr
    );

    for topic in [VIEWS, COUNTS] {
        tool(&kafka, "TopicCommand", &["--create", "--topic", topic])?;
    }
    generate(&kafka, "2026-01-01T12:00:00Z")?;
    let lines = run(&kafka)?;
    let expected = expected(&read(&kafka, VIEWS, "read_committed")?)?;
    assert_eq!(counts(&kafka)?, expected.counts);
    assert_eq!(not_counted(&lines, "too late: ")?, expected.late);
    Ok(())
}
