//! Whatever the signal, what was begun is finished or comes back, and what was not begun comes back at once.

use anyhow::Result;
use compose::{Broker, Service};

use crate::shared::{Place, TIMEOUT, vhost};

const PROGRAM: &str = env!("CARGO_BIN_EXE_rabbitmq_graceful_shutdown");
const QUEUE: &str = "graceful-shutdown";
const READY: &str = "working on 2";

#[tokio::test]
async fn sigterm_finishes_what_is_in_hand_and_gives_the_rest_back() -> Result<()> {
    let place = vhost().await?;
    place.run(PROGRAM, &["send", "6"])?.ok()?;
    let program = place.example(PROGRAM).env("TASK_SECONDS", "10");
    let mut working = program.spawn()?;
    working.wait_for("task-2: begun", TIMEOUT)?;
    // Four are with it: two in hand, two prefetched.
    working.terminate()?;
    working.wait_for("stopping: no more tasks; in hand 2, given back 2", TIMEOUT)?;
    // Given back while those in hand go on.
    place.becomes(QUEUE, (4, 0)).await?;
    let ended = working.wait(TIMEOUT)?.ok()?;
    assert!(
        ended
            .stdout
            .ends_with("stopped; done 2, given back 2, cut short 0\n"),
        "{}",
        ended.stdout
    );
    let mut left = place.drain(QUEUE).await?;
    left.sort();
    assert_eq!(left, ["task-3", "task-4", "task-5", "task-6"]);
    Ok(())
}

#[tokio::test]
async fn what_does_not_end_in_time_comes_back() -> Result<()> {
    let place = vhost().await?;
    place.run(PROGRAM, &["send", "3"])?.ok()?;
    let program = place
        .example(PROGRAM)
        .env("TASK_SECONDS", "600")
        .env("GRACE_SECONDS", "5");
    let mut working = program.spawn()?;
    working.wait_for("task-2: begun", TIMEOUT)?;
    place.becomes(QUEUE, (0, 1)).await?;
    working.interrupt()?;
    let ended = working.wait(TIMEOUT)?.ok()?;
    assert!(
        ended
            .stdout
            .ends_with("stopped; done 0, given back 1, cut short 2\n"),
        "{}",
        ended.stdout
    );
    place.becomes(QUEUE, (3, 0)).await
}

#[tokio::test]
async fn a_silent_broker_keeps_it_no_longer_than_the_grace() -> Result<()> {
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    let place = Place::of(&rabbitmq).await?;
    // The time is up, or the second signal ends it.
    for (grace, signals) in [("1", 1), ("600", 2)] {
        place.run(PROGRAM, &["send", "4"])?.ok()?;
        let program = place
            .example(PROGRAM)
            .env("TASK_SECONDS", "600")
            .env("GRACE_SECONDS", grace);
        let mut working = program.spawn()?;
        working.wait_for("task-2: begun", TIMEOUT)?;
        rabbitmq.pause(1)?;
        working.terminate()?;
        if signals == 2 {
            working.interrupt()?;
        }
        // The tasks would take longer than this.
        let ended = working.wait(TIMEOUT)?;
        rabbitmq.resume(1)?;
        assert_eq!(ended.code(), 1, "{}", ended.stdout);
        assert!(
            ended.stdout.contains("done 0, given back 0, cut short 2"),
            "{}",
            ended.stdout
        );
        assert!(
            ended.stderr.contains("does not answer the close"),
            "{}",
            ended.stderr
        );
        place.becomes(QUEUE, (4, 0)).await?;
        place.drain(QUEUE).await?;
    }
    Ok(())
}

#[tokio::test]
async fn sigkill_gives_all_back_and_a_signal_without_work_ends_it() -> Result<()> {
    let place = vhost().await?;
    place.run(PROGRAM, &["send", "3"])?.ok()?;
    let program = place.example(PROGRAM).env("TASK_SECONDS", "600");
    let mut working = program.spawn()?;
    working.wait_for("task-2: begun", TIMEOUT)?;
    place.becomes(QUEUE, (0, 1)).await?;
    working.kill()?;
    place.becomes(QUEUE, (3, 0)).await?;
    place.drain(QUEUE).await?;
    let mut idle = place.start(PROGRAM, &[], READY)?;
    idle.terminate()?;
    let ended = idle.wait(TIMEOUT)?.ok()?;
    assert!(
        ended
            .stdout
            .ends_with("stopped; done 0, given back 0, cut short 0\n")
    );
    Ok(())
}
