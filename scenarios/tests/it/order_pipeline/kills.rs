//! Every stage as a process of its own, and SIGKILL for all of them, and for Kafka.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::harness::Running;
use compose::{Broker, Service};
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::{Offset, TopicPartitionList};

use super::checker::{Event, check};
use super::{DEAD_LETTERS, TIMEOUT, TOPIC, books, books_file, committed, program, reported};
use compose::harness::chance;

const ORDERS: usize = 6000;
const KILLS: usize = 20;
/// The parts that have books.
const STAGES: [&str; 3] = ["inventory", "payment", "shipping"];

struct Pipeline<'a> {
    brokers: String,
    state: &'a tempfile::TempDir,
    running: BTreeMap<&'static str, Running>,
}

impl Pipeline<'_> {
    fn start(&mut self, part: &'static str) -> Result<()> {
        let orders = ORDERS.to_string();
        // The rate spreads the orders over the kills; without it, they are through before the second.
        let args = match part {
            "payment again" => vec!["payment", "--instance", "1"],
            "place" => vec!["place", "--orders", &orders, "--rate", "300"],
            stage => vec![stage],
        };
        let process = program(self.state, &self.brokers, &args).spawn()?;
        self.running.insert(part, process);
        Ok(())
    }

    fn part(&mut self, part: &str) -> Result<&mut Running> {
        self.running
            .get_mut(part)
            .with_context(|| format!("{part} is not running"))
    }
}

#[test]
fn survives_kills_of_every_part_and_of_kafka() -> Result<()> {
    let mut random = chance()?;
    let kafka = Broker::private(Service::Kafka)?;
    let state = tempfile::tempdir()?;
    let mut pipeline = Pipeline {
        brokers: kafka.address(),
        state: &state,
        running: BTreeMap::new(),
    };
    for part in ["place", "inventory", "payment", "shipping"] {
        pipeline.start(part)?;
    }

    // The moments are random, so this waits for time, for once.
    let kafka_dies_at = random.usize(KILLS / 4..KILLS * 3 / 4);
    let mut plan = ["place", "inventory", "payment", "shipping"].repeat(KILLS / 4);
    random.shuffle(&mut plan);
    let mut kills = BTreeMap::new();
    // More than planned only until one has fallen between an effect and its event.
    let more = STAGES.into_iter().cycle();
    for (kill, mut part) in plan.into_iter().chain(more).take(3 * KILLS).enumerate() {
        if kill >= KILLS && replays(&state)? > 0 {
            break;
        }
        let begun = Instant::now();
        if kill == kafka_dies_at {
            kafka.kill(1)?;
            thread::sleep(Duration::from_millis(random.u64(0..3000)));
            kafka.restart(1)?;
        }
        thread::sleep(Duration::from_millis(random.u64(100..1100)));
        if part == "place" && pipeline.part("place")?.try_wait()?.is_some() {
            part = "inventory";
        }
        // Every other kill of a stage is aimed: at the moment after an effect and before its event.
        if part != "place" && (random.bool() || kill >= KILLS) {
            await_effect(&state, part);
            thread::sleep(Duration::from_millis(random.u64(0..10)));
        }
        let process = pipeline.part(part)?;
        ensure!(
            process.try_wait()?.is_none(),
            "{part} ended by itself:\n{:?}",
            process.lines()
        );
        process.kill()?;
        *kills.entry(part).or_insert(0) += 1;
        if random.bool() {
            thread::sleep(Duration::from_millis(random.u64(0..1000)));
        }
        pipeline.start(part)?;
        eprintln!("kill {kill}: {part} ({:?})", begun.elapsed());
    }

    let placed = pipeline.part("place")?.wait(TIMEOUT)?.ok()?;
    assert!(
        placed.stdout.contains(&format!("{ORDERS} orders placed")),
        "{}",
        placed.stdout
    );
    let audit = program(&state, &pipeline.brokers, &["audit"])
        .spawn()?
        .wait(TIMEOUT)?;
    eprintln!("{kills:?}\n{}", audit.stdout);
    for part in STAGES {
        pipeline.part(part)?.terminate()?;
        pipeline.part(part)?.wait(TIMEOUT)?.ok()?;
    }

    let records = committed(&pipeline.brokers, TOPIC)?;
    let events = records
        .iter()
        .map(Event::read)
        .collect::<Result<Vec<_>>>()?;
    assert_eq!(check(&events, ORDERS), Vec::<String>::new());
    assert_eq!(committed(&pipeline.brokers, DEAD_LETTERS)?.len(), 0);

    let count = |status: &str| events.iter().filter(|e| e.status == status).count() as i64;
    let shipped = events.iter().filter(|event| event.status == "shipped");
    let sum = |service, sql| books(&state, service, sql);
    // All ends of the saga were reached, or the sums would prove little.
    assert!(count("shipped") > 0 && count("cancelled") > 0 && count("rejected") > 0);
    assert_eq!(
        sum("payment", "SELECT count(*) FROM charges")?,
        count("shipped")
    );
    assert_eq!(
        sum("payment", "SELECT sum(amount) FROM charges")?,
        shipped.map(|event| event.amount).sum::<i64>()
    );
    assert_eq!(
        sum("shipping", "SELECT count(*) FROM shipments")?,
        count("shipped")
    );
    assert_eq!(
        sum(
            "inventory",
            "SELECT count(*) FROM reservations WHERE released"
        )?,
        count("cancelled")
    );
    assert_eq!(
        sum("inventory", "SELECT sum(initial) - sum(on_hand) FROM stock")?,
        sum(
            "inventory",
            "SELECT sum(quantity) FROM reservations WHERE NOT released"
        )?
    );

    // The program's own verdict agrees, and the kills did hit work in hand.
    let audit = audit.ok()?;
    assert_eq!(reported(&audit.stdout, "orders in"), Some(ORDERS as i64));
    assert!(
        replays(&state)? > 0,
        "no kill fell between an effect and its event: {kills:?}"
    );
    Ok(())
}

/// Effects that a stage found made by the one before it, which was killed before their events.
fn replays(state: &tempfile::TempDir) -> Result<i64> {
    STAGES
        .iter()
        .map(|stage| books(state, stage, "SELECT ifnull(sum(n), 0) FROM replays"))
        .sum()
}

/// How many the stage has made. There are no books before its first start.
fn effects(state: &tempfile::TempDir, stage: &str) -> i64 {
    books(state, stage, "SELECT count(*) FROM handled").unwrap_or(0)
}

/// One that is frozen in the middle of a write has its books locked, and nobody could take its place.
fn freeze_outside_of_a_write(
    process: &mut Running,
    state: &tempfile::TempDir,
    stage: &str,
) -> Result<()> {
    let begun = Instant::now();
    loop {
        process.pause()?;
        let books = rusqlite::Connection::open(books_file(state, stage)?)?;
        books.busy_timeout(Duration::ZERO)?;
        match books.execute_batch("BEGIN IMMEDIATE; ROLLBACK") {
            Ok(()) => return Ok(()),
            Err(error) => ensure!(begun.elapsed() < TIMEOUT, "always locked: {error}"),
        }
        process.resume()?;
        thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until the stage has made another effect, for five seconds at most: there may be nothing to do.
fn await_effect(state: &tempfile::TempDir, stage: &str) {
    let (before, begun) = (effects(state, stage), Instant::now());
    while effects(state, stage) == before && begun.elapsed() < Duration::from_secs(5) {
        thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until the stage has made so many effects more.
fn await_effects(state: &tempfile::TempDir, stage: &str, more: i64) -> Result<()> {
    let (before, begun) = (effects(state, stage), Instant::now());
    while effects(state, stage) < before + more {
        ensure!(begun.elapsed() < TIMEOUT, "{stage} does nothing");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A process that was frozen while another took its place must not go on as if nothing had happened.
#[test]
fn a_frozen_stage_that_was_replaced_gives_up() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let state = tempfile::tempdir()?;
    let mut pipeline = Pipeline {
        brokers: kafka.address(),
        state: &state,
        running: BTreeMap::new(),
    };
    for part in ["inventory", "payment", "shipping", "place"] {
        pipeline.start(part)?;
    }
    await_effects(&state, "payment", 10)?;
    let mut frozen = pipeline.running.remove("payment").context("payment")?;
    freeze_outside_of_a_write(&mut frozen, &state, "payment")?;
    pipeline.start("payment")?;
    // Not at the end: one that finds nothing to do would not notice, and do no harm.
    await_effects(&state, "payment", 100)?;
    frozen.resume()?;
    let frozen = frozen.wait(TIMEOUT)?;
    pipeline.part("place")?.wait(TIMEOUT)?.ok()?;
    assert_eq!(frozen.code(), 1, "{}", frozen.stderr);
    assert!(
        frozen.stderr.contains("another process has taken over"),
        "{}",
        frozen.stderr
    );
    program(&state, &pipeline.brokers, &["audit"])
        .spawn()?
        .wait(TIMEOUT)?
        .ok()?;
    let records = committed(&pipeline.brokers, TOPIC)?;
    let events = records
        .iter()
        .map(Event::read)
        .collect::<Result<Vec<_>>>()?;
    assert_eq!(check(&events, ORDERS), Vec::<String>::new());
    Ok(())
}

/// Processes of one stage share the partitions. One that joins, leaves or dies moves them to others in
/// the middle of their work.
#[test]
fn partitions_move_between_instances() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let state = tempfile::tempdir()?;
    let mut pipeline = Pipeline {
        brokers: kafka.address(),
        state: &state,
        running: BTreeMap::new(),
    };
    for part in ["inventory", "payment", "shipping", "place"] {
        pipeline.start(part)?;
    }
    await_effects(&state, "payment", 1)?;
    pipeline.start("payment again")?;
    pipeline
        .running
        .get_mut("payment again")
        .context("it")?
        .wait_for("working", TIMEOUT)?;
    await_effects(&state, "payment", 500)?;
    pipeline.part("payment")?.kill()?;
    pipeline.part("place")?.wait(TIMEOUT)?.ok()?;
    program(&state, &pipeline.brokers, &["audit"])
        .spawn()?
        .wait(TIMEOUT)?
        .ok()?;
    pipeline.part("payment again")?.terminate()?;
    let ended = pipeline.part("payment again")?.wait(TIMEOUT)?.ok()?;
    assert!(
        !ended.stdout.contains("payment: 0 events"),
        "it never had work: {}",
        ended.stdout
    );
    let records = committed(&pipeline.brokers, TOPIC)?;
    let events = records
        .iter()
        .map(Event::read)
        .collect::<Result<Vec<_>>>()?;
    assert_eq!(check(&events, ORDERS), Vec::<String>::new());
    Ok(())
}

/// Operators reset positions, and Kafka forgets those of a group without members after a week.
#[test]
fn positions_that_go_back_repeat_nothing() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let state = tempfile::tempdir()?;
    let run = || {
        program(&state, &kafka.address(), &["--orders", "300"])
            .spawn()?
            .wait(TIMEOUT)?
            .ok()
    };
    run()?;
    for stage in STAGES {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", kafka.address())
            .set("group.id", format!("order-pipeline-{stage}"))
            .create()?;
        let mut start = TopicPartitionList::new();
        let metadata = consumer.fetch_metadata(Some(TOPIC), TIMEOUT)?;
        for partition in metadata.topics()[0].partitions() {
            start.add_partition_offset(TOPIC, partition.id(), Offset::Offset(0))?;
        }
        // Refused as long as the group waits for its member to come back.
        let deadline = Instant::now() + TIMEOUT;
        while let Err(error) = consumer.commit(&start, CommitMode::Sync) {
            ensure!(Instant::now() < deadline, "{error}");
            thread::sleep(Duration::from_millis(200));
        }
    }
    let report = run()?.stdout;
    // 300 at inventory alone: the positions did go back.
    assert!(
        reported(&report, "effects not repeated after a crash") >= Some(300),
        "{report}"
    );
    let records = committed(&kafka.address(), TOPIC)?;
    let events = records
        .iter()
        .map(Event::read)
        .collect::<Result<Vec<_>>>()?;
    assert_eq!(check(&events, 600), Vec::<String>::new());
    Ok(())
}
