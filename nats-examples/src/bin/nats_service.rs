//! Micro-services: endpoints that can be found, asked for their schema, and measured
//!
//! The client's service API is request and reply with agreed subjects around it: every instance answers `$SRV.PING`,
//! `$SRV.INFO` and `$SRV.STATS`, so tools find it without any registry. Instances share the requests as a queue group.
//! At most once, as every request: see nats_requester.
//!
//! ```console
//! 1$ cargo lab run nats_service
//! text 1.0.0 [..] serves text.upper and text.length; Ctrl-C to stop
//! 2$ cargo lab run nats_service call upper "hello"
//! HELLO
//! 2$ cargo lab run nats_service call length ""
//! refused with 400: there is no text
//! 2$ cargo lab run nats_service discover
//! text 1.0.0 [..]: turns text into other text
//!     upper at text.upper: text to text; 1 requests, 0 errors
//!     length at text.length: text to number; 1 requests, 1 errors, the last: 400:there is no text
//! 1:
//! ...
//! 1^C
//! stopped
//! ```
//!
//! Notice: the schema is metadata, for people and tools to read; nothing checks a request against it, so the handler
//! does. A refused request is answered with an error, counted, and the service lives on. `discover` is a
//! scatter and gather: it takes the answers that come within its deadline.
//!
//! Try: start it twice and discover. With the `nats` tool: `nats micro ls`, `nats micro stats text`.
//!
//! Settings: NATS_URL (nats://localhost:4222); the arguments are `call ENDPOINT TEXT` or `discover`. See also:
//! nats_responder, nats_scatter_gather.

use std::collections::HashMap;
use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use async_nats::service::{self, ServiceExt, error::Error as Refusal};
use async_nats::{Client, RequestErrorKind, StatusCode};
use futures::{StreamExt, stream};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout, timeout_at};

const NAME: &str = "text";
const DEADLINE: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => serve(&client).await,
        ["call", endpoint, text] => call(&client, endpoint, text.to_owned()).await,
        ["discover"] => discover(&client).await,
        _ => bail!("usage: nats_service [call ENDPOINT TEXT | discover]"),
    }
}

async fn serve(client: &Client) -> anyhow::Result<()> {
    // The API's errors are boxed, without the traits that `?` into anyhow asks for in all versions.
    let service = client
        .service_builder()
        .description("turns text into other text")
        .start(NAME, "1.0.0")
        .await
        .map_err(|error| anyhow!(error))?;
    let group = service.group(NAME);
    let mut endpoints = Vec::new();
    for (name, schema) in [("upper", "text to text"), ("length", "text to number")] {
        let metadata = HashMap::from([("schema".to_owned(), schema.to_owned())]);
        let endpoint = group.endpoint_builder().name(name).metadata(metadata);
        endpoints.push(endpoint.add(name).await.map_err(|error| anyhow!(error))?);
    }
    // The server reads in order, so its "no responders" means that it has read the subscriptions, too.
    let _ = client.request(client.new_inbox(), "".into()).await;
    let id = service.info().await.id;
    println!("{NAME} 1.0.0 {id} serves text.upper and text.length; Ctrl-C to stop");

    let mut requests = stream::select_all(endpoints);
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            request = requests.next() => {
                let request = request.context("the client closed the subscriptions")?;
                handle(client, &request).await;
            }
        }
    }
    // Ends the streams; requests that are in the buffers already are still handed out.
    service.stop().await.map_err(|error| anyhow!(error))?;
    let finish = async {
        while let Some(request) = requests.next().await {
            handle(client, &request).await;
        }
        client.flush().await
    };
    timeout(PATIENCE, finish)
        .await
        .context("the server is away: the last answers may not be sent")??;
    println!("stopped");
    Ok(())
}

async fn handle(client: &Client, request: &service::Request) {
    let subject = &request.message.subject;
    let answer = match std::str::from_utf8(&request.message.payload) {
        Ok("") => Err("there is no text".to_owned()),
        Ok(text) if subject.as_str() == "text.upper" => match text.to_uppercase() {
            // Capitals can take more bytes. An answer that can't be published would be no answer at all.
            upper if upper.len() > client.max_payload() => Err("too long in capitals".to_owned()),
            upper => Ok(upper),
        },
        Ok(text) => Ok(text.chars().count().to_string()),
        Err(error) => Err(error.to_string()),
    };
    println!(
        "{subject}: {}",
        if answer.is_ok() {
            "answered"
        } else {
            "refused"
        }
    );
    let answer = answer
        .map(Into::into)
        .map_err(|status| Refusal { status, code: 400 });
    if let Err(error) = request.respond(answer).await {
        // It was published instead of requested, for example.
        eprintln!("not answered: {error}");
    }
}

async fn call(client: &Client, endpoint: &str, text: String) -> anyhow::Result<()> {
    let subject = format!("{NAME}.{endpoint}");
    let reply = match client.request(subject.clone(), text.into()).await {
        Ok(reply) => reply,
        Err(error) if error.kind() == RequestErrorKind::NoResponders => {
            bail!("nobody serves {subject}; `cargo lab run nats_service` does")
        }
        Err(error) => return Err(error).with_context(|| format!("no answer from {subject}")),
    };
    let header = |name| {
        reply
            .headers
            .as_ref()?
            .get(name)
            .map(|value| value.as_str())
    };
    match header(service::NATS_SERVICE_ERROR) {
        Some(status) => {
            let code = header(service::NATS_SERVICE_ERROR_CODE).unwrap_or("no code");
            println!("refused with {code}: {status}");
        }
        None => println!("{}", String::from_utf8_lossy(&reply.payload)),
    }
    Ok(())
}

async fn discover(client: &Client) -> anyhow::Result<()> {
    let infos: Vec<service::Info> = gather(client, "$SRV.INFO").await?;
    let stats: Vec<service::Stats> = gather(client, "$SRV.STATS").await?;
    if infos.is_empty() {
        bail!("no service answers; `cargo lab run nats_service` starts one");
    }
    for info in infos {
        println!(
            "{} {} {}: {}",
            info.name, info.version, info.id, info.description
        );
        let of_this = stats.iter().find(|stats| stats.id == info.id);
        let measured = of_this.map_or(&[][..], |stats| &stats.endpoints);
        // In the order of the instance's answer there is no order.
        let mut endpoints = info.endpoints;
        endpoints.sort_by(|one, other| other.name.cmp(&one.name));
        for endpoint in endpoints {
            let schema = endpoint
                .metadata
                .get("schema")
                .map_or("no schema", String::as_str);
            print!("    {} at {}: {schema}", endpoint.name, endpoint.subject);
            if let Some(stats) = measured.iter().find(|stats| stats.name == endpoint.name) {
                print!("; {} requests, {} errors", stats.requests, stats.errors);
                if let Some(error) = &stats.last_error {
                    print!(", the last: {}:{}", error.code, error.status);
                }
            }
            println!();
        }
    }
    Ok(())
}

/// All answers within the deadline. What does not look like one is left out.
async fn gather<T: DeserializeOwned>(client: &Client, subject: &str) -> anyhow::Result<Vec<T>> {
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await?;
    client
        .publish_with_reply(subject.to_owned(), inbox, "".into())
        .await?;
    let deadline = Instant::now() + DEADLINE;
    let mut found = Vec::new();
    while let Ok(Some(answer)) = timeout_at(deadline, answers.next()).await {
        if answer.status == Some(StatusCode::NO_RESPONDERS) {
            break;
        }
        match serde_json::from_slice(&answer.payload) {
            Ok(answer) => found.push(answer),
            Err(error) => eprintln!("an answer to {subject} can't be read: {error}"),
        }
    }
    Ok(found)
}
