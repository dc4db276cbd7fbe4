//! A task is never lost: not with its worker, not with the broker, not because it is malformed.

use anyhow::{Context, Result};
use compose::harness::{Finished, Running};
use compose::{Broker, Service};

use crate::shared::{Place, TIMEOUT, settle, vhost};

const TASK: &str = "Task: Process order #123";

fn send(place: &Place, body: &str) -> Result<Finished> {
    place.run(env!("CARGO_BIN_EXE_rabbitmq_send"), &[body])
}

fn receiver(place: &Place) -> Result<Running> {
    place.start(
        env!("CARGO_BIN_EXE_rabbitmq_receive"),
        &[],
        "waiting for tasks",
    )
}

#[tokio::test]
async fn sigkill_during_the_work_gives_the_task_back() -> Result<()> {
    let place = vhost().await?;
    let mut first = receiver(&place)?;
    send(&place, TASK)?.ok()?;
    first.wait_for("received: Process order #123", TIMEOUT)?;
    first.pause()?;
    place.becomes("tasks", (0, 1)).await?;
    first.kill()?;
    place.becomes("tasks", (1, 0)).await?;

    let mut second = receiver(&place)?;
    second.wait_for("received: Process order #123 (redelivered)", TIMEOUT)?;
    second.wait_for("done: Process order #123", TIMEOUT)?;
    second.interrupt()?;
    second.wait(TIMEOUT)?.ok()?;
    place.becomes("tasks", (0, 0)).await
}

#[tokio::test]
async fn ctrl_c_finishes_the_task_in_hand_and_leaves_the_others() -> Result<()> {
    let place = vhost().await?;
    for _ in 0..3 {
        send(&place, TASK)?.ok()?;
    }
    let mut receiver = receiver(&place)?;
    receiver.wait_for("received: ", TIMEOUT)?;
    // Stopped in the middle of the work, so that there is time to look, and interrupted before it goes on.
    receiver.pause()?;
    // Prefetch 1: the other two stay in the queue, for other workers.
    place.becomes("tasks", (2, 1)).await?;
    receiver.interrupt()?;
    receiver.resume()?;
    let ended = receiver.wait(TIMEOUT)?.ok()?;
    assert!(
        ended
            .stdout
            .ends_with("done: Process order #123\nstopped; tasks done: 1\n")
    );
    place.becomes("tasks", (2, 0)).await
}

#[tokio::test]
async fn a_body_that_is_no_task_is_kept_aside_and_does_not_block() -> Result<()> {
    let place = vhost().await?;
    let mut receiver = receiver(&place)?;
    let not_text = [0xff, 0x00];
    place.publish("tasks", &not_text).await?;
    send(&place, TASK)?.ok()?;
    receiver.wait_for("not a task, moved to tasks.rejected", TIMEOUT)?;
    receiver.wait_for("done: Process order #123", TIMEOUT)?;
    place.becomes("tasks.rejected", (1, 0)).await?;
    let rejected = place.take("tasks.rejected").await?;
    assert_eq!(rejected.context("the queue is empty")?.data, not_text);
    Ok(())
}

#[tokio::test]
async fn a_confirmed_task_survives_sigkill_of_the_broker_and_the_receiver_says_that_it_is_gone()
-> Result<()> {
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    let place = Place::of(&rabbitmq).await?;
    let mut declares = receiver(&place)?;
    declares.interrupt()?;
    declares.wait(TIMEOUT)?.ok()?;
    settle(&rabbitmq)?;
    let place = Place::of(&rabbitmq).await?;
    let mut receiver = receiver(&place)?;
    receiver.pause()?;
    for _ in 0..2 {
        send(&place, TASK)?.ok()?;
    }
    // One is with the receiver, which does nothing.
    place.becomes("tasks", (1, 1)).await?;
    rabbitmq.kill(1)?;
    receiver.resume()?;
    let ended = receiver.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}", ended.stderr);
    let said = &ended.stderr;
    assert!(
        said.contains("lost the connection") || said.contains("was not acknowledged"),
        "{said}"
    );
    assert!(!ended.stdout.contains("done: "), "{}", ended.stdout);
    rabbitmq.restart(1)?;
    let place = Place::of(&rabbitmq).await?;
    for _ in 0..2 {
        let task = place.take("tasks").await?.context("the queue is empty")?;
        assert_eq!(task.data, TASK.as_bytes());
        assert_eq!(task.properties.delivery_mode(), &Some(2));
    }
    Ok(())
}
