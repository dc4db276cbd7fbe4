//! How fast entries get from a file through Kafka into the store, beside what the store can take.
//!
//! The limit is the same lines, parsed alike and sent in bulk requests of the same size, as many at a time,
//! straight from the file: what is left is the price of Kafka and of the aggregator. It is a command of its
//! own, since it wants a quiet machine and a store of which it may delete indices.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use chrono::Utc;
use serde_json::json;
use tokio::runtime::Handle;
use tokio::task::JoinSet;

use crate::aggregate::{Aggregator, Batching, Document, Meter};
use crate::entry::{Entry, Origin};
use crate::ingest::{Ingest, Ingested, What, new_run};
use crate::kafka::Kafka;
use crate::report;
use crate::shutdown::Stop;
use crate::store::{Answer, Store, Verdict};

/// How many documents a large bulk request has, to see what the small ones cost.
const LARGE: u32 = 1000;

pub struct Bench<'a> {
    pub entries: u64,
    pub rounds: u32,
    pub batching: Batching,
    pub partitions: i32,
    pub wait: Duration,
    pub stop: &'a Stop,
    pub runtime: Handle,
}

impl Bench<'_> {
    pub fn run(&self) -> Result<bool> {
        let file = std::env::temp_dir().join(format!("log_aggregation-{}.jsonl", new_run()));
        write_lines(&file, self.entries)?;
        let rates = self.rounds_of(&file);
        let removed = std::fs::remove_file(&file);
        let rates = rates?;
        removed.with_context(|| format!("cannot delete {}", file.display()))?;
        let Some([limit, large, through]) = rates else {
            return Ok(false);
        };
        let Batching {
            batch, in_flight, ..
        } = self.batching;
        println!();
        println!(
            "{} entries, {} rounds in turn, medians, {in_flight} bulk requests at a time",
            self.entries, self.rounds
        );
        println!("{:<52} {:>11} {:>7}", "way", "entries/s", "ratio");
        for (way, rate) in [
            (format!("file -> store, {batch} in a request"), limit),
            (format!("file -> store, {LARGE} in a request"), large),
            (
                format!("file -> Kafka -> store, {batch} in a request"),
                through,
            ),
        ] {
            println!("{way:<52} {rate:>11.0} {:>7.2}", rate / limit);
        }
        Ok(true)
    }

    /// The medians of the three ways; None if it was interrupted.
    fn rounds_of(&self, file: &Path) -> Result<Option<[f64; 3]>> {
        let mut rates: [Vec<f64>; 3] = Default::default();
        for round in 0..self.rounds {
            // Nothing is measured on a store that has just started or on indices that others use.
            let store = Store::new(&format!("bench-r{}", new_run().replace('-', "_")))?;
            let large = Batching {
                batch: LARGE,
                ..self.batching
            };
            let through = Store::new(&format!("{}-through", store.index))?;
            let measured: Result<Option<[Duration; 3]>> = (|| {
                self.runtime.block_on(store.prepare("none"))?;
                let straight = self.straight(file, &store, self.batching)?;
                let large = self.straight(file, &store, large)?;
                let through = self.through(file, &through)?;
                Ok(through.map(|through| [straight, large, through]))
            })();
            // Also after Ctrl-C or an error, which is the one to report then.
            let cleared = self.runtime.block_on(async {
                store.clear().await?;
                through.clear().await
            });
            let Some(took) = measured? else {
                return Ok(None);
            };
            cleared?;
            let mut said = String::new();
            for (rates, took) in rates.iter_mut().zip(took) {
                let rate = self.entries as f64 / took.as_secs_f64();
                rates.push(rate);
                said += &format!(" {rate:.0}");
            }
            println!("round {}:{said} entries/s", round + 1);
            if self.stop.is_set() {
                return Ok(None);
            }
        }
        Ok(Some(rates.map(|mut rates| {
            rates.sort_by(f64::total_cmp);
            rates[rates.len() / 2]
        })))
    }

    /// Straight from the file into the store.
    fn straight(&self, file: &Path, store: &Store, batching: Batching) -> Result<Duration> {
        let begun = Instant::now();
        let day = Utc::now().format("%Y.%m.%d");
        let index = format!("{}-{day}", store.index);
        let lines = BufReader::new(File::open(file)?);
        let mut requests = JoinSet::new();
        let mut body = Vec::new();
        let mut in_body = 0;
        for (number, line) in lines.split(b'\n').enumerate() {
            let origin = Origin {
                run: "bench",
                source: "bench",
                line: number as u64 + 1,
                part: None,
                service: "bench",
                time: Utc::now().fixed_offset(),
            };
            let document = Document {
                index: index.clone(),
                id: format!("{}-{number}", batching.batch),
                source: Entry::from_line(&line?, origin).json.into_bytes(),
            };
            document.write(&mut body);
            in_body += 1;
            if in_body == batching.batch {
                if requests.len() >= batching.in_flight as usize {
                    self.runtime.block_on(answered(&mut requests))?;
                }
                let body = std::mem::take(&mut body);
                requests.spawn_on(load(store.clone(), body), &self.runtime);
                in_body = 0;
            }
        }
        if !body.is_empty() {
            requests.spawn_on(load(store.clone(), body), &self.runtime);
        }
        while !requests.is_empty() {
            self.runtime.block_on(answered(&mut requests))?;
        }
        Ok(begun.elapsed())
    }

    /// Through Kafka, with an aggregator that is ready when the file is opened.
    fn through(&self, file: &Path, store: &Store) -> Result<Option<Duration>> {
        let kafka = Kafka::connect(&store.index, self.partitions, self.wait, self.stop)?;
        self.runtime.block_on(store.prepare(&kafka.cluster))?;
        let (halt, meter, ingested) = (Stop::default(), Meter::default(), Ingested::default());
        let what = What::File {
            path: PathBuf::from(file),
            service: None,
            follow: false,
        };
        let aggregator = Aggregator {
            kafka: &kafka,
            store,
            batching: self.batching,
            instance: None,
            meter: &meter,
            stop: &halt,
            runtime: self.runtime.clone(),
        };
        let ingest = Ingest {
            kafka: &kafka,
            what: &what,
            anew: false,
            ingested: &ingested,
            stop: self.stop,
        };
        let measured = thread::scope(|threads| -> Result<Option<Duration>> {
            let aggregating = threads.spawn(|| aggregator.run());
            let measured = (|| {
                while !meter.get().assigned {
                    if aggregating.is_finished() {
                        bail!("the aggregator has ended");
                    }
                    if self.stop.within(Duration::from_millis(5)) {
                        return Ok(None);
                    }
                }
                let begun = Instant::now();
                ingest.run()?;
                let settled = report::wait_settled(&kafka, store, None, self.stop, || {});
                let last = meter.get().last;
                Ok(settled.then(|| last.map(|last| last - begun)).flatten())
            })();
            halt.set();
            aggregating
                .join()
                .map_err(|_| anyhow!("a thread panicked"))??;
            measured
        });
        let deleted = kafka.delete_topics();
        let took = measured?;
        deleted?;
        let stored = self.runtime.block_on(store.count(None))?;
        if took.is_some() && stored != self.entries {
            bail!("{stored} documents of {} entries", self.entries);
        }
        Ok(took)
    }
}

async fn load(store: Store, body: Vec<u8>) -> Result<()> {
    match store.bulk(body).await? {
        Answer::Verdicts(verdicts) => {
            for verdict in verdicts {
                match verdict {
                    Verdict::Stored { .. } => {}
                    Verdict::Later(reason) | Verdict::Refused(reason) => bail!("{reason}"),
                }
            }
            Ok(())
        }
        Answer::Later(reason) | Answer::Refused(reason) => bail!("{reason}"),
    }
}

async fn answered(requests: &mut JoinSet<Result<()>>) -> Result<()> {
    match requests.join_next().await {
        Some(done) => done?,
        None => Ok(()),
    }
}

fn write_lines(path: &Path, entries: u64) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        for number in 0..entries {
            let service = ["api", "inventory", "payment", "shipping"][number as usize % 4];
            let line = json!({
                "timestamp": Utc::now().to_rfc3339(),
                "service": service,
                "level": if number % 50 == 0 { "ERROR" } else { "INFO" },
                "message": format!("order {number} handled in {} ms by worker {}", number % 700, number % 16),
            });
            writeln!(file, "{line}")?;
        }
        file.flush()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
