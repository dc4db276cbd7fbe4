//! Graceful shutdown: leave the group, finish what is in hand, answer, and only then close
//!
//! A worker of a queue group that, on Ctrl-C or SIGTERM, takes no new requests, answers each one that it has, and ends.
//! What has reached the client is answered. A request that the server sends at the very moment of the
//! unsubscription can still be lost: core NATS is at most once, and its requester's second try is what covers that.
//!
//! ```console
//! 1$ cargo lab run nats_drain
//! working on drain.work; Ctrl-C to stop
//! 2$ cargo lab run nats_drain
//! working on drain.work; Ctrl-C to stop
//! 3$ cargo lab run nats_drain ask 40
//! asked 40
//! 1:
//! in hand: request-[..]
//! ...
//! 1^C
//! ...
//! leaving the group, no new requests
//! ...
//! all answered: received [..], answered [..]
//! closed
//! 3:
//! answered 40
//! 2^C
//! ...
//! closed
//! ```
//!
//! Notice: `drain` returns as soon as the order is given. The end of the subscription's stream says that the last
//! request was handed out, a flush that the answers are written, and the event `Closed` that the connection is done.
//! `Client::drain` as the first step would close the connection while answers are still being worked on: they would
//! never arrive. So: the subscription first, then the work, then the client.
//!
//! Try: `cargo lab kill nats_drain.1` instead: what it had in hand is answered by nobody, and asked again only after
//! the timeout.
//!
//! Settings: NATS_URL (nats://localhost:4222); WORK_MS (50), how long each request takes; the arguments `ask N`. See
//! also: nats_subscribe, nats_queue_group, jetstream_consumer.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail};
use async_nats::{
    Client, ConnectOptions, Event, HeaderMap, Message, PublishErrorKind, Request, RequestErrorKind,
};
use futures::StreamExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

const SUBJECT: &str = "drain.work";
const GROUP: &str = "drain-workers";
const TRIES: u32 = 5;
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (closed, mut on_closed) = mpsc::channel(1);
    let client = ConnectOptions::new()
        .event_callback(move |event| {
            let closed = closed.clone();
            async move {
                if let Event::Closed = event {
                    let _ = closed.send(()).await;
                }
            }
        })
        .connect(&url)
        .await
        .with_context(|| {
            format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
        })?;
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => work(&client, &mut on_closed).await,
        ["ask", count] => ask(&client, count.parse().context("N is a number of requests")?).await,
        _ => bail!("usage: nats_drain [ask N]"),
    }
}

async fn work(client: &Client, on_closed: &mut mpsc::Receiver<()>) -> anyhow::Result<()> {
    let work_ms = std::env::var("WORK_MS").unwrap_or_else(|_| "50".into());
    let work_ms = work_ms
        .parse()
        .context("WORK_MS is a number of milliseconds")?;
    let mut requests = client.queue_subscribe(SUBJECT, GROUP.into()).await?;
    // The server reads in order, so its "no responders" means that it has read the subscription, too.
    let _ = client.request(client.new_inbox(), "".into()).await;
    let mut terminate = signal(SignalKind::terminate())?;
    println!("working on {SUBJECT}; Ctrl-C to stop");

    let (mut received, mut answered) = (0, 0);
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            _ = terminate.recv() => break,
            request = requests.next() => {
                received += 1;
                let request = request.context("the client closed the subscription")?;
                answered += answer(client, &request, work_ms).await;
            }
        }
    }
    println!("leaving the group, no new requests");
    requests.drain().await?;
    // No limit of time here: it is the work's own that counts. Without a server, though, the stream never ends.
    loop {
        match timeout(PATIENCE, requests.next()).await {
            Ok(Some(request)) => {
                received += 1;
                answered += answer(client, &request, work_ms).await;
            }
            Ok(None) => break,
            Err(_) => bail!("the server is away: answered {answered} of {received}"),
        }
    }
    timeout(PATIENCE, client.flush())
        .await
        .context("the server is away: the last answers may not be sent")??;
    println!("all answered: received {received}, answered {answered}");
    client.drain().await?;
    let closed = timeout(PATIENCE, on_closed.recv()).await;
    closed.context("the connection does not close")?;
    println!("closed");
    Ok(())
}

/// Returns how many answers are sent: 1 or 0.
async fn answer(client: &Client, request: &Message, work_ms: u64) -> u32 {
    let text = String::from_utf8_lossy(&request.payload);
    println!("in hand: {}", text.chars().take(40).collect::<String>());
    sleep(Duration::from_millis(work_ms)).await;
    let Some(reply) = request.reply.clone() else {
        eprintln!("{text} wants no answer");
        return 0;
    };
    let mut sent = client
        .publish(reply.clone(), format!("{text} done").into())
        .await;
    // Then an error in the headers, as nats_responder has it: silence would look like a worker that died.
    if matches!(&sent, Err(error) if error.kind() == PublishErrorKind::MaxPayloadExceeded) {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Service-Error", "the answer is too large");
        headers.insert("Nats-Service-Error-Code", "413");
        sent = client.publish_with_headers(reply, headers, "".into()).await;
    }
    if let Err(error) = &sent {
        eprintln!("{text}: not answered: {error}");
    }
    u32::from(sent.is_ok())
}

/// All at once, each repeated until it is answered. The work must bear that, as always with a second try.
async fn ask(client: &Client, count: u32) -> anyhow::Result<()> {
    let mut asked = JoinSet::new();
    for number in 1..=count {
        let client = client.clone();
        asked.spawn(async move {
            let mut last = None;
            for _ in 0..TRIES {
                let request = Request::new()
                    .payload(format!("request-{number}").into())
                    .timeout(Some(Duration::from_secs(3)));
                match client.send_request(SUBJECT, request).await {
                    Ok(_) => return Ok(()),
                    Err(error) => {
                        // At once after a timeout, but nobody comes back within no time.
                        if error.kind() == RequestErrorKind::NoResponders {
                            sleep(Duration::from_millis(200)).await;
                        }
                        last = Some(error);
                    }
                }
            }
            Err(last)
        });
    }
    println!("asked {count}");
    let (mut answered, mut failed) = (0, None);
    while let Some(result) = asked.join_next().await {
        match result? {
            Ok(()) => answered += 1,
            Err(error) => failed = error,
        }
    }
    println!("answered {answered}");
    match failed {
        Some(error) => Err(error).context("some requests were answered by nobody"),
        None => Ok(()),
    }
}
