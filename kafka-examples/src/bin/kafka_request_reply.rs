//! Request and reply over two Kafka topics, with a correlation id and a timeout
//!
//! A request has two headers: an id, and the topic for the reply. The responder copies the id into its reply, and the
//! requester finds its reply by it. A request without a reply ends after a timeout. A late reply, or one to another
//! requester, is ignored. The work of a request is to wait for so many milliseconds.
//!
//! ```console
//! $ cargo lab run kafka_request_reply 10 1500 20
//! 10: done, after [..] ms
//! 1500: no reply within 1000 ms
//! ignored: a reply to another request
//! 20: done, after [..] ms
//! ```
//!
//! Notice:
//! - NATS and RabbitMQ do it better: each requester has an inbox of its own, and learns at once that no responder is there.
//! - Here every requester reads the replies of all, and each request and reply is kept on the brokers' disks.
//! - The requester knows the ends of the reply topic before it sends. A new member of a group could miss the reply.
//! - A timeout does not tell whether the request was carried out: repeat only requests that may be carried out twice.
//!
//! Left out: several responders that share the requests, see kafka_consumer_group. Try: send a request from kafka_send.
//! Settings: KAFKA_BROKERS (localhost:9092), RUST_LOG. See also: nats_requester, rabbitmq_rpc_client.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Header, Headers, OwnedHeaders};
use rdkafka::metadata::MetadataTopic;
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use tokio::sync::oneshot;
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
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let payloads: Vec<String> = std::env::args().skip(1).collect();
    ensure!(
        !payloads.is_empty(),
        "usage: kafka_request_reply MILLISECONDS..."
    );
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers);
    let producer: FutureProducer = config
        .clone()
        .set("message.timeout.ms", "5000")
        // Sends at once, instead of waiting for more.
        .set("linger.ms", "0")
        .create()?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer.client().fetch_metadata(Some(REQUESTS), TIMEOUT);
    metadata.context(hint)?;
    config
        // The client wants a name here, although no group is joined and nothing is committed.
        .set("group.id", "kafka_request_reply")
        .set("enable.auto.commit", "false")
        .set("allow.auto.create.topics", "true");
    let requests = read_from_end(&config, REQUESTS).await?;
    let replies = read_from_end(&config, REPLIES).await?;

    // In reality these are two programs.
    let ended = tokio::select! {
        ended = ask(&replies, &producer, &payloads) => ended,
        ended = respond(&requests, &producer) => ended,
    };
    // With the broker down, the close can hang (librdkafka issue 3740): wait no longer than TIMEOUT.
    let (done, closed) = oneshot::channel();
    thread::spawn(move || {
        drop((requests, replies));
        done.send(())
    });
    let closed = timeout(TIMEOUT, closed).await;
    ended?;
    Ok(closed.context("not closed: no broker answers")??)
}

async fn ask(
    replies: &StreamConsumer,
    producer: &FutureProducer,
    payloads: &[String],
) -> anyhow::Result<()> {
    for payload in payloads {
        let begun = Instant::now();
        match timeout(REPLY_TIMEOUT, request(replies, producer, payload)).await {
            Ok(reply) => println!(
                "{payload}: {}, after {} ms",
                reply?,
                begun.elapsed().as_millis()
            ),
            Err(_) => println!(
                "{payload}: no reply within {} ms",
                REPLY_TIMEOUT.as_millis()
            ),
        }
    }
    Ok(())
}

/// The pattern: sends a request with a new id, and waits for the reply with the same id.
async fn request(
    replies: &StreamConsumer,
    producer: &FutureProducer,
    payload: &str,
) -> KafkaResult<String> {
    let id = format!("{:016x}", fastrand::u64(..));
    let mut headers = OwnedHeaders::new();
    for (key, value) in [(ID, id.as_str()), (REPLY_TOPIC, REPLIES)] {
        let value = Some(value);
        headers = headers.insert(Header { key, value });
    }
    let record = FutureRecord::<(), _>::to(REQUESTS)
        .payload(payload)
        .headers(headers);
    let sent = producer.send(record, TIMEOUT).await;
    sent.map_err(|(error, _)| error)?;
    loop {
        let reply = receive(replies).await?;
        if header(&reply, ID).as_ref() == Some(&id) {
            return Ok(text(reply.payload()));
        }
        println!("ignored: a reply to another request");
    }
}

/// Carries out the requests, one after another, and sends each reply where its request says.
async fn respond(requests: &StreamConsumer, producer: &FutureProducer) -> anyhow::Result<()> {
    loop {
        let request = receive(requests).await?;
        let (Some(id), Some(topic)) = (header(&request, ID), header(&request, REPLY_TOPIC)) else {
            eprintln!("ignored: a request without {ID} or {REPLY_TOPIC}");
            continue;
        };
        let reply = match text(request.payload()).parse() {
            Ok(milliseconds) => {
                sleep(Duration::from_millis(milliseconds).min(LONGEST)).await;
                "done".to_owned()
            }
            Err(error) => format!("refused: {error}"),
        };
        let (key, value) = (ID, Some(&id));
        let headers = OwnedHeaders::new().insert(Header { key, value });
        let record = FutureRecord::<(), _>::to(&topic)
            .payload(&reply)
            .headers(headers);
        let sent = producer.send(record, TIMEOUT).await;
        if let Err((error, _)) = sent {
            eprintln!("no reply sent to {topic}: {error}");
        }
    }
}

/// Reads all partitions from their present end, without a group. The broker creates the topic, if it may.
async fn read_from_end(config: &ClientConfig, topic: &str) -> anyhow::Result<StreamConsumer> {
    let consumer: StreamConsumer = config.create()?;
    let deadline = Instant::now() + TIMEOUT;
    let ends = loop {
        match ends(&consumer, topic) {
            Ok(ends) if ends.count() > 0 => break ends,
            // A new topic has no leaders for a moment.
            _ if Instant::now() < deadline => sleep(Duration::from_millis(50)).await,
            result => bail!("cannot read topic {topic}: {result:?}"),
        }
    };
    consumer.assign(&ends)?;
    Ok(consumer)
}

fn ends(consumer: &StreamConsumer, topic: &str) -> KafkaResult<TopicPartitionList> {
    let mut ends = TopicPartitionList::new();
    let metadata = consumer.fetch_metadata(Some(topic), TIMEOUT)?;
    for partition in metadata.topics().iter().flat_map(MetadataTopic::partitions) {
        let (_, end) = consumer.fetch_watermarks(topic, partition.id(), TIMEOUT)?;
        ends.add_partition_offset(topic, partition.id(), Offset::Offset(end))?;
    }
    Ok(ends)
}

async fn receive(consumer: &StreamConsumer) -> KafkaResult<BorrowedMessage<'_>> {
    loop {
        match consumer.recv().await {
            Err(error) if is_temporary(&error) => eprintln!("waiting: {error}"),
            received => return received,
        }
    }
}

fn text(bytes: Option<&[u8]>) -> String {
    String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
}

fn header(message: &BorrowedMessage<'_>, name: &str) -> Option<String> {
    // The crate panics on a name that is not UTF-8. Other clients can write such names.
    let found = catch_unwind(AssertUnwindSafe(|| {
        message.headers()?.iter().find(|header| header.key == name)
    }));
    found.ok()?.map(|header| text(header.value))
}

/// The client reconnects by itself after these errors. Other errors (authorization, configuration) do not heal by waiting.
fn is_temporary(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::*;
    matches!(
        error.rdkafka_error_code(),
        Some(AllBrokersDown | BrokerTransportFailure | OperationTimedOut | UnknownTopicOrPartition)
    )
}
