//! The Kafka side: which settings make exactly-once true, and what to do when the broker is away.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{
    BaseConsumer, Consumer, ConsumerContext, ConsumerGroupMetadata, Rebalance,
};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, DeliveryResult, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer, ProducerContext};
use rdkafka::{Offset, TopicPartitionList};

use crate::event::{DEAD_LETTERS, DECLINED, ORDERS, PROGRESS};
use crate::shutdown::Stop;

/// How long one request may take before the session is thrown away.
const REQUEST: Duration = Duration::from_secs(10);
/// How long a question about a topic may take. Who asks has no other way to find out, and all the time in the world.
const QUESTION: Duration = Duration::from_secs(30);
/// A transaction that its owner neither commits nor aborts is aborted by the broker after this time.
/// Until then `read_committed` readers of the partitions it touched wait, so it is short.
const TRANSACTION_MS: u32 = 15_000;

/// librdkafka reports every failed connection attempt. One line of our own says it better (`Link`);
/// the details are there with `RUST_LOG=debug`.
#[derive(Default)]
pub struct Quiet {
    revoked: AtomicBool,
}

impl Quiet {
    /// Whether partitions were taken from this consumer since the last call.
    pub fn was_revoked(&self) -> bool {
        self.revoked.swap(false, Ordering::Relaxed)
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
}

impl ProducerContext for Quiet {
    type DeliveryOpaque = ();

    // Nothing to do: a record that could not be delivered makes the commit of its transaction fail.
    fn delivery(&self, _result: &DeliveryResult<'_>, _opaque: ()) {}
}

pub type Reader = BaseConsumer<Quiet>;

#[derive(Clone)]
pub struct Kafka {
    brokers: String,
    /// Identifies this cluster among all: the books of one must never meet the orders of another.
    pub cluster: String,
}

impl Kafka {
    /// Finds the cluster and sees to its topics, for as long as `wait` if need be: it may be starting too.
    pub fn connect(brokers: &str, partitions: i32, wait: Duration, stop: &Stop) -> Result<Kafka> {
        let mut kafka = Kafka {
            brokers: brokers.to_owned(),
            cluster: String::new(),
        };
        let deadline = Instant::now() + wait;
        while let Err(error) = kafka.find(partitions, deadline) {
            tracing::debug!("no Kafka at {brokers} yet: {error:#}");
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
            .set("client.id", "order_pipeline")
            // After a restart of the broker, be back within a second rather than ten.
            .set("reconnect.backoff.max.ms", "1000");
        config
    }

    fn create_topics(&self, partitions: i32, wait: Duration) -> Result<()> {
        let admin: AdminClient<Quiet> = self.client().create_with_context(Quiet::default())?;
        // -1: as many replicas as the broker's default says, one on a laptop, three in production.
        let topic = |name, partitions| NewTopic::new(name, partitions, TopicReplication::Fixed(-1));
        let topics = [
            topic(ORDERS, partitions),
            topic(DECLINED, partitions),
            topic(DEAD_LETTERS, 1),
            topic(PROGRESS, 1).set("cleanup.policy", "compact"),
        ];
        let options = AdminOptions::new().request_timeout(Some(wait));
        match futures::executor::block_on(admin.create_topics(&topics, &options)) {
            Ok(results) => {
                for result in results {
                    match result {
                        Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                        Err((topic, code)) => bail!("topic {topic}: {code}"),
                    }
                }
            }
            // The mock cluster has no CreateTopics; asking for a topic's metadata creates it there.
            Err(error) => {
                tracing::debug!("cannot create topics ({error}), leaving it to auto creation");
                let mut config = self.client();
                let maker: BaseProducer<Quiet> = config
                    .set("allow.auto.create.topics", "true")
                    .create_with_context(Quiet::default())?;
                for topic in [ORDERS, DECLINED, DEAD_LETTERS, PROGRESS] {
                    maker.client().fetch_metadata(Some(topic), wait)?;
                }
            }
        }
        Ok(())
    }

    /// A member of a consumer group whose position is committed by a transaction only.
    pub fn member(&self, group: &str, identity: &str, topics: &[&str]) -> Result<Reader> {
        let consumer: Reader = self
            .client()
            .set("group.id", group)
            // Static membership: the group knows this member by name. Started again after a crash it
            // has its partitions back at once, rather than when the dead one's session has expired.
            .set("group.instance.id", identity)
            .set("session.timeout.ms", "10000")
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "earliest")
            .create_with_context(Quiet::default())?;
        consumer.subscribe(topics)?;
        Ok(consumer)
    }

    /// A reader outside of any group: every partition of `topic`, from its beginning or from where
    /// `starts` says, committed transactions only, with a signal at the end of each partition.
    pub fn reader(&self, topic: &str, starts: &Starts) -> Result<Reader> {
        let consumer: Reader = self
            .client()
            .set("group.id", "order-pipeline-reader")
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            // The end of a partition is reported when a fetch comes back empty: do not let it wait long.
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

    /// Where the next committed record of each partition of `topic` will be.
    pub fn ends(&self, topic: &str) -> Result<Starts> {
        let client: Reader = self.client().create_with_context(Quiet::default())?;
        let mut ends = Starts::new();
        for partition in self.partitions(&client, topic)? {
            let (_, end) = client
                .client()
                .fetch_watermarks(topic, partition, QUESTION)?;
            ends.insert(partition, end);
        }
        Ok(ends)
    }

    /// Reads what is committed on `topic`, from `starts` to the end as it is now.
    pub fn read_to_end(
        &self,
        topic: &str,
        starts: &Starts,
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

    fn partitions(&self, reader: &Reader, topic: &str) -> Result<Vec<i32>> {
        let metadata = reader.fetch_metadata(Some(topic), QUESTION)?;
        let found = metadata.topics().iter().find(|found| found.name() == topic);
        Ok(found
            .into_iter()
            .flat_map(|t| t.partitions())
            .map(|p| p.id())
            .collect())
    }

    /// Whether no transaction is open on `topic`: the last stable offset is the end of the log.
    pub fn is_settled(&self, topic: &str) -> Result<bool> {
        let client = |isolation: &str| -> Result<Reader> {
            Ok(self
                .client()
                .set("isolation.level", isolation)
                .create_with_context(Quiet::default())?)
        };
        let (stable, end) = (client("read_committed")?, client("read_uncommitted")?);
        for partition in self.partitions(&end, topic)? {
            let (_, end) = end.fetch_watermarks(topic, partition, QUESTION)?;
            let (_, stable) = stable.fetch_watermarks(topic, partition, QUESTION)?;
            if stable < end {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A producer whose earlier self, if there was one, is fenced off, and what that left open aborted.
    pub fn transactional(&self, identity: &str) -> Result<Transactions> {
        let producer: BaseProducer<Quiet> = self
            .client()
            .set("transactional.id", identity)
            .set("transaction.timeout.ms", TRANSACTION_MS.to_string())
            .set("message.timeout.ms", TRANSACTION_MS.to_string())
            // The batch is complete when it is sent: waiting for more only adds to the transaction.
            .set("linger.ms", "0")
            .set("compression.type", "lz4")
            .create_with_context(Quiet::default())?;
        producer.init_transactions(REQUEST)?;
        Ok(Transactions(producer))
    }
}

/// One record to be written in a transaction.
pub struct Outgoing {
    pub topic: &'static str,
    /// None: the key decides.
    pub partition: Option<i32>,
    pub key: Option<Vec<u8>>,
    pub payload: Option<Vec<u8>>,
    pub headers: OwnedHeaders,
}

/// Where the consumer has got to: the offset of the next record, per partition.
pub type Positions = HashMap<(String, i32), i64>;

/// Where to begin to read, for those partitions of a topic that need not be read from their beginning.
pub type Starts = BTreeMap<i32, i64>;

pub struct Transactions(BaseProducer<Quiet>);

impl Transactions {
    /// Writes `records` and moves the group's `positions`, both or neither.
    ///
    /// An error says nothing about the outcome: the request may have been carried out and only its
    /// answer lost. So no error is repaired here. The caller throws this producer away, and
    /// `init_transactions` of the next one makes the broker settle the matter, one way or the other.
    pub fn commit(
        &self,
        records: Vec<Outgoing>,
        positions: Option<(&Positions, &ConsumerGroupMetadata)>,
    ) -> Result<()> {
        self.0.begin_transaction()?;
        for record in records {
            let mut next = BaseRecord::<[u8], [u8]>::to(record.topic).headers(record.headers);
            next.partition = record.partition;
            next.key = record.key.as_deref();
            next.payload = record.payload.as_deref();
            self.0.send(next).map_err(|(error, _)| error)?;
        }
        if let Some((positions, group)) = positions {
            let mut offsets = TopicPartitionList::new();
            for ((topic, partition), next) in positions {
                offsets.add_partition_offset(topic, *partition, Offset::Offset(*next))?;
            }
            // The group's metadata lets the broker refuse a member that has lost its partitions.
            self.0
                .send_offsets_to_transaction(&offsets, group, REQUEST)?;
        }
        // `commit_transaction` flushes by itself, but rust-rdkafka's flush waits in steps of 100 ms,
        // which would be most of the transaction's time. When nothing is in flight it returns at once.
        let deadline = Instant::now() + REQUEST;
        while self.0.in_flight_count() > 0 && Instant::now() < deadline {
            self.0.poll(Duration::from_millis(1));
        }
        self.0.commit_transaction(REQUEST)?;
        Ok(())
    }
}

/// Whether the broker says that somebody else has taken over this identity.
pub fn is_fencing(error: &anyhow::Error) -> bool {
    use RDKafkaErrorCode::{FencedInstanceId, InvalidProducerEpoch, ProducerFenced};
    match error.downcast_ref::<KafkaError>() {
        Some(KafkaError::Transaction(e)) => {
            matches!(
                e.code(),
                RDKafkaErrorCode::Fenced | ProducerFenced | InvalidProducerEpoch
            )
        }
        Some(error) => error.rdkafka_error_code() == Some(FencedInstanceId),
        None => false,
    }
}

/// Whether a consumer that reports this gets over it by itself.
pub fn is_passing(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::{AllBrokersDown, BrokerTransportFailure, OperationTimedOut, Resolve};
    matches!(
        error.rdkafka_error_code(),
        Some(AllBrokersDown | BrokerTransportFailure | OperationTimedOut | Resolve)
    ) && !matches!(error, KafkaError::MessageConsumptionFatal(_))
}

/// Says once that Kafka is away, and once that it is back.
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
