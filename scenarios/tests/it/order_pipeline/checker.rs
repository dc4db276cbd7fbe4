//! Judges what a reader of `order-pipeline.orders` has seen. It shares no code with the program that it judges.

use std::collections::{HashMap, HashSet};

use anyhow::{Context, Result};
use rdkafka::Message;
use rdkafka::message::OwnedMessage;
use serde_json::Value;

#[derive(Clone, Debug)]
pub struct Event {
    pub partition: i32,
    pub order: String,
    pub user: String,
    pub amount: i64,
    pub status: String,
}

impl Event {
    pub fn read(record: &OwnedMessage) -> Result<Event> {
        let json: Value = serde_json::from_slice(record.payload().unwrap_or_default())?;
        let text = |field: &str| {
            let text = json[field]
                .as_str()
                .with_context(|| format!("{json} has no {field}"))?;
            anyhow::Ok(text.to_owned())
        };
        assert_eq!(record.key(), Some(text("user_id")?.as_bytes()));
        Ok(Event {
            partition: record.partition(),
            order: text("order_id")?,
            user: text("user_id")?,
            amount: json["amount"].as_i64().context("no integer amount")?,
            status: text("status")?,
        })
    }
}

const LIVES: [&[&str]; 3] = [
    &["created", "inventory_reserved", "paid", "shipped"],
    &["created", "inventory_reserved", "cancelled"],
    &["created", "rejected"],
];

/// What is wrong with `events`, which must hold exactly `orders` orders.
pub fn check(events: &[Event], orders: usize) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut lives: HashMap<&str, Vec<&str>> = HashMap::new();
    let mut homes: HashMap<&str, HashSet<i32>> = HashMap::new();
    let mut queues: HashMap<(&str, &str), Vec<&str>> = HashMap::new();
    for event in events {
        lives.entry(&event.order).or_default().push(&event.status);
        homes
            .entry(&event.user)
            .or_default()
            .insert(event.partition);
        queues
            .entry((&event.user, &event.status))
            .or_default()
            .push(&event.order);
    }
    if lives.len() != orders {
        wrong.push(format!("{} orders instead of {orders}", lives.len()));
    }
    for (order, life) in &lives {
        if !LIVES.contains(&life.as_slice()) {
            wrong.push(format!("{order} went through {life:?}"));
        }
    }
    for (user, partitions) in homes {
        if partitions.len() > 1 {
            wrong.push(format!("{user} is in partitions {partitions:?}"));
        }
    }
    // Made-up order ids rise, so each user's orders must reach every status in rising order.
    for ((user, status), orders) in queues {
        if !orders.is_sorted() {
            wrong.push(format!("{user}: {status} out of order: {orders:?}"));
        }
    }
    wrong
}

fn sound() -> Vec<Event> {
    let event = |order: &str, status: &str| Event {
        partition: 1,
        order: order.into(),
        user: "u".into(),
        amount: 1,
        status: status.into(),
    };
    vec![
        event("1", "created"),
        event("2", "created"),
        event("3", "created"),
        event("1", "inventory_reserved"),
        event("2", "inventory_reserved"),
        event("3", "rejected"),
        event("1", "paid"),
        event("2", "cancelled"),
        event("1", "shipped"),
    ]
}

#[test]
fn the_checker_passes_a_sound_history() {
    assert_eq!(check(&sound(), 3), Vec::<String>::new());
}

#[test]
fn the_checker_finds_every_planted_loss_and_duplicate() {
    for index in 0..sound().len() {
        let mut lossy = sound();
        let lost = lossy.remove(index);
        assert!(!check(&lossy, 3).is_empty(), "loss of {lost:?}");
        let mut repeated = sound();
        repeated.push(lost.clone());
        assert!(!check(&repeated, 3).is_empty(), "repetition of {lost:?}");
    }
    assert!(!check(&sound(), 4).is_empty(), "an order that never came");
}

#[test]
fn the_checker_finds_a_planted_swap() {
    for (a, b) in [(0, 1), (3, 4), (3, 6), (4, 7)] {
        let mut swapped = sound();
        swapped.swap(a, b);
        assert!(!check(&swapped, 3).is_empty(), "swap of {a} and {b}");
    }
    let mut moved = sound();
    moved[4].partition = 2;
    assert!(!check(&moved, 3).is_empty(), "another partition");
}
