//! An outage of the broker loses, repeats and reorders nothing. Final errors end the programs with their reason.

use std::fs;

use anyhow::{Context, Result};
use compose::harness::{Example, Proxy, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message};

use crate::administrator::tool;
use crate::reader::read;

const PRODUCER: &str = env!("CARGO_BIN_EXE_kafka_reconnect");
const CONSUMER: &str = env!("CARGO_BIN_EXE_kafka_reconnect_consumer");

fn start(program: &str, kafka: &Broker) -> Result<Running> {
    Example::new(program).broker(kafka).spawn()
}

async fn send(kafka: &Broker, readings: &[&str]) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    for reading in readings {
        let record = FutureRecord::<(), _>::to("reconnect-readings").payload(*reading);
        let sent = producer.send(record.partition(0), TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
    }
    Ok(())
}

#[test]
fn an_outage_loses_repeats_and_reorders_no_tick() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let mut ticks = start(PRODUCER, &kafka)?;
    ticks.wait_for("confirmed: tick 5", TIMEOUT)?;
    for _ in 0..2 {
        kafka.kill(1)?;
        ticks.wait_for("waiting: ", TIMEOUT)?;
        kafka.restart(1)?;
        ticks.wait_for("confirmed: tick", TIMEOUT)?;
    }
    ticks.terminate()?;
    let ended = ticks.wait(TIMEOUT)?.ok()?;
    let stdout = &ended.stdout;
    let complete = stdout.ends_with("every tick is confirmed\n");
    assert!(complete, "{stdout}");
    assert!(!stdout.contains("not confirmed in time"), "{stdout}");
    let mut written = Vec::new();
    for record in read(&kafka, "reconnect-ticks", "read_committed")? {
        let payload = record.payload().context("no payload")?;
        written.push(std::str::from_utf8(payload)?.parse::<u32>()?);
    }
    let expected: Vec<u32> = (0..u32::try_from(written.len())?).collect();
    assert_eq!(written, expected);
    let confirmed: Vec<u32> = stdout
        .lines()
        .filter_map(|line| line.strip_prefix("confirmed: tick ")?.parse().ok())
        .collect();
    assert_eq!(confirmed, written);
    assert!(written.len() > 20, "{written:?}");
    // For both outages together: the client does not log each attempt to connect.
    let logged = ended.stderr.lines().count();
    assert!((1..=12).contains(&logged), "{}", ended.stderr);
    Ok(())
}

#[test]
fn ticks_without_a_report_are_an_error() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let mut ticks = start(PRODUCER, &kafka)?;
    ticks.wait_for("confirmed: tick 5", TIMEOUT)?;
    kafka.kill(1)?;
    ticks.wait_for("waiting: ", TIMEOUT)?;
    ticks.interrupt()?;
    let ended = ticks.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}", ended.stderr);
    let told = "ticks are not confirmed";
    assert!(ended.stderr.contains(told), "{}", ended.stderr);
    assert!(!ended.stdout.contains("every tick"), "{}", ended.stdout);
    Ok(())
}

/// The outage is longer than `message.timeout.ms`, a minute. The program continues, and tells it at its end.
#[test]
fn a_tick_that_is_not_confirmed_in_time_is_an_error() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let mut ticks = start(PRODUCER, &kafka)?;
    ticks.wait_for("confirmed: tick 5", TIMEOUT)?;
    kafka.kill(1)?;
    ticks.wait_for("not confirmed in time: tick ", TIMEOUT)?;
    kafka.restart(1)?;
    ticks.wait_for("confirmed: tick", TIMEOUT)?;
    ticks.terminate()?;
    let ended = ticks.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    let told = "ticks were not confirmed in time";
    assert!(ended.stderr.contains(told), "{}", ended.stderr);
    assert!(!ended.stdout.contains("every tick"), "{}", ended.stdout);
    Ok(())
}

#[tokio::test]
async fn the_consumer_continues_after_an_outage_where_it_was() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    send(&kafka, &["reading-0"]).await?;
    let mut consumer = start(CONSUMER, &kafka)?;
    consumer.wait_for("offset 0: reading-0", TIMEOUT)?;
    for (number, reading) in [(1, "reading-1"), (2, "reading-2")] {
        kafka.kill(1)?;
        consumer.wait_for("waiting for the broker: ", TIMEOUT)?;
        kafka.restart(1)?;
        send(&kafka, &[reading]).await?;
        consumer.wait_for("receiving again", TIMEOUT)?;
        consumer.wait_for(&format!("offset {number}: {reading}"), TIMEOUT)?;
    }
    consumer.terminate()?;
    let ended = consumer.wait(TIMEOUT)?.ok()?;
    // One line for each outage, however many errors the client returns.
    let waiting = ended.stdout.matches("waiting for the broker: ").count();
    assert_eq!(waiting, 2, "{}", ended.stdout);
    Ok(())
}

/// The broker answers at the address that the program knows, and tells it to continue at a port where nothing listens.
#[test]
fn the_address_that_fails_is_named() -> Result<()> {
    let (kafka, proxy) = Proxy::in_front_of(Service::Kafka)?;
    let mut properties = String::new();
    for entry in fs::read_dir(kafka.folder())? {
        let file = entry?.path().join("server.properties");
        properties += &fs::read_to_string(file).unwrap_or_default();
    }
    properties += &fs::read_to_string(kafka.folder().join("server.properties")).unwrap_or_default();
    let listener = properties
        .split("PROXIED://")
        .nth(1)
        .context("no listener")?;
    let listener = listener.lines().next().context("no listener")?;
    let advertised = proxy.address();
    assert_ne!(listener, advertised);
    proxy.cut()?;
    let run = |program: &str| Example::new(program).env("KAFKA_BROKERS", listener).spawn();
    let mut ticks = run(PRODUCER)?;
    let mut consumer = run(CONSUMER)?;
    consumer.wait_for("waiting for the broker: ", TIMEOUT)?;
    for program in [&mut ticks, &mut consumer] {
        program.wait_for_line(
            |line| line.contains(advertised) && line.contains("Connection refused"),
            "the address",
            TIMEOUT,
        )?;
    }
    ticks.wait_for("waiting: 20 ticks", TIMEOUT)?;
    let lines = consumer.lines();
    let waiting = lines.iter().filter(|line| line.contains("waiting")).count();
    assert_eq!(waiting, 1, "{lines:?}");
    assert!(!ticks.lines().iter().any(|line| line.contains("may ")));
    proxy.heal()?;
    ticks.wait_for("confirmed: tick 20", TIMEOUT)?;
    Ok(())
}

#[tokio::test]
async fn missing_rights_end_the_programs_with_the_reason() -> Result<()> {
    let kafka = Broker::secure(Service::Kafka)?;
    let refused = |mut running: Running, reason: &str| -> Result<()> {
        let ended = running.wait(TIMEOUT)?;
        assert_eq!(ended.code(), 1, "{}", ended.stderr);
        assert!(ended.stderr.contains(reason), "{}", ended.stderr);
        assert!(!ended.stdout.contains("waiting"), "{}", ended.stdout);
        Ok(())
    };
    // The application has no right to create topics.
    refused(start(PRODUCER, &kafka)?, "TopicAuthorizationFailed")?;
    refused(start(CONSUMER, &kafka)?, "TopicAuthorizationFailed")?;

    for topic in ["reconnect-ticks", "reconnect-readings"] {
        tool(
            &kafka,
            "TopicCommand",
            &["--create", "--topic", topic, "--partitions", "5"],
        )?;
    }
    let mut ticks = start(PRODUCER, &kafka)?;
    ticks.wait_for("confirmed: tick 3", TIMEOUT)?;
    ticks.terminate()?;
    ticks.wait(TIMEOUT)?.ok()?;
    send(&kafka, &["reading-0"]).await?;
    let mut consumer = start(CONSUMER, &kafka)?;
    consumer.wait_for("offset 0: reading-0", TIMEOUT)?;
    // The right for the group is taken away while it works.
    let principal = "User:ANONYMOUS";
    tool(
        &kafka,
        "AclCommand",
        &[
            "--remove",
            "--force",
            "--allow-principal",
            principal,
            "--operation",
            "Read",
            "--group",
            "*",
        ],
    )?;
    refused(consumer, "GroupAuthorizationFailed")?;
    refused(start(CONSUMER, &kafka)?, "GroupAuthorizationFailed")?;
    Ok(())
}
