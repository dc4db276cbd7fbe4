//! What fails comes back, is put aside, waits: judged by the broker's backlogs and by what lies in the topics.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use compose::{Broker, Service};

use crate::support::{
    Client, TIMEOUT, backlog, client, consumer, next, run, send, send_batch, shared, start, stats,
    stop, topic, until,
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
    worker.wait_for("subscribed", TIMEOUT)?;
    let payloads: [&[u8]; 5] = [b"broken-1", b"flaky-2", b"", b"\xff\xfe", b"job-3"];
    send(&client(broker).await?, &jobs, payloads).await?;
    worker.wait_for("job-3: done at attempt 1", TIMEOUT)?;
    worker.wait_for("flaky-2: done at attempt 3", TIMEOUT)?;
    worker.wait_for("broken-1: attempt 4 failed", TIMEOUT)?;
    // One that is done must not acknowledge those of its batch that are not.
    let batch = ["broken-4", "job-5"];
    send_batch(&client(broker).await?, &jobs, batch).await?;
    worker.wait_for("job-5: done", TIMEOUT)?;
    worker.wait_for("broken-4: attempt", TIMEOUT)?;
    worker.wait_for("job-5: done", TIMEOUT)?;
    let printed = stop(&mut worker)?;
    assert_eq!(printed.matches("flaky-2: attempt ").count(), 2);
    assert_eq!(backlog(broker, &jobs, "negative-ack-worker").await?, 4);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn after_two_deliveries_a_message_is_a_dead_letter_and_can_be_replayed() -> Result<()> {
    let broker = shared()?;
    let (orders, dead) = (topic("dead-letter-orders"), topic("dead-letter-orders-DLQ"));
    let client = client(broker).await?;
    let mut worker = start(DEAD_LETTER, broker, &[])?;
    worker.wait_for("subscribed", TIMEOUT)?;
    let mut judge = consumer(&client, &orders, "judge").await?;
    let mut producer = client.producer().with_topic(&orders).build().await?;
    let payloads: [&[u8]; 4] = [b"order-1", b"\xff\x00", b"", b"order-2"];
    for payload in payloads {
        let message = pulsar::producer::Message {
            payload: payload.into(),
            properties: [("colour".to_owned(), "red".to_owned())].into(),
            partition_key: Some("a2V5".into()),
            partition_key_b64_encoded: Some(true),
            ordering_key: Some(b"order".into()),
            event_time: Some(12345),
            ..Default::default()
        };
        producer.send_non_blocking(message).await?.await?;
    }
    worker.wait_for("order-2: done", TIMEOUT)?;
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
    // The four, and the two that came back: as they were, but for where they have been.
    for number in 0..6 {
        let message = next(&mut judge).await?;
        let metadata = message.metadata();
        assert_eq!(property(&message, "colour"), "red");
        assert_eq!(message.key_bytes()?.as_deref(), Some(&b"key"[..]));
        assert_eq!(metadata.ordering_key.as_deref(), Some(&b"order"[..]));
        assert_eq!(metadata.event_time, Some(12345));
        assert_eq!(property(&message, "ORIGIN_MESSAGE_ID"), "");
        assert_eq!(property(&message, "REAL_TOPIC"), "");
        assert_eq!(property(&message, "REPLAYED").is_empty(), number < 4);
    }

    // A batch goes as a whole, and so does what has been replayed.
    let mut worker = start(DEAD_LETTER, broker, &[])?;
    send_batch(&client, &orders, ["order-8", "broken-9"]).await?;
    until("all four are moved", async || {
        Ok(backlog(broker, &orders, "dead-letter-worker").await? == 0
            && backlog(broker, &dead, "dead-letter-keeper").await? == 4)
    })
    .await?;
    stop(&mut worker)?;

    let printed = run(DEAD_LETTER, broker, &["exclusive"])?;
    assert!(printed.contains("delivered 10 times"), "{printed}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn reminders_come_when_due_and_at_once_on_exclusive() -> Result<()> {
    let broker = shared()?;
    let mut reader = start(DELAYED, broker, &[])?;
    reader.wait_for("subscribed", TIMEOUT)?;
    run(DELAYED, broker, &["send"])?;
    let order = ["at-once: ", "after-2s: ", "at-5s: "];
    for name in order {
        let line = reader.wait_for(": ", TIMEOUT)?;
        assert!(line.starts_with(name), "{line}");
        // Never before its time, however slow this machine is.
        assert!(!line.contains(": -"), "{line}");
    }
    let reminders = topic("delayed-reminders");
    send_at(&client(broker).await?, &reminders, "long-ago", i64::MIN).await?;
    reader.wait_for("long-ago: 9223372036854775807 ms after its time", TIMEOUT)?;
    stop(&mut reader)?;
    assert_eq!(backlog(broker, &reminders, "delayed-reminders").await?, 0);
    let printed = run(DELAYED, broker, &["exclusive"])?;
    assert!(printed.contains("before its time"), "{printed}");
    Ok(())
}

/// Of its own: it kills the broker.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_its_time_survives_a_sigkill_of_the_broker() -> Result<()> {
    let broker = Broker::private(Service::Pulsar)?;
    let mut worker = start(RETRY, &broker, &[])?;
    worker.wait_for("subscribed", TIMEOUT)?;
    start(DELAYED, &broker, &[])?.wait_for("subscribed", TIMEOUT)?;
    run(RETRY, &broker, &["send", "flaky-1", "flaky-2", "broken-3"])?;
    worker.wait_for("broken-3: attempt 2 failed", TIMEOUT)?;
    worker.kill()?;
    worker.wait(TIMEOUT)?;
    run(DELAYED, &broker, &["send"])?;
    broker.kill(1)?;
    broker.restart(1)?;
    let mut worker = start(RETRY, &broker, &[])?;
    let mut reader = start(DELAYED, &broker, &[])?;
    let retry = topic("retry-orders-retry-worker-RETRY");
    let dead = topic("retry-orders-retry-worker-DLQ");
    let reminders = topic("delayed-reminders");
    until("nothing waits any more", async || {
        Ok(backlog(&broker, &retry, "retry-worker").await? == 0
            && backlog(&broker, &dead, "retry-keeper").await? >= 1
            && backlog(&broker, &reminders, "delayed-reminders").await? == 0)
    })
    .await?;
    stop(&mut worker)?;
    let printed = stop(&mut reader)?;
    for name in ["at-once", "after-2s", "at-5s"] {
        assert!(printed.contains(&format!("{name}: ")), "{printed}");
    }

    // Where the broker has been told to delay nothing, a far time comes at once. It must not be worked on, nor hold
    // up the end.
    let web = broker.web().into_iter().next().unwrap_or_default();
    let policy = format!(
        "{web}/admin/v2/{}/delayedDelivery",
        reminders.replace("://", "/")
    );
    let never = serde_json::json!({"active": false, "tickTime": 1000});
    let answer = reqwest::Client::new().post(policy).json(&never).send();
    answer.await?.error_for_status()?;
    let client = client(&broker).await?;
    let mut reader = start(DELAYED, &broker, &[])?;
    reader.wait_for("subscribed", TIMEOUT)?;
    until("one has come at once", async || {
        send_at(&client, &reminders, "far", i64::MAX).await?;
        let stats = stats(&broker, &reminders).await?;
        let held = &stats["subscriptions"]["delayed-reminders"]["unackedMessages"];
        Ok(held.as_u64().is_some_and(|held| held > 0))
    })
    .await?;
    assert!(!stop(&mut reader)?.contains("far"));
    Ok(())
}

async fn send_at(client: &Client, topic: &str, name: &str, time: i64) -> Result<()> {
    let mut producer = client.producer().with_topic(topic).build().await?;
    let message = pulsar::producer::Message {
        payload: name.into(),
        deliver_at_time: Some(time),
        ..Default::default()
    };
    producer.send_non_blocking(message).await?.await?;
    Ok(producer.close().await?)
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
    first.wait_for("subscribed", TIMEOUT)?;
    let mut payloads: Vec<Vec<u8>> = (0..40)
        .map(|number| format!("flaky-{number}").into())
        .collect();
    payloads.extend([
        b"broken-1".to_vec(),
        b"\xff\xfe".to_vec(),
        Vec::new(),
        b"order-1".to_vec(),
    ]);
    let mut copies = consumer(&client, &retry, "judge").await?;
    let sent = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    send(&client, &orders, &payloads).await?;
    for _ in 0..30 {
        first.wait_for("attempt 1 failed", TIMEOUT)?;
    }
    first.kill()?;
    first.wait(TIMEOUT)?;
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
            .any(|line| line.contains("broken-1: attempt 4 failed, again in"))
    );
    // Each attempt of a failing order leaves a copy, and that says when it may be tried again: later by the delay than
    // the time of the attempt before, and the copy of the next attempt is not written earlier.
    let mut due = BTreeMap::from([(0, i64::try_from(sent)?)]);
    while due.len() < 5 {
        let copy = next(&mut copies).await?;
        if copy.payload.data != b"broken-1" {
            continue;
        }
        let attempt: u32 = property(&copy, "RECONSUMETIMES").parse()?;
        let (written, time) = (
            i64::try_from(copy.metadata().publish_time)?,
            copy.metadata().deliver_at_time.unwrap_or_default(),
        );
        // A repeat after the kill is later still.
        let before = *due.get(&(attempt - 1)).context("copies in order")?;
        assert!(written >= before, "attempt {attempt} before its time");
        let delay = 100 * 2_i64.pow(attempt - 1);
        assert!(time >= before + delay, "attempt {attempt} is too near");
        due.entry(attempt).or_insert(time);
    }
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
