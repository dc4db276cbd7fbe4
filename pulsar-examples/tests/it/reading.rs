//! Reading again, reading many, asking and answering.

use anyhow::{Context, Result};
use compose::{Broker, Service};

use crate::support::{
    TIMEOUT, backlog, client, consumer, next, run, send, send_keyed, shared, start, stats, stop,
    topic, until,
};

const READER: &str = env!("CARGO_BIN_EXE_pulsar_reader");
const SEEK: &str = env!("CARGO_BIN_EXE_pulsar_seek");
const TABLE: &str = env!("CARGO_BIN_EXE_pulsar_compacted_table");
const MULTI: &str = env!("CARGO_BIN_EXE_pulsar_multi_topic");
const ASK: &str = env!("CARGO_BIN_EXE_pulsar_request_reply");

/// The places that `send` has printed, and the names of what it sent.
fn places(printed: &str) -> Vec<String> {
    printed
        .lines()
        .filter_map(|line| Some(line.split_once(' ')?.0.to_owned()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_begins_where_it_says_and_leaves_no_subscription() -> Result<()> {
    let broker = shared()?;
    let places = places(&run(READER, broker, &["send", "red", "green", "blue"])?);
    for _ in 0..2 {
        let mut reader = start(READER, broker, &[])?;
        for colour in ["red", "green", "blue"] {
            let line = reader.wait_for_line(|_| true, "a line", TIMEOUT)?;
            assert!(line.ends_with(colour), "{line}");
        }
        reader.wait_for("end reached", TIMEOUT)?;
        assert!(stop(&mut reader)?.ends_with("read: 3\n"));
    }
    let mut reader = start(READER, broker, &[&places[1]])?;
    let line = reader.wait_for_line(|_| true, "a line", TIMEOUT)?;
    assert_eq!(
        line,
        format!("{} green", places[1]),
        "at the message, not after it"
    );
    reader.wait_for("blue", TIMEOUT)?;
    stop(&mut reader)?;

    let mut reader = start(READER, broker, &["latest"])?;
    let colours = topic("reader-colours");
    until("the reader is there", async || {
        let stats = stats(broker, &colours).await?;
        Ok(stats["subscriptions"]
            .as_object()
            .is_some_and(|all| !all.is_empty()))
    })
    .await?;
    run(READER, broker, &["send", "black"])?;
    reader.wait_for("black", TIMEOUT)?;
    assert!(!stop(&mut reader)?.contains("blue"));
    until("nothing is left of the readers", async || {
        let stats = stats(broker, &colours).await?;
        Ok(stats["subscriptions"]
            .as_object()
            .is_some_and(serde_json::Map::is_empty))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_is_set_back_to_a_message_a_time_and_the_beginning() -> Result<()> {
    let broker = shared()?;
    let places = places(&run(
        SEEK,
        broker,
        &["send", "red", "green", "blue", "black"],
    )?);
    let colours = topic("seek-colours");
    let all: String = ["red", "green", "blue", "black"]
        .iter()
        .zip(&places)
        .map(|(colour, place)| format!("{place} {colour}\n"))
        .collect();
    assert_eq!(run(SEEK, broker, &["read", "4"])?, all);
    assert_eq!(backlog(broker, &colours, "seek-painter").await?, 0);
    for back in [["to", "earliest"], ["ago", "3600"]] {
        run(SEEK, broker, &back)?;
        assert_eq!(
            backlog(broker, &colours, "seek-painter").await?,
            4,
            "{back:?}"
        );
        assert_eq!(run(SEEK, broker, &["read", "4"])?, all, "{back:?}");
    }
    run(SEEK, broker, &["to", &places[2]])?;
    assert_eq!(
        run(SEEK, broker, &["read", "2"])?,
        all.lines()
            .skip(2)
            .map(|line| format!("{line}\n"))
            .collect::<String>()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_changes_how_much_is_read_and_not_the_table() -> Result<()> {
    let broker = shared()?;
    let prices = topic("compacted-prices");
    run(TABLE, broker, &["set", "tea", "1"])?;
    let client = client(broker).await?;
    let changes = (0..300).map(|number| (Some(format!("key-{}", number % 3)), format!("{number}")));
    send_keyed(&client, &prices, changes).await?;
    send_keyed(&client, &prices, [(None, "no key")]).await?;
    run(TABLE, broker, &["delete", "tea"])?;
    let table = "key-0 = 297\nkey-1 = 298\nkey-2 = 299\n";
    let before = run(TABLE, broker, &[])?;
    assert_eq!(before, format!("{table}3 keys from 303 messages\n"));
    run(TABLE, broker, &["compact"])?;
    assert_eq!(
        run(TABLE, broker, &[])?,
        format!("{table}3 keys from 3 messages\n")
    );
    run(TABLE, broker, &["set", "key-0", "new"])?;
    assert_eq!(
        run(TABLE, broker, &[])?,
        format!("{}3 keys from 4 messages\n", table.replace("297", "new"))
    );
    Ok(())
}

/// It outlives the broker, so it has one of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_pattern_finds_new_topics_also_after_a_restart_of_the_broker() -> Result<()> {
    let broker = Broker::private(Service::Pulsar)?;
    let mut display = start(MULTI, &broker, &[])?;
    display.wait_for("subscribed", TIMEOUT)?;
    {
        let client = client(&broker).await?;
        send(&client, &topic("multi-topic-cellar"), ["1", "2", "3"]).await?;
        send(&client, &topic("multi-topic-cellar-DLQ"), ["dead"]).await?;
    }
    for reading in 1..=3 {
        display.wait_for(&format!("cellar: {reading}"), TIMEOUT)?;
    }
    broker.kill(1)?;
    // It has noticed, and given the client up. From now on it tries with new ones, and the broker's start takes longer
    // than the first of these attempts.
    display.wait_for("made anew: ", TIMEOUT)?;
    broker.restart(1)?;
    display.wait_for("back", TIMEOUT)?;
    run(MULTI, &broker, &["send", "attic", "4"])?;
    display.wait_for("attic: 4", TIMEOUT)?;
    run(MULTI, &broker, &["send", "cellar", "5"])?;
    display.wait_for("cellar: 5", TIMEOUT)?;
    let printed = stop(&mut display)?;
    assert!(
        !printed.contains("dead"),
        "the pattern is anchored: {printed}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_asker_gets_its_own_answers_and_a_killed_server_leaves_the_question() -> Result<()> {
    let broker = shared()?;
    let questions = topic("request-reply-questions");
    let unanswered = start(ASK, broker, &["5"])?.wait(TIMEOUT)?;
    assert_eq!(unanswered.code(), 1);
    assert!(
        unanswered.stderr.contains("without an answer"),
        "{}",
        unanswered.stderr
    );
    let mut server = start(ASK, broker, &["serve"])?;
    server.wait_for("5: answered", TIMEOUT)?;
    // A message that names a topic of its own choice, and one that names none.
    let client = client(broker).await?;
    let mut trap = consumer(&client, &topic("request-reply-trap"), "test").await?;
    let mut producer = client.producer().with_topic(&questions).build().await?;
    let bad = producer
        .create_message()
        .with_content("3")
        .with_property("reply_to", topic("request-reply-trap"));
    bad.with_property("correlation_id", "x")
        .send_non_blocking()
        .await?
        .await?;
    let prefix = "non-persistent://public/default/request-reply-answers-";
    let mut asks = async |question: &str, place: &str| -> Result<()> {
        let request = producer
            .create_message()
            .with_content(question)
            .with_property("reply_to", format!("{prefix}{place}"))
            .with_property("correlation_id", "x");
        request.send_non_blocking().await?.await?;
        Ok(())
    };
    asks("8", "../x").await?;
    asks("9", "").await?;
    // A place that takes no answer must not hold up the questions behind it, nor come back with its own.
    let options = pulsar::ProducerOptions {
        access_mode: Some(1),
        ..Default::default()
    };
    let taken = client
        .producer()
        .with_topic(format!("{prefix}taken"))
        .with_options(options);
    let mut taken = taken.build().await?;
    asks("10", "taken").await?;
    asks("11", "free").await?;
    send(&client, &questions, [&b"\xff"[..]]).await?;
    server.wait_for("3: dropped", TIMEOUT)?;
    server.wait_for("8: dropped", TIMEOUT)?;
    server.wait_for("9: dropped", TIMEOUT)?;
    server.wait_for("10: not answered", TIMEOUT)?;
    server.wait_for("11: answered", TIMEOUT)?;
    taken.close().await?;
    server.wait_for("dropped", TIMEOUT)?;
    send(&client, &topic("request-reply-trap"), ["end"]).await?;
    assert_eq!(next(&mut trap).await?.payload.data, b"end");

    let mut asking = Vec::new();
    for asker in 0..3_i64 {
        let own: Vec<String> = (0..5)
            .map(|number| (asker * 1000 + number).to_string())
            .collect();
        let args: Vec<&str> = own.iter().map(String::as_str).collect();
        asking.push((asker, start(ASK, broker, &args)?));
    }
    for (asker, mut running) in asking {
        let printed = running.wait(TIMEOUT)?.ok()?.stdout;
        for number in (0..5).map(|number| asker * 1000 + number) {
            let answer = format!("{number} squared is {}\n", number * number);
            assert!(printed.contains(&answer), "{printed}");
        }
        assert_eq!(printed.lines().count(), 5, "{printed}");
    }
    stop(&mut server)?;
    let left = backlog(broker, &questions, "request-reply-server")
        .await
        .context("no backlog")?;
    assert_eq!(left, 0);
    Ok(())
}
