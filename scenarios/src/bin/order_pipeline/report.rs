//! What the user sees: progress while it runs (stderr), the report at the end (stdout).

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::audit::{History, Ledger};
use crate::event::Status;
use crate::place::Progress;
use crate::stage::Times;

/// A bar on a terminal, a line now and then elsewhere.
pub struct Live {
    bar: Option<ProgressBar>,
    said: Instant,
}

impl Live {
    pub fn start(orders: Option<u64>) -> Live {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = orders.map_or_else(ProgressBar::no_length, ProgressBar::new);
            let template = "{wide_bar} {pos}/{len} final, {msg}, {per_sec}";
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

    pub fn show(&mut self, placed: u64, history: &History) {
        let paid = history.count(Status::Paid);
        let reserved = history.count(Status::InventoryReserved);
        match &self.bar {
            Some(bar) => {
                bar.set_position(history.finals);
                bar.set_message(format!("{placed} placed, {reserved} reserved, {paid} paid"));
            }
            None if self.said.elapsed() > Duration::from_secs(2) => {
                self.said = Instant::now();
                let finals = history.finals;
                eprintln!("{placed} placed, {reserved} reserved, {paid} paid, {finals} final");
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

/// What is known beside the events, where one process did it all.
pub struct Here {
    pub placed: Progress,
    pub stages: Vec<(&'static str, Times)>,
}

/// Prints the report. True if there is nothing wrong.
pub fn print(
    history: &History,
    ledger: &Ledger,
    (duplicates, replays): (u64, u64),
    here: Option<&Here>,
) -> bool {
    let attempted = here.map_or(history.orders(), |here| here.placed.placed);
    let suppressed = here.map_or(0, |here| here.placed.suppressed) + duplicates;
    println!();
    for (what, n) in [
        ("orders in", attempted),
        ("shipped", history.count(Status::Shipped)),
        ("cancelled", history.count(Status::Cancelled)),
        ("rejected", history.count(Status::Rejected)),
        ("dead letters", ledger.dead_letters),
        ("duplicate orders suppressed", suppressed),
        ("effects not repeated after a crash", replays),
    ] {
        println!("{what:<36} {n:>9}");
    }
    println!("{:<36} {:>9}", "charged", money(ledger.charged));
    println!("{:<36} {:>9}", "pieces of stock taken", ledger.reserved);

    println!();
    println!(
        "{:<24} {:>9} {:>9} {:>9}",
        "step", "orders", "p50 ms", "p99 ms"
    );
    for (step, status) in [
        ("inventory: reserved", Some(Status::InventoryReserved)),
        ("inventory: rejected", Some(Status::Rejected)),
        ("payment: paid", Some(Status::Paid)),
        ("declined: cancelled", Some(Status::Cancelled)),
        ("shipping: shipped", Some(Status::Shipped)),
        ("end to end", None),
    ] {
        let mut delays = history.delays.get(&status).cloned().unwrap_or_default();
        delays.sort_unstable();
        let at = |percent: usize| match delays.len() {
            0 => "-".to_owned(),
            n => format!(
                "{:.1}",
                f64::from(delays[(n * percent / 100).min(n - 1)]) / 1000.0
            ),
        };
        println!("{step:<24} {:>9} {:>9} {:>9}", delays.len(), at(50), at(99));
    }
    if let Some(here) = here {
        print_times(history, here);
    }

    println!();
    for problem in &history.problems.first {
        println!("WRONG: {problem}");
    }
    let lost = attempted.saturating_sub(history.orders()) + history.unfinished();
    let unexpected = history.problems.count - history.duplicate.min(history.problems.count);
    println!(
        "{attempted} attempted / {attempted} acked / 0 indeterminate / {} final / {} duplicate / {lost} lost / {unexpected} unexpected",
        history.finals, history.duplicate
    );
    history.problems.count == 0 && lost == 0 && history.finals == attempted
}

fn print_times(history: &History, here: &Here) {
    println!();
    println!(
        "{:<12} {:>13} {:>11} {:>9} {:>9} {:>9}",
        "stage", "transactions", "events/tx", "waiting", "books", "Kafka"
    );
    let share = |part: Duration, times: &Times| {
        let all = times.waiting + times.books + times.kafka;
        100.0 * part.as_secs_f64() / all.as_secs_f64().max(1e-9)
    };
    for (stage, times) in &here.stages {
        println!(
            "{stage:<12} {:>13} {:>11} {:>7.0} % {:>7.0} % {:>7.0} %",
            times.transactions,
            times.events / u64::from(times.transactions.max(1)),
            share(times.waiting, times),
            share(times.books, times),
            share(times.kafka, times),
        );
    }
    let Some(seconds) = history.seconds().filter(|seconds| *seconds > 0.0) else {
        return;
    };
    println!();
    println!(
        "{:.0} orders/s ({:.1} s)",
        history.finals as f64 / seconds,
        seconds
    );
    let busiest = here
        .stages
        .iter()
        .min_by(|(_, a), (_, b)| share(a.waiting, a).total_cmp(&share(b.waiting, b)));
    if let Some((stage, times)) = busiest {
        let per_transaction =
            |part: Duration| part.as_secs_f64() * 1000.0 / f64::from(times.transactions.max(1));
        let (kafka, books) = (per_transaction(times.kafka), per_transaction(times.books));
        let waiting = share(times.waiting, times);
        // In a short run each stage mostly waits for the one before it.
        if waiting > 50.0 {
            println!(
                "bound by no stage: the busiest, {stage}, waited {waiting:.0} % of the time; \
                 a transaction takes {kafka:.1} ms in Kafka and {books:.1} ms in its books. Try --orders 50000"
            );
        } else {
            println!(
                "bound by {stage}: a transaction takes {kafka:.1} ms in Kafka and {books:.1} ms in its books, \
                 and while one is written the next is not begun"
            );
        }
    }
}

fn money(minor: i64) -> String {
    format!("{}.{:02}", minor / 100, minor % 100)
}
