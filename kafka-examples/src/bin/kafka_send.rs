//! Send records to a topic, from the arguments or from standard input
//!
//! One record per payload. Each is printed with its partition and offset once all in-sync replicas have it
//! (`acks=all`), in the order of the input. The other examples are fed with it.
//!
//! ```console
//! $ cargo lab run kafka_send -k user-1 -H source=web notes hello 'good bye'
//! sent to partition [..] offset 0: hello
//! sent to partition [..] offset 1: good bye
//! $ cargo lab run kafka_send -K : notes user-1:again user-2:hello
//! sent to partition [..] offset 2: again
//! sent to partition [..]: hello
//! $ cargo lab run kafka_send -Z -k user-1 notes ''
//! sent to partition [..] offset 3: (null)
//! ```
//!
//! Notice:
//! - Records with the same key go to the same partition. Records without a key are spread over all partitions.
//! - A null payload (`-Z`) is a tombstone: in a compacted topic it deletes its key.
//! - "may or may not be written" is not a failure: the broker did not answer in time, and can have the record.
//!
//! Try: `seq 100000 | cargo lab run kafka_send numbers`; send to a topic name with a space in it.
//!
//! Usage: kafka_send [-k KEY | -K DELIMITER] [-H NAME=VALUE]... [-p PARTITION] [-Z] TOPIC [PAYLOAD...]. Without a
//! payload, each line of standard input is one. Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_tail.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use futures::{Stream, StreamExt, stream};
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer};
use tokio::io::{AsyncBufReadExt, BufReader};

const USAGE: &str = "usage: kafka_send [-k KEY | -K DELIMITER] [-H NAME=VALUE]... [-p PARTITION] [-Z] TOPIC [PAYLOAD...]";
const TIMEOUT: Duration = Duration::from_secs(5);
const IN_FLIGHT: usize = 1000;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let options = Options::parse(std::env::args_os().skip(1))?;
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "30000")
        // Only the broker knows how large a record may be.
        .set("message.max.bytes", "1000000000")
        .create()?;
    let hint = format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one");
    let metadata = producer
        .client()
        .fetch_metadata(Some(&options.topic), TIMEOUT);
    metadata.context(hint)?;

    let (mut sent, mut all) = (0, 0);
    let payloads = if options.payloads.is_empty() {
        lines().boxed()
    } else {
        stream::iter(options.payloads.iter().cloned().map(Ok)).boxed()
    };
    // `buffered` keeps the order of the input and waits for the oldest report when IN_FLIGHT are pending.
    let mut reports = payloads
        .map(|payload| report(enqueue(&producer, &options, payload)))
        .buffered(IN_FLIGHT);
    while let Some(report) = reports.next().await {
        all += 1;
        match report {
            Ok(line) => {
                sent += 1;
                println!("{line}");
            }
            Err(error) => eprintln!("{error:#}"),
        }
    }
    ensure!(sent == all, "{} of {all} records not confirmed", all - sent);
    Ok(())
}

/// Puts one record into the queue at once, so that the records keep their order. The report comes later.
fn enqueue(
    producer: &FutureProducer,
    options: &Options,
    line: std::io::Result<Vec<u8>>,
) -> anyhow::Result<(DeliveryFuture, String)> {
    let line = line.context("cannot read standard input")?;
    let (key, payload) = options.split(&line)?;
    let mut headers = OwnedHeaders::new();
    for (key, value) in &options.headers {
        let value = Some(value);
        headers = headers.insert(Header { key, value });
    }
    let mut record = FutureRecord::<[u8], [u8]>::to(&options.topic).headers(headers);
    (record.key, record.payload) = (key, payload);
    record.partition = options.partition;
    let text = String::from_utf8_lossy(payload.unwrap_or(b"(null)"));
    let shown: String = text.chars().take(80).collect();
    let queued = producer.send_result(record);
    let queued = queued.map_err(|(error, _)| anyhow!("refused: {error}: {shown}"))?;
    Ok((queued, shown))
}

/// Waits for the delivery report, for as long as `message.timeout.ms`.
async fn report(queued: anyhow::Result<(DeliveryFuture, String)>) -> anyhow::Result<String> {
    let (delivery, shown) = queued?;
    match delivery.await? {
        Ok(at) => {
            let (partition, offset) = (at.partition, at.offset);
            Ok(format!(
                "sent to partition {partition} offset {offset}: {shown}"
            ))
        }
        Err((error, _)) if is_definite(&error) => bail!("refused: {error}: {shown}"),
        Err((error, _)) => bail!("may or may not be written: {error}: {shown}"),
    }
}

/// Whether the record is certainly not in the topic. A timeout or a lost connection does not tell.
fn is_definite(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::*;
    !matches!(
        error.rdkafka_error_code(),
        Some(
            MessageTimedOut
                | RequestTimedOut
                | BrokerTransportFailure
                | NetworkException
                | NotEnoughReplicasAfterAppend
                | PurgeInflight
        )
    )
}

fn lines() -> impl Stream<Item = std::io::Result<Vec<u8>>> {
    let lines = BufReader::new(tokio::io::stdin()).split(b'\n');
    stream::try_unfold(lines, async |mut lines| {
        Ok(lines.next_segment().await?.map(|line| (line, lines)))
    })
}

type Bytes<'a> = Option<&'a [u8]>;

#[derive(Default)]
struct Options {
    topic: String,
    key: Option<Vec<u8>>,
    delimiter: Option<Vec<u8>>,
    headers: Vec<(String, Vec<u8>)>,
    partition: Option<i32>,
    null: bool,
    payloads: Vec<Vec<u8>>,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = OsString>) -> anyhow::Result<Options> {
        let mut options = Options::default();
        let mut topic = None;
        while let Some(arg) = args.next() {
            let mut value = || args.next().map(OsStringExt::into_vec).context(USAGE);
            match arg.to_str() {
                Some("-k") => options.key = Some(value()?),
                Some("-K") => options.delimiter = Some(value()?),
                Some("-H") => options.headers.push(header(value()?)?),
                Some("-p") => options.partition = Some(String::from_utf8(value()?)?.parse()?),
                Some("-Z") => options.null = true,
                Some(flag) if flag.starts_with('-') && topic.is_none() => bail!(USAGE),
                Some(name) if topic.is_none() => topic = Some(name.to_owned()),
                // Bytes that are not UTF-8 are a payload too.
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
                let at = at.with_context(|| {
                    format!("no key in this line: {}", String::from_utf8_lossy(line))
                })?;
                (Some(&line[..at]), &line[at + delimiter.len()..])
            }
        };
        Ok((key, (!self.null || !payload.is_empty()).then_some(payload)))
    }
}

fn header(text: Vec<u8>) -> anyhow::Result<(String, Vec<u8>)> {
    let at = text.iter().position(|byte| *byte == b'=').context(USAGE)?;
    Ok((
        String::from_utf8(text[..at].to_vec())?,
        text[at + 1..].to_vec(),
    ))
}
