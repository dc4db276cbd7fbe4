//! Lose the Pulsar broker and get it back: tasks that own producer and consumer, and make them anew
//!
//! Ticks are sent, ten in a second, and read again, while the broker is killed and started. Each side is a task that
//! owns its client; when that fails, or is silent for too long, it is thrown away and made anew. What has no receipt is
//! sent again, so it is at least once: nothing acknowledged is lost, some ticks may come twice.
//!
//! ```console
//! 1$ cargo lab run pulsar_reconnect
//! ...
//! stored: tick 0
//! ...
//! received: tick [..]
//! ...
//! 2$ cargo lab kill pulsar
//! 1:
//! ...
//! consumer: made anew, [..]
//! ...
//! 2$ cargo lab restart pulsar
//! 1:
//! ...
//! consumer: back
//! ...
//! received: tick [..]
//! ...
//! 1^C
//! ...
//! attempted [..] / acked [..] / indeterminate 0 / delivered [..] / duplicate [..] / lost 0 / unexpected 0
//! ```
//!
//! Notice: the client reconnects by itself, up to a point. A consumer whose attempt fails ends its stream, and a loop
//! that takes that for a normal end has stopped without an error. One that waits for an answer that will never come
//! says nothing at all, hence the question after each silence. A client is not repaired but replaced: an attempt to
//! connect that is cancelled leaves the next ones waiting for it. It has to be dropped: a consumer that is only closed
//! subscribes again after a short fault. `send` and `ack` take `&mut self`, so each side is one task, and others talk
//! to it through a channel. Each run has a subscription of its own, and takes it away at its end; one that is killed
//! leaves it behind, and with it a backlog that grows (pulsar_backlog_monitor).
//!
//! Try: `cargo lab pause pulsar`: the connections stay, nothing answers. It takes the keep-alive and its timeout to
//! notice.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650). See also: pulsar_producer, pulsar_consumer.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use futures::stream::FuturesOrdered;
use pulsar::consumer::InitialPosition;
use pulsar::{
    ConnectionRetryOptions, Consumer, ConsumerOptions, OperationRetryOptions, Producer,
    ProducerOptions, Pulsar, SubType, TokioExecutor,
};
use tokio::sync::Notify;
use tokio::sync::mpsc::{Receiver, Sender, UnboundedSender, channel, unbounded_channel};
use tokio::time::{MissedTickBehavior, interval, sleep, sleep_until, timeout};

const TOPIC: &str = "persistent://public/default/reconnect-ticks";
/// Followed by the run's name: a subscription that two runs share gives each a part of the ticks.
const SUBSCRIPTION: &str = "reconnect-ticks-";
const TICK: Duration = Duration::from_millis(100);
/// How many may be without a receipt. More wait in the channel, and then the sender does.
const WINDOW: usize = 500;
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(500);

enum Event {
    Stored(u32),
    Received(String),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address =
        std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
    // A broker that was never there is a mistake to be told; one that goes is not.
    let pulsar = connect(&address).await?;
    // Tells our ticks from those of a run before or beside this one.
    let started = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    let run = format!("{}-{started}", std::process::id());
    // Before the first tick: from now on, the broker keeps them for us.
    // It makes the topic, too, on a broker that may be starting.
    let mut consumer = subscribe(&pulsar, &run, 4 * PATIENCE).await?;
    consumer.close().await?;
    // Closing is not enough. When the connection is lost, the client subscribes again for a closed consumer that is not
    // dropped. It could become the active one, and nobody would read its ticks.
    drop(consumer);
    drop(pulsar);
    let (ticks, to_send) = channel(1000);
    let (events, mut happened) = unbounded_channel();
    let producer = tokio::spawn(produce(
        address.clone(),
        run.clone(),
        to_send,
        events.clone(),
    ));
    let ended = Arc::new(Notify::new());
    let consumer = consume(address, run.clone(), events, ended.clone());
    let mut consumer = tokio::spawn(consumer);

    let mut tally = Tally::default();
    tally.run(&run, &ticks, &mut happened).await?;
    producer.abort();
    ended.notify_one();
    if timeout(2 * PATIENCE, &mut consumer).await.is_err() {
        consumer.abort();
        eprintln!(
            "the subscription {SUBSCRIPTION}{run} is still there, and holds all ticks to come"
        );
    }
    tally.report()
}

/// What has become of the ticks.
#[derive(Default)]
struct Tally {
    attempted: u32,
    acked: BTreeSet<u32>,
    delivered: BTreeMap<u32, u32>,
    unexpected: u32,
}

impl Tally {
    async fn run(
        &mut self,
        run: &str,
        ticks: &Sender<u32>,
        happened: &mut tokio::sync::mpsc::UnboundedReceiver<Event>,
    ) -> anyhow::Result<()> {
        let mut clock = interval(TICK);
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut interrupt = std::pin::pin!(tokio::signal::ctrl_c());
        let mut deadline = None;
        // After Ctrl-C: until all is decided, or it has taken too long.
        while deadline.is_none()
            || self.acked.len() < self.attempted as usize
            || self.delivered.len() < self.acked.len()
        {
            tokio::select! {
                signal = &mut interrupt, if deadline.is_none() => {
                    signal?;
                    deadline = Some(tokio::time::Instant::now() + 4 * PATIENCE);
                }
                _ = sleep_until(deadline.unwrap_or_else(tokio::time::Instant::now)), if deadline.is_some() => break,
                _ = clock.tick(), if deadline.is_none() => match ticks.try_send(self.attempted) {
                    Ok(()) => self.attempted += 1,
                    Err(_) => println!("no room for another tick; this one is left out"),
                },
                Some(event) = happened.recv() => match event {
                    Event::Stored(tick) => {
                        println!("stored: tick {tick}");
                        self.acked.insert(tick);
                    }
                    Event::Received(payload) => {
                        // Others are of another run.
                        let Some((of, tick)) = payload.split_once(' ') else { continue };
                        if of != run {
                            continue;
                        }
                        println!("received: tick {tick}");
                        match tick.parse() {
                            Ok(tick) if tick < self.attempted => *self.delivered.entry(tick).or_default() += 1,
                            _ => self.unexpected += 1,
                        }
                    }
                },
            }
        }
        Ok(())
    }

    fn report(&self) -> anyhow::Result<()> {
        let (attempted, acked) = (self.attempted, self.acked.len());
        let indeterminate = attempted as usize - acked;
        let delivered: u32 = self.delivered.values().sum();
        let duplicate = delivered as usize - self.delivered.len();
        let lost = self
            .acked
            .iter()
            .filter(|tick| !self.delivered.contains_key(tick))
            .count();
        println!(
            "attempted {attempted} / acked {acked} / indeterminate {indeterminate} / delivered {delivered} \
             / duplicate {duplicate} / lost {lost} / unexpected {}",
            self.unexpected
        );
        ensure!(
            lost == 0,
            "{lost} ticks were stored, but have not come in time"
        );
        ensure!(
            indeterminate == 0,
            "{indeterminate} ticks may or may not be stored: no receipt in time"
        );
        Ok(())
    }
}

/// The producing side: owns its client, and the ticks without a receipt.
async fn produce(
    address: String,
    run: String,
    mut ticks: Receiver<u32>,
    events: UnboundedSender<Event>,
) {
    let mut open: VecDeque<u32> = VecDeque::new();
    loop {
        if let Err(error) = send_all(&address, &run, &mut ticks, &events, &mut open).await {
            println!(
                "producer: made anew, {} ticks are sent again: {error:#}",
                open.len()
            );
        }
        sleep(PAUSE).await;
    }
}

async fn send_all(
    address: &str,
    run: &str,
    ticks: &mut Receiver<u32>,
    events: &UnboundedSender<Event>,
    open: &mut VecDeque<u32>,
) -> anyhow::Result<()> {
    let pulsar = connect(address).await?;
    let options = ProducerOptions {
        block_queue_if_full: true,
        ..ProducerOptions::default()
    };
    let builder = pulsar.producer().with_topic(TOPIC).with_options(options);
    let mut producer = timeout(PATIENCE, builder.build())
        .await
        .context("no producer in time")??;
    let mut receipts = FuturesOrdered::new();
    for tick in open.iter() {
        receipts.push_back(send(&mut producer, run, *tick).await?);
    }
    loop {
        tokio::select! {
            Some(tick) = ticks.recv(), if open.len() < WINDOW => {
                // Before it is sent: whatever happens, it is not forgotten.
                open.push_back(tick);
                receipts.push_back(send(&mut producer, run, tick).await?);
            }
            Some(receipt) = receipts.next() => {
                receipt?;
                // In order, as they were sent.
                if let Some(tick) = open.pop_front() {
                    let _ = events.send(Event::Stored(tick)); // nobody listens at the end
                }
            }
            _ = sleep(PATIENCE), if !open.is_empty() => bail!("no receipt for {PATIENCE:?}"),
        }
    }
}

async fn send(
    producer: &mut Producer<TokioExecutor>,
    run: &str,
    tick: u32,
) -> anyhow::Result<pulsar::producer::SendFuture> {
    let sent = producer.send_non_blocking(format!("{run} {tick}"));
    Ok(timeout(PATIENCE, sent)
        .await
        .context("the client takes nothing")??)
}

/// The consuming side: owns its client. At the end it takes the subscription away.
async fn consume(address: String, run: String, events: UnboundedSender<Event>, ended: Arc<Notify>) {
    while let Err(error) = receive_all(&address, &run, &events, &ended).await {
        println!("consumer: made anew, {error:#}");
        sleep(PAUSE).await;
    }
}

async fn subscribe(
    pulsar: &Pulsar<TokioExecutor>,
    run: &str,
    patience: Duration,
) -> anyhow::Result<Consumer<Vec<u8>, TokioExecutor>> {
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(200);
    let builder = pulsar
        .consumer()
        .with_topic(TOPIC)
        .with_subscription(format!("{SUBSCRIPTION}{run}"))
        .with_subscription_type(SubType::Failover)
        // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
        .with_batch_size(100)
        .with_options(options);
    Ok(timeout(patience, builder.build())
        .await
        .context("no consumer in time")??)
}

async fn receive_all(
    address: &str,
    run: &str,
    events: &UnboundedSender<Event>,
    ended: &Notify,
) -> anyhow::Result<()> {
    let pulsar = connect(address).await?;
    let mut consumer = subscribe(&pulsar, run, PATIENCE).await?;
    println!("consumer: back");
    loop {
        let message = tokio::select! {
            _ = ended.notified() => {
                if let Err(error) = timeout(PATIENCE, consumer.unsubscribe()).await? {
                    eprintln!("the subscription of {run} is still there: {error}");
                }
                return Ok(());
            }
            message = timeout(PATIENCE, consumer.next()) => message,
        };
        match message {
            Ok(message) => {
                let message = message.context("its stream has ended")??;
                let payload = String::from_utf8_lossy(&message.payload.data).into_owned();
                let _ = events.send(Event::Received(payload)); // nobody listens at the end
                // Our producer makes no batches; of one, only the last may be acknowledged. See pulsar_consumer.
                consumer.ack(&message).await?;
            }
            // Nothing to read, or nobody there? Left alone, a consumer may be silent for ever.
            Err(_) => timeout(PATIENCE, consumer.check_connection())
                .await
                .context("silence, and no answer to a ping")??,
        }
    }
}

/// Left alone, the client retries by itself, for long and in silence. Here the tasks above do, and say so.
async fn connect(address: &str) -> anyhow::Result<Pulsar<TokioExecutor>> {
    let connections = ConnectionRetryOptions {
        max_retries: 2,
        // A minute by default, for which a broker that hangs is not noticed.
        keep_alive: Duration::from_secs(2),
        ..ConnectionRetryOptions::default()
    };
    let operations = OperationRetryOptions {
        operation_timeout: PATIENCE,
        retry_delay: PAUSE,
        max_retries: Some(2),
    };
    let client = Pulsar::builder(address, TokioExecutor)
        .with_connection_retry_options(connections)
        .with_operation_retry_options(operations)
        .build();
    timeout(PATIENCE, client)
        .await
        .context("the connection takes too long")
        .and_then(|connected| Ok(connected?))
        .with_context(|| {
            format!("no Pulsar broker answers at {address}; `cargo lab up pulsar` starts one")
        })
}
