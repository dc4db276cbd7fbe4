//! Reads the books of a run, and judges them. It shares no code with the programs that it judges.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use rusqlite::{Connection, OpenFlags};
use serde_json::Value;

pub struct Books(Connection);

pub struct Placed {
    pub user: String,
    pub cents: i64,
    pub fails: u64,
}

#[derive(Clone)]
pub struct Effect {
    pub order: String,
    pub user: String,
    pub cents: i64,
}

impl Books {
    pub fn open(folder: &Path) -> Result<Books> {
        let file = folder.join("books.sqlite");
        let books = Connection::open_with_flags(&file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        books.busy_timeout(Duration::from_secs(30))?;
        Ok(Books(books))
    }

    pub fn run(&self) -> Result<String> {
        Ok(self
            .0
            .query_row("SELECT name FROM run", [], |row| row.get(0))?)
    }

    /// Ids rise with each order.
    pub fn placed(&self) -> Result<BTreeMap<String, Placed>> {
        let mut rows = self
            .0
            .prepare("SELECT payload FROM placed WHERE order_id IS NOT NULL AND sent")?;
        let payloads = rows.query_map([], |row| row.get::<_, String>(0))?;
        let mut placed = BTreeMap::new();
        for payload in payloads {
            let order: Value = serde_json::from_str(&payload?)?;
            let text = |field: &str| order[field].as_str().map(str::to_owned).context("a text");
            let (cents, fails) = (order["cents"].as_i64(), order["fails"].as_u64());
            let details = Placed {
                user: text("user")?,
                cents: cents.context("cents")?,
                fails: fails.context("fails")?,
            };
            placed.insert(text("id")?, details);
        }
        Ok(placed)
    }

    /// Of reserve, pay and ship, in the order in which they were made.
    pub fn effects(&self) -> Result<[Vec<Effect>; 3]> {
        let read = |table: &str| -> Result<Vec<Effect>> {
            let sql = format!("SELECT order_id, user, cents FROM {table} ORDER BY seq");
            let mut rows = self.0.prepare(&sql)?;
            let effects = rows.query_map([], |row| {
                Ok(Effect {
                    order: row.get(0)?,
                    user: row.get(1)?,
                    cents: row.get(2)?,
                })
            })?;
            Ok(effects.collect::<rusqlite::Result<_>>()?)
        };
        Ok([read("stock_taken")?, read("charges")?, read("parcels")?])
    }

    pub fn suppressed(&self) -> Result<usize> {
        let sql = "SELECT ifnull(sum(n), 0) FROM tally WHERE what = 'suppressed'";
        Ok(self.0.query_row(sql, [], |row| row.get::<_, u32>(0))? as usize)
    }
}

/// Of the orders that count, how many had their first effect after that of a later order of the same user.
pub fn overtaken(effects: &[Effect], counts: impl Fn(&str) -> bool) -> usize {
    let mut highest: HashMap<&str, Vec<&str>> = HashMap::new();
    let mut overtaken = 0;
    for effect in effects.iter().filter(|effect| counts(&effect.order)) {
        let seen = highest.entry(&effect.user).or_default();
        if seen.contains(&effect.order.as_str()) {
            continue;
        }
        overtaken += usize::from(seen.iter().any(|earlier| **earlier > *effect.order));
        seen.push(&effect.order);
    }
    overtaken
}

/// Who waited while a payment was tried again, by what the processes of `pay` have printed: nobody, if another order of
/// the same user was done meanwhile; the user, if only others of its partition were; or the partition.
pub fn waiting(
    processes: &[Vec<String>],
    placed: &BTreeMap<String, Placed>,
    homes: &HashMap<String, i32>,
) -> &'static str {
    let (mut same_user, mut neighbour) = (false, false);
    for lines in processes {
        // Orders that wait for their next attempt. What is open when the process dies tells nothing.
        let mut open: Vec<&str> = Vec::new();
        for line in lines {
            // A dead letter has no stage in front.
            let line = line.strip_prefix("pay: ").unwrap_or(line);
            let order = line.split(' ').next().unwrap_or_default();
            let Some(this) = placed.get(order) else {
                continue;
            };
            open.retain(|waiting| *waiting != order);
            if line.contains(" failed at attempt ") {
                open.push(order);
            } else if line.ends_with(" done") {
                for waiting in open.iter().map(|waiting| &placed[*waiting]) {
                    same_user |= waiting.user == this.user;
                    neighbour |=
                        waiting.user != this.user && homes[&waiting.user] == homes[&this.user];
                }
            }
        }
    }
    match (same_user, neighbour) {
        (true, _) => "nobody",
        (false, true) => "the user",
        (false, false) => "the partition",
    }
}

#[test]
fn overtaking_is_counted_by_first_effects() {
    let effects = |orders: &[(&str, &str)]| -> Vec<Effect> {
        let effect = |(order, user): &(&str, &str)| Effect {
            order: (*order).into(),
            user: (*user).into(),
            cents: 1,
        };
        orders.iter().map(effect).collect()
    };
    let sound = effects(&[("1", "a"), ("3", "b"), ("2", "a"), ("1", "a"), ("4", "b")]);
    assert_eq!(overtaken(&sound, |_| true), 0);
    let swapped = effects(&[("2", "a"), ("3", "b"), ("1", "a")]);
    assert_eq!(overtaken(&swapped, |_| true), 1);
    assert_eq!(overtaken(&swapped, |order| order != "1"), 0);
}

#[test]
fn who_waits_is_read_from_the_lines() {
    let user = |user: &str| Placed {
        user: user.into(),
        cents: 1,
        fails: 0,
    };
    let placed = BTreeMap::from(
        [("o1", "a"), ("o2", "a"), ("o3", "b"), ("o4", "c")]
            .map(|(id, name)| (id.to_owned(), user(name))),
    );
    let homes =
        HashMap::from([("a", 0), ("b", 0), ("c", 1)].map(|(name, home)| (name.to_owned(), home)));
    let lines = |orders: &[&str]| {
        let mut lines = vec!["pay: o1 failed at attempt 1, again in 90 ms".to_owned()];
        lines.extend(orders.iter().map(|order| format!("pay: {order} done")));
        vec![lines]
    };
    assert_eq!(
        waiting(&lines(&["o4", "o2", "o1"]), &placed, &homes),
        "nobody"
    );
    assert_eq!(
        waiting(&lines(&["o4", "o3", "o1", "o2"]), &placed, &homes),
        "the user"
    );
    assert_eq!(
        waiting(&lines(&["o4", "o1", "o2", "o3"]), &placed, &homes),
        "the partition"
    );
    let buried = vec![vec![
        "pay: o1 failed at attempt 4, again in 90 ms".to_owned(),
        "o1 is a dead letter after attempt 5: no answer".to_owned(),
        "pay: o2 done".to_owned(),
    ]];
    assert_eq!(waiting(&buried, &placed, &homes), "the partition");
}
