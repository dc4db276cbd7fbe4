//! The network between client and broker fails, and the broker does not.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail};
use compose::Service;
use compose::harness::{Direction, Finished, Proxy};

use crate::reconnect::books;
use crate::shared::{Place, TIMEOUT};

const SEND: &str = env!("CARGO_BIN_EXE_rabbitmq_send");
const RECEIVE: &str = env!("CARGO_BIN_EXE_rabbitmq_receive");
const RECONNECT: &str = env!("CARGO_BIN_EXE_rabbitmq_reconnect");

/// Far more than two or three heartbeats, and far less than the minutes until the system itself gives up.
const NOTICES: Duration = Duration::from_secs(45);
/// How late the broker's answers are: so long there is time to see a message in the queue before its confirm arrives.
const LATE: Duration = Duration::from_millis(700);

/// Lets `fault` happen to a sender whose message is in the queue and whose confirm is on its way.
async fn lose_the_confirm(
    place: &Place,
    proxy: &Proxy,
    fault: fn(&Proxy) -> Result<()>,
) -> Result<Finished> {
    // On a busy machine the fault may come too late.
    for _ in 0..5 {
        proxy.delay(Direction::ToClient, LATE)?;
        let mut sender = place.example(SEND).args(["Task: lost"]).spawn()?;
        place.becomes("tasks", (1, 0)).await?;
        fault(proxy)?;
        let ended = sender.wait(TIMEOUT)?;
        proxy.heal()?;
        assert_eq!(place.drain("tasks").await?, ["Task: lost"]);
        if ended.code() != 0 {
            return Ok(ended);
        }
    }
    bail!("however early the fault, the sender has got its confirm, or does without")
}

#[tokio::test]
async fn a_lost_confirm_is_reported_as_may_or_may_not_be_in_the_queue() -> Result<()> {
    let (rabbitmq, proxy) = Proxy::in_front_of(Service::RabbitMq)?;
    let place = Place::behind(&rabbitmq, &proxy).await?;
    place.run(SEND, &["Task: first"])?.ok()?;
    place.drain("tasks").await?;
    let faults: [fn(&Proxy) -> Result<()>; 2] =
        [|proxy| proxy.swallow(Direction::ToClient), Proxy::cut];
    for fault in faults {
        let ended = lose_the_confirm(&place, &proxy, fault).await?;
        assert_eq!((ended.code(), ended.stdout.as_str()), (1, ""));
        let said = "the task may or may not be in the queue";
        assert!(ended.stderr.contains(said), "{}", ended.stderr);
    }
    Ok(())
}

#[tokio::test]
async fn a_publisher_without_its_confirms_publishes_again_and_loses_nothing() -> Result<()> {
    let (rabbitmq, proxy) = Proxy::in_front_of(Service::RabbitMq)?;
    let place = Place::behind(&rabbitmq, &proxy).await?;
    let mut publisher = place.example(RECONNECT).args(["publish"]).spawn()?;
    publisher.wait_for("confirmed: ", TIMEOUT)?;
    // Several times: now and then, all is confirmed when it happens.
    for _ in 0..3 {
        proxy.swallow(Direction::ToClient)?;
        comes_to_rest(&place, "reconnect").await?;
        proxy.cut()?;
        publisher.wait_for("publisher: connection lost", TIMEOUT)?;
        proxy.heal()?;
        publisher.wait_for("publisher: connected again", TIMEOUT)?;
        publisher.wait_for("confirmed: ", TIMEOUT)?;
    }
    publisher.interrupt()?;
    let books = books(&publisher.wait(TIMEOUT)?.ok()?)?;
    let mut there: BTreeMap<u64, u64> = BTreeMap::new();
    for body in place.drain("reconnect").await? {
        *there.entry(body.parse()?).or_default() += 1;
    }
    assert_eq!(books["acked"], books["attempted"]);
    assert!(there.keys().copied().eq(1..=books["attempted"]), "lost");
    // What is there twice was there when its confirm was lost.
    let twice = there.values().filter(|count| **count > 1).count() as u64;
    assert!(twice > 0, "no confirm was lost");
    assert!(twice <= books["indeterminate"], "{twice} twice, {books:?}");
    Ok(())
}

/// Until a publisher that waits for its confirms has nothing more to send.
async fn comes_to_rest(place: &Place, queue: &str) -> Result<()> {
    let (mut before, mut same) = (0, 0);
    place
        .becomes_such(queue, "at rest", |(ready, _)| {
            same = if ready == before { same + 1 } else { 0 };
            before = ready;
            same > 15
        })
        .await
}

#[tokio::test]
async fn a_receiver_notices_that_nothing_comes_through_and_its_task_goes_to_the_next() -> Result<()>
{
    let (rabbitmq, proxy) = Proxy::in_front_of(Service::RabbitMq)?;
    let mut place = Place::behind(&rabbitmq, &proxy).await?;
    // In seconds. The default of the broker is 60.
    place.address += "?heartbeat=2";
    let mut receiver = place.start(RECEIVE, &[], "waiting for tasks")?;
    proxy.black_hole()?;
    place.publish("tasks", b"Task: unseen").await?;
    // The broker has sent it, and does not know yet that it has sent it to nobody.
    place.becomes("tasks", (0, 1)).await?;
    let ended = receiver.wait(NOTICES)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    assert!(
        ended.stderr.contains("lost the connection"),
        "{}",
        ended.stderr
    );
    assert!(!ended.stdout.contains("unseen"), "{}", ended.stdout);
    proxy.heal()?;
    let mut receiver = place.start(RECEIVE, &[], "waiting for tasks")?;
    receiver.wait_for("received: unseen (redelivered)", TIMEOUT)?;
    receiver.wait_for("done: unseen", TIMEOUT)?;
    receiver.interrupt()?;
    receiver.wait(TIMEOUT)?.ok()?;
    place.becomes("tasks", (0, 0)).await
}
