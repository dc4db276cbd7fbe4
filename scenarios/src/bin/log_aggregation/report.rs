//! What the user sees: progress while it runs (stderr), the report at the end (stdout).

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use rdkafka::Message;
use rdkafka::message::BorrowedMessage;
use serde_json::json;
use tokio::runtime::Handle;

use crate::aggregate::{self, Tally};
use crate::ingest::Progress;
use crate::kafka::{self, Kafka, Offsets, RUN};
use crate::search;
use crate::shutdown::Stop;
use crate::store::Store;

/// A bar on a terminal, a line now and then elsewhere.
pub struct Live {
    bar: Option<ProgressBar>,
    said: Instant,
}

impl Live {
    pub fn start() -> Live {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            let template = "{wide_bar} {pos}/{len} stored, {msg}, {per_sec}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar
        });
        Live {
            bar,
            said: Instant::now(),
        }
    }

    pub fn show(&mut self, entries: u64, tally: &Tally) {
        let Tally {
            stored,
            retries,
            dead_letters,
            ..
        } = tally;
        match &self.bar {
            Some(bar) => {
                bar.set_length(entries);
                bar.set_position(*stored);
                bar.set_message(format!("{dead_letters} dead letters, {retries} retries"));
            }
            None if self.said.elapsed() > Duration::from_secs(2) => {
                self.said = Instant::now();
                eprintln!("{entries} entries in, {stored} stored, {retries} retries");
            }
            None => {}
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Waits until the aggregators have dealt with all that is on the topic. False if it is told to stop, or if
/// the time is up.
pub fn wait_settled(
    kafka: &Kafka,
    store: &Store,
    deadline: Option<Instant>,
    stop: &Stop,
    mut each: impl FnMut(),
) -> bool {
    loop {
        let begun = Instant::now();
        match behind(kafka, store) {
            Ok(0) => return true,
            Ok(_) => {}
            // Kafka may be away for a moment.
            Err(error) => tracing::debug!("cannot tell how far the aggregators are: {error:#}"),
        }
        // Looking costs about as much as reading the backlog.
        let pause = (begun.elapsed() * 2).max(Duration::from_millis(100));
        let until = Instant::now() + pause;
        while Instant::now() < until {
            each();
            let late = deadline.is_some_and(|deadline| Instant::now() > deadline);
            if late || stop.within(Duration::from_millis(20)) {
                return false;
            }
        }
    }
}

/// How many entries are on the topic behind the group's position. Offsets alone do not tell: the ends of
/// transactions have some too.
fn behind(kafka: &Kafka, store: &Store) -> Result<u64> {
    let committed = kafka.committed(&aggregate::group(store))?;
    let mut behind = 0;
    kafka.read_to_end(&kafka.topics.logs, &committed, |_| behind += 1)?;
    Ok(behind)
}

/// Compares topic and store, and prints what there is. True if nothing is lost and nothing doubled.
pub fn judge(
    kafka: &Kafka,
    store: &Store,
    progress: Option<&Progress>,
    tally: Option<&Tally>,
    runtime: &Handle,
) -> Result<bool> {
    let run = progress.map(|progress| progress.run.as_str());
    let ours = |record: &BorrowedMessage<'_>| {
        let Some(run) = run else { return true };
        kafka::readable(record.headers())
            .any(|header| header.key == RUN && header.value == Some(run.as_bytes()))
    };
    let count = |topic: &str, starts: &Offsets| {
        let mut count = 0;
        kafka
            .read_to_end(topic, starts, |record| count += u64::from(ours(record)))
            .map(|()| count)
    };
    let everywhere = Offsets::new();
    let starts = progress.map_or(&everywhere, |progress| &progress.starts);
    let on_topic = count(&kafka.topics.logs, starts)?;
    let dead = count(&kafka.topics.dead_letters, &everywhere)?;
    let stored = runtime.block_on(store.count(run))?;
    let query = match run {
        Some(run) => json!({ "term": { "ingested.run": run } }),
        None => json!({ "match_all": {} }),
    };
    let (_, services) = runtime.block_on(search::table(store, &query))?;

    println!();
    let line = |what: &str, n: u64| println!("{what:<44} {n:>9}");
    if let Some(progress) = progress {
        line("lines read", progress.lines);
        line("of these unparsed, kept as they are", progress.unparsed);
    }
    line("entries on the topic", on_topic);
    line("documents in the store", stored);
    line("dead letters", dead);
    if let Some(tally) = tally {
        line("bulk requests because a batch was full", tally.by_size);
        line("bulk requests because the time was up", tally.by_time);
        line("entries stored again after a crash", tally.replaced);
        line("attempts that the store put off", tally.retries);
        line("times that the partitions were paused", tally.pauses);
    }
    println!();
    search::print_table(&services);
    println!();
    let attempted = progress.map_or(on_topic, |progress| progress.entries);
    let found = stored + dead;
    let lost = attempted.saturating_sub(found);
    let duplicate = found.saturating_sub(attempted);
    println!(
        "{attempted} attempted / {on_topic} acked / 0 indeterminate / {stored} stored / {dead} dead letters / \
         {duplicate} duplicate / {lost} lost"
    );
    Ok(attempted == on_topic && lost == 0 && duplicate == 0)
}
