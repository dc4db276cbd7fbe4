//! The user service: creates users, and publishes what happened to them.
//!
//! A user and his event are written in one transaction, to a table from which the event is then published (an
//! outbox). Published first, an event could tell of a user who does not exist; written first and published
//! from memory, a crash between the two would lose the event.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use chrono::{SubsecRound, Utc};
use futures::{StreamExt, stream};
use rusqlite::{OptionalExtension, params};

use crate::books::Books;
use crate::bus::Bus;
use crate::event::{Event, User, VERSION};
use crate::shutdown::Stop;

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS runs (
        run TEXT PRIMARY KEY, number INTEGER NOT NULL, users INTEGER NOT NULL, done INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS users (user_id TEXT PRIMARY KEY, email TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS outbox (
        number INTEGER PRIMARY KEY, user_id TEXT NOT NULL, kind TEXT NOT NULL, event TEXT NOT NULL,
        published INTEGER NOT NULL
    );
    -- To which stream the run's events went, by its time of creation; empty for core NATS.
    CREATE TABLE IF NOT EXISTS streams (run TEXT PRIMARY KEY, stream TEXT NOT NULL) WITHOUT ROWID;
";
/// How many events are on their way to the stream at the same time.
const WINDOW: usize = 64;
/// Every so many users change their address.
const MOVER: u64 = 5;

#[derive(Clone, clap::Args)]
pub struct What {
    /// How many users to create
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub users: u64,
    /// Users per second, as fast as possible by default
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub rate: Option<u64>,
}

#[derive(Clone)]
pub struct Users(Books);

/// What a run comes to.
#[derive(Clone, Debug, Default)]
pub struct Run {
    pub name: String,
    pub users: u64,
    /// Events that were published, of both kinds.
    pub published: u64,
    pub done: bool,
}

impl Users {
    pub fn open(folder: &Path) -> Result<Users> {
        Ok(Users(Books::open(folder, "user", TABLES)?))
    }

    /// The run that was interrupted, or a new one.
    pub fn begin(&self, what: &What, stream: &str) -> Result<String> {
        let mut db = self.0.lock();
        let db = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let open: Option<String> = db
            .query_row(
                "SELECT run FROM runs WHERE users = ?1 AND NOT done",
                [what.users],
                |row| row.get(0),
            )
            .optional()?;
        let run = open.unwrap_or_else(|| {
            let chance: String = std::iter::repeat_with(fastrand::lowercase)
                .take(6)
                .collect();
            format!("{}-{chance}", Utc::now().format("%y%m%d-%H%M%S"))
        });
        db.execute(
            "INSERT OR IGNORE INTO runs VALUES (?1, (SELECT 1 + ifnull(max(number), 0) FROM runs), ?2, 0)",
            params![run, what.users],
        )?;
        // A stream that was deleted takes with it what nobody has handled yet: all again, to the new one. What was
        // handled, the services' marks know.
        let other = db.execute(
            "INSERT INTO streams VALUES (?1, ?2)
             ON CONFLICT DO UPDATE SET stream = excluded.stream WHERE stream <> excluded.stream",
            params![run, stream],
        )?;
        if other > 0 {
            db.execute(
                "UPDATE outbox SET published = 0 WHERE user_id GLOB ?1",
                [format!("{run}-*")],
            )?;
        }
        db.commit()?;
        Ok(run)
    }

    /// Creates what is missing of the run's users, and publishes what was not.
    pub async fn run(
        &self,
        run: &str,
        what: &What,
        bus: &Bus,
        durable: bool,
        stop: &Stop,
    ) -> Result<()> {
        let (step, pause) = match what.rate {
            Some(rate) => (1, Duration::from_secs_f64(1.0 / rate as f64)),
            None => (WINDOW as u64, Duration::ZERO),
        };
        while !stop.is_set() {
            if self.publish(bus, durable, stop).await? {
                continue;
            }
            if !self.create(run, what.users, step)? {
                if !durable {
                    bus.flush().await?;
                }
                let db = self.0.lock();
                db.execute("UPDATE runs SET done = 1 WHERE run = ?1", [run])?;
                return Ok(());
            }
            if !pause.is_zero() {
                stop.within(pause).await;
            }
        }
        Ok(())
    }

    /// Creates the next users, each with his events, all or none. False if all are there.
    fn create(&self, run: &str, users: u64, step: u64) -> Result<bool> {
        let mut db = self.0.lock();
        let db = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let made: u64 = db.query_row(
            "SELECT count(*) FROM users WHERE user_id GLOB ?1",
            [format!("{run}-*")],
            |row| row.get(0),
        )?;
        for number in made + 1..=users.min(made + step) {
            let user_id = format!("{run}-{number:06}");
            let mut user = User {
                version: VERSION,
                email: format!("user-{number}@example.org"),
                user_id: user_id.clone(),
                timestamp: Utc::now().trunc_subsecs(6),
            };
            let mut events = vec![Event::Created(user.clone())];
            if number % MOVER == 0 {
                user.email = format!("user-{number}@example.net");
                events.push(Event::Updated(user.clone()));
            }
            db.execute(
                "INSERT INTO users VALUES (?1, ?2)",
                params![user_id, user.email],
            )?;
            for event in events {
                db.execute(
                    "INSERT INTO outbox (user_id, kind, event, published) VALUES (?1, ?2, ?3, 0)",
                    params![
                        user_id,
                        event.subject(),
                        serde_json::to_string(event.user())?
                    ],
                )?;
            }
        }
        db.commit()?;
        Ok(made < users)
    }

    /// Publishes from the outbox. False if there is nothing to publish.
    async fn publish(&self, bus: &Bus, durable: bool, stop: &Stop) -> Result<bool> {
        let rows: Vec<(i64, String, String)> = {
            let db = self.0.lock();
            let mut query = db.prepare_cached(
                "SELECT number, kind, event FROM outbox WHERE NOT published ORDER BY number LIMIT ?1",
            )?;
            let rows =
                query.query_map([WINDOW], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
            rows.collect::<rusqlite::Result<_>>()?
        };
        let mut events = Vec::new();
        for (number, kind, event) in &rows {
            let event = Event::read(kind, event.as_bytes()).map_err(anyhow::Error::msg)?;
            events.push((*number, event));
        }
        let published: Vec<Result<Option<i64>>> = stream::iter(events)
            .map(|(number, event)| async move {
                if durable {
                    let stored = bus.publish_durably(&event, stop).await?;
                    return Ok(stored.then_some(number));
                }
                bus.publish(&event).await?;
                Ok(Some(number))
            })
            .buffered(WINDOW)
            .collect()
            .await;
        if !durable {
            bus.flush().await?;
        }
        let mut db = self.0.lock();
        let db = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        for number in published {
            if let Some(number) = number? {
                db.execute(
                    "UPDATE outbox SET published = 1 WHERE number = ?1",
                    [number],
                )?;
            }
        }
        db.commit()?;
        Ok(!rows.is_empty())
    }

    /// The run of this name, or the newest one.
    pub fn find(&self, run: Option<&str>) -> Result<Option<Run>> {
        let db = self.0.lock();
        let found = db
            .query_row(
                "SELECT run, done FROM runs WHERE ?1 IS NULL OR run = ?1 ORDER BY number DESC",
                [run],
                |row| Ok((row.get::<_, String>(0)?, row.get(1)?)),
            )
            .optional()?;
        let Some((name, done)) = found else {
            return Ok(None);
        };
        let pattern = format!("{name}-*");
        let count = |sql: &str| db.query_row(sql, [&pattern], |row| row.get(0));
        Ok(Some(Run {
            users: count("SELECT count(*) FROM users WHERE user_id GLOB ?1")?,
            published: count("SELECT count(*) FROM outbox WHERE published AND user_id GLOB ?1")?,
            name,
            done,
        }))
    }
}
