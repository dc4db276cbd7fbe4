//! JetStream: acked is kept, kept is delivered, and what is delivered again is done once where that is claimed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::jetstream;
use async_nats::jetstream::message::PublishMessage;
use compose::Broker;
use compose::harness::{Example, Running};
use rusqlite::Connection;

use crate::nats::{
    TIMEOUT, caught_up, connections, consumer, jetstream, run, server, start, stop, until,
};

const CONSUMER: &str = env!("CARGO_BIN_EXE_jetstream_consumer");
const DEDUP: &str = env!("CARGO_BIN_EXE_jetstream_dedup");
const WORK_QUEUE: &str = env!("CARGO_BIN_EXE_jetstream_work_queue");
const RETRY: &str = env!("CARGO_BIN_EXE_jetstream_retry_dlq");
const GIVEN_UP: &str = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.RETRY_ORDERS.retry-processor";
const REPLAY: &str = env!("CARGO_BIN_EXE_jetstream_replay");
const ASYNC_PUBLISH: &str = env!("CARGO_BIN_EXE_jetstream_async_publish");
const IDEMPOTENT: &str = env!("CARGO_BIN_EXE_jetstream_idempotent_consumer");
const PARTITIONS: &str = env!("CARGO_BIN_EXE_jetstream_partitions");
const LAG: &str = env!("CARGO_BIN_EXE_jetstream_lag_monitor");

fn working(program: &str, args: &[&str], work_ms: &str, nats: &Broker) -> Result<Running> {
    Example::new(program)
        .args(args)
        .env("WORK_MS", work_ms)
        .broker(nats)
        .spawn()
}

/// Stores it, however often the server dies meanwhile. Doubles are possible, as for any publisher without ids.
async fn publish(
    jetstream: &jetstream::Context,
    subject: &'static str,
    payload: String,
) -> Result<u64> {
    for _ in 0..100 {
        let sent = jetstream.publish(subject, payload.clone().into()).await?;
        match tokio::time::timeout(Duration::from_secs(2), sent.into_future()).await {
            Ok(Ok(ack)) => return Ok(ack.sequence),
            _ => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    anyhow::bail!("{payload} is never acknowledged")
}

#[tokio::test]
async fn killed_between_work_and_ack_the_order_comes_again_and_is_counted() -> Result<()> {
    let nats = server()?;
    run(CONSUMER, &["send", "order-1", "order-2", "order-3"], &nats)?.ok()?;
    let jetstream = jetstream(&nats).await?;
    // It works for so long that the kill is in the middle for certain.
    let mut first = working(CONSUMER, &[], "600000", &nats)?;
    first.wait_for("1: order-1 processing (delivery 1)", TIMEOUT)?;
    first.kill()?;
    assert_eq!(
        consumer(&jetstream, "ORDERS", "order-processor")
            .await?
            .ack_floor
            .stream_sequence,
        0
    );

    let mut second = working(CONSUMER, &[], "1", &nats)?;
    second.wait_for("1: order-1 processing (delivery 2)", TIMEOUT)?;
    caught_up(&jetstream, "ORDERS", "order-processor").await?;
    let ended = stop(second)?;
    assert!(
        ended.stdout.ends_with("acknowledged here: 3\n"),
        "{}",
        ended.stdout
    );
    let info = consumer(&jetstream, "ORDERS", "order-processor").await?;
    assert_eq!(
        (
            info.ack_floor.stream_sequence,
            info.delivered.consumer_sequence
        ),
        (3, 4)
    );
    Ok(())
}

#[tokio::test]
async fn a_consumer_that_is_stopped_finishes_what_it_has_and_bytes_do_no_harm() -> Result<()> {
    let nats = server()?;
    run(CONSUMER, &["send"], &nats)?.ok()?;
    let jetstream = jetstream(&nats).await?;
    for payload in [&b"\xff\xfe"[..], b"", b"x\0y"] {
        jetstream
            .publish("orders.raw", payload.to_vec().into())
            .await?
            .await?;
    }
    let mut processor = working(CONSUMER, &[], "1500", &nats)?;
    processor.wait_for("1: \u{fffd}\u{fffd} processing", TIMEOUT)?;
    let ended = stop(processor)?;
    assert!(ended.stdout.contains("1: acknowledged"), "{}", ended.stdout);
    let info = consumer(&jetstream, "ORDERS", "order-processor").await?;
    assert!(info.ack_floor.stream_sequence >= 1);
    let mut processor = working(CONSUMER, &[], "1", &nats)?;
    processor.wait_for("3: acknowledged", TIMEOUT)?;
    stop(processor)?;
    Ok(())
}

/// A stream of messages would ask for the next one as soon as the server is back.
#[tokio::test]
async fn one_order_at_a_time_also_when_the_server_comes_back_meanwhile() -> Result<()> {
    let nats = server()?;
    run(CONSUMER, &["send", "order-1", "order-2"], &nats)?.ok()?;
    let mut busy = working(CONSUMER, &[], "600000", &nats)?;
    busy.wait_for("1: order-1 processing", TIMEOUT)?;
    nats.kill(1)?;
    nats.restart(1)?;
    // No other client is there yet, so these are words that the work goes on.
    until("the consumer is back", || {
        let words = |one: &serde_json::Value| one["in_msgs"].as_u64() >= Some(2);
        Ok(connections(&nats)?.iter().any(words))
    })?;
    let jetstream = jetstream(&nats).await?;
    let info = consumer(&jetstream, "ORDERS", "order-processor").await?;
    assert!(info.num_ack_pending <= 1, "it has fetched ahead: {info:?}");
    assert_eq!(info.num_waiting, 0, "it asks for more than it works on");
    busy.kill()?;
    Ok(())
}

#[tokio::test]
async fn a_refused_order_is_not_called_stored_or_not() -> Result<()> {
    let nats = server()?;
    let jetstream = jetstream(&nats).await?;
    let full = jetstream::stream::Config {
        name: "ORDERS".into(),
        subjects: vec!["orders.*".into()],
        max_messages: 1,
        discard: jetstream::stream::DiscardPolicy::New,
        ..Default::default()
    };
    jetstream.create_stream(full).await?;
    let ended = run(CONSUMER, &["send", "order-1", "order-2"], &nats)?;
    assert_eq!(ended.stdout, "order-1: stored in ORDERS as 1\n");
    assert_eq!(ended.code(), 1);
    let refused = "order-2: refused, it is not stored";
    assert!(ended.stderr.contains(refused), "{}", ended.stderr);
    Ok(())
}

/// The server's store is kept; a killed process leaves what it has written with the operating system.
#[tokio::test]
async fn every_acked_publish_is_delivered_although_the_server_is_killed_again_and_again()
-> Result<()> {
    const PER_ROUND: u32 = 120;
    let nats = server()?;
    run(CONSUMER, &["send"], &nats)?.ok()?;
    let jetstream = jetstream(&nats).await?;
    let mut processor = working(CONSUMER, &[], "0", &nats)?;
    processor.wait_for("order-processor:", TIMEOUT)?;
    let mut acked = BTreeSet::new();
    for round in 0..4 {
        for number in 0..PER_ROUND {
            let order = format!("order-{round}-{number}");
            publish(&jetstream, "orders.created", order.clone()).await?;
            acked.insert(order);
        }
        // Acked, and surely not all of them processed yet.
        if round < 3 {
            nats.kill(1)?;
            nats.restart(1)?;
        }
    }
    let last = publish(&jetstream, "orders.created", "order-last".into()).await?;
    caught_up(&jetstream, "ORDERS", "order-processor").await?;
    processor.wait_for("order-last processing", TIMEOUT)?;
    let delivered: BTreeSet<String> = processor
        .lines()
        .iter()
        .filter_map(|line| {
            Some(
                line.split_once(": ")?
                    .1
                    .split_once(" processing")?
                    .0
                    .to_owned(),
            )
        })
        .collect();
    let lost: Vec<_> = acked.difference(&delivered).collect();
    assert!(lost.is_empty(), "acked and never delivered: {lost:?}");
    assert_eq!(acked.len(), 480);
    let state = jetstream
        .get_stream("ORDERS")
        .await?
        .get_info()
        .await?
        .state;
    assert_eq!(
        (state.first_sequence, state.last_sequence),
        (1, last),
        "nothing was dropped by the limit"
    );
    stop(processor)?;
    Ok(())
}

#[tokio::test]
async fn however_often_it_is_sent_in_the_window_it_is_stored_once() -> Result<()> {
    let nats = server()?;
    let send = |id: &'static str, times: &'static str| -> Result<String> {
        let program = Example::new(DEDUP)
            .args(["send", id, times])
            .env("WINDOW_S", "600");
        Ok(program.broker(&nats).spawn()?.wait(TIMEOUT)?.ok()?.stdout)
    };
    assert!(send("order-1", "50")?.ends_with("order-1: stored as 1 (duplicate)\n"));
    // Many at the same time, from several connections.
    let mut tries = tokio::task::JoinSet::new();
    for _ in 0..40 {
        let jetstream = self::jetstream(&nats).await?;
        tries.spawn(async move {
            let message = PublishMessage::build().message_id("order-2");
            let ack = jetstream
                .send_publish("dedup.orders", message)
                .await?
                .await?;
            anyhow::Ok((ack.sequence, ack.duplicate))
        });
    }
    let acks: Vec<_> = tries.join_all().await.into_iter().collect::<Result<_>>()?;
    assert!(acks.iter().all(|(sequence, _)| *sequence == 2));
    assert_eq!(acks.iter().filter(|(_, duplicate)| !duplicate).count(), 1);
    // The ids survive the server.
    nats.kill(1)?;
    nats.restart(1)?;
    assert_eq!(send("order-1", "1")?, "order-1: stored as 1 (duplicate)\n");
    let jetstream = self::jetstream(&nats).await?;
    let stream = jetstream.get_stream("DEDUP").await?;
    assert_eq!(stream.get_info().await?.state.messages, 2);
    // The checker has teeth: another id is another message.
    assert_eq!(send("order-3", "1")?, "order-3: stored as 3\n");
    Ok(())
}

#[tokio::test]
async fn a_send_goes_on_over_an_outage_and_stores_once() -> Result<()> {
    let nats = server()?;
    let mut sending = start(DEDUP, &["send", "order-1", "3000"], &nats)?;
    sending.wait_for("order-1: stored as 1", TIMEOUT)?;
    // Frozen first, so that a try is under way when it dies.
    nats.pause(1)?;
    sending.wait_for("no ack, another try follows", TIMEOUT)?;
    nats.kill(1)?;
    nats.restart(1)?;
    let ended = sending.wait(2 * TIMEOUT)?.ok()?;
    assert_eq!(ended.stdout.matches("order-1: stored as 1").count(), 3000);
    assert_eq!(ended.stdout.matches("(duplicate)").count(), 2999);
    let stream = jetstream(&nats).await?.get_stream("DEDUP").await?;
    assert_eq!(stream.cached_info().state.messages, 1);
    for id in ["", " ", "order-1\nNats-Rollup: all", "order\r1"] {
        let ended = run(DEDUP, &["send", id, "1"], &nats)?;
        assert_eq!(ended.code(), 1);
        assert!(
            ended.stderr.contains("one line of text"),
            "{}",
            ended.stderr
        );
    }
    Ok(())
}

#[tokio::test]
async fn work_that_takes_longer_than_the_ack_wait_is_done_once() -> Result<()> {
    let nats = server()?;
    let jetstream = jetstream(&nats).await?;
    run(WORK_QUEUE, &["send", "1"], &nats)?.ok()?;
    run(PARTITIONS, &["send", "1"], &nats)?.ok()?;
    let mut workers = Vec::new();
    for program in [WORK_QUEUE, PARTITIONS] {
        // The second one would be given what is not acknowledged in time.
        for _ in 0..2 {
            workers.push(working(program, &[], "8000", &nats)?);
        }
    }
    let consumers = [
        ("WORK_QUEUE", "workers"),
        ("PARTITIONS", "partition-0"),
        ("PARTITIONS", "partition-1"),
        ("PARTITIONS", "partition-2"),
    ];
    let mut deliveries = 0;
    for (stream, name) in consumers {
        caught_up(&jetstream, stream, name).await?;
        let info = consumer(&jetstream, stream, name).await?;
        deliveries += info.delivered.consumer_sequence;
    }
    assert_eq!(deliveries, 2, "a job and an order, each of them once");
    for worker in workers {
        stop(worker)?;
    }
    Ok(())
}

#[tokio::test]
async fn a_dead_workers_job_goes_to_another_and_done_jobs_leave_the_queue() -> Result<()> {
    let nats = server()?;
    let jetstream = jetstream(&nats).await?;
    let queued = run(WORK_QUEUE, &["send", "60"], &nats)?.ok()?;
    assert_eq!(queued.stdout, "queued 60 jobs; waiting in the queue: 60\n");
    let mut dying = working(WORK_QUEUE, &["work", "anna"], "600000", &nats)?;
    dying.wait_for("is ready", TIMEOUT)?;
    let deadline = std::time::Instant::now() + TIMEOUT;
    while consumer(&jetstream, "WORK_QUEUE", "workers")
        .await?
        .num_ack_pending
        == 0
    {
        anyhow::ensure!(
            std::time::Instant::now() < deadline,
            "the worker takes nothing"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    dying.kill()?;
    let mut workers = Vec::new();
    for name in ["ben", "carl"] {
        workers.push(working(WORK_QUEUE, &["work", name], "5", &nats)?);
    }
    caught_up(&jetstream, "WORK_QUEUE", "workers").await?;
    let mut done: BTreeMap<String, u32> = BTreeMap::new();
    for worker in workers {
        let ended = stop(worker)?;
        for line in ended.stdout.lines() {
            if let Some(job) = line
                .strip_suffix(" done")
                .and_then(|line| line.split_once(": "))
            {
                *done.entry(job.1.to_owned()).or_default() += 1;
            }
        }
    }
    assert_eq!(done.len(), 60, "{done:?}");
    let stream = jetstream.get_stream("WORK_QUEUE").await?;
    assert_eq!(stream.get_info().await?.state.messages, 0);
    // A second consumer of the same jobs would make two ends of each.
    let second = stream
        .create_consumer(jetstream::consumer::pull::Config {
            durable_name: Some("others".into()),
            ..Default::default()
        })
        .await;
    assert!(second.is_err());
    Ok(())
}

#[tokio::test]
async fn no_failed_order_is_lost_and_each_is_a_dead_letter_once() -> Result<()> {
    let nats = server()?;
    let jetstream = jetstream(&nats).await?;
    run(RETRY, &["send", "good-1", "bad-2", "flaky-3"], &nats)?.ok()?;
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Trace", "abc");
    headers.insert("Nats-Msg-Id", "from-the-sender");
    let bad = |payload: Vec<u8>| PublishMessage::build().payload(payload.into());
    let with_headers = bad(b"bad-4".to_vec()).headers(headers);
    jetstream
        .send_publish("retry.orders", with_headers)
        .await?
        .await?;
    jetstream
        .send_publish("retry.orders", bad(b"\xff\xfe".to_vec()))
        .await?
        .await?;
    jetstream
        .send_publish("retry.orders", bad(Vec::new()))
        .await?
        .await?;
    // As large as the server allows: with more headers it is too large.
    let largest = jetstream.client().max_payload();
    let mut large = b"bad-7".to_vec();
    large.resize(largest, b'x');
    jetstream
        .send_publish("retry.orders", bad(large.clone()))
        .await?
        .await?;

    let mut processor = start(RETRY, &[], &nats)?;
    processor.wait_for("2: failed (delivery 2)", TIMEOUT)?;
    processor.kill()?;
    let mut processor = start(RETRY, &[], &nats)?;
    let dead = jetstream.get_stream("RETRY_DEAD").await?;
    let deadline = std::time::Instant::now() + TIMEOUT;
    while dead.get_info().await?.state.messages < 4 {
        anyhow::ensure!(
            std::time::Instant::now() < deadline,
            "no dead letters: {:?}",
            processor.lines()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    caught_up(&jetstream, "RETRY_ADVISORIES", "undertaker").await?;
    stop(processor)?;
    let mut found = BTreeMap::new();
    for sequence in 1..=4 {
        let letter = dead.get_raw_message(sequence).await?;
        let header = |name| {
            letter
                .headers
                .get(name)
                .map(|value| value.as_str().to_owned())
        };
        assert_eq!(header("Origin-Subject").as_deref(), Some("retry.orders"));
        // It would tell the server what to do.
        assert_ne!(header("Nats-Msg-Id").as_deref(), Some("from-the-sender"));
        let origin: u64 = header("Origin-Sequence").context("no origin")?.parse()?;
        found.insert(
            origin,
            (
                header("Deliveries"),
                header("Cause"),
                header("Trace"),
                letter.payload.to_vec(),
            ),
        );
    }
    let says = Some("it says that it is bad".to_owned());
    let four = Some("4".to_owned());
    assert_eq!(
        found[&2],
        (four.clone(), says.clone(), None, b"bad-2".to_vec())
    );
    assert_eq!(
        found[&4],
        (
            four.clone(),
            says.clone(),
            Some("abc".into()),
            b"bad-4".to_vec()
        )
    );
    assert_eq!(found[&7], (four, says, None, Vec::new()));
    assert_eq!(found[&5].3, b"\xff\xfe");
    assert!(
        found[&5].1.as_deref().unwrap_or_default().contains("utf-8"),
        "{:?}",
        found[&5]
    );

    // Replayed, and now all of it succeeds but what is no text: that is dead again.
    let replayed = run(RETRY, &["replay"], &nats)?.ok()?;
    assert!(
        replayed.stdout.ends_with("replayed 4\n"),
        "{}",
        replayed.stdout
    );
    assert_eq!(dead.get_info().await?.state.messages, 0);
    let mut orders = jetstream.get_stream("RETRY_ORDERS").await?;
    assert_eq!(orders.info().await?.state.last_sequence, 11);
    let mut sizes = Vec::new();
    for sequence in 8..=11 {
        sizes.push(orders.get_raw_message(sequence).await?.payload.len());
    }
    sizes.sort_unstable();
    assert_eq!(sizes, [2, 5, 5, largest]);
    let mut healed = Example::new(RETRY)
        .env("HEALED", "1")
        .broker(&nats)
        .spawn()?;
    healed.wait_for("bad-", TIMEOUT)?;
    let deadline = std::time::Instant::now() + TIMEOUT;
    while dead.get_info().await?.state.messages < 1 {
        anyhow::ensure!(
            std::time::Instant::now() < deadline,
            "what is no text is not dead again"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for _ in 0..2 {
        healed.wait_for("bad-", TIMEOUT)?;
    }
    let ended = stop(healed)?;
    assert_eq!(
        ended.stdout.matches(": bad-").count(),
        3,
        "{}",
        ended.stdout
    );
    Ok(())
}

/// The advisories are the test's own: so they come when it wants, and again after the first one was answered.
#[tokio::test]
async fn no_order_stops_the_burials_and_none_is_buried_again_after_its_replay() -> Result<()> {
    const FILLER: usize = 65_450;
    let nats = server()?;
    let jetstream = jetstream(&nats).await?;
    run(RETRY, &["send", "good-1", "good-2"], &nats)?.ok()?;
    // Its headers are as large as the server takes them: with ours, too large.
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Filler", "x".repeat(FILLER));
    for payload in [&b"good-3"[..], b"\xff"] {
        let order = PublishMessage::build().headers(headers.clone());
        let order = order.payload(payload.to_vec().into());
        jetstream.send_publish("retry.orders", order).await?.await?;
    }
    publish(&jetstream, "retry.causes.2", "a\r\nb".into()).await?;
    let mut processor = start(RETRY, &[], &nats)?;
    processor.wait_for("4: dead letter 1", TIMEOUT)?;
    let advise = async || {
        for sequence in [2, 3] {
            let advisory = format!(r#"{{"stream_seq":{sequence},"deliveries":4}}"#);
            publish(&jetstream, GIVEN_UP, advisory).await?;
        }
        anyhow::Ok(())
    };
    publish(&jetstream, GIVEN_UP, "no advisory".into()).await?;
    advise().await?;
    processor.wait_for("2: dead letter 2", TIMEOUT)?;
    processor.wait_for("3: dead letter 3", TIMEOUT)?;
    let dead = jetstream.get_stream("RETRY_DEAD").await?;
    let letter = dead.get_raw_message(2).await?;
    assert_eq!(letter.headers.get("Cause").unwrap().as_str(), "a  b");
    for sequence in [1, 3] {
        let letter = dead.get_raw_message(sequence).await?;
        assert_eq!(letter.headers.get("Filler"), None);
        assert!(letter.headers.get("Payload").is_some());
    }
    // While they are there, and when they are replayed: no second one.
    advise().await?;
    processor.wait_for("3: is a dead letter already", TIMEOUT)?;
    let nowhere = PublishMessage::build().payload("from nowhere".into());
    jetstream
        .send_publish("retry.dead.99", nowhere)
        .await?
        .await?;
    nats.kill(1)?;
    nats.restart(1)?;
    let mut replay = start(RETRY, &["replay"], &nats)?;
    replay.wait_for("dead letter 4: not replayed: no origin", TIMEOUT)?;
    let replayed = replay.wait(TIMEOUT)?;
    assert!(
        replayed.stdout.ends_with("replayed 3\n"),
        "{}",
        replayed.stdout
    );
    assert_eq!(replayed.code(), 1);
    advise().await?;
    // What is no text is dead again, as a new order.
    let lines = [
        "2: was a dead letter, and is replayed",
        "3: was a dead letter, and is replayed",
        "5: dead letter 5",
    ];
    until("all of that is said", || {
        let said = processor.lines();
        let has = |line: &&str| said.iter().any(|one| one.starts_with(*line));
        Ok(lines.iter().all(has))
    })?;
    caught_up(&jetstream, "RETRY_ADVISORIES", "undertaker").await?;
    stop(processor)?;
    assert_eq!(dead.get_info().await?.state.messages, 2);
    let orders = jetstream.get_stream("RETRY_ORDERS").await?;
    assert_eq!(orders.cached_info().state.last_sequence, 7);
    for (sequence, payload) in [(5, &b"\xff"[..]), (7, b"good-3")] {
        let order = orders.get_raw_message(sequence).await?;
        assert_eq!(order.payload, payload);
        let filler = order.headers.get("Filler").context("no headers")?;
        assert_eq!(filler.as_str().len(), FILLER);
    }
    Ok(())
}

#[tokio::test]
async fn a_reader_that_follows_misses_and_repeats_nothing_over_an_outage() -> Result<()> {
    let nats = server()?;
    let jetstream = jetstream(&nats).await?;
    let mut reader = start(REPLAY, &["follow"], &nats)?;
    reader.wait_for("following", TIMEOUT)?;
    let mut stored = Vec::new();
    for number in 0..150 {
        if number == 50 || number == 100 {
            nats.kill(1)?;
            nats.restart(1)?;
        }
        publish(&jetstream, "replay.sensor.a", format!("reading-{number}")).await?;
    }
    reader.wait_for("reading-149", TIMEOUT)?;
    let stream = jetstream.get_stream("REPLAY").await?;
    let last = stream.get_info().await?.state.last_sequence;
    for sequence in 1..=last {
        let reading = stream.get_raw_message(sequence).await?.payload;
        stored.push(String::from_utf8(reading.to_vec())?);
    }
    let ended = stop(reader)?;
    let read: Vec<_> = ended
        .stdout
        .lines()
        .filter(|line| line.starts_with("reading-"))
        .collect();
    assert_eq!(read, stored);
    Ok(())
}

#[tokio::test]
async fn what_is_sent_again_after_an_outage_is_stored_once() -> Result<()> {
    const COUNT: u64 = 12_000;
    let nats = server()?;
    let jetstream = jetstream(&nats).await?;
    let mut publisher = start(ASYNC_PUBLISH, &[&COUNT.to_string(), "64"], &nats)?;
    // In the middle of either way of publishing.
    for from in [1000, COUNT + 500] {
        let deadline = std::time::Instant::now() + 2 * TIMEOUT;
        let stored = loop {
            let stream = jetstream.get_stream("ASYNC_PUBLISH").await;
            let stored = stream.map_or(0, |stream| stream.cached_info().state.messages);
            if stored >= from {
                break stored;
            }
            anyhow::ensure!(
                std::time::Instant::now() < deadline,
                "never {from} messages"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        // Too late for a fault in the middle: it would only hit the last question of the example.
        if stored < 2 * COUNT - 4000 {
            // Frozen first, so that something is under way to it when it dies.
            nats.pause(1)?;
            tokio::time::sleep(Duration::from_millis(500)).await;
            nats.kill(1)?;
            nats.restart(1)?;
        }
    }
    let ended = publisher.wait(3 * TIMEOUT)?.ok()?;
    let said = &ended.stdout;
    assert_eq!(
        said.matches(&format!(": {COUNT} acknowledged")).count(),
        2,
        "{said}"
    );
    assert_eq!(said.matches(" 1 refused").count(), 2, "{said}");
    assert!(
        said.ends_with(&format!("in the stream: {}\n", 2 * COUNT)),
        "{said}"
    );
    // The faults have hit it: otherwise this shows nothing.
    assert!(said.matches(", 0 sent again").count() < 2, "{said}");
    Ok(())
}

fn books_consumer(nats: &Broker, books: &Path, ids_kept: &str) -> Result<Running> {
    Example::new(IDEMPOTENT)
        .env("PAYMENTS_DB", books)
        .env("IDS_KEPT", ids_kept)
        .broker(nats)
        .spawn()
}

fn payment(id: u32) -> Vec<u8> {
    let user = id % 3;
    format!(r#"{{"payment_id":"p-{id}","user_id":"u-{user}","cents":7}}"#).into()
}

fn number(books: &Path, question: &str) -> Result<i64> {
    Ok(Connection::open(books)?.query_row(question, [], |row| row.get(0))?)
}

async fn pay(jetstream: &jetstream::Context, payloads: Vec<Vec<u8>>) -> Result<()> {
    let mut acks = Vec::new();
    for payload in payloads {
        acks.push(
            jetstream
                .publish("idempotent.payments", payload.into())
                .await?,
        );
    }
    for ack in acks {
        ack.await?;
    }
    Ok(())
}

#[tokio::test]
async fn killed_twice_and_sent_twice_and_still_paid_once() -> Result<()> {
    let nats = server()?;
    let jetstream = jetstream(&nats).await?;
    let folder = tempfile::tempdir()?;
    let books = folder.path().join("books.sqlite");
    run(IDEMPOTENT, &["send", "0"], &nats)?.ok()?;
    // All of them twice, the second time much later and in another order.
    let ids = (0..1000).chain((0..1000).rev());
    pay(&jetstream, ids.map(payment).collect()).await?;
    let mut again = 0;
    for kill_after in [200, 600] {
        let mut consumer = books_consumer(&nats, &books, "100000")?;
        for _ in 0..kill_after {
            consumer.wait_for("p-", TIMEOUT)?;
        }
        consumer.kill()?;
        consumer.wait(TIMEOUT)?;
        again += consumer
            .lines()
            .iter()
            .filter(|line| line.contains("seen before"))
            .count();
    }
    let last = books_consumer(&nats, &books, "100000")?;
    caught_up(&jetstream, "PAYMENTS", "books").await?;
    let ended = stop(last)?;
    again += ended.stdout.matches("seen before").count();
    assert_eq!(number(&books, "SELECT sum(payments) FROM balances")?, 1000);
    assert_eq!(number(&books, "SELECT sum(cents) FROM balances")?, 7000);
    assert!(
        again >= 1000,
        "too few came twice to prove anything: {again}"
    );
    assert!(
        ended
            .stdout
            .ends_with("in the books: 1000 payments, 7000 cents, 0 rejected\n")
    );
    let info = consumer(&jetstream, "PAYMENTS", "books").await?;
    assert!(
        info.delivered.consumer_sequence > 2000,
        "the kills brought nothing back"
    );
    Ok(())
}

#[tokio::test]
async fn ids_are_bounded_and_what_is_no_payment_is_kept_aside() -> Result<()> {
    let nats = server()?;
    let jetstream = jetstream(&nats).await?;
    let folder = tempfile::tempdir()?;
    let books = folder.path().join("books.sqlite");
    run(IDEMPOTENT, &["send", "0"], &nats)?.ok()?;
    let bad: [&[u8]; 5] = [
        b"",
        b"\xff\xfe",
        b"{}",
        br#"{"payment_id":"","user_id":"u","cents":1}"#,
        br#"{"payment_id":"p","user_id":"u","cents":9223372036854775807}"#,
    ];
    let mut payloads: Vec<_> = (0..20).map(payment).collect();
    payloads.extend(bad.map(<[u8]>::to_vec));
    // One that is still known, one that is forgotten, and the end.
    payloads.extend([payment(19), payment(0), payment(99)]);
    pay(&jetstream, payloads).await?;
    let mut consumer = books_consumer(&nats, &books, "5")?;
    consumer.wait_for("p-19: seen before", TIMEOUT)?;
    consumer.wait_for("p-99:", TIMEOUT)?;
    caught_up(&jetstream, "PAYMENTS", "books").await?;
    stop(consumer)?;
    assert_eq!(number(&books, "SELECT count(*) FROM seen")?, 5);
    assert_eq!(number(&books, "SELECT sum(payments) FROM balances")?, 22);
    let aside = Connection::open(&books)?;
    let mut query = aside.prepare("SELECT payload FROM rejected ORDER BY sequence")?;
    let kept: Vec<Vec<u8>> = query
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    assert_eq!(kept, bad.map(<[u8]>::to_vec));

    // The books outlive the stream: another message with a number that is in them is kept, too.
    jetstream.delete_stream("PAYMENTS").await?;
    run(IDEMPOTENT, &["send", "0"], &nats)?.ok()?;
    let mut payloads: Vec<_> = (0..20).map(payment).collect();
    payloads.push(b"another".to_vec());
    pay(&jetstream, payloads).await?;
    let mut consumer = books_consumer(&nats, &books, "5")?;
    consumer.wait_for("message 21: rejected", TIMEOUT)?;
    stop(consumer)?;
    let another = "SELECT count(*) FROM rejected WHERE payload = CAST('another' AS BLOB)";
    assert_eq!(number(&books, another)?, 1);
    assert_eq!(number(&books, "SELECT count(*) FROM rejected")?, 6);
    Ok(())
}

#[tokio::test]
async fn a_customers_orders_stay_in_one_partition_and_in_order() -> Result<()> {
    let nats = server()?;
    let jetstream = jetstream(&nats).await?;
    run(PARTITIONS, &["send", "120"], &nats)?.ok()?;
    let mut dying = working(PARTITIONS, &[], "20", &nats)?;
    dying.wait_for("order", TIMEOUT)?;
    let staying = working(PARTITIONS, &[], "20", &nats)?;
    dying.wait_for("order", TIMEOUT)?;
    dying.kill()?;
    dying.wait(TIMEOUT)?;
    for partition in 0..3 {
        caught_up(&jetstream, "PARTITIONS", &format!("partition-{partition}")).await?;
    }
    let staying = stop(staying)?;
    let mut done: BTreeSet<(String, u32)> = BTreeSet::new();
    for lines in [
        dying.lines(),
        staying.stdout.lines().map(str::to_owned).collect(),
    ] {
        let mut last: BTreeMap<String, u32> = BTreeMap::new();
        for line in lines {
            let Some((customer, order)) = line
                .split_once(": ")
                .and_then(|(_, rest)| rest.split_once(" order "))
            else {
                continue;
            };
            let order: u32 = order.parse()?;
            // An order whose ack got lost comes again, at once: that is no step back.
            let before = last.insert(customer.to_owned(), order).unwrap_or(0);
            assert!(order >= before, "{line} after {before}");
            done.insert((customer.to_owned(), order));
        }
    }
    assert_eq!(done.len(), 120);
    // By what is stored, without the example.
    let stream = jetstream.get_stream("PARTITIONS").await?;
    let mut partitions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for sequence in 1..=120 {
        let subject = stream.get_raw_message(sequence).await?.subject;
        let mut tokens = subject.split('.').skip(1);
        let (partition, customer) = (tokens.next().unwrap(), tokens.next().unwrap());
        partitions
            .entry(customer.into())
            .or_default()
            .insert(partition.into());
    }
    assert_eq!(partitions.len(), 4);
    assert!(
        partitions.values().all(|of_one| of_one.len() == 1),
        "{partitions:?}"
    );
    assert!(partitions.values().flatten().collect::<BTreeSet<_>>().len() > 1);
    Ok(())
}

#[tokio::test]
async fn the_monitor_tells_pending_unacknowledged_and_lost_apart() -> Result<()> {
    let nats = server()?;
    let jetstream = jetstream(&nats).await?;
    let stream = jetstream
        .create_stream(jetstream::stream::Config {
            name: "SMALL".into(),
            subjects: vec!["small".into()],
            max_messages: 5,
            ..Default::default()
        })
        .await?;
    let consumer = stream
        .create_consumer(jetstream::consumer::pull::Config {
            durable_name: Some("reader".into()),
            ack_wait: TIMEOUT,
            ..Default::default()
        })
        .await?;
    let mut monitor = Example::new(LAG)
        .env("LAG_INTERVAL", "1")
        .env("LAG_THRESHOLD", "4")
        .broker(&nats)
        .spawn()?;
    monitor.wait_for(
        "SMALL/reader: pending 0, unacknowledged 0, redelivered 0, lag 0",
        TIMEOUT,
    )?;
    for _ in 0..5 {
        publish(&jetstream, "small", "x".into()).await?;
    }
    monitor.wait_for(
        "SMALL/reader: pending 5, unacknowledged 0, redelivered 0, lag 5",
        TIMEOUT,
    )?;
    monitor.wait_for("WARNING: SMALL/reader is ", TIMEOUT)?;
    let mut fetched = consumer.fetch().max_messages(5).messages().await?;
    let mut messages = Vec::new();
    while let Some(message) = futures::StreamExt::next(&mut fetched).await {
        messages.push(message.map_err(anyhow::Error::from_boxed)?);
    }
    assert_eq!(messages.len(), 5);
    monitor.wait_for(
        "SMALL/reader: pending 0, unacknowledged 5, redelivered 0, lag 5",
        TIMEOUT,
    )?;
    for message in messages {
        message
            .double_ack()
            .await
            .map_err(anyhow::Error::from_boxed)?;
    }
    monitor.wait_for("recovered: SMALL/reader is ", TIMEOUT)?;
    // Eight come, the stream keeps five: three are gone before anybody was given them.
    for _ in 0..8 {
        publish(&jetstream, "small", "x".into()).await?;
    }
    monitor.wait_for(
        "LOST: SMALL/reader: the stream dropped 3 messages undelivered",
        TIMEOUT,
    )?;
    // A stream that is not there is not one without lag.
    let mut mistaken = start(LAG, &["SMAL"], &nats)?;
    mistaken.wait_for("there is no stream SMAL", TIMEOUT)?;
    stop(mistaken)?;
    // Not to know is no reason to end.
    nats.kill(1)?;
    monitor.wait_for("lag unknown", TIMEOUT)?;
    nats.restart(1)?;
    publish(&jetstream, "small", "x".into()).await?;
    monitor.wait_for(
        "LOST: SMALL/reader: the stream dropped 4 messages undelivered",
        TIMEOUT,
    )?;
    stop(monitor)?;
    Ok(())
}
