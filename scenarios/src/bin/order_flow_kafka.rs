//! Order flow on Kafka: a payment that is tried again holds up its own user, and nobody else
//!
//! Place, reserve, pay, ship, each a consumer group. At least once from stage to stage, and each effect once: it is
//! written in one SQLite transaction with a mark, and an order that is marked only gets its event again. Orders of one
//! user keep their order at every stage, also when a payment is tried again, a stage is killed or Kafka restarts.
//!
//! ```console
//! $ cargo lab run order_flow_kafka
//! ...
//! orders placed              200
//! ...
//! payments tried again        [..]
//! ...
//! overtaken at pay             0
//! overtaken at ship            0
//! lost                         0
//! doubled                      0
//! the books balance; they are in [..]
//! ```
//!
//! Notice: Kafka knows no delay, no attempt and no single record that is put back: it has a position per partition.
//! A retry topic would let a user's next order overtake (see kafka_retry_dlq), and to wait in place would hold up all
//! users of the partition. So the stage reads on and keeps the later orders of that user behind the one that waits; the
//! committed position stays at the first order that is not done. After a crash all behind it comes again, which the
//! marks make harmless, and the count of attempts starts again, for it was in memory. After five, the order is a dead
//! letter, with cause, attempts and origin in its headers, and the user's later orders go on.
//!
//! When Kafka goes away, a stage rides it out: the client reconnects, and after an error that it does not get over, the
//! stage begins a new session at the committed position. Each stage is meant to be one process: it is a static member,
//! so that after a crash the next one has its partitions at once; started twice, one would fence the other.
//!
//! Try: `--without-idempotency --crash told:40`, and then the same `--data` without `--crash`: charges are doubled, or
//! stock, or parcels. In four terminals, all with `--data flow`: the stages `reserve`, `pay`, `ship`, `place`, and
//! `cargo lab kill order_flow_kafka.2` or another of them, or `cargo lab kill kafka` and `cargo lab restart kafka`;
//! then `report --data flow`.
//!
//! Settings: KAFKA_BROKERS (localhost:9092); `--help` for the others. See also: order_flow_rabbitmq, order_flow_nats,
//! order_flow_pulsar, docs/order-flow.md.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{
    BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance, StreamConsumer,
};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, ClientContext, Message, Offset, TopicPartitionList};
use rusqlite::{Connection as Books, TransactionBehavior, params};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{JoinSet, block_in_place};
use tokio::time::{sleep, sleep_until};
use tokio_util::sync::CancellationToken;

const PARTITIONS: i32 = 4;
const ATTEMPTS: u32 = 5;
/// How many records a stage may hold. While it holds more, it reads no further.
const HELD: usize = 1000;
const PATIENCE: Duration = Duration::from_secs(5);
/// Time for the last commit.
const LEAVING: Duration = Duration::from_secs(15);

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let shop = Shop::open(Args::parse())?;
    let mut parts = JoinSet::new();
    if !shop.stages().is_empty() {
        let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
        let flow = Flow {
            shop: shop.clone(),
            brokers,
        };
        flow.create_topics().await?;
        for stage in shop.stages() {
            let flow = flow.clone();
            parts.spawn(async move { flow.run(stage).await });
        }
    }
    shop.finish(parts).await
}

#[derive(Clone)]
struct Flow {
    shop: Shop,
    brokers: String,
}

impl Flow {
    fn topic(&self, event: &str) -> String {
        format!("order-flow.{}.{event}", self.shop.run)
    }

    /// Left to the broker, the topics would be created by their first record, with the broker's settings.
    async fn create_topics(&self) -> anyhow::Result<()> {
        let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .create()?;
        block_in_place(|| admin.inner().fetch_metadata(None, PATIENCE)).with_context(|| {
            format!(
                "no Kafka broker answers at {}; `cargo lab up kafka` starts one",
                self.brokers
            )
        })?;
        let names = ["placed", "reserved", "paid", "dead"].map(|event| self.topic(event));
        // -1 is the broker's default replication factor.
        let topic = |name| NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(-1));
        let topics: Vec<_> = names.iter().map(|name| topic(name)).collect();
        let options = AdminOptions::new().request_timeout(Some(PATIENCE));
        for result in admin.create_topics(&topics, &options).await? {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((topic, code)) => bail!("cannot create topic {topic}: {code}"),
            }
        }
        Ok(())
    }

    async fn run(&self, stage: Stage) -> anyhow::Result<()> {
        loop {
            let session = match stage {
                Stage::Place => self.place().await,
                stage => self.consume(stage).await,
            };
            let Err(error) = session else { return Ok(()) };
            eprintln!("{}: {error:#}; begins anew", stage.name());
            tokio::select! {
                () = self.shop.stop.cancelled() => return Ok(()),
                () = sleep(Duration::from_secs(1)) => {}
            }
        }
    }

    fn producer(&self) -> anyhow::Result<FutureProducer> {
        Ok(ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set("enable.idempotence", "true")
            // Each event is awaited before the next, so there is no company to wait for.
            .set("linger.ms", "0")
            // Longer than a restart of the broker.
            .set("message.timeout.ms", "30000")
            .create()?)
    }

    /// One after the other: a user's orders are in the topic as they were placed.
    async fn place(&self) -> anyhow::Result<()> {
        let producer = self.producer()?;
        for (number, user, payload) in self.shop.to_place()? {
            if self.shop.stop.is_cancelled() {
                break;
            }
            let topic = self.topic("placed");
            let record = FutureRecord::to(&topic).key(&user).payload(&payload);
            let delivery = producer.send(record, PATIENCE).await;
            delivery
                .map_err(|(error, _)| error)
                .context("no delivery report")?;
            self.shop.placed(number)?;
        }
        Ok(())
    }

    async fn consume(&self, stage: Stage) -> anyhow::Result<()> {
        let (event, _) = stage.events();
        let rebalances = Rebalances::default();
        let consumer: StreamConsumer<Rebalances> = ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set(
                "group.id",
                format!("order-flow.{}.{}", self.shop.run, stage.name()),
            )
            .set("group.instance.id", stage.name())
            .set("auto.offset.reset", "earliest")
            // The client commits what is stored, and only what is done is stored.
            .set("enable.auto.commit", "true")
            .set("auto.commit.interval.ms", "1000")
            .set("enable.auto.offset.store", "false")
            .set("session.timeout.ms", "10000")
            .create_with_context(rebalances.clone())?;
        consumer.subscribe(&[&self.topic(event)])?;
        self.shop
            .say(format_args!("{}: working, Ctrl-C ends it", stage.name()));
        let worked = self.work(stage, &consumer, &rebalances).await;
        let left = block_in_place(|| leave(consumer));
        worked?;
        if let Err(error) = left {
            eprintln!("{}: {error:#}", stage.name());
        }
        Ok(())
    }

    async fn work(
        &self,
        stage: Stage,
        consumer: &StreamConsumer<Rebalances>,
        rebalances: &Rebalances,
    ) -> anyhow::Result<()> {
        let producer = self.producer()?;
        let mut desk = Desk::default();
        let mut known = 0;
        loop {
            let (due, next) = desk.next();
            let record = tokio::select! {
                () = self.shop.stop.cancelled() => break,
                () = sleep_until(due.into()), if next.is_some() => None,
                received = consumer.recv(), if desk.held() < HELD => match received {
                    Ok(record) => Some(record.detach()),
                    Err(error @ KafkaError::MessageConsumptionFatal(_)) => bail!(error),
                    // A lost connection, for example: the client tries again by itself.
                    Err(error) => {
                        eprintln!("{}: waiting for the broker: {error}", stage.name());
                        continue;
                    }
                },
            };
            // Partitions are taken away, and given, while `recv` waits: its record can be the first after that. Whoever
            // has the partitions now, this process or another, reads on from the commit.
            if rebalances.seen() != known {
                known = rebalances.seen();
                desk = Desk::default();
            }
            let user = match record {
                Some(record) => desk.take(record),
                None => next,
            };
            // None: the order is behind another one of the same user.
            let Some(user) = user else { continue };
            while let Some((record, attempt)) = desk.first(&user) {
                if let Some(delay) = self.handle(stage, &producer, &record, attempt).await? {
                    desk.later(&user, delay);
                    break;
                }
                let (partition, position) = desk.done(&user, &record);
                let mut positions = TopicPartitionList::new();
                let position = Offset::Offset(position);
                positions.add_partition_offset(record.topic(), partition, position)?;
                if let Err(error) = consumer.store_offsets(&positions) {
                    // The partition is no longer ours. Whoever has it gets the order again.
                    eprintln!("{}: {error}", stage.name());
                }
            }
        }
        Ok(())
    }

    /// Nothing is left to do for the record, or it is to be tried again after a while.
    async fn handle(
        &self,
        stage: Stage,
        producer: &FutureProducer,
        record: &OwnedMessage,
        attempt: u32,
    ) -> anyhow::Result<Option<Duration>> {
        let order = match Order::read(record.payload().unwrap_or_default()) {
            Ok(order) => order,
            Err(cause) => {
                self.bury(producer, record, &cause, attempt).await?;
                return Ok(None);
            }
        };
        match block_in_place(|| self.shop.effect(stage, &order))? {
            Outcome::Failed(_) if attempt < ATTEMPTS => {
                let delay = backoff(attempt);
                self.shop.retried(&order, attempt, delay)?;
                return Ok(Some(delay));
            }
            Outcome::Failed(cause) => self.bury(producer, record, &cause, attempt).await?,
            Outcome::Done | Outcome::Seen => {
                if let (_, Some(event)) = stage.events() {
                    let payload = record.payload().unwrap_or_default();
                    self.send(producer, event, record, payload, OwnedHeaders::new())
                        .await?;
                }
                self.shop.told();
            }
        }
        Ok(None)
    }

    async fn bury(
        &self,
        producer: &FutureProducer,
        record: &OwnedMessage,
        cause: &str,
        attempts: u32,
    ) -> anyhow::Result<()> {
        let (topic, partition, offset) = (record.topic(), record.partition(), record.offset());
        let origin = format!("{topic} partition {partition} offset {offset}");
        let tried = attempts.to_string();
        let mut headers = OwnedHeaders::new();
        for (key, value) in [("cause", cause), ("attempts", &tried), ("origin", &origin)] {
            headers = headers.insert(Header {
                key,
                value: Some(value),
            });
        }
        let payload = record.payload().unwrap_or_default();
        self.send(producer, "dead", record, Order::kept(payload), headers)
            .await?;
        self.shop.dead(payload, &origin, cause, attempts)
    }

    /// Returns when the broker has it. The key stays, and with it the order per user.
    async fn send(
        &self,
        producer: &FutureProducer,
        event: &str,
        record: &OwnedMessage,
        payload: &[u8],
        headers: OwnedHeaders,
    ) -> anyhow::Result<()> {
        let topic = self.topic(event);
        let mut outgoing = FutureRecord::<[u8], [u8]>::to(&topic).headers(headers);
        (outgoing.key, outgoing.payload) = (record.key(), Some(payload));
        let delivery = producer.send(outgoing, PATIENCE).await;
        let delivery = delivery.map_err(|(error, _)| error);
        delivery.with_context(|| format!("no delivery report from {topic}"))?;
        Ok(())
    }
}

/// What a stage has read and not finished.
#[derive(Default)]
struct Desk {
    /// For each user the orders in their order. The first may be waiting for its next attempt.
    queues: HashMap<Vec<u8>, VecDeque<OwnedMessage>>,
    /// Attempts made for a user's first order, and when the next one is due.
    waiting: HashMap<Vec<u8>, (u32, Instant)>,
    /// Per partition the offsets that are not done, and the one after the last that was read.
    open: BTreeMap<i32, (BTreeSet<i64>, i64)>,
}

impl Desk {
    fn held(&self) -> usize {
        self.queues.values().map(VecDeque::len).sum()
    }

    /// Returns the user if the order is the first of its user, so that its turn is now.
    fn take(&mut self, record: OwnedMessage) -> Option<Vec<u8>> {
        let (offsets, next) = self.open.entry(record.partition()).or_default();
        offsets.insert(record.offset());
        *next = record.offset() + 1;
        let user = record.key().unwrap_or_default().to_vec();
        let queue = self.queues.entry(user.clone()).or_default();
        queue.push_back(record);
        (queue.len() == 1).then_some(user)
    }

    /// The user's first order, and which attempt it is.
    fn first(&self, user: &[u8]) -> Option<(OwnedMessage, u32)> {
        let record = self.queues.get(user)?.front()?;
        let (attempts, _) = self
            .waiting
            .get(user)
            .copied()
            .unwrap_or((0, Instant::now()));
        Some((record.clone(), attempts + 1))
    }

    /// When the next attempt is due, and whose.
    fn next(&self) -> (Instant, Option<Vec<u8>>) {
        let next = self.waiting.iter().min_by_key(|(_, (_, due))| *due);
        next.map_or((Instant::now(), None), |(user, (_, due))| {
            (*due, Some(user.clone()))
        })
    }

    fn later(&mut self, user: &[u8], delay: Duration) {
        let (attempts, due) = self
            .waiting
            .entry(user.to_vec())
            .or_insert((0, Instant::now()));
        *attempts += 1;
        *due = Instant::now() + delay;
    }

    /// Returns the partition and the position up to which all is done there.
    fn done(&mut self, user: &[u8], record: &OwnedMessage) -> (i32, i64) {
        self.waiting.remove(user);
        if let Some(queue) = self.queues.get_mut(user) {
            queue.pop_front();
            if queue.is_empty() {
                self.queues.remove(user);
            }
        }
        let partition = record.partition();
        let (offsets, next) = self.open.entry(partition).or_default();
        offsets.remove(&record.offset());
        (partition, offsets.first().copied().unwrap_or(*next))
    }
}

/// Commits what is done and leaves the group: the others take over now and not after session.timeout.ms.
///
/// With the broker gone, either takes as long as that time, and sometimes never ends (librdkafka 2.12; see its issue 3740
/// for the close). Hence a thread that can be left behind.
fn leave(consumer: StreamConsumer<Rebalances>) -> anyhow::Result<()> {
    let (done, answers) = mpsc::channel();
    thread::spawn(move || {
        done.send(consumer.commit_consumer_state(CommitMode::Sync))?;
        drop(consumer);
        done.send(Ok(()))
    });
    let committed = answers.recv_timeout(LEAVING);
    if committed.is_err() || answers.recv_timeout(PATIENCE).is_err() {
        eprintln!("left without a word to the group: no broker answers");
    }
    match committed {
        // No offset: all was committed already.
        Ok(Ok(()) | Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset))) => Ok(()),
        Ok(Err(error)) => bail!("the last orders come again: {error}"),
        Err(_) => bail!("the last orders come again, unless the commit has arrived"),
    }
}

/// Counts how often partitions were taken away.
#[derive(Clone, Default)]
struct Rebalances(Arc<AtomicU32>);

impl Rebalances {
    fn seen(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

impl ClientContext for Rebalances {}

impl ConsumerContext for Rebalances {
    fn pre_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if !matches!(rebalance, Rebalance::Assign(_)) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The shop. From here on the four programs are the same, word for word: nothing below knows which broker there is.
// ---------------------------------------------------------------------------------------------------------------------

/// A small order flow: place, reserve, pay, ship.
///
/// Without a stage it runs all of them in this one process, until every order is shipped or dead-lettered, and judges
/// the books: exit code 0 means that they balance.
#[derive(Parser)]
struct Args {
    /// This stage alone; `report` waits until every order is final, and judges the books
    stage: Option<Stage>,
    /// How many orders there are
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    orders: u32,
    /// Decides on users and amounts, and whose payment fails how often
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder of the books. Stages that run alone share one; to go on after an interruption, give it again [default:
    /// a new one among the temporary files]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Do not remember what was done, to see what repeated deliveries do to the books
    #[arg(long)]
    without_idempotency: bool,
    /// Die as by SIGKILL after the Nth effect of this process: at `effect:N` before its event is published, at `told:N`
    /// after that, and before the acknowledgement
    #[arg(long, value_name = "POINT:N", value_parser = Crash::read)]
    crash: Option<Crash>,
    /// For how many seconds to wait until every order is final
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    timeout: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Stage {
    Place,
    Reserve,
    Pay,
    Ship,
    Report,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Stage::Place => "place",
            Stage::Reserve => "reserve",
            Stage::Pay => "pay",
            Stage::Ship => "ship",
            Stage::Report => "report",
        }
    }

    /// The events that it takes, and those that it publishes.
    fn events(self) -> (&'static str, Option<&'static str>) {
        match self {
            Stage::Place => ("", Some("placed")),
            Stage::Reserve => ("placed", Some("reserved")),
            Stage::Pay => ("reserved", Some("paid")),
            Stage::Ship => ("paid", None),
            Stage::Report => ("", None),
        }
    }

    /// Where its effects are in the books.
    fn table(self) -> &'static str {
        match self {
            Stage::Reserve => "stock_taken",
            Stage::Pay => "charges",
            _ => "parcels",
        }
    }
}

#[derive(Clone, Copy)]
struct Crash {
    told: bool,
    after: u32,
}

impl Crash {
    fn read(text: &str) -> Result<Crash, String> {
        let (point, after) = text.split_once(':').ok_or("as in effect:20 or told:20")?;
        let after = after.parse().map_err(|error| format!("{after}: {error}"))?;
        match point {
            "effect" => Ok(Crash { told: false, after }),
            "told" => Ok(Crash { told: true, after }),
            _ => Err(format!("{point} is neither `effect` nor `told`")),
        }
    }
}

/// What travels. Each stage passes it on as it came; where it is tells how far it has got.
#[derive(Serialize, Deserialize)]
struct Order {
    id: String,
    /// Rises with each order; those of one user should be dealt with in this order.
    number: u32,
    user: String,
    cents: i64,
    /// How often the payment gateway will not answer: what a real one does not tell.
    #[serde(default)]
    fails: u32,
}

impl Order {
    /// The bytes of an event can be anything, and as many as the broker takes.
    fn read(payload: &[u8]) -> Result<Order, String> {
        let (size, kept) = (payload.len(), Order::kept(payload).len());
        if size > kept {
            return Err(format!(
                "not an order: {size} bytes, of which {kept} are kept"
            ));
        }
        let order: Order = serde_json::from_slice(payload).map_err(|error| {
            // It may quote the event.
            let error = error.to_string();
            format!("not an order: {error:.200}")
        })?;
        match &order {
            Order { id, .. } if id.is_empty() => Err("not an order: no id".into()),
            Order { user, .. } if user.is_empty() => Err("not an order: no user".into()),
            Order { cents, .. } if !(1..=100_000_000).contains(cents) => {
                Err(format!("not an order: {cents} cents"))
            }
            _ => Ok(order),
        }
    }

    /// As much of an event as a dead letter has: all of a larger one would, with the letter's headers, be more than the
    /// broker takes.
    fn kept(payload: &[u8]) -> &[u8] {
        payload.get(..256 * 1024).unwrap_or(payload)
    }
}

/// What came of an order at a stage.
enum Outcome {
    Done,
    /// It had its effect before; its event and its acknowledgement may be missing.
    Seen,
    /// The next attempt may succeed.
    Failed(String),
}

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS run (id INTEGER PRIMARY KEY, name TEXT NOT NULL);
    -- What is to be published, and whether the broker has confirmed it. Number 0 is an event that is no order.
    CREATE TABLE IF NOT EXISTS placed (
        number INTEGER PRIMARY KEY, order_id TEXT, user TEXT NOT NULL, payload TEXT NOT NULL,
        sent INTEGER NOT NULL DEFAULT 0);
    -- The effects, with nothing that would keep them from being doubled.
    CREATE TABLE IF NOT EXISTS stock_taken (seq INTEGER PRIMARY KEY, order_id TEXT, user TEXT, number INTEGER, cents INTEGER);
    CREATE TABLE IF NOT EXISTS charges (seq INTEGER PRIMARY KEY, order_id TEXT, user TEXT, number INTEGER, cents INTEGER);
    CREATE TABLE IF NOT EXISTS parcels (seq INTEGER PRIMARY KEY, order_id TEXT, user TEXT, number INTEGER, cents INTEGER);
    -- The marks: which stage is done with which order.
    CREATE TABLE IF NOT EXISTS done (stage TEXT, order_id TEXT, PRIMARY KEY (stage, order_id)) WITHOUT ROWID;
    -- The payment gateway's own memory: how often it was asked.
    CREATE TABLE IF NOT EXISTS gateway (order_id TEXT PRIMARY KEY, calls INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS dead (order_id TEXT, origin TEXT, cause TEXT, attempts INTEGER, payload BLOB);
    CREATE TABLE IF NOT EXISTS tally (what TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
";

/// The books of all stages, in one SQLite file. Each shop of a real system would have its own.
#[derive(Clone)]
struct Shop {
    books: Arc<Mutex<Books>>,
    args: Arc<Args>,
    folder: PathBuf,
    /// Part of the names of all topics and queues, so that runs with other books do not meet.
    run: String,
    effects: Arc<AtomicU32>,
    /// Ctrl-C, SIGTERM, or the end of the work.
    stop: CancellationToken,
}

impl Shop {
    fn open(args: Args) -> anyhow::Result<Shop> {
        let new_run = format!("{:08x}", fastrand::u32(..));
        let folder = match (&args.data, args.stage) {
            (Some(folder), _) => folder.clone(),
            (None, None) => std::env::temp_dir().join(format!("order-flow-{new_run}")),
            (None, Some(_)) => bail!("give --data DIR, the folder that the stages share"),
        };
        let file = folder.join("books.sqlite");
        let open = || -> anyhow::Result<Books> {
            std::fs::create_dir_all(&folder)?;
            let books = Books::open(&file)?;
            books.busy_timeout(Duration::from_secs(30))?;
            books.pragma_update(None, "journal_mode", "wal")?;
            books.execute_batch(TABLES)?;
            // Whoever comes first names the run.
            books.execute("INSERT OR IGNORE INTO run VALUES (1, ?)", [&new_run])?;
            Ok(books)
        };
        let books = open().with_context(|| format!("cannot use the books {}", file.display()))?;
        let run = books.query_row("SELECT name FROM run", [], |row| row.get(0))?;
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate())?;
        let stopping = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            stopping.cancel();
        });
        Ok(Shop {
            books: Arc::new(Mutex::new(books)),
            args: Arc::new(args),
            folder,
            run,
            effects: Arc::default(),
            stop,
        })
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stages(&self) -> Vec<Stage> {
        match self.args.stage {
            None => vec![Stage::Reserve, Stage::Pay, Stage::Ship, Stage::Place],
            Some(Stage::Report) => Vec::new(),
            Some(stage) => vec![stage],
        }
    }

    /// A stage on its own tells of each event; all together, there is only the progress.
    fn say(&self, line: impl Display) {
        if self.args.stage.is_some() {
            println!("{line}");
        }
    }

    /// What is not yet known to be with the broker: number, user and event. The first call makes up the orders.
    fn to_place(&self) -> anyhow::Result<Vec<(u32, String, String)>> {
        let mut random = fastrand::Rng::with_seed(self.args.seed);
        let mut books = self.books();
        let books = books.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let insert =
            "INSERT OR IGNORE INTO placed (number, order_id, user, payload) VALUES (?, ?, ?, ?)";
        let broken = r#"{"id":"order-0000","user":"#;
        books.execute(insert, params![0, None::<String>, "user-0", broken])?;
        for number in 1..=self.args.orders {
            let order = Order {
                id: format!("order-{number:04}"),
                number,
                user: format!("user-{}", random.u32(0..8)),
                cents: random.i64(100..10_000),
                fails: match random.u32(0..40) {
                    0 => 99,
                    1..=4 => random.u32(1..=3),
                    _ => 0,
                },
            };
            let payload = serde_json::to_string(&order)?;
            books.execute(insert, params![number, order.id, order.user, payload])?;
        }
        let rest = books
            .prepare("SELECT number, user, payload FROM placed WHERE NOT sent ORDER BY number")?
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
            .collect::<Result<_, _>>()?;
        books.commit()?;
        Ok(rest)
    }

    fn placed(&self, number: u32) -> anyhow::Result<()> {
        let update = "UPDATE placed SET sent = 1 WHERE number = ?";
        self.books().execute(update, [number])?;
        self.say(format_args!("place: order-{number:04} placed"));
        Ok(())
    }

    /// The work of a stage: the effect and its mark in one transaction.
    fn effect(&self, stage: Stage, order: &Order) -> anyhow::Result<Outcome> {
        let name = stage.name();
        let mut books = self.books();
        // Immediate: what is read first must still hold when it is written.
        let tx = books.transaction_with_behavior(TransactionBehavior::Immediate)?;
        if !self.args.without_idempotency {
            let mark = "INSERT OR IGNORE INTO done VALUES (?, ?)";
            if tx.execute(mark, params![name, order.id])? == 0 {
                tally(&tx, "suppressed")?;
                tx.commit()?;
                self.say(format_args!("{name}: {} was done before", order.id));
                return Ok(Outcome::Seen);
            }
        }
        if stage == Stage::Pay {
            let ask = "INSERT INTO gateway VALUES (?, 1) ON CONFLICT DO UPDATE SET calls = calls + 1 RETURNING calls";
            let calls: u32 = tx.query_row(ask, [&order.id], |row| row.get(0))?;
            if calls <= order.fails {
                let undo = "DELETE FROM done WHERE stage = ? AND order_id = ?";
                tx.execute(undo, params![name, order.id])?;
                tx.commit()?;
                return Ok(Outcome::Failed("the gateway does not answer".into()));
            }
        }
        let table = stage.table();
        let effect =
            format!("INSERT INTO {table} (order_id, user, number, cents) VALUES (?, ?, ?, ?)");
        tx.execute(
            &effect,
            params![order.id, order.user, order.number, order.cents],
        )?;
        tx.commit()?;
        drop(books);
        self.say(format_args!("{name}: {} done", order.id));
        self.effects.fetch_add(1, Ordering::Relaxed);
        self.die_if(false);
        Ok(Outcome::Done)
    }

    /// To be called when the next event is with the broker, and this one is not acknowledged.
    fn told(&self) {
        self.die_if(true);
    }

    fn die_if(&self, told: bool) {
        let effects = self.effects.load(Ordering::Relaxed);
        if let Some(crash) = self.args.crash
            && crash.told == told
            && effects >= crash.after
        {
            eprintln!("dies here, as it was told to, after {effects} effects");
            std::process::abort();
        }
    }

    fn retried(&self, order: &Order, attempt: u32, delay: Duration) -> anyhow::Result<()> {
        let ms = delay.as_millis();
        self.say(format_args!(
            "pay: {} failed at attempt {attempt}, again in {ms} ms",
            order.id
        ));
        Ok(tally(&self.books(), "retried")?)
    }

    /// To be called when the dead letter is with the broker.
    fn dead(&self, payload: &[u8], origin: &str, cause: &str, attempts: u32) -> anyhow::Result<()> {
        let order = Order::read(payload).ok().map(|order| order.id);
        let insert = "INSERT INTO dead VALUES (?, ?, ?, ?, ?)";
        self.books()
            .execute(insert, params![order, origin, cause, attempts, payload])?;
        let order = order.as_deref().unwrap_or("an event");
        self.say(format_args!(
            "{order} is a dead letter after attempt {attempts}: {cause}"
        ));
        Ok(())
    }

    fn count(&self, sql: &str) -> rusqlite::Result<u32> {
        self.books().query_row(sql, [], |row| row.get(0))
    }

    /// Waits until the parts have ended, or, with all of them in this process, until every order is final.
    async fn finish(self, mut parts: JoinSet<anyhow::Result<()>>) -> anyhow::Result<ExitCode> {
        let judge = matches!(self.args.stage, None | Some(Stage::Report));
        let complete = tokio::select! {
            complete = self.watch(), if judge => complete?,
            Some(ended) = parts.join_next() => {
                // Of these only `place` ends by itself, or one with an error.
                ended??;
                match judge {
                    true => self.watch().await?,
                    false => true,
                }
            }
        };
        self.stop.cancel();
        while let Some(ended) = parts.join_next().await {
            ended??;
        }
        if !judge {
            println!("stopped");
            return Ok(ExitCode::SUCCESS);
        }
        self.report(complete)
    }

    /// Prints the progress until every order is final; false if it was stopped before, or that took too long.
    async fn watch(&self) -> anyhow::Result<bool> {
        let begun = Instant::now();
        let mut last = (String::new(), begun);
        loop {
            let [placed, reserved, paid, shipped, dead] = [
                "SELECT count(*) FROM placed WHERE sent",
                "SELECT count(*) FROM stock_taken",
                "SELECT count(*) FROM charges",
                "SELECT count(*) FROM parcels",
                "SELECT count(*) FROM dead",
            ]
            .map(|sql| self.count(sql));
            let line = format!(
                "placed {:4}   reserved {:4}   paid {:4}   shipped {:4}   dead {:2}",
                placed?, reserved?, paid?, shipped?, dead?
            );
            let complete = self.not_final()? == 0;
            if line != last.0 && (complete || last.1.elapsed() > Duration::from_millis(300)) {
                println!("{line}");
                last = (line, Instant::now());
            }
            if complete || begun.elapsed() > Duration::from_secs(self.args.timeout) {
                return Ok(complete);
            }
            tokio::select! {
                () = self.stop.cancelled() => return Ok(false),
                () = tokio::time::sleep(Duration::from_millis(50)) => {}
            }
        }
    }

    /// How many orders are not final, nor is the event that is none.
    fn not_final(&self) -> rusqlite::Result<u32> {
        let known = self.count("SELECT count(*) FROM placed")?;
        let missing = (self.args.orders + 1).saturating_sub(known);
        let open = "SELECT count(*) FROM placed WHERE NOT sent
            OR coalesce(order_id, '') NOT IN (SELECT order_id FROM parcels UNION ALL SELECT coalesce(order_id, '') FROM dead)";
        Ok(missing + self.count(open)?)
    }

    fn report(&self, complete: bool) -> anyhow::Result<ExitCode> {
        let overtaken = |table| {
            // The first effect of each order counts.
            self.count(&format!(
                "WITH first AS (SELECT min(seq) AS seq, user, number FROM {table} GROUP BY order_id)
                SELECT count(*) FROM first AS a WHERE EXISTS
                    (SELECT 1 FROM first AS b WHERE b.user = a.user AND b.number > a.number AND b.seq < a.seq)"
            ))
        };
        let doubled =
            "SELECT sum(n) FROM (SELECT count(*) - count(DISTINCT order_id) AS n FROM stock_taken
            UNION ALL SELECT count(*) - count(DISTINCT order_id) FROM charges
            UNION ALL SELECT count(*) - count(DISTINCT order_id) FROM parcels)";
        // Whatever was shipped must be taken from the stock and paid for.
        let unpaid = "SELECT count(DISTINCT order_id) FROM parcels WHERE order_id NOT IN (SELECT order_id FROM charges)
            OR order_id NOT IN (SELECT order_id FROM stock_taken)";
        let lost = self.not_final()? + self.count(unpaid)?;
        let doubled = self.count(doubled)?;
        for (what, n) in [
            (
                "orders placed",
                self.count("SELECT count(*) FROM placed WHERE sent AND order_id IS NOT NULL")?,
            ),
            (
                "shipped",
                self.count("SELECT count(DISTINCT order_id) FROM parcels")?,
            ),
            (
                "dead letters: not paid",
                self.count("SELECT count(DISTINCT order_id) FROM dead")?,
            ),
            (
                "dead letters: no order",
                self.count("SELECT count(DISTINCT payload) FROM dead WHERE order_id IS NULL")?,
            ),
            (
                "payments tried again",
                self.count("SELECT ifnull(sum(n), 0) FROM tally WHERE what = 'retried'")?,
            ),
            (
                "duplicates suppressed",
                self.count("SELECT ifnull(sum(n), 0) FROM tally WHERE what = 'suppressed'")?,
            ),
            ("overtaken at reserve", overtaken("stock_taken")?),
            ("overtaken at pay", overtaken("charges")?),
            ("overtaken at ship", overtaken("parcels")?),
            ("lost", lost),
            ("doubled", doubled),
        ] {
            println!("{what:<24}{n:>6}");
        }
        let folder = self.folder.display();
        if complete && lost == 0 && doubled == 0 {
            println!("the books balance; they are in {folder}");
            return Ok(ExitCode::SUCCESS);
        }
        match complete {
            true => println!("the books do not balance; they are in {folder}"),
            false => println!("not complete; `--data {folder}` goes on"),
        }
        Ok(ExitCode::FAILURE)
    }
}

fn tally(books: &Books, what: &str) -> rusqlite::Result<()> {
    let add = "INSERT INTO tally VALUES (?, 1) ON CONFLICT DO UPDATE SET n = n + 1";
    books.execute(add, [what]).map(drop)
}

/// Before attempt `attempt + 1`: 100 ms that double with each attempt, up to a second, less up to half of it, so that
/// what failed together does not come back together.
fn backoff(attempt: u32) -> Duration {
    let ms = (100_u64 << attempt.saturating_sub(1).min(10)).min(1000);
    Duration::from_millis(fastrand::u64(ms / 2..=ms))
}
