//! A service's books: one SQLite file that holds its effects, and which orders have had theirs.
//!
//! Kafka's transaction cannot include a charge or a parcel. So the effect happens first, in one SQLite
//! transaction with the note that it has happened, and the event that tells of it follows in a Kafka
//! transaction. A crash between the two leads to the record being consumed again; the note then says
//! what was decided, and only the event is written again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rusqlite::{
    Connection, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params,
};

use crate::event::Status;
use crate::kafka::Positions;

const TABLES: &str = "
    -- What was decided for each order, and which record asked for it.
    CREATE TABLE IF NOT EXISTS handled (
        order_id TEXT NOT NULL, taken TEXT NOT NULL, outcome TEXT NOT NULL,
        topic TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL,
        PRIMARY KEY (order_id, taken)
    ) WITHOUT ROWID;
    -- Up to where Kafka has confirmed the events that follow from these records. It may lag, never lead.
    CREATE TABLE IF NOT EXISTS told (
        topic TEXT NOT NULL, partition INTEGER NOT NULL, next INTEGER NOT NULL,
        PRIMARY KEY (topic, partition)
    ) WITHOUT ROWID;
    -- Records that asked again for what another record had already got.
    CREATE TABLE IF NOT EXISTS duplicate_events (
        topic TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL, order_id TEXT NOT NULL,
        PRIMARY KEY (topic, partition, offset)
    ) WITHOUT ROWID;
    -- How often a record came again after a crash, and its effect was not repeated.
    CREATE TABLE IF NOT EXISTS replays (n INTEGER NOT NULL);
    -- The process that works under each identity: the last one started.
    CREATE TABLE IF NOT EXISTS owner (identity TEXT PRIMARY KEY, token TEXT NOT NULL) WITHOUT ROWID;
";

pub struct Books {
    db: Connection,
    token: String,
}

/// Where a record lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
}

/// What the books know of an order when a record asks for it.
pub enum Known {
    /// Nothing: the effect is due.
    New,
    /// This very record was handled before; its event may not have been written.
    Replay(Status),
    /// This very record was handled before, and its event is written for sure. So the group's position
    /// has gone back: somebody reset it, or it expired in a week without members.
    Told,
    /// Another record has already asked for it.
    Duplicate,
}

impl Books {
    pub fn open(folder: &Path, service: &str, tables: &str) -> Result<Books> {
        let path = file(folder, service);
        let open = || -> rusqlite::Result<Connection> {
            let db = Connection::open(&path)?;
            db.busy_timeout(Duration::from_secs(20))?;
            db.pragma_update(None, "journal_mode", "wal")?;
            // An effect must be on disk before an event tells of it. A batch shares the price.
            db.pragma_update(None, "synchronous", "full")?;
            db.execute_batch(TABLES)?;
            db.execute_batch(tables)?;
            Ok(db)
        };
        let db = open().with_context(|| format!("cannot open the books {}", path.display()))?;
        let token = format!("{}-{:08x}", std::process::id(), fastrand::u32(..));
        Ok(Books { db, token })
    }

    /// The same file for a reader that must not change it.
    pub fn inspect(folder: &Path, service: &str) -> Result<Connection> {
        let path = file(folder, service);
        Connection::open_with_flags(&path, OpenFlags::SQLITE_OPEN_READ_ONLY)
            .with_context(|| format!("cannot read the books {}", path.display()))
    }

    /// Takes an identity over from whoever had it.
    pub fn claim(&self, identity: &str) -> rusqlite::Result<()> {
        self.db.execute(
            "INSERT OR REPLACE INTO owner VALUES (?1, ?2)",
            [identity, &self.token],
        )?;
        Ok(())
    }

    /// Whether no other process has claimed the identity since. Kafka's word alone does not tell:
    /// a transaction that timed out looks the same as one that another process fenced off.
    pub fn holds(&self, identity: &str) -> rusqlite::Result<bool> {
        let owner: Option<String> = self
            .db
            .query_row(
                "SELECT token FROM owner WHERE identity = ?1",
                [identity],
                |row| row.get(0),
            )
            .optional()?;
        Ok(owner.as_ref() == Some(&self.token))
    }

    /// Immediate: a transaction that reads first and writes later could fail in the middle otherwise.
    pub fn transaction(&mut self) -> rusqlite::Result<Transaction<'_>> {
        self.db
            .transaction_with_behavior(TransactionBehavior::Immediate)
    }
}

fn file(folder: &Path, service: &str) -> PathBuf {
    folder.join(format!("{service}.db"))
}

/// What is known of the order that the record at `origin` asks for.
pub fn look_up(
    books: &Transaction<'_>,
    order_id: &str,
    taken: Status,
    origin: &Origin,
) -> Result<Known> {
    let found = books
        .prepare_cached(
            "SELECT outcome, topic, partition, offset FROM handled WHERE order_id = ?1 AND taken = ?2",
        )?
        .query_row([order_id, taken.name()], |row| {
            let at = Origin { topic: row.get(1)?, partition: row.get(2)?, offset: row.get(3)? };
            Ok((row.get::<_, String>(0)?, at))
        })
        .optional()?;
    let Some((outcome, first)) = found else {
        return Ok(Known::New);
    };
    if first == *origin {
        let outcome = Status::from_name(&outcome)
            .with_context(|| format!("the books hold an unknown outcome {outcome:?}"))?;
        let told: Option<i64> = books
            .prepare_cached("SELECT next FROM told WHERE topic = ?1 AND partition = ?2")?
            .query_row(params![origin.topic, origin.partition], |row| row.get(0))
            .optional()?;
        return Ok(match told {
            Some(next) if origin.offset < next => Known::Told,
            _ => Known::Replay(outcome),
        });
    }
    books
        .prepare_cached("INSERT OR IGNORE INTO duplicate_events VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![
            origin.topic,
            origin.partition,
            origin.offset,
            order_id
        ])?;
    Ok(Known::Duplicate)
}

/// Notes the decision. The caller makes the effect in the same transaction.
pub fn note(
    books: &Transaction<'_>,
    order_id: &str,
    taken: Status,
    outcome: Status,
    origin: &Origin,
) -> rusqlite::Result<()> {
    books
        .prepare_cached("INSERT INTO handled VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?
        .execute(params![
            order_id,
            taken.name(),
            outcome.name(),
            origin.topic,
            origin.partition,
            origin.offset
        ])?;
    Ok(())
}

/// Notes what Kafka has confirmed.
pub fn tell(books: &Transaction<'_>, confirmed: &Positions) -> rusqlite::Result<()> {
    let mut told = books.prepare_cached(
        "INSERT INTO told VALUES (?1, ?2, ?3)
         ON CONFLICT DO UPDATE SET next = max(next, excluded.next)",
    )?;
    for ((topic, partition), next) in confirmed {
        told.execute(params![topic, partition, next])?;
    }
    Ok(())
}

/// The partition of the orders' topic in which the order's first event lies.
pub fn home(books: &Transaction<'_>, order_id: &str) -> rusqlite::Result<Option<i32>> {
    books
        .prepare_cached("SELECT partition FROM handled WHERE order_id = ?1 AND taken = 'created'")?
        .query_row([order_id], |row| row.get(0))
        .optional()
}
