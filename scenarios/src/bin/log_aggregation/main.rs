//! Log aggregation: real log files through Kafka into OpenSearch or Elasticsearch, each line once.
//!
//! ```text
//!  services ┐
//!           ├─▶ logs (key: service) ──▶ aggregator ──▶ _bulk: 100 entries or 1 s ──▶ logs-2026.11.24
//!  ingest ──┘                               │
//!                                       logs.dlq (what the store refuses, with its reason)
//! ```
//!
//! SIGKILL any part, Kafka or the store, at any moment: started again, every line is one document. How:
//!
//! - `ingest` writes how far it has read a file in the same Kafka transaction as the entries, and goes on
//!   there. It knows a file again by its inode and its beginning, also when it was renamed by a rotation.
//! - A document's id is topic-partition-offset, so what is stored again replaces itself.
//! - The aggregator commits a position when the store has answered for everything before it. Committed
//!   before, as by auto commit, it would lose what a crash finds in memory.
//! - 429, 5xx and a store that does not answer: the same documents again, with backoff. Partitions are
//!   paused meanwhile, and polled, so the group keeps the member. A document that the store refuses goes
//!   to `logs.dlq`, in one transaction with the position, and the rest goes on.
//! - Both triggers count: 100 entries, or one second after the first of fewer.
//!
//! No line is dropped. JSON Lines and the access logs of Apache and nginx are recognised line by line; the
//! rest is kept whole as level `UNPARSED`, at the time of the line before. Bytes that are no UTF-8 become
//! U+FFFD in the text, and the line's very bytes are in `ingested.raw_base64`. A line over 1 MiB is kept in
//! parts.
//!
//! ```console
//! $ cargo lab run log_aggregation
//! store: opensearch [..]
//! run [..]
//!
//! lines read                                        2000
//! of these unparsed, kept as they are                  0
//! entries on the topic                              2000
//! documents in the store                            2000
//! dead letters                                         0
//! ...
//! service                      total     ERROR      WARN      INFO     DEBUG
//! api [..]
//! inventory [..]
//! payment [..]
//! shipping [..]
//!
//! 2000 attempted / 2000 acked / 0 indeterminate / 2000 stored / 0 dead letters / 0 duplicate / 0 lost
//! $ cargo lab run log_aggregation search 'level:ERROR AND service:payment' --last 15m --show 1
//! [..] entries for level:ERROR AND service:payment in the last 15m
//!
//! service                      total     ERROR
//! payment [..]
//!
//! level over time, [..] in a column
//! ERROR [..]
//! ...
//! [..] ERROR    payment      order [..] failed: connection reset after [..] ms
//! ```
//!
//! Your own logs: `log_aggregation ingest access.log`, `--follow` for one that grows and is rotated or cut
//! short, `-` for standard input. In several terminals: `log_aggregation aggregate`, as many as there are
//! partitions, then `ingest FILE --produce-only`, then `audit`. `bench` measures. Exit code 0 means that
//! topic and store agree.
//!
//! Notice: the mapping is explicit, and an index is a day by the *event's* time. `time`, `msg`, `log.level` and
//! the like become `timestamp`, `message`, `level`; the other fields of a JSON line are below `fields`, with all
//! their digits, and not indexed.
//!
//! Try: `ingest` a large file, find it in `cargo lab status`, `cargo lab kill log_aggregation.1`, and
//! start it again. `cargo lab kill opensearch`, look at the log, `cargo lab restart opensearch`. Write
//! garbage to `logs` with another producer.
//!
//! What is not promised: a kill leaves the page cache, so this is survival of a process crash, not of a power
//! loss. If a file is rotated twice while nobody reads it, the one in the middle must be ingested by name.
//! What is cut from a file before it was read is gone, and so is what is written to a rotated one after two
//! quiet seconds. Without `--follow`, a last line that is half written is a line. Standard input is read anew each time, unless it has
//! a `--name` and is piped in again from its beginning. A topic that is deleted and made again begins at
//! offset 0, and its entries would replace the old documents: give them another `--index`. (Another Kafka
//! cluster is noticed.)
//!
//! Settings: KAFKA_BROKERS (localhost:9092), ELASTICSEARCH_URL (http://localhost:9200, may have a user and
//! password), RUST_LOG (info); `log_aggregation --help` for the rest. See also: docs/log-aggregation.md.

mod aggregate;
mod bench;
mod entry;
mod ingest;
mod kafka;
mod report;
mod search;
mod shutdown;
mod source;
mod store;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use clap::{Args, Parser, Subcommand};
use tokio::runtime::Runtime;
use tracing_subscriber::EnvFilter;

use crate::aggregate::{Aggregator, Batching, Meter};
use crate::bench::Bench;
use crate::ingest::{Ingest, Ingested, Progress, What};
use crate::kafka::Kafka;
use crate::report::Live;
use crate::shutdown::Stop;
use crate::store::Store;

/// How long Ctrl-C waits for a store that takes nothing.
const PATIENCE: Duration = Duration::from_secs(10);

/// Brings logs through Kafka into OpenSearch or Elasticsearch, each line once.
///
/// Without a command it makes up the logs of four services, stores them, and reports.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// How many entries to make up
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..))]
    entries: u64,
    /// The made-up entries follow from this number
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Entries per second, as fast as possible by default
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    rate: Option<u64>,
    #[command(flatten)]
    run: Run,
}

#[derive(Subcommand)]
enum Command {
    /// Ingests a log file, or standard input, and stores it
    Ingest {
        /// The file; `-` for standard input
        file: PathBuf,
        /// Go on when the file grows, is rotated or cut short, until Ctrl-C
        #[arg(long)]
        follow: bool,
        /// The service of lines that name none [default: the file's name without extension]
        #[arg(long, value_name = "NAME")]
        service: Option<String>,
        /// Names standard input, so that it can be piped in again after an interruption
        #[arg(long)]
        name: Option<String>,
        /// Read it from its beginning, whatever was ingested of it before
        #[arg(long)]
        anew: bool,
        #[command(flatten)]
        run: Run,
    },
    /// Stores what is on the topic, until Ctrl-C
    Aggregate {
        #[command(flatten)]
        args: AggregateArgs,
        #[command(flatten)]
        common: Common,
    },
    /// Searches what is stored, in the store's query language: 'level:ERROR AND service:payment'
    Search {
        query: String,
        /// Only what was logged lately: 30s, 15m, 2h, 7d
        #[arg(long, value_name = "TIME")]
        last: Option<String>,
        /// How many entries to show, the newest first
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(..=1000))]
        show: u32,
        #[command(flatten)]
        place: Place,
    },
    /// Waits until all that is on the topic is stored, and compares the two
    Audit {
        /// How many seconds to wait
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        timeout: u64,
        #[command(flatten)]
        common: Common,
    },
    /// Measures the way through Kafka beside the way straight into the store
    Bench {
        #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..))]
        entries: u64,
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
        rounds: u32,
        #[command(flatten)]
        batching: Batching,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Args)]
struct Run {
    /// Write to Kafka only, and leave the storing to `log_aggregation aggregate`
    #[arg(long)]
    produce_only: bool,
    #[command(flatten)]
    aggregate: AggregateArgs,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct AggregateArgs {
    /// A name under which a restarted aggregator has its partitions back at once
    #[arg(long, value_name = "NAME")]
    instance: Option<String>,
    #[command(flatten)]
    batching: Batching,
}

#[derive(Args)]
struct Place {
    /// Indices are named after this and the day
    #[arg(long, default_value = "logs")]
    index: String,
    /// How many seconds a start waits for Kafka and the store
    #[arg(long, value_name = "SECONDS", default_value_t = 8)]
    wait: u64,
}

#[derive(Args)]
struct Common {
    #[arg(long, default_value = "logs")]
    topic: String,
    /// How many partitions the topic gets when it is made
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(i32).range(1..))]
    partitions: i32,
    #[command(flatten)]
    place: Place,
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
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// True if all went as it should.
fn start(cli: Cli) -> Result<bool> {
    let stop = &Stop::on_signals()?;
    let runtime = &tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    match cli.command {
        None => {
            let what = What::Generated {
                entries: cli.entries,
                seed: cli.seed,
                rate: cli.rate,
            };
            pipeline(&what, false, &cli.run, stop, runtime)
        }
        Some(Command::Ingest {
            file,
            follow,
            service,
            name,
            anew,
            run,
        }) => {
            let what = if file.as_os_str() == "-" {
                What::Stdin { name, service }
            } else {
                What::File {
                    path: file,
                    service,
                    follow,
                }
            };
            pipeline(&what, anew, &run, stop, runtime)
        }
        Some(Command::Aggregate { args, common }) => {
            let kafka = common.kafka(stop)?;
            let store = common.store(&kafka, stop, runtime)?;
            let meter = Meter::default();
            println!("aggregator: working, Ctrl-C ends it");
            aggregator(&kafka, &store, &args, &meter, stop, runtime).run()?;
            let tally = meter.get();
            println!(
                "aggregator: {} entries stored, {} of them again, {} dead letters, {} bulk requests",
                tally.stored,
                tally.replaced,
                tally.dead_letters,
                tally.by_size + tally.by_time
            );
            Ok(true)
        }
        Some(Command::Search {
            query,
            last,
            show,
            place,
        }) => {
            let store = place.store(stop, runtime)?;
            let search = search::search(&store, &query, last.as_deref(), show as usize);
            runtime.block_on(search)?;
            Ok(true)
        }
        Some(Command::Audit { timeout, common }) => {
            let kafka = common.kafka(stop)?;
            let store = common.store(&kafka, stop, runtime)?;
            let deadline = Instant::now() + Duration::from_secs(timeout);
            if !report::wait_settled(&kafka, &store, Some(deadline), stop, || {}) {
                println!("not all that is on the topic is stored; is an aggregator at work?");
            }
            report::judge(&kafka, &store, None, None, runtime.handle())
        }
        Some(Command::Bench {
            entries,
            rounds,
            batching,
            common,
        }) => {
            println!("store: {}", common.place.hello(stop, runtime)?);
            let bench = Bench {
                entries,
                rounds,
                batching,
                partitions: common.partitions,
                wait: Duration::from_secs(common.place.wait),
                stop,
                runtime: runtime.handle().clone(),
            };
            bench.run()
        }
    }
}

impl Common {
    fn kafka(&self, stop: &Stop) -> Result<Kafka> {
        let wait = Duration::from_secs(self.place.wait);
        Kafka::connect(&self.topic, self.partitions, wait, stop)
    }

    /// The store, ready to take entries of this cluster.
    fn store(&self, kafka: &Kafka, stop: &Stop, runtime: &Runtime) -> Result<Store> {
        let store = self.place.store(stop, runtime)?;
        runtime.block_on(store.prepare(&kafka.cluster))?;
        Ok(store)
    }
}

impl Place {
    fn store(&self, stop: &Stop, runtime: &Runtime) -> Result<Store> {
        self.hello(stop, runtime)?;
        Store::new(&self.index)
    }

    /// Waits for the store to be there, and says which it is.
    fn hello(&self, stop: &Stop, runtime: &Runtime) -> Result<String> {
        let store = Store::new(&self.index)?;
        let deadline = Instant::now() + Duration::from_secs(self.wait);
        loop {
            let error = match runtime.block_on(store.hello()) {
                Ok(hello) => return Ok(hello),
                Err(error) => error,
            };
            if Instant::now() > deadline || stop.within(Duration::from_millis(200)) {
                return Err(error.context(format!(
                    "no OpenSearch or Elasticsearch answers at {}. Start one with `cargo lab up opensearch`, \
                     or set ELASTICSEARCH_URL",
                    store.address()
                )));
            }
        }
    }
}

fn aggregator<'a>(
    kafka: &'a Kafka,
    store: &'a Store,
    args: &AggregateArgs,
    meter: &'a Meter,
    stop: &'a Stop,
    runtime: &Runtime,
) -> Aggregator<'a> {
    Aggregator {
        kafka,
        store,
        batching: args.batching,
        instance: args.instance.clone(),
        meter,
        stop,
        runtime: runtime.handle().clone(),
    }
}

/// Ingests, and unless told otherwise stores, in this one process.
fn pipeline(what: &What, anew: bool, run: &Run, stop: &Stop, runtime: &Runtime) -> Result<bool> {
    let kafka = &run.common.kafka(stop)?;
    let (meter, ingested) = (&Meter::default(), &Ingested::default());
    let ingest = Ingest {
        kafka,
        what,
        anew,
        ingested,
        stop,
    };
    let ends_by_itself = !matches!(what, What::File { follow: true, .. });
    if run.produce_only {
        let progress = ingest.run()?;
        println!("run {}", progress.run);
        println!("{}", summary(&progress));
        return Ok(progress.done || !ends_by_itself);
    }

    println!("store: {}", run.common.place.hello(stop, runtime)?);
    let store = &run.common.store(kafka, stop, runtime)?;
    let halt = &Stop::default();
    let aggregator = aggregator(kafka, store, &run.aggregate, meter, halt, runtime);
    let settled = thread::scope(|threads| -> Result<bool> {
        let aggregating = threads.spawn(move || aggregator.run());
        let ingesting = threads.spawn(move || {
            await_partitions(meter, stop);
            ingest.run()
        });
        let mut live = Live::start();
        let failed = || aggregating.is_finished();
        while !ingesting.is_finished() && !failed() {
            live.show(ingested.get().entries, &meter.get());
            thread::sleep(Duration::from_millis(20));
        }
        // Without an aggregator there is no use in ingesting more. With one, what is ingested gets stored, even
        // after Ctrl-C; a second Ctrl-C ends the process at once.
        if failed() {
            stop.set();
        }
        let ingest_result = ingesting.join().map_err(|_| anyhow!("a thread panicked"))?;
        let give_up = &Stop::default();
        let mut heard: Option<Instant> = None;
        let settled = report::wait_settled(kafka, store, None, give_up, || {
            let tally = meter.get();
            live.show(ingested.get().entries, &tally);
            if stop.is_set() {
                let heard = *heard.get_or_insert_with(|| {
                    tracing::info!("interrupted; what was ingested is being stored");
                    Instant::now()
                });
                // Without a store, or without Kafka, there would be no end to it.
                if tally.last.unwrap_or(heard).max(heard).elapsed() > PATIENCE {
                    give_up.set();
                }
            }
            if failed() || ingest_result.is_err() {
                give_up.set();
            }
        });
        halt.set();
        aggregating
            .join()
            .map_err(|_| anyhow!("a thread panicked"))??;
        ingest_result?;
        Ok(settled)
    })?;
    let progress = ingested.get();
    println!("run {}", progress.run);
    if !settled {
        println!(
            "interrupted: Kafka or the store is away, and {} of {} entries are stored; run it again to go on",
            meter.get().stored,
            progress.entries
        );
        return Ok(false);
    }
    if !progress.done && ends_by_itself {
        println!(
            "interrupted after {}; run it again to go on",
            summary(&progress)
        );
    }
    let balanced = report::judge(
        kafka,
        store,
        Some(&progress),
        Some(&meter.get()),
        runtime.handle(),
    )?;
    Ok(balanced && (progress.done || !ends_by_itself))
}

fn summary(progress: &Progress) -> String {
    format!(
        "{} lines, {} entries, {} of them unparsed",
        progress.lines, progress.entries, progress.unparsed
    )
}

/// Waits until the aggregator has joined its group, which on a new broker takes seconds. Not for ever, as
/// other processes may hold all partitions.
fn await_partitions(meter: &Meter, stop: &Stop) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline && !meter.get().assigned {
        if stop.within(Duration::from_millis(10)) {
            return;
        }
    }
}
