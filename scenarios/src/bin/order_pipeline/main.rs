//! Order pipeline: four stages, a saga and dead letters on Kafka, each order handled exactly once.
//!
//! ```text
//!                      order-pipeline.orders (key: user_id)
//!  place ── created ──▶ inventory ── inventory_reserved ──▶ payment ── paid ──▶ shipping ── shipped
//!                         │     ▲                             │
//!                      rejected └─────────── declined ────────┘
//!                         │
//!                     cancelled (the stock is back by then)
//! ```
//!
//! Each stage is a consumer group of its own and can be a process of its own. SIGKILL any of them, or
//! Kafka, at any moment: started again, every order still reaches exactly one final state, a
//! `read_committed` reader sees each status once and each user's orders in order, and stock, charges
//! and shipments add up. How:
//!
//! - In Kafka, a stage writes what follows from a batch and its own position in one transaction. A
//!   batch is up to 500 records or 20 ms: a transaction has a price, an order's share must be small.
//! - Kafka's transaction ends at Kafka. The effects (stock, charge, parcel) are in SQLite, one file per
//!   service, under the order's id, together with the decision and the record that asked for it. They
//!   come first. After a crash between the two the record comes again, the effect does not, and the
//!   event is written that was decided then. A *different* record for the same order is a duplicate.
//! - Any error that a stage does not understand means: throw the clients away and begin a new session.
//!   `init_transactions` makes the broker settle what was open, the positions say where to go on.
//! - `place` writes how far it has got in the same transaction as the orders, so it can be killed too.
//! - What nobody can read goes to `order-pipeline.orders.dlq`, with the reason in the headers,
//!   and the rest goes on.
//!
//! Read on in this order: `event`, `kafka`, `books`, `stage`, then a service such as `inventory`, then
//! `place` and `audit`.
//!
//! ```console
//! $ cargo lab run order_pipeline
//! run [..]
//!
//! orders in                                 1000
//! shipped                                    [..]
//! cancelled                                  [..]
//! rejected                                   [..]
//! dead letters                                 0
//! ...
//! step                        orders    p50 ms    p99 ms
//! ...
//! end to end                    1000 [..]
//! ...
//! [..] orders/s [..]
//! bound by [..]
//! ...
//! 1000 attempted / 1000 acked / 0 indeterminate / 1000 final / 0 duplicate / 0 lost / 0 unexpected
//! ```
//!
//! The same in five terminals: `order_pipeline inventory`, `payment`, `shipping`, then `place`, then
//! `audit`. Exit code 0 means that every order is final and nothing is wrong.
//!
//! Notice: nothing here is committed after the fact or in the background. The positions move inside of
//! the transactions (`enable.auto.commit` is off), and start at `earliest`: a group that starts at
//! `latest` loses what came before its first commit. Money is an integer; 0.1 + 0.2 of an `f64` is not 0.3.
//!
//! Try: `cargo lab kill order_pipeline.2`, or another stage, in the middle of
//! `order_pipeline place --orders 50000`, and start it again. `cargo lab kill kafka`, then
//! `cargo lab restart kafka`. Start a second `payment`: the first one says that it was replaced and
//! ends; with `--instance 1` they share the work instead. Place your own orders with
//! `--from orders.jsonl`, one `{"order_id":"1","user_id":"ann","amount":1250}` per line, and make a line
//! wrong. See unloaded latency with `--rate 100`. Kill a stage and leave it dead: the others wait for
//! its open transaction until the broker aborts it, after `transaction.timeout.ms`.
//!
//! What is not promised: a kill leaves the page cache, so this proves survival of a process crash, not
//! of a power loss (Kafka needs replicas for that). Every process of a service must use the same books,
//! and a payment provider must know the order id as its idempotency key, as SQLite does here.
//!
//! Throughput is bound by the slowest stage, which waits for its Kafka transaction before it begins the
//! next batch: the report says which one and how long. Larger batches help: on two cores, release build,
//! 50000 orders, `--batch 500` gave 3500 to 6400 orders/s in two runs, `--batch 2000` 8100 in one.
//! Orders that are placed all at once queue up, so the report's times are mostly queueing; with
//! `--rate 200` an order took about 110 ms (p50) from `created` to `shipped`.
//!
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG (info); `order_pipeline --help` for the rest.

mod audit;
mod books;
mod event;
mod inventory;
mod kafka;
mod payment;
mod place;
mod report;
mod shipping;
mod shutdown;
mod source;
mod stage;
mod state;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use clap::{Args, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::audit::History;
use crate::inventory::{Inventory, STOCK};
use crate::kafka::Kafka;
use crate::payment::Payment;
use crate::place::{Place, Placing, What};
use crate::report::{Here, Live};
use crate::shipping::Shipping;
use crate::shutdown::Stop;
use crate::stage::{Batching, Meter, Service, Stage};
use crate::state::State;

/// Takes orders through inventory, payment and shipping on Kafka, with exactly-once effect.
///
/// Without a command it does everything in this one process: places the orders, runs the three
/// stages, waits until every order is final, and audits the result.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    what: What,
    #[command(flatten)]
    inventory: InventoryArgs,
    #[command(flatten)]
    common: Common,
    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
}

#[derive(Subcommand)]
enum Command {
    /// Places orders, each exactly once, and ends
    Place {
        #[command(flatten)]
        what: What,
        #[command(flatten)]
        common: Common,
    },
    /// Reserves stock for new orders, and releases it when payment declines
    Inventory {
        #[command(flatten)]
        inventory: InventoryArgs,
        #[command(flatten)]
        common: Common,
    },
    /// Charges for reserved orders
    Payment {
        #[command(flatten)]
        stage: StageArgs,
        #[command(flatten)]
        common: Common,
    },
    /// Ships paid orders
    Shipping {
        #[command(flatten)]
        stage: StageArgs,
        #[command(flatten)]
        common: Common,
    },
    /// Waits until every order is final, and checks events and books
    Audit {
        /// Only the orders of this run
        #[arg(long, value_name = "ID")]
        run: Option<String>,
        /// How many seconds to wait for the orders that are not final
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        timeout: u64,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Args)]
struct Common {
    /// Folder of the books, with one sub-folder per Kafka cluster [default: the user's local data]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// How many partitions the topics get when they are made
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(i32).range(1..))]
    partitions: i32,
    /// How many seconds a start waits for Kafka [default: 8, or 60 if it was there minutes ago]
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u64>,
}

#[derive(Args)]
struct StageArgs {
    /// Tells apart several processes of one stage: they share its partitions
    #[arg(long, default_value_t = 0)]
    instance: u32,
    #[command(flatten)]
    batching: Batching,
}

#[derive(Args)]
struct InventoryArgs {
    /// Pieces there are of an item that is new
    #[arg(long, default_value_t = STOCK, value_parser = clap::value_parser!(i64).range(0..))]
    stock: i64,
    #[command(flatten)]
    stage: StageArgs,
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match start(Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("order_pipeline: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// True if all went as it should.
fn start(cli: Cli) -> Result<bool> {
    let stop = &Stop::on_signals()?;
    match cli.command {
        None => everything(&cli, stop),
        Some(Command::Place { what, common }) => {
            let (kafka, state) = common.open(stop)?;
            let placing = Placing::default();
            let place = Place {
                kafka: &kafka,
                state: &state,
                what: &what,
                placing: &placing,
                stop,
            };
            let progress = place.run()?;
            println!(
                "run {}: {} orders placed, {} dead letters, {} duplicates suppressed{}",
                progress.run,
                progress.placed,
                progress.dead,
                progress.suppressed,
                if progress.done { "" } else { ", not complete" }
            );
            Ok(progress.done)
        }
        Some(Command::Inventory { inventory, common }) => run_stage(
            Inventory {
                stock: inventory.stock,
            },
            &inventory.stage,
            &common,
            stop,
        ),
        Some(Command::Payment { stage, common }) => run_stage(Payment, &stage, &common, stop),
        Some(Command::Shipping { stage, common }) => run_stage(Shipping, &stage, &common, stop),
        Some(Command::Audit {
            run,
            timeout,
            common,
        }) => {
            let (kafka, state) = common.open(stop)?;
            let timeout = Duration::from_secs(timeout);
            let (history, ledger) = audit::wait_and_judge(&kafka, &state, run, timeout, stop)?;
            Ok(report::print(
                &history,
                &ledger,
                audit::suppressed(&state),
                None,
            ))
        }
    }
}

impl Common {
    fn open(&self, stop: &Stop) -> Result<(Kafka, PathBuf)> {
        let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
        let state = State::new(self.state.as_deref())?;
        // A part that is started again while Kafka itself restarts must not give up on it: a broker
        // that was killed needs some ten seconds until it may take its own place.
        let wait = self
            .wait
            .unwrap_or(if state.used_lately(&brokers) { 60 } else { 8 });
        let kafka = Kafka::connect(&brokers, self.partitions, Duration::from_secs(wait), stop)?;
        let folder = state.folder(&brokers, &kafka.cluster)?;
        Ok((kafka, folder))
    }
}

fn run_stage<S: Service>(
    service: S,
    args: &StageArgs,
    common: &Common,
    stop: &Stop,
) -> Result<bool> {
    let (kafka, state) = common.open(stop)?;
    let meter = Meter::default();
    println!("{}: working, Ctrl-C ends it", S::NAME);
    stage(service, &kafka, &state, args, &meter, stop).run()?;
    let times = meter.times();
    println!(
        "{}: {} events in {} transactions",
        S::NAME,
        times.events,
        times.transactions
    );
    Ok(true)
}

fn stage<'a, S: Service>(
    service: S,
    kafka: &'a Kafka,
    state: &'a Path,
    args: &StageArgs,
    meter: &'a Meter,
    stop: &'a Stop,
) -> Stage<'a, S> {
    let (instance, batching) = (args.instance, args.batching);
    Stage {
        service,
        kafka,
        state,
        instance,
        batching,
        meter,
        stop,
    }
}

/// The whole pipeline in one process, with each part on a thread of its own.
fn everything(cli: &Cli, stop: &Stop) -> Result<bool> {
    let (kafka, state) = cli.common.open(stop)?;
    let before = audit::suppressed(&state);
    let args = &cli.inventory.stage;
    let placing = Placing::default();
    let meters: &[Meter; 3] = &Default::default();
    let deadline = cli
        .timeout
        .map(|seconds| Instant::now() + Duration::from_secs(seconds));

    // Whoever ends with an error takes the others along.
    let or_stop = |result: Result<()>| {
        if result.is_err() {
            stop.set();
        }
        result
    };
    let watched = thread::scope(|threads| -> Result<(History, bool)> {
        let place = Place {
            kafka: &kafka,
            state: &state,
            what: &cli.what,
            placing: &placing,
            stop,
        };
        let inventory = Inventory {
            stock: cli.inventory.stock,
        };
        let inventory = stage(inventory, &kafka, &state, args, &meters[0], stop);
        let payment = stage(Payment, &kafka, &state, args, &meters[1], stop);
        let shipping = stage(Shipping, &kafka, &state, args, &meters[2], stop);
        let parts = [
            threads.spawn(move || {
                await_stages(meters, stop);
                or_stop(place.run().map(drop))
            }),
            threads.spawn(move || or_stop(inventory.run())),
            threads.spawn(move || or_stop(payment.run())),
            threads.spawn(move || or_stop(shipping.run())),
        ];
        let watched = follow(cli, &kafka, &placing, deadline, stop);
        stop.set();
        for part in parts {
            part.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        watched
    });
    let (live, complete) = watched?;
    let placed = placing.get();
    if !complete {
        let open = placed.placed.saturating_sub(live.finals);
        println!(
            "interrupted: {open} of {} orders are not final; run it again to go on",
            placed.placed
        );
        return Ok(false);
    }
    // Not ours, which have all ended: that of a stage or of a `place` elsewhere, or of one that was killed just now.
    let deadline = Instant::now() + Duration::from_secs(20);
    audit::await_settled(&kafka, deadline, &Stop::default())?;
    let (history, ledger) = audit::judge(&kafka, &state, Some(placed.run.clone()), &placed.starts)?;
    let after = audit::suppressed(&state);
    let names = ["inventory", "payment", "shipping"];
    let stages = names
        .into_iter()
        .zip(meters.iter().map(Meter::times))
        .collect();
    println!("run {}", placed.run);
    let here = Here { placed, stages };
    Ok(report::print(
        &history,
        &ledger,
        (after.0 - before.0, after.1 - before.1),
        Some(&here),
    ))
}

/// Waits until the stages have joined their groups, which on a new broker takes seconds: they belong to
/// no order. Not for ever, as other processes may hold all partitions.
fn await_stages(meters: &[Meter], stop: &Stop) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline && meters.iter().any(|meter| !meter.times().assigned) {
        if stop.within(Duration::from_millis(10)) {
            return;
        }
    }
}

/// Shows progress until every order of the run is final.
fn follow(
    cli: &Cli,
    kafka: &Kafka,
    placing: &Placing,
    deadline: Option<Instant>,
    stop: &Stop,
) -> Result<(History, bool)> {
    // The run's name is known as soon as its place in the progress topic is.
    let run = loop {
        let progress = placing.get();
        if !progress.run.is_empty() {
            break progress;
        }
        if stop.within(Duration::from_millis(10)) {
            return Ok((History::default(), false));
        }
    };
    let mut live = Live::start(cli.what.from.is_none().then_some(cli.what.orders));
    let mut timed_out = false;
    let (history, enough) = audit::watch(kafka, Some(run.run), &run.starts, stop, |history, _| {
        let placed = placing.get();
        live.show(placed.placed, history);
        timed_out = deadline.is_some_and(|deadline| Instant::now() > deadline);
        timed_out || placed.done && history.finals >= placed.placed
    })?;
    Ok((history, enough && !timed_out))
}
