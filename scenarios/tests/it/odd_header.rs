//! A record with a header whose name is not UTF-8. `rdkafka` cannot write one, other clients can: so this one speaks the
//! protocol itself.

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Result, ensure};

/// Writes `payload` with such a header to the first partition of `topic`.
pub fn write(broker: &str, topic: &str, payload: &[u8]) -> Result<()> {
    let mut record = vec![0, 0, 0];
    for (bytes, before) in [
        (&b"k"[..], None),
        (payload, None),
        (b"\xff\xfe", Some(1)),
        (b"x", None),
    ] {
        // The number of headers comes before the first one's name.
        record.extend(before.map_or_else(Vec::new, varint));
        record.extend(varint(bytes.len()));
        record.extend(bytes);
    }
    // Attributes, the last offset's distance, two times, no producer, one record.
    let now = chrono::Utc::now().timestamp_millis().to_be_bytes();
    let mut body = [&[0; 6][..], &now, &now, &[0xff; 14], &[0, 0, 0, 1]].concat();
    body.extend(varint(record.len()));
    body.extend(record);
    // The first offset, the length, no leader's epoch, the format, the checksum.
    let length = u32::try_from(body.len() + 9)?.to_be_bytes();
    let checksum = crc32c(&body).to_be_bytes();
    let batch = [&[0; 8][..], &length, &[0xff; 4], &[2], &checksum, &body].concat();

    // Produce, version 3, without a client id and a transaction, acknowledged by all within ten seconds.
    let mut request = vec![0, 0, 0, 3, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    request.extend(10_000_u32.to_be_bytes());
    request.extend([0, 0, 0, 1]);
    request.extend(u16::try_from(topic.len())?.to_be_bytes());
    request.extend(topic.as_bytes());
    request.extend([0, 0, 0, 1, 0, 0, 0, 0]);
    request.extend(u32::try_from(batch.len())?.to_be_bytes());
    request.extend(batch);
    let mut stream = TcpStream::connect(broker)?;
    stream.write_all(&u32::try_from(request.len())?.to_be_bytes())?;
    stream.write_all(&request)?;

    let mut size = [0; 4];
    stream.read_exact(&mut size)?;
    let mut answer = vec![0; u32::from_be_bytes(size) as usize];
    stream.read_exact(&mut answer)?;
    // Behind the number of the request, of topics, the topic, the number of partitions and the partition.
    let at = 4 + 4 + 2 + topic.len() + 4 + 4;
    ensure!(
        answer.get(at..at + 2) == Some(&[0, 0]),
        "refused: {answer:?}"
    );
    Ok(())
}

/// Zigzag: the lowest bit is the sign.
fn varint(number: usize) -> Vec<u8> {
    let mut rest = number << 1;
    let mut bytes = Vec::new();
    while rest > 0x7f {
        bytes.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    bytes.push(rest as u8);
    bytes
}

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 * (crc & 1))
        })
    })
}
