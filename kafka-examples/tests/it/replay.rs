//! A replay reads exactly what it was asked for, ends, and leaves no trace.

use anyhow::Result;
use compose::harness::{Example, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::reader;
use crate::shared;

/// What a replay printed, without its first two lines about the partitions.
fn replay(kafka: &Broker, args: &[&str]) -> Result<Vec<String>> {
    let ended = Example::new(env!("CARGO_BIN_EXE_kafka_replay"))
        .args(args)
        .broker(kafka)
        .spawn()?
        .wait(TIMEOUT)?
        .ok()?;
    let records = |line: &&str| !line.starts_with("partition ") && !line.starts_with("wrote ");
    Ok(ended
        .stdout
        .lines()
        .filter(records)
        .map(str::to_owned)
        .collect())
}

#[tokio::test]
async fn reads_exactly_the_range_and_survives_odd_records() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let all = replay(&kafka, &[])?;
    assert_eq!(all.len(), 13);
    // A second time: reading has moved nothing.
    assert_eq!(replay(&kafka, &["beginning"])?.len(), 13);

    // A time between records, one that is a record's own, and one after the last.
    let at = |minute: &str| format!("2026-01-01T12:{minute}Z");
    let between = replay(&kafka, &["time", &at("09:30")])?;
    assert_eq!(between.len(), 3, "{between:?}");
    for minute in [10, 11] {
        let start = at(&format!("{minute}:00"));
        assert!(
            between.iter().any(|line| line.starts_with(&start)),
            "{between:?}"
        );
    }
    assert_eq!(replay(&kafka, &["time", &at("09:00")])?.len(), 4);
    assert_eq!(
        replay(&kafka, &["time", "2100-01-01T00:00:00Z"])?,
        ["read 0 records"]
    );
    assert_eq!(replay(&kafka, &["offset", "100"])?, ["read 0 records"]);

    // No payload, and bytes that are no text.
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let empty = FutureRecord::<[u8], [u8]>::to("replay-readings").partition(0);
    let binary = FutureRecord::<[u8], [u8]>::to("replay-readings")
        .partition(0)
        .payload(&[0xff, 0xfe]);
    for record in [empty, binary] {
        producer
            .send(record, TIMEOUT)
            .await
            .map_err(|(error, _)| error)?;
    }
    let odd = replay(&kafka, &["offset", "6"])?;
    assert_eq!(odd.len(), 3, "{odd:?}");
    assert!(
        odd[0].ends_with("partition 0 offset 6: no payload"),
        "{odd:?}"
    );
    assert!(odd[1].contains("partition 0 offset 7: "), "{odd:?}");

    // The first records are gone: reading from 0 begins at what is left.
    let mut before = TopicPartitionList::new();
    before.add_partition_offset("replay-readings", 0, Offset::Offset(5))?;
    admin.delete_records(&before, &AdminOptions::new()).await?;
    let left = replay(&kafka, &["offset", "0"])?;
    assert_eq!(left.len(), 3 + 6 + 1, "{left:?}");

    // Neither a group nor a position is left behind.
    let groups = admin.inner().fetch_group_list(None, TIMEOUT)?;
    let names: Vec<&str> = groups.groups().iter().map(|group| group.name()).collect();
    assert!(names.is_empty(), "{names:?}");
    Ok(())
}

#[tokio::test]
async fn ends_where_a_transaction_ends() -> Result<()> {
    use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
    let kafka = shared::kafka(&["kafka_replay"])?;
    assert_eq!(replay(&kafka, &[])?.len(), 13);
    // Its end marker takes the last offset, where no record will ever be.
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("transactional.id", "replay-test")
        .create()?;
    producer.init_transactions(TIMEOUT)?;
    producer.begin_transaction()?;
    let record = BaseRecord::<str, str>::to("replay-readings")
        .partition(1)
        .payload("committed");
    producer.send(record).map_err(|(error, _)| error)?;
    producer.commit_transaction(TIMEOUT)?;
    reader::await_markers(&kafka, "replay-readings")?;
    let lines = replay(&kafka, &["offset", "6"])?;
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].ends_with("offset 6: committed"), "{lines:?}");
    Ok(())
}
