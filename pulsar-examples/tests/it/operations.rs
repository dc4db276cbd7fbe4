//! Schemas, tenants and their rules, two clusters, and the trace from one program to the next.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use compose::harness::Example;
use compose::{Broker, Service};
use pulsar::consumer::InitialPosition;
use pulsar::{ConsumerOptions, Pulsar, SubType, TokioExecutor};

use crate::support::{
    TIMEOUT, backlog, client, consumer, next, numbers, run, send, shared, start, stop, topic, until,
};

const SCHEMA: &str = env!("CARGO_BIN_EXE_pulsar_schema");
const TENANTS: &str = env!("CARGO_BIN_EXE_pulsar_multi_tenant");
const GEO: &str = env!("CARGO_BIN_EXE_pulsar_geo_replication");
const TRACING: &str = env!("CARGO_BIN_EXE_pulsar_tracing");

#[tokio::test(flavor = "multi_thread")]
async fn an_incompatible_schema_is_refused_and_rubbish_is_kept() -> Result<()> {
    let broker = shared()?;
    run(SCHEMA, broker, &["send", "v1"])?;
    run(SCHEMA, broker, &["send", "v2"])?;
    let refused = start(SCHEMA, broker, &["send", "incompatible"])?.wait(TIMEOUT)?;
    assert_eq!(refused.code(), 1);
    assert!(
        refused
            .stderr
            .contains("the broker refuses the schema incompatible"),
        "{}",
        refused.stderr
    );
    let mut reader = start(SCHEMA, broker, &[])?;
    // New to this subscription: it begins with the first message.
    reader.wait_for("order-1: 4999 EUR, schema version 0", TIMEOUT)?;
    reader.wait_for("order-2: 4999 USD, schema version 1", TIMEOUT)?;
    run(SCHEMA, broker, &["send", "rubbish"])?;
    reader.wait_for(
        "not an order, kept in the backlog (schema version 1)",
        TIMEOUT,
    )?;
    stop(&mut reader)?;
    let orders = "persistent://public/schema-example/orders";
    assert_eq!(backlog(broker, orders, "schema-reader").await?, 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_rule_acts_in_its_namespace_and_only_there_also_the_second_time() -> Result<()> {
    let broker = shared()?;
    for _ in 0..2 {
        let limit = 4 * TIMEOUT;
        let printed = start(TENANTS, broker, &[])?.wait(limit)?.ok()?.stdout;
        for line in [
            "plain still has 0 of 5 messages, kept has 5\n",
            "plain still has 5 of 5 messages, brief has 0\n",
            "bounded refuses another producer: ",
            "bounded takes messages again\n",
        ] {
            assert!(printed.contains(line), "{printed}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_either_cluster_stored_arrives_over_kills_of_both() -> Result<()> {
    let broker = Broker::private_cluster(Service::Pulsar, 2)?;
    let mut reader = start(GEO, &broker, &[])?;
    reader.wait_for("standalone-2: subscribed", TIMEOUT)?;
    run(GEO, &broker, &["send", "50"])?;
    reader.wait_for("order-50, published in standalone", TIMEOUT)?;
    let first = stop(&mut reader)?;
    let lines = |printed: &str| printed.lines().map(str::to_owned).collect::<Vec<_>>();
    let all: BTreeSet<u32> = (1..=50).collect();
    assert_eq!(
        numbers(&lines(&first), ": order-")
            .into_iter()
            .collect::<BTreeSet<_>>(),
        all
    );

    // Orders of the second for the first, and the second is killed before it could copy them all.
    let orders = "persistent://geo/orders/orders";
    let first = client(&broker).await?;
    consumer(&first, orders, "judge").await?.close().await?;
    let address = broker
        .env()
        .into_iter()
        .find(|(name, _)| name == "PULSAR_ADDRESS_B");
    let (_, address) = address.context("no second cluster")?;
    {
        let second = Pulsar::builder(address, TokioExecutor).build().await?;
        let back = (2001..=2040).map(|number| format!("order-{number}"));
        send(&second, orders, back).await?;
    }

    // While the second is away, the first takes orders; then it is killed before it could copy them. Others than
    // before: acks that the second broker had not written down yet are lost with it, so orders of before may come
    // again.
    broker.kill(2)?;
    let late = (1001..=1040).map(|number| format!("order-{number}"));
    send(&first, orders, late).await?;
    drop(first);
    broker.kill(1)?;
    broker.restart(1)?;
    broker.restart(2)?;
    let mut reader = start(GEO, &broker, &[])?;
    reader.wait_for("order-1040, published in standalone", 2 * TIMEOUT)?;
    let second = stop(&mut reader)?;
    let arrived: BTreeSet<u32> = numbers(&lines(&second), ": order-").into_iter().collect();
    let missing: Vec<u32> = (1001..=1040)
        .filter(|number| !arrived.contains(number))
        .collect();
    assert!(
        missing.is_empty(),
        "lost: {missing:?}
{second}"
    );
    let mut judge = consumer(&client(&broker).await?, orders, "judge").await?;
    let mut missing: BTreeSet<String> = (2001..=2040)
        .map(|number| format!("order-{number}"))
        .collect();
    while !missing.is_empty() {
        let order = next(&mut judge).await?;
        missing.remove(&String::from_utf8(order.payload.data)?);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_trace_goes_on_in_the_consumer_and_a_broken_one_stops_no_order() -> Result<()> {
    let broker = shared()?;
    let orders = topic("traced-orders");
    let program = Example::new(TRACING)
        .broker(broker)
        .env("METRICS_PORT", "0");
    let mut consumer = program.spawn()?;
    let metrics = consumer.wait_for("metrics: ", TIMEOUT)?;
    let metrics = metrics.trim_start_matches("metrics: ").to_owned();
    consumer.wait_for("waiting for orders", TIMEOUT)?;
    let sent = run(TRACING, broker, &["send"])?;
    for (key, end) in [
        ("order-1", "key=order-1"),
        ("order-2", "key=order-2"),
        ("order-3", "error.type=invalid_order"),
    ] {
        let begun = sent
            .lines()
            .find(|line| line.contains(key))
            .context("no span")?;
        let [_, trace, _, span, ..] = begun.split(' ').collect::<Vec<_>>()[..] else {
            anyhow::bail!("no trace in {begun}");
        };
        let line = consumer.wait_for(": process traced-orders, consumer", TIMEOUT)?;
        assert!(line.starts_with(&format!("trace {trace} span ")), "{line}");
        assert!(line.contains(&format!(" parent {span}: ")), "{line}");
        assert!(line.contains(end), "{line}");
    }
    assert_eq!(
        backlog(broker, &orders, "traced-orders").await?,
        1,
        "what is no order is kept"
    );
    let client = client(broker).await?;
    let mut producer = client.producer().with_topic(&orders).build().await?;
    let order = producer
        .create_message()
        .with_key("order-4")
        .with_property("traceparent", "rubbish")
        .with_content(r#"{"order_id":"order-4","work_ms":0}"#);
    order.send_non_blocking().await?.await?;
    let line = consumer.wait_for(": process traced-orders, consumer", TIMEOUT)?;
    assert!(
        line.contains(" parent none: ") && line.contains("order-4"),
        "{line}"
    );
    send(
        &client,
        &orders,
        [r#"{"order_id":"order-5","work_ms":18446744073709551615}"#],
    )
    .await?;
    consumer.wait_for("not an order: 18446744073709551615 ms of work", TIMEOUT)?;
    let text = reqwest::get(&metrics).await?.text().await?;
    let consumed = text
        .lines()
        .find(|line| line.starts_with("messaging_client_consumed_messages"));
    assert!(consumed.is_some_and(|line| line.ends_with(" 5")), "{text}");
    assert!(text.contains(r#"error_type="invalid_order""#), "{text}");
    stop(&mut consumer)?;
    Ok(())
}

/// What the chapter says of the client, so that a later version that does better is noticed.
#[tokio::test(flavor = "multi_thread")]
async fn the_client_still_has_the_defects_that_the_chapter_names() -> Result<()> {
    let broker = shared()?;
    let client = client(broker).await?;
    let defects = topic("client-defects");
    let subscribe = async || {
        let options = ConsumerOptions::default().with_initial_position(InitialPosition::Earliest);
        let builder = client
            .consumer()
            .with_topic(&defects)
            .with_subscription("defects");
        let builder = builder
            .with_subscription_type(SubType::Shared)
            .with_options(options);
        builder.build::<Vec<u8>>().await
    };
    let mut consumer = subscribe().await?;
    let options = pulsar::ProducerOptions {
        batch_size: Some(3),
        ..Default::default()
    };
    let mut producer = client
        .producer()
        .with_topic(&defects)
        .with_options(options)
        .build()
        .await?;
    let mut receipts = Vec::new();
    for number in 0..4 {
        receipts.push(producer.send_non_blocking(format!("{number}")).await?);
    }
    // The fourth is a part of a batch, which only a `send_batch` or a timeout would send. The close throws it away.
    producer.close().await?;
    let last = receipts.pop().context("four were sent")?;
    assert!(last.await.is_err(), "close now sends what is left");
    for receipt in receipts {
        receipt.await?;
    }
    // The ack of one message of a batch is the ack of all.
    let first = next(&mut consumer).await?;
    assert_eq!(first.payload.data, b"0");
    consumer.ack(&first).await?;
    until("the whole batch is gone", async || {
        Ok(backlog(broker, &defects, "defects").await? == 0)
    })
    .await?;
    consumer.close().await?;
    drop(consumer);

    // Unless the ack says which of them is meant: a bit for each that is still open.
    let options = pulsar::ProducerOptions {
        batch_size: Some(3),
        ..Default::default()
    };
    let mut producer = client
        .producer()
        .with_topic(&defects)
        .with_options(options)
        .build()
        .await?;
    let mut consumer = subscribe().await?;
    for number in 0..3 {
        drop(producer.send_non_blocking(format!("{number}")).await?);
    }
    let first = next(&mut consumer).await?;
    let mut id = first.message_id().clone();
    id.ack_set = vec![0b110];
    id.batch_size = first.message_id.batch_size;
    consumer.ack_with_id(&defects, id).await?;
    consumer.close().await?;
    drop(consumer);
    let mut consumer = subscribe().await?;
    let again = next(&mut consumer).await?;
    assert_eq!(
        backlog(broker, &defects, "defects").await?,
        1,
        "{:?}",
        again.message_id
    );
    send(&client, &defects, ["end"]).await?;
    Ok(())
}
