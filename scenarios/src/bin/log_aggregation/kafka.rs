//! The Kafka side: topics, the transactions that `ingest` writes in, the group that the aggregator reads in.

use std::collections::{BTreeMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{
    BaseConsumer, Consumer, ConsumerContext, ConsumerGroupMetadata, Rebalance,
};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, DeliveryResult, Header, Headers, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer, ProducerContext};
use rdkafka::{Offset, TopicPartitionList};

use crate::shutdown::Stop;

const REQUEST: Duration = Duration::from_secs(10);
/// What a dead producer has left open hides later records from `read_committed` readers for this long.
const TRANSACTION_MS: &str = "15000";
/// A line of 1 MiB can be several times that as JSON, when it is full of control characters.
const MAX_RECORD: &str = "16777216";

/// The header that names the run an entry belongs to.
pub const RUN: &str = "run";

/// One line of our own says better that a broker is away than all that librdkafka reports (`Link`); the
/// details are there with `RUST_LOG=debug`.
#[derive(Default)]
pub struct Quiet {
    revoked: AtomicBool,
    commit_failed: AtomicBool,
    /// Why a record of the transaction cannot be delivered, when that will never change.
    refused: Mutex<Option<KafkaError>>,
}

impl Quiet {
    /// Whether partitions were taken from this consumer since the last call.
    pub fn was_revoked(&self) -> bool {
        self.revoked.swap(false, Ordering::Relaxed)
    }

    /// Whether a commit in the background has failed since the last call.
    pub fn commit_failed(&self) -> bool {
        self.commit_failed.swap(false, Ordering::Relaxed)
    }
}

impl ClientContext for Quiet {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!("librdkafka: {facility} {message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!("librdkafka: {error}: {reason}");
    }
}

impl ConsumerContext for Quiet {
    fn pre_rebalance(&self, _consumer: &BaseConsumer<Quiet>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Revoke(_) = rebalance {
            self.revoked.store(true, Ordering::Relaxed);
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _offsets: &TopicPartitionList) {
        if let Err(error) = result {
            tracing::debug!("commit: {error}");
            self.commit_failed.store(true, Ordering::Relaxed);
        }
    }
}

impl ProducerContext for Quiet {
    type DeliveryOpaque = ();

    // A record that could not be delivered makes the commit of its transaction fail, which does not say why.
    fn delivery(&self, result: &DeliveryResult<'_>, _opaque: ()) {
        if let Err((error, _)) = result
            && is_refusal(error)
        {
            let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
            *refused = Some(error.clone());
        }
    }
}

pub type Reader = BaseConsumer<Quiet>;

/// An offset per partition.
pub type Offsets = BTreeMap<i32, i64>;

/// Names that belong to one topic of logs.
#[derive(Clone)]
pub struct Topics {
    pub logs: String,
    pub dead_letters: String,
    /// How far each source was ingested. Compacted: only the newest record of a source counts.
    pub positions: String,
}

#[derive(Clone)]
pub struct Kafka {
    brokers: String,
    pub topics: Topics,
    /// Identifies this cluster among all.
    pub cluster: String,
}

impl Kafka {
    /// Finds the cluster and sees to its topics, for as long as `wait` if need be.
    pub fn connect(topic: &str, partitions: i32, wait: Duration, stop: &Stop) -> Result<Kafka> {
        let brokers = std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| "localhost:9092".into());
        let mut kafka = Kafka {
            topics: Topics {
                logs: topic.to_owned(),
                dead_letters: format!("{topic}.dlq"),
                positions: format!("{topic}.positions"),
            },
            brokers,
            cluster: String::new(),
        };
        let deadline = Instant::now() + wait;
        while let Err(error) = kafka.find(partitions, deadline) {
            tracing::debug!("no Kafka at {} yet: {error:#}", kafka.brokers);
            if Instant::now() > deadline || stop.within(Duration::from_millis(200)) {
                return Err(error.context(format!(
                    "Kafka does not answer at {}. Start one with `cargo lab up kafka`, or set KAFKA_BROKERS",
                    kafka.brokers
                )));
            }
        }
        Ok(kafka)
    }

    fn find(&mut self, partitions: i32, deadline: Instant) -> Result<()> {
        let left = || {
            deadline
                .saturating_duration_since(Instant::now())
                .max(Duration::from_secs(1))
        };
        let probe: Reader = self.client().create_with_context(Quiet::default())?;
        probe.client().fetch_metadata(None, left())?;
        let cluster = probe.client().fetch_cluster_id(left());
        self.cluster = cluster.unwrap_or_else(|| "unnamed-cluster".into());
        self.create_topics(partitions, left())
            .context("cannot create the topics")
    }

    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.brokers)
            .set("client.id", "log_aggregation")
            // After a restart of the broker, be back within a second rather than ten.
            .set("reconnect.backoff.max.ms", "1000");
        config
    }

    fn create_topics(&self, partitions: i32, wait: Duration) -> Result<()> {
        let admin: AdminClient<Quiet> = self.client().create_with_context(Quiet::default())?;
        // -1: as many replicas as the broker's default says, one on a laptop, three in production.
        let topic = |name, partitions| {
            NewTopic::new(name, partitions, TopicReplication::Fixed(-1))
                .set("max.message.bytes", MAX_RECORD)
        };
        let topics = [
            topic(&self.topics.logs, partitions),
            topic(&self.topics.dead_letters, 1),
            topic(&self.topics.positions, 1).set("cleanup.policy", "compact"),
        ];
        let options = AdminOptions::new().request_timeout(Some(wait));
        for result in futures::executor::block_on(admin.create_topics(&topics, &options))? {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((topic, code)) => bail!("topic {topic}: {code}"),
            }
        }
        Ok(())
    }

    pub fn delete_topics(&self) -> Result<()> {
        let admin: AdminClient<Quiet> = self.client().create_with_context(Quiet::default())?;
        let Topics {
            logs,
            dead_letters,
            positions,
        } = &self.topics;
        let options = AdminOptions::new().request_timeout(Some(REQUEST));
        let deleted = admin.delete_topics(&[logs, dead_letters, positions], &options);
        futures::executor::block_on(deleted)?;
        Ok(())
    }

    /// A member of the aggregators' group. With a `name` the group knows it again after a crash and gives it
    /// its partitions at once, rather than when the dead one's session has expired.
    pub fn member(&self, group: &str, name: Option<&str>) -> Result<Reader> {
        let mut config = self.client();
        if let Some(name) = name {
            config.set("group.instance.id", format!("{group}-{name}"));
        }
        let consumer: Reader = config
            .set("group.id", group)
            .set("session.timeout.ms", "10000")
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            // `latest` would lose what came before the first commit.
            .set("auto.offset.reset", "earliest")
            // What librdkafka reads ahead; with the store down, this much waits in memory.
            .set("queued.max.messages.kbytes", "16384")
            .create_with_context(Quiet::default())?;
        consumer.subscribe(&[&self.topics.logs])?;
        Ok(consumer)
    }

    /// A reader outside of any group, with a signal at the end of each partition.
    fn reader(&self, topic: &str, starts: &Offsets) -> Result<Reader> {
        let consumer: Reader = self
            .client()
            .set("group.id", "log-aggregation-reader")
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            .set("fetch.wait.max.ms", "50")
            .create_with_context(Quiet::default())?;
        let mut all = TopicPartitionList::new();
        for partition in self.partitions(&consumer, topic)? {
            let start = starts
                .get(&partition)
                .map_or(Offset::Beginning, |at| Offset::Offset(*at));
            all.add_partition_offset(topic, partition, start)?;
        }
        consumer.assign(&all)?;
        Ok(consumer)
    }

    fn partitions(&self, reader: &Reader, topic: &str) -> Result<Vec<i32>> {
        let metadata = reader.fetch_metadata(Some(topic), REQUEST)?;
        let found = metadata.topics().iter().find(|found| found.name() == topic);
        Ok(found
            .into_iter()
            .flat_map(|t| t.partitions())
            .map(|p| p.id())
            .collect())
    }

    /// The offset of the next record of each partition; `committed` leaves out what an open transaction hides.
    pub fn ends(&self, topic: &str, committed: bool) -> Result<Offsets> {
        let isolation = if committed {
            "read_committed"
        } else {
            "read_uncommitted"
        };
        let client: Reader = self
            .client()
            .set("isolation.level", isolation)
            .create_with_context(Quiet::default())?;
        let mut ends = Offsets::new();
        for partition in self.partitions(&client, topic)? {
            let (_, end) = client.fetch_watermarks(topic, partition, REQUEST)?;
            ends.insert(partition, end);
        }
        Ok(ends)
    }

    /// Where the group goes on reading; 0 where it has committed nothing.
    pub fn committed(&self, group: &str) -> Result<Offsets> {
        let client: Reader = self
            .client()
            .set("group.id", group)
            .create_with_context(Quiet::default())?;
        let mut wanted = TopicPartitionList::new();
        for partition in self.partitions(&client, &self.topics.logs)? {
            wanted.add_partition(&self.topics.logs, partition);
        }
        let found = client.committed_offsets(wanted, REQUEST)?;
        let offset = |offset| match offset {
            Offset::Offset(offset) => offset,
            _ => 0,
        };
        Ok(found
            .elements()
            .iter()
            .map(|found| (found.partition(), offset(found.offset())))
            .collect())
    }

    /// Reads what is committed on `topic`, from `starts` to the end as it is now.
    pub fn read_to_end(
        &self,
        topic: &str,
        starts: &Offsets,
        mut each: impl FnMut(&BorrowedMessage<'_>),
    ) -> Result<()> {
        let reader = self.reader(topic, starts)?;
        let mut unfinished: HashSet<i32> = reader
            .assignment()?
            .elements()
            .iter()
            .map(|e| e.partition())
            .collect();
        while !unfinished.is_empty() {
            match reader.poll(REQUEST) {
                Some(Ok(record)) => each(&record),
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    unfinished.remove(&partition);
                }
                Some(Err(error)) if is_passing(&error) => {}
                Some(Err(error)) => return Err(error.into()),
                None => bail!("cannot read {topic} to its end"),
            }
        }
        retire(reader);
        Ok(())
    }

    /// A producer whose earlier self, if there was one, is fenced off, and what that left open aborted.
    pub fn transactional(&self, identity: &str) -> Result<Transactions> {
        let producer: BaseProducer<Quiet> = self
            .client()
            .set("transactional.id", identity)
            .set("transaction.timeout.ms", TRANSACTION_MS)
            .set("message.timeout.ms", TRANSACTION_MS)
            .set("message.max.bytes", MAX_RECORD)
            .set("linger.ms", "0")
            .set("compression.type", "lz4")
            .create_with_context(Quiet::default())?;
        producer.init_transactions(REQUEST)?;
        Ok(Transactions(producer))
    }
}

/// One record to be written in a transaction.
#[derive(Clone)]
pub struct Outgoing {
    pub topic: String,
    pub key: Option<Vec<u8>>,
    pub payload: Option<Vec<u8>>,
    pub headers: Vec<(String, Vec<u8>)>,
}

pub struct Transactions(BaseProducer<Quiet>);

impl Transactions {
    /// Writes `records` and moves the group's positions on `logs`, both or neither.
    ///
    /// An error says nothing about the outcome. So none is repaired here: the caller throws this producer
    /// away, and `init_transactions` of the next one makes the broker settle the matter.
    pub fn commit(
        &self,
        records: &[Outgoing],
        positions: Option<(&str, &Offsets, &ConsumerGroupMetadata)>,
    ) -> Result<()> {
        self.attempt(records, positions).map_err(|error| {
            let refused = &self.0.context().refused;
            let refused = refused.lock().unwrap_or_else(PoisonError::into_inner);
            refused.clone().map_or(error, Into::into)
        })
    }

    fn attempt(
        &self,
        records: &[Outgoing],
        positions: Option<(&str, &Offsets, &ConsumerGroupMetadata)>,
    ) -> Result<()> {
        self.0.begin_transaction()?;
        for record in records {
            let headers = record
                .headers
                .iter()
                .fold(OwnedHeaders::new(), |all, (key, value)| {
                    all.insert(Header {
                        key,
                        value: Some(value),
                    })
                });
            let mut next = BaseRecord::<[u8], [u8]>::to(&record.topic).headers(headers);
            next.key = record.key.as_deref();
            next.payload = record.payload.as_deref();
            loop {
                match self.0.send(next) {
                    Ok(()) => break,
                    Err((error, back))
                        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull) =>
                    {
                        self.0.poll(Duration::from_millis(10));
                        next = back;
                    }
                    Err((error, _)) => return Err(error.into()),
                }
            }
        }
        if let Some((topic, positions, group)) = positions {
            let list = list(topic, positions)?;
            self.0.send_offsets_to_transaction(&list, group, REQUEST)?;
        }
        // Nothing in flight lets `commit_transaction` return at once; its own flush waits in steps of 100 ms.
        let deadline = Instant::now() + REQUEST;
        while self.0.in_flight_count() > 0 && Instant::now() < deadline {
            self.0.poll(Duration::from_millis(1));
        }
        self.0.commit_transaction(REQUEST)?;
        Ok(())
    }
}

pub fn list(topic: &str, offsets: &Offsets) -> Result<TopicPartitionList> {
    let mut list = TopicPartitionList::new();
    for (partition, next) in offsets {
        list.add_partition_offset(topic, *partition, Offset::Offset(*next))?;
    }
    Ok(list)
}

/// Whether the broker says that somebody else has taken over this identity.
pub fn is_fencing(error: &anyhow::Error) -> bool {
    use RDKafkaErrorCode::{FencedInstanceId, InvalidProducerEpoch, ProducerFenced};
    match error.downcast_ref::<KafkaError>() {
        Some(KafkaError::Transaction(e)) => matches!(
            e.code(),
            RDKafkaErrorCode::Fenced | ProducerFenced | InvalidProducerEpoch
        ),
        Some(error) => error.rdkafka_error_code() == Some(FencedInstanceId),
        None => false,
    }
}

/// Whether it will be the same each time: a limit or a right of the broker, which only its owner can change.
pub fn is_final(error: &anyhow::Error) -> bool {
    error.downcast_ref::<KafkaError>().is_some_and(is_refusal)
}

fn is_refusal(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::{
        ClusterAuthorizationFailed, GroupAuthorizationFailed, MessageSizeTooLarge,
        TopicAuthorizationFailed, TransactionalIdAuthorizationFailed,
    };
    let code = match error {
        KafkaError::Transaction(error) => Some(error.code()),
        error => error.rdkafka_error_code(),
    };
    matches!(
        code,
        Some(
            ClusterAuthorizationFailed
                | GroupAuthorizationFailed
                | MessageSizeTooLarge
                | TopicAuthorizationFailed
                | TransactionalIdAuthorizationFailed
        )
    )
}

/// The headers whose names are UTF-8. The crate panics at any other name, which any other client can write.
pub fn readable<H: Headers>(headers: Option<&H>) -> impl Iterator<Item = Header<'_, &[u8]>> {
    headers.into_iter().flat_map(|headers| {
        let read = |at| catch_unwind(AssertUnwindSafe(|| headers.try_get(at)));
        (0..headers.count()).filter_map(move |at| read(at).ok().flatten())
    })
}

/// Whether a consumer that reports this gets over it by itself.
pub fn is_passing(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::{AllBrokersDown, BrokerTransportFailure, OperationTimedOut, Resolve};
    matches!(
        error.rdkafka_error_code(),
        Some(AllBrokersDown | BrokerTransportFailure | OperationTimedOut | Resolve)
    ) && !matches!(error, KafkaError::MessageConsumptionFatal(_))
}

/// Says once that somebody is away, and once that it is back.
pub struct Link {
    who: String,
    lost: AtomicBool,
}

impl Link {
    pub fn new(who: impl Into<String>) -> Link {
        Link {
            who: who.into(),
            lost: AtomicBool::new(false),
        }
    }

    pub fn lost(&self, why: &dyn std::fmt::Display) {
        if self.lost.swap(true, Ordering::Relaxed) {
            tracing::debug!("{}: {why}", self.who);
        } else {
            tracing::warn!(
                "{}: interrupted ({why}), trying until it works again",
                self.who
            );
        }
    }

    pub fn fine(&self) {
        if self.lost.swap(false, Ordering::Relaxed) {
            tracing::info!("{}: going on", self.who);
        }
    }
}

/// Drops a client without waiting for it longer than it deserves: closing a consumer talks to the
/// group's coordinator, and that may be the very broker that is away.
pub fn retire<T: Send + 'static>(client: T) {
    let (done, gone) = mpsc::channel();
    thread::spawn(move || {
        drop(client);
        let _ = done.send(());
    });
    if gone.recv_timeout(Duration::from_secs(5)).is_err() {
        tracing::debug!("a client takes long to close, leaving it behind");
    }
}
