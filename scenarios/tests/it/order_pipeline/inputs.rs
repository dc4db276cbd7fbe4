//! Orders from files and from standard input, garbage, no Kafka at all, and a second run.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Result;
use compose::harness::produce_kafka_record;
use compose::{Broker, Service};
use rdkafka::Message;
use rdkafka::config::ClientConfig;
use rdkafka::message::OwnedMessage;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer};

use super::{DEAD_LETTERS, TIMEOUT, TOPIC, committed, header, program, reported};
use crate::shared;

const LINES: &str = r#"{"order_id":"a1","user_id":"ann","amount":1250,"note":"keep 0.10 as it is","price":0.10}
{"order_id":"a2","user_id":"bob","amount":12.50}
not json

{"order_id":"a3","user_id":"","amount":5}
{"order_id":"a4","user_id":"ann","amount":200000,"item":"lamp"}
{"order_id":"a1","user_id":"ann","amount":1250,"note":"keep 0.10 as it is","price":0.10}
{"order_id":"a1","user_id":"ann","amount":99}
{"order_id":"a5","user_id":"bob","amount":5,"item":"lamp","quantity":101}
"#;

#[test]
fn orders_from_a_file_with_bad_lines() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let state = tempfile::tempdir()?;
    let file = state.path().join("orders.jsonl");
    std::fs::write(&file, LINES)?;
    let path = file.display().to_string();
    let run = || {
        program(&state, &kafka.address(), &["--from", &path])
            .spawn()?
            .wait(TIMEOUT)?
            .ok()
    };
    let report = run()?.stdout;
    for (what, n) in [
        ("orders in", 3),
        ("shipped", 1),
        ("cancelled", 1),
        ("rejected", 1),
        ("dead letters", 4),
        ("duplicate orders suppressed", 1),
    ] {
        assert_eq!(reported(&report, what), Some(n), "{what}\n{report}");
    }
    let dead = committed(&kafka.address(), DEAD_LETTERS)?;
    let by_line: BTreeMap<String, (String, String)> = dead
        .iter()
        .map(|record| {
            let text = String::from_utf8_lossy(record.payload().unwrap()).into_owned();
            (
                header(record, "line").unwrap(),
                (text, header(record, "reason").unwrap()),
            )
        })
        .collect();
    assert_eq!(by_line.keys().collect::<Vec<_>>(), ["2", "3", "5", "8"]);
    assert_eq!(by_line["3"].0, "not json");
    assert!(by_line["2"].1.contains("floating point"), "{by_line:?}");
    assert!(by_line["5"].1.contains("user_id is empty"), "{by_line:?}");
    assert!(by_line["8"].1.contains("other content"), "{by_line:?}");
    let shipped = committed(&kafka.address(), TOPIC)?
        .into_iter()
        .map(|record| String::from_utf8_lossy(record.payload().unwrap()).into_owned())
        .find(|text| text.contains("shipped"))
        .unwrap();
    assert!(shipped.contains(r#""price":0.10"#), "{shipped}");

    // The same file again: all of its orders were placed before.
    let report = run()?.stdout;
    assert_eq!(reported(&report, "orders in"), Some(0), "{report}");
    assert_eq!(
        reported(&report, "duplicate orders suppressed"),
        Some(4),
        "{report}"
    );
    Ok(())
}

/// For tests of `place` alone, which look at their own orders.
fn place_only() -> Result<Arc<Broker>> {
    static KAFKA: OnceLock<Result<Arc<Broker>, String>> = OnceLock::new();
    let kafka = KAFKA
        .get_or_init(|| shared::kafka(&["order_pipeline"]).map_err(|error| format!("{error:#}")));
    kafka.clone().map_err(anyhow::Error::msg)
}

/// How many orders are on the topic that are such.
fn placed(kafka: &Broker, such: impl Fn(&OwnedMessage) -> bool) -> Result<usize> {
    let records = committed(&kafka.address(), TOPIC)?;
    Ok(records.iter().filter(|record| such(record)).count())
}

#[test]
fn orders_from_standard_input_are_placed_as_they_come() -> Result<()> {
    let kafka = place_only()?;
    let state = tempfile::tempdir()?;
    let start = || {
        program(&state, &kafka.address(), &["place", "--from", "-"])
            .open_stdin()
            .spawn()
    };
    // A user that a generated order does not have.
    let ours = |record: &OwnedMessage| record.key() == Some(b"u");
    let order = |n: u32| format!("{{\"order_id\":\"s{n}\",\"user_id\":\"u\",\"amount\":1}}\n");
    let mut place = start()?;
    place.write_stdin(order(1))?;
    let deadline = Instant::now() + TIMEOUT;
    while placed(&kafka, ours).is_ok_and(|orders| orders == 0) {
        assert!(
            Instant::now() < deadline,
            "nothing is placed before the end of the input"
        );
    }
    place.kill()?;
    // Piped in again: what is there is not placed twice, what is new is.
    let mut place = start()?;
    place.write_stdin(order(1) + &order(2) + "x\n")?;
    place.close_stdin();
    place.wait(TIMEOUT)?.ok()?;
    assert_eq!(placed(&kafka, ours)?, 2);
    assert_eq!(committed(&kafka.address(), DEAD_LETTERS)?.len(), 1);
    Ok(())
}

#[test]
fn garbage_on_the_topic_blocks_nothing() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let state = tempfile::tempdir()?;
    let run = || {
        program(&state, &kafka.address(), &["--orders", "50"])
            .spawn()?
            .wait(TIMEOUT)
    };
    run()?.ok()?;
    let vandal: BaseProducer<DefaultProducerContext> = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let large = format!(
        r#"{{"order_id":"1","status":"created","x":"{}"}}"#,
        "x".repeat(900_000)
    );
    let garbage: [(&str, &str); 7] = [
        ("\u{0}\u{1}", "inventory"),
        ("{", "inventory"),
        (r#"{"status":"lost"}"#, "inventory"),
        (r#"{"status":"shipped"}"#, "inventory"),
        (
            r#"{"order_id":"1","user_id":"u","amount":-1,"status":"inventory_reserved"}"#,
            "payment",
        ),
        (
            r#"{"order_id":1,"user_id":"u","amount":1,"status":"paid"}"#,
            "shipping",
        ),
        (&large, "inventory"),
    ];
    for (payload, _) in &garbage {
        vandal
            .send(BaseRecord::to(TOPIC).key("k").payload(*payload))
            .map_err(|(e, _)| e)?;
    }
    vandal
        .send(BaseRecord::<str, str>::to(TOPIC))
        .map_err(|(e, _)| e)?;
    vandal.flush(TIMEOUT)?;
    // The client panics at such a header.
    let order = br#"{"order_id":"h","user_id":"u","amount":1,"status":"paid"}"#;
    let odd: [(&[u8], &[u8]); 1] = [(b"\xff\xfe", b"x")];
    produce_kafka_record(&kafka, TOPIC, Some(b"k"), &odd, order)?;
    let ended = run()?.ok()?;
    assert!(!ended.stdout.contains("interrupted"), "{}", ended.stdout);
    let dead = committed(&kafka.address(), DEAD_LETTERS)?;
    let mut stages: Vec<_> = dead
        .iter()
        .map(|record| header(record, "stage").unwrap())
        .collect();
    stages.sort();
    let mut expected: Vec<_> = garbage.iter().map(|(_, stage)| *stage).collect();
    expected.extend(["inventory", "shipping"]);
    expected.sort_unstable();
    assert_eq!(stages, expected);
    assert!(dead.iter().all(|record| {
        ["reason", "topic", "partition", "offset"]
            .iter()
            .all(|key| header(record, key).is_some())
    }));
    // The audit reads every run, and knows each dead letter.
    program(&state, &kafka.address(), &["audit"])
        .spawn()?
        .wait(TIMEOUT)?
        .ok()?;
    Ok(())
}

#[test]
fn without_kafka_there_is_one_readable_error() -> Result<()> {
    let state = tempfile::tempdir()?;
    let begun = Instant::now();
    // At once: each waits for a while.
    let parts = [vec![], vec!["inventory"], vec!["place"]]
        .map(|part| program(&state, "127.0.0.1:1", &part).spawn());
    for part in parts {
        let ended = part?.wait(TIMEOUT)?;
        assert_eq!(ended.code(), 1);
        // It waits a moment for a broker that is starting too, but not as long as the client's own limit.
        let waited = begun.elapsed();
        assert!(waited < Duration::from_secs(40), "{waited:?}");
        assert!(ended.stderr.contains("127.0.0.1:1"), "{}", ended.stderr);
        assert!(
            ended.stderr.contains("cargo lab up kafka"),
            "{}",
            ended.stderr
        );
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    }
    Ok(())
}

#[test]
fn a_named_run_is_placed_once() -> Result<()> {
    let kafka = place_only()?;
    let state = tempfile::tempdir()?;
    let args = ["place", "--orders", "700", "--run", "spring-sale"];
    for _ in 0..2 {
        let place = program(&state, &kafka.address(), &args)
            .spawn()?
            .wait(TIMEOUT)?
            .ok()?;
        assert!(
            place.stdout.contains("run spring-sale: 700 orders"),
            "{}",
            place.stdout
        );
    }
    let ours = |record: &OwnedMessage| header(record, "run").as_deref() == Some("spring-sale");
    assert_eq!(placed(&kafka, ours)?, 700);
    Ok(())
}

#[test]
fn an_interrupted_run_says_what_is_missing_and_goes_on_later() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let state = tempfile::tempdir()?;
    let args = ["--orders", "2000", "--rate", "400"];
    let mut first = program(&state, &kafka.address(), &args).spawn()?;
    first.wait_for("final", TIMEOUT)?;
    first.interrupt()?;
    let first = first.wait(TIMEOUT)?;
    assert_eq!(first.code(), 1);
    assert!(first.stdout.contains("are not final"), "{}", first.stdout);
    let second = program(&state, &kafka.address(), &args)
        .spawn()?
        .wait(TIMEOUT)?
        .ok()?;
    assert_eq!(
        reported(&second.stdout, "orders in"),
        Some(2000),
        "{}",
        second.stdout
    );
    assert_eq!(reported(&second.stdout, "dead letters"), Some(0));
    Ok(())
}

#[test]
fn runs_on_the_mock_cluster() -> Result<()> {
    let mock = MockCluster::new(1)?;
    let state = tempfile::tempdir()?;
    let run = program(&state, &mock.bootstrap_servers(), &["--orders", "300"]);
    let report = run.spawn()?.wait(TIMEOUT)?.ok()?.stdout;
    assert_eq!(reported(&report, "orders in"), Some(300), "{report}");
    Ok(())
}
