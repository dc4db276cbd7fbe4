//! The network between a stage and Kafka fails at the end of a transaction, and neither of them does.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use compose::harness::{Direction, Proxy, Running};
use compose::{Broker, Service};
use tempfile::TempDir;

use super::checker::{Event, check};
use super::{TIMEOUT, TOPIC, books, committed, program};
use crate::ending::is_ending;

const ORDERS: usize = 600;
const DECLINED: &str = "order-pipeline.orders.payment-declined";
/// How late the requests are: so long there is time between what a stage sends before the end, and the end.
const LATE: Duration = Duration::from_millis(500);

/// Payment has no answer to its commit, and cannot know whether it was carried out. Once it was, and once not.
#[test]
fn a_transaction_whose_end_is_cut_off_loses_and_repeats_nothing() -> Result<()> {
    let (kafka, proxy) = Proxy::in_front_of(Service::Kafka)?;
    let state = tempfile::tempdir()?;
    let brokers = kafka.address();
    let start = |args: &[&str]| program(&state, &brokers, args).spawn();
    let mut inventory = start(&["inventory"])?;
    let placed = start(&["place", "--orders", &ORDERS.to_string()])?.wait(TIMEOUT)?;
    placed.ok()?;
    let deadline = Instant::now() + TIMEOUT;
    while events(&brokers)?.len() < 2 * ORDERS {
        ensure!(Instant::now() < deadline, "inventory does not finish");
        std::thread::sleep(Duration::from_millis(200));
    }
    // From now on, each transaction is payment's.
    inventory.terminate()?;
    inventory.wait(TIMEOUT)?.ok()?;

    let payment = program(&state, &brokers, &["payment", "--batch", "20"]);
    let mut payment = payment.proxy(&proxy).spawn()?;
    cut_off(&kafka, &proxy, &mut payment, Direction::ToClient, || {
        // The end has arrived, and its answer has not: what is in the books is on the topics too.
        Ok(!is_ending(&kafka)? && charges_told(&brokers)? == effects(&state)?)
    })?;
    cut_off(&kafka, &proxy, &mut payment, Direction::ToBroker, || {
        // All but the end has arrived.
        is_ending(&kafka)
    })?;

    proxy.heal()?;
    let mut others = [start(&["inventory"])?, start(&["shipping"])?];
    start(&["audit"])?.wait(TIMEOUT)?.ok()?;
    for stage in others.iter_mut().chain([&mut payment]) {
        stage.terminate()?;
        stage.wait(TIMEOUT)?.ok()?;
    }
    let events = events(&brokers)?;
    assert_eq!(check(&events, ORDERS), Vec::<String>::new());
    let shipped = events.iter().filter(|event| event.status == "shipped");
    assert_eq!(
        books(&state, "payment", "SELECT sum(amount) FROM charges")?,
        shipped.map(|event| event.amount).sum::<i64>()
    );
    // Without an end, a transaction is aborted, and its effects are in the books already.
    let replays = books(&state, "payment", "SELECT ifnull(sum(n), 0) FROM replays")?;
    assert!(replays > 0, "no end was cut off");
    Ok(())
}

/// Swallows one direction while the end of a transaction is on its way, until the stage gives up; again, until the fault
/// was such that `holds`.
fn cut_off(
    kafka: &Broker,
    proxy: &Proxy,
    stage: &mut Running,
    direction: Direction,
    holds: impl Fn() -> Result<bool>,
) -> Result<()> {
    proxy.delay(Direction::ToBroker, LATE)?;
    // On a busy machine, the fault may come too late for the end, and hit the beginning of the next one.
    for _ in 0..5 {
        let deadline = Instant::now() + TIMEOUT;
        while !is_ending(kafka)? {
            ensure!(Instant::now() < deadline, "no transaction ends");
        }
        proxy.swallow(direction)?;
        stage.wait_for("payment: interrupted", TIMEOUT)?;
        let hit = holds()?;
        proxy.heal()?;
        // At once, or all is done before the next fault.
        proxy.delay(Direction::ToBroker, LATE)?;
        stage.wait_for("payment: going on", TIMEOUT)?;
        if hit {
            return Ok(());
        }
    }
    bail!("however early the fault, it was too late")
}

fn events(brokers: &str) -> Result<Vec<Event>> {
    committed(brokers, TOPIC)?.iter().map(Event::read).collect()
}

/// What payment has decided, by its events.
fn charges_told(brokers: &str) -> Result<usize> {
    let paid = events(brokers)?;
    let paid = paid.iter().filter(|event| event.status == "paid").count();
    Ok(paid + committed(brokers, DECLINED)?.len())
}

/// The same by its books.
fn effects(state: &TempDir) -> Result<usize> {
    Ok(usize::try_from(books(
        state,
        "payment",
        "SELECT count(*) FROM handled",
    )?)?)
}
