//! What each service knows for sure, in SQLite: one file per service, shared by its instances.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use rusqlite::{Connection, OptionalExtension, params};

use crate::event::Event;

#[derive(Clone)]
pub struct Books(Arc<Mutex<Connection>>);

/// What is known of an event that has just arrived.
#[derive(Debug, PartialEq)]
pub enum Known {
    New,
    /// It was begun before, and nobody can tell whether its effect has happened.
    InDoubt,
    Done,
}

impl Books {
    pub fn open(folder: &Path, service: &str, tables: &str) -> Result<Books> {
        let file = folder.join(format!("{service}.db"));
        let open = || -> Result<Connection> {
            std::fs::create_dir_all(folder)?;
            let db = Connection::open(&file)?;
            // Instances share the file: wait for each other rather than fail.
            db.busy_timeout(Duration::from_secs(20))?;
            db.pragma_update(None, "journal_mode", "WAL")?;
            db.pragma_update(None, "synchronous", "NORMAL")?;
            db.execute_batch(tables)?;
            Ok(db)
        };
        let db = open().with_context(|| format!("cannot open the books {}", file.display()))?;
        Ok(Books(Arc::new(Mutex::new(db))))
    }

    pub fn lock(&self) -> MutexGuard<'_, Connection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The tables of a service that acts on events.
const HANDLED: &str = "
    CREATE TABLE IF NOT EXISTS handled (
        event_id TEXT PRIMARY KEY, user_id TEXT NOT NULL, subject TEXT NOT NULL,
        -- 0: begun, with an effect outside of this file; 1: done; 2: refused for good, and a dead letter
        done INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS seen (what TEXT PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID;
";

impl Books {
    pub fn of_service(folder: &Path, service: &str) -> Result<Books> {
        Books::open(folder, service, HANDLED)
    }

    /// Notes that an effect outside of the books is about to be made.
    pub fn begin(&self, event: &Event) -> Result<Known> {
        let mut db = self.lock();
        let db = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let id = event.id();
        let done: Option<u8> = db
            .query_row(
                "SELECT done FROM handled WHERE event_id = ?1",
                [&id],
                |row| row.get(0),
            )
            .optional()?;
        let known = match done {
            // Refused before, and not yet terminated: it will be refused again, or not.
            None | Some(2) => {
                db.execute(
                    "INSERT OR REPLACE INTO handled VALUES (?1, ?2, ?3, 0)",
                    params![id, event.user().user_id, event.subject()],
                )?;
                Known::New
            }
            Some(0) => Known::InDoubt,
            Some(_) => Known::Done,
        };
        match known {
            Known::New => {}
            Known::InDoubt => count(&db, "in doubt")?,
            Known::Done => count(&db, "suppressed")?,
        }
        db.commit()?;
        Ok(known)
    }

    pub fn done(&self, event: &Event) -> Result<()> {
        let sql = "UPDATE handled SET done = 1 WHERE event_id = ?1";
        self.lock().execute(sql, [event.id()])?;
        Ok(())
    }

    /// The effect has certainly not happened.
    pub fn undo(&self, event: &Event) -> Result<()> {
        let sql = "DELETE FROM handled WHERE event_id = ?1 AND done = 0";
        self.lock().execute(sql, [event.id()])?;
        Ok(())
    }

    /// Its dead letter is written: it has not happened, and it never will.
    pub fn refuse(&self, event: &Event) -> Result<()> {
        self.lock().execute(
            "INSERT INTO handled VALUES (?1, ?2, ?3, 2) ON CONFLICT DO UPDATE SET done = 2 WHERE done = 0",
            params![event.id(), event.user().user_id, event.subject()],
        )?;
        Ok(())
    }

    /// Mark and effect in one transaction, for an effect that is in the books itself. False if it was done before.
    pub fn once(&self, event: &Event) -> Result<bool> {
        let mut db = self.lock();
        let db = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let new = db.execute(
            "INSERT OR IGNORE INTO handled VALUES (?1, ?2, ?3, 1)",
            params![event.id(), event.user().user_id, event.subject()],
        )?;
        if new == 0 {
            count(&db, "suppressed")?;
        }
        db.commit()?;
        Ok(new > 0)
    }

    /// How many events of the run are done, and how many were refused for good.
    pub fn handled(&self, run: &str) -> Result<(u64, u64)> {
        let sql = "SELECT ifnull(sum(done = 1), 0), ifnull(sum(done = 2), 0) FROM handled WHERE user_id GLOB ?1";
        let pattern = format!("{run}-*");
        Ok(self
            .lock()
            .query_row(sql, [pattern], |row| Ok((row.get(0)?, row.get(1)?)))?)
    }

    /// How often something was seen: `suppressed` or `in doubt`.
    pub fn seen(&self, what: &str) -> Result<u64> {
        let sql = "SELECT times FROM seen WHERE what = ?1";
        let times = self.lock().query_row(sql, [what], |row| row.get(0));
        Ok(times.optional()?.unwrap_or(0))
    }
}

fn count(db: &Connection, what: &str) -> rusqlite::Result<()> {
    db.execute(
        "INSERT INTO seen VALUES (?1, 1) ON CONFLICT DO UPDATE SET times = times + 1",
        [what],
    )?;
    Ok(())
}

/// The user's folder for the books, unless another is given.
pub fn folder(given: Option<&Path>) -> Result<PathBuf> {
    Ok(match given {
        Some(folder) => folder.to_owned(),
        None => dirs::data_local_dir()
            .context("this system names no folder for local data: give one with --state")?
            .join("event_bus"),
    })
}
