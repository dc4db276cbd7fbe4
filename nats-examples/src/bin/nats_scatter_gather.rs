//! Scatter and gather: one question, many answers, as many as come in time
//!
//! A request takes the first answer and drops the others. Here an inbox of its own collects them, until a deadline, or
//! until as many as wanted are there. At most once, and never known to be complete: who does not answer can't be told
//! from who does not exist.
//!
//! ```console
//! 1$ cargo lab run nats_scatter_gather offer north 120
//! north offers at 120
//! 2$ cargo lab run nats_scatter_gather offer south 95
//! south offers at 95
//! 3$ cargo lab run nats_scatter_gather ask all
//! [..]: [..]
//! [..]: [..]
//! 2 answers; the best: south at 95
//! 3$ cargo lab run nats_scatter_gather ask 1
//! [..]: [..]
//! 1 answer; the best: [..]
//! 1^C
//! north leaves
//! 2^C
//! south leaves
//! ```
//!
//! Notice: `ask all` lasts as long as the deadline, for it can't know that no more will come; `ask 1` ends with the
//! first. When nobody subscribes, the server itself answers with a status 503, and nothing has to be waited for.
//! An answer that comes later goes to an inbox without subscription, and is dropped.
//!
//! Try: stop one of the shops with SIGSTOP and ask: the other's answer is still there in time.
//!
//! Settings: NATS_URL (nats://localhost:4222); the arguments are `offer NAME PRICE`, `ask all` or `ask N`. See also:
//! nats_requester.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail};
use async_nats::{Client, Message, StatusCode};
use futures::StreamExt;
use tokio::time::{Instant, timeout, timeout_at};

const SUBJECT: &str = "quotes.ask";
const DEADLINE: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["offer", name, price] => {
            let price = price.parse().context("PRICE is a whole number")?;
            offer(&client, name, price).await
        }
        [] | ["ask", "all"] => ask(&client, usize::MAX).await,
        ["ask", count] => ask(&client, count.parse().context("N is a number of answers")?).await,
        _ => bail!("usage: nats_scatter_gather [offer NAME PRICE | ask all | ask N]"),
    }
}

async fn ask(client: &Client, wanted: usize) -> anyhow::Result<()> {
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await?;
    let question = "what does it cost?";
    client
        .publish_with_reply(SUBJECT, inbox, question.into())
        .await?;

    let deadline = Instant::now() + DEADLINE;
    let mut offers: Vec<(u32, String)> = Vec::new();
    while offers.len() < wanted {
        // The deadline is for all of them; a time per answer would have no end.
        let Ok(answer) = timeout_at(deadline, answers.next()).await else {
            break;
        };
        let answer = answer.context("the client closed the subscription")?;
        if answer.status == Some(StatusCode::NO_RESPONDERS) {
            bail!(
                "nobody offers anything; try `cargo lab run nats_scatter_gather offer north 120`"
            );
        }
        let text = String::from_utf8_lossy(&answer.payload);
        match text
            .rsplit_once(": ")
            .map(|(name, price)| (name, price.parse()))
        {
            Some((name, Ok(price))) => {
                println!("{name}: {price}");
                offers.push((price, name.to_owned()));
            }
            // One bad answer is no reason to do without the good ones.
            _ => eprintln!("not an offer: {text:?}"),
        }
    }
    answers.unsubscribe().await?;

    let (best, name) = offers
        .iter()
        .min()
        .with_context(|| format!("no answer within {DEADLINE:?}"))?;
    let plural = if offers.len() == 1 { "" } else { "s" };
    println!(
        "{} answer{plural}; the best: {name} at {best}",
        offers.len()
    );
    Ok(())
}

async fn offer(client: &Client, name: &str, price: u32) -> anyhow::Result<()> {
    // Not a queue group: every shop is to answer.
    let mut questions = client.subscribe(SUBJECT).await?;
    // The server reads in order, so its "no responders" means that it has read the subscription, too.
    let _ = client.request(client.new_inbox(), "".into()).await;
    println!("{name} offers at {price}");
    let answer = async |question: Message| match question.reply {
        Some(reply) => {
            client
                .publish(reply, format!("{name}: {price}").into())
                .await
        }
        None => Ok(()),
    };
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            question = questions.next() => {
                answer(question.context("the client closed the subscription")?).await?;
            }
        }
    }
    let finish = async {
        questions.drain().await?;
        while let Some(question) = questions.next().await {
            answer(question).await?;
        }
        client.flush().await?;
        anyhow::Ok(())
    };
    let finished = timeout(PATIENCE, finish).await;
    finished.context("the server is away: the last answers may not be sent")??;
    println!("{name} leaves");
    Ok(())
}
