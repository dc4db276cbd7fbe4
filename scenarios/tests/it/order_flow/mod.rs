//! The order flow on four brokers: the same orders, the same faults, and one table of what came of it.

mod books;
mod observer;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use compose::harness::{Example, Running, TIMEOUT, broker_absent};
use compose::{Broker, Service};
use tempfile::TempDir;

use books::Books;
use observer::{DeadLetter, Observer};

const ORDERS: u32 = 160;
const SEED: &str = "7";

const SERVICES: [(Service, &str, &str); 4] = [
    (
        Service::Kafka,
        "Kafka",
        env!("CARGO_BIN_EXE_order_flow_kafka"),
    ),
    (
        Service::RabbitMq,
        "RabbitMQ",
        env!("CARGO_BIN_EXE_order_flow_rabbitmq"),
    ),
    (
        Service::Nats,
        "NATS JetStream",
        env!("CARGO_BIN_EXE_order_flow_nats"),
    ),
    (
        Service::Pulsar,
        "Pulsar",
        env!("CARGO_BIN_EXE_order_flow_pulsar"),
    ),
];

/// An event that is not even text.
const GARBAGE: [u8; 3] = [0xff, 0x00, 0xfe];
/// As large as NATS and Kafka take it, so that they do not take it with the headers of a dead letter.
static LARGE: [u8; 1_048_450] = [b'x'; 1_048_450];

#[test]
fn without_a_broker_there_is_one_readable_error() -> Result<()> {
    thread::scope(|threads| {
        let ended = SERVICES
            .map(|(service, _, program)| threads.spawn(move || broker_absent(service, &[program])));
        ended.into_iter().try_for_each(|one| {
            one.join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

/// The table in the book is the one that this test makes. `ORDER_FLOW_TABLE=write` puts it there.
#[test]
fn four_brokers_under_the_same_faults() -> Result<()> {
    let results = thread::scope(|threads| {
        // At once: most of their time is waiting, for a broker that comes back and for delays before another attempt.
        let columns = SERVICES.map(|(service, name, program)| {
            threads.spawn(move || column(service, program).with_context(|| name.to_owned()))
        });
        columns.map(|column| {
            column
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    });
    let columns = results.into_iter().collect::<Result<Vec<_>>>()?;
    let table = table(&columns);
    println!("{table}");
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/order-flow.md");
    let text = fs::read_to_string(&page).with_context(|| page.display().to_string())?;
    let (before, rest) = text
        .split_once("<!-- table -->\n")
        .context("no table in the chapter")?;
    let (old, after) = rest
        .split_once("<!-- /table -->")
        .context("no end of the table")?;
    if std::env::var("ORDER_FLOW_TABLE").is_ok_and(|value| value == "write") {
        fs::write(
            &page,
            format!("{before}<!-- table -->\n\n{table}\n<!-- /table -->{after}"),
        )?;
    } else {
        let what = "docs/order-flow.md; `ORDER_FLOW_TABLE=write cargo test -p scenarios four_brokers` brings it up to date";
        assert_eq!(old.trim(), table.trim(), "{what}");
    }
    Ok(())
}

/// What an example says of its shop: all behind the line that introduces it.
fn shop(program: &str) -> Result<String> {
    let name = Path::new(program).file_name().context("a name")?;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/bin");
    let text = fs::read_to_string(folder.join(name).with_extension("rs"))?;
    let (_, shop) = text
        .split_once("// The shop. From here on")
        .context("no shop in the file")?;
    Ok(shop.to_owned())
}

/// A `diff` of two of the files shows what differs between two brokers, and nothing else.
#[test]
fn the_shop_is_the_same_in_all_four() -> Result<()> {
    let [first, others @ ..] = &SERVICES;
    let expected = shop(first.2)?;
    for (_, name, program) in others {
        assert_eq!(shop(program)?, expected, "{name}");
    }
    Ok(())
}

/// One broker's column of the table.
struct Column {
    careless: Judgement,
    careful: Judgement,
}

fn column(service: Service, program: &str) -> Result<Column> {
    let begun = Instant::now();
    let broker = Broker::private(service)?;
    ends_with_a_closed_pipe(&broker, program)?;
    let careless = Drive::new(&broker, program, false)?
        .run()
        .context("without idempotency")?;
    let careful = Drive::new(&broker, program, true)?
        .run()
        .context("with idempotency")?;
    eprintln!("{service}: {:.0} s", begun.elapsed().as_secs_f64());

    // What the headers claim. Effects were doubled without the marks, or the zeros with them would prove nothing.
    assert!(
        careless.doubled > 0,
        "{service}: no fault fell between an effect and its acknowledgement"
    );
    for (what, judgement) in [("without", &careless), ("with", &careful)] {
        assert_eq!(
            judgement.lost,
            BTreeSet::new(),
            "{service} {what} idempotency: lost"
        );
        assert_eq!(
            judgement.overtaken,
            [0, 0, 0],
            "{service} {what}: order per user, payments tried again aside"
        );
    }
    assert_eq!(careful.doubled, 0, "{service}: doubled");
    assert!(
        careful.suppressed > 0,
        "{service}: no duplicate was suppressed"
    );
    let (kept, waiting) = match service {
        Service::Kafka => (true, "the user"),
        Service::Nats => (true, "the partition"),
        _ => (false, "nobody"),
    };
    assert_eq!(
        careful.overtaken_by_retry == 0,
        kept,
        "{service}: {}",
        careful.overtaken_by_retry
    );
    assert_eq!(careful.waiting, waiting, "{service}");
    Ok(Column { careless, careful })
}

/// `order_flow_… | head -1`, with all stages in one process and with one alone: at the latest with the next line.
fn ends_with_a_closed_pipe(broker: &Broker, program: &str) -> Result<()> {
    let data = tempfile::tempdir()?;
    for stage in ["", "place"] {
        let pipe = Example::new("/bin/sh")
            .args([
                "-c",
                r#""$0" $STAGE --data "$DATA" --orders 100000 | head -1"#,
            ])
            .args([program])
            .env("STAGE", stage)
            .env("DATA", data.path().join(format!("data{stage}")));
        let ended = pipe.broker(broker).spawn()?.wait(TIMEOUT)?;
        ensure!(ended.stdout.lines().count() == 1, "{ended:?}");
        ensure!(ended.stderr.contains("Broken pipe"), "{ended:?}");
    }
    Ok(())
}

fn table(columns: &[Column]) -> String {
    let more = |n: usize| if n == 0 { "0" } else { "> 0" }.to_owned();
    let kept = |n: usize| if n == 0 { "kept" } else { "**overtaken**" }.to_owned();
    type Cell<'a> = &'a dyn Fn(&Column) -> String;
    let rows: [(&str, Cell<'_>); 8] = [
        ("without idempotency: orders lost", &|one| {
            one.careless.lost.len().to_string()
        }),
        ("without idempotency: effects doubled", &|one| {
            more(one.careless.doubled)
        }),
        ("with idempotency: orders lost", &|one| {
            one.careful.lost.len().to_string()
        }),
        ("with idempotency: effects doubled", &|one| {
            one.careful.doubled.to_string()
        }),
        ("with idempotency: duplicates suppressed", &|one| {
            more(one.careful.suppressed)
        }),
        ("order per user, after crashes", &|one| {
            kept(one.careful.overtaken.iter().sum())
        }),
        ("order per user, payment tried again", &|one| {
            kept(one.careful.overtaken_by_retry)
        }),
        ("waits for a payment that is tried again", &|one| {
            one.careful.waiting.to_owned()
        }),
    ];
    let mut text = String::from("| |");
    for (_, name, _) in SERVICES {
        text += &format!(" {name} |");
    }
    text += "\n|---|---|---|---|---|\n";
    for (what, cell) in rows {
        text += &format!("| {what} |");
        for column in columns {
            text += &format!(" {} |", cell(column));
        }
        text.push('\n');
    }
    text
}

/// What came of a run.
struct Judgement {
    lost: BTreeSet<String>,
    doubled: usize,
    suppressed: usize,
    /// Per stage, how many orders were overtaken by a later one of their user, payments that were tried again aside.
    overtaken: [usize; 3],
    /// How many payments that were tried again were overtaken.
    overtaken_by_retry: usize,
    /// Who waited for a payment that was tried again.
    waiting: &'static str,
}

/// One run of the four stages, each a process of its own, under the faults.
struct Drive<'a> {
    broker: &'a Broker,
    program: &'a str,
    data: TempDir,
    idempotent: bool,
    /// What each `pay` process has printed.
    paid: Vec<Vec<String>>,
}

impl Drive<'_> {
    fn new<'a>(broker: &'a Broker, program: &'a str, idempotent: bool) -> Result<Drive<'a>> {
        let data = tempfile::tempdir()?;
        Ok(Drive {
            broker,
            program,
            data,
            idempotent,
            paid: Vec::new(),
        })
    }

    fn start(&self, stage: &str, more: &[&str]) -> Result<Running> {
        let data = self.data.path().display().to_string();
        let mut args = vec![stage, "--data", &data, "--seed", SEED];
        if !self.idempotent {
            args.push("--without-idempotency");
        }
        args.extend(more);
        let mut running = Example::new(self.program)
            .args(args)
            .broker(self.broker)
            .spawn()?;
        if !matches!(stage, "place" | "report") {
            running.wait_for("working", TIMEOUT)?;
        }
        Ok(running)
    }

    /// It dies where it was told to, and is started again, as a service manager would do it.
    fn start_again(
        &self,
        mut dead: Running,
        stage: &str,
        more: &[&str],
    ) -> Result<(Running, Vec<String>)> {
        let ended = dead.wait(TIMEOUT)?;
        ensure!(ended.code() == 134, "{stage} has not aborted: {ended:?}");
        Ok((self.start(stage, more)?, dead.lines()))
    }

    fn run(mut self) -> Result<Judgement> {
        let reserve = self.start("reserve", &["--crash", "effect:20"])?;
        let pay = self.start("pay", &["--crash", "told:15"])?;
        let mut ship = self.start("ship", &[])?;
        let half = (ORDERS / 2).to_string();
        let mut place = self.start("place", &["--orders", &half])?;

        // Between effect and event, and between event and acknowledgement; twice each.
        let (reserve, _) = self.start_again(reserve, "reserve", &["--crash", "told:20"])?;
        let (pay, lines) = self.start_again(pay, "pay", &["--crash", "effect:15"])?;
        self.paid.push(lines);
        let (mut reserve, _) = self.start_again(reserve, "reserve", &[])?;
        let (mut pay, lines) = self.start_again(pay, "pay", &[])?;
        self.paid.push(lines);
        // Wherever it is.
        for _ in 0..20 {
            ship.wait_for("done", TIMEOUT)?;
        }
        ship.kill()?;
        let mut ship = self.start("ship", &[])?;
        place.wait(TIMEOUT)?.ok()?;

        // The broker dies in the middle of the second half. The stages ride it out.
        let books = Books::open(self.data.path())?;
        let observer = Observer::new(self.broker, books.run()?);
        observer.place(&GARBAGE)?;
        observer.place(&LARGE)?;
        let all = ORDERS.to_string();
        let mut place = self.start("place", &["--orders", &all])?;
        place.wait_for(&format!("order-{:04} placed", ORDERS * 5 / 8), TIMEOUT)?;
        self.broker.kill(1)?;
        self.broker.restart(1)?;
        place.wait(TIMEOUT)?.ok()?;

        let mut report = self.start("report", &["--orders", &all, "--timeout", "170"])?;
        let report = report.wait(TIMEOUT)?;
        // It judges for itself, and must come to the same result as this test.
        ensure!(report.code() == i32::from(!self.idempotent), "{report:?}");
        let verdict = if self.idempotent {
            "the books balance"
        } else {
            "the books do not balance"
        };
        ensure!(report.stdout.contains(verdict), "{report:?}");
        for (name, stage) in [
            ("reserve", &mut reserve),
            ("pay", &mut pay),
            ("ship", &mut ship),
        ] {
            stage.terminate()?;
            let ended = stage.wait(TIMEOUT)?.ok().with_context(|| name.to_owned())?;
            ensure!(ended.stdout.ends_with("stopped\n"), "{ended:?}");
        }
        self.paid.push(pay.lines());
        observer.await_nothing_left()?;
        self.judge(&books, &observer)
    }

    fn judge(&self, books: &Books, observer: &Observer) -> Result<Judgement> {
        let placed = books.placed()?;
        ensure!(placed.len() == ORDERS as usize, "{} orders", placed.len());
        let dead = observer.dead_letters()?;
        check_dead_letters(&dead, books)?;
        let dead: BTreeSet<String> = dead.iter().filter_map(DeadLetter::order).collect();

        let [stock, charges, parcels] = books.effects()?;
        let ids = |effects: &[books::Effect]| -> BTreeSet<String> {
            effects.iter().map(|effect| effect.order.clone()).collect()
        };
        let mut lost: BTreeSet<String> = placed.keys().cloned().collect();
        ensure!(ids(&stock).is_subset(&lost), "an order from nowhere");
        lost.retain(|order| !dead.contains(order) && !ids(&parcels).contains(order));
        // Shipped is what was paid, and paid what was not buried; all of it is taken from the stock.
        ensure!(ids(&parcels) == ids(&charges), "parcels and charges differ");
        ensure!(ids(&charges).is_disjoint(&dead), "paid and buried");
        lost.extend(
            placed
                .keys()
                .filter(|order| !ids(&stock).contains(*order))
                .cloned(),
        );
        let stages = [&stock, &charges, &parcels];
        let doubled = stages
            .iter()
            .map(|effects| effects.len() - ids(effects).len())
            .sum();
        if self.idempotent {
            let sum =
                |effects: &[books::Effect]| effects.iter().map(|effect| effect.cents).sum::<i64>();
            let owed = placed.iter().filter(|(order, _)| !dead.contains(*order));
            let owed: i64 = owed.map(|(_, order)| order.cents).sum();
            ensure!(sum(&charges) == owed, "charged {} of {owed}", sum(&charges));
        }

        let again = |order: &str| placed[order].fails > 0;
        let smooth = stages.map(|effects| books::overtaken(effects, |order| !again(order)));
        let tried = books::overtaken(&charges, |_| true) + books::overtaken(&parcels, |_| true);
        let homes = observer.homes(&placed)?;
        Ok(Judgement {
            lost,
            doubled,
            suppressed: books.suppressed()?,
            overtaken: smooth,
            overtaken_by_retry: tried,
            waiting: books::waiting(&self.paid, &placed, &homes),
        })
    }
}

/// Cause, attempts and origin, for exactly those orders whose payment fails for ever, and for what is no order.
fn check_dead_letters(dead: &[DeadLetter], books: &Books) -> Result<()> {
    let placed = books.placed()?;
    let hopeless: BTreeSet<String> = placed
        .iter()
        .filter(|(_, order)| order.fails > 5)
        .map(|(id, _)| id.clone())
        .collect();
    ensure!(!hopeless.is_empty(), "this seed has no hopeless order");
    let orders: BTreeSet<String> = dead.iter().filter_map(DeadLetter::order).collect();
    ensure!(
        orders == hopeless,
        "dead: {orders:?}, hopeless: {hopeless:?}"
    );
    let (mut garbage, mut large) = (false, false);
    for letter in dead {
        garbage |= letter.payload == GARBAGE;
        large |= letter.payload == LARGE[..256 * 1024] && letter.cause.contains("1048450 bytes");
        let (cause, event) = match letter.order() {
            Some(_) => ("the gateway does not answer", "reserved"),
            None => ("not an order: ", "placed"),
        };
        ensure!(letter.cause.starts_with(cause), "{letter:?}");
        ensure!(letter.origin.contains(event), "{letter:?}");
        // A delivery that ended in a crash may count as an attempt.
        let enough = if letter.order().is_some() { 5 } else { 1 };
        ensure!(letter.attempts >= enough, "{letter:?}");
    }
    ensure!(garbage, "the garbage is not among the dead letters");
    ensure!(large, "the large event is not among the dead letters");
    Ok(())
}
