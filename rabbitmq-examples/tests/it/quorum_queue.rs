//! Confirmed jobs survive the broker's SIGKILL, and a poison message ends in the dead letters.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use compose::harness::Finished;
use compose::{Broker, Service};

use crate::shared::{Place, TIMEOUT, vhost};

const PROGRAM: &str = env!("CARGO_BIN_EXE_rabbitmq_quorum_queue");
const JOBS: &str = "quorum-queue.jobs";
const DEAD: &str = "quorum-queue.dead";

/// Waits until the node has written down that it has the queue, which it does half a second late.
async fn registered(rabbitmq: &Broker) -> Result<()> {
    let data = rabbitmq
        .folder()
        .join("node-1/data/lab1@localhost/quorum/lab1@localhost/names.dets");
    let name = JOBS.as_bytes();
    let written = async {
        let has = |bytes: &[u8]| bytes.windows(name.len()).any(|window| window == name);
        while !std::fs::read(&data).is_ok_and(|bytes| has(&bytes)) {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let missing = || format!("{} does not name the queue", data.display());
    tokio::time::timeout(TIMEOUT, written)
        .await
        .with_context(missing)
}

#[tokio::test]
async fn confirmed_jobs_survive_sigkill_of_the_broker() -> Result<()> {
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    let place = Place::of(&rabbitmq).await?;
    place.run(PROGRAM, &["dead"])?.ok()?;
    registered(&rabbitmq).await?;
    let jobs: Vec<String> = (1..=200).map(|number| format!("job-{number}")).collect();
    let mut args = vec!["send"];
    args.extend(jobs.iter().map(String::as_str));
    place.run(PROGRAM, &args)?.ok()?;
    rabbitmq.kill(1)?;
    rabbitmq.restart(1)?;
    let place = Place::of(&rabbitmq).await?;
    place.becomes(JOBS, (200, 0)).await?;
    let mut working = place.start(PROGRAM, &[], "waiting for jobs")?;
    working.wait_for("job-200: done", TIMEOUT)?;
    rabbitmq.kill(1)?;
    let ended = working.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    assert!(
        ended.stderr.contains("lost the connection"),
        "{}",
        ended.stderr
    );
    Ok(())
}

/// The jobs on the line that begins with `what`.
fn listed(ended: &Finished, what: &str) -> BTreeSet<String> {
    let line = ended
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix(what));
    let jobs = line.into_iter().flat_map(|line| line.split(", "));
    jobs.map(String::from).collect()
}

/// Sends many jobs, and lets `fault` happen when a third is in the queue.
///
/// A few hundred would be too early: what the sender has not read yet of the confirms is lost with the broker.
async fn send_under(
    place: &Place,
    jobs: &[String],
    fault: impl FnOnce() -> Result<()>,
) -> Result<Finished> {
    let mut sending = place.example(PROGRAM).args(["send"]).args(jobs).spawn()?;
    let third = jobs.len() / 3;
    place
        .becomes_such(JOBS, "a third", |(ready, _)| ready as usize >= third)
        .await?;
    ensure!(
        sending.try_wait()?.is_none(),
        "all is sent before the fault"
    );
    fault()?;
    sending.wait(TIMEOUT)
}

#[tokio::test]
async fn sigkill_in_the_middle_of_a_send_leaves_no_job_unnamed() -> Result<()> {
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    let place = Place::of(&rabbitmq).await?;
    place.run(PROGRAM, &["dead"])?.ok()?;
    registered(&rabbitmq).await?;
    let jobs: Vec<String> = (1..=30_000).map(|number| format!("job-{number}")).collect();
    let ended = send_under(&place, &jobs, || rabbitmq.kill(1)).await?;
    assert_eq!(ended.code(), 1);
    assert!(
        ended.stderr.contains("send the unconfirmed again"),
        "{}",
        ended.stderr
    );
    let confirmed = listed(&ended, "sent and confirmed: ");
    let unconfirmed = listed(&ended, "unconfirmed, may or may not be in the queue: ");
    println!(
        "{} confirmed, {} unconfirmed",
        confirmed.len(),
        unconfirmed.len()
    );
    assert!(!confirmed.is_empty() && !unconfirmed.is_empty());
    assert!(confirmed.is_disjoint(&unconfirmed));
    let all: BTreeSet<String> = jobs.into_iter().collect();
    assert_eq!(&confirmed | &unconfirmed, all);
    rabbitmq.restart(1)?;
    let there = Place::of(&rabbitmq)
        .await?
        .take_until(JOBS, &confirmed)
        .await?;
    assert!(there.iter().all(|job| all.contains(job)));
    Ok(())
}

#[tokio::test]
async fn two_of_three_nodes_confirm_all_when_the_third_is_killed() -> Result<()> {
    let rabbitmq = Broker::private_cluster(Service::RabbitMq, 3)?;
    let place = Place::of(&rabbitmq).await?;
    place.run(PROGRAM, &["dead"])?.ok()?;
    let url = format!("{}/api/queues/%2f/{JOBS}", place.management);
    let request = reqwest::Client::new().get(url);
    let answer = request.basic_auth("guest", Some("guest")).send().await?;
    let queue: serde_json::Value = answer.json().await?;
    assert_eq!(
        queue["members"].as_array().map(Vec::len),
        Some(3),
        "{queue}"
    );
    let jobs: Vec<String> = (1..=10_000).map(|number| format!("job-{number}")).collect();
    let ended = send_under(&place, &jobs, || rabbitmq.kill(2)).await?.ok()?;
    let all: BTreeSet<String> = jobs.into_iter().collect();
    assert_eq!(listed(&ended, "sent and confirmed: "), all);
    place.becomes(JOBS, (10_000, 0)).await?;
    place.take_until(JOBS, &all).await?;
    Ok(())
}

#[tokio::test]
async fn poison_is_given_up_after_the_limit_and_looking_at_it_takes_nothing() -> Result<()> {
    let place = vhost().await?;
    let mut working = place.start(PROGRAM, &[], "waiting for jobs")?;
    place
        .run(PROGRAM, &["send", "job-1", "poison", "job-2"])?
        .ok()?;
    place.becomes(DEAD, (1, 0)).await?;
    working.wait_for("job-2: done", TIMEOUT)?;
    working.interrupt()?;
    let ended = working.wait(TIMEOUT)?.ok()?;
    assert!(
        ended
            .stdout
            .ends_with("stopped; jobs done: 2, failures: 4\n"),
        "{}",
        ended.stdout
    );
    for _ in 0..2 {
        let dead = place.run(PROGRAM, &["dead"])?.ok()?;
        assert_eq!(
            dead.stdout,
            "poison: delivery_limit, from quorum-queue.jobs\ndead letters: 1\n"
        );
    }
    assert_eq!(
        place.take(DEAD).await?.context("nothing there")?.data,
        b"poison"
    );
    place.becomes(JOBS, (0, 0)).await
}
