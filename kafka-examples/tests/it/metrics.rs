//! The metrics say how many orders were handled, how many failed, how long they took, and what is still unread.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::Broker;
use compose::harness::{Example, Running, TIMEOUT};
use rdkafka::ClientConfig;
use rdkafka::producer::{FutureProducer, FutureRecord};

use crate::shared;

const TOPIC: &str = "metered-orders";

fn example() -> Example {
    Example::new(env!("CARGO_BIN_EXE_kafka_metrics")).env("METRICS_PORT", "0")
}

/// A member, and the address of its metrics.
fn member(kafka: &Broker) -> Result<(Running, String)> {
    let mut member = example().broker(kafka).spawn()?;
    let line = member.wait_for("metrics: ", TIMEOUT)?;
    let address = line
        .strip_prefix("metrics: http://")
        .and_then(|rest| rest.strip_suffix("/metrics"))
        .context("no address")?
        .to_owned();
    Ok((member, address))
}

async fn send(kafka: &Broker, partition: i32, payloads: &[Option<&[u8]>]) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    // All are in the queue before the first report is awaited, so they keep their order.
    let sent = payloads.iter().map(|payload| {
        let mut record = FutureRecord::<[u8], [u8]>::to(TOPIC).partition(partition);
        record.payload = *payload;
        producer.send(record, TIMEOUT)
    });
    let sent = futures::future::try_join_all(sent).await;
    sent.map_err(|(error, _)| error)?;
    Ok(())
}

fn scrape(address: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(
        stream,
        "GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    Ok(answer)
}

/// The samples with this name and these labels.
fn samples(metrics: &str, name: &str, labels: &[&str]) -> Vec<f64> {
    let samples = metrics.lines().filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let rest = series.strip_prefix(name)?;
        let all = labels.iter().all(|label| rest.contains(label));
        (rest.starts_with('{') && all)
            .then_some(value)?
            .parse()
            .ok()
    });
    samples.collect()
}

fn lag(metrics: &str, partition: i32) -> Option<f64> {
    let labels = [
        r#"consumergroup="metered-orders""#,
        r#"topic="metered-orders""#,
        &format!(r#"partition="{partition}""#),
    ];
    samples(metrics, "kafka_consumergroup_lag", &labels).pop()
}

/// Waits for metrics that satisfy the condition.
fn metrics_until(address: &str, accepts: impl Fn(&str) -> bool) -> Result<String> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let metrics = scrape(address)?;
        if accepts(&metrics) {
            return Ok(metrics);
        }
        ensure!(Instant::now() < deadline, "never came: {metrics}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[tokio::test]
async fn orders_failures_and_times_are_counted() -> Result<()> {
    let kafka = shared::kafka(&["kafka_metrics"])?;
    let (mut member, address) = member(&kafka)?;
    let endless = u64::MAX.to_string();
    let huge = vec![b'9'; 900_000];
    let orders: [Option<&[u8]>; 9] = [
        Some(b"20"),
        Some(b"1200"),
        Some(b"soon"),
        None,
        Some(b""),
        Some(b"\xff\xfe"),
        Some(b"-1"),
        Some(endless.as_bytes()),
        Some(&huge),
    ];
    send(&kafka, 0, &orders).await?;
    member.wait_for("offset 8: failed: ", TIMEOUT)?;
    let metrics = metrics_until(&address, |metrics| lag(metrics, 0) == Some(0.0))?;

    let topic = r#"messaging_destination_name="metered-orders""#;
    let received = samples(
        &metrics,
        "messaging_client_consumed_messages_total",
        &[topic],
    );
    assert_eq!(received, [9.0], "{metrics}");
    let name = "messaging_process_duration_seconds_count";
    let failed = samples(&metrics, name, &[topic, r#"error_type="invalid_order""#]);
    assert_eq!(failed, [7.0], "{metrics}");
    let all: f64 = samples(&metrics, name, &[topic]).iter().sum();
    assert!((all - 9.0).abs() < 0.1, "{metrics}");
    let within = |limit: &str| -> Option<u64> {
        let limit = format!(r#"le="{limit}""#);
        let line = metrics.lines().find(|line| {
            line.starts_with("messaging_process_duration_seconds_bucket")
                && line.contains(&limit)
                && !line.contains("error_type")
        });
        line?.rsplit_once(' ')?.1.parse().ok()
    };
    // The second order takes longer than a second.
    assert!(within("1").is_some_and(|count| count <= 1), "{metrics}");
    assert_eq!(within("+Inf"), Some(2), "{metrics}");

    member.terminate()?;
    let ended = member.wait(TIMEOUT)?.ok()?;
    let slow: Vec<&str> = ended
        .stderr
        .lines()
        .filter(|line| line.contains("more than 1s"))
        .collect();
    assert!(slow.len() <= 2 && !slow.is_empty(), "{}", ended.stderr);
    Ok(())
}

#[tokio::test]
async fn lag_is_reported_by_the_member_that_has_the_partition() -> Result<()> {
    let kafka = shared::kafka(&["kafka_metrics"])?;
    let (first, first_address) = member(&kafka)?;
    // More work than both members can do during this test.
    let orders = [Some(b"300".as_slice()); 300];
    for partition in 0..3 {
        send(&kafka, partition, &orders).await?;
    }
    let unread = |metrics: &str, partition| lag(metrics, partition).is_some_and(|lag| lag > 0.0);
    // Before anything is committed, all records are unread.
    let metrics = metrics_until(&first_address, |metrics| {
        (0..3).all(|partition| unread(metrics, partition))
    })?;
    ensure!(lag(&metrics, -1).is_none(), "{metrics}");

    let (second, second_address) = member(&kafka)?;
    let metrics = metrics_until(&second_address, |metrics| {
        (0..3).any(|partition| unread(metrics, partition))
    })?;
    let mut taken = (0..3).filter(|partition| unread(&metrics, *partition));
    let taken = taken.next().context("no partition")?;
    metrics_until(&first_address, |metrics| lag(metrics, taken) == Some(0.0))?;
    // That was not because the work is done.
    let metrics = scrape(&second_address)?;
    ensure!(unread(&metrics, taken), "{metrics}");
    for mut member in [first, second] {
        member.interrupt()?;
        member.wait(TIMEOUT)?.ok()?;
    }
    Ok(())
}

#[test]
fn unusable_port_is_refused() -> Result<()> {
    let kafka = shared::kafka(&["kafka_metrics"])?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let taken = listener.local_addr()?.port().to_string();
    let refused = format!("Error: cannot serve metrics at port {taken}; METRICS_PORT");
    for (port, message) in [
        (taken.as_str(), refused.as_str()),
        ("65536", "Error: METRICS_PORT is not a port"),
        ("http", "Error: METRICS_PORT is not a port"),
    ] {
        let mut member = example().env("METRICS_PORT", port).broker(&kafka).spawn()?;
        let ended = member.wait(TIMEOUT)?;
        assert_eq!(ended.code(), 1);
        assert!(ended.stderr.starts_with(message), "{}", ended.stderr);
        assert_eq!(ended.stdout, "");
    }
    Ok(())
}
