//! A task is never lost: not with its worker, not with the broker, not because it is malformed.

use std::time::Duration;

use anyhow::{Context, Result};
use compose::harness::{Example, Finished, Running};
use compose::{Broker, Service};
use lapin::options::{BasicGetOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};

const SOON: Duration = Duration::from_secs(20);
const TASK: &str = "Task: Process order #123";

fn send(rabbitmq: &Broker, body: &str) -> Result<Finished> {
    let program = Example::new(env!("CARGO_BIN_EXE_rabbitmq_send"));
    program.args([body]).broker(rabbitmq).spawn()?.wait(SOON)
}

fn receiver(rabbitmq: &Broker) -> Result<Running> {
    let program = Example::new(env!("CARGO_BIN_EXE_rabbitmq_receive"));
    let mut running = program.broker(rabbitmq).spawn()?;
    running.wait_for("waiting for tasks", SOON)?;
    Ok(running)
}

async fn observer(rabbitmq: &Broker) -> Result<(Connection, Channel)> {
    let connection =
        Connection::connect(&rabbitmq.address(), ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    Ok((connection, channel))
}

/// Messages that are ready, which excludes those that a consumer holds, and the number of consumers.
async fn state(channel: &Channel, queue: &str) -> Result<(u32, u32)> {
    let options = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::default()
    };
    let queue = channel
        .queue_declare(queue.into(), options, FieldTable::default())
        .await?;
    Ok((queue.message_count(), queue.consumer_count()))
}

/// The broker needs a moment to notice a dead connection and to write its counts: asks until it says `expected`.
async fn becomes(channel: &Channel, queue: &str, expected: (u32, u32)) -> Result<()> {
    let same = async {
        while state(channel, queue).await? != expected {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        anyhow::Ok(())
    };
    match tokio::time::timeout(SOON, same).await {
        Ok(done) => done,
        Err(_) => anyhow::bail!(
            "{queue}: {:?}, not {expected:?}",
            state(channel, queue).await?
        ),
    }
}

#[tokio::test]
async fn sigkill_during_the_work_gives_the_task_back() -> Result<()> {
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    let mut first = receiver(&rabbitmq)?;
    send(&rabbitmq, TASK)?.ok()?;
    first.wait_for("received: Process order #123", SOON)?;
    let (_connection, channel) = observer(&rabbitmq).await?;
    becomes(&channel, "tasks", (0, 1)).await?;
    first.kill()?;
    becomes(&channel, "tasks", (1, 0)).await?;

    let mut second = receiver(&rabbitmq)?;
    second.wait_for("received: Process order #123 (redelivered)", SOON)?;
    second.wait_for("done: Process order #123", SOON)?;
    second.interrupt()?;
    second.wait(SOON)?.ok()?;
    becomes(&channel, "tasks", (0, 0)).await
}

#[tokio::test]
async fn ctrl_c_finishes_the_task_in_hand_and_leaves_the_others() -> Result<()> {
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    for _ in 0..3 {
        send(&rabbitmq, TASK)?.ok()?;
    }
    let mut receiver = receiver(&rabbitmq)?;
    receiver.wait_for("received: ", SOON)?;
    let (_connection, channel) = observer(&rabbitmq).await?;
    // Prefetch 1: the other two stay in the queue, for other workers.
    becomes(&channel, "tasks", (2, 1)).await?;
    receiver.interrupt()?;
    let ended = receiver.wait(SOON)?.ok()?;
    assert!(
        ended
            .stdout
            .ends_with("done: Process order #123\nstopped; tasks done: 1\n")
    );
    becomes(&channel, "tasks", (2, 0)).await
}

#[tokio::test]
async fn a_body_that_is_no_task_is_kept_aside_and_does_not_block() -> Result<()> {
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    let mut receiver = receiver(&rabbitmq)?;
    let (_connection, channel) = observer(&rabbitmq).await?;
    let not_text = [0xff, 0x00];
    let options = BasicPublishOptions::default();
    channel
        .basic_publish(
            "".into(),
            "tasks".into(),
            options,
            &not_text,
            BasicProperties::default(),
        )
        .await?
        .await?;
    send(&rabbitmq, TASK)?.ok()?;
    receiver.wait_for("not a task, moved to tasks.rejected", SOON)?;
    receiver.wait_for("done: Process order #123", SOON)?;
    becomes(&channel, "tasks.rejected", (1, 0)).await?;
    let rejected = channel
        .basic_get("tasks.rejected".into(), BasicGetOptions::default())
        .await?;
    assert_eq!(rejected.context("the queue is empty")?.data, not_text);
    Ok(())
}

#[tokio::test]
async fn a_confirmed_task_survives_sigkill_of_the_broker() -> Result<()> {
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    send(&rabbitmq, TASK)?.ok()?;
    rabbitmq.kill(1)?;
    rabbitmq.restart(1)?;
    let (_connection, channel) = observer(&rabbitmq).await?;
    let task = channel
        .basic_get("tasks".into(), BasicGetOptions::default())
        .await?;
    let task = task.context("the queue is empty")?;
    assert_eq!(task.data, TASK.as_bytes());
    assert_eq!(task.properties.delivery_mode(), &Some(2));
    Ok(())
}

#[tokio::test]
async fn losing_the_broker_is_an_error_and_not_a_silent_end() -> Result<()> {
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    let mut receiver = receiver(&rabbitmq)?;
    rabbitmq.kill(1)?;
    let ended = receiver.wait(SOON)?;
    assert_eq!(ended.code(), 1, "{}", ended.stderr);
    assert!(
        ended.stderr.contains("lost the connection"),
        "{}",
        ended.stderr
    );
    Ok(())
}
