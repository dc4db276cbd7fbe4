//! The HTTP API's numbers are the broker's, and what is wrong with it is said in words.

use std::time::Duration;

use anyhow::{Context, Result};
use compose::harness::Running;
use compose::{Broker, Service};
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;

use crate::shared::{Place, TIMEOUT, vhost};

const MONITOR: &str = env!("CARGO_BIN_EXE_rabbitmq_queue_monitor");
const PITFALL: &str = env!("CARGO_BIN_EXE_rabbitmq_pitfall_missing_ack");

fn monitor(place: &Place, args: &[&str]) -> Result<Running> {
    place
        .example(MONITOR)
        .env("MONITOR_INTERVAL", "1")
        .env("MONITOR_THRESHOLD", "5")
        .args(args)
        .spawn()
}

#[tokio::test]
async fn it_warns_of_ready_and_of_unacknowledged_and_says_when_it_is_over() -> Result<()> {
    let place = vhost().await?;
    let mut watching = monitor(&place, &["deep"])?;
    watching.wait_for("deep: no such queue yet", TIMEOUT)?;
    for queue in ["deep", "other"] {
        let options = QueueDeclareOptions::durable();
        place
            .channel
            .queue_declare(queue.into(), options, FieldTable::default())
            .await?;
        for _ in 0..6 {
            place.publish(queue, b"x").await?;
        }
    }
    watching.wait_for(
        "WARNING: deep has 6 messages, over the threshold of 5",
        TIMEOUT,
    )?;
    // Perhaps it has said so before: the first look may have been at fewer messages.
    let alone = "WARNING: deep has messages and no consumer";
    let said = async {
        while !watching.lines().iter().any(|line| line.contains(alone)) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, said).await.context(alone)?;
    // Taken and not acknowledged: ready is 0 now, and it is still as deep.
    let holder = Place::again(&place).await?;
    let mut held = Vec::new();
    for _ in 0..6 {
        let message = holder
            .channel
            .basic_get("deep".into(), Default::default())
            .await?;
        held.push(message.context("none left")?);
    }
    watching.wait_for("deep: ready 0, unacknowledged 6, consumers 0", TIMEOUT)?;
    for message in held {
        message.ack(Default::default()).await?;
    }
    watching.wait_for("recovered: deep has nothing left", TIMEOUT)?;
    watching.wait_for("recovered: deep has 0 messages", TIMEOUT)?;
    // Whatever comes under its name later, is another queue.
    place
        .channel
        .queue_delete("deep".into(), Default::default())
        .await?;
    watching.wait_for("deep: the queue is gone", TIMEOUT)?;
    place.declare("deep").await?;
    for _ in 0..7 {
        place.publish("deep", b"x").await?;
    }
    watching.wait_for("WARNING: deep has 7 messages", TIMEOUT)?;
    watching.wait_for("WARNING: deep has messages and no consumer", TIMEOUT)?;
    holder.channel.basic_qos(1, Default::default()).await?;
    let consumer = holder
        .channel
        .basic_consume(
            "deep".into(),
            "".into(),
            Default::default(),
            Default::default(),
        )
        .await?;
    watching.wait_for("recovered: deep has a consumer", TIMEOUT)?;
    drop(consumer);
    watching.interrupt()?;
    let ended = watching.wait(TIMEOUT)?.ok()?;
    assert!(!ended.stdout.contains("other"), "{}", ended.stdout);
    Ok(())
}

#[tokio::test]
async fn a_queue_without_numbers_is_not_an_empty_one() -> Result<()> {
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    let place = Place::of(&rabbitmq).await?;
    place.declare("deep").await?;
    for _ in 0..6 {
        place.publish("deep", b"x").await?;
    }
    let mut before = monitor(&place, &["deep"])?;
    before.wait_for("WARNING: deep has messages and no consumer", TIMEOUT)?;
    rabbitmq.restart(1)?;
    let mut after = monitor(&place, &["deep"])?;
    after.wait_for("deep: ready 6", TIMEOUT)?;
    after.wait_for("WARNING: deep has messages and no consumer", TIMEOUT)?;
    for watching in [&mut before, &mut after] {
        watching.interrupt()?;
        let said = watching.wait(TIMEOUT)?.ok()?.stdout;
        // In the first one before the messages had come, and never again.
        let (_, said) = said
            .split_once("WARNING: deep has messages")
            .context("no warning")?;
        assert!(
            !said.contains("ready 0") && !said.contains("recovered"),
            "{said}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn what_is_wrong_is_an_error_that_says_so() -> Result<()> {
    let place = vhost().await?;
    let run = |address: &str, management: &str| -> Result<String> {
        let program = place.example(MONITOR).env("AMQP_ADDR", address);
        let ended = program
            .env("RABBITMQ_MANAGEMENT_URL", management)
            .spawn()?
            .wait(TIMEOUT)?;
        assert_eq!(ended.code(), 1);
        assert_eq!(ended.stdout, "");
        assert!(ended.stderr.starts_with("Error: "), "{}", ended.stderr);
        Ok(ended.stderr)
    };
    let wrong = place.address.replace("guest:guest", "guest:wrong");
    let said = run(&wrong, &place.management)?;
    assert!(said.contains("refuses user \"guest\""), "{said}");
    assert!(!said.contains("wrong@"), "the password is printed: {said}");

    // Nobody listens on this port, which is a protocol's that nobody uses.
    let away = "http://127.0.0.1:1";
    let said = run(&place.address, away)?;
    let host = place.address.rsplit('@').next().context("no host")?;
    assert!(said.contains(away) && said.contains(host), "{said}");
    assert!(
        !said.contains("guest:guest"),
        "the password is printed: {said}"
    );
    assert!(said.contains("cargo lab up rabbitmq"), "{said}");

    let nowhere = format!("{}-not-there", place.address);
    let said = run(&nowhere, &place.management)?;
    assert!(said.contains("no such virtual host"), "{said}");
    for url in ["nonsense", "mailto:nobody"] {
        assert!(run(&place.address, url)?.contains("RABBITMQ_MANAGEMENT_URL"));
    }
    let said = run("amqp://[", &place.management)?;
    assert!(said.contains("AMQP_ADDR"), "{said}");
    Ok(())
}

#[tokio::test]
async fn the_pitfall_is_counted_by_the_broker_and_the_cure_holds() -> Result<()> {
    let place = vhost().await?;
    let ended = place.run(PITFALL, &[])?.ok()?;
    for line in [
        "wrong: tasks done: 10; the broker says: ready 0, unacknowledged 10",
        "wrong: after the end of the connection: ready 10, unacknowledged 0; delivered again: 10",
        "right: after the end of the connection: ready 0, unacknowledged 0; delivered again: 0",
        "cure: one poison message, delivered 4 times, then in pitfall-missing-ack.dead",
    ] {
        assert!(
            ended.stdout.lines().any(|one| one == line),
            "{}",
            ended.stdout
        );
    }
    let line = ended
        .stdout
        .lines()
        .find(|line| line.starts_with("loop: "))
        .context("no loop")?;
    let times = line
        .split(' ')
        .find_map(|word| word.parse::<u32>().ok())
        .context("no count")?;
    // More often than the cure allows.
    assert!(times > 4, "{line}");
    for queue in [
        "pitfall-missing-ack",
        "pitfall-missing-ack.limited",
        "pitfall-missing-ack.dead",
    ] {
        place.becomes(queue, (0, 0)).await?;
    }
    Ok(())
}
