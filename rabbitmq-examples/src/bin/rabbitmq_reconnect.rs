//! Reconnect: the broker dies and comes back, and nothing that was confirmed is lost
//!
//! Publishes and consumes until Ctrl-C, while the broker may be killed and restarted at will. What is not confirmed is
//! published again; what is not acknowledged is delivered again. At least once: repeats are possible, losses are not.
//! At the end it waits until all is confirmed and delivered, and counts; with a broker that stays away it says what may
//! or may not be there.
//!
//! ```console
//! 1$ cargo lab run rabbitmq_reconnect
//! publishing and consuming; Ctrl-C to stop
//! ...
//! 1^C
//! ...
//! attempted [..], acked [..], indeterminate 0, delivered [..], duplicate 0, lost 0, unexpected 0
//! 2$ cargo lab restart rabbitmq
//! 1$ cargo lab run rabbitmq_reconnect
//! publishing and consuming; Ctrl-C to stop
//! confirmed: 1000
//! ...
//! 2$ cargo lab kill rabbitmq
//! 1:
//! ...
//! publisher: connection lost, [..] unconfirmed
//! ...
//! 2$ cargo lab restart rabbitmq
//! 1:
//! ...
//! publisher: connected again, publishing what was unconfirmed again
//! ...
//! confirmed: [..]
//! ...
//! 1^C
//! ...
//! attempted [..], acked [..], indeterminate [..], delivered [..], duplicate [..], lost 0, unexpected 0
//! ```
//!
//! Notice: each half has a loop around it that starts from scratch: connection, channel, queue. When the connection is
//! lost, the publishes on their way fail, and the stream of deliveries ends with one error. Waiting for a confirm has a
//! limit all the same. lapin's own recovery (`enable_auto_recover`) isn't used: in 4.12.3, if messages were being
//! written when the connection broke, it may never connect again, and those publishes wait forever without an error.
//!
//! An indeterminate message is one whose first attempt got no answer: it may be there once or twice. A consumer sees
//! repeats of those, and of what it had not acknowledged when the connection went.
//!
//! Don't overstate it: a confirm does not keep the queue. One that was just declared is gone, with all that was
//! confirmed in it, if its broker is killed before it has written down, a moment later, that there is such a queue.
//! Hence the orderly restart above, which writes everything.
//!
//! Try: `cargo lab kill rabbitmq` and `cargo lab restart rabbitmq` several times; `cargo lab pause rabbitmq`, and half
//! a minute later `cargo lab resume rabbitmq`; press Ctrl-C while it is away.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f; %2f is the virtual host "/"); the argument `publish` or `consume`
//! does one half of it. One at a time, and `publish` before `consume`: who publishes begins with an empty queue. The
//! queue is a classic one, on a single node; for a node that does not come back take a quorum queue. See also:
//! rabbitmq_quorum_queue, rabbitmq_publisher_confirms, rabbitmq_idempotent_consumer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use futures::future::join_all;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

const QUEUE: &str = "reconnect";
const BATCH: u64 = 100;
const PERSISTENT: u8 = 2;
const PATIENCE: Duration = Duration::from_secs(5);
/// As long as a broker may take to confirm, if it is short of memory or disk.
const CONFIRM: Duration = Duration::from_secs(60);
/// As long as nothing may be confirmed or delivered at the end.
const DRAIN: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Ledger {
    attempted: u64,
    acked: BTreeSet<u64>,
    /// Attempted at least once without an answer.
    indeterminate: BTreeSet<u64>,
    /// How often each was delivered.
    delivered: BTreeMap<u64, u64>,
    unexpected: u64,
}

impl Ledger {
    /// How many were confirmed and not delivered.
    fn missing(&self) -> usize {
        let missing = |id: &&u64| !self.delivered.contains_key(id);
        self.acked.iter().filter(missing).count()
    }

    fn progress(&self) -> (usize, usize) {
        (self.acked.len(), self.delivered.len())
    }
}

#[derive(Clone, Default)]
struct Books(Arc<Mutex<Ledger>>);

impl Books {
    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let (publishes, consumes) = match std::env::args().nth(1).as_deref() {
        None => (true, true),
        Some("publish") => (true, false),
        Some("consume") => (false, true),
        Some(_) => bail!("usage: rabbitmq_reconnect [publish|consume]"),
    };
    // The first time, an error is more useful than patience. It may have the wrong address.
    let connection = connect(&addr).await.with_context(|| {
        let host = addr.rsplit('@').next().unwrap_or_default(); // without the password
        format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
    })?;
    let channel = open(&connection).await?;
    let durable = QueueDeclareOptions::durable();
    let queue = channel
        .queue_declare(QUEUE.into(), durable, FieldTable::default())
        .await?;
    ensure!(
        queue.consumer_count() == 0,
        "the queue `{QUEUE}` has a consumer already: does another rabbitmq_reconnect run? Its books would be wrong"
    );
    if publishes {
        // What an earlier run has left is not in this run's books.
        let purge = QueuePurgeOptions::default();
        channel.queue_purge(QUEUE.into(), purge).await?;
    }
    timeout(PATIENCE, connection.close(200, "OK".into()))
        .await
        .context("the broker does not answer the close")??;

    let (stop, drained) = (CancellationToken::new(), CancellationToken::new());
    let books = Books::default();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut publisher = tokio::spawn(publisher(
        addr.clone(),
        books.clone(),
        stop.clone(),
        publishes,
    ));
    let mut consumer = tokio::spawn(consumer(
        addr.clone(),
        books.clone(),
        drained.clone(),
        consumes,
    ));
    println!(
        "{}; Ctrl-C to stop",
        match (publishes, consumes) {
            (true, true) => "publishing and consuming",
            (true, false) => "publishing",
            _ => "consuming",
        }
    );
    tokio::select! {
        _ = interrupt.recv() => {}
        // These end by a panic alone, for instance when nobody reads what is printed. Unseen, the rest would go on.
        ended = &mut publisher, if publishes => ended?,
        ended = &mut consumer, if consumes => ended?,
    }
    stop.cancel();
    println!("stopping: what is on its way is awaited; Ctrl-C to give up");
    let all_done = async {
        (&mut publisher).await?;
        while publishes && consumes && books.lock().missing() > 0 {
            sleep(Duration::from_millis(50)).await;
        }
        anyhow::Ok(())
    };
    let stuck = async {
        loop {
            let before = books.lock().progress();
            sleep(DRAIN).await;
            if books.lock().progress() == before {
                break;
            }
        }
    };
    let complete = tokio::select! {
        ended = all_done => ended.map(|()| true)?,
        () = stuck => false,
        _ = interrupt.recv() => false,
    };
    publisher.abort();
    drained.cancel();
    if let Ok(ended) = timeout(PATIENCE, consumer).await {
        ended?;
    }
    if let Err(error) = report(&books.lock(), publishes, consumes, complete) {
        eprintln!("Error: {error:?}");
        // Not by way of `main`: the runtime would end, and lapin's thread panics in it if it is trying to connect.
        std::process::exit(1);
    }
    Ok(())
}

/// A channel, with the queue declared and confirms on.
async fn open(connection: &Connection) -> lapin::Result<Channel> {
    let channel = connection.create_channel().await?;
    let durable = QueueDeclareOptions::durable();
    channel
        .queue_declare(QUEUE.into(), durable, FieldTable::default())
        .await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    Ok(channel)
}

async fn connect(addr: &str) -> anyhow::Result<Connection> {
    let properties =
        ConnectionProperties::default().with_connection_name("rabbitmq_reconnect".into());
    Ok(timeout(PATIENCE, Connection::connect(addr, properties)).await??)
}

async fn publisher(addr: String, books: Books, stop: CancellationToken, wanted: bool) {
    let mut unconfirmed = BTreeSet::new();
    while wanted && !(stop.is_cancelled() && unconfirmed.is_empty()) {
        match publish(&addr, &books, &stop, &mut unconfirmed).await {
            Ok(()) => break,
            Err(error) => eprintln!("publisher: starting anew: {error:#}"),
        }
        sleep(Duration::from_millis(500)).await;
    }
}

async fn publish(
    addr: &str,
    books: &Books,
    stop: &CancellationToken,
    unconfirmed: &mut BTreeSet<u64>,
) -> anyhow::Result<()> {
    let connection = connect(addr).await?;
    let channel = timeout(PATIENCE, open(&connection)).await??;
    if !unconfirmed.is_empty() {
        println!("publisher: connected again, publishing what was unconfirmed again");
    }
    loop {
        if unconfirmed.is_empty() {
            if stop.is_cancelled() {
                break;
            }
            let mut books = books.lock();
            let first = books.attempted + 1;
            books.attempted += BATCH;
            unconfirmed.extend(first..first + BATCH);
        }
        let batch: Vec<u64> = unconfirmed.iter().copied().collect();
        // The batch on its way at once, and then each of its confirms.
        let answers = join_all(batch.iter().map(|id| send(&channel, *id)));
        let Some(answers) = await_answers(answers, &channel).await else {
            books.lock().indeterminate.extend(&batch);
            if !channel.status().connected() {
                say_lost(batch.len());
            }
            bail!("no answers; is the broker away, or short of memory or disk?");
        };
        let came_back = answers.iter().flatten().any(|answer| {
            matches!(
                answer,
                Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_))
            )
        });
        let mut failure = None;
        for (id, answer) in batch.into_iter().zip(answers) {
            let mut books = books.lock();
            match answer {
                // What came back may come with another's confirm: then none of them counts.
                Ok(_) if came_back => {
                    books.indeterminate.insert(id);
                }
                Ok(Confirmation::Ack(_)) => {
                    unconfirmed.remove(&id);
                    books.acked.insert(id);
                    if books.acked.len().is_multiple_of(1000) {
                        println!("confirmed: {}", books.acked.len());
                    }
                }
                // Refused: certainly not in the queue, and published again.
                Ok(_) => {}
                Err(error) => {
                    books.indeterminate.insert(id);
                    failure = Some(error);
                }
            }
        }
        ensure!(!came_back, "messages came back; is the queue gone?");
        if let Some(error) = failure {
            say_lost(unconfirmed.len());
            return Err(error.into());
        }
        // A pace that the consumer can keep.
        sleep(Duration::from_millis(100)).await;
    }
    // All is confirmed; a broker that is gone by now changes nothing.
    let _ = timeout(PATIENCE, connection.close(200, "OK".into())).await;
    Ok(())
}

fn say_lost(count: usize) {
    println!("publisher: connection lost, {count} unconfirmed");
}

/// `None`: not all came in time. A silent broker confirms nothing, and lapin may forget a publish on a lost connection.
async fn await_answers<A>(answers: impl Future<Output = A>, channel: &Channel) -> Option<A> {
    let lost = async {
        while channel.status().connected() {
            sleep(Duration::from_millis(50)).await;
        }
    };
    let too_long = async {
        tokio::select! {
            () = lost => sleep(PATIENCE).await,
            () = sleep(CONFIRM) => {}
        }
    };
    tokio::select! {
        answers = answers => Some(answers),
        () = too_long => None,
    }
}

async fn send(channel: &Channel, id: u64) -> lapin::Result<Confirmation> {
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
    let body = id.to_string();
    channel
        .basic_publish(
            "".into(),
            QUEUE.into(),
            options,
            body.as_bytes(),
            properties,
        )
        .await?
        .await
}

async fn consumer(addr: String, books: Books, drained: CancellationToken, wanted: bool) {
    while wanted && !drained.is_cancelled() {
        match consume(&addr, &books, &drained).await {
            Ok(()) => break,
            Err(error) => eprintln!("consumer: starting anew: {error:#}"),
        }
        sleep(Duration::from_millis(500)).await;
    }
}

async fn consume(addr: &str, books: &Books, drained: &CancellationToken) -> anyhow::Result<()> {
    let connection = connect(addr).await?;
    let channel = timeout(PATIENCE, open(&connection)).await??;
    channel.basic_qos(100, BasicQosOptions::default()).await?;
    // Exclusive: a second consumer is refused. It would take a part of the messages, and the books would miss them.
    let options = BasicConsumeOptions {
        exclusive: true,
        ..BasicConsumeOptions::default()
    };
    let mut deliveries = channel
        .basic_consume(QUEUE.into(), "".into(), options, FieldTable::default())
        .await?;
    loop {
        let delivery = tokio::select! {
            () = drained.cancelled() => break,
            delivery = deliveries.next() => delivery
                .context("the broker cancelled the consumer")?
                .context("lost the connection")?,
        };
        let id = std::str::from_utf8(&delivery.data)
            .ok()
            .and_then(|id| id.parse().ok());
        {
            let mut books = books.lock();
            match id {
                Some(id) => *books.delivered.entry(id).or_default() += 1,
                None => books.unexpected += 1,
            }
        }
        // False, or an error: the connection went during the work, and the message comes again.
        // Without a limit, it may wait for ever: lapin forgets an ack that is under way when the connection is lost.
        match timeout(PATIENCE, delivery.ack(BasicAckOptions::default())).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false) | Err(_)) | Err(_) => {
                bail!("lost the connection during the work on {id:?}; it is delivered again")
            }
        }
    }
    let _ = timeout(PATIENCE, connection.close(200, "OK".into())).await;
    Ok(())
}

/// Prints the books, as far as this half has any; an error if they do not balance.
fn report(books: &Ledger, publishes: bool, consumes: bool, complete: bool) -> anyhow::Result<()> {
    let unconfirmed: BTreeSet<u64> = (1..=books.attempted)
        .filter(|id| !books.acked.contains(id))
        .collect();
    let mut line = Vec::new();
    if publishes {
        let (attempted, acked) = (books.attempted, books.acked.len());
        let indeterminate = books.indeterminate.union(&unconfirmed).count();
        line.push(format!(
            "attempted {attempted}, acked {acked}, indeterminate {indeterminate}"
        ));
    }
    let missing = books.missing();
    if consumes {
        let delivered: u64 = books.delivered.values().sum();
        let duplicate = delivered - books.delivered.len() as u64;
        line.push(format!("delivered {delivered}, duplicate {duplicate}"));
    }
    if publishes && consumes {
        let strangers = books
            .delivered
            .keys()
            .filter(|id| **id == 0 || **id > books.attempted)
            .count() as u64;
        // Before all is confirmed and has had its time, what is missing may be on its way.
        let missed = if complete { "lost" } else { "undelivered" };
        let unexpected = books.unexpected + strangers;
        line.push(format!("{missed} {missing}, unexpected {unexpected}"));
    }
    println!("{}", line.join(", "));

    let ids: Vec<String> = unconfirmed.iter().map(ToString::to_string).collect();
    ensure!(
        ids.is_empty(),
        "{} unconfirmed, may or may not be in the queue: {}",
        ids.len(),
        ids.join(", ")
    );
    ensure!(
        missing == 0 || !consumes,
        "{missing} messages were confirmed and not delivered: lost, unless the broker is away"
    );
    Ok(())
}
