//! Unroutable messages, priorities and full queues, by what is in the queues afterwards.

use anyhow::Result;

use crate::shared::vhost;

#[tokio::test]
async fn unroutable_messages_are_lost_returned_or_caught_also_the_second_time() -> Result<()> {
    let place = vhost().await?;
    for _ in 0..2 {
        let ended = place
            .run(env!("CARGO_BIN_EXE_rabbitmq_mandatory"), &[])?
            .ok()?;
        assert!(
            ended
                .stdout
                .contains("order-2 to order.eu: confirmed, though no queue has it")
        );
        assert!(
            ended
                .stdout
                .contains("order-4 to order.eu: came back: NO_ROUTE")
        );
        assert!(
            ended.stdout.ends_with("lost: order-2\n"),
            "{}",
            ended.stdout
        );
        place.becomes("mandatory.orders", (0, 0)).await?;
        place.becomes("mandatory.unrouted", (0, 0)).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_prefetch_decides_whether_priority_counts() -> Result<()> {
    let place = vhost().await?;
    for _ in 0..2 {
        let ended = place
            .run(env!("CARGO_BIN_EXE_rabbitmq_priority"), &[])?
            .ok()?;
        let expected = "prefetch 1: task-1, urgent, task-2, task-3, task-4\n\
                        prefetch 10: task-1, task-2, task-3, task-4, urgent\n";
        assert_eq!(ended.stdout, expected);
    }
    place.becomes("priority.tasks", (0, 0)).await
}

#[tokio::test]
async fn what_the_limits_leave_is_what_they_say_also_the_second_time() -> Result<()> {
    let place = vhost().await?;
    for _ in 0..2 {
        let ended = place
            .run(env!("CARGO_BIN_EXE_rabbitmq_ttl_overflow"), &[])?
            .ok()?;
        for line in [
            "drop-head, room for 3: 5 confirmed, 0 refused, left: order-3, order-4, order-5",
            "reject-publish, room for 3: 3 confirmed, 2 refused, left: order-1, order-2, order-3",
            "backpressure, room for 3: 20 of 20 confirmed, refused on the way: some, lost: 0",
        ] {
            assert!(
                ended.stdout.lines().any(|one| one == line),
                "{line}: {}",
                ended.stdout
            );
        }
    }
    for queue in [
        "message",
        "queue",
        "drop-head",
        "reject-publish",
        "backpressure",
    ] {
        place
            .becomes(&format!("ttl-overflow.{queue}"), (0, 0))
            .await?;
    }
    Ok(())
}
