//! The network between client and server fails, and the server does not.

use std::time::Duration;

use anyhow::Result;
use async_nats::Client;
use compose::Service;
use compose::harness::{Direction, Example, Proxy, Running};
use tokio::time::{sleep, timeout};

use crate::nats::{TIMEOUT, caught_up, connections, consumer, jetstream, stop, until};

const SUBSCRIBE: &str = env!("CARGO_BIN_EXE_nats_subscribe");
const CONSUMER: &str = env!("CARGO_BIN_EXE_jetstream_consumer");
const ASYNC_PUBLISH: &str = env!("CARGO_BIN_EXE_jetstream_async_publish");

/// More than three pings of the examples, and less than the three minutes of the client's default.
const NOTICES: Duration = Duration::from_secs(60);

fn start(program: &str, args: &[&str], proxy: &Proxy) -> Result<Running> {
    Example::new(program).args(args).proxy(proxy).spawn()
}

async fn publish(client: &Client, body: &'static str) -> Result<()> {
    client.publish("events.n", body.into()).await?;
    Ok(client.flush().await?)
}

#[tokio::test]
async fn a_subscriber_notices_that_nothing_comes_through_and_subscribes_again() -> Result<()> {
    let (nats, proxy) = Proxy::in_front_of(Service::Nats)?;
    let client = async_nats::connect(nats.address()).await?;
    let mut subscriber = start(SUBSCRIBE, &["events.>"], &proxy)?;
    subscriber.wait_for("listening on", TIMEOUT)?;
    publish(&client, "before").await?;
    subscriber.wait_for("events.n: before", TIMEOUT)?;
    proxy.black_hole()?;
    publish(&client, "missed").await?;
    subscriber.wait_for("disconnected", NOTICES)?;
    proxy.heal()?;
    subscriber.wait_for("connected", TIMEOUT)?;
    // The connection is there a moment before the subscription is.
    let again = async {
        while !subscriber
            .lines()
            .iter()
            .any(|line| line == "events.n: after")
        {
            publish(&client, "after").await?;
            sleep(Duration::from_millis(50)).await;
        }
        anyhow::Ok(())
    };
    timeout(TIMEOUT, again).await??;
    let ended = stop(subscriber)?;
    // At most once: the server had sent it, to nobody.
    assert!(!ended.stdout.contains("missed"), "{}", ended.stdout);
    Ok(())
}

#[tokio::test]
async fn a_consumer_notices_that_nothing_comes_through_and_no_order_is_forgotten() -> Result<()> {
    let (nats, proxy) = Proxy::in_front_of(Service::Nats)?;
    let jetstream = jetstream(&nats).await?;
    let mut processor = start(CONSUMER, &[], &proxy)?;
    processor.wait_for("order-processor: 0 to come", TIMEOUT)?;
    jetstream
        .publish("orders.n", "before".into())
        .await?
        .await?;
    processor.wait_for("1: acknowledged", TIMEOUT)?;
    proxy.black_hole()?;
    jetstream
        .publish("orders.n", "meanwhile".into())
        .await?
        .await?;
    processor.wait_for("disconnected", NOTICES)?;
    let before: Vec<String> = processor.lines();
    assert!(
        !before.iter().any(|line| line.contains("meanwhile")),
        "{before:?}"
    );
    proxy.heal()?;
    processor.wait_for("2: meanwhile processing", TIMEOUT)?;
    processor.wait_for("2: acknowledged", TIMEOUT)?;
    caught_up(&jetstream, "ORDERS", "order-processor").await?;
    let info = consumer(&jetstream, "ORDERS", "order-processor").await?;
    assert_eq!(info.ack_floor.stream_sequence, 2);
    stop(processor)?;
    Ok(())
}

/// The server has stored it, the publisher does not hear of it, and sends it again under the same id.
#[tokio::test]
async fn what_is_sent_again_after_its_ack_was_lost_is_stored_once() -> Result<()> {
    const COUNT: u64 = 12_000;
    let (nats, proxy) = Proxy::in_front_of(Service::Nats)?;
    let jetstream = jetstream(&nats).await?;
    let count = COUNT.to_string();
    let mut publisher = start(ASYNC_PUBLISH, &[&count, "64"], &proxy)?;
    let in_the_middle = async {
        loop {
            let stream = jetstream.get_stream("ASYNC_PUBLISH").await;
            if stream.is_ok_and(|stream| stream.cached_info().state.messages > 500) {
                break;
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(TIMEOUT, in_the_middle).await?;
    proxy.swallow(Direction::ToClient)?;
    // The server gets all, and its counts go on with what is sent again.
    let received = || -> Result<u64> {
        let messages = connections(&nats)?;
        let messages = messages.iter().filter_map(|one| one["in_msgs"].as_u64());
        Ok(messages.max().unwrap_or_default())
    };
    let before = received()?;
    until("it sends again", || Ok(received()? >= before + 2))?;
    proxy.heal()?;
    let said = publisher.wait(TIMEOUT)?.ok()?.stdout;
    let acknowledged = format!(": {COUNT} acknowledged");
    assert_eq!(said.matches(&acknowledged).count(), 2, "{said}");
    let untouched = said.matches(", 0 sent again").count();
    assert!(untouched < 2, "no ack was lost: {said}");
    let stream = jetstream.get_stream("ASYNC_PUBLISH").await?;
    assert_eq!(stream.cached_info().state.messages, 2 * COUNT);
    Ok(())
}
