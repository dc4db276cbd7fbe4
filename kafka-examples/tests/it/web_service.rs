//! Each outcome has its HTTP status, and a stop loses no order that was accepted.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::harness::{Direction, Example, Proxy, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::Message;

use crate::administrator::create_topic;
use crate::reader;
use crate::shared;

const TOPIC: &str = "web-orders";

fn example() -> Example {
    Example::new(env!("CARGO_BIN_EXE_kafka_web_service")).env("PORT", "0")
}

fn address(service: &mut Running) -> Result<String> {
    let line = service.wait_for("listening on ", TIMEOUT)?;
    let address = line.strip_prefix("listening on http://");
    Ok(address.context("no address")?.to_owned())
}

fn order(id: &str) -> String {
    format!(r#"{{"order_id":"{id}","amount_cents":995}}"#)
}

fn connect(address: &str) -> Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

fn ask(stream: &mut TcpStream, body: &[u8]) -> Result<()> {
    let length = body.len();
    let head = format!(
        "POST /orders HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    // The service can refuse a large body before it has read it.
    stream.write_all(body).ok();
    Ok(())
}

/// The status and the body.
fn answer(stream: &mut TcpStream) -> Result<(u16, String)> {
    let mut answer = Vec::new();
    // After a refusal of a large body the connection is reset.
    stream.read_to_end(&mut answer).ok();
    let answer = String::from_utf8(answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    Ok((status, body.to_owned()))
}

fn send(address: &str, body: &[u8]) -> Result<(u16, String)> {
    let mut stream = connect(address)?;
    ask(&mut stream, body)?;
    answer(&mut stream)
}

fn ids(kafka: &Broker) -> Result<BTreeSet<String>> {
    let records = reader::read(kafka, TOPIC, "read_uncommitted")?;
    let keys = records
        .iter()
        .map(|record| record.key().unwrap_or_default());
    Ok(keys
        .map(|key| String::from_utf8_lossy(key).into_owned())
        .collect())
}

#[test]
fn accepted_order_is_at_the_place_in_the_answer() -> Result<()> {
    let kafka = shared::kafka(&["kafka_web_service"])?;
    let mut service = example().broker(&kafka).spawn()?;
    let address = address(&mut service)?;
    let answers = thread::scope(|scope| {
        let requests: Vec<_> = (0..50)
            .map(|number| {
                let (id, address) = (format!("order-{number}"), &address);
                scope.spawn(move || anyhow::Ok((send(address, order(&id).as_bytes())?, id)))
            })
            .collect();
        let answers = requests.into_iter().map(|request| request.join().unwrap());
        answers.collect::<Result<Vec<_>>>()
    })?;
    let records = reader::read(&kafka, TOPIC, "read_uncommitted")?;
    assert_eq!(records.len(), 50);
    for ((status, body), id) in answers {
        assert_eq!(status, 202, "{body}");
        let record = records.iter().find(|record| {
            let (partition, offset) = (record.partition(), record.offset());
            body == format!("partition {partition} offset {offset}")
        });
        let record = record.with_context(|| format!("no record at {body}"))?;
        assert_eq!(record.key(), Some(id.as_bytes()));
        let stored: serde_json::Value = serde_json::from_slice(record.payload().unwrap())?;
        assert_eq!(
            stored,
            serde_json::from_str::<serde_json::Value>(&order(&id))?
        );
    }
    service.terminate()?;
    service.wait(TIMEOUT)?.ok()?;
    Ok(())
}

#[tokio::test]
async fn invalid_and_large_orders_are_refused_and_not_written() -> Result<()> {
    let kafka = shared::kafka(&["kafka_web_service"])?;
    // The topic allows less than the service.
    create_topic(&kafka, TOPIC, 1, &[("max.message.bytes", "1000")]).await?;
    let mut service = example().broker(&kafka).spawn()?;
    let address = address(&mut service)?;
    let (large, huge) = (order(&"x".repeat(5_000)), order(&"x".repeat(3_000_000)));
    for (body, expected) in [
        ("", 400),
        ("{", 400),
        ("[]", 422),
        (r#"{"order_id":"order-1"}"#, 422),
        (r#"{"order_id":1,"amount_cents":995}"#, 422),
        (r#"{"order_id":"order-1","amount_cents":-1}"#, 422),
        (r#"{"order_id":"order-1","amount_cents":9.95}"#, 422),
        (large.as_str(), 413),
        (huge.as_str(), 413),
    ] {
        let (status, answer) = send(&address, body.as_bytes())?;
        assert_eq!(status, expected, "{:.80}: {answer}", body);
    }
    assert_eq!(send(&address, b"\"\xff\"")?.0, 400);
    assert_eq!(send(&address, order("good").as_bytes())?.0, 202);
    assert_eq!(ids(&kafka)?, BTreeSet::from(["good".to_owned()]));
    Ok(())
}

#[test]
fn request_without_a_broker_ends_with_503_and_the_service_recovers() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let mut service = example().broker(&kafka).spawn()?;
    let address = address(&mut service)?;
    assert_eq!(send(&address, order("before").as_bytes())?.0, 202);
    kafka.kill(1)?;
    let begin = Instant::now();
    let (status, body) = send(&address, order("during").as_bytes())?;
    assert_eq!(status, 503, "{body}");
    assert!(
        begin.elapsed() < Duration::from_secs(15),
        "the wait has no bound"
    );
    kafka.restart(1)?;
    let deadline = Instant::now() + TIMEOUT;
    while send(&address, order("after").as_bytes())?.0 != 202 {
        ensure!(Instant::now() < deadline, "it does not recover");
    }
    let ids = ids(&kafka)?;
    assert!(ids.contains("before") && ids.contains("after"), "{ids:?}");

    // It ends without a broker as well.
    kafka.kill(1)?;
    service.interrupt()?;
    service.wait(Duration::from_secs(60))?;
    Ok(())
}

#[test]
fn full_queue_is_answered_with_503_at_once() -> Result<()> {
    let (_kafka, proxy) = Proxy::in_front_of(Service::Kafka)?;
    let mut service = example().proxy(&proxy).spawn()?;
    let address = address(&mut service)?;
    assert_eq!(send(&address, order("first").as_bytes())?.0, 202);
    proxy.black_hole()?;
    // The queue has room for 500. A request that waits for room until another has timed out is not refused.
    let mut requests = Vec::new();
    for number in 0..600 {
        let mut stream = connect(&address)?;
        ask(&mut stream, order(&number.to_string()).as_bytes())?;
        requests.push(stream);
    }
    let mut refused = 0;
    for stream in &mut requests {
        let (status, body) = answer(stream)?;
        assert_eq!(status, 503, "{body}");
        if body.contains("QueueFull") {
            refused += 1;
        } else {
            ensure!(body.contains("MessageTimedOut"), "{body}");
        }
    }
    // About 100. On a slow machine the first have timed out before the last are sent.
    assert!(refused >= 50, "{refused}");
    Ok(())
}

#[test]
fn request_in_progress_is_answered_after_sigterm() -> Result<()> {
    let kafka = shared::kafka(&["kafka_web_service"])?;
    let mut service = example().broker(&kafka).spawn()?;
    let address = address(&mut service)?;
    let body = order("in-progress");
    let mut stream = begin(&address, body.len())?;
    service.terminate()?;
    await_closed(&address)?;
    stream.write_all(body.as_bytes())?;
    assert_eq!(answer(&mut stream)?.0, 202);
    service.wait(TIMEOUT)?.ok()?;
    assert_eq!(ids(&kafka)?, BTreeSet::from(["in-progress".to_owned()]));
    Ok(())
}

/// Waits until no new connections are accepted.
fn await_closed(address: &str) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while TcpStream::connect(address).is_ok() {
        ensure!(Instant::now() < deadline, "it still listens");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A request of which the service has read the head, and waits for the body.
fn begin(address: &str, length: usize) -> Result<TcpStream> {
    let mut stream = connect(address)?;
    let head = format!(
        "POST /orders HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    let mut answer = [0; 25];
    stream.read_exact(&mut answer)?;
    ensure!(&answer == b"HTTP/1.1 100 Continue\r\n\r\n");
    Ok(stream)
}

#[test]
fn order_of_a_client_that_has_left_is_flushed() -> Result<()> {
    let (kafka, proxy) = Proxy::in_front_of(Service::Kafka)?;
    let mut service = example().proxy(&proxy).spawn()?;
    let address = address(&mut service)?;
    assert_eq!(send(&address, order("first").as_bytes())?.0, 202);
    // Longer than the service needs to end without a flush.
    proxy.delay(Direction::ToBroker, Duration::from_secs(2))?;
    let body = order("left");
    let mut stream = begin(&address, body.len())?;
    stream.write_all(body.as_bytes())?;
    service.terminate()?;
    await_closed(&address)?;
    drop(stream);
    service.wait(TIMEOUT)?.ok()?;
    assert!(ids(&kafka)?.contains("left"));
    Ok(())
}

#[test]
fn request_that_never_ends_delays_the_end_for_seconds_only() -> Result<()> {
    let kafka = shared::kafka(&["kafka_web_service"])?;
    let mut service = example().broker(&kafka).spawn()?;
    let address = address(&mut service)?;
    let _endless = begin(&address, 100)?;
    service.interrupt()?;
    service.wait(Duration::from_secs(60))?.ok()?;
    Ok(())
}

#[test]
fn unusable_port_is_refused() -> Result<()> {
    let kafka = shared::kafka(&["kafka_web_service"])?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let taken = listener.local_addr()?.port().to_string();
    let refused = format!("Error: cannot listen at PORT {taken}");
    for (port, message) in [
        (taken.as_str(), refused.as_str()),
        ("http", "Error: PORT is not a port"),
    ] {
        let service = example().env("PORT", port).broker(&kafka).spawn();
        let ended = service?.wait(TIMEOUT)?;
        assert_eq!(ended.code(), 1);
        assert!(ended.stderr.starts_with(message), "{}", ended.stderr);
    }
    Ok(())
}
