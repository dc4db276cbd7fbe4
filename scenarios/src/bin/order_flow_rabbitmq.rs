//! Order flow on RabbitMQ: delay queues for what is tried again, and one active consumer per shard
//!
//! Place, reserve, pay, ship, each with queues of its own. At least once from stage to stage, and each effect once: it
//! is written in one SQLite transaction with a mark, and an order that is marked only gets its event again. Orders of
//! one user keep their order at every stage, also when a stage is killed or RabbitMQ restarts, except that a payment
//! that is tried again is overtaken.
//!
//! ```console
//! $ cargo lab run order_flow_rabbitmq
//! ...
//! orders placed              200
//! ...
//! payments tried again        [..]
//! ...
//! overtaken at reserve         0
//! ...
//! lost                         0
//! doubled                      0
//! the books balance; they are in [..]
//! ```
//!
//! Notice: a queue keeps its order only for a single consumer. So a user's orders all go to one of four queues, by a
//! hash of the user, and `x-single-active-consumer` gives each to one consumer while others stand by. A payment that
//! fails goes to a delay queue, whose messages expire back to where they came from, at the end of that queue: nobody
//! waits for it, and the user's next order overtakes. Only the head of a queue expires, so there is a queue per delay;
//! they are quorum queues, since only those hand over what has expired without a gap in which a crash loses it. After
//! five attempts, or at once if it is no order, an event goes to the queue `dead`, with cause, attempts and origin.
//!
//! When RabbitMQ goes away, a stage rides it out: a lost connection ends its session, and it begins a new one every
//! second until that succeeds. What was not acknowledged is then delivered again, in its place.
//!
//! Try: `--without-idempotency --crash told:40`, and then the same `--data` without `--crash`: charges are doubled, or
//! stock, or parcels. In four terminals, all with `--data flow`: the stages `reserve`, `pay`, `ship`, `place`, and
//! `cargo lab kill order_flow_rabbitmq.2` or another of them, or `cargo lab kill rabbitmq` and
//! `cargo lab restart rabbitmq`; then `report --data flow`.
//!
//! Settings: AMQP_ADDR (amqp://localhost:5672/%2f); `--help` for the others. See also: order_flow_kafka,
//! order_flow_nats, order_flow_pulsar, docs/order-flow.md.

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use futures::StreamExt;
use futures::stream::select_all;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, ExchangeKind,
};
use rusqlite::{Connection as Books, TransactionBehavior, params};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{JoinSet, block_in_place};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

const SHARDS: u32 = 4;
const ATTEMPTS: u32 = 5;
/// How many messages a stage may hold. They go back to their places if it dies.
const PREFETCH: u16 = 20;
const PERSISTENT: u8 = 2;
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let shop = Shop::open(Args::parse())?;
    let mut parts = JoinSet::new();
    if !shop.stages().is_empty() {
        let addr =
            std::env::var("AMQP_ADDR").unwrap_or_else(|_| "amqp://localhost:5672/%2f".into());
        let flow = Flow {
            shop: shop.clone(),
            addr,
        };
        let (connection, _channel) = flow.connect().await.with_context(|| {
            // Without the user and the password.
            let host = flow.addr.rsplit('@').next().unwrap_or_default();
            format!("cannot connect to RabbitMQ at {host}; `cargo lab up rabbitmq` starts a broker")
        })?;
        connection.close(200, "OK".into()).await?;
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
    addr: String,
}

/// All orders of a user go the same way.
fn shard(user: &str) -> u32 {
    user.bytes().map(u32::from).sum::<u32>() % SHARDS
}

impl Flow {
    fn name(&self, what: &str) -> String {
        format!("order-flow.{}.{what}", self.shop.run)
    }

    /// A connection of its own for each session, and all queues declared: a restart may have come between.
    async fn connect(&self) -> anyhow::Result<(Connection, Channel)> {
        let connect = Connection::connect(&self.addr, ConnectionProperties::default());
        let connection = timeout(PATIENCE, connect).await??;
        let channel = connection.create_channel().await?;
        let exchange = self.name("events");
        let direct = (
            ExchangeKind::Direct,
            ExchangeDeclareOptions {
                durable: true,
                ..Default::default()
            },
        );
        channel
            .exchange_declare(
                exchange.as_str().into(),
                direct.0,
                direct.1,
                FieldTable::default(),
            )
            .await?;
        let mut single = FieldTable::default();
        single.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
        let mut keys = vec![("dead".to_owned(), FieldTable::default())];
        for event in ["placed", "reserved", "paid"] {
            keys.extend((0..SHARDS).map(|shard| (format!("{event}.{shard}"), single.clone())));
        }
        for (key, arguments) in keys {
            let queue = self.declare(&channel, &key, arguments).await?;
            let bind = QueueBindOptions::default();
            channel
                .queue_bind(
                    queue.into(),
                    exchange.as_str().into(),
                    key.into(),
                    bind,
                    FieldTable::default(),
                )
                .await?;
        }
        for attempt in 1..ATTEMPTS {
            // An exchange per delay queue, so that a message keeps its routing key, by which it finds its way back.
            let mut waiting = FieldTable::default();
            for (key, value) in [
                ("x-queue-type", "quorum"),
                ("x-dead-letter-exchange", &exchange),
                ("x-dead-letter-strategy", "at-least-once"),
                ("x-overflow", "reject-publish"),
            ] {
                waiting.insert(key.into(), AMQPValue::LongString(value.into()));
            }
            let name = self.declare(&channel, &wait(attempt), waiting).await?;
            let durable = ExchangeDeclareOptions {
                durable: true,
                ..Default::default()
            };
            channel
                .exchange_declare(
                    name.as_str().into(),
                    ExchangeKind::Fanout,
                    durable,
                    FieldTable::default(),
                )
                .await?;
            let bind = QueueBindOptions::default();
            channel
                .queue_bind(
                    name.as_str().into(),
                    name.as_str().into(),
                    "".into(),
                    bind,
                    FieldTable::default(),
                )
                .await?;
        }
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        channel
            .basic_qos(PREFETCH, BasicQosOptions::default())
            .await?;
        Ok((connection, channel))
    }

    async fn declare(
        &self,
        channel: &Channel,
        what: &str,
        arguments: FieldTable,
    ) -> anyhow::Result<String> {
        let queue = self.name(what);
        let durable = QueueDeclareOptions::durable();
        channel
            .queue_declare(queue.as_str().into(), durable, arguments)
            .await?;
        Ok(queue)
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

    /// One after the other: a user's orders are in their queue as they were placed.
    async fn place(&self) -> anyhow::Result<()> {
        let (connection, channel) = self.connect().await?;
        for (number, user, payload) in self.shop.to_place()? {
            if self.shop.stop.is_cancelled() {
                break;
            }
            let key = format!("placed.{}", shard(&user));
            let properties = BasicProperties::default();
            self.publish(&channel, "events", &key, payload.as_bytes(), properties)
                .await?;
            self.shop.placed(number)?;
        }
        connection.close(200, "OK".into()).await?;
        Ok(())
    }

    async fn consume(&self, stage: Stage) -> anyhow::Result<()> {
        let (connection, channel) = self.connect().await?;
        let (event, _) = stage.events();
        let mut shards = Vec::new();
        for shard in 0..SHARDS {
            let queue = self.name(&format!("{event}.{shard}"));
            let options = BasicConsumeOptions::default();
            let consumer =
                channel.basic_consume(queue.into(), "".into(), options, FieldTable::default());
            shards.push(consumer.await?);
        }
        let mut deliveries = select_all(shards);
        self.shop
            .say(format_args!("{}: working, Ctrl-C ends it", stage.name()));
        loop {
            let delivery = tokio::select! {
                () = self.shop.stop.cancelled() => break,
                // The end of the streams is as much of an end as an error, and comes without one.
                delivery = deliveries.next() => delivery.context("the broker ended the consumers")??,
            };
            self.handle(stage, &channel, &delivery).await?;
            let ack = delivery.ack(BasicAckOptions::default());
            // Without a limit it may wait for ever: lapin forgets an ack that is under way when the connection is lost.
            timeout(PATIENCE, ack)
                .await
                .context("lost the connection")??;
        }
        // What was fetched ahead goes back. The close is answered after the acks before it.
        timeout(PATIENCE, connection.close(200, "OK".into())).await??;
        Ok(())
    }

    /// Returns when the order is done with here, or is safe in another queue.
    async fn handle(
        &self,
        stage: Stage,
        channel: &Channel,
        delivery: &Delivery,
    ) -> anyhow::Result<()> {
        let attempt = attempts(delivery) + 1;
        let order = match Order::read(&delivery.data) {
            Ok(order) => order,
            Err(cause) => return self.bury(channel, delivery, &cause, attempt).await,
        };
        match block_in_place(|| self.shop.effect(stage, &order))? {
            Outcome::Failed(_) if attempt < ATTEMPTS => {
                let delay = backoff(attempt);
                let mut headers = FieldTable::default();
                headers.insert("attempts".into(), AMQPValue::LongUInt(attempt));
                let properties = BasicProperties::default()
                    .with_headers(headers)
                    .with_expiration(delay.as_millis().to_string().into());
                let key = delivery.routing_key.as_str();
                self.publish(channel, &wait(attempt), key, &delivery.data, properties)
                    .await?;
                self.shop.retried(&order, attempt, delay)?;
            }
            Outcome::Failed(cause) => self.bury(channel, delivery, &cause, attempt).await?,
            Outcome::Done | Outcome::Seen => {
                if let (_, Some(event)) = stage.events() {
                    let key = format!("{event}.{}", shard(&order.user));
                    let properties = BasicProperties::default();
                    self.publish(channel, "events", &key, &delivery.data, properties)
                        .await?;
                }
                self.shop.told();
            }
        }
        Ok(())
    }

    async fn bury(
        &self,
        channel: &Channel,
        delivery: &Delivery,
        cause: &str,
        attempts: u32,
    ) -> anyhow::Result<()> {
        let origin = self.name(delivery.routing_key.as_str());
        let mut headers = FieldTable::default();
        headers.insert("cause".into(), AMQPValue::LongString(cause.into()));
        headers.insert("attempts".into(), AMQPValue::LongUInt(attempts));
        headers.insert(
            "origin".into(),
            AMQPValue::LongString(origin.as_str().into()),
        );
        let properties = BasicProperties::default().with_headers(headers);
        let kept = Order::kept(&delivery.data);
        self.publish(channel, "events", "dead", kept, properties)
            .await?;
        self.shop.dead(&delivery.data, &origin, cause, attempts)
    }

    /// Returns when the broker has it in a queue.
    async fn publish(
        &self,
        channel: &Channel,
        exchange: &str,
        key: &str,
        payload: &[u8],
        properties: BasicProperties,
    ) -> anyhow::Result<()> {
        let exchange = self.name(exchange);
        let properties = properties.with_delivery_mode(PERSISTENT);
        // Without it, what no queue takes is confirmed as well.
        let options = BasicPublishOptions {
            mandatory: true,
            ..Default::default()
        };
        let confirmed = async {
            channel
                .basic_publish(
                    exchange.as_str().into(),
                    key.into(),
                    options,
                    payload,
                    properties,
                )
                .await?
                .await
        };
        let confirmed = timeout(2 * PATIENCE, confirmed).await;
        match confirmed.with_context(|| format!("no confirmation from {exchange}"))?? {
            Confirmation::Ack(None) => Ok(()),
            Confirmation::Ack(Some(returned)) => bail!("{exchange}: {}", returned.reply_text),
            Confirmation::Nack(_) => bail!("{exchange}: the broker refused {key}"),
            Confirmation::NotRequested => bail!("confirms are not enabled on this channel"),
        }
    }
}

/// The queue for what has failed at this attempt.
fn wait(attempt: u32) -> String {
    format!("wait-{attempt}")
}

/// Attempts made before, as this program has written them.
fn attempts(delivery: &Delivery) -> u32 {
    let headers = delivery.properties.headers().as_ref();
    match headers.and_then(|headers| headers.inner().get("attempts")) {
        Some(AMQPValue::LongUInt(attempts)) => *attempts,
        _ => 0,
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
