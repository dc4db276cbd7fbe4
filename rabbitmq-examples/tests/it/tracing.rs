//! The trace that the publisher begins is the consumer's, too, and a bad header stops no order.

use anyhow::{Context, Result};
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};

use crate::shared::{TIMEOUT, vhost};

const PROGRAM: &str = env!("CARGO_BIN_EXE_rabbitmq_tracing");
const QUEUE: &str = "traced-orders";

/// Trace, span and parent of the line with the span of that name and message.
fn span<'a>(lines: &'a str, name: &str, message: &str) -> Result<[&'a str; 3]> {
    let name = format!(": {name} {QUEUE}, ");
    let message = format!("messaging.message.id={message}");
    let line = lines
        .lines()
        .find(|line| line.contains(&name) && line.contains(&message));
    let line = line.with_context(|| format!("no {name} of {message} in {lines}"))?;
    let words: Vec<&str> = line.split([' ', ':']).collect();
    match words[..] {
        ["trace", trace, "span", span, "parent", parent, ..] => Ok([trace, span, parent]),
        _ => anyhow::bail!("not a span: {line}"),
    }
}

#[tokio::test]
async fn one_trace_for_each_order_through_both_programs_and_a_redelivery() -> Result<()> {
    let place = vhost().await?;
    let mut killed = place.start(PROGRAM, &[], "waiting for orders")?;
    let sent = place.run(PROGRAM, &["send"])?.ok()?.stdout;
    killed.wait_for("order-1: handled", TIMEOUT)?;
    let mut consumer = place.start(PROGRAM, &[], "waiting for orders")?;
    killed.kill()?;
    place.becomes(QUEUE, (0, 1)).await?;
    // Whichever of the two had them: only a finished span is printed.
    let killed = killed.wait(TIMEOUT)?.stdout;
    let mut all: Vec<String> = killed.lines().map(String::from).collect();
    place.becomes(&format!("{QUEUE}.rejected"), (1, 0)).await?;
    let done = async {
        loop {
            let lines = consumer.lines();
            let has = |order: &str| {
                all.iter()
                    .chain(&lines)
                    .any(|line| line.contains("process traced-orders") && line.contains(order))
            };
            if ["order-1", "order-2", "order-3"]
                .iter()
                .all(|order| has(order))
            {
                return lines;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let lines = tokio::time::timeout(TIMEOUT, done).await?;
    all.extend(lines);
    let all = all.join("\n");
    let mut traces = Vec::new();
    for order in ["order-1", "order-2", "order-3"] {
        let [trace, id, parent] = span(&sent, "send", order)?;
        assert_eq!(parent, "none");
        let [same, other, cause] = span(&all, "process", order)?;
        assert_eq!((same, cause), (trace, id), "{order}");
        assert_ne!(other, id);
        traces.push(trace);
    }
    traces.dedup();
    assert_eq!(traces.len(), 3);
    consumer.interrupt()?;
    consumer.wait(TIMEOUT)?.ok()?;
    Ok(())
}

#[tokio::test]
async fn an_order_that_would_take_for_ever_is_rejected() -> Result<()> {
    let place = vhost().await?;
    let mut consumer = place.start(PROGRAM, &[], "waiting for orders")?;
    for work_ms in ["18446744073709551615", "0"] {
        let order = format!(r#"{{"order_id":"order","work_ms":{work_ms}}}"#);
        place.publish(QUEUE, order.as_bytes()).await?;
    }
    consumer.wait_for("it takes more than 60000 ms", TIMEOUT)?;
    consumer.wait_for("unnamed: handled", TIMEOUT)?;
    place.becomes(&format!("{QUEUE}.rejected"), (1, 0)).await?;
    consumer.interrupt()?;
    consumer.wait(TIMEOUT)?.ok()?;
    Ok(())
}

#[tokio::test]
async fn a_header_that_is_broken_begins_a_new_trace() -> Result<()> {
    let place = vhost().await?;
    let mut consumer = place.start(PROGRAM, &[], "waiting for orders")?;
    let values = [
        AMQPValue::LongString("nonsense".into()),
        AMQPValue::LongString("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331".into()),
        AMQPValue::LongString([0xff_u8, 0x00].as_slice().into()),
        AMQPValue::LongInt(7),
        AMQPValue::Void,
    ];
    for (number, value) in values.into_iter().enumerate() {
        let mut headers = FieldTable::default();
        headers.insert("traceparent".into(), value);
        let properties = BasicProperties::default()
            .with_message_id(format!("odd-{number}").into())
            .with_headers(headers);
        place
            .publish_with(QUEUE, br#"{"order_id":"odd","work_ms":0}"#, properties)
            .await?;
    }
    place
        .publish(QUEUE, br#"{"order_id":"bare","work_ms":0}"#)
        .await?;
    consumer.wait_for("unnamed: handled", TIMEOUT)?;
    place.becomes(QUEUE, (0, 1)).await?;
    consumer.interrupt()?;
    let ended = consumer.wait(TIMEOUT)?.ok()?;
    for number in 0..5 {
        let [_, _, parent] = span(&ended.stdout, "process", &format!("odd-{number}"))?;
        assert_eq!(parent, "none");
    }
    Ok(())
}
