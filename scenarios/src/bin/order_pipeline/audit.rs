//! The audit: reads what happened as any `read_committed` consumer sees it, and believes nobody.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use rdkafka::Message;
use rdkafka::consumer::Consumer;
use rdkafka::error::KafkaError;
use rusqlite::Connection;

use crate::books::Books;
use crate::event::{self, AT, DEAD_LETTERS, ORDERS, Order, RUN, Status};
use crate::kafka::{self, Kafka, Starts};
use crate::shutdown::Stop;

/// What became of one order.
struct Track {
    user_id: String,
    amount: i64,
    has_item: bool,
    statuses: Vec<Status>,
    partition: i32,
    /// It is the user's nth order in its partition.
    rank: usize,
    created_at: Option<i64>,
    last_at: Option<i64>,
}

/// Everything that a reader of the orders' topic has seen, and what was wrong with it.
#[derive(Default)]
pub struct History {
    run: Option<String>,
    orders: HashMap<String, Track>,
    /// Per user and partition and status: the rank of the newest order.
    newest: HashMap<(String, i32, Status), usize>,
    pub reached: BTreeMap<Status, u64>,
    pub finals: u64,
    pub duplicate: u64,
    /// Where malformed records lie: each must have its dead letter.
    malformed: HashSet<(i32, i64)>,
    pub problems: Problems,
    /// Microseconds from the status before, and for `None` from the first to the last.
    pub delays: HashMap<Option<Status>, Vec<u32>>,
    first_at: Option<i64>,
    last_at: Option<i64>,
}

/// Counts all, keeps the first few to show.
#[derive(Default)]
pub struct Problems {
    pub count: u64,
    pub first: Vec<String>,
}

impl Problems {
    fn add(&mut self, problem: String) {
        self.count += 1;
        if self.first.len() < 20 {
            self.first.push(problem);
        }
    }
}

/// One event as it matters here.
pub struct Seen<'a> {
    pub order: &'a Order,
    pub partition: i32,
    pub at: Option<i64>,
}

impl History {
    pub fn of_run(run: Option<String>) -> History {
        History {
            run,
            ..History::default()
        }
    }

    pub fn orders(&self) -> u64 {
        self.orders.len() as u64
    }

    pub fn count(&self, status: Status) -> u64 {
        self.reached.get(&status).copied().unwrap_or(0)
    }

    /// Seconds from the first order to the last event.
    pub fn seconds(&self) -> Option<f64> {
        Some((self.last_at? - self.first_at?) as f64 / 1e6)
    }

    pub fn record(&mut self, record: &impl Message<Headers = impl rdkafka::message::Headers>) {
        if self.run.is_some() && event::header(record.headers(), RUN) != self.run.as_deref() {
            return;
        }
        match Order::from_record(record) {
            // Others write to the topic too, and may write an order twice, which the stages suppress.
            // `place` never does, and all that it writes names its run.
            Ok(order)
                if order.status == Status::Created
                    && event::header(record.headers(), RUN).is_none()
                    && self.orders.contains_key(&order.order_id) => {}
            Ok(order) => self.observe(&Seen {
                order: &order,
                partition: record.partition(),
                at: event::header(record.headers(), AT).and_then(|at| at.parse().ok()),
            }),
            Err(_) => {
                self.malformed.insert((record.partition(), record.offset()));
            }
        }
    }

    pub fn observe(&mut self, seen: &Seen<'_>) {
        let Seen {
            order,
            partition,
            at,
        } = seen;
        let (id, status) = (&order.order_id, order.status);
        let key = |status| (order.user_id.clone(), *partition, status);
        if !self.orders.contains_key(id) {
            let newest = self.newest.entry(key(Status::Created)).or_default();
            *newest += 1;
            let track = Track {
                user_id: order.user_id.clone(),
                amount: order.amount,
                has_item: order.item.is_some(),
                statuses: Vec::with_capacity(4),
                partition: *partition,
                rank: *newest,
                created_at: *at,
                last_at: None,
            };
            self.orders.insert(id.clone(), track);
        }
        let Some(track) = self.orders.get_mut(id) else {
            return;
        };
        if track.statuses.contains(&status) {
            self.duplicate += 1;
            self.problems.add(format!("{id}: {status} twice"));
            return;
        }
        let before = track.statuses.last().copied();
        let legal = match status {
            Status::Created => before.is_none(),
            Status::InventoryReserved | Status::Rejected => before == Some(Status::Created),
            Status::Paid | Status::Cancelled => before == Some(Status::InventoryReserved),
            Status::Shipped => before == Some(Status::Paid),
            Status::PaymentDeclined => false,
        };
        if !legal {
            let before = before.map_or("nothing", Status::name);
            self.problems.add(format!("{id}: {status} after {before}"));
        }
        if (&track.user_id, track.amount, track.partition)
            != (&order.user_id, order.amount, *partition)
        {
            self.problems.add(format!(
                "{id}: {status} has another user, amount or partition"
            ));
        }
        // A user's orders reach each status in the order in which they were created.
        if status != Status::Created {
            let newest = self.newest.entry(key(status)).or_default();
            if track.rank <= *newest {
                self.problems
                    .add(format!("{id}: {status} out of order for {}", track.user_id));
            }
            *newest = track.rank.max(*newest);
        }
        if let (Some(before), Some(now)) = (track.last_at, *at) {
            let delay = |since: i64| u32::try_from(now - since).unwrap_or(0);
            self.delays
                .entry(Some(status))
                .or_default()
                .push(delay(before));
            if let (true, Some(created)) = (status.is_final(), track.created_at) {
                self.delays.entry(None).or_default().push(delay(created));
            }
        }
        track.statuses.push(status);
        track.last_at = *at;
        self.first_at = self.first_at.into_iter().chain(*at).min();
        self.last_at = self.last_at.max(*at);
        *self.reached.entry(status).or_default() += 1;
        self.finals += u64::from(status.is_final());
    }

    /// Orders without a final state.
    pub fn unfinished(&self) -> u64 {
        self.orders
            .values()
            .filter(|t| !t.statuses.iter().any(|s| s.is_final()))
            .count() as u64
    }

    /// What only shows at the end.
    fn close(&mut self) {
        for (id, track) in &self.orders {
            match track
                .statuses
                .iter()
                .filter(|status| status.is_final())
                .count()
            {
                1 => {}
                0 => self.problems.add(format!(
                    "{id}: not final, last seen {}",
                    track
                        .statuses
                        .last()
                        .map_or("never", |status| status.name())
                )),
                n => self.problems.add(format!("{id}: {n} final states")),
            }
        }
    }
}

/// Follows the orders' topic until `enough` says so, or it is told to stop. Returns whether it was enough.
pub fn watch(
    kafka: &Kafka,
    run: Option<String>,
    starts: &Starts,
    stop: &Stop,
    mut enough: impl FnMut(&History, bool) -> bool,
) -> Result<(History, bool)> {
    let reader = kafka.reader(ORDERS, starts)?;
    let mut unread: HashSet<i32> = reader
        .assignment()?
        .elements()
        .iter()
        .map(|e| e.partition())
        .collect();
    let mut history = History::of_run(run);
    let done = loop {
        let next = reader.poll(Duration::from_millis(50));
        let quiet = next.is_none();
        match next {
            Some(Ok(record)) => history.record(&record),
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                unread.remove(&partition);
            }
            Some(Err(error)) if !kafka::is_passing(&error) => return Err(error.into()),
            Some(Err(_)) | None => {}
        }
        if enough(&history, quiet && unread.is_empty()) {
            break true;
        }
        if stop.is_set() {
            break false;
        }
    };
    kafka::retire(reader);
    Ok((history, done))
}

/// The verdict: a second reading, from where the run began to the end, and the books beside it.
pub fn judge(
    kafka: &Kafka,
    state: &Path,
    run: Option<String>,
    starts: &Starts,
) -> Result<(History, Ledger)> {
    let all = run.is_none();
    let mut history = History::of_run(run);
    kafka.read_to_end(ORDERS, starts, |record| history.record(record))?;
    history.close();
    let mut ledger = Ledger::read(state, &mut history, all)?;
    kafka.read_to_end(DEAD_LETTERS, &Starts::new(), |record| {
        let header = |key| event::header(record.headers(), key);
        if history.run.is_some() && header(RUN) != history.run.as_deref() {
            return;
        }
        ledger.dead_letters += 1;
        if header("topic") == Some(ORDERS) {
            let place = header("partition").zip(header("offset"));
            let place = place.and_then(|(p, o)| Some((p.parse().ok()?, o.parse().ok()?)));
            if !place.is_some_and(|place| history.malformed.remove(&place)) {
                history.problems.add(format!(
                    "dead letter {place:?}: twice, or of a sound record"
                ));
            }
        }
    })?;
    for (partition, offset) in std::mem::take(&mut history.malformed) {
        history.problems.add(format!(
            "{ORDERS}/{partition} offset {offset}: malformed, no dead letter"
        ));
    }
    if !kafka.is_settled(ORDERS)? {
        history
            .problems
            .add(format!("a transaction on {ORDERS} is open"));
    }
    Ok((history, ledger))
}

/// What the books say, beside what the events said.
#[derive(Default)]
pub struct Ledger {
    pub dead_letters: u64,
    pub charged: i64,
    pub reserved: i64,
}

impl Ledger {
    /// Compares the books with `history`. Rows without an event can only be found in `all` of them.
    fn read(state: &Path, history: &mut History, all: bool) -> Result<Ledger> {
        let mut ledger = Ledger::default();
        if history.orders.is_empty() {
            return Ok(ledger);
        }
        let problems = &mut history.problems;

        let inventory = Books::inspect(state, "inventory")?;
        let wrong: Vec<_> = rows(
            &inventory,
            "SELECT stock.item, initial - on_hand - ifnull(sum(quantity) FILTER (WHERE NOT released), 0) AS off
             FROM stock LEFT JOIN reservations USING (item) GROUP BY stock.item HAVING off <> 0",
            |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?)),
        )?;
        for (item, off) in wrong {
            problems.add(format!("stock of {item} is off by {off}"));
        }
        let reservations: HashMap<String, (bool, i64)> = rows(
            &inventory,
            "SELECT order_id, released, quantity FROM reservations",
            |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?))),
        )?;
        let payment = Books::inspect(state, "payment")?;
        let charges: HashMap<String, i64> =
            rows(&payment, "SELECT order_id, amount FROM charges", |row| {
                Ok((row.get(0)?, row.get(1)?))
            })?;
        let shipping = Books::inspect(state, "shipping")?;
        let shipments: HashSet<String> =
            rows(&shipping, "SELECT order_id FROM shipments", |row| {
                row.get(0)
            })?;

        for (id, track) in &history.orders {
            let has = |status| track.statuses.contains(&status);
            let reserved = has(Status::InventoryReserved) && track.has_item;
            let expected = reserved.then(|| has(Status::Cancelled));
            let found = reservations.get(id).map(|(released, _)| *released);
            if found != expected {
                problems.add(format!(
                    "{id}: stock released {found:?}, events say {expected:?}"
                ));
            }
            let expected = has(Status::Paid).then_some(track.amount);
            let found = charges.get(id).copied();
            if found != expected {
                problems.add(format!("{id}: charged {found:?}, events say {expected:?}"));
            }
            if shipments.contains(id) != has(Status::Shipped) {
                problems.add(format!("{id}: books and events disagree on the shipment"));
            }
            ledger.charged += found.unwrap_or(0);
            if let Some((false, quantity)) = reservations.get(id) {
                ledger.reserved += quantity;
            }
        }
        if all {
            let booked = reservations.keys().chain(charges.keys()).chain(&shipments);
            for id in booked.filter(|id| !history.orders.contains_key(*id)) {
                problems.add(format!("{id}: in the books, but not on {ORDERS}"));
            }
        }
        Ok(ledger)
    }
}

fn rows<T, C: FromIterator<T>>(
    db: &Connection,
    sql: &str,
    row: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
) -> Result<C> {
    Ok(db
        .prepare(sql)?
        .query_map([], row)?
        .collect::<rusqlite::Result<C>>()?)
}

/// What the stages held back, over the life of these books: records that another had preceded, and
/// effects that a record which came again would have repeated.
pub fn suppressed(state: &Path) -> (u64, u64) {
    let count = |sql: &str| {
        ["inventory", "payment", "shipping"]
            .iter()
            .filter_map(|service| Books::inspect(state, service).ok())
            .filter_map(|db| db.query_row(sql, [], |row| row.get::<_, i64>(0)).ok())
            .filter_map(|n| u64::try_from(n).ok())
            .sum()
    };
    (
        count("SELECT count(*) FROM duplicate_events"),
        count("SELECT ifnull(sum(n), 0) FROM replays"),
    )
}

/// `order_pipeline audit`: waits until every order is final, then judges.
pub fn wait_and_judge(
    kafka: &Kafka,
    state: &Path,
    run: Option<String>,
    timeout: Duration,
    stop: &Stop,
) -> Result<(History, Ledger)> {
    let deadline = Instant::now() + timeout;
    let starts = Starts::new();
    watch(kafka, run.clone(), &starts, stop, |history, at_end| {
        at_end && history.finals >= history.orders() || Instant::now() > deadline
    })?;
    await_settled(kafka, deadline, stop)?;
    judge(kafka, state, run, &starts)
}

/// Waits until no transaction is open: the one of a process that was killed is, until the broker aborts it.
pub fn await_settled(kafka: &Kafka, deadline: Instant, stop: &Stop) -> Result<()> {
    while !kafka.is_settled(ORDERS)? {
        if Instant::now() > deadline || stop.within(Duration::from_millis(200)) {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(events: &[(&str, &str, &str)]) -> Vec<String> {
        let mut history = History::default();
        for (id, user, status) in events {
            let json = format!(
                r#"{{"order_id":"{id}","user_id":"{user}","amount":5,"status":"{status}"}}"#
            );
            let order = Order::from_topic(ORDERS, Some(json.as_bytes())).unwrap();
            history.observe(&Seen {
                order: &order,
                partition: 0,
                at: None,
            });
        }
        history.close();
        history.problems.first
    }

    const GOOD: [(&str, &str, &str); 7] = [
        ("1", "u", "created"),
        ("2", "u", "created"),
        ("1", "u", "inventory_reserved"),
        ("2", "u", "inventory_reserved"),
        ("1", "u", "paid"),
        ("2", "u", "cancelled"),
        ("1", "u", "shipped"),
    ];

    #[test]
    fn a_sound_history_passes() {
        assert_eq!(problems(&GOOD), Vec::<String>::new());
    }

    #[test]
    fn each_lost_event_is_found() {
        for (lost, event) in GOOD.iter().enumerate() {
            let mut events = GOOD.to_vec();
            events.remove(lost);
            assert!(!problems(&events).is_empty(), "{event:?}");
        }
    }

    #[test]
    fn each_repeated_event_is_found() {
        for (index, event) in GOOD.iter().enumerate() {
            let mut events = GOOD.to_vec();
            events.insert(index + 1, *event);
            assert!(problems(&events).join(" ").contains("twice"), "{event:?}");
        }
    }

    #[test]
    fn swapped_events_of_a_user_are_found() {
        let mut events = GOOD.to_vec();
        events.swap(2, 3);
        assert!(problems(&events).join(" ").contains("out of order"));
    }
}
