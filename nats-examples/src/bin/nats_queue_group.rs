//! Queue group: members share the messages, and come and go as they like
//!
//! Each job goes to one member of the group, picked at random, while subscribers outside it still get them all. There
//! is nothing to declare: a subscription with a group name is a member. At most once: a job is gone with the
//! member that was killed with it, and when the group is empty, a job is gone at once.
//!
//! ```console
//! 1$ cargo lab run nats_queue_group join anna
//! anna joined the workers
//! 2$ cargo lab run nats_queue_group join ben
//! ben joined the workers
//! 3$ cargo lab run nats_queue_group send 40
//! sent 40 jobs
//! 1:
//! anna: job-[..]
//! ...
//! 2:
//! ben: job-[..]
//! ...
//! 1^C
//! ...
//! anna left after [..] jobs
//! 2^C
//! ...
//! ben left after [..] jobs
//! ```
//!
//! Notice: the two sums are 40. Random also means that there is no order across members, and that a member that is slow
//! gets as many jobs as one that is fast; its jobs wait in its client's buffer. Pulling, as JetStream consumers do,
//! gives a job to who asks for one.
//!
//! Try: start a third in the middle of `send 100000`, and stop another. `cargo lab kill nats_queue_group.1`: nobody
//! takes over its jobs. Subscribe with `nats_subscribe jobs.new` meanwhile: it gets every job.
//!
//! Settings: NATS_URL (nats://localhost:4222); the arguments are `join NAME` or `send N`. See also: nats_drain,
//! jetstream_work_queue.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, bail};
use async_nats::{Client, Message};
use futures::StreamExt;
use tokio::time::timeout;

const SUBJECT: &str = "jobs.new";
const GROUP: &str = "workers";
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => join(&client, "worker").await,
        ["join", name] => join(&client, name).await,
        ["send", count] => {
            let count = count.parse().context("N is the number of jobs")?;
            send(&client, count).await
        }
        _ => bail!("usage: nats_queue_group [join NAME | send N]"),
    }
}

async fn send(client: &Client, count: u32) -> anyhow::Result<()> {
    for number in 1..=count {
        let job = format!("job-{number}");
        client.publish(SUBJECT, job.into()).await?;
    }
    timeout(PATIENCE, client.flush())
        .await
        .context("lost the connection: some jobs may not be sent")??;
    println!("sent {count} jobs");
    Ok(())
}

async fn join(client: &Client, name: &str) -> anyhow::Result<()> {
    let mut jobs = client.queue_subscribe(SUBJECT, GROUP.into()).await?;
    // The server reads in order, so its "no responders" means that it has read the subscription, too.
    let _ = client.request(client.new_inbox(), "".into()).await;
    println!("{name} joined the {GROUP}");

    let mut done = 0_u32;
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => break signal?,
            job = jobs.next() => {
                work(name, &job.context("the client closed the subscription")?);
                done += 1;
            }
        }
    }
    // From here on the others get the jobs. Those that are already in this client's buffer are this member's.
    let finish = async {
        jobs.drain().await?;
        while let Some(job) = jobs.next().await {
            work(name, &job);
            done += 1;
        }
        anyhow::Ok(())
    };
    let finished = timeout(PATIENCE, finish).await;
    finished.context("the server is away: it will notice by itself that this member is gone")??;
    println!("{name} left after {done} jobs");
    Ok(())
}

fn work(name: &str, job: &Message) {
    println!("{name}: {}", String::from_utf8_lossy(&job.payload));
}
