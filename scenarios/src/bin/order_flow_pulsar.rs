//! Order flow on Pulsar: Key_Shared subscriptions, and a retry topic with delayed delivery
//!
//! Place, reserve, pay, ship, each a subscription of the topic before it. At least once from stage to stage, and each
//! effect once: it is written in one SQLite transaction with a mark, and an order that is marked only gets its event
//! again. Orders of one user keep their order at every stage, also when a stage is killed or Pulsar restarts, except
//! that a payment that is tried again is overtaken.
//!
//! ```console
//! $ cargo lab run order_flow_pulsar
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
//! Notice: `Key_Shared` gives all messages of a user to one consumer of the subscription, in their order, for any number
//! of users and consumers. A payment that fails is published to the retry topic, to be delivered after a delay, and the
//! stage consumes that topic, too: nobody waits for it, and the user's next order overtakes. The broker looks at delayed
//! messages once a second, and delivers rather early than late: it would not keep delays below a second at all, so one
//! is added. The client's own dead-letter policy counts in the broker's memory, which a restart forgets; here the count
//! travels as a property. After five attempts, or at once if it
//! is no order, an event goes to the topic `dead`, with cause, attempts and origin. A topic without a subscription
//! keeps nothing, so all subscriptions are there before the first order is placed.
//!
//! When Pulsar goes away, a stage rides it out, which with this client takes care: after a restart a consumer may hang
//! without an error. So every send has a time limit, and after ten seconds of silence the stage builds its consumer
//! anew, whether there was nothing to do or nobody to say so. An error ends the session, and a new client follows.
//!
//! Try: `--without-idempotency --crash told:40`, and then the same `--data` without `--crash`: charges are doubled, or
//! stock, or parcels. In four terminals, all with `--data flow`: the stages `reserve`, `pay`, `ship`, `place`, and
//! `cargo lab kill order_flow_pulsar.2` or another of them, or `cargo lab kill pulsar` and `cargo lab restart pulsar`;
//! then `report --data flow`.
//!
//! Settings: PULSAR_ADDRESS (pulsar://localhost:6650); `--help` for the others. See also: order_flow_kafka,
//! order_flow_rabbitmq, order_flow_nats, docs/order-flow.md.

use std::collections::HashMap;
use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use futures::{FutureExt, StreamExt, TryStreamExt};
use pulsar::consumer::{InitialPosition, Message};
use pulsar::{Consumer, ConsumerOptions, Producer, Pulsar, SubType, TokioExecutor};
use rusqlite::{Connection as Books, TransactionBehavior, params};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{JoinSet, block_in_place};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

const ATTEMPTS: u32 = 5;
/// `delayedDeliveryTickTimeMillis` of the broker, by default.
const TICK: Duration = Duration::from_secs(1);
const SILENCE: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let shop = Shop::open(Args::parse())?;
    let mut parts = JoinSet::new();
    if !shop.stages().is_empty() {
        let address =
            std::env::var("PULSAR_ADDRESS").unwrap_or_else(|_| "pulsar://localhost:6650".into());
        let flow = Flow {
            shop: shop.clone(),
            address,
        };
        flow.connect().await.with_context(|| {
            let address = &flow.address;
            format!("no Pulsar broker answers at {address}; `cargo lab up pulsar` starts one")
        })?;
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
    address: String,
}

/// Why a session ended without an error.
#[derive(PartialEq)]
enum End {
    Finished,
    Silence,
}

type Stream = Consumer<Vec<u8>, TokioExecutor>;

impl Flow {
    fn topic(&self, event: &str) -> String {
        format!(
            "persistent://public/default/order-flow-{}-{event}",
            self.shop.run
        )
    }

    /// Left alone, the client retries for more than a minute, in silence.
    async fn connect(&self) -> anyhow::Result<Pulsar<TokioExecutor>> {
        let client = Pulsar::builder(&self.address, TokioExecutor).build();
        Ok(timeout(PATIENCE, client).await??)
    }

    async fn run(&self, stage: Stage) -> anyhow::Result<()> {
        loop {
            let session = match stage {
                Stage::Place => self.place().await,
                stage => self.consume(stage).await,
            };
            match session {
                Ok(End::Finished) => return Ok(()),
                Ok(End::Silence) => continue,
                Err(error) => eprintln!("{}: {error:#}; begins anew", stage.name()),
            }
            tokio::select! {
                () = self.shop.stop.cancelled() => return Ok(()),
                () = sleep(Duration::from_secs(1)) => {}
            }
        }
    }

    /// One after the other: a user's orders are in the topic as they were placed.
    async fn place(&self) -> anyhow::Result<End> {
        let pulsar = self.connect().await?;
        let rest = self.shop.to_place()?;
        if rest.first().is_some_and(|(number, ..)| *number == 0) {
            let events = ["placed", "reserved", "reserved-retry", "paid", "dead"];
            for (event, who) in events
                .into_iter()
                .zip(["reserve", "pay", "pay", "ship", "clerk"])
            {
                close(self.subscribe(&pulsar, &[self.topic(event)], who).await?).await?;
            }
        }
        let mut out = Out::new(pulsar);
        for (number, user, payload) in rest {
            if self.shop.stop.is_cancelled() {
                break;
            }
            out.send(&self.topic("placed"), &user, payload.as_bytes(), &[], None)
                .await?;
            self.shop.placed(number)?;
        }
        Ok(End::Finished)
    }

    async fn subscribe(
        &self,
        pulsar: &Pulsar<TokioExecutor>,
        topics: &[String],
        who: &str,
    ) -> anyhow::Result<Stream> {
        let options = ConsumerOptions::default()
            // A new subscription takes what is there already.
            .with_initial_position(InitialPosition::Earliest)
            .with_receiver_queue_size(100);
        let consumer = pulsar
            .consumer()
            .with_topics(topics)
            .with_subscription(who)
            .with_subscription_type(SubType::KeyShared)
            // How many the client asks for at a time. Kept below its queue, or acks wait behind messages.
            .with_batch_size(20)
            .with_options(options)
            .build();
        Ok(timeout(2 * PATIENCE, consumer)
            .await
            .context("no answer to a subscription")??)
    }

    async fn consume(&self, stage: Stage) -> anyhow::Result<End> {
        let pulsar = self.connect().await?;
        let (event, _) = stage.events();
        let mut topics = vec![self.topic(event)];
        if stage == Stage::Pay {
            topics.push(self.topic("reserved-retry"));
        }
        let mut consumer = self.subscribe(&pulsar, &topics, stage.name()).await?;
        let mut out = Out::new(pulsar);
        self.shop
            .say(format_args!("{}: working, Ctrl-C ends it", stage.name()));
        let end = loop {
            let message = tokio::select! {
                () = self.shop.stop.cancelled() => break End::Finished,
                message = timeout(SILENCE, consumer.try_next()) => message,
            };
            let Ok(message) = message else {
                break End::Silence;
            };
            let message = message?.context("the client gave up the connection")?;
            self.handle(stage, &mut out, &message).await?;
            // Only queued here. If it does not arrive, the order comes again.
            consumer.ack(&message).await?;
        };
        close(consumer).await?;
        Ok(end)
    }

    /// Returns when the order is done with here, or is safe in another topic.
    async fn handle(
        &self,
        stage: Stage,
        out: &mut Out,
        message: &Message<Vec<u8>>,
    ) -> anyhow::Result<()> {
        let properties = &message.metadata().properties;
        let attempts = properties
            .iter()
            .find(|property| property.key == "attempts");
        let attempts = attempts.and_then(|property| property.value.parse().ok());
        let attempt = attempts.unwrap_or(0_u32).saturating_add(1);
        let payload = &message.payload.data;
        let order = match Order::read(payload) {
            Ok(order) => order,
            Err(cause) => return self.bury(out, message, &cause, attempt).await,
        };
        match block_in_place(|| self.shop.effect(stage, &order))? {
            Outcome::Failed(_) if attempt < ATTEMPTS => {
                let delay = backoff(attempt);
                let attempts = [("attempts", attempt.to_string())];
                let topic = self.topic("reserved-retry");
                out.send(&topic, &order.user, payload, &attempts, Some(delay))
                    .await?;
                self.shop.retried(&order, attempt, delay)?;
            }
            Outcome::Failed(cause) => self.bury(out, message, &cause, attempt).await?,
            Outcome::Done | Outcome::Seen => {
                if let (_, Some(event)) = stage.events() {
                    out.send(&self.topic(event), &order.user, payload, &[], None)
                        .await?;
                }
                self.shop.told();
            }
        }
        Ok(())
    }

    async fn bury(
        &self,
        out: &mut Out,
        message: &Message<Vec<u8>>,
        cause: &str,
        attempts: u32,
    ) -> anyhow::Result<()> {
        let id = message.message_id();
        let origin = format!("{} {}:{}", message.topic, id.ledger_id, id.entry_id);
        let properties = [
            ("cause", cause.to_owned()),
            ("attempts", attempts.to_string()),
            ("origin", origin.clone()),
        ];
        let key = message.key().unwrap_or_default();
        let payload = &message.payload.data;
        let kept = Order::kept(payload);
        out.send(&self.topic("dead"), &key, kept, &properties, None)
            .await?;
        self.shop.dead(payload, &origin, cause, attempts)
    }
}

/// A producer for each topic, made when it is first needed: one per message would fail under load.
struct Out {
    pulsar: Pulsar<TokioExecutor>,
    producers: HashMap<String, Producer<TokioExecutor>>,
}

impl Out {
    fn new(pulsar: Pulsar<TokioExecutor>) -> Out {
        Out {
            pulsar,
            producers: HashMap::new(),
        }
    }

    /// Returns when the broker has it.
    async fn send(
        &mut self,
        topic: &str,
        key: &str,
        payload: &[u8],
        properties: &[(&str, String)],
        delay: Option<Duration>,
    ) -> anyhow::Result<()> {
        let sent = async {
            if !self.producers.contains_key(topic) {
                let producer = self.pulsar.producer().with_topic(topic).build().await?;
                self.producers.insert(topic.to_owned(), producer);
            }
            let producer = self.producers.get_mut(topic).context("no producer")?;
            let mut message = producer
                .create_message()
                .with_key(key)
                .with_content(payload.to_vec());
            for (key, value) in properties {
                message = message.with_property(*key, value);
            }
            if let Some(delay) = delay {
                // It may be delivered earlier by a tick.
                message = message.delay(delay + TICK)?;
            }
            // Into the client's queue, and to the broker.
            message.send_non_blocking().await?.await?;
            anyhow::Ok(())
        };
        timeout(2 * PATIENCE, sent)
            .await
            .with_context(|| format!("no receipt from {topic}"))?
    }
}

/// Gives back what was fetched ahead. With a full queue, the client's close would wait for ever for the client itself.
async fn close(mut consumer: Stream) -> anyhow::Result<()> {
    while consumer.next().now_or_never().flatten().is_some() {}
    timeout(PATIENCE, consumer.close())
        .await
        .context("no answer to the close")??;
    Ok(())
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
