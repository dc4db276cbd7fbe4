//! Each reply finds its request, and nothing else that is in the two topics stops them.

use anyhow::{Context, Result, ensure};
use compose::harness::{Example, TIMEOUT, produce_kafka_record};
use compose::{Broker, Service};
use rdkafka::message::{Header, Headers, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message};

use crate::administrator::create_topic;
use crate::reader::read;
use crate::shared;

const REQUESTS: &str = "wait-requests";
const REPLIES: &str = "wait-replies";

#[tokio::test]
async fn replies_find_their_requests_among_malformed_and_foreign_records() -> Result<()> {
    let kafka = shared::kafka(&["kafka_request_reply"])?;
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.address());
    // Other numbers of partitions than the broker would choose.
    for (name, partitions) in [(REQUESTS, 6), (REPLIES, 4), ("own-replies", 1)] {
        create_topic(&kafka, name, partitions, &[]).await?;
    }
    let producer: FutureProducer = config.create()?;
    let send = async |topic: &str, headers: &[(&str, &str)], payload: Option<&[u8]>| {
        let mut all = OwnedHeaders::new();
        for (key, value) in headers {
            let value = Some(*value);
            all = all.insert(Header { key, value });
        }
        let mut record = FutureRecord::<[u8], [u8]>::to(topic).headers(all);
        record.payload = payload;
        let sent = producer.send(record, TIMEOUT).await;
        sent.map_err(|(error, _)| error)
    };
    // An old request and an old reply are not read.
    let old = [("correlation-id", "old"), ("reply-topic", "own-replies")];
    send(REQUESTS, &old, Some(b"1")).await?;
    send(REPLIES, &old, Some(b"done")).await?;

    let mut program = Example::new(env!("CARGO_BIN_EXE_kafka_request_reply"))
        .args(["5", "x", "1500", "7"])
        .broker(&kafka)
        .spawn()?;
    program.wait_for("5: done, after ", TIMEOUT)?;
    program.wait_for("x: no reply within 1s", TIMEOUT)?;
    // While the next request is in work.
    send(REQUESTS, &[], None).await?;
    send(REQUESTS, &[("correlation-id", "1")], Some(b"\xff")).await?;
    let odd: [(&[u8], &[u8]); 1] = [(b"\xff", b"?")];
    produce_kafka_record(&kafka, REQUESTS, None, &odd, b"1")?;
    let own = [("correlation-id", "mine"), ("reply-topic", "own-replies")];
    send(REQUESTS, &own, Some(b"3")).await?;
    send(REPLIES, &own, Some(b"foreign")).await?;
    produce_kafka_record(&kafka, REPLIES, None, &odd, b"1")?;
    program.wait_for("1500: no reply within 1s", TIMEOUT)?;
    program.wait_for("7: done, after ", TIMEOUT)?;
    let ended = program.wait(TIMEOUT)?.ok()?;
    // The foreign reply, the one that cannot be read, and the late one.
    let ignored = ended.stdout.matches("ignored: a reply to another request");
    assert_eq!(ignored.count(), 3, "{}", ended.stdout);
    let ignored = ended.stderr.matches("ignored: a malformed request");
    // With the `x`.
    assert_eq!(ignored.count(), 4, "{}", ended.stderr);

    let replies = read(&kafka, "own-replies", "read_committed")?;
    assert_eq!(replies.len(), 1);
    assert_eq!(replies[0].payload(), Some(&b"done"[..]));
    let headers = replies[0].headers().context("no headers")?;
    let id = headers.get(0);
    assert_eq!((id.key, id.value), ("correlation-id", Some(&b"mine"[..])));
    Ok(())
}

/// The consumers have no group and commit nothing, so their close does not wait for a broker.
#[test]
fn the_program_ends_although_the_broker_died() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let mut program = Example::new(env!("CARGO_BIN_EXE_kafka_request_reply"))
        .args(["5", "1500", "7"])
        .broker(&kafka)
        .spawn()?;
    program.wait_for("5: done, after ", TIMEOUT)?;
    kafka.kill(1)?;
    let ended = program.wait(TIMEOUT)?;
    ensure!(!ended.stdout.contains("7: done"), "{}", ended.stdout);
    ensure!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    Ok(())
}
