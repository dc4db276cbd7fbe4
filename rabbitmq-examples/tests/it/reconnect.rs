//! The broker dies three times, and the books are right.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use compose::harness::Finished;
use compose::{Broker, Service};

use crate::shared::{Place, SOON, settle};

const PROGRAM: &str = env!("CARGO_BIN_EXE_rabbitmq_reconnect");
const QUEUE: &str = "reconnect";
const KILLS: usize = 3;

/// `attempted 5, acked 3, …` of the last line.
fn books(ended: &Finished) -> Result<BTreeMap<String, u64>> {
    let last = ended
        .stdout
        .lines()
        .last()
        .context("it has printed nothing")?;
    let pairs = last.split(", ").map(|pair| {
        let (name, count) = pair
            .split_once(' ')
            .with_context(|| format!("not the books: {last}"))?;
        Ok((name.to_owned(), count.parse()?))
    });
    pairs.collect()
}

/// Lets it publish, breaks the broker under it, lets it recover; several times.
async fn ordeal(rabbitmq: &Broker, argument: &[&str]) -> Result<Finished> {
    Place::of(rabbitmq).await?.declare(QUEUE).await?;
    settle(rabbitmq)?;
    let mut program = compose::harness::Example::new(PROGRAM)
        .args(argument)
        .broker(rabbitmq)
        .spawn()?;
    program.wait_for("confirmed: ", SOON)?;
    for _ in 0..KILLS {
        rabbitmq.kill(1)?;
        program.wait_for("publisher: connection lost", SOON)?;
        rabbitmq.restart(1)?;
        program.wait_for("confirmed: ", SOON)?;
    }
    program.interrupt()?;
    program.wait(SOON * 3)?.ok()
}

#[tokio::test]
async fn nothing_confirmed_is_lost_and_what_is_there_twice_was_in_doubt() -> Result<()> {
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    let ended = ordeal(&rabbitmq, &["publish"]).await?;
    let books = books(&ended)?;
    let (attempted, acked, doubtful) = (books["attempted"], books["acked"], books["indeterminate"]);
    // All was confirmed in the end, so each must be there.
    assert_eq!(acked, attempted, "{}", ended.stdout);
    assert!(doubtful >= 1, "{}", ended.stdout);
    let place = Place::of(&rabbitmq).await?;
    let mut delivered: BTreeMap<u64, u64> = BTreeMap::new();
    for body in place.drain(QUEUE).await? {
        *delivered.entry(body.parse()?).or_default() += 1;
    }
    let lost = (1..=attempted)
        .filter(|id| !delivered.contains_key(id))
        .count();
    let unexpected = delivered
        .keys()
        .filter(|id| !(1..=attempted).contains(id))
        .count();
    let twice = delivered.values().filter(|count| **count > 1).count() as u64;
    let total: u64 = delivered.values().sum();
    println!(
        "attempted {attempted} acked {acked} indeterminate {doubtful} delivered {total} duplicate {twice} lost {lost} unexpected {unexpected}"
    );
    assert_eq!((lost, unexpected), (0, 0));
    assert!(twice <= doubtful, "{twice} twice, {doubtful} in doubt");
    Ok(())
}

#[tokio::test]
async fn both_sides_go_on_and_all_that_was_confirmed_is_handled() -> Result<()> {
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    let ended = ordeal(&rabbitmq, &[]).await?;
    let books = books(&ended)?;
    println!("{books:?}");
    assert_eq!(books["acked"], books["attempted"], "{}", ended.stdout);
    assert_eq!(
        (books["lost"], books["unexpected"]),
        (0, 0),
        "{}",
        ended.stdout
    );
    assert_eq!(books["delivered"], books["attempted"] + books["duplicate"]);
    // Those in doubt, and for each kill at most what the consumer held (its prefetch) or had acknowledged in vain.
    Ok(())
}
