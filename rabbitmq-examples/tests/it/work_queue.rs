//! Tasks are shared out fairly, and none is lost with its worker.

use anyhow::{Context, Result};
use compose::harness::Running;
use lapin::options::BasicGetOptions;

use crate::shared::{Place, TIMEOUT, vhost};

const SENDER: &str = env!("CARGO_BIN_EXE_rabbitmq_new_task");
const WORKER: &str = env!("CARGO_BIN_EXE_rabbitmq_worker");
const QUEUE: &str = "work-queue";

fn workers(place: &Place, count: &str) -> Result<Running> {
    place.start(WORKER, &[count], "workers waiting")
}

#[tokio::test]
async fn a_confirmed_task_is_in_the_queue_and_persistent() -> Result<()> {
    let place = vhost().await?;
    place.run(SENDER, &["one.", "two"])?.ok()?;
    let options = BasicGetOptions::default();
    for expected in ["one.", "two"] {
        let task = place.channel.basic_get(QUEUE.into(), options).await?;
        let task = task.context("the queue is empty")?;
        assert_eq!(task.data, expected.as_bytes());
        assert_eq!(task.properties.delivery_mode(), &Some(2));
    }
    Ok(())
}

#[tokio::test]
async fn what_became_of_each_task_is_said() -> Result<()> {
    let place = vhost().await?;
    // Room for one, whoever declares it.
    let policy = r#"{"pattern":"^work-queue$","apply-to":"queues",
        "definition":{"max-length":1,"overflow":"reject-publish"}}"#;
    let name = place
        .address
        .rsplit('/')
        .next()
        .context("no virtual host")?;
    let url = format!("{}/api/policies/{name}/full", place.management);
    let request = reqwest::Client::new().put(url).body(policy);
    let request = request.header("content-type", "application/json");
    let answer = request.basic_auth("guest", Some("guest")).send().await?;
    assert!(answer.status().is_success(), "{}", answer.status());
    let ended = place.run(SENDER, &["a", "b", "a"])?;
    assert_eq!(ended.code(), 1);
    assert_eq!(
        ended.stdout,
        "sent and confirmed: a\nrefused, not in the queue: b\nrefused, not in the queue: a\n"
    );
    assert_eq!(place.drain(QUEUE).await?, ["a"]);
    Ok(())
}

#[tokio::test]
async fn sigkill_hands_the_task_to_the_other_worker() -> Result<()> {
    let place = vhost().await?;
    let mut first = workers(&place, "1")?;
    place.run(SENDER, &["long...."])?.ok()?;
    first.wait_for("received long....", TIMEOUT)?;
    // However long the second takes to start.
    first.pause()?;
    let mut second = workers(&place, "1")?;
    place.becomes(QUEUE, (0, 2)).await?;
    first.kill()?;
    second.wait_for("received long.... (redelivered)", TIMEOUT)?;
    second.wait_for("done long....", TIMEOUT)?;
    second.interrupt()?;
    second.wait(TIMEOUT)?.ok()?;
    place.becomes(QUEUE, (0, 0)).await
}

#[tokio::test]
async fn three_workers_have_one_task_each_and_the_rest_stays_for_others() -> Result<()> {
    let tasks = [1, 2, 3, 4, 5].map(|number| format!("{number}{}", ".".repeat(50)));
    let place = vhost().await?;
    place
        .run(SENDER, &tasks.each_ref().map(String::as_str))?
        .ok()?;
    let mut three = workers(&place, "3")?;
    for _ in 0..3 {
        three.wait_for(": received ", TIMEOUT)?;
    }
    place.becomes(QUEUE, (2, 3)).await?;
    three.kill()?;
    place.becomes(QUEUE, (5, 0)).await
}

#[tokio::test]
async fn ctrl_c_finishes_the_tasks_in_hand() -> Result<()> {
    let place = vhost().await?;
    let mut two = workers(&place, "2")?;
    place.run(SENDER, &["a...", "b..."])?.ok()?;
    for _ in 0..2 {
        two.wait_for(": received ", TIMEOUT)?;
    }
    two.interrupt()?;
    let ended = two.wait(TIMEOUT)?.ok()?;
    assert!(
        ended.stdout.ends_with("stopped; tasks done: 2\n"),
        "{}",
        ended.stdout
    );
    place.becomes(QUEUE, (0, 0)).await
}

#[tokio::test]
async fn what_is_no_task_is_kept_aside_and_blocks_nothing() -> Result<()> {
    let place = vhost().await?;
    let mut worker = workers(&place, "1")?;
    let hours = ".".repeat(10_000);
    place.publish(QUEUE, &[0xff, 0x00]).await?;
    place.publish(QUEUE, hours.as_bytes()).await?;
    place.publish(QUEUE, b"").await?;
    place.publish(QUEUE, b"quick").await?;
    worker.wait_for("done quick", TIMEOUT)?;
    place.becomes("work-queue.rejected", (2, 0)).await?;
    place.becomes(QUEUE, (0, 1)).await
}
