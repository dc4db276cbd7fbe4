//! Queue depth: ready, unacknowledged, consumers and rates, with a warning before the backlog hurts
//!
//! Asks the HTTP API of the management plugin for all queues of the virtual host, or for those that are named, and
//! prints what has changed. Warns when a queue's messages, ready and unacknowledged, are more than the threshold, and
//! when it has messages and no consumer; says when that is over, and when the queue is gone. The API's numbers are up
//! to five seconds old.
//!
//! ```console
//! 1$ cargo lab run rabbitmq_new_task 'a.' 'b' 'c'
//! ...
//! sent and confirmed: c
//! 2$ MONITOR_INTERVAL=1 MONITOR_THRESHOLD=2 cargo lab run rabbitmq_queue_monitor work-queue
//! watching work-queue every 1 s, threshold 2
//! ...
//! work-queue: ready 3, unacknowledged 0, consumers 0, in [..]/s, out [..]/s
//! WARNING: work-queue has 3 messages, over the threshold of 2
//! WARNING: work-queue has messages and no consumer
//! 1$ cargo lab run rabbitmq_worker
//! ...
//! worker 1: done c
//! 2:
//! ...
//! recovered: work-queue has a consumer
//! ...
//! recovered: work-queue has [..] messages
//! ...
//! 1^C
//! ...
//! 2^C
//! ...
//! stopped
//! ```
//!
//! Notice: watch both numbers. A consumer that forgets to acknowledge has an empty queue behind it and thousands of
//! unacknowledged messages. Over AMQP, a passive declaration tells only what is ready. A queue without a consumer is
//! worth a warning at any depth: nothing will make it shorter. For some seconds after its node's start a queue is listed
//! without numbers. That is not zero: read as zero, it would end each warning.
//!
//! Try: rabbitmq_pitfall_missing_ack beside it; a wrong password in AMQP_ADDR; stop the broker and start it again.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f), for the virtual host, the name and the password;
//! RABBITMQ_MANAGEMENT_URL (http://localhost:15672); MONITOR_THRESHOLD (10000) messages; MONITOR_INTERVAL (10) in
//! seconds; the arguments are names of queues. For many queues, take the metrics that the Prometheus plugin exports
//! (`rabbitmq_detailed_queue_messages_ready`): the statistics of the management plugin are costly, and deprecated. See
//! also: rabbitmq_pitfall_missing_ack.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use lapin::uri::AMQPUri;
use reqwest::{Client, StatusCode, Url};
use serde::Deserialize;
use tokio::time::{MissedTickBehavior, interval};

const PATIENCE: Duration = Duration::from_secs(5);

/// What the API says of a queue. Without statistics, all but the name is missing.
#[derive(Deserialize)]
struct Queue {
    name: String,
    messages_ready: Option<u64>,
    messages_unacknowledged: Option<u64>,
    consumers: Option<u64>,
    #[serde(default)]
    message_stats: Traffic,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Traffic {
    publish_details: Rate,
    ack_details: Rate,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Rate {
    rate: f64,
}

/// What was said last about a queue.
#[derive(Default)]
struct Said {
    line: String,
    over: bool,
    abandoned: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
    let wanted: BTreeSet<String> = std::env::args().skip(1).collect();
    let threshold = number("MONITOR_THRESHOLD", 10_000)?;
    let seconds = number("MONITOR_INTERVAL", 10)?.max(1);
    let api = Api::new(&addr)?;

    let mut interrupt = pin!(tokio::signal::ctrl_c());
    let mut ticks = interval(Duration::from_secs(seconds));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut said: BTreeMap<String, Said> = BTreeMap::new();
    let mut begun = false;
    loop {
        tokio::select! {
            signal = &mut interrupt => break signal?,
            _ = ticks.tick() => {}
        }
        let queues = tokio::select! {
            signal = &mut interrupt => break signal?,
            queues = api.queues() => queues,
        };
        let mut queues = match queues {
            Ok(queues) => queues,
            // At the start it is a mistake in the settings; later the broker may come back.
            Err(error) if !begun => return Err(error),
            Err(error) => {
                eprintln!("no numbers: {error:#}");
                continue;
            }
        };
        if !begun {
            begun = true;
            let names: Vec<_> = wanted.iter().map(String::as_str).collect();
            let names = match names[..] {
                [] => "all queues".to_owned(),
                _ => names.join(", "),
            };
            println!("watching {names} every {seconds} s, threshold {threshold}");
            let missing = wanted
                .iter()
                .filter(|name| !queues.iter().any(|queue| queue.name == **name));
            for name in missing {
                println!("{name}: no such queue yet");
            }
        }
        queues.retain(|queue| wanted.is_empty() || wanted.contains(&queue.name));
        // What is said of a queue of that name that may come later, begins anew.
        said.retain(|name, _| {
            let there = queues.iter().any(|queue| queue.name == *name);
            if !there {
                println!("{name}: the queue is gone");
            }
            there
        });
        for queue in queues {
            look_at(
                &queue,
                threshold,
                said.entry(queue.name.clone()).or_default(),
            );
        }
    }
    println!("stopped");
    Ok(())
}

fn number(name: &str, default: u64) -> anyhow::Result<u64> {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{name} is a number, not {text:?}")),
        Err(_) => Ok(default),
    }
}

fn look_at(queue: &Queue, threshold: u64, said: &mut Said) {
    let name = &queue.name;
    let (Some(ready), Some(unacked), Some(consumers)) = (
        queue.messages_ready,
        queue.messages_unacknowledged,
        queue.consumers,
    ) else {
        say(said, format!("{name}: no numbers yet"));
        return;
    };
    let [into, out] = [
        &queue.message_stats.publish_details,
        &queue.message_stats.ack_details,
    ]
    .map(|details| details.rate);
    let line = format!(
        "{name}: ready {ready}, unacknowledged {unacked}, consumers {consumers}, in {into:.1}/s, out {out:.1}/s"
    );
    say(said, line);
    let depth = ready.saturating_add(unacked);
    let abandoned = depth > 0 && consumers == 0;
    if said.abandoned && !abandoned {
        let what = if consumers > 0 {
            "a consumer"
        } else {
            "nothing left"
        };
        println!("recovered: {name} has {what}");
    }
    let over = depth > threshold;
    if over && !said.over {
        println!("WARNING: {name} has {depth} messages, over the threshold of {threshold}");
    } else if said.over && !over {
        println!("recovered: {name} has {depth} messages");
    }
    if abandoned && !said.abandoned {
        println!("WARNING: {name} has messages and no consumer");
    }
    said.over = over;
    said.abandoned = abandoned;
}

/// Says only what is new.
fn say(said: &mut Said, line: String) {
    if line != said.line {
        println!("{line}");
        said.line = line;
    }
}

struct Api {
    client: Client,
    url: Url,
    /// Where the broker is, without the password.
    host: String,
    user: String,
    password: String,
}

impl Api {
    fn new(addr: &str) -> anyhow::Result<Api> {
        let uri: AMQPUri = addr.parse().map_err(|_| {
            anyhow!("AMQP_ADDR is not an address such as amqp://localhost:5672/%2f")
        })?;
        let base = std::env::var("RABBITMQ_MANAGEMENT_URL");
        let base = base.unwrap_or_else(|_| "http://localhost:15672".into());
        let mut url = Url::parse(&base).context("RABBITMQ_MANAGEMENT_URL is no URL")?;
        // Segments are escaped: the virtual host "/" becomes %2F.
        url.path_segments_mut()
            .map_err(|()| anyhow!("RABBITMQ_MANAGEMENT_URL is no http:// address"))?
            .pop_if_empty()
            .extend(["api", "queues", &uri.vhost]);
        Ok(Api {
            client: Client::builder().timeout(PATIENCE).build()?,
            url,
            host: addr.rsplit('@').next().unwrap_or_default().to_owned(),
            user: uri.authority.userinfo.username,
            password: uri.authority.userinfo.password,
        })
    }

    async fn queues(&self) -> anyhow::Result<Vec<Queue>> {
        let Api {
            url, host, user, ..
        } = self;
        let request = self.client.get(url.clone());
        let answer = request.basic_auth(user, Some(&self.password)).send().await;
        let answer = answer.with_context(|| {
            format!(
                "no HTTP API answers at {url}, for the broker at {host}; is RABBITMQ_MANAGEMENT_URL right, and the \
                 plugin rabbitmq_management enabled? `cargo lab up rabbitmq` starts a broker with it"
            )
        })?;
        match answer.status() {
            StatusCode::OK => answer
                .json()
                .await
                .with_context(|| format!("{url} answers, but not as RabbitMQ's HTTP API does")),
            StatusCode::UNAUTHORIZED => bail!(
                "{url} refuses user {user:?}: a wrong name or password in AMQP_ADDR, or a user without the tag \
                 `monitoring`; guest may only come from localhost"
            ),
            StatusCode::NOT_FOUND => {
                bail!("{url}: there is no such virtual host, or no HTTP API there")
            }
            other => bail!("{url} answers {other}"),
        }
    }
}
