//! Lose the Kafka broker and get it back: what producer and consumer do by themselves, and which errors are final
//!
//! Ticks are sent, five in a second, and read again, while the broker is killed and started. Both clients reconnect and
//! go on by themselves. A tick waits in the producer's queue for `message.timeout.ms`; idempotence keeps the retries
//! from writing it twice or out of order. So no tick is lost and none doubled as long as the outage is shorter.
//!
//! ```console
//! 1$ cargo lab run kafka_reconnect
//! delivered: tick 0
//! ...
//! received: tick 0
//! ...
//! 2$ cargo lab kill kafka
//! 1:
//! ...
//! the broker is away, [..]
//! ...
//! waiting: [..] ticks in the producer's queue
//! ...
//! 2$ cargo lab restart kafka
//! 1:
//! ...
//! the broker is back after [..] s
//! ...
//! 1^C
//! ...
//! ticks sent [..], delivered [..], failed 0, received [..], missing 0, repeated 0
//! 2$ cargo lab run kafka_reconnect fatal
//! first: assigned
//! second, with the same group.instance.id: assigned
//! first: [..]FencedInstanceId[..]
//! that is fatal: this client is done for, its program has to end or to make another
//! ```
//!
//! Notice: the errors that `recv` gives are news, not the end, with one exception: `MessageConsumptionFatal`. After
//! `TimedOut` or `AllBrokersDown` go on calling it; a program that ends at the first error makes an outage of the broker
//! its own. On the producing side, the error of a single delivery is about that record, and `fatal_error` of the client
//! says whether there is more behind it.
//!
//! Notice too: a tick that times out may have been written, its confirmation lost. To send it again is at least once.
//!
//! Try: leave the broker away for longer than a minute, and see ticks time out. `cargo lab pause kafka`: the
//! connection stays, nothing answers, and it takes until `socket.timeout.ms` to notice.
//!
//! Settings: KAFKA_BROKERS (localhost:9092). See also: kafka_async_producer, kafka_consumer_group.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use futures::stream::{FuturesUnordered, StreamExt};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext, Rebalance, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, ClientContext, Message, Offset, TopicPartitionList};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::time::{MissedTickBehavior, interval, sleep_until, timeout};

const TOPIC: &str = "reconnect-ticks";
const PARTITIONS: i32 = 1;
const GROUP: &str = "reconnect-fatal";
const TICK: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> Result<()> {
    let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
    let argument = std::env::args().nth(1);
    create_topic(&brokers).await?;
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", &brokers)
        // Between attempts to connect the client waits for 100 ms at first, then for longer and longer. The default
        // limit of ten seconds is how late it may notice that the broker is back.
        .set("reconnect.backoff.max.ms", "1000")
        // Without an answer for this long, a connection counts as broken. The default is a minute.
        .set("socket.timeout.ms", "10000");
    match argument.as_deref() {
        None => tick(&config).await,
        Some("fatal") => fence(&config).await,
        Some(other) => bail!("the argument is `fatal` or nothing, and not {other}"),
    }
}

/// What has become of the ticks.
#[derive(Default)]
struct Tally {
    sent: u32,
    delivered: u32,
    failed: u32,
    /// How often each was read.
    received: BTreeMap<u32, u32>,
    away_since: Option<Instant>,
}

async fn tick(config: &ClientConfig) -> Result<()> {
    let producer: FutureProducer = config
        .clone()
        .set("acks", "all")
        .set("enable.idempotence", "true")
        // How long a record may wait for the broker to come back.
        .set("message.timeout.ms", "60000")
        .create()?;
    let consumer: StreamConsumer = config
        .clone()
        // Needed, though nothing is subscribed or committed.
        .set("group.id", "reconnect")
        .set("enable.auto.commit", "false")
        .create()?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for Ctrl-C")?;

    // Tells our ticks from those of a run before or beside this one.
    let started = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    let run = format!("{}-{started}", std::process::id());
    let first = producer.send(record(&run, "0"), PATIENCE).await;
    let first = first
        .map_err(|(error, _)| error)
        .context("tick 0: no delivery report")?;
    println!("delivered: tick 0");
    let mut tally = Tally {
        sent: 1,
        delivered: 1,
        ..Tally::default()
    };
    let mut from = TopicPartitionList::new();
    from.add_partition_offset(TOPIC, first.partition, Offset::Offset(first.offset))?;
    consumer.assign(&from)?;

    let mut pending = FuturesUnordered::new();
    let mut clock = interval(TICK);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut deadline = None;
    // After Ctrl-C: until all is decided, or it has taken too long.
    while deadline.is_none()
        || !pending.is_empty()
        || tally.received.len() < tally.delivered as usize
    {
        tokio::select! {
            _ = interrupt.recv(), if deadline.is_none() => {
                deadline = Some(tokio::time::Instant::now() + PATIENCE);
            }
            _ = sleep_until(deadline.unwrap_or_else(tokio::time::Instant::now)), if deadline.is_some() => break,
            _ = clock.tick(), if deadline.is_none() => {
                let number = tally.sent;
                tally.sent += 1;
                // It is in the queue when this returns, so ticks stay in order.
                let payload = number.to_string();
                match producer.send_result(record(&run, &payload)) {
                    Ok(report) => pending.push(async move { (number, report.await) }),
                    Err((error, _)) => tally.failed(number, &error),
                }
                if tally.away_since.is_some() && number.is_multiple_of(5) {
                    println!("waiting: {} ticks in the producer's queue", producer.in_flight_count());
                }
            }
            Some((number, report)) = pending.next(), if !pending.is_empty() => match report? {
                Ok(_) => {
                    tally.delivered += 1;
                    println!("delivered: tick {number}");
                }
                Err((error, _)) => {
                    tally.failed(number, &error);
                    if let Some((code, reason)) = producer.client().fatal_error() {
                        bail!("the producer is done for, make another: {code}: {reason}");
                    }
                }
            },
            received = consumer.recv() => match received {
                Ok(message) if message.key() == Some(run.as_bytes()) => {
                    if let Some(since) = tally.away_since.take() {
                        println!("the broker is back after {:.1} s", since.elapsed().as_secs_f64());
                    }
                    let number = String::from_utf8_lossy(message.payload().unwrap_or_default());
                    println!("received: tick {number}");
                    *tally.received.entry(number.parse()?).or_default() += 1;
                }
                Ok(_) => {} // of another run
                Err(error @ KafkaError::MessageConsumptionFatal(_)) => bail!(error),
                Err(error) => tally.trouble(&error),
            },
        }
    }

    let Tally {
        sent,
        delivered,
        failed,
        received,
        ..
    } = tally;
    let missing = (delivered as usize).saturating_sub(received.len());
    let repeated = received.values().filter(|count| **count > 1).count();
    println!(
        "ticks sent {sent}, delivered {delivered}, failed {failed}, received {}, missing {missing}, repeated {repeated}",
        received.len()
    );
    let open = sent - delivered - failed;
    // When the broker is away, there may be both: what was written, and not read before it went.
    let mut faults = Vec::new();
    if missing > 0 {
        faults.push(format!(
            "{missing} ticks were delivered, but not read within {PATIENCE:?}"
        ));
    }
    if open > 0 {
        faults.push(format!(
            "{open} ticks were still waiting for the broker when this was stopped, and are gone"
        ));
    }
    ensure!(faults.is_empty(), faults.join("; "));
    Ok(())
}

fn record<'a>(run: &'a str, payload: &'a str) -> FutureRecord<'a, str, str> {
    FutureRecord::to(TOPIC).key(run).payload(payload)
}

impl Tally {
    fn failed(&mut self, number: u32, error: &KafkaError) {
        self.failed += 1;
        println!("not confirmed: tick {number}: {error}");
    }

    /// There may be a hundred of these in an outage; the first says all.
    fn trouble(&mut self, error: &KafkaError) {
        if self.away_since.is_none() {
            self.away_since = Some(Instant::now());
            println!("the broker is away, and that is no reason to stop: {error}");
        }
    }
}

/// Two members that claim the same name: the group believes the later one, and the error for the other is final.
async fn fence(config: &ClientConfig) -> Result<()> {
    let (sender, mut assigned) = unbounded_channel();
    let member = || -> Result<StreamConsumer<Assigned>> {
        let member: StreamConsumer<Assigned> = config
            .clone()
            .set("group.id", GROUP)
            // A static member: after a restart the group takes it for the same, and nothing moves.
            .set("group.instance.id", "twin")
            .set("session.timeout.ms", "10000")
            .set("heartbeat.interval.ms", "500")
            .create_with_context(Assigned(sender.clone()))?;
        member.subscribe(&[TOPIC])?;
        Ok(member)
    };
    let first = member()?;
    let first = tokio::spawn(async move {
        let error = run(&first).await;
        (error, first.client().fatal_error())
    });
    let patience = 4 * PATIENCE;
    let late = "the group has not assigned anything";
    timeout(patience, assigned.recv()).await.context(late)?;
    println!("first: assigned");

    let second = member()?;
    let second = tokio::spawn(async move { run(&second).await });
    timeout(patience, assigned.recv()).await.context(late)?;
    println!("second, with the same group.instance.id: assigned");
    let ended = timeout(patience, first).await;
    let (error, cause) = ended.context("the first member was not told")??;
    let (code, reason) = cause.context("the error was not final")?;
    println!("first: {error}: {code:?}: {reason}");
    println!("that is fatal: this client is done for, its program has to end or to make another");
    second.abort();
    Ok(())
}

/// Consumes until there is no use in going on.
async fn run(consumer: &StreamConsumer<Assigned>) -> KafkaError {
    loop {
        match consumer.recv().await {
            Err(error @ KafkaError::MessageConsumptionFatal(_)) => return error,
            Err(error) => eprintln!("going on: {error}"),
            Ok(_) => {}
        }
    }
}

/// Tells that partitions were assigned.
struct Assigned(UnboundedSender<()>);

impl ClientContext for Assigned {}

impl ConsumerContext for Assigned {
    fn post_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Assign(_) = rebalance {
            let _ = self.0.send(()); // nobody waits any more
        }
    }
}

/// Left to the broker, the first record would create the topic with the broker's default, often a single partition.
async fn create_topic(brokers: &str) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    // It blocks, but nothing else runs yet.
    admin
        .inner()
        .fetch_metadata(None, PATIENCE)
        .with_context(|| {
            format!("no Kafka broker answers at {brokers}; `cargo lab up kafka` starts one")
        })?;
    // -1 is the broker's default replication factor.
    let topic = NewTopic::new(TOPIC, PARTITIONS, TopicReplication::Fixed(-1));
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    match admin.create_topics([&topic], &options).await {
        Ok(results) => {
            for result in results {
                match result {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                    Err((topic, code)) => bail!("cannot create topic {topic}: {code}"),
                }
            }
        }
        // Not every cluster lets its clients create topics; librdkafka's mock does not.
        Err(error) => eprintln!("leaving topic {TOPIC} to the broker: {error}"),
    }
    Ok(())
}
