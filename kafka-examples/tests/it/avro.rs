//! Readers with an old and with a new schema read all orders, and malformed records are skipped with a reason.

use std::io::{Read, Write};
use std::net::TcpListener;

use anyhow::Result;
use compose::harness::{Example, Finished, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::Message;

use crate::reader::read;
use crate::shared;

const TOPIC: &str = "avro-orders";

fn run(kafka: &Broker, registry: &str) -> Result<Finished> {
    Example::new(env!("CARGO_BIN_EXE_kafka_avro"))
        .broker(kafka)
        .env("SCHEMA_REGISTRY_URL", registry)
        .spawn()?
        .wait(TIMEOUT)
}

/// Each line is one record.
fn send(kafka: &Broker, lines: &[u8]) -> Result<()> {
    Example::new(env!("CARGO_BIN_EXE_kafka_send"))
        .args(["-p", "0", TOPIC])
        .stdin(lines)
        .broker(kafka)
        .spawn()?
        .wait(TIMEOUT)?
        .ok()?;
    Ok(())
}

#[test]
fn both_readers_read_all_orders_and_malformed_records_are_skipped() -> Result<()> {
    let kafka = shared::kafka(&["kafka_avro"])?;
    let registry = Broker::private(Service::Registry)?;
    let first = run(&kafka, &registry.address())?.ok()?;
    let orders = [
        r#"old reader {"cents":1250,"id":"order-1"}, new reader {"cents":1250,"currency":"EUR","id":"order-1"}"#,
        r#"old reader {"cents":990,"id":"order-2"}, new reader {"cents":990,"currency":"CHF","id":"order-2"}"#,
    ];
    for order in orders {
        assert_eq!(first.stdout.matches(order).count(), 1, "{}", first.stdout);
    }
    let refused = "a new field without a default is refused: error_code: 409";
    assert!(first.stdout.contains(refused), "{}", first.stdout);
    // The two schemas have different ids, after the zero byte.
    let records = read(&kafka, TOPIC, "read_committed")?;
    let ids: Vec<_> = records
        .iter()
        .map(|record| &record.payload().unwrap_or_default()[..5])
        .collect();
    assert!(
        ids.len() == 2 && ids[0] != ids[1] && ids[0][0] == 0,
        "{ids:?}"
    );

    // Text, a schema id that does not exist, a number without an end, too short, empty.
    let overflow = b"\0\0\0\0\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\n\0\0\n\n";
    send(
        &kafka,
        &[b"hello\n\0\0\0\x03\xe7abc\n", &overflow[..]].concat(),
    )?;
    Example::new(env!("CARGO_BIN_EXE_kafka_send"))
        .args(["-Z", "-p", "0", TOPIC, ""])
        .broker(&kafka)
        .spawn()?
        .wait(TIMEOUT)?
        .ok()?;
    let second = run(&kafka, &registry.address())?.ok()?;
    assert_eq!(
        second.stdout.matches(" skipped: ").count(),
        6,
        "{}",
        second.stdout
    );
    for reason in [
        "magic byte",
        "'999' was found",
        "Overflow",
        "2 bytes",
        "empty payload",
    ] {
        assert_eq!(
            second.stdout.matches(reason).count(),
            1,
            "{}",
            second.stdout
        );
    }
    for order in orders {
        assert_eq!(second.stdout.matches(order).count(), 2, "{}", second.stdout);
    }
    Ok(())
}

#[test]
fn without_a_registry_the_error_names_the_address_and_no_password() -> Result<()> {
    let kafka = shared::kafka(&["kafka_avro"])?;
    let ended = run(&kafka, "http://user:secret@127.0.0.1:9/apis/ccompat/v7")?;
    assert_eq!(ended.code(), 1);
    assert_eq!(ended.stdout, "");
    assert!(ended.stderr.contains("127.0.0.1:9/"), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("cargo lab up registry"),
        "{}",
        ended.stderr
    );
    assert!(!ended.stderr.contains("secret"), "{}", ended.stderr);
    Ok(())
}

/// A registry that accepts schemas and then fails. It must not look like malformed records.
#[test]
fn a_registry_that_fails_ends_the_program_and_skips_no_record() -> Result<()> {
    let kafka = shared::kafka(&["kafka_avro"])?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", listener.local_addr()?);
    std::thread::spawn(move || -> Result<()> {
        loop {
            let (mut stream, _) = listener.accept()?;
            let mut request = Vec::new();
            // The body, if there is one, ends with a brace.
            let is_complete = |request: &[u8]| {
                request.ends_with(b"}")
                    || request.starts_with(b"GET") && request.ends_with(b"\r\n\r\n")
            };
            while !is_complete(&request) {
                let mut part = [0; 4096];
                let length = stream.read(&mut part)?;
                request.extend_from_slice(&part[..length]);
            }
            let request = String::from_utf8(request)?;
            let (status, body) = if request.starts_with("GET") {
                (
                    "500 Internal Server Error",
                    r#"{"error_code":50001,"message":"disk full"}"#,
                )
            } else if request.contains("customer") {
                (
                    "409 Conflict",
                    r#"{"error_code":409,"message":"incompatible"}"#,
                )
            } else {
                ("200 OK", r#"{"id":1}"#)
            };
            write!(
                stream,
                "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            )?;
        }
    });
    let ended = run(&kafka, &url)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    assert!(ended.stderr.contains("disk full"), "{}", ended.stderr);
    assert!(!ended.stdout.contains("skipped"), "{}", ended.stdout);
    Ok(())
}
