//! What fails comes back, is put aside, waits: judged by the broker's backlogs and by what lies in the topics.

use anyhow::Result;

use crate::support::{
    SOON, backlog, client, consumer, next, run, send, shared, start, stop, topic, until,
};

const NEGATIVE_ACK: &str = env!("CARGO_BIN_EXE_pulsar_negative_ack");
const DEAD_LETTER: &str = env!("CARGO_BIN_EXE_pulsar_dead_letter");
const RETRY: &str = env!("CARGO_BIN_EXE_pulsar_retry_backoff");
const DELAYED: &str = env!("CARGO_BIN_EXE_pulsar_delayed_delivery");

fn property(message: &pulsar::consumer::Message<Vec<u8>>, name: &str) -> String {
    let mut all = message.metadata().properties.iter();
    all.find(|property| property.key == name)
        .map(|property| property.value.clone())
        .unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_job_comes_back_and_stays_in_the_backlog_when_the_worker_ends() -> Result<()> {
    let broker = shared()?;
    let jobs = topic("negative-ack-jobs");
    let mut worker = start(NEGATIVE_ACK, broker, &[])?;
    worker.wait_for("subscribed", SOON)?;
    let payloads: [&[u8]; 5] = [b"broken-1", b"flaky-2", b"", b"\xff\xfe", b"job-3"];
    send(&client(broker).await?, &jobs, payloads).await?;
    worker.wait_for("job-3: done at attempt 1", SOON)?;
    worker.wait_for("flaky-2: done at attempt 3", SOON)?;
    worker.wait_for("broken-1: attempt 4 failed", SOON)?;
    let printed = stop(&mut worker)?;
    assert_eq!(printed.matches("flaky-2: attempt ").count(), 2);
    assert!(printed.ends_with("closed; jobs done: 2\n"), "{printed}");
    assert_eq!(backlog(broker, &jobs, "negative-ack-worker").await?, 3);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn after_two_deliveries_a_message_is_a_dead_letter_and_can_be_replayed() -> Result<()> {
    let broker = shared()?;
    let (orders, dead) = (topic("dead-letter-orders"), topic("dead-letter-orders-DLQ"));
    let client = client(broker).await?;
    let mut worker = start(DEAD_LETTER, broker, &[])?;
    worker.wait_for("subscribed", SOON)?;
    let payloads: [&[u8]; 4] = [b"order-1", b"\xff\x00", b"", b"order-2"];
    send(&client, &orders, payloads).await?;
    worker.wait_for("order-2: done", SOON)?;
    until("two are moved", async || {
        Ok(backlog(broker, &orders, "dead-letter-worker").await? == 0
            && backlog(broker, &dead, "dead-letter-keeper").await? == 2)
    })
    .await?;
    let printed = stop(&mut worker)?;
    assert_eq!(
        printed.matches(": failed, delivery ").count(),
        4,
        "{printed}"
    );
    let mut reader = consumer(&client, &dead, "test").await?;
    let mut letters = [next(&mut reader).await?, next(&mut reader).await?];
    letters.sort_by_key(|letter| letter.payload.data.len());
    assert_eq!(letters[0].payload.data, b"");
    assert_eq!(letters[1].payload.data, b"\xff\x00");
    assert_eq!(property(&letters[1], "REAL_TOPIC"), orders);
    assert!(!property(&letters[1], "ORIGIN_MESSAGE_ID").is_empty());

    let mut replay = start(DEAD_LETTER, broker, &["replay"])?;
    until("both are sent back", async || {
        Ok(backlog(broker, &dead, "dead-letter-keeper").await? == 0)
    })
    .await?;
    stop(&mut replay)?;
    assert_eq!(backlog(broker, &orders, "dead-letter-worker").await?, 2);

    let printed = run(DEAD_LETTER, broker, &["exclusive"])?;
    assert!(printed.contains("delivered 10 times"), "{printed}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn reminders_come_when_due_and_at_once_on_exclusive() -> Result<()> {
    let broker = shared()?;
    let mut reader = start(DELAYED, broker, &[])?;
    reader.wait_for("subscribed", SOON)?;
    run(DELAYED, broker, &["send"])?;
    let order = ["at-once: ", "after-2s: ", "at-5s: "];
    for name in order {
        let line = reader.wait_for(": ", SOON)?;
        assert!(line.starts_with(name), "{line}");
        // Never before its time, however slow this machine is.
        assert!(!line.contains(": -"), "{line}");
    }
    stop(&mut reader)?;
    assert_eq!(
        backlog(broker, &topic("delayed-reminders"), "delayed-reminders").await?,
        0
    );
    let printed = run(DELAYED, broker, &["exclusive"])?;
    assert!(printed.contains("before its time"), "{printed}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_survive_a_kill_and_end_done_or_as_dead_letters_with_their_cause() -> Result<()> {
    let broker = shared()?;
    let client = client(broker).await?;
    let (orders, retry, dead) = (
        topic("retry-orders"),
        topic("retry-orders-retry-worker-RETRY"),
        topic("retry-orders-retry-worker-DLQ"),
    );
    let mut first = start(RETRY, broker, &[])?;
    first.wait_for("subscribed", SOON)?;
    let mut payloads: Vec<Vec<u8>> = (0..40)
        .map(|number| format!("flaky-{number}").into())
        .collect();
    payloads.extend([
        b"broken-1".to_vec(),
        b"\xff\xfe".to_vec(),
        Vec::new(),
        b"order-1".to_vec(),
    ]);
    send(&client, &orders, &payloads).await?;
    for _ in 0..30 {
        first.wait_for("attempt 1 failed", SOON)?;
    }
    first.kill()?;
    first.wait(SOON)?;
    let mut second = start(RETRY, broker, &[])?;
    until("three dead letters or more, and nothing left", async || {
        Ok(backlog(broker, &orders, "retry-worker").await? == 0
            && backlog(broker, &retry, "retry-worker").await? == 0
            && backlog(broker, &dead, "retry-keeper").await? >= 3)
    })
    .await?;
    stop(&mut second)?;
    let lines = [first.lines(), second.lines()].concat();
    for number in 0..40 {
        let done = format!("flaky-{number}: done at attempt 3");
        assert!(lines.contains(&done), "{done}\n{lines:#?}");
    }
    assert!(
        lines
            .iter()
            .any(|line| line.contains("broken-1: attempt 4 failed, again in 800 ms"))
    );
    let count = backlog(broker, &dead, "retry-keeper").await?;
    let mut reader = consumer(&client, &dead, "test").await?;
    let mut names = std::collections::BTreeSet::new();
    for _ in 0..count {
        let letter = next(&mut reader).await?;
        assert_eq!(property(&letter, "RECONSUMETIMES"), "5");
        assert_eq!(property(&letter, "REAL_TOPIC"), orders);
        let cause = if letter.payload.data == b"broken-1" {
            "no such account"
        } else {
            "not an order"
        };
        assert_eq!(property(&letter, "CAUSE"), cause);
        names.insert(letter.payload.data);
    }
    assert_eq!(
        names,
        [b"broken-1".to_vec(), b"\xff\xfe".to_vec(), Vec::new()].into()
    );
    Ok(())
}
