//! A store that refuses, delays, and dies after it has taken what it was given.

use std::collections::HashSet;

use anyhow::{Context, Result, ensure};
use compose::harness::produce_kafka_record;
use compose::{Broker, Service};
use rdkafka::Message;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer};

use crate::shared::kafka;

use super::http::{Fault, Proxy};
use super::{ALONE, TIMEOUT, await_count, count, dead_letters, find, get, header, program, store};

#[test]
fn the_store_refuses_delays_and_dies_after_applying() -> Result<()> {
    let _shared = ALONE.read();
    let kafka = kafka(&["faults"])?;
    let index = "faults";
    program(
        &kafka,
        &store()?.address(),
        index,
        &["--entries", "1500", "--produce-only"],
    )
    .spawn()?
    .wait(TIMEOUT)?
    .ok()?;

    // What no store takes, what no line of ours would be, and what is unusual and fine.
    let vandal: BaseProducer<DefaultProducerContext> = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("message.max.bytes", "30000000")
        .set("compression.type", "lz4")
        .create()?;
    let time = r#""timestamp":"2026-01-02T03:04:05Z""#;
    // Compressed, it is small enough for the topic; its dead letter can only be a part of it.
    let large = format!(
        r#"{{{time},"level":{{"deep":"{}"}}}}"#,
        "x".repeat(20_000_000)
    );
    let refused = [
        large,
        format!(r#"{{{time},"level":{{"deep":1}}}}"#),
        format!(r#"{{{time},"http":"no object"}}"#),
        format!(r#"{{{time},"service":"a","service":"b"}}"#),
    ];
    let odd: [Vec<u8>; 5] = [
        b"no json".to_vec(),
        b"\xff\xfe{".to_vec(),
        Vec::new(),
        br#"{"timestamp":"soon"}"#.to_vec(),
        format!("{{\n{time},\r\n\"message\":\"on several lines\"}}").into_bytes(),
    ];
    for payload in refused
        .iter()
        .map(String::as_bytes)
        .chain(odd.iter().map(Vec::as_slice))
    {
        vandal
            .send(BaseRecord::to(index).key("vandal").payload(payload))
            .map_err(|(error, _)| error)?;
    }
    vandal.flush(TIMEOUT)?;
    // The client panics at such a header.
    let named = format!(r#"{{{time},"level":{{"deep":2}}}}"#);
    let headers: [(&[u8], &[u8]); 1] = [(b"\xff\xfe", b"x")];
    produce_kafka_record(&kafka, index, Some(b"k"), &headers, named.as_bytes())?;

    let faults = [
        Fault::Status(429),
        Fault::OneItemLater,
        Fault::Status(503),
        Fault::Cut,
        Fault::Status(500),
        Fault::OneIndexLater,
        Fault::Cut,
        Fault::Hold,
    ];
    let proxy = Proxy::start(&store()?.address(), &faults)?;
    let aggregate = ["aggregate", "--instance", "one"];
    let mut first = program(&kafka, &proxy.address, index, &aggregate).spawn()?;
    // Between the bulk and the commit: the store has the batch, the aggregator will never know.
    loop {
        if let Fault::Hold = proxy.happened.recv_timeout(TIMEOUT)? {
            break;
        }
    }
    first.kill()?;
    assert_eq!(proxy.left(), 0);
    let mut second = program(&kafka, &store()?.address(), index, &aggregate).spawn()?;
    program(&kafka, &store()?.address(), index, &["audit"])
        .spawn()?
        .wait(TIMEOUT)?
        .ok()?;
    second.terminate()?;
    let second = second.wait(TIMEOUT)?.ok()?;
    let again: u64 = second
        .stdout
        .split(" entries stored, ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next()?.parse().ok())
        .context(second.stdout.clone())?;
    assert!(again > 0, "the kill fell on nothing: {}", second.stdout);

    assert_eq!(count(index)?, 1500 + odd.len() as u64);
    let unparsed = find(index, "level:UNPARSED")?;
    assert_eq!(unparsed.len(), 4, "{unparsed:?}");
    assert_eq!(find(index, "message:several")?.len(), 1);
    let generated = find(index, "ingested.source:generator")?;
    let ids: HashSet<_> = generated.iter().map(|hit| hit["_id"].as_str()).collect();
    assert_eq!(ids.len(), 1500);
    let hit = &generated[0];
    let day = hit["_source"]["timestamp"].as_str().context("timestamp")?[..10].replace('-', ".");
    assert_eq!(hit["_index"], format!("{index}-{day}"));

    let dead = dead_letters(&kafka.address(), index)?;
    let mut payloads: Vec<_> = dead
        .iter()
        .map(|letter| String::from_utf8_lossy(letter.payload().unwrap_or_default()).into_owned())
        .collect();
    payloads.sort();
    let mut expected = refused.to_vec();
    expected[0].truncate(1 << 20);
    expected.push(named);
    expected.sort();
    assert!(payloads == expected, "{} dead letters", payloads.len());
    for letter in &dead {
        let reason = header(letter, "reason").context("no reason")?;
        assert!(reason.starts_with("400 "), "{reason}");
        assert!(header(letter, "offset").is_some());
    }
    Ok(())
}

#[test]
fn what_kafka_does_not_take_ends_with_a_readable_error() -> Result<()> {
    let _shared = ALONE.read();
    let kafka = kafka(&["small"])?;
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let topic =
        NewTopic::new("small", 1, TopicReplication::Fixed(1)).set("max.message.bytes", "2000");
    let (topics, options) = ([topic], AdminOptions::new());
    futures::executor::block_on(admin.create_topics(&topics, &options))?;
    let noise: String = std::iter::repeat_with(fastrand::alphanumeric)
        .take(10_000)
        .collect();
    let args = ["ingest", "-", "--produce-only"];
    let ended = program(&kafka, &store()?.address(), "small", &args)
        .stdin(noise)
        .spawn()?
        .wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    assert!(
        ended.stderr.contains("Kafka does not take what was read")
            && ended.stderr.contains("size too large"),
        "{}",
        ended.stderr
    );
    Ok(())
}

#[test]
fn ctrl_c_does_not_wait_for_a_store_that_takes_nothing() -> Result<()> {
    let _shared = ALONE.read();
    let kafka = kafka(&["patience"])?;
    let proxy = Proxy::start(&store()?.address(), &[Fault::Status(503); 1000])?;
    let run = |store: &str| {
        let args = ["--entries", "700", "--instance", "one"];
        program(&kafka, store, "patience", &args).spawn()
    };
    let mut first = run(&proxy.address)?;
    proxy.happened.recv_timeout(TIMEOUT)?;
    first.interrupt()?;
    let first = first.wait(TIMEOUT)?;
    assert_eq!(first.code(), 1);
    assert!(
        first
            .stdout
            .contains("0 of 700 entries are stored; run it again"),
        "{}",
        first.stdout
    );
    Ok(())
}

#[test]
fn the_bench_leaves_nothing_behind() -> Result<()> {
    let _shared = ALONE.read();
    let kafka = kafka(&["bench"])?;
    let bench = |entries: &str, rounds: &str| {
        let args = ["bench", "--entries", entries, "--rounds", rounds];
        program(&kafka, &store()?.address(), "bench", &args).spawn()
    };
    let left = || -> Result<usize> {
        let all = get("/_cat/indices?format=json")?;
        let all = all.as_array().context("no list")?;
        let ours = |index: &&serde_json::Value| {
            index["index"]
                .as_str()
                .is_some_and(|name| name.starts_with("bench-"))
        };
        Ok(all.iter().filter(ours).count())
    };
    let stdout = bench("500", "1")?.wait(TIMEOUT)?.ok()?.stdout;
    assert!(stdout.contains("file -> Kafka -> store, 100"), "{stdout}");
    assert_eq!(left()?, 0);

    let mut interrupted = bench("5000", "100")?;
    interrupted.wait_for("round 1:", TIMEOUT)?;
    while left()? == 0 {
        ensure!(interrupted.try_wait()?.is_none(), "it has ended");
    }
    interrupted.interrupt()?;
    assert_eq!(interrupted.wait(TIMEOUT)?.code(), 1);
    assert_eq!(left()?, 0);
    Ok(())
}

const PIPE: [&str; 8] = [
    "ingest",
    "-",
    "--service",
    "shop",
    "--name",
    "pipe",
    "--instance",
    "one",
];

/// A second of waiting is as good as ninety-nine more entries, and the search shows what was stored.
#[test]
fn a_few_entries_are_stored_after_a_second() -> Result<()> {
    let _shared = ALONE.read();
    let kafka = kafka(&["faults-few", "log_aggregation"])?;
    // Its indices begin like those of another test, and must not be taken for them.
    let index = "faults-few";
    let store = store()?.address();
    let mut ingest = program(&kafka, &store, index, &PIPE).open_stdin().spawn()?;
    let now = chrono::Utc::now().to_rfc3339();
    let line = |level: &str, service: &str| {
        format!(
            "{{\"timestamp\":\"{now}\",\"level\":\"{level}\",\"service\":\"{service}\",\"message\":\"card declined\"}}\n"
        )
    };
    let first = line("error", "payment") + "garbage\n" + &line("info", "payment");
    ingest.write_stdin(&first)?;
    // The input is still open, and the aggregator is far from a hundred.
    await_count(index, 3)?;
    ingest.kill()?;

    // Piped in again under the same name: what is stored is left out.
    let mut ingest = program(&kafka, &store, index, &PIPE)
        .stdin(first + &line("error", "shipping"))
        .spawn()?;
    let report = ingest.wait(TIMEOUT)?.ok()?.stdout;
    for (what, n) in [
        ("lines read", 4),
        ("of these unparsed", 1),
        ("documents", 4),
    ] {
        let line = report.lines().find(|line| line.starts_with(what));
        assert!(
            line.is_some_and(|line| line.ends_with(&format!(" {n}"))),
            "{report}"
        );
    }
    assert_eq!(count(index)?, 4);

    let query = "level:ERROR AND service:payment";
    let search = |args: &[&str]| program(&kafka, &store, index, args).spawn()?.wait(TIMEOUT);
    let found = search(&["search", query, "--last", "15m"])?.ok()?.stdout;
    assert!(
        found.starts_with(&format!("1 entries for {query} in the last 15m\n")),
        "{found}"
    );
    assert!(
        found.contains("payment                          1         1\n"),
        "{found}"
    );
    let chart = found.lines().find(|line| line.starts_with("ERROR  "));
    assert!(
        chart.is_some_and(|chart| chart.contains('█') && chart.ends_with(" 1")),
        "{found}"
    );
    assert!(found.contains("payment      card declined"), "{found}");
    let found = search(&["search", "level:(", "--last", "15m"])?;
    assert_eq!(found.code(), 1);
    assert!(
        found.stderr.contains("Failed to parse query"),
        "{}",
        found.stderr
    );

    // Offsets of another cluster mean other entries: they must not replace these.
    let other = Broker::private(Service::Kafka)?;
    let refused = program(&other, &store, index, &["--entries", "10"])
        .spawn()?
        .wait(TIMEOUT)?;
    assert_eq!(refused.code(), 1);
    assert!(
        refused.stderr.contains("another Kafka cluster"),
        "{}",
        refused.stderr
    );

    // No store at all.
    let absent = compose::harness::Example::new(env!("CARGO_BIN_EXE_log_aggregation"))
        .args(["--entries", "10", "--wait", "1"])
        .broker(&kafka)
        .env("ELASTICSEARCH_URL", "http://user:secret@127.0.0.1:1")
        .spawn()?
        .wait(TIMEOUT)?;
    assert_eq!(absent.code(), 1);
    assert!(
        absent.stderr.contains("cargo lab up opensearch"),
        "{}",
        absent.stderr
    );
    assert!(
        absent.stderr.contains("http://127.0.0.1:1"),
        "{}",
        absent.stderr
    );
    assert!(!absent.stderr.contains("secret"), "{}", absent.stderr);
    Ok(())
}
