//! Answer requests: the sum, or an error the requester can read, and never silence
//!
//! Answers `rpc.add` as one of a queue group, so that each request goes to one responder, however many run. At most
//! once: a request that is lost with a responder is not repeated by anybody but the requester. Whatever comes in, a
//! reply goes out: a request without one makes its sender wait for the timeout, and learn nothing.
//!
//! ```console
//! 1$ cargo lab run nats_responder
//! answering rpc.add; Ctrl-C to stop
//! 2$ cargo lab run nats_requester 10 20 30
//! 10, 20, 30 -> 60
//! 2$ cargo lab run nats_requester 10 twenty
//! 10, twenty -> refused with 400: "twenty" is not a whole number
//! 1:
//! 10, 20, 30 -> 60
//! 10, twenty -> 400: "twenty" is not a whole number
//! 1^C
//! stopped; requests answered: 2
//! ```
//!
//! Notice: errors travel in the headers `Nats-Service-Error` and `Nats-Service-Error-Code`, as in the micro-services
//! API, so an error can't be taken for a result. Ignoring what does not parse, and adding up the rest, would be a wrong
//! answer that nobody notices; an unchecked sum can overflow. There is no pause after subscribing: `flush` means
//! written, so the program asks the server something and waits for the answer, before which the server has read the
//! subscription.
//!
//! Try: start it twice, and send many requests. Stop it with SIGSTOP: the requester's timeout is all that helps.
//!
//! Settings: NATS_URL (nats://localhost:4222). See also: nats_requester, nats_service, nats_queue_group.

use std::pin::pin;
use std::time::Duration;

use anyhow::Context;
use async_nats::{Client, HeaderMap, Message};
use futures::StreamExt;
use tokio::time::timeout;

const SUBJECT: &str = "rpc.add";
const GROUP: &str = "adders";
const PATIENCE: Duration = Duration::from_secs(5);

/// A code, and a text without line breaks: both travel in headers.
type Refusal = (u16, String);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    let mut requests = client.queue_subscribe(SUBJECT, GROUP.into()).await?;
    // The server reads in order, so its "no responders" means that it has read the subscription, too.
    let _ = client.request(client.new_inbox(), "".into()).await;
    println!("answering {SUBJECT}; Ctrl-C to stop");

    let mut answered = 0;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            request = requests.next() => {
                let request = request.context("the client closed the subscription")?;
                answer(&client, &request).await;
                answered += 1;
            }
        }
    }
    // Only the subscription: `client.drain` would close the connection under the answers that are still to be sent.
    let finish = async {
        requests.drain().await?;
        while let Some(request) = requests.next().await {
            answer(&client, &request).await;
            answered += 1;
        }
        client.flush().await?;
        anyhow::Ok(())
    };
    let finished = timeout(PATIENCE, finish).await;
    finished.context("the server is away: the last answers may not be sent")??;
    println!("stopped; requests answered: {answered}");
    Ok(())
}

async fn answer(client: &Client, request: &Message) {
    let text = String::from_utf8_lossy(&request.payload);
    let text: String = text.chars().take(60).collect();
    let result = add(&request.payload);
    match &result {
        Ok(sum) => println!("{text} -> {sum}"),
        Err((code, reason)) => println!("{text} -> {code}: {reason}"),
    }
    let Some(reply) = request.reply.clone() else {
        eprintln!("it was published, not requested: nobody waits for the answer");
        return;
    };
    let sent = match result {
        Ok(sum) => client.publish(reply, sum.to_string().into()).await,
        Err((code, reason)) => {
            let mut headers = HeaderMap::new();
            headers.insert("Nats-Service-Error", reason);
            headers.insert("Nats-Service-Error-Code", code.to_string());
            client.publish_with_headers(reply, headers, "".into()).await
        }
    };
    if let Err(error) = sent {
        eprintln!("no answer to {text}: {error}");
    }
}

fn add(payload: &[u8]) -> Result<i64, Refusal> {
    let text = std::str::from_utf8(payload).map_err(|error| (400, error.to_string()))?;
    let mut sum: i64 = 0;
    for number in text.split(',') {
        let number = number.trim();
        let value = number.parse().map_err(|_| {
            // Quoted and escaped, and not all of it: the text becomes a header.
            let start: String = number.chars().take(40).collect();
            (400, format!("{start:?} is not a whole number"))
        })?;
        sum = sum
            .checked_add(value)
            .ok_or((422, "the sum does not fit into 64 bits".to_owned()))?;
    }
    Ok(sum)
}
