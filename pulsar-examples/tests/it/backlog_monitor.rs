//! The monitor's numbers are the broker's, with and without consumers, and its warning comes and goes.

use anyhow::Result;
use compose::harness::Example;

use crate::support::{TIMEOUT, client, consumer, next, send, shared, stop, topic, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_is_warned_of_and_the_warning_taken_back() -> Result<()> {
    let broker = shared()?;
    let client = client(broker).await?;
    let orders = topic("monitored-orders");
    let mut worker = consumer(&client, &orders, "monitored-worker").await?;
    let program = Example::new(env!("CARGO_BIN_EXE_pulsar_backlog_monitor"))
        .broker(broker)
        .env("BACKLOG_INTERVAL", "1")
        .env("BACKLOG_THRESHOLD", "11");
    let mut monitor = program.spawn()?;
    monitor.wait_for(
        "monitored-orders / monitored-worker: backlog 0, in work 0, consumers 1",
        TIMEOUT,
    )?;
    send(&client, &orders, (0..12).map(|number| number.to_string())).await?;
    monitor.wait_for(
        "WARNING: monitored-orders / monitored-worker is 12 behind, over the threshold of 11",
        TIMEOUT,
    )?;
    let mut held = Vec::new();
    for _ in 0..12 {
        held.push(next(&mut worker).await?);
    }
    // Perhaps it has said so before the warning.
    let held_by_one = "monitored-worker: backlog 12, in work 12, consumers 1";
    until(held_by_one, async || {
        Ok(monitor
            .lines()
            .iter()
            .any(|line| line.contains(held_by_one)))
    })
    .await?;
    for message in &held[..5] {
        worker.ack(message).await?;
    }
    monitor.wait_for(
        "recovered: monitored-orders / monitored-worker is ",
        TIMEOUT,
    )?;
    worker.close().await?;
    drop(worker);
    monitor.wait_for(
        "monitored-worker: backlog 7, in work 0, consumers 0",
        TIMEOUT,
    )?;
    let printed = stop(&mut monitor)?;
    let alarms = printed.matches("WARNING: monitored-orders").count();
    assert_eq!(alarms, 1, "said once: {printed}");
    Ok(())
}
