//! The sender and the reader: all bytes come through, a refusal is a refusal, and nothing ends in silence.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use anyhow::Result;
use compose::harness::{Example, Finished, TIMEOUT, produce_kafka_record};
use compose::{Broker, Service};
use rdkafka::TopicPartitionList;
use rdkafka::admin::AdminOptions;
use rdkafka::message::{Headers, Message};
use rdkafka::mocking::MockCluster;
use rdkafka::types::RDKafkaApiKey;
use rdkafka::types::RDKafkaRespErr::*;

use crate::administrator::{admin, create_topic};
use crate::reader::read;
use crate::shared;

fn send<A: AsRef<OsStr>>(kafka: &Broker, args: &[A], stdin: &[u8]) -> Result<Finished> {
    let sender = Example::new(env!("CARGO_BIN_EXE_kafka_send"));
    let sender = sender.args(args).stdin(stdin).broker(kafka);
    sender.spawn()?.wait(TIMEOUT)
}

fn tail(kafka: &Broker, args: &[&str]) -> Result<Finished> {
    let reader = Example::new(env!("CARGO_BIN_EXE_kafka_tail"));
    reader.args(args).broker(kafka).spawn()?.wait(TIMEOUT)
}

#[test]
fn keys_headers_and_odd_bytes_arrive_unchanged() -> Result<()> {
    let kafka = shared::kafka(&["send_and_tail"])?;
    let odd = OsStr::from_bytes(b"\xff=\x01 \xc3");
    let header = OsStr::from_bytes(b"h=\xfe=2");
    let args = ["-p", "0", "-k"].map(OsStr::new).to_vec();
    let args = [
        args,
        vec![odd, OsStr::new("-H"), header, OsStr::new("odd"), odd],
    ]
    .concat();
    send(&kafka, &args, b"")?.ok()?;
    // The last line has no line end. One is empty, one only has a key.
    let lines = b"a:1\n:\nb::2\n\xff:\xfe";
    send(&kafka, &["-p", "0", "-K", ":", "odd"], lines)?.ok()?;
    send(&kafka, &["-p", "0", "-Z", "-k", "a", "odd", ""], b"")?.ok()?;

    let records = read(&kafka, "odd", "read_committed")?;
    let pairs: Vec<_> = records
        .iter()
        .map(|record| (record.key(), record.payload()))
        .collect();
    let odd = Some(odd.as_bytes());
    assert_eq!(
        pairs,
        [
            (odd, odd),
            (Some(&b"a"[..]), Some(&b"1"[..])),
            (Some(b""), Some(b"")),
            (Some(b"b"), Some(b":2")),
            (Some(b"\xff"), Some(b"\xfe")),
            (Some(b"a"), None),
        ]
    );
    let header = records[0].headers().map(|headers| headers.get(0));
    let header = header.map(|header| (header.key, header.value));
    assert_eq!(header, Some(("h", Some(&b"\xfe=2"[..]))));

    let shown = tail(&kafka, &["-e", "odd"])?.ok()?;
    let first = r"partition 0 offset 0, key \xff=\x01 \xc3, headers h=\xfe=2: \xff=\x01 \xc3";
    assert_eq!(shown.stdout.lines().next(), Some(first));
    let last = "partition 0 offset 5, key a: (null)";
    assert_eq!(shown.stdout.lines().last(), Some(last));
    assert_eq!(shown.stderr, "");

    produce_kafka_record(&kafka, "odd", Some(b"k"), &[(b"\xff", b"v")], b"after")?;
    let shown = tail(&kafka, &["-e", "-o", "6", "odd"])?.ok()?;
    let headers = "headers with a name that is not UTF-8";
    let line = format!("partition 0 offset 6, key k, {headers}: after\n");
    assert_eq!(shown.stdout, line);
    Ok(())
}

/// A line that cannot be split is reported, and the others are sent.
#[test]
fn lines_without_a_key_are_refused_and_the_exit_status_says_it() -> Result<()> {
    let kafka = shared::kafka(&["send_and_tail"])?;
    let ended = send(&kafka, &["-K", ":", "lines"], b"a:1\nno key\nb:2\n")?;
    assert_eq!(ended.code(), 1);
    assert_eq!(ended.stdout.lines().count(), 2, "{}", ended.stdout);
    assert!(
        ended.stderr.contains("no key in this line: no key"),
        "{}",
        ended.stderr
    );
    assert!(
        ended.stderr.contains("1 records are not confirmed"),
        "{}",
        ended.stderr
    );
    Ok(())
}

#[tokio::test]
async fn a_refusal_is_told_from_an_unknown_result() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    create_topic(&kafka, "small", 1, &[("max.message.bytes", "50")]).await?;
    let ended = send(&kafka, &["small", &"x".repeat(100)], b"")?;
    assert_eq!(ended.code(), 1);
    assert!(ended.stderr.contains("refused: "), "{}", ended.stderr);
    let ended = send(&kafka, &["-p", "7", "small", "x"], b"")?;
    assert!(ended.stderr.contains("refused: "), "{}", ended.stderr);
    let ended = send(&kafka, &["a name with spaces", "x"], b"")?;
    assert_eq!(ended.code(), 1, "{}", ended.stderr);

    // Frozen, the broker may have the record or not.
    let sender = Example::new(env!("CARGO_BIN_EXE_kafka_send")).args(["frozen"]);
    let mut sender = sender.open_stdin().broker(&kafka).spawn()?;
    sender.write_stdin("one\n")?;
    sender.wait_for("offset 0: one", TIMEOUT)?;
    kafka.pause(1)?;
    sender.write_stdin("two\n")?;
    sender.close_stdin();
    let ended = sender.wait(TIMEOUT)?;
    kafka.resume(1)?;
    assert_eq!(ended.code(), 1);
    assert!(
        ended.stderr.contains("may or may not be written: "),
        "{}",
        ended.stderr
    );
    Ok(())
}

/// The broker answers with an error that is a refusal, and with one that the program does not list.
#[test]
fn only_a_listed_error_is_called_a_refusal() -> Result<()> {
    for (error, told) in [
        (RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED, "refused"),
        (RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED, "refused"),
        (
            RD_KAFKA_RESP_ERR_POLICY_VIOLATION,
            "may or may not be written",
        ),
    ] {
        for (program, args) in [
            (env!("CARGO_BIN_EXE_kafka_send"), &["topic", "x"][..]),
            (env!("CARGO_BIN_EXE_kafka_async_producer"), &[]),
        ] {
            let kafka = MockCluster::new(1)?;
            kafka.request_errors(RDKafkaApiKey::Produce, &[error]);
            let example = Example::new(program).args(args);
            let example = example.env("KAFKA_BROKERS", kafka.bootstrap_servers());
            let ended = example.spawn()?.wait(TIMEOUT)?;
            assert_eq!(ended.code(), 1, "{}", ended.stdout);
            assert!(ended.stderr.contains(told), "{error:?}: {}", ended.stderr);
        }
    }
    Ok(())
}

#[tokio::test]
async fn each_partition_is_shown_from_the_offset_to_its_end() -> Result<()> {
    let kafka = shared::kafka(&["send_and_tail"])?;
    create_topic(&kafka, "many", 7, &[]).await?;
    for partition in ["0", "3", "6"] {
        send(&kafka, &["-p", partition, "many", "a", "b", "c"], b"")?.ok()?;
    }
    let count = |ended: Finished| -> Result<usize> { Ok(ended.ok()?.stdout.lines().count()) };
    assert_eq!(count(tail(&kafka, &["-e", "many"])?)?, 9);
    assert_eq!(count(tail(&kafka, &["-e", "-o", "-1", "many"])?)?, 3);
    assert_eq!(count(tail(&kafka, &["-e", "-o", "1", "many"])?)?, 6);
    assert_eq!(count(tail(&kafka, &["-e", "-o", "end", "many"])?)?, 0);

    // Records before an offset can be gone.
    let mut before = TopicPartitionList::new();
    before.add_partition_offset("many", 3, rdkafka::Offset::Offset(2))?;
    admin(&kafka)?
        .delete_records(&before, &AdminOptions::new())
        .await?;
    assert_eq!(count(tail(&kafka, &["-e", "-o", "0", "many"])?)?, 7);
    let ended = tail(&kafka, &["-e", "missing-topic"])?;
    assert_eq!(ended.code(), 1);
    assert!(
        ended
            .stderr
            .contains("cannot read missing-topic: UnknownTopicOrPartition"),
        "{}",
        ended.stderr
    );
    Ok(())
}

#[test]
fn sigterm_ends_the_reader() -> Result<()> {
    let kafka = shared::kafka(&["send_and_tail"])?;
    send(&kafka, &["followed", "one"], b"")?.ok()?;
    let reader = Example::new(env!("CARGO_BIN_EXE_kafka_tail"));
    let mut reader = reader.args(["followed"]).broker(&kafka).spawn()?;
    reader.wait_for(": one", TIMEOUT)?;
    send(&kafka, &["followed", "two"], b"")?.ok()?;
    reader.wait_for(": two", TIMEOUT)?;
    reader.terminate()?;
    reader.wait(TIMEOUT)?.ok()?;
    Ok(())
}

/// The reader has no group and commits nothing, so its close does not wait for a broker.
#[test]
fn a_signal_ends_the_reader_although_the_broker_died() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    send(&kafka, &["followed", "one"], b"")?.ok()?;
    let reader = || Example::new(env!("CARGO_BIN_EXE_kafka_tail"));
    let mut first = reader().args(["followed"]).broker(&kafka).spawn()?;
    let mut second = reader().args(["followed"]).broker(&kafka).spawn()?;
    first.wait_for(": one", TIMEOUT)?;
    second.wait_for(": one", TIMEOUT)?;
    kafka.kill(1)?;
    // The first ends before it knows of the outage, or soon after. The second has tried to connect again.
    first.interrupt()?;
    first.wait(TIMEOUT)?.ok()?;
    let refused = |line: &str| line.contains("Connection refused");
    second.wait_for_line(refused, "an attempt to connect", TIMEOUT)?;
    second.terminate()?;
    second.wait(TIMEOUT)?.ok()?;
    Ok(())
}

#[test]
fn a_wrong_argument_is_answered_before_anything_is_connected() -> Result<()> {
    for (program, args) in [
        (env!("CARGO_BIN_EXE_kafka_send"), &["-x", "topic"][..]),
        (env!("CARGO_BIN_EXE_kafka_send"), &[]),
        (env!("CARGO_BIN_EXE_kafka_tail"), &["-o", "x", "topic"]),
        (env!("CARGO_BIN_EXE_kafka_tail"), &["one", "two"]),
    ] {
        let example = Example::new(program)
            .args(args)
            .env("KAFKA_BROKERS", "localhost:1");
        let ended = example.spawn()?.wait(TIMEOUT)?;
        assert_eq!(ended.code(), 1);
        assert!(ended.stderr.contains("usage: kafka_"), "{}", ended.stderr);
    }
    Ok(())
}
