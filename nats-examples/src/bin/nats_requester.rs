//! Request an answer, and tell no responders, a timeout and a refusal apart
//!
//! Asks `rpc.add` for sums. The three ways to get none mean different things: nobody is there (the server says so at
//! once, nothing was done), nobody answered in time (it may have been done, or not), or the responder refused (asking
//! again is no use). At most once: the client never repeats a request by itself.
//!
//! ```console
//! 1$ cargo lab run nats_requester
//! [exit 1]
//! 1$ cargo lab run nats_responder
//! answering rpc.add; Ctrl-C to stop
//! 2$ cargo lab run nats_requester
//! 10, 20, 30 -> 60
//! 9223372036854775807, 1 -> refused with 422: the sum does not fit into 64 bits
//! ten -> refused with 400: "ten" is not a whole number
//! 1:
//! ...
//! 1^C
//! stopped; requests answered: 3
//! ```
//!
//! Notice: the first call fails within milliseconds and not after the timeout: the server knows that nobody subscribes
//! to `rpc.add`. Sleeping a while until a responder is surely up is neither needed nor sure. A timeout says nothing
//! about the work: before repeating a request that changes something, give it an id that the responder recognises.
//!
//! Try: stop the responder with SIGSTOP and ask: this ends after two seconds. Ask it for `1 2 3`, each an argument.
//!
//! Settings: NATS_URL (nats://localhost:4222); the arguments are the numbers of one request. See also: nats_responder,
//! nats_scatter_gather.

use std::time::Duration;

use anyhow::{Context, bail};
use async_nats::{Client, Message, Request, RequestErrorKind};

const SUBJECT: &str = "rpc.add";
const TIMEOUT: Duration = Duration::from_secs(2);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    if !args.is_empty() {
        return ask(&client, args.join(", ")).await;
    }
    for numbers in ["10, 20, 30", "9223372036854775807, 1", "ten"] {
        ask(&client, numbers.into()).await?;
    }
    Ok(())
}

async fn ask(client: &Client, numbers: String) -> anyhow::Result<()> {
    let request = Request::new()
        .payload(numbers.clone().into())
        // The client's own default is ten seconds.
        .timeout(Some(TIMEOUT));
    let reply = match client.send_request(SUBJECT, request).await {
        Ok(reply) => reply,
        Err(error) => match error.kind() {
            RequestErrorKind::NoResponders => bail!(
                "no responders: nobody subscribes to {SUBJECT}; `cargo lab run nats_responder` starts one"
            ),
            RequestErrorKind::TimedOut => {
                bail!(
                    "no answer to {numbers:?} within {TIMEOUT:?}: it may have been worked on, or not"
                )
            }
            _ => return Err(error).context("the request could not be sent"),
        },
    };
    match refusal(&reply) {
        Some((code, reason)) => println!("{numbers} -> refused with {code}: {reason}"),
        None => println!("{numbers} -> {}", String::from_utf8_lossy(&reply.payload)),
    }
    Ok(())
}

fn refusal(reply: &Message) -> Option<(&str, &str)> {
    let headers = reply.headers.as_ref()?;
    let reason = headers.get("Nats-Service-Error")?;
    let code = headers.get("Nats-Service-Error-Code");
    Some((
        code.map_or("no code", |code| code.as_str()),
        reason.as_str(),
    ))
}
