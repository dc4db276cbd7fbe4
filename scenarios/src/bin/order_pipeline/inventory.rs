//! Inventory: takes the goods of a new order from stock, and gives them back when payment declines.

use rusqlite::{Transaction, params};

use crate::event::{DECLINED, ORDERS, Order, Status};
use crate::stage::Service;

/// Units of an item that the shop has when it first hears of it.
pub const STOCK: i64 = 100;

pub struct Inventory {
    pub stock: i64,
}

impl Service for Inventory {
    const NAME: &'static str = "inventory";
    const TAKES: &'static [(&'static str, Status)] = &[
        (ORDERS, Status::Created),
        (DECLINED, Status::PaymentDeclined),
    ];
    // initial = on_hand + what is reserved and not released, at any time: `audit` adds it up.
    const TABLES: &'static str = "
        CREATE TABLE IF NOT EXISTS stock (
            item TEXT PRIMARY KEY, initial INTEGER NOT NULL, on_hand INTEGER NOT NULL CHECK (on_hand >= 0)
        ) WITHOUT ROWID;
        CREATE TABLE IF NOT EXISTS reservations (
            order_id TEXT PRIMARY KEY, item TEXT NOT NULL, quantity INTEGER NOT NULL,
            released INTEGER NOT NULL DEFAULT 0
        ) WITHOUT ROWID;
    ";

    fn apply(&self, books: &Transaction<'_>, order: &Order) -> rusqlite::Result<Status> {
        if order.status == Status::PaymentDeclined {
            self.release(books, &order.order_id)?;
            return Ok(Status::Cancelled);
        }
        let Some(item) = &order.item else {
            return Ok(Status::InventoryReserved);
        };
        books
            .prepare_cached("INSERT OR IGNORE INTO stock VALUES (?1, ?2, ?2)")?
            .execute(params![item, self.stock])?;
        let taken = books
            .prepare_cached(
                "UPDATE stock SET on_hand = on_hand - ?2 WHERE item = ?1 AND on_hand >= ?2",
            )?
            .execute(params![item, order.quantity])?;
        if taken == 0 {
            return Ok(Status::Rejected);
        }
        books
            .prepare_cached(
                "INSERT INTO reservations (order_id, item, quantity) VALUES (?1, ?2, ?3)",
            )?
            .execute(params![order.order_id, item, order.quantity])?;
        Ok(Status::InventoryReserved)
    }
}

impl Inventory {
    fn release(&self, books: &Transaction<'_>, order_id: &str) -> rusqlite::Result<()> {
        // No row for an order without an item: then there is nothing to give back.
        books
            .prepare_cached(
                "UPDATE stock SET on_hand = on_hand + r.quantity FROM reservations AS r
                 WHERE r.order_id = ?1 AND r.released = 0 AND stock.item = r.item",
            )?
            .execute([order_id])?;
        books
            .prepare_cached("UPDATE reservations SET released = 1 WHERE order_id = ?1")?
            .execute([order_id])?;
        Ok(())
    }
}
