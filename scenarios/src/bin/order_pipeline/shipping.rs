//! Shipping: sends the parcel.

use rusqlite::{Transaction, params};

use crate::event::{ORDERS, Order, Status};
use crate::stage::Service;

pub struct Shipping;

impl Service for Shipping {
    const NAME: &'static str = "shipping";
    const TAKES: &'static [(&'static str, Status)] = &[(ORDERS, Status::Paid)];
    const TABLES: &'static str = "
        CREATE TABLE IF NOT EXISTS shipments (
            order_id TEXT PRIMARY KEY, user_id TEXT NOT NULL
        ) WITHOUT ROWID;
    ";

    fn apply(&self, books: &Transaction<'_>, order: &Order) -> rusqlite::Result<Status> {
        books
            .prepare_cached("INSERT INTO shipments VALUES (?1, ?2)")?
            .execute(params![order.order_id, order.user_id])?;
        Ok(Status::Shipped)
    }
}
