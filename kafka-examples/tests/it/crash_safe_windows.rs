//! Every page view is counted once in the window in which it happened, or is once in the topic of rejected views.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::harness::{Example, Finished, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::admin::{AdminOptions, NewPartitions};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::message::{Header, Headers, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

use crate::administrator::{admin, create_topic, tool};
use crate::reader::{await_markers, read, send_large};
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

fn windows(kafka: &Broker) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_crash_safe_windows"))
        .broker(kafka)
        .spawn()
}

/// Runs until all views are read.
fn run(kafka: &Broker) -> Result<Finished> {
    let mut running = windows(kafka)?;
    wait_until_done(kafka, &mut running)?;
    running.interrupt()?;
    running.wait(TIMEOUT)?.ok()
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

/// The places of the rejected views. Fails if one is rejected twice.
fn rejected(kafka: &Broker, reason: &str) -> Result<BTreeSet<(i32, i64)>> {
    let mut places = BTreeSet::new();
    for record in read(kafka, REJECTED, "read_committed")? {
        let found = header(&record, "reason")?;
        ensure!(found.starts_with(reason), "{found}");
        let origin = header(&record, "origin")?;
        let mut parts = origin.split('/');
        ensure!(parts.next() == Some(VIEWS), "{origin}");
        let partition = parts.next().context("no partition")?.parse()?;
        let offset = parts.next().context("no offset")?.parse()?;
        let is_new = places.insert((partition, offset));
        ensure!(is_new, "rejected twice: {origin}");
    }
    Ok(places)
}

fn header(record: &OwnedMessage, name: &str) -> Result<String> {
    let mut headers = record.headers().into_iter().flat_map(Headers::iter);
    let header = headers.find(|one| one.key == name).context("no header")?;
    Ok(String::from_utf8(
        header.value.unwrap_or_default().to_vec(),
    )?)
}

/// How many views are after the committed positions of all partitions.
fn left(kafka: &Broker) -> Result<i64> {
    let judge: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("group.id", "crash-safe-windows")
        .create()?;
    let metadata = judge.fetch_metadata(Some(VIEWS), TIMEOUT)?;
    let mut left = 0;
    for partition in metadata.topics()[0].partitions() {
        let mut at = TopicPartitionList::new();
        at.add_partition(VIEWS, partition.id());
        let position = match judge.committed_offsets(at, TIMEOUT)?.elements()[0].offset() {
            Offset::Offset(position) => position,
            _ => 0,
        };
        left += judge.fetch_watermarks(VIEWS, partition.id(), TIMEOUT)?.1 - position;
    }
    Ok(left)
}

fn wait_until_done(kafka: &Broker, running: &mut Running) -> Result<()> {
    let deadline = Instant::now() + 2 * TIMEOUT;
    loop {
        // A broker that has just started answers with an error.
        let left = left(kafka);
        if matches!(left, Ok(0)) {
            // The positions can be visible a moment before the results.
            await_markers(kafka, COUNTS)?;
            return await_markers(kafka, REJECTED);
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
fn after_kills_and_a_broker_restart_each_view_is_counted_or_rejected_once() -> Result<()> {
    let mut chance = compose::harness::chance()?;
    let kafka = Broker::private(Service::Kafka)?;
    for minute in 0..8 {
        generate(&kafka, &format!("2026-01-01T12:{:02}:00Z", 2 * minute))?;
    }
    let mut interrupted = 0;
    for round in 0..5 {
        let mut running = windows(&kafka)?;
        running.wait_for("window ", TIMEOUT)?;
        std::thread::sleep(Duration::from_millis(chance.u64(0..50)));
        running.kill()?;
        running.wait(TIMEOUT)?;
        interrupted += i32::from(left(&kafka)? > 0);
        if round == 2 {
            kafka.kill(1)?;
            kafka.restart(1)?;
        }
    }
    assert!(interrupted >= 3, "the kills came too late");
    run(&kafka)?;

    let views = read(&kafka, VIEWS, "read_committed")?;
    assert_eq!(views.len(), 8 * 183);
    let expected = expected(&views)?;
    assert!(expected.late.len() >= 8, "nothing is too late");
    assert_eq!(counts(&kafka)?, expected.counts);
    assert_eq!(rejected(&kafka, "too late: ")?, expected.late);

    // The same views again are too late, except those of open windows.
    generate(&kafka, "2026-01-01T12:00:00Z")?;
    run(&kafka)?;
    assert_eq!(counts(&kafka)?, expected.counts);
    let again = rejected(&kafka, "too late: ")?;
    assert_eq!(again.len(), expected.late.len() + 183);
    Ok(())
}

async fn view(producer: &FutureProducer, partition: i32, payload: Option<&[u8]>) -> Result<()> {
    let value = Some("kept");
    let record = FutureRecord::<[u8], [u8]> {
        payload,
        ..FutureRecord::to(VIEWS)
            .partition(partition)
            .key(&b"\xff"[..])
            .headers(OwnedHeaders::new().insert(Header { key: "own", value }))
    };
    let sent = producer.send(record, TIMEOUT).await;
    sent.map_err(|(error, _)| error)?;
    Ok(())
}

#[tokio::test]
async fn records_that_are_not_views_are_rejected_unchanged() -> Result<()> {
    let kafka = shared::kafka(&["kafka_crash_safe_windows"])?;
    let mut running = windows(&kafka)?;
    running.wait_for("partition 1: continues at offset 0", TIMEOUT)?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("message.max.bytes", "2000000")
        .create()?;
    // This view would close all windows of the next thousand years.
    let future = format!(r#"{{"page":"/","at_ms":{}}}"#, i64::MAX / 2);
    let future = future.as_bytes();
    let tomorrow = page(
        "/",
        chrono::Utc::now().timestamp_millis() - START + 86_400_000,
    );
    let long = page(&"p".repeat(2000), 20_000);
    let bad: [Option<&[u8]>; 8] = [
        None,
        Some(b""),
        Some(b"\xff\xfe"),
        Some(b"{}"),
        Some(br#"{"page":"/","at_ms":-1}"#),
        Some(future),
        Some(tomorrow.as_bytes()),
        Some(long.as_bytes()),
    ];
    for payload in bad {
        view(&producer, 1, payload).await?;
    }
    view(&producer, 1, Some(&vec![b'x'; 1_048_300])).await?;
    let large = send_large(&kafka, VIEWS).await?;
    assert!(large.len() > 2_000_000);
    view(&producer, 1, Some(page("/good", 20_001).as_bytes())).await?;
    running.wait_for("window 12:00:20 /good: 1 views", TIMEOUT)?;
    wait_until_done(&kafka, &mut running)?;

    let rejected = read(&kafka, REJECTED, "read_committed")?;
    assert_eq!(rejected.len(), bad.len() + 2);
    for payload in bad {
        let same = |record: &&OwnedMessage| record.payload() == payload && record.key().is_some();
        let mut found = rejected.iter().filter(same);
        let record =
            found.find(|record| header(record, "origin").is_ok_and(|at| at != "page-views/1/8"));
        let record = record.with_context(|| format!("{payload:?} is not there"))?;
        assert_eq!(record.key(), Some(&b"\xff"[..]));
        assert_eq!(header(record, "own")?, "kept");
        assert!(header(record, "reason")?.len() > 5);
    }
    // A copy of these could be too large. Their origin says where they are.
    for origin in ["page-views/1/8", "page-views/0/0"] {
        let is_it = |record: &&OwnedMessage| header(record, "origin").is_ok_and(|at| at == origin);
        let record = rejected
            .iter()
            .find(is_it)
            .context("a large one is missing")?;
        assert_eq!(record.payload(), None);
    }
    running.terminate()?;
    running.wait(TIMEOUT)?.ok()?;
    Ok(())
}

#[tokio::test]
async fn a_second_instance_takes_over_and_the_first_ends() -> Result<()> {
    let kafka = shared::kafka(&["kafka_crash_safe_windows"])?;
    let mut running = windows(&kafka)?;
    running.wait_for("partition 1: continues at offset 0", TIMEOUT)?;
    send(&kafka, [(1, page("/", 1_000))]).await?;
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
    run(&kafka)?;
    let found = counts(&kafka)?;
    assert_eq!(found.len(), 120);
    assert!(found.values().all(|views| *views == 10), "{found:?}");
    assert!(rejected(&kafka, "")?.is_empty());
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
    // The program is not running: two views are counted, but their window is open, and two are not read yet.
    send(&kafka, (3..10).map(|at| (0, page("/", at)))).await?;
    delete(5).await?;
    let mut running = windows(&kafka)?;
    running.wait_for("partition 0: offsets 0 to 5 are LOST", TIMEOUT)?;
    send(&kafka, [(0, page("/", 60_000))]).await?;
    running.wait_for("window 12:01:00 /: 1 views", TIMEOUT)?;
    // The open window could not be rebuilt. Its count stays, and no view is lost silently.
    let first = ("/".to_owned(), START);
    let mut expected = BTreeMap::from([(first, 3), (("/".to_owned(), START + 60_000), 1)]);
    assert_eq!(counts(&kafka)?, expected);
    assert_eq!(rejected(&kafka, "too late: ")?.len(), 5);

    // Deleted while the program is frozen, after the answer to its last request.
    running.pause()?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    send(&kafka, (0..4).map(|at| (0, page("/", 61_000 + at)))).await?;
    delete(14).await?;
    running.resume()?;
    let ended = running.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}{}", ended.stdout, ended.stderr);
    let mut running = windows(&kafka)?;
    running.wait_for("partition 0: offsets 10 to 14 are LOST", TIMEOUT)?;
    send(&kafka, [(0, page("/", 90_000))]).await?;
    running.wait_for("window 12:01:30 /: 1 views", TIMEOUT)?;
    expected.insert(("/".to_owned(), START + 90_000), 1);
    assert_eq!(counts(&kafka)?, expected);
    Ok(())
}

#[tokio::test]
async fn all_of_six_partitions_and_of_an_added_one_are_read() -> Result<()> {
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
    assert_eq!(rejected(&kafka, "too late: ")?, expected.late);

    let more = NewPartitions::new(VIEWS, 7);
    admin(&kafka)?
        .create_partitions([&more], &AdminOptions::new())
        .await?;
    running.wait_for("partition 6: continues at offset 0", TIMEOUT)?;
    send(&kafka, [(6, page("/added", 0))]).await?;
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
    let reason = "partition 0 ends at 3, before the position 100";
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
    while create_topic(&kafka, VIEWS, 1, &[]).await.is_err() && !matches!(left(&kafka), Ok(0)) {
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
        ended.stderr.contains("cannot read page-views: "),
        "{}",
        ended.stderr
    );

    for topic in [VIEWS, COUNTS, REJECTED] {
        tool(&kafka, "TopicCommand", &["--create", "--topic", topic])?;
    }
    generate(&kafka, "2026-01-01T12:00:00Z")?;
    run(&kafka)?;
    let expected = expected(&read(&kafka, VIEWS, "read_committed")?)?;
    assert_eq!(counts(&kafka)?, expected.counts);
    assert_eq!(rejected(&kafka, "too late: ")?, expected.late);
    Ok(())
}
