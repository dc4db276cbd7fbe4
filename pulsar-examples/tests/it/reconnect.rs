//! Kills, restarts and a freeze of the broker: nothing that was acknowledged is lost.

use std::collections::BTreeSet;

use anyhow::Result;
use compose::{Broker, Service};

use crate::support::{TIMEOUT, client, consumer, next, numbers, start, stats, topic};

const RECONNECT: &str = env!("CARGO_BIN_EXE_pulsar_reconnect");

#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_tick_is_lost_over_two_kills_and_a_freeze() -> Result<()> {
    let broker = Broker::private(Service::Pulsar)?;
    let ticks = topic("reconnect-ticks");
    {
        // The judge's own subscription, which holds all ticks from the first on.
        consumer(&client(&broker).await?, &ticks, "judge")
            .await?
            .close()
            .await?;
    }
    let mut program = start(RECONNECT, &broker, &[])?;
    // Beside it another: each has to get all of its own ticks.
    let mut other = start(RECONNECT, &broker, &[])?;
    other.wait_for("received: tick", TIMEOUT)?;
    for _ in 0..5 {
        program.wait_for("received: tick", TIMEOUT)?;
    }
    for round in 0..3 {
        if round < 2 {
            broker.kill(1)?;
            program.wait_for("consumer: made anew", TIMEOUT)?;
            broker.restart(1)?;
        } else {
            broker.pause(1)?;
            program.wait_for("consumer: made anew", TIMEOUT)?;
            program.wait_for("producer: made anew", TIMEOUT)?;
            broker.resume(1)?;
        }
        program.wait_for("consumer: back", TIMEOUT)?;
        // Whatever comes now was sent, or sent again, after the fault.
        for _ in 0..30 {
            program.wait_for("received: tick", TIMEOUT)?;
        }
    }
    other.wait_for("received: tick", TIMEOUT)?;
    other.interrupt()?;
    program.interrupt()?;
    let beside = other.wait(TIMEOUT)?.ok()?.stdout;
    assert!(beside.ends_with(" lost 0 / unexpected 0\n"), "{beside}");
    let ended = program.wait(TIMEOUT)?.ok()?;
    let last = ended.stdout.lines().last().unwrap_or_default().to_owned();
    assert!(
        last.contains(" indeterminate 0 /") && last.ends_with(" lost 0 / unexpected 0"),
        "{last}"
    );

    let lines: Vec<String> = ended.stdout.lines().map(str::to_owned).collect();
    let acked: BTreeSet<u32> = numbers(&lines, "stored: tick ").into_iter().collect();
    assert!(acked.len() >= 100, "{last}");
    assert_eq!(
        acked.last().copied(),
        u32::try_from(acked.len()).ok().map(|all| all - 1),
        "no gap"
    );
    let stats = stats(&broker, &ticks).await?;
    let left: Vec<&String> = stats["subscriptions"]
        .as_object()
        .into_iter()
        .flat_map(serde_json::Map::keys)
        .collect();
    assert_eq!(left, ["judge"], "each run takes its subscription away");
    let client = client(&broker).await?;
    let mut judge = consumer(&client, &ticks, "judge").await?;
    let mut missing = acked;
    while !missing.is_empty() {
        let message = next(&mut judge).await?;
        let text = String::from_utf8(message.deserialize())?;
        missing.remove(&text.rsplit(' ').next().unwrap_or_default().parse()?);
        judge.ack(&message).await?;
    }
    Ok(())
}
