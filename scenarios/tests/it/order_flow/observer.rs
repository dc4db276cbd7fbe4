//! What the brokers know of a run, asked through clients of this test's own.

use std::collections::{BTreeMap, HashMap};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream;
use compose::harness::{TIMEOUT, http_get};
use compose::{Broker, Service};
use futures::TryStreamExt;
use lapin::options::{BasicGetOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Connection, ConnectionProperties};
use pulsar::consumer::InitialPosition;
use pulsar::{Consumer, ConsumerOptions, Pulsar, SubType, TokioExecutor};
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::KafkaError;
use rdkafka::message::{Headers, OwnedMessage};
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer};
use rdkafka::{Message, Offset, TopicPartitionList};
use serde_json::Value;
use tokio::runtime::Runtime;

use super::books::Placed;

#[derive(Debug)]
pub struct DeadLetter {
    pub payload: Vec<u8>,
    pub cause: String,
    pub attempts: u32,
    pub origin: String,
}

impl DeadLetter {
    fn new(payload: &[u8], label: impl Fn(&str) -> Option<String>) -> Result<DeadLetter> {
        let label = |key: &str| label(key).with_context(|| format!("no {key} at a dead letter"));
        Ok(DeadLetter {
            payload: payload.to_vec(),
            cause: label("cause")?,
            attempts: label("attempts")?.parse()?,
            origin: label("origin")?,
        })
    }

    /// The id, if it is an order.
    pub fn order(&self) -> Option<String> {
        let order: Value = serde_json::from_slice(&self.payload).ok()?;
        Some(order["id"].as_str()?.to_owned())
    }
}

pub struct Observer<'a> {
    broker: &'a Broker,
    run: String,
}

impl Observer<'_> {
    pub fn new(broker: &Broker, run: String) -> Observer<'_> {
        Observer { broker, run }
    }

    /// Puts an event among those that `place` has written.
    pub fn place(&self, payload: &[u8]) -> Result<()> {
        let (address, run) = (self.broker.address(), &self.run);
        match self.broker.service() {
            Service::Kafka => {
                let producer: BaseProducer<DefaultProducerContext> = ClientConfig::new()
                    .set("bootstrap.servers", &address)
                    .set("message.max.bytes", "1048588")
                    .create()?;
                let topic = format!("order-flow.{run}.placed");
                let record = BaseRecord::to(&topic).key("user-1").payload(payload);
                producer.send(record).map_err(|(error, _)| error)?;
                Ok(producer.flush(TIMEOUT)?)
            }
            Service::RabbitMq => Runtime::new()?.block_on(async {
                let connection =
                    Connection::connect(&address, ConnectionProperties::default()).await?;
                let channel = connection.create_channel().await?;
                let exchange = format!("order-flow.{run}.events");
                let properties = BasicProperties::default().with_delivery_mode(2);
                let options = BasicPublishOptions {
                    mandatory: true,
                    ..Default::default()
                };
                channel.confirm_select(Default::default()).await?;
                let sent = channel.basic_publish(
                    exchange.into(),
                    "placed.0".into(),
                    options,
                    payload,
                    properties,
                );
                let confirmed = sent.await?.await?;
                ensure!(confirmed == lapin::Confirmation::Ack(None), "{confirmed:?}");
                Ok(())
            }),
            Service::Nats => Runtime::new()?.block_on(async {
                let jetstream = jetstream::new(async_nats::connect(&address).await?);
                let subject = format!("order-flow.{run}.placed.0");
                jetstream
                    .publish(subject, payload.to_vec().into())
                    .await?
                    .await?;
                Ok(())
            }),
            _ => Runtime::new()?.block_on(async {
                let client = Pulsar::builder(&address, TokioExecutor).build().await?;
                let topic = self.topic("placed");
                let mut producer = client.producer().with_topic(topic).build().await?;
                producer.send_non_blocking(payload.to_vec()).await?.await?;
                Ok(producer.close().await?)
            }),
        }
    }

    /// The partition or shard of each user, by which users are neighbours.
    pub fn homes(&self, placed: &BTreeMap<String, Placed>) -> Result<HashMap<String, i32>> {
        if self.broker.service() == Service::Kafka {
            let records = self.records("placed")?;
            let home = |record: &OwnedMessage| {
                let user = String::from_utf8_lossy(record.key()?).into_owned();
                Some((user, record.partition()))
            };
            return Ok(records.iter().filter_map(home).collect());
        }
        let shards = if self.broker.service() == Service::Pulsar {
            1
        } else {
            4
        };
        let users = placed.values().map(|order| &order.user);
        let home = |user: &String| {
            (
                user.clone(),
                user.bytes().map(i32::from).sum::<i32>() % shards,
            )
        };
        Ok(users.map(home).collect())
    }

    /// Waits until nothing waits to be consumed, nor is consumed and not acknowledged. The stages have ended.
    pub fn await_nothing_left(&self) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let left = self.left()?;
            if left == 0 {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{left} events are left");
            thread::sleep(Duration::from_millis(200));
        }
    }

    fn left(&self) -> Result<i64> {
        let (address, run) = (self.broker.address(), &self.run);
        let inputs = [("placed", "reserve"), ("reserved", "pay"), ("paid", "ship")];
        match self.broker.service() {
            Service::Kafka => {
                let mut left = 0;
                for (event, stage) in inputs {
                    let group: BaseConsumer = ClientConfig::new()
                        .set("bootstrap.servers", &address)
                        .set("group.id", format!("order-flow.{run}.{stage}"))
                        .create()?;
                    let topic = format!("order-flow.{run}.{event}");
                    let mut all = TopicPartitionList::new();
                    for partition in
                        group.fetch_metadata(Some(&topic), TIMEOUT)?.topics()[0].partitions()
                    {
                        all.add_partition(&topic, partition.id());
                    }
                    for position in group.committed_offsets(all, TIMEOUT)?.elements() {
                        let (_, end) =
                            group.fetch_watermarks(&topic, position.partition(), TIMEOUT)?;
                        left += match position.offset() {
                            Offset::Offset(committed) => end - committed,
                            _ => end,
                        };
                    }
                }
                Ok(left)
            }
            Service::RabbitMq => Runtime::new()?.block_on(async {
                let connection =
                    Connection::connect(&address, ConnectionProperties::default()).await?;
                let channel = connection.create_channel().await?;
                let mut left = 0;
                let shards = inputs
                    .iter()
                    .flat_map(|(event, _)| (0..4).map(move |shard| format!("{event}.{shard}")));
                for queue in shards.chain((1..5).map(|attempt| format!("wait-{attempt}"))) {
                    let name = format!("order-flow.{run}.{queue}");
                    let passive = QueueDeclareOptions {
                        passive: true,
                        ..Default::default()
                    };
                    let queue = channel
                        .queue_declare(name.into(), passive, FieldTable::default())
                        .await?;
                    left += i64::from(queue.message_count());
                }
                Ok(left)
            }),
            Service::Nats => {
                let messages = self.stream()?;
                let alive = messages
                    .iter()
                    .filter(|message| !message.subject.ends_with(".dead"));
                Ok(i64::try_from(alive.count())?)
            }
            _ => {
                let mut left = self.backlog("reserved-retry", "pay")?;
                for (event, stage) in inputs {
                    left += self.backlog(event, stage)?;
                }
                Ok(left)
            }
        }
    }

    pub fn dead_letters(&self) -> Result<Vec<DeadLetter>> {
        let address = self.broker.address();
        match self.broker.service() {
            Service::Kafka => {
                let letter = |record: &OwnedMessage| {
                    let label = |key: &str| {
                        let header = record.headers()?.iter().find(|header| header.key == key)?;
                        String::from_utf8(header.value?.to_vec()).ok()
                    };
                    DeadLetter::new(record.payload().unwrap_or_default(), label)
                };
                self.records("dead")?.iter().map(letter).collect()
            }
            Service::RabbitMq => Runtime::new()?.block_on(async {
                let connection =
                    Connection::connect(&address, ConnectionProperties::default()).await?;
                let channel = connection.create_channel().await?;
                let queue = format!("order-flow.{}.dead", self.run);
                let mut letters = Vec::new();
                while let Some(message) = channel
                    .basic_get(queue.as_str().into(), BasicGetOptions { no_ack: true })
                    .await?
                {
                    let headers = message.properties.headers().clone().unwrap_or_default();
                    let label = |key: &str| match headers.inner().get(key)? {
                        AMQPValue::LongString(text) => Some(text.to_string()),
                        AMQPValue::LongUInt(number) => Some(number.to_string()),
                        _ => None,
                    };
                    letters.push(DeadLetter::new(&message.data, label)?);
                }
                Ok(letters)
            }),
            Service::Nats => {
                let messages = self.stream()?;
                let dead = messages
                    .iter()
                    .filter(|message| message.subject.ends_with(".dead"));
                dead.map(|message| {
                    let label = |key: &str| Some(message.headers.get(key)?.to_string());
                    DeadLetter::new(&message.payload, label)
                })
                .collect()
            }
            _ => {
                let count = self.backlog("dead", "clerk")?;
                Runtime::new()?.block_on(async {
                    let client = Pulsar::builder(&address, TokioExecutor).build().await?;
                    let earliest =
                        ConsumerOptions::default().with_initial_position(InitialPosition::Earliest);
                    let mut consumer: Consumer<Vec<u8>, _> = client
                        .consumer()
                        .with_topic(self.topic("dead"))
                        .with_subscription("clerk")
                        .with_subscription_type(SubType::KeyShared)
                        .with_options(earliest)
                        .build()
                        .await?;
                    let mut letters = Vec::new();
                    for _ in 0..count {
                        let message = tokio::time::timeout(TIMEOUT, consumer.try_next()).await??;
                        let message = message.context("the messages ended")?;
                        let properties = &message.metadata().properties;
                        let label = |key: &str| {
                            let property =
                                properties.iter().find(|property| property.key == key)?;
                            Some(property.value.clone())
                        };
                        letters.push(DeadLetter::new(&message.payload.data, label)?);
                    }
                    Ok(letters)
                })
            }
        }
    }

    /// All records of a Kafka topic.
    fn records(&self, event: &str) -> Result<Vec<OwnedMessage>> {
        let reader: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", self.broker.address())
            .set("group.id", "independent-reader")
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            .create()?;
        let topic = format!("order-flow.{}.{event}", self.run);
        let mut all = TopicPartitionList::new();
        for partition in reader.fetch_metadata(Some(&topic), TIMEOUT)?.topics()[0].partitions() {
            all.add_partition_offset(&topic, partition.id(), Offset::Beginning)?;
        }
        let mut open = all.count();
        reader.assign(&all)?;
        let mut records = Vec::new();
        while open > 0 {
            match reader.poll(TIMEOUT).context("the topic has no end")? {
                Ok(record) => records.push(record.detach()),
                Err(KafkaError::PartitionEOF(_)) => open -= 1,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(records)
    }

    /// All messages in a JetStream stream.
    fn stream(&self) -> Result<Vec<jetstream::message::StreamMessage>> {
        Runtime::new()?.block_on(async {
            let jetstream = jetstream::new(async_nats::connect(self.broker.address()).await?);
            let mut stream = jetstream
                .get_stream(format!("order-flow-{}", self.run))
                .await?;
            let state = stream.info().await?.state.clone();
            let mut messages = Vec::new();
            for sequence in state.first_sequence..=state.last_sequence {
                match stream.get_raw_message(sequence).await {
                    Ok(message) => messages.push(message),
                    // Acknowledged, so it has left the stream.
                    Err(error) if error.to_string().contains("no message found") => {}
                    Err(error) => return Err(error.into()),
                }
            }
            ensure!(
                messages.len() as u64 == state.messages,
                "{} of {}",
                messages.len(),
                state.messages
            );
            Ok(messages)
        })
    }

    fn topic(&self, event: &str) -> String {
        format!(
            "persistent://public/default/order-flow-{}-{event}",
            self.run
        )
    }

    /// What a Pulsar subscription has not acknowledged.
    fn backlog(&self, event: &str, subscription: &str) -> Result<i64> {
        let web = self
            .broker
            .web()
            .into_iter()
            .next()
            .context("no admin interface")?;
        let topic = self.topic(event).replace("://", "/");
        let page = format!("{web}/admin/v2/{topic}/stats?getPreciseBacklog=true");
        let (status, text) =
            http_get(&page, TIMEOUT).with_context(|| format!("no answer from {page}"))?;
        ensure!(status == 200, "{page}: {status} {text}");
        let stats: Value = serde_json::from_str(&text)?;
        stats["subscriptions"][subscription]["msgBacklog"]
            .as_i64()
            .with_context(|| format!("{event} has no subscription {subscription}"))
    }
}
