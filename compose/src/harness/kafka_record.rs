//! A producer of Kafka records that `rdkafka` cannot write: with headers whose names are not UTF-8. Other clients can.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use crate::Broker;

/// Writes a record to partition 0 of the topic, as version 3 of the request `Produce`, and waits for its acknowledgement.
///
/// # Errors
/// No broker answers within a minute, or it refuses the record.
pub fn produce_kafka_record(
    kafka: &Broker,
    topic: &str,
    key: Option<&[u8]>,
    headers: &[(&[u8], &[u8])],
    value: &[u8],
) -> Result<()> {
    // Attributes, and both deltas.
    let mut record = vec![0, 0, 0];
    match key {
        Some(key) => bytes(&mut record, key)?,
        None => varint(&mut record, -1),
    }
    bytes(&mut record, value)?;
    varint(&mut record, i64::try_from(headers.len())?);
    for (name, value) in headers {
        bytes(&mut record, name)?;
        bytes(&mut record, value)?;
    }

    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    let now = i64::try_from(now)?.to_be_bytes();
    // What the checksum is of: attributes, last offset's delta, both timestamps, a producer without id, one record.
    let mut checked = [&[0; 6][..], &now, &now, &[0xff; 14], &1_i32.to_be_bytes()].concat();
    bytes(&mut checked, &record)?;
    // The leader's epoch is unknown, the format's version is 2.
    let crc = crc32c(&checked).to_be_bytes();
    let rest = [&(-1_i32).to_be_bytes()[..], &[2], &crc, &checked].concat();
    let batch = [&[0; 8][..], &length(&rest)?, &rest].concat();

    // Produce, version 3, number 7, no client id; no transaction, acks of all, 30 s, one topic with one partition.
    let mut request = [0, 0, 0, 3, 0, 0, 0, 7, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff].to_vec();
    request.extend(30_000_i32.to_be_bytes());
    request.extend(1_i32.to_be_bytes());
    request.extend(u16::try_from(topic.len())?.to_be_bytes());
    request.extend(topic.as_bytes());
    request.extend([0, 0, 0, 1, 0, 0, 0, 0]);
    request.extend(length(&batch)?);
    request.extend(batch);

    let mut stream = TcpStream::connect(kafka.address())?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(&[&length(&request)?[..], &request].concat())?;
    let mut size = [0; 4];
    stream.read_exact(&mut size)?;
    let mut answer = vec![0; usize::try_from(u32::from_be_bytes(size))?];
    stream.read_exact(&mut answer)?;
    // Behind the number, the topic and the partition, two of them counted.
    let at = 4 + 4 + 2 + topic.len() + 4 + 4;
    let error = answer.get(at..at + 2).context("a short answer")?;
    ensure!(error == [0, 0], "refused: {error:?}");
    Ok(())
}

fn length(bytes: &[u8]) -> Result<[u8; 4]> {
    Ok(i32::try_from(bytes.len())?.to_be_bytes())
}

/// With their length before them.
fn bytes(out: &mut Vec<u8>, bytes: &[u8]) -> Result<()> {
    varint(out, i64::try_from(bytes.len())?);
    out.extend(bytes);
    Ok(())
}

/// Zigzag: small numbers are short, also those below zero.
fn varint(out: &mut Vec<u8>, number: i64) {
    let mut left = (number << 1 ^ number >> 63).cast_unsigned();
    while left >= 0x80 {
        out.push((left & 0x7f) as u8 | 0x80);
        left >>= 7;
    }
    out.push(left as u8);
}

fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ (0x82f6_3b78 * (crc & 1));
        }
    }
    !crc
}
