//! Request and reply over two Kafka topics, with a correlation id and a timeout
//!
//! A request has two headers: an id, and the topic for the reply. The responder copies the id into its reply. With this
//! id, the requester finds its reply. A request without a reply ends after a timeout. The requester ignores late
//! replies and replies to other requesters. The work of a request is to wait for its payload, in milliseconds.
//!
//! ```console
//! $ cargo lab run kafka_request_reply 10 1500 20
//! 10: done, after [..] ms
//! 1500: no reply within 1s
//! ignored: a reply to another request
//! 20: done, after [..] ms
//! ```
//!
//! Notice:
//! - With NATS and RabbitMQ, each requester has its own inbox, and gets an error immediately if there is no responder.
//! - Here each requester reads all replies, and the brokers store all requests and replies.
//! - A timeout does not tell whether the request was or will be carried out. Repeat it only if twice is allowed.
//! - The requester knows the ends of the reply topic before it sends. A new member of a group could miss the reply.
//!
//! Left out: responders that share the requests (kafka_consumer_group), and outages (kafka_reconnect_consumer).
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: nats_requester, rabbitmq_rpc_client.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode::*};
use rdkafka::message::{BorrowedMessage, Header, Headers, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use tokio::time::{Instant, sleep, timeout};

const REQUESTS: &str = "wait-requests";
const REPLIES: &str = "wait-replies";
const ID: &str = "correlation-id";
const REPLY_TOPIC: &str = "reply-topic";
/// No request takes longer than this.
const LONGEST: Duration = Duration::from_secs(5);
const REPLY_TIMEOUT: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let waits: Vec<String> = std::env::args().skip(1).collect();
    let usage = "usage: kafka_request_reply MILLISECONDS...";
    ensure!(!waits.is_empty(), usage);
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers);
    let producer: FutureProducer = config.create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(Some(REQUESTS), TIMEOUT);
    metadata.context(tip)?;
    config
        .set("group.id", "kafka_request_reply") // required, although this program joins no group
        .set("enable.auto.commit", "false")
        .set("allow.auto.create.topics", "true");
    let (requests, replies) = (config.create()?, config.create()?);
    let deadline = Instant::now() + TIMEOUT;
    for (consumer, topic) in [(&requests, REQUESTS), (&replies, REPLIES)] {
        // A new topic has no leaders for a moment.
        while let Err(error) = read_from_end(consumer, topic) {
            ensure!(Instant::now() < deadline, error);
            sleep(Duration::from_millis(50)).await;
        }
    }
    // In reality these are two programs.
    tokio::select! {
        ended = ask(&replies, &producer, &waits) => ended,
        ended = respond(&requests, &producer) => ended,
    }
}

async fn ask(replies: &StreamConsumer, producer: &FutureProducer, waits: &[String]) -> Result<()> {
    for wait in waits {
        let begun = Instant::now();
        let reply = timeout(REPLY_TIMEOUT, request(replies, producer, wait)).await;
        let millis = begun.elapsed().as_millis();
        match reply {
            Ok(reply) => println!("{wait}: {}, after {millis} ms", reply?),
            Err(_) => println!("{wait}: no reply within {REPLY_TIMEOUT:?}"),
        }
    }
    Ok(())
}

/// The pattern: send a request with a new id, and wait for the reply with the same id.
async fn request(replies: &StreamConsumer, producer: &FutureProducer, ms: &str) -> Result<String> {
    let id = format!("{:016x}", fastrand::u64(..));
    let mut headers = OwnedHeaders::new();
    for (key, value) in [(ID, id.as_str()), (REPLY_TOPIC, REPLIES)] {
        let value = Some(value);
        headers = headers.insert(Header { key, value });
    }
    let record = FutureRecord::<(), str>::to(REQUESTS).payload(ms);
    let sent = producer.send(record.headers(headers), TIMEOUT).await;
    sent.map_err(|(error, _)| error)?;
    loop {
        let reply = receive(replies).await?;
        if header(&reply, ID).as_ref() == Some(&id) {
            return Ok(text(reply.payload()));
        }
        println!("ignored: a reply to another request");
    }
}

/// The next record. After a connection error, another address may answer.
async fn receive(consumer: &StreamConsumer) -> KafkaResult<BorrowedMessage<'_>> {
    loop {
        match consumer.recv().await {
            Err(KafkaError::MessageConsumption(AllBrokersDown | BrokerTransportFailure)) => {}
            received => return received,
        }
    }
}

/// Carries out the requests, one after another, and sends each reply to the topic that its request names.
async fn respond(requests: &StreamConsumer, producer: &FutureProducer) -> Result<()> {
    loop {
        let request = receive(requests).await?;
        let (id, topic) = (header(&request, ID), header(&request, REPLY_TOPIC));
        let wait = text(request.payload()).parse();
        let (Some(id), Some(topic), Ok(wait)) = (id, topic, wait) else {
            eprintln!("ignored: a malformed request");
            continue;
        };
        sleep(Duration::from_millis(wait).min(LONGEST)).await;
        let (key, value) = (ID, Some(&id));
        let headers = OwnedHeaders::new().insert(Header { key, value });
        let record = FutureRecord::<(), str>::to(&topic).payload("done");
        let sent = producer.send(record.headers(headers), TIMEOUT).await;
        if let Err((error, _)) = sent {
            eprintln!("no reply sent to {topic}: {error}");
        }
    }
}

/// Reads all partitions from their present end, without a group. The broker creates a missing topic if that is allowed.
fn read_from_end(consumer: &StreamConsumer, topic: &str) -> Result<()> {
    let metadata = consumer.fetch_metadata(Some(topic), TIMEOUT)?;
    let found = metadata.topics().iter();
    let mut ends = TopicPartitionList::new();
    for partition in found.flat_map(|topic| topic.partitions()) {
        let (_, end) = consumer.fetch_watermarks(topic, partition.id(), TIMEOUT)?;
        ends.add_partition_offset(topic, partition.id(), Offset::Offset(end))?;
    }
    ensure!(ends.count() > 0, "there is no topic {topic}");
    Ok(consumer.assign(&ends)?)
}

fn text(bytes: Option<&[u8]>) -> String {
    String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
}

/// rdkafka panics if a header name is not UTF-8, and other clients can write such names.
fn header(message: &BorrowedMessage<'_>, name: &str) -> Option<String> {
    let found = catch_unwind(AssertUnwindSafe(|| {
        message.headers()?.iter().find(|header| header.key == name)
    }));
    found.ok()?.map(|header| text(header.value))
}
