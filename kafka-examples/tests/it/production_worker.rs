//! The production worker loses no order and dead-letters only what its message is to blame for.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::harness::{Example, Running, TIMEOUT, chance, http_get, produce_kafka_record};
use compose::{Broker, Service};
use futures::future::try_join_all;
use rdkafka::message::{Header, Headers, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message};

use crate::administrator::{create_topic, tool};
use crate::reader::{committed, header};
use crate::{reader, shared};

const NAME: &str = "kafka_production_worker";
const TOPIC: &str = "worker-orders";
const DEAD_LETTERS: &str = "worker-orders.dlq";
const TOPICS: [&str; 5] = [
    TOPIC,
    "worker-orders.retry-1s",
    "worker-orders.retry-10s",
    "worker-orders.retry-60s",
    DEAD_LETTERS,
];

fn worker(kafka: &Broker, receipts: &Path) -> Result<Running> {
    Example::new(env!("CARGO_BIN_EXE_kafka_production_worker"))
        .env("RECEIPTS", receipts)
        .broker(kafka)
        .spawn()
}

fn producer(kafka: &Broker) -> Result<FutureProducer> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.address());
    Ok(config.set("message.max.bytes", "2000000").create()?)
}

async fn send(kafka: &Broker, payloads: &[Vec<u8>]) -> Result<Vec<(i32, i64)>> {
    let producer = producer(kafka)?;
    let sent = payloads.iter().zip(0..).map(async |(payload, number)| {
        let key = number.to_string();
        let record = FutureRecord::to(TOPIC).key(&key).payload(payload);
        let headers = OwnedHeaders::new().insert(Header {
            key: "tenant",
            value: Some("acme"),
        });
        producer.send(record.headers(headers), TIMEOUT).await
    });
    let places = try_join_all(sent).await.map_err(|(error, _)| error)?;
    Ok(places.iter().map(|at| (at.partition, at.offset)).collect())
}

/// Returns the places of the orders, by their numbers.
async fn send_orders(kafka: &Broker, numbers: std::ops::Range<u64>) -> Result<Vec<(i32, i64)>> {
    let order = |id| format!(r#"{{"order_id":{id},"amount_cents":500}}"#).into_bytes();
    let orders: Vec<Vec<u8>> = numbers.map(order).collect();
    send(kafka, &orders).await
}

fn has_receipt(receipts: &Path, number: usize) -> bool {
    receipts.join(format!("receipt-{number}.txt")).exists()
}

fn await_receipts(running: &mut Running, receipts: &Path, count: usize) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while let Some(missing) = (0..count).find(|number| !has_receipt(receipts, *number)) {
        ensure!(Instant::now() < deadline, "order {missing} is missing");
        ensure!(running.try_wait()?.is_none(), "{:?}", running.lines());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn stop(running: &mut Running) -> Result<()> {
    running.terminate()?;
    running.wait(TIMEOUT)?.ok()?;
    Ok(())
}

fn dead_letters(kafka: &Broker) -> Result<Vec<OwnedMessage>> {
    reader::read(kafka, DEAD_LETTERS, "read_committed")
}

#[tokio::test]
async fn an_action_that_fails_for_a_while_loses_nothing_and_dead_letters_nothing() -> Result<()> {
    let kafka = shared::kafka(&[NAME])?;
    let folder = tempfile::tempdir()?;
    let receipts = folder.path().join("later");
    let mut running = worker(&kafka, &receipts)?;
    send_orders(&kafka, 0..200).await?;
    running.wait_for("worker-orders.retry-1s/", TIMEOUT)?;
    running.kill()?;
    running.wait(TIMEOUT)?;

    let mut running = worker(&kafka, &receipts)?;
    send_orders(&kafka, 200..300).await?;
    running.wait_for("worker-orders.retry-1s/", TIMEOUT)?;
    ensure!(!running.lines().iter().any(|line| line.ends_with(": done")));
    fs::create_dir(&receipts)?;
    await_receipts(&mut running, &receipts, 300)?;
    stop(&mut running)?;
    assert_eq!(dead_letters(&kafka)?.len(), 0);
    Ok(())
}

#[tokio::test]
async fn a_record_of_the_last_retry_topic_moves_to_its_end_unchanged() -> Result<()> {
    let kafka = shared::kafka(&[NAME])?;
    let folder = tempfile::tempdir()?;
    let last = TOPICS[3];
    create_topic(&kafka, last, 1, &[]).await?;
    let headers = OwnedHeaders::new().insert(Header {
        key: "tenant",
        value: Some("acme"),
    });
    // Due, as it is old.
    let payload = r#"{"order_id":0,"amount_cents":1}"#;
    let record = FutureRecord::to(last)
        .key("7")
        .payload(payload)
        .timestamp(1)
        .headers(headers);
    let sent = producer(&kafka)?.send(record, TIMEOUT).await;
    sent.map_err(|(error, _)| error)?;
    let mut running = worker(&kafka, &folder.path().join("missing"))?;
    running.wait_for("worker-orders.retry-60s/0/0: retry", TIMEOUT)?;
    stop(&mut running)?;
    let all = reader::read(&kafka, last, "read_committed")?;
    assert_eq!(all.len(), 2);
    assert_eq!(all[1].key(), Some(&b"7"[..]));
    assert_eq!(all[1].payload(), Some(payload.as_bytes()));
    let headers = all[1].headers().context("no headers")?;
    assert_eq!(headers.count(), 1);
    assert_eq!(header(&all[1], "tenant").as_deref(), Some("acme"));
    Ok(())
}

/// A copy that is larger than its record could be refused by a topic with the same limit.
#[tokio::test]
async fn a_record_of_the_largest_size_can_be_retried() -> Result<()> {
    let kafka = shared::kafka(&[NAME])?;
    let folder = tempfile::tempdir()?;
    let receipts = folder.path().join("later");
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.address());
    // As the worker does: otherwise its copies would always be smaller.
    config.set("compression.type", "zstd");
    let producer: FutureProducer = config.set("message.max.bytes", "9000000").create()?;
    let mut chance = chance()?;
    let mut sizes = 1_200_000..1_500_000;
    let noise: String = std::iter::repeat_with(|| char::from(chance.u8(b'A'..=b'z')))
        .filter(|letter| *letter != '\\')
        .take(sizes.end)
        .collect();
    // The size at which the broker refuses the compressed order is found by trying.
    let mut sent = 0;
    while sizes.len() > 1 {
        let size = sizes.start + sizes.len() / 2;
        let note = &noise[..size];
        let order = format!(r#"{{"order_id":0,"amount_cents":5,"note":"{note}"}}"#);
        let record = FutureRecord::<str, _>::to(TOPIC).payload(&order);
        match producer.send(record, TIMEOUT).await {
            Ok(_) => (sent, sizes.start) = (sent + 1, size),
            Err(_) => sizes.end = size,
        }
    }
    ensure!(sent > 2, "the largest size was not found: {sizes:?}");
    let mut running = worker(&kafka, &receipts)?;
    for _ in 0..sent {
        running.wait_for("worker-orders/", TIMEOUT)?;
    }
    fs::create_dir(&receipts)?;
    await_receipts(&mut running, &receipts, 1)?;
    stop(&mut running)?;
    assert_eq!(dead_letters(&kafka)?.len(), 0);
    Ok(())
}

#[tokio::test]
async fn sigkill_at_random_moments_loses_no_order() -> Result<()> {
    const ORDERS: usize = 2000;
    let kafka = shared::kafka(&[NAME])?;
    let folder = tempfile::tempdir()?;
    let receipts = folder.path();
    let mut chance = chance()?;
    let places = send_orders(&kafka, 0..ORDERS as u64).await?;
    let mut killed = 0;
    // After each, the group waits for the session timeout of the killed member.
    while killed < 2 {
        let mut running = worker(&kafka, receipts)?;
        for _ in 0..chance.u32(1..300) {
            running.wait_for(": done", TIMEOUT)?;
        }
        running.kill()?;
        running.wait(TIMEOUT)?;
        killed += 1;
        // The committed position never passes an order that is not done.
        let committed = committed(&kafka, "order-worker", TOPIC)?;
        for (number, (partition, offset)) in places.iter().enumerate() {
            let is_committed = *offset < committed[partition];
            ensure!(
                !is_committed || has_receipt(receipts, number),
                "order {number} is lost"
            );
        }
    }
    let left = (0..ORDERS).filter(|number| !has_receipt(receipts, *number));
    ensure!(left.count() > 0, "the kills came too late");
    let mut running = worker(&kafka, receipts)?;
    await_receipts(&mut running, receipts, ORDERS)?;
    stop(&mut running)
}

/// The write to a named pipe hangs until the pipe is read.
#[tokio::test]
async fn the_committed_position_stays_at_an_order_that_hangs() -> Result<()> {
    const HANGS: usize = 40;
    let kafka = shared::kafka(&[NAME])?;
    let folder = tempfile::tempdir()?;
    let receipts = folder.path();
    let pipe = receipts.join(format!("receipt-{HANGS}.txt"));
    let made = std::process::Command::new("mkfifo").arg(&pipe).status()?;
    ensure!(made.success());
    let places = send_orders(&kafka, 0..200).await?;
    let (partition, offset) = places[HANGS];
    let mut running = worker(&kafka, receipts)?;
    // The orders after it are handled, but their offsets are not committed.
    let later = |running: &mut Running| {
        let place = |line: &str| -> Option<i64> {
            let rest = line.strip_prefix(&format!("{TOPIC}/{partition}/"))?;
            rest.strip_suffix(": done")?.parse().ok()
        };
        let lines = running.lines();
        lines.iter().any(|line| place(line) > Some(offset))
    };
    let deadline = Instant::now() + TIMEOUT;
    while committed(&kafka, "order-worker", TOPIC)?[&partition] < offset || !later(&mut running) {
        ensure!(Instant::now() < deadline, "{:?}", running.lines());
        std::thread::sleep(Duration::from_millis(20));
    }
    // Commits what is stored.
    running.terminate()?;
    running.wait(TIMEOUT)?.ok()?;
    assert_eq!(
        committed(&kafka, "order-worker", TOPIC)?[&partition],
        offset
    );
    fs::remove_file(&pipe)?;
    let mut running = worker(&kafka, receipts)?;
    await_receipts(&mut running, receipts, 200)?;
    stop(&mut running)
}

#[tokio::test]
async fn sigterm_finishes_the_orders_in_work_and_none_is_repeated() -> Result<()> {
    const ORDERS: usize = 3000;
    let kafka = shared::kafka(&[NAME])?;
    let folder = tempfile::tempdir()?;
    send_orders(&kafka, 0..ORDERS as u64).await?;
    let done = |running: &mut Running| {
        let lines = running.lines();
        lines.iter().filter(|line| line.ends_with(": done")).count()
    };
    let mut first = worker(&kafka, folder.path())?;
    for _ in 0..100 {
        first.wait_for(": done", TIMEOUT)?;
    }
    stop(&mut first)?;
    let before = done(&mut first);
    ensure!(before < ORDERS, "SIGTERM came too late");
    assert_eq!(
        committed(&kafka, "order-worker", TOPIC)?
            .values()
            .sum::<i64>(),
        before as i64
    );
    let mut second = worker(&kafka, folder.path())?;
    await_receipts(&mut second, folder.path(), ORDERS)?;
    stop(&mut second)?;
    assert_eq!(before + done(&mut second), ORDERS);
    Ok(())
}

#[tokio::test]
async fn a_broker_that_is_killed_and_restarted_loses_no_order() -> Result<()> {
    const ORDERS: usize = 2000;
    let kafka = Broker::private(Service::Kafka)?;
    let folder = tempfile::tempdir()?;
    let receipts = folder.path().join("later");
    send_orders(&kafka, 0..ORDERS as u64).await?;
    let mut running = worker(&kafka, &receipts)?;
    // Killed while copies are written to the retry topics.
    for _ in 0..300 {
        running.wait_for(": retry", TIMEOUT)?;
    }
    kafka.kill(1)?;
    running.wait_for("worker-orders", TIMEOUT)?;
    fs::create_dir(&receipts)?;
    kafka.restart(1)?;
    await_receipts(&mut running, &receipts, ORDERS)?;
    stop(&mut running)?;
    assert_eq!(dead_letters(&kafka)?.len(), 0);

    // With the broker down, it ends all the same.
    let mut running = worker(&kafka, &receipts)?;
    send_orders(&kafka, 0..1).await?;
    running.wait_for(": done", TIMEOUT)?;
    kafka.kill(1)?;
    running.terminate()?;
    running.wait(Duration::from_secs(30))?;
    Ok(())
}

#[tokio::test]
async fn malformed_orders_are_dead_lettered_with_key_headers_origin_and_reason() -> Result<()> {
    let kafka = shared::kafka(&[NAME])?;
    let folder = tempfile::tempdir()?;
    // The reason quotes the string, and would not fit into a header.
    let long = format!(r#"{{"order_id":"{}"}}"#, "x".repeat(100_000)).into_bytes();
    // Random bytes do not compress. With the headers of a dead letter they are too large for the broker.
    let mut chance = chance()?;
    let huge: Vec<u8> = std::iter::repeat_with(|| chance.u8(..))
        .take(1_048_440)
        .collect();
    let bad: Vec<Vec<u8>> = [b"".as_slice(), b"\xff\xfe", b"{", b"[]", &long, &huge]
        .map(<[u8]>::to_vec)
        .to_vec();
    let places = send(&kafka, &bad).await?;
    let zero = br#"{"order_id":0,"amount_cents":0}"#;
    let odd: [(&[u8], &[u8]); 1] = [(b"\xff", b"?")];
    produce_kafka_record(&kafka, TOPIC, None, &odd, zero)?;
    let large = reader::send_large(&kafka, TOPIC).await?;
    send_orders(&kafka, 0..1).await?;
    let mut running = worker(&kafka, folder.path())?;
    await_receipts(&mut running, folder.path(), 1)?;
    for _ in 0..bad.len() + 2 {
        running.wait_for(": dead ", TIMEOUT)?;
    }
    stop(&mut running)?;

    let letters = dead_letters(&kafka)?;
    assert_eq!(letters.len(), bad.len() + 2);
    for payload in [&zero[..], &large] {
        let with = letters.iter().filter(|one| one.payload() == Some(payload));
        assert_eq!(with.count(), 1);
    }
    for ((number, payload), (partition, offset)) in bad.iter().enumerate().zip(places) {
        let origin = format!("{TOPIC}/{partition}/{offset}");
        let mut found = letters.iter().filter(|letter| {
            // The odd header cannot be read.
            letter.payload() != Some(zero) && header(letter, "origin").as_ref() == Some(&origin)
        });
        let letter = found
            .next()
            .with_context(|| format!("no letter of {origin}"))?;
        assert!(found.next().is_none());
        assert_eq!(header(letter, "tenant").as_deref(), Some("acme"));
        let reason = header(letter, "reason").context("no reason")?;
        assert!(
            reason.starts_with("malformed: ") && reason.len() <= 200,
            "{reason}"
        );
        if *payload == huge {
            assert_eq!((letter.key(), letter.payload()), (None, None));
        } else {
            assert_eq!(letter.payload(), Some(&payload[..]));
            assert_eq!(letter.key(), Some(number.to_string().as_bytes()));
        }
    }
    Ok(())
}

#[tokio::test]
async fn all_partitions_are_read_and_rebalances_between_two_workers_lose_no_order() -> Result<()> {
    const ORDERS: usize = 3000;
    let kafka = shared::kafka(&[NAME])?;
    create_topic(&kafka, TOPIC, 7, &[]).await?;
    let folder = tempfile::tempdir()?;
    let mut first = worker(&kafka, folder.path())?;
    let half = ORDERS as u64 / 2;
    let places = send_orders(&kafka, 0..half).await?;
    ensure!(places.iter().any(|(partition, _)| *partition == 6));
    first.wait_for(": done", TIMEOUT)?;
    let mut second = worker(&kafka, folder.path())?;
    send_orders(&kafka, half..ORDERS as u64).await?;
    // Both have partitions when both are done with an order.
    while send_orders(&kafka, 0..50).await.is_ok() {
        if second
            .wait_for(": done", Duration::from_millis(200))
            .is_ok()
        {
            break;
        }
    }
    second.kill()?;
    await_receipts(&mut first, folder.path(), ORDERS)?;
    stop(&mut first)
}

#[tokio::test]
async fn it_works_without_permission_to_create_topics_and_names_a_topic_that_is_missing()
-> Result<()> {
    let kafka = Broker::secure(Service::Kafka)?;
    let folder = tempfile::tempdir()?;
    let create = |topic| {
        tool(
            &kafka,
            "TopicCommand",
            &["--create", "--topic", topic, "--partitions", "1"],
        )
    };
    create(TOPIC)?;
    let ended = worker(&kafka, folder.path())?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    // Three are missing, and any of them can be the first.
    let refused = "Message consumption error: TopicAuthorizationFailed";
    let is_named = |line: &str| line.starts_with("worker-orders.retry-") && line.contains(refused);
    assert!(ended.stderr.lines().any(is_named), "{}", ended.stderr);

    for topic in &TOPICS[1..] {
        create(topic)?;
    }
    send_orders(&kafka, 0..1).await?;
    send(&kafka, &[b"{".to_vec()]).await?;
    let receipts = folder.path().join("later");
    let mut running = worker(&kafka, &receipts)?;
    for _ in 0..2 {
        running.wait_for("worker-orders/0/", TIMEOUT)?;
    }
    fs::create_dir(&receipts)?;
    await_receipts(&mut running, &receipts, 1)?;
    stop(&mut running)?;
    assert_eq!(dead_letters(&kafka)?.len(), 1);

    // The group's permission is missing.
    let deny = ["--deny-principal", "User:ANONYMOUS", "--operation", "Read"];
    tool(
        &kafka,
        "AclCommand",
        &[&["--add", "--group", "order-worker"][..], &deny].concat(),
    )?;
    let ended = worker(&kafka, &receipts)?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    let reason = "GroupAuthorizationFailed";
    assert!(ended.stderr.contains(reason), "{}", ended.stderr);
    Ok(())
}

#[tokio::test]
async fn metrics_count_the_outcomes_and_the_time() -> Result<()> {
    let kafka = shared::kafka(&[NAME])?;
    let folder = tempfile::tempdir()?;
    send(&kafka, &[b"{".to_vec(), b"}".to_vec()]).await?;
    send_orders(&kafka, 0..3).await?;
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port();
    let mut running = Example::new(env!("CARGO_BIN_EXE_kafka_production_worker"))
        .env("RECEIPTS", folder.path())
        .env("METRICS_PORT", port.to_string())
        .broker(&kafka)
        .spawn()?;
    await_receipts(&mut running, folder.path(), 3)?;
    for _ in 0..2 {
        running.wait_for(": dead ", TIMEOUT)?;
    }
    let metrics = http_get(&format!("http://127.0.0.1:{port}/metrics"), TIMEOUT);
    let (_, metrics) = metrics.context("no metrics")?;
    for line in [
        r#"worker_messages_total{outcome="done"} 3"#,
        r#"worker_messages_total{outcome="dead"} 2"#,
        "worker_message_seconds_count 3",
        r#"worker_lag_seconds{topic="worker-orders"}"#,
    ] {
        assert!(metrics.contains(line), "no {line}: {metrics}");
    }
    stop(&mut running)
}

/// An engineer replaces the message and the action.
#[test]
fn all_that_a_user_changes_stands_below_the_line() {
    let source = include_str!("../../src/bin/kafka_production_worker.rs");
    let (above, below) = source.split_once("// ---- yours from here ----\n").unwrap();
    assert!(below.lines().count() <= 25, "{below}");
    assert!(!above.contains("Order") && !above.contains("\"worker-orders"));
    for name in [
        "TOPIC: &str",
        "GROUP: &str",
        "struct Order",
        "async fn handle(",
    ] {
        assert!(below.contains(name), "{name}");
    }
}
