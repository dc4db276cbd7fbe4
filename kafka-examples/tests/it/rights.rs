//! Clients without the permission to create topics work with existing topics. Other missing permissions end a program with
//! the reason.

use std::path::Path;

use anyhow::{Result, ensure};
use compose::harness::{Example, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::ClientConfig;
use rdkafka::producer::{FutureProducer, FutureRecord};

use crate::administrator::{create_topic, tool};

const EXACTLY_ONCE: &str = env!("CARGO_BIN_EXE_kafka_exactly_once");
const IDEMPOTENT_CONSUMER: &str = env!("CARGO_BIN_EXE_kafka_idempotent_consumer");
const REQUEST_REPLY: &str = env!("CARGO_BIN_EXE_kafka_request_reply");

fn example(kafka: &Broker, program: &str, folder: &Path) -> Example {
    Example::new(program).current_dir(folder).broker(kafka)
}

/// The example ends with this reason, and not with a promise to wait.
fn ends_with(kafka: &Broker, program: &str, folder: &Path, reason: &str) -> Result<()> {
    let ended = example(kafka, program, folder).spawn()?.wait(TIMEOUT)?;
    ensure!(ended.code() == 1, "{program}: {}", ended.stderr);
    let error = ended.stderr.split("Error: ").nth(1).unwrap_or_default();
    ensure!(error.contains(reason), "{program}: {}", ended.stderr);
    Ok(())
}

#[tokio::test]
async fn existing_topics_are_enough_and_other_missing_permissions_end_the_program() -> Result<()> {
    let kafka = Broker::secure(Service::Kafka)?;
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let create = [
        "--allow-principal",
        "User:ANONYMOUS",
        "--operation",
        "Create",
        "--cluster",
    ];
    tool(&kafka, "AclCommand", &[&["--add"], &create[..]].concat())?;
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.address());
    for topic in [
        "exactly-once.orders",
        "exactly-once.invoices",
        "exactly-once.orders.dlq",
        "idempotent-payments",
        "wait-requests",
        "wait-replies",
    ] {
        create_topic(&kafka, topic, 5, &[]).await?;
    }
    tool(
        &kafka,
        "AclCommand",
        &[&["--remove", "--force"], &create[..]].concat(),
    )?;

    let producer: FutureProducer = config.create()?;
    for (topic, payload) in [
        ("exactly-once.orders", r#"{"order_id":"a","cents":1}"#),
        ("exactly-once.orders", "bad"),
        (
            "idempotent-payments",
            r#"{"payment_id":"a","user_id":"u","cents":1}"#,
        ),
    ] {
        // All to one partition, so that they are one batch.
        let record = FutureRecord::<(), _>::to(topic)
            .partition(4)
            .payload(payload);
        let sent = producer.send(record, TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
    }
    for (program, line) in [
        (EXACTLY_ONCE, "committed: 2 records"),
        (IDEMPOTENT_CONSUMER, "a: u +1 cents, balance 1"),
    ] {
        let mut running = example(&kafka, program, folder).spawn()?;
        running.wait_for(line, TIMEOUT)?;
        running.terminate()?;
        running.wait(TIMEOUT)?.ok()?;
    }
    let request = example(&kafka, REQUEST_REPLY, folder).args(["1"]);
    let ended = request.spawn()?.wait(TIMEOUT)?.ok()?;
    ensure!(ended.stdout.starts_with("1: done"), "{}", ended.stdout);

    let deny = ["--add", "--deny-principal", "User:ANONYMOUS", "--operation"];
    let invoices = ["Write", "--topic", "exactly-once.invoices"];
    tool(&kafka, "AclCommand", &[&deny[..], &invoices].concat())?;
    let record = FutureRecord::<(), _>::to("exactly-once.orders");
    let sent = producer
        .send(record.payload(r#"{"order_id":"b","cents":1}"#), TIMEOUT)
        .await;
    sent.map_err(|(error, _)| error)?;
    ends_with(&kafka, EXACTLY_ONCE, folder, "Topic authorization failed")?;

    tool(
        &kafka,
        "AclCommand",
        &[&deny[..], &["Read", "--group", "*"]].concat(),
    )?;
    for program in [EXACTLY_ONCE, IDEMPOTENT_CONSUMER] {
        ends_with(&kafka, program, folder, "GroupAuthorizationFailed")?;
    }
    tool(
        &kafka,
        "AclCommand",
        &[&deny[..], &["Write", "--transactional-id", "*"]].concat(),
    )?;
    let reason = "Transactional Id authorization failed";
    ends_with(&kafka, EXACTLY_ONCE, folder, reason)?;
    tool(
        &kafka,
        "AclCommand",
        &[&deny[..], &["Write", "--topic", "wait-requests"]].concat(),
    )?;
    let request = example(&kafka, REQUEST_REPLY, folder).args(["1"]);
    let ended = request.spawn()?.wait(TIMEOUT)?;
    ensure!(ended.code() == 1, "{}{}", ended.stdout, ended.stderr);
    ensure!(
        ended.stderr.contains("TopicAuthorizationFailed"),
        "{}",
        ended.stderr
    );
    Ok(())
}
