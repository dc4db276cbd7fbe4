//! A program that may not create topics or describe configurations works with the topics that exist, or tells the reason.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::harness::{Example, TIMEOUT};
use compose::{Broker, Service, User};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};

use crate::administrator::tool;

const DENIED: &str = "TopicAuthorizationFailed";

/// The answer to one order.
fn post(kafka: &Broker) -> Result<String> {
    let mut service = Example::new(env!("CARGO_BIN_EXE_kafka_web_service"))
        .env("PORT", "0")
        .broker(kafka)
        .spawn()?;
    let line = service.wait_for("listening on http://", TIMEOUT)?;
    let address = line.rsplit('/').next().context("no address")?;
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let body = r#"{"order_id":"order-1","amount_cents":995}"#;
    let head = "POST /orders HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Type: application/json";
    let length = body.len();
    write!(stream, "{head}\r\nContent-Length: {length}\r\n\r\n{body}")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    service.terminate()?;
    service.wait(TIMEOUT)?.ok()?;
    Ok(answer)
}

#[test]
fn program_without_permission_works_or_tells_the_reason() -> Result<()> {
    let kafka = Broker::secure(Service::Kafka)?;
    let _admin: HashMap<_, _> = kafka
        .secured_env(User::Administrator)?
        .into_iter()
        .collect();
    let start = |program: &str, args: &[&str]| {
        Example::new(program)
            .env("METRICS_PORT", "0")
            .env("LAG_INTERVAL", "1")
            .args(args)
            .broker(&kafka)
            .spawn()
    };
    let tracing = env!("CARGO_BIN_EXE_kafka_tracing");
    let metrics = env!("CARGO_BIN_EXE_kafka_metrics");
    let topic_admin = env!("CARGO_BIN_EXE_kafka_admin");
    let topic_config = env!("CARGO_BIN_EXE_kafka_topic_config");
    let offsets = env!("CARGO_BIN_EXE_kafka_offsets");
    let monitor = env!("CARGO_BIN_EXE_kafka_lag_monitor");

    // The topics do not exist, and the programs may not create them.
    for program in [tracing, metrics, topic_admin, topic_config] {
        let ended = start(program, &[])?.wait(TIMEOUT)?;
        let (stdout, stderr) = (&ended.stdout, &ended.stderr);
        assert_eq!(ended.code(), 1, "{program}: {stdout}{stderr}");
        let told = stdout.contains(DENIED) || stderr.contains(DENIED);
        ensure!(told, "{program}: {stdout}{stderr}");
        ensure!(!stderr.contains("waiting"), "{program}: {stderr}");
    }
    let answer = post(&kafka)?;
    ensure!(
        answer.starts_with("HTTP/1.1 500 ") && answer.contains(DENIED),
        "{answer}"
    );
    let mut lonely = start(monitor, &[])?;
    lonely.wait_for(
        "no group has committed, or DESCRIBE is not permitted",
        TIMEOUT,
    )?;
    lonely.terminate()?;
    lonely.wait(TIMEOUT)?.ok()?;

    // An administrator has created them, with more partitions than the programs would have made.
    thread::scope(|scope| {
        let topics = [
            "traced-orders",
            "metered-orders",
            "admin-demo",
            "topic-config-demo",
            "web-orders",
        ];
        let created = topics.map(|topic| {
            let create = ["--create", "--topic", topic, "--partitions", "6"];
            let kafka = &kafka;
            scope.spawn(move || tool(kafka, "TopicCommand", &create))
        });
        created
            .into_iter()
            .try_for_each(|created| created.join().unwrap())
    })?;
    // The broker learns of a topic a moment after the controller has created it.
    let client: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let deadline = Instant::now() + TIMEOUT;
    while client.fetch_metadata(None, TIMEOUT)?.topics().len() < 5 {
        ensure!(Instant::now() < deadline, "the topics are not shown");
        thread::sleep(Duration::from_millis(50));
    }
    start(tracing, &[])?.wait(TIMEOUT)?.ok()?;
    let mut program = start(metrics, &[])?;
    program.wait_for("metrics: http://", TIMEOUT)?;
    program.terminate()?;
    program.wait(TIMEOUT)?.ok()?;
    let answer = post(&kafka)?;
    ensure!(answer.starts_with("HTTP/1.1 202 "), "{answer}");

    let ended = start(topic_admin, &[])?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    ensure!(
        ended.stdout.starts_with(&format!("create: {DENIED}")),
        "{}",
        ended.stdout
    );
    let reason = format!("Error: admin-demo: {DENIED}");
    ensure!(ended.stderr.starts_with(&reason), "{}", ended.stderr);

    // rdkafka shows a refused description as an empty one, and writing that back would reset the topic.
    let ended = start(topic_config, &[])?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    let reason = "Error: cannot describe topic-config-demo: is it permitted?";
    ensure!(ended.stderr.contains(reason), "{}", ended.stderr);

    let moved = start(offsets, &["group", "web-orders", "beginning"])?;
    let moved = { moved }.wait(TIMEOUT)?.ok()?.stdout;
    ensure!(moved.contains("partition 5: records 0 to "), "{moved}");
    let deleted = start(offsets, &["group", "web-orders", "delete", "0", "0"])?;
    let deleted = { deleted }.wait(TIMEOUT)?;
    assert_eq!(deleted.code(), 1);
    ensure!(deleted.stderr.contains(DENIED), "{}", deleted.stderr);
    let mut watching = start(monitor, &[])?;
    watching.wait_for("group on web-orders: lag 1", TIMEOUT)?;
    watching.terminate()?;
    watching.wait(TIMEOUT)?.ok()?;
    Ok(())
}
