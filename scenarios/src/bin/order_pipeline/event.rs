//! The order event: what is on the topics, and what counts as malformed.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rdkafka::Message;
use rdkafka::message::{Header, Headers, OwnedHeaders};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// Every status of every order, keyed by `user_id`.
pub const ORDERS: &str = "order-pipeline.orders";
/// The saga's way back: payment declined these, inventory gives their stock back.
pub const DECLINED: &str = "order-pipeline.orders.payment-declined";
/// What no stage can read, with the reason in the headers.
pub const DEAD_LETTERS: &str = "order-pipeline.orders.dlq";
/// How far each run of `place` has got. Compacted: only the newest record per run matters.
pub const PROGRESS: &str = "order-pipeline.orders.place-progress";

/// Header: microseconds since 1970 at which the event was sent.
pub const AT: &str = "at";
/// Header: the run of `place` that the order belongs to.
pub const RUN: &str = "run";

/// An event that is larger than this is malformed: its successors, which carry the same fields, and a
/// dead letter, which carries it whole, must stay below the topic's limit of one megabyte.
pub const MAX_EVENT: usize = 256 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Created,
    InventoryReserved,
    /// Only on the topic of declined payments, never on that of the orders.
    PaymentDeclined,
    Paid,
    Shipped,
    Rejected,
    Cancelled,
}

impl Status {
    pub fn name(self) -> &'static str {
        match self {
            Status::Created => "created",
            Status::InventoryReserved => "inventory_reserved",
            Status::PaymentDeclined => "payment_declined",
            Status::Paid => "paid",
            Status::Shipped => "shipped",
            Status::Rejected => "rejected",
            Status::Cancelled => "cancelled",
        }
    }

    pub fn from_name(name: &str) -> Option<Status> {
        serde_json::from_value(name.into()).ok()
    }

    pub fn is_final(self) -> bool {
        matches!(self, Status::Shipped | Status::Rejected | Status::Cancelled)
    }

    /// The topic on which an event of this status belongs.
    pub fn topic(self) -> &'static str {
        match self {
            Status::PaymentDeclined => DECLINED,
            _ => ORDERS,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Money is an integer number of minor units (cents). Binary fractions cannot hold 0.10.
#[derive(Debug, Deserialize)]
struct Known {
    order_id: String,
    user_id: String,
    amount: i64,
    status: Option<Status>,
    item: Option<String>,
    quantity: Option<i64>,
}

#[derive(Debug)]
pub struct Order {
    pub order_id: String,
    pub user_id: String,
    pub amount: i64,
    pub status: Status,
    /// What to take from stock. An order without an item needs none.
    pub item: Option<String>,
    pub quantity: i64,
    fields: BTreeMap<String, Box<RawValue>>,
}

impl Order {
    pub fn from_record(record: &impl Message) -> Result<Order, String> {
        let headers = record.headers();
        if readable(headers).count() != headers.map_or(0, Headers::count) {
            return Err("the name of a header is not UTF-8".into());
        }
        Order::from_topic(record.topic(), record.payload())
    }

    /// Reads an event from `topic`.
    pub fn from_topic(topic: &str, payload: Option<&[u8]>) -> Result<Order, String> {
        let order = Order::parse(payload.unwrap_or_default(), None)?;
        if order.status.topic() != topic {
            return Err(format!(
                "status {} does not belong on {topic}",
                order.status
            ));
        }
        Ok(order)
    }

    /// Reads one line of a file of orders: these are `created`, whether they say so or not.
    pub fn from_line(line: &[u8]) -> Result<Order, String> {
        let order = Order::parse(line, Some(Status::Created))?;
        match order.status {
            Status::Created => Ok(order),
            other => Err(format!("status is {other}, a new order must be created")),
        }
    }

    fn parse(json: &[u8], default: Option<Status>) -> Result<Order, String> {
        if json.is_empty() {
            return Err("empty payload".into());
        }
        if json.len() > MAX_EVENT {
            return Err(format!("{} bytes, the limit is {MAX_EVENT}", json.len()));
        }
        let fields: BTreeMap<String, Box<RawValue>> =
            serde_json::from_slice(json).map_err(reason)?;
        let known: Known = serde_json::from_slice(json).map_err(reason)?;
        let Known {
            order_id,
            user_id,
            amount,
            status,
            item,
            quantity,
        } = known;
        for (field, value) in [("order_id", &order_id), ("user_id", &user_id)] {
            if value.trim().is_empty() {
                return Err(format!("{field} is empty"));
            }
        }
        if amount <= 0 {
            return Err(format!("amount is {amount}, it must be positive"));
        }
        let quantity = quantity.unwrap_or(1);
        if !(1..=1_000_000).contains(&quantity) {
            return Err(format!("quantity is {quantity}, it must be 1 to 1000000"));
        }
        let status = status.or(default).ok_or("missing field `status`")?;
        Ok(Order {
            order_id,
            user_id,
            amount,
            status,
            item,
            quantity,
            fields,
        })
    }

    /// The same order with another status. All other fields are the bytes that came in.
    pub fn json(&self, status: Status) -> serde_json::Result<Vec<u8>> {
        let mut fields: BTreeMap<&str, &RawValue> = self
            .fields
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_ref()))
            .collect();
        let status = serde_json::value::to_raw_value(&status)?;
        fields.insert("status", &status);
        serde_json::to_vec(&fields)
    }
}

/// What is wrong with the JSON. The line that serde names is always 1, and would be taken for the file's.
fn reason(error: serde_json::Error) -> String {
    let place = format!(" at line {} column {}", error.line(), error.column());
    let text = error.to_string();
    match text.strip_suffix(&place) {
        Some(text) => format!("{text} at character {}", error.column()),
        None => text,
    }
}

/// The service that must dead-letter a malformed event: the one that would have handled its status,
/// and the first one if not even that can be read. Exactly one, or garbage would be reported thrice.
pub fn owner(topic: &str, payload: Option<&[u8]>) -> &'static str {
    #[derive(Deserialize)]
    struct OnlyStatus {
        status: Status,
    }
    let status = payload.and_then(|json| serde_json::from_slice::<OnlyStatus>(json).ok());
    match status.map(|only| only.status) {
        Some(Status::InventoryReserved) if topic == ORDERS => "payment",
        Some(Status::Paid) if topic == ORDERS => "shipping",
        _ => "inventory",
    }
}

/// The headers of the event that follows from one with these headers. What others put there, such as
/// a trace context, travels on, up to a size that leaves room for the event; only the time is new.
pub fn follow(headers: Option<&OwnedHeaders>) -> OwnedHeaders {
    let mut room = MAX_EVENT;
    readable(headers)
        .filter(|header| header.key != AT)
        .take_while(|header| {
            let size = header.key.len() + header.value.map_or(0, <[u8]>::len);
            let fits = size <= room;
            room = room.saturating_sub(size);
            fits
        })
        .fold(OwnedHeaders::new(), |all, header| all.insert(header))
        .insert(Header {
            key: AT,
            value: Some(&now().to_string()),
        })
}

/// The value of a header, if it is there and is text.
pub fn header<'a>(headers: Option<&'a impl Headers>, key: &str) -> Option<&'a str> {
    let header = readable(headers).find(|header| header.key == key)?;
    std::str::from_utf8(header.value?).ok()
}

/// The headers whose names are UTF-8. The crate panics at any other name, which any other client can write.
fn readable<H: Headers>(headers: Option<&H>) -> impl Iterator<Item = Header<'_, &[u8]>> {
    headers.into_iter().flat_map(|headers| {
        let read = |at| catch_unwind(AssertUnwindSafe(|| headers.try_get(at)));
        (0..headers.count()).filter_map(move |at| read(at).ok().flatten())
    })
}

/// Microseconds since 1970.
pub fn now() -> i64 {
    chrono::Utc::now().timestamp_micros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_travel_on_byte_for_byte() {
        let line = br#"{"order_id":"1","user_id":"u","amount":5,"price":0.10,"big":123456789012345678901234567890}"#;
        let json = Order::from_line(line).unwrap().json(Status::Paid).unwrap();
        let text = String::from_utf8(json).unwrap();
        assert!(text.contains(r#""price":0.10"#), "{text}");
        assert!(text.contains("123456789012345678901234567890"), "{text}");
        assert!(text.contains(r#""status":"paid""#), "{text}");
    }

    #[test]
    fn malformed_orders_are_refused() {
        for (line, why) in [
            ("", "empty"),
            ("{", "EOF"),
            ("[]", "expected a map"),
            (r#"{"user_id":"u","amount":1}"#, "order_id"),
            (r#"{"order_id":7,"user_id":"u","amount":1}"#, "string"),
            (
                r#"{"order_id":" ","user_id":"u","amount":1}"#,
                "order_id is empty",
            ),
            (r#"{"order_id":"1","user_id":"u","amount":0}"#, "positive"),
            (
                r#"{"order_id":"1","user_id":"u","amount":1.5}"#,
                "floating point",
            ),
            (r#"{"order_id":"1","user_id":"u","amount":"1"}"#, "string"),
            (
                r#"{"order_id":"1","user_id":"u","amount":1,"amount":2}"#,
                "duplicate",
            ),
            (
                r#"{"order_id":"1","user_id":"u","amount":1,"status":"paid"}"#,
                "created",
            ),
            (
                r#"{"order_id":"1","user_id":"u","amount":1,"quantity":0}"#,
                "quantity",
            ),
        ] {
            let reason = Order::from_line(line.as_bytes()).unwrap_err();
            assert!(reason.contains(why), "{line}: {reason}");
        }
    }

    #[test]
    fn exactly_one_service_owns_a_malformed_event() {
        assert_eq!(owner(ORDERS, None), "inventory");
        assert_eq!(owner(ORDERS, Some(b"\xff")), "inventory");
        assert_eq!(owner(ORDERS, Some(br#"{"status":"paid"}"#)), "shipping");
        assert_eq!(
            owner(ORDERS, Some(br#"{"status":"inventory_reserved"}"#)),
            "payment"
        );
        assert_eq!(owner(ORDERS, Some(br#"{"status":"shipped"}"#)), "inventory");
        assert_eq!(owner(DECLINED, Some(br#"{"status":"paid"}"#)), "inventory");
    }
}
