//! Send dead letters back once their cause is gone, and delete them from the dead-letter topic
//!
//! Each dead letter of `kafka_retry_dlq` is written to the payments topic, with its key, payload and headers, and then
//! deleted. At least once: a crash between the two replays one letter twice. A letter is never deleted unwritten.
//!
//! ```console
//! $ cargo lab run kafka_send -p 0 retry-dlq.payments '{' '{"amount":5}'
//! ...
//! 1$ cargo lab run kafka_retry_dlq
//! ...
//! {"amount":5}: attempt 1 failed: missing field `fails`[..]; moved to retry-dlq.payments.dlq
//! 1^C
//! left the group
//! $ cargo lab run kafka_dlq_replay
//! ...
//! replayed: 2
//! $ cargo lab run kafka_dlq_replay
//! replayed: 0
//! ```
//!
//! Notice:
//! - It ends at the letters that were there at its start, so it does not replay letters that its replays cause.
//! - The topic itself keeps the position. A group's offsets would expire, and all letters would be replayed again.
//! - Deletion needs the permission DELETE. Without it, the program ends before it replays anything.
//!
//! Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_retry_dlq, kafka_tail.

use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, ensure};
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedHeaders, BorrowedMessage, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use tokio::time::timeout;

const PAYMENTS: &str = "retry-dlq.payments";
const DEAD_LETTERS: &str = "retry-dlq.payments.dlq";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers);
    let admin: AdminClient<DefaultClientContext> = config.create()?;
    let producer: FutureProducer = config
        .clone()
        .set("linger.ms", "0")
        .set("message.timeout.ms", "30000")
        // The client checks the size before it compresses, the broker afterwards.
        .set("compression.type", "zstd")
        .set("message.max.bytes", "1000000000")
        .create()?;
    let consumer: StreamConsumer = config
        // The client wants a name here, although no group is joined and nothing is committed.
        .set("group.id", "kafka_dlq_replay")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .create()?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = consumer.fetch_metadata(Some(DEAD_LETTERS), TIMEOUT);
    let metadata = metadata.context(hint)?;
    let topics = metadata.topics().iter();
    // All ends are taken before the first replay, which can cause a new letter in any partition.
    let mut ranges = Vec::new();
    for partition in topics.flat_map(|topic| topic.partitions()) {
        let (start, end) = consumer.fetch_watermarks(DEAD_LETTERS, partition.id(), TIMEOUT)?;
        ranges.push((partition.id(), start..end));
    }
    let mut replayed = 0;
    for (partition, offsets) in ranges {
        replayed += replay(partition, offsets, &consumer, &producer, &admin).await?;
    }
    println!("replayed: {replayed}");
    Ok(())
}

/// The pattern: write a letter, wait for its confirmation, and delete it.
async fn replay(
    partition: i32,
    offsets: Range<i64>,
    consumer: &StreamConsumer,
    producer: &FutureProducer,
    admin: &AdminClient<DefaultClientContext>,
) -> anyhow::Result<usize> {
    // Deletes nothing, but fails without the permission.
    delete_before(offsets.start, partition, admin).await?;
    let mut at = TopicPartitionList::new();
    at.add_partition_offset(DEAD_LETTERS, partition, Offset::Offset(offsets.start))?;
    consumer.assign(&at)?;
    for replayed in 0.. {
        let received = timeout(TIMEOUT, consumer.recv()).await;
        match received.with_context(|| format!("cannot read {DEAD_LETTERS}/{partition}"))? {
            Ok(letter) if letter.offset() < offsets.end => {
                send(&letter, producer).await?;
                delete_before(letter.offset() + 1, partition, admin).await?;
                println!("{DEAD_LETTERS}/{partition}/{}: replayed", letter.offset());
            }
            Ok(_) | Err(KafkaError::PartitionEOF(_)) => return Ok(replayed),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(0)
}

async fn send(letter: &BorrowedMessage<'_>, producer: &FutureProducer) -> anyhow::Result<()> {
    let headers = letter.headers();
    let headers = headers.map_or_else(OwnedHeaders::new, BorrowedHeaders::detach);
    let mut record = FutureRecord::<[u8], [u8]>::to(PAYMENTS).headers(headers);
    (record.key, record.payload) = (letter.key(), letter.payload());
    let sent = producer.send(record, TIMEOUT).await;
    let sent = sent.map_err(|(error, _)| error);
    sent.with_context(|| format!("cannot replay offset {}; it is kept", letter.offset()))?;
    Ok(())
}

/// Deletes the letters before this offset.
async fn delete_before(
    offset: i64,
    partition: i32,
    admin: &AdminClient<DefaultClientContext>,
) -> anyhow::Result<()> {
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(DEAD_LETTERS, partition, Offset::Offset(offset))?;
    let options = AdminOptions::new().request_timeout(Some(TIMEOUT));
    let deleted = admin.delete_records(&list, &options).await?;
    let refused = deleted.elements().iter().find_map(|at| at.error().err());
    ensure!(
        refused.is_none(),
        "cannot delete from {DEAD_LETTERS}: {refused:?}"
    );
    Ok(())
}
