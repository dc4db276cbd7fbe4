//! Exactly once: consume, transform and produce in Kafka transactions
//!
//! Orders become invoices. The invoices of a batch, its dead letters and the group's offsets are one transaction: all of
//! them become visible or none. A `read_committed` consumer sees each result once, in order per key, even if this
//! program is killed. This is true only inside Kafka: another effect, such as a mail, can be repeated.
//!
//! ```console
//! 1$ cargo lab run kafka_send -p 0 exactly-once.orders '{"order_id":"1","cents":5}' nonsense
//! ...
//! 1$ cargo lab run kafka_exactly_once
//! working as exactly-once-1
//! exactly-once.orders/0/1 is not an order: expected ident at line 1 column 2
//! committed: 2 records
//! 2$ cargo lab run kafka_exactly_once
//! working as exactly-once-1
//! 1:
//! [exit 1]
//! 2^C
//! ```
//!
//! Notice:
//! - The second program takes over the `transactional.id`. The first is fenced: it ends, and its batch is not written. A
//!   program that is frozen for longer than 15 seconds can be fenced, too.
//! - Kafka deduplicates records, not orders. If an order is sent twice: kafka_idempotent_consumer.
//! - An invoice that is too large for its topic ends the program, and a restart meets it again. If a dead letter is too
//!   large, the dead letters of its batch have no payload: their header `origin` says where the order is.
//!
//! Try: `kill -9` it at any time, and start it again. (A stop first ends its batch, which can take a minute.) Settings:
//! KAFKA_BROKERS (localhost:9092), TRANSACTIONAL_ID (exactly-once-1; one for each program that shares the work), RUST_LOG.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::FutureExt;
use futures::future::{BoxFuture, Select, select, try_join_all};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerGroupMetadata, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode::*};
use rdkafka::message::{Header, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::block_in_place;
use tokio::time::{Instant, timeout, timeout_at};

const ORDERS: &str = "exactly-once.orders";
const INVOICES: &str = "exactly-once.invoices";
const DEAD_LETTERS: &str = "exactly-once.orders.dlq";
const GROUP: &str = "exactly-once";
/// A transaction has at most this many orders, and waits for them no longer than this.
const BATCH: usize = 100;
const BATCH_TIME: Duration = Duration::from_millis(200);
const TIMEOUT: Duration = Duration::from_secs(5);
type Clients = (FutureProducer, StreamConsumer);
/// The group membership at the first order, and the outputs. Each output has the partition and offset of its order.
type Batch = (Arc<ConsumerGroupMetadata>, Vec<OwnedMessage>);
type Stop<'a> = Select<BoxFuture<'a, Option<()>>, BoxFuture<'a, Option<()>>>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let id = std::env::var("TRANSACTIONAL_ID").unwrap_or_else(|_| "exactly-once-1".into());
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers);
    let client: BaseConsumer = config.create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    client.fetch_metadata(Some(ORDERS), TIMEOUT).context(tip)?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut stop = select(interrupt.recv().boxed(), terminate.recv().boxed());
    while let Err(error) = run(&config, &id, &mut stop).await {
        if error.downcast_ref().is_none_or(is_final) {
            return Err(error);
        }
        eprintln!("starting again from the committed offsets: {error:#}");
        if timeout(Duration::from_millis(500), &mut stop).await.is_ok() {
            break;
        }
    }
    Ok(())
}

/// Works until Ctrl-C, SIGTERM or the first error. After a failed commit, the result is unknown: the next producer ends
/// the transaction, and the next consumer reads the committed offsets.
async fn run(config: &ClientConfig, id: &str, stop: &mut Stop<'_>) -> anyhow::Result<()> {
    let clients = block_in_place(|| connect(config.clone(), id))?;
    println!("working as {id}");
    let mut worked = work(&clients, stop).await;
    // After fencing, each call returns only `Fatal`. `fatal_error` has the reason.
    let fatal = clients.0.client().fatal_error();
    if let Some((code, _)) = fatal.or_else(|| clients.1.client().fatal_error())
        && is_final(&KafkaError::Global(code))
    {
        worked = worked.context(KafkaError::Global(code));
    }
    // Leaves the group. With the broker down, this can hang (librdkafka issue 3740).
    let (open, closed) = oneshot::channel::<()>();
    thread::spawn(move || drop((clients, open)));
    let closed = timeout(TIMEOUT, closed).await;
    worked?;
    closed.map(drop).context("cannot close: no broker answers")
}

fn connect(mut config: ClientConfig, id: &str) -> KafkaResult<Clients> {
    let producer: FutureProducer = config
        .clone()
        // The same after a restart, and used by one program at a time.
        .set("transactional.id", id)
        // If the program dies, the broker aborts its transaction after this time. Readers wait until then.
        .set("transaction.timeout.ms", "15000")
        // The client checks the size before compression, the broker after it. So allow any size here.
        .set("compression.type", "zstd")
        .set("message.max.bytes", "1000000000")
        .create()?;
    // Fences other producers with this id and ends their transaction. Only after that are the committed offsets final.
    producer.init_transactions(TIMEOUT)?;
    let consumer: StreamConsumer = config
        .set("group.id", GROUP)
        // A static member has its partitions back immediately after a crash. This id must be stable and unique, too.
        .set("group.instance.id", id)
        // If a restarted broker forgets the join request, the client repeats it after this time.
        .set("max.poll.interval.ms", "45000")
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "false")
        .set("allow.auto.create.topics", "true")
        .set("topic.metadata.refresh.interval.ms", "10000") // finds a new topic
        .create()?;
    consumer.subscribe(&[ORDERS])?;
    Ok((producer, consumer))
}

async fn work((producer, consumer): &Clients, stop: &mut Stop<'_>) -> anyhow::Result<()> {
    loop {
        let batch = tokio::select! {
            biased;
            // The orders of an unfinished batch are read again at the next start.
            _ = &mut *stop => return Ok(()),
            batch = gather(consumer) => batch?,
        };
        let Some(batch) = batch else { continue };
        // If a dead letter is too large for its topic, all dead letters of the batch are written without payloads. After
        // the refusal, the broker expects the refused sequence number: the second attempt fails, the third succeeds.
        let mut too_large = false;
        for attempt in 1..=3 {
            let Err(error) = transact(producer, &batch, !too_large).await else {
                println!("committed: {} records", batch.1.len());
                break;
            };
            let aborted = block_in_place(|| producer.abort_transaction(TIMEOUT)).is_ok();
            too_large |= error.rdkafka_error_code() == Some(MessageSizeTooLarge);
            ensure!(aborted && too_large && attempt < 3, error);
        }
    }
}

/// Receives and transforms the orders of one transaction, if there are any.
async fn gather(consumer: &StreamConsumer) -> KafkaResult<Option<Batch>> {
    let (mut member, mut outputs) = (None, Vec::new());
    let deadline = Instant::now() + BATCH_TIME;
    while outputs.len() < BATCH && Instant::now() < deadline {
        match timeout_at(deadline, consumer.recv()).await {
            Ok(Ok(order)) => {
                member = member.or_else(|| consumer.group_metadata());
                outputs.push(transform(order.detach()));
            }
            Ok(Err(error)) if is_final(&error) => return Err(error),
            Ok(Err(error)) => eprintln!("waiting: {error}"),
            Err(_) => break,
        }
    }
    Ok(member.map(|member| (Arc::new(member), outputs)))
}

/// The pattern: the outputs of a batch, and the offsets after it, in one transaction.
async fn transact(producer: &FutureProducer, batch: &Batch, payloads: bool) -> KafkaResult<()> {
    let (member, outputs) = batch;
    producer.begin_transaction()?;
    let sends = outputs.iter().map(|output| {
        let mut record = FutureRecord::to(output.topic());
        (record.key, record.headers) = (output.key(), output.headers().cloned());
        let keep = payloads || output.topic() == INVOICES;
        record.payload = output.payload().filter(|_| keep);
        producer.send(record, TIMEOUT)
    });
    let sent = try_join_all(sends).await;
    let next = outputs.iter().map(|output| {
        let partition = (ORDERS.to_owned(), output.partition());
        (partition, Offset::Offset(output.offset() + 1))
    });
    let offsets = TopicPartitionList::from_topic_map(&next.collect())?;
    let (producer, member) = (producer.clone(), member.clone());
    let commit = move || {
        // After a failed delivery, this call returns the broker's reason.
        producer.send_offsets_to_transaction(&offsets, &member, TIMEOUT)?;
        sent.map_err(|(error, _)| error)?;
        producer.commit_transaction(TIMEOUT)
    };
    // In its own thread: after the death of a node, the first call can ignore its timeout (librdkafka issue 5456).
    let (done, committed) = oneshot::channel();
    thread::spawn(move || done.send(commit()));
    match timeout(3 * TIMEOUT, committed).await {
        Ok(Ok(committed)) => committed,
        _ => Err(KafkaError::Global(OperationTimedOut)),
    }
}

#[derive(Serialize, Deserialize)]
struct Order {
    order_id: String,
    cents: i64,
}

/// The work: the invoice of an order, or its dead letter. A payload can be any bytes.
fn transform(order: OwnedMessage) -> OwnedMessage {
    let parsed = serde_json::from_slice(order.payload().unwrap_or_default());
    let reason = match parsed.and_then(|order: Order| serde_json::to_vec(&order)) {
        Ok(invoice) => return order.set_topic(INVOICES.into()).set_payload(Some(invoice)),
        Err(error) => error.to_string().chars().take(200).collect::<String>(),
    };
    let origin = format!("{ORDERS}/{}/{}", order.partition(), order.offset());
    println!("{origin} is not an order: {reason}");
    let mut headers = order.headers().cloned().unwrap_or_else(OwnedHeaders::new);
    for (key, value) in [("reason", &reason), ("origin", &origin)] {
        let value = Some(value);
        headers = headers.insert(Header { key, value });
    }
    let letter = order.set_topic(DEAD_LETTERS.into());
    letter.replace_headers(Some(headers))
}

/// Fencing, a missing permission, another group protocol and a wrong setting are final.
fn is_final(error: &KafkaError) -> bool {
    let Some(code) = error.rdkafka_error_code() else {
        return true;
    };
    matches!(code, Fatal | Fenced | FencedInstanceId | ProducerFenced)
        || matches!(code, InvalidProducerEpoch | InconsistentGroupProtocol)
        || matches!(code, TopicAuthorizationFailed | GroupAuthorizationFailed)
        || matches!(code, ClusterAuthorizationFailed | MessageSizeTooLarge)
        || code == TransactionalIdAuthorizationFailed
}
