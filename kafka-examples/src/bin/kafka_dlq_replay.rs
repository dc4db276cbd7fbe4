//! Send dead letters back once their cause is gone, and delete them from the dead-letter topic
//!
//! Each dead letter of `kafka_retry_dlq` is written to the payments topic, with its key, payload and headers. It is
//! deleted only after this copy is written. At least once: after a crash or a failed call, a letter can be replayed twice.
//!
//! ```console
//! $ cargo lab run kafka_send -p 0 retry-dlq.payments.dlq '{' '{"amount":5}'
//! ...
//! $ cargo lab run kafka_dlq_replay
//! retry-dlq.payments.dlq/0/0: replayed
//! retry-dlq.payments.dlq/0/1: replayed
//! replayed: 2
//! ```
//!
//! Notice: it replays only letters that existed at its start. A replay can cause a new letter, which is not replayed.
//!
//! Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_retry_dlq, kafka_tail.

use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, ensure};
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

const PAYMENTS: &str = "retry-dlq.payments";
const DLQ: &str = "retry-dlq.payments.dlq";
const TIMEOUT: Duration = Duration::from_secs(5);

type Admin = AdminClient<DefaultClientContext>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers);
    let admin: Admin = config.create()?;
    let producer: FutureProducer = config
        .clone()
        .set("compression.type", "zstd")
        .set("message.max.bytes", "1000000000")
        .create()?;
    let consumer: BaseConsumer = config
        .set("group.id", "kafka_dlq_replay") // required, although this program joins no group
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "error") // the default would skip letters silently
        .set("enable.partition.eof", "true")
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let all = consumer.fetch_metadata(Some(DLQ), TIMEOUT).context(tip)?;
    // Read all ends first: a replay can cause a new letter in any partition.
    let mut ranges = Vec::new();
    for partition in all.topics().iter().flat_map(|topic| topic.partitions()) {
        let (start, end) = consumer.fetch_watermarks(DLQ, partition.id(), TIMEOUT)?;
        ranges.push((partition.id(), start..end));
    }
    ensure!(!ranges.is_empty(), "no topic {DLQ}, or no permission");
    let mut replayed = 0;
    for (partition, offsets) in ranges {
        // This deletes nothing. It fails if the permission DELETE is missing.
        delete_before(offsets.start, partition, &admin).await?;
        replayed += replay(partition, offsets, &consumer, &producer, &admin).await?;
    }
    println!("replayed: {replayed}");
    Ok(())
}

/// The pattern: write a letter, wait for its confirmation, and delete it.
async fn replay(
    partition: i32,
    offsets: Range<i64>,
    consumer: &BaseConsumer,
    producer: &FutureProducer,
    admin: &Admin,
) -> anyhow::Result<usize> {
    let mut at = TopicPartitionList::new();
    at.add_partition_offset(DLQ, partition, Offset::Offset(offsets.start))?;
    consumer.assign(&at)?;
    let mut replayed = 0;
    loop {
        match consumer.poll(TIMEOUT).context("no answer for 5 seconds")? {
            Ok(letter) if letter.offset() < offsets.end => {
                let offset = letter.offset();
                let whole = letter.payload().is_some();
                ensure!(
                    whole,
                    "offset {offset} has no payload: replay its header `origin`"
                );
                let mut record = FutureRecord::<[u8], [u8]>::to(PAYMENTS);
                record.headers = letter.headers().map(|all| all.detach());
                (record.key, record.payload) = (letter.key(), letter.payload());
                let sent = producer.send(record, TIMEOUT).await;
                let sent = sent.map_err(|(error, _)| error);
                sent.with_context(|| format!("offset {offset} is not confirmed, so it is kept"))?;
                delete_before(offset + 1, partition, admin).await?;
                println!("{DLQ}/{partition}/{offset}: replayed");
                replayed += 1;
            }
            Ok(_) | Err(KafkaError::PartitionEOF(_)) => return Ok(replayed),
            // Another address may answer.
            Err(KafkaError::MessageConsumption(AllBrokersDown | BrokerTransportFailure)) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Deletes the letters before this offset.
async fn delete_before(offset: i64, partition: i32, admin: &Admin) -> anyhow::Result<()> {
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(DLQ, partition, Offset::Offset(offset))?;
    let options = AdminOptions::new().request_timeout(Some(TIMEOUT));
    let deleted = admin.delete_records(&list, &options).await?;
    let refused = deleted.elements().iter().find_map(|at| at.error().err());
    ensure!(refused.is_none(), "cannot delete from {DLQ}: {refused:?}");
    Ok(())
}
