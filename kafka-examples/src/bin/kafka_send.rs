//! Send records to a topic, from the arguments or from standard input
//!
//! One record per payload. The program prints the partition and offset of each record when all in-sync replicas have it
//! (`acks=all`), in the order of the input. The other examples get their records from it.
//!
//! ```console
//! $ cargo lab run kafka_send -k user-1 -H source=web notes hello 'good bye'
//! sent to partition [..] offset 0: hello
//! sent to partition [..] offset 1: good bye
//! $ cargo lab run kafka_send -Z -K : notes user-1:
//! sent to partition [..] offset 2: (null)
//! ```
//!
//! Notice:
//! - Records with the same key go to the same partition. Records without a key go to one partition after the other.
//! - A null payload (`-Z`) is a tombstone: in a compacted topic it deletes its key.
//! - "may or may not be written" is not a failure: the broker did not answer in time. The record can be in the topic.
//!
//! Usage: kafka_send [-k KEY | -K DELIMITER] [-H NAME=VALUE]... [-p PARTITION] [-Z] TOPIC [PAYLOAD...]. Without a
//! payload, each line of standard input is one. Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_tail.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use futures::{Stream, StreamExt, stream};
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode::*};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer};
use tokio::io::{AsyncBufReadExt, BufReader};

const USAGE: &str = "usage: kafka_send [-k KEY | -K DELIMITER] [-H NAME=VALUE]... [-p PARTITION] [-Z] TOPIC [PAYLOAD...]";
const TIMEOUT: Duration = Duration::from_secs(5);
const IN_FLIGHT: usize = 1000;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let options = Options::parse(std::env::args_os().skip(1))?;
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "30000")
        // Only the broker knows how large a record may be.
        .set("message.max.bytes", "1000000000")
        .create()?;
    let tip = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let topic = Some(options.topic.as_str());
    let metadata = producer.client().fetch_metadata(topic, TIMEOUT);
    metadata.context(tip)?;

    let payloads = match &options.payloads[..] {
        [] => lines().boxed(),
        payloads => stream::iter(payloads.iter().cloned().map(Ok)).boxed(),
    };
    // `buffered` keeps the order of the input and waits for the oldest report when IN_FLIGHT are pending.
    let mut reports = payloads
        .map(|payload| report(enqueue(&producer, &options, payload)))
        .buffered(IN_FLIGHT);
    let mut failed = 0;
    while let Some(report) = reports.next().await {
        match report {
            Ok(line) => println!("{line}"),
            Err(error) => {
                failed += 1;
                eprintln!("{error:#}");
            }
        }
    }
    ensure!(failed == 0, "{failed} records are not confirmed");
    Ok(())
}

/// The pattern: put one record into the client's queue immediately, so that the records keep their order.
fn enqueue(producer: &FutureProducer, options: &Options, line: Line) -> anyhow::Result<Queued> {
    let line = line.context("cannot read standard input")?;
    let (key, payload) = options.split(&line)?;
    let mut record = FutureRecord::<[u8], [u8]>::to(&options.topic);
    record.headers = Some(options.headers.clone());
    (record.key, record.payload, record.partition) = (key, payload, options.partition);
    let text = String::from_utf8_lossy(payload.unwrap_or(b"(null)")).into_owned();
    let queued = producer.send_result(record);
    let queued = queued.map_err(|(error, _)| anyhow!("refused: {error}: {text}"))?;
    Ok((queued, text))
}

/// Waits for the delivery report, for as long as `message.timeout.ms`.
async fn report(queued: anyhow::Result<Queued>) -> anyhow::Result<String> {
    let (delivery, text) = queued?;
    match delivery.await? {
        Ok(at) => {
            let at = format!("partition {} offset {}", at.partition, at.offset);
            Ok(format!("sent to {at}: {text}"))
        }
        Err((error, _)) if is_definite(&error) => bail!("refused: {error}: {text}"),
        Err((error, _)) => bail!("may or may not be written: {error}: {text}"),
    }
}

/// True if the client or the broker refused the record. After every other error, the record can be in the topic.
fn is_definite(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    matches!(code, Some(MessageSizeTooLarge | TopicAuthorizationFailed))
        || matches!(code, Some(InvalidRecord | ClusterAuthorizationFailed))
        || matches!(code, Some(InvalidTopic | UnknownTopic | QueueFull))
        || matches!(code, Some(UnknownPartition | UnknownTopicOrPartition))
}

fn lines() -> impl Stream<Item = Line> {
    let lines = BufReader::new(tokio::io::stdin()).split(b'\n');
    stream::try_unfold(lines, async |mut lines| {
        Ok(lines.next_segment().await?.map(|line| (line, lines)))
    })
}

type Line = std::io::Result<Vec<u8>>;
type Queued = (DeliveryFuture, String);
type Bytes<'a> = Option<&'a [u8]>;

#[derive(Default)]
struct Options {
    topic: String,
    key: Option<Vec<u8>>,
    delimiter: Option<Vec<u8>>,
    headers: OwnedHeaders,
    partition: Option<i32>,
    null: bool,
    payloads: Vec<Vec<u8>>,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = OsString>) -> anyhow::Result<Options> {
        let (mut options, mut topic) = (Options::default(), None);
        while let Some(arg) = args.next() {
            let mut value = || args.next().map(OsStringExt::into_vec).context(USAGE);
            match arg.to_str() {
                Some("-k") => options.key = Some(value()?),
                Some("-K") => options.delimiter = Some(value()?),
                Some("-H") => options.headers = header(options.headers, value()?)?,
                Some("-p") => options.partition = Some(String::from_utf8(value()?)?.parse()?),
                Some("-Z") => options.null = true,
                Some(flag) if flag.starts_with('-') && topic.is_none() => bail!(USAGE),
                Some(name) if topic.is_none() => topic = Some(name.to_owned()),
                // A payload can also be bytes that are not UTF-8.
                _ if topic.is_some() => options.payloads.push(arg.into_vec()),
                _ => bail!(USAGE),
            }
        }
        options.topic = topic.context(USAGE)?;
        Ok(options)
    }

    /// The key and the payload of one line.
    fn split<'a>(&'a self, line: &'a [u8]) -> anyhow::Result<(Bytes<'a>, Bytes<'a>)> {
        let (key, payload) = match &self.delimiter {
            None => (self.key.as_deref(), line),
            Some(delimiter) => {
                let mut windows = line.windows(delimiter.len().max(1));
                let at = windows.position(|part| part == delimiter);
                let text = String::from_utf8_lossy(line);
                let at = at.with_context(|| format!("no key in this line: {text}"))?;
                (Some(&line[..at]), &line[at + delimiter.len()..])
            }
        };
        Ok((key, (!self.null || !payload.is_empty()).then_some(payload)))
    }
}

fn header(headers: OwnedHeaders, text: Vec<u8>) -> anyhow::Result<OwnedHeaders> {
    let at = text.iter().position(|byte| *byte == b'=').context(USAGE)?;
    let (key, value) = (std::str::from_utf8(&text[..at])?, Some(&text[at + 1..]));
    Ok(headers.insert(Header { key, value }))
}
