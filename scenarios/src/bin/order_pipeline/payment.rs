//! Payment: charges the user, or declines.

use rusqlite::{Transaction, params};

use crate::event::{ORDERS, Order, Status};
use crate::stage::Service;

/// An amount above this is declined: 1 000.00 in minor units.
pub const LIMIT: i64 = 100_000;

pub struct Payment;

impl Service for Payment {
    const NAME: &'static str = "payment";
    const TAKES: &'static [(&'static str, Status)] = &[(ORDERS, Status::InventoryReserved)];
    const TABLES: &'static str = "
        CREATE TABLE IF NOT EXISTS charges (
            order_id TEXT PRIMARY KEY, user_id TEXT NOT NULL, amount INTEGER NOT NULL
        ) WITHOUT ROWID;
    ";

    fn apply(&self, books: &Transaction<'_>, order: &Order) -> rusqlite::Result<Status> {
        if order.amount > LIMIT {
            return Ok(Status::PaymentDeclined);
        }
        // A real payment provider stands here. It must take the order id as its idempotency key:
        // the process can die after the call and before this transaction is committed.
        books
            .prepare_cached("INSERT INTO charges VALUES (?1, ?2, ?3)")?
            .execute(params![order.order_id, order.user_id, order.amount])?;
        Ok(Status::Paid)
    }
}
