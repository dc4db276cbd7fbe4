//! The broker dies three times, and the books are right.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use compose::harness::Finished;
use compose::{Broker, Service};

use crate::shared::{Place, TIMEOUT, settle, vhost, vhost_of};

const PROGRAM: &str = env!("CARGO_BIN_EXE_rabbitmq_reconnect");
const QUEUE: &str = "reconnect";
const KILLS: usize = 3;

/// `attempted 5, acked 3, …` of the last line.
pub fn books(ended: &Finished) -> Result<BTreeMap<String, u64>> {
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

/// One that only publishes, and one that does both, each in a virtual host of its own, while the broker dies again and again.
#[tokio::test]
async fn over_three_kills_of_the_broker_nothing_confirmed_is_lost() -> Result<()> {
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    let publishing = vhost_of(&rabbitmq, "publishing").await?;
    let both = vhost_of(&rabbitmq, "both").await?;
    publishing.declare(QUEUE).await?;
    both.declare(QUEUE).await?;
    settle(&rabbitmq)?;
    let mut programs = [
        publishing.example(PROGRAM).args(["publish"]).spawn()?,
        both.example(PROGRAM).spawn()?,
    ];
    for program in &mut programs {
        program.wait_for("confirmed: ", TIMEOUT)?;
    }
    for _ in 0..KILLS {
        rabbitmq.kill(1)?;
        for program in &mut programs {
            program.wait_for("publisher: connection lost", TIMEOUT)?;
        }
        rabbitmq.restart(1)?;
        for program in &mut programs {
            program.wait_for("publisher: connected again", TIMEOUT)?;
            program.wait_for("confirmed: ", TIMEOUT)?;
        }
    }
    for program in &mut programs {
        program.interrupt()?;
    }
    let [publisher, program] = &mut programs;
    nothing_is_lost_and_what_is_there_twice_was_in_doubt(
        &publisher.wait(TIMEOUT * 3)?.ok()?,
        &Place::again(&publishing).await?,
    )
    .await?;
    all_that_was_confirmed_is_handled(
        &program.wait(TIMEOUT * 3)?.ok()?,
        &Place::again(&both).await?,
    )
    .await
}

async fn nothing_is_lost_and_what_is_there_twice_was_in_doubt(
    ended: &Finished,
    place: &Place,
) -> Result<()> {
    let books = books(ended)?;
    let (attempted, acked, doubtful) = (books["attempted"], books["acked"], books["indeterminate"]);
    // Nobody has looked, so nothing is said of it.
    assert!(!books.contains_key("lost"), "{}", ended.stdout);
    // All was confirmed in the end, so each must be there.
    assert_eq!(acked, attempted, "{}", ended.stdout);
    assert!(doubtful >= 1, "{}", ended.stdout);
    let mut delivered: BTreeMap<u64, u64> = BTreeMap::new();
    for body in place.drain(QUEUE).await? {
        *delivered.entry(body.parse()?).or_default() += 1;
    }
    let lost: Vec<u64> = (1..=attempted)
        .filter(|id| !delivered.contains_key(id))
        .collect();
    let unexpected = delivered
        .keys()
        .filter(|id| !(1..=attempted).contains(id))
        .count();
    let twice = delivered.values().filter(|count| **count > 1).count() as u64;
    let total: u64 = delivered.values().sum();
    println!(
        "attempted {attempted} acked {acked} indeterminate {doubtful} delivered {total} duplicate {twice} lost {} unexpected {unexpected}",
        lost.len()
    );
    assert_eq!(lost, [0; 0]);
    assert_eq!(unexpected, 0);
    assert!(twice <= doubtful, "{twice} twice, {doubtful} in doubt");
    Ok(())
}

async fn all_that_was_confirmed_is_handled(ended: &Finished, place: &Place) -> Result<()> {
    let books = books(ended)?;
    println!("{books:?}");
    assert_eq!(books["acked"], books["attempted"], "{}", ended.stdout);
    assert_eq!(
        (books["lost"], books["unexpected"]),
        (0, 0),
        "{}",
        ended.stdout
    );
    assert_eq!(books["delivered"], books["attempted"] + books["duplicate"]);
    // What it says it has handled is handled in the broker's books, too.
    place.becomes(QUEUE, (0, 0)).await
}

#[tokio::test]
async fn who_gives_up_hears_what_may_or_may_not_be_there() -> Result<()> {
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    let place = Place::of(&rabbitmq).await?;
    place.declare(QUEUE).await?;
    settle(&rabbitmq)?;
    let mut program = place.example(PROGRAM).args(["publish"]).spawn()?;
    program.wait_for("confirmed: ", TIMEOUT)?;
    rabbitmq.kill(1)?;
    program.wait_for("publisher: connection lost", TIMEOUT)?;
    program.interrupt()?;
    program.wait_for("Ctrl-C to give up", TIMEOUT)?;
    program.interrupt()?;
    let ended = program.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    let books = books(&ended)?;
    let (attempted, acked) = (books["attempted"], books["acked"]);
    let (_, doubtful) = ended
        .stderr
        .split_once("may or may not be in the queue: ")
        .with_context(|| format!("nothing in doubt: {}", ended.stderr))?;
    let doubtful = doubtful.trim().split(", ").map(str::parse);
    let doubtful: BTreeSet<u64> = doubtful
        .collect::<Result<_, _>>()
        .with_context(|| format!("not numbers alone: {}", ended.stderr))?;
    assert_eq!(attempted - acked, doubtful.len() as u64);
    assert!(books["indeterminate"] >= doubtful.len() as u64);
    rabbitmq.restart(1)?;
    let confirmed = (1..=attempted).filter(|id| !doubtful.contains(id));
    let confirmed = confirmed.map(|id| id.to_string()).collect();
    Place::of(&rabbitmq)
        .await?
        .take_until(QUEUE, &confirmed)
        .await?;
    Ok(())
}

#[tokio::test]
async fn a_second_one_is_refused_and_takes_nothing_away() -> Result<()> {
    let place = vhost().await?;
    let mut first = place.start(PROGRAM, &[], "publishing and consuming")?;
    first.wait_for("confirmed: ", TIMEOUT)?;
    place
        .becomes_such(QUEUE, "a consumer", |(_, consumers)| consumers == 1)
        .await?;
    for half in [[].as_slice(), &["publish"], &["consume"]] {
        let second = place.run(PROGRAM, half)?;
        assert_eq!((second.code(), second.stdout.as_str()), (1, ""));
        assert!(
            second.stderr.contains("has a consumer already"),
            "{}",
            second.stderr
        );
    }
    let options = Default::default();
    let refused = place
        .channel
        .basic_consume(QUEUE.into(), "".into(), options, Default::default())
        .await;
    assert!(refused.is_err(), "it is not exclusive");
    first.interrupt()?;
    let books = books(&first.wait(TIMEOUT)?.ok()?)?;
    assert_eq!((books["lost"], books["duplicate"]), (0, 0));
    Ok(())
}

#[tokio::test]
async fn a_queue_that_is_deleted_is_declared_again_and_what_came_back_is_published_again()
-> Result<()> {
    let place = vhost().await?;
    let mut program = place.start(PROGRAM, &["publish"], "publishing")?;
    program.wait_for("confirmed: ", TIMEOUT)?;
    let options = Default::default();
    place.channel.queue_delete(QUEUE.into(), options).await?;
    program.wait_for("messages came back", TIMEOUT)?;
    program.wait_for("confirmed: ", TIMEOUT)?;
    program.interrupt()?;
    let books = books(&program.wait(TIMEOUT)?.ok()?)?;
    assert_eq!(books["acked"], books["attempted"]);
    // The deleted queue has taken what was confirmed before; from then on there is no gap.
    let there = place.drain(QUEUE).await?;
    let there = there.iter().map(|id| id.parse());
    let there: BTreeSet<u64> = there.collect::<Result<_, _>>()?;
    let first = there.first().context("nothing is there")?;
    assert_eq!(first % 100, 1, "the rest of the batch is missing");
    assert!(there.iter().copied().eq(*first..=books["attempted"]));
    Ok(())
}
