//! What the tests need again and again.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream;
use async_nats::jetstream::consumer::Info;
use compose::harness::{Example, Finished, Running, http_get};
use compose::{Broker, Service};

pub use compose::harness::TIMEOUT;

pub fn server() -> Result<Broker> {
    Broker::private(Service::Nats)
}

pub fn start(program: &str, args: &[&str], nats: &Broker) -> Result<Running> {
    Example::new(program).args(args).broker(nats).spawn()
}

/// Runs it to its end, whatever that is.
pub fn run(program: &str, args: &[&str], nats: &Broker) -> Result<Finished> {
    start(program, args, nats)?.wait(TIMEOUT)
}

pub fn stop(mut running: Running) -> Result<Finished> {
    running.interrupt()?;
    running.wait(TIMEOUT)?.ok()
}

pub async fn jetstream(nats: &Broker) -> Result<jetstream::Context> {
    let client = async_nats::ConnectOptions::new()
        .reconnect_delay_callback(|_| Duration::from_millis(50))
        .connect(nats.address())
        .await?;
    let mut jetstream = jetstream::new(client);
    jetstream.set_timeout(Duration::from_secs(20));
    Ok(jetstream)
}

pub async fn consumer(jetstream: &jetstream::Context, stream: &str, name: &str) -> Result<Info> {
    Ok(jetstream
        .get_stream(stream)
        .await?
        .consumer_info(name)
        .await?)
}

/// Until nothing is to come any more, and nothing is unacknowledged.
pub async fn caught_up(jetstream: &jetstream::Context, stream: &str, name: &str) -> Result<()> {
    let deadline = Instant::now() + 2 * TIMEOUT;
    loop {
        // A server that is just back may not answer yet.
        let info = consumer(jetstream, stream, name).await;
        if let Ok(info) = &info
            && info.num_pending == 0
            && info.num_ack_pending == 0
        {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "not caught up: {info:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// All that the server has been sent on this connection is read by now.
pub async fn round_trip(client: &async_nats::Client) {
    // Nobody subscribes there: the server answers that at once.
    let _ = client.request(client.new_inbox(), "".into()).await;
}

/// All that the server has been sent on this connection is out of its hands: in its clients' sockets, read or not.
pub async fn handed_over(nats: &Broker, client: &async_nats::Client) -> Result<()> {
    round_trip(client).await;
    until("the server has handed it over", || {
        let waiting = |one: &serde_json::Value| one["pending_bytes"] != 0;
        Ok(!connections(nats)?.iter().any(waiting))
    })
}

/// The server's connections, by its monitoring page.
pub fn connections(nats: &Broker) -> Result<Vec<serde_json::Value>> {
    let page = format!("{}/connz", nats.web()[0]);
    let (_, text) = http_get(&page, TIMEOUT).with_context(|| format!("no answer from {page}"))?;
    let page: serde_json::Value = serde_json::from_str(&text)?;
    let connections = page["connections"].as_array();
    Ok(connections.context("no list of connections")?.clone())
}

pub fn until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while !holds().with_context(|| format!("waiting until {what}"))? {
        ensure!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
