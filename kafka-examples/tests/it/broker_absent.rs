//! What each program does without its broker: at the start, and when it died meanwhile.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use compose::harness::{Call, Example, ExampleInfo, TIMEOUT, Workspace, names, without_broker};
use compose::{Broker, Service, call};

use crate::consumers::{CONSUMERS, example};
use crate::shared;

/// All of the package, so that a new example is tried too.
#[test]
fn without_a_broker_the_error_says_where_and_what_to_do() -> Result<()> {
    let folder = Path::new(env!("CARGO_BIN_EXE_kafka_send")).parent();
    let folder = folder.context("a program is in a folder")?;
    let workspace = Workspace::load()?;
    let examples = workspace.examples().iter().filter(|example| {
        // One without a service needs no broker. One with several has a test of its own, as one with TLS has.
        example.package == env!("CARGO_PKG_NAME")
            && example.services == ["kafka"]
            && !example.secure
    });
    let example = |example: &ExampleInfo| {
        let args: &[&str] = match example.name.as_str() {
            "kafka_send" => &["topic", "payload"],
            "kafka_tail" => &["topic"],
            "kafka_offsets" => &["group", "topic"],
            "kafka_replay" => &["beginning"],
            "kafka_request_reply" => &["100"],
            _ => &[],
        };
        let program = Example::new(folder.join(&example.name)).args(args);
        (example.name.clone(), program)
    };
    without_broker(Service::Kafka, examples.map(example).collect())
}

/// Programs that end by themselves, and the program that gives each its input.
const ENDING: [(Call<'_>, Option<Call<'_>>); 12] = [
    (call!("kafka_async_producer"), None),
    (call!("kafka_batch_producer"), None),
    (call!("kafka_compacted_table"), None),
    (
        call!("kafka_dlq_replay"),
        Some(call!("kafka_send", "retry-dlq.payments.dlq", "{")),
    ),
    (
        call!("kafka_headers_schema"),
        Some(call!("kafka_send", "schema-events", "{")),
    ),
    (
        call!("kafka_offsets", "offsets-group", "offsets-demo"),
        Some(call!("kafka_send", "offsets-demo", "a")),
    ),
    (call!("kafka_pitfall_ordering"), None),
    (
        call!("kafka_replay", "beginning"),
        Some(call!("kafka_send", "replay-readings", "10 °C")),
    ),
    (call!("kafka_request_reply", "10"), None),
    (
        call!("kafka_tail", "-e", "notes"),
        Some(call!("kafka_send", "notes", "hello")),
    ),
    (call!("kafka_tracing"), None),
    (
        call!("kafka_window_aggregation"),
        Some(call!("kafka_page_views", "2026-01-01T12:00:00Z")),
    ),
];

/// For example one of several brokers is down, or `localhost` is also an IPv6 address.
#[test]
fn an_address_that_refuses_is_no_error_while_another_answers() -> Result<()> {
    let kafka = shared::kafka(&names(&ENDING))?;
    for (feeder, args) in ENDING.iter().filter_map(|(_, feeder)| *feeder) {
        let feeder = Example::new(feeder).args(args).broker(&kafka);
        feeder.spawn()?.wait(TIMEOUT)?.ok()?;
    }
    let brokers = format!("127.0.0.1:1,{}", kafka.address());
    // The client chooses an address by chance.
    for _ in 0..4 {
        let start = |((program, args), _): &(Call<'_>, _)| {
            let example = Example::new(program).args(*args).broker(&kafka);
            example.env("KAFKA_BROKERS", &brokers).spawn()
        };
        let running = ENDING.iter().map(start).collect::<Result<Vec<_>>>()?;
        for (mut running, ((program, _), _)) in running.into_iter().zip(ENDING) {
            let ended = running.wait(TIMEOUT)?;
            ended.ok().with_context(|| program.to_owned())?;
        }
    }
    Ok(())
}

/// Half of them get Ctrl-C, and the others SIGTERM. A consumer commits and leaves its group at its end, and both can hang
/// while the broker is down.
#[test]
fn a_signal_ends_every_program_although_the_broker_died() -> Result<()> {
    /// A close that hangs takes forever; the slowest of the others takes half of this.
    const LIMIT: Duration = Duration::from_secs(60);
    let kafka = Broker::private(Service::Kafka)?;
    let folder = tempfile::tempdir()?;
    let example = |call| example(call, &kafka, folder.path());
    // One after another: each has to be served within seconds by a broker that has just started.
    for feeder in CONSUMERS.iter().filter_map(|(_, feeder, _)| *feeder) {
        example(feeder).spawn()?.wait(TIMEOUT)?.ok()?;
    }
    let mut running = Vec::new();
    for (program, ..) in CONSUMERS {
        running.push(example(program).spawn()?);
    }
    for (process, (.., printed)) in running.iter_mut().zip(CONSUMERS) {
        process.wait_for(printed, TIMEOUT)?;
    }
    kafka.kill(1)?;
    for (number, process) in running.iter_mut().enumerate() {
        if number % 2 == 0 {
            process.interrupt()?;
        } else {
            process.terminate()?;
        }
    }
    for mut process in running {
        let ended = process.wait(LIMIT)?;
        // With an error or without: not all of them have something that they could not do.
        let said = ended.stdout.clone() + &ended.stderr;
        assert!(matches!(ended.code(), 0 | 1), "{said}");
        assert!(!said.contains("panicked"), "{said}");
    }
    Ok(())
}
