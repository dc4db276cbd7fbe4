//! Partitions: many consumers, and order per customer, by a deterministic mapping of subjects
//!
//! The stream maps `partitions.orders.CUSTOMER` to one of three subjects by a hash of the customer as it stores an
//! order. A durable consumer for each partition gives out one order at a time, so a customer's orders are worked on in
//! their order, also when one has to be delivered again, while other partitions go on. At least once.
//!
//! ```console
//! 1$ cargo lab run jetstream_partitions send 12
//! sent 12 orders of 4 customers
//! 2$ cargo lab run jetstream_partitions
//! working on partitions 0, 1, 2
//! partition [..]: customer-[..] order 1
//! ...
//! partition [..]: customer-[..] order 3
//! 2^C
//! ...
//! stopped
//! ```
//!
//! Notice: with several workers on one consumer, the second order of a customer can be done before the first. What
//! keeps the order here is `max_ack_pending: 1`: the next order of a partition goes out when the one before is
//! acknowledged, and any number of processes may ask. A failed order therefore holds its partition up: dead-letter it.
//! An order that takes long is kept by saying so. A worker that is frozen for longer than the ack wait can't: another
//! one does its order and the next, and when it wakes up, it finishes the old one, late and for the second time. Where
//! that hurts, what is written to must refuse it, as in nats_leader_election.
//! The number of partitions is part of the stream: with another one, customers move, and orders that are stored already
//! stay where they are. Drain the stream first.
//!
//! Try: start it twice, and `cargo lab kill jetstream_partitions.1` while it works: after the ack wait of five seconds
//! the other goes on with the same order. Without `max_ack_pending`, count what comes out of order.
//!
//! Settings: NATS_URL (nats://localhost:4222); WORK_MS (10); the arguments `send N`. A mapping in a stream needs server
//! 2.10; an older one can map in its configuration. See also: jetstream_work_queue, kafka_pitfall_ordering.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use async_nats::jetstream::consumer::{PullConsumer, pull};
use async_nats::jetstream::stream::{Config, Stream, SubjectTransform};
use async_nats::jetstream::{self, AckKind, Context, Message};
use futures::StreamExt;
use futures::future::try_join_all;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

const STREAM: &str = "PARTITIONS";
const PARTITIONS: u32 = 3;
const CUSTOMERS: u32 = 4;
const ACK_WAIT: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    ensure!(
        client.is_server_compatible(2, 10, 0),
        "the server at {url} is version {}: a stream can map subjects from 2.10 on",
        client.server_info().version
    );
    let mut jetstream = jetstream::new(client);
    jetstream.set_timeout(PATIENCE);
    let stream = jetstream
        .get_or_create_stream(Config {
            name: STREAM.into(),
            subjects: vec!["partitions.orders.*".into()],
            subject_transform: Some(SubjectTransform {
                source: "partitions.orders.*".into(),
                // The hash of the first wildcard's token; and the token itself.
                destination: format!(
                    "partitions.{{{{partition({PARTITIONS},1)}}}}.{{{{wildcard(1)}}}}"
                ),
            }),
            ..Default::default()
        })
        .await?;
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => work(&stream).await,
        ["send", count] => {
            let count = count.parse().context("N is a number of orders")?;
            send(&jetstream, count).await
        }
        _ => bail!("usage: jetstream_partitions [send N]"),
    }
}

async fn send(jetstream: &Context, count: u32) -> anyhow::Result<()> {
    let mut acks = Vec::new();
    for number in 0..count {
        let (customer, order) = (number % CUSTOMERS, number / CUSTOMERS + 1);
        // A publisher knows nothing of partitions. One connection keeps the order up to the stream.
        let subject = format!("partitions.orders.customer-{customer}");
        acks.push(jetstream.publish(subject, order.to_string().into()).await?);
    }
    for ack in acks {
        ack.await
            .context("no ack: some orders may be stored or not")?;
    }
    println!("sent {count} orders of {CUSTOMERS} customers");
    Ok(())
}

async fn work(stream: &Stream) -> anyhow::Result<()> {
    let work_ms = std::env::var("WORK_MS").unwrap_or_else(|_| "10".into());
    let work_ms = work_ms
        .parse()
        .context("WORK_MS is a number of milliseconds")?;
    let mut consumers = Vec::new();
    for partition in 0..PARTITIONS {
        let config = pull::Config {
            durable_name: Some(format!("partition-{partition}")),
            filter_subject: format!("partitions.{partition}.*"),
            ack_wait: ACK_WAIT,
            // The whole point: the next one only after this one.
            max_ack_pending: 1,
            ..Default::default()
        };
        consumers.push(stream.create_consumer(config).await?);
    }
    println!("working on partitions 0, 1, 2");
    let (running, stopped) = watch::channel(());
    tokio::spawn(async move {
        let _ = tokio::signal::ctrl_c().await;
        drop(running);
    });
    let partitions = (0..).zip(&consumers);
    try_join_all(
        partitions.map(|(partition, consumer)| {
            one_partition(partition, consumer, work_ms, stopped.clone())
        }),
    )
    .await?;
    println!("stopped");
    Ok(())
}

async fn one_partition(
    partition: u32,
    consumer: &PullConsumer,
    work_ms: u64,
    mut stopped: watch::Receiver<()>,
) -> anyhow::Result<()> {
    loop {
        let asked = consumer.stream().max_messages_per_batch(1);
        let mut orders = asked.messages().await?;
        loop {
            let order = tokio::select! {
                _ = stopped.changed() => return Ok(()),
                order = orders.next() => order,
            };
            match order {
                Some(Ok(order)) => {
                    let customer = order.subject.rsplit('.').next().unwrap_or_default();
                    let number = String::from_utf8_lossy(&order.payload);
                    work_on(&order, Duration::from_millis(work_ms)).await;
                    println!("partition {partition}: {customer} order {number}");
                    confirm(&order).await;
                }
                Some(Err(error)) => {
                    eprintln!("partition {partition}: waiting for the server: {error}");
                    break;
                }
                None => break,
            }
        }
        // The stream of orders may have ended for good: wait, and make a new one.
        tokio::select! {
            _ = stopped.changed() => return Ok(()),
            () = sleep(Duration::from_secs(1)) => {}
        }
    }
}

/// The work. As long as it takes, the server is told that this is no crash.
async fn work_on(order: &Message, work: Duration) {
    let mut work = pin!(sleep(work));
    let mut alive = interval(ACK_WAIT / 3);
    alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    alive.tick().await; // the first one is at once
    loop {
        tokio::select! {
            () = &mut work => return,
            _ = alive.tick() => {
                if let Err(error) = order.ack_with(AckKind::Progress).await {
                    eprintln!("no word to the server: {error}");
                }
            }
        }
    }
}

async fn confirm(order: &Message) {
    if !matches!(timeout(PATIENCE, order.double_ack()).await, Ok(Ok(()))) {
        eprintln!(
            "{}: not acknowledged, an order may be done again",
            order.subject
        );
    }
}
