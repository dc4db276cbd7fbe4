//! The mock cluster as a program: what its header says about topics, and how it ends.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::harness::{Example, TIMEOUT};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::message::Message;
use rdkafka::producer::{FutureProducer, FutureRecord};

#[tokio::test]
async fn producer_and_consumer_create_topics_and_the_admin_api_does_not() -> Result<()> {
    let mut mock = Example::new(env!("CARGO_BIN_EXE_kafka_mock_cluster")).spawn()?;
    let line = mock.wait_for("KAFKA_BROKERS=", TIMEOUT)?;
    let address = line.strip_prefix("KAFKA_BROKERS=").context("no address")?;
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", address)
        .set("group.id", "mock")
        .set("auto.offset.reset", "earliest");

    let admin: AdminClient<DefaultClientContext> = config.create()?;
    let topic = NewTopic::new("by-admin", 1, TopicReplication::Fixed(1));
    let options = AdminOptions::new().request_timeout(Some(Duration::from_secs(5)));
    let created = admin.create_topics([&topic], &options).await;
    ensure!(created.is_err(), "{created:?}");

    // A consumer creates a topic only with this setting.
    for (create, topic) in [("false", "missing"), ("true", "by-consumer")] {
        let mut config = config.clone();
        let consumer: BaseConsumer = config.set("allow.auto.create.topics", create).create()?;
        let metadata = consumer.fetch_metadata(Some(topic), TIMEOUT)?;
        let error = metadata.topics()[0].error().map(RDKafkaErrorCode::from);
        let missing = Some(RDKafkaErrorCode::UnknownTopicOrPartition);
        assert_eq!(error == missing, create == "false", "{topic}: {error:?}");
    }

    let producer: FutureProducer = config.create()?;
    let record = FutureRecord::<(), _>::to("by-producer").payload("order-1");
    let sent = producer.send(record, TIMEOUT).await;
    sent.map_err(|(error, _)| error)?;
    let consumer: BaseConsumer = config.create()?;
    consumer.subscribe(&["by-producer"])?;
    let deadline = Instant::now() + TIMEOUT;
    let payload = loop {
        ensure!(Instant::now() < deadline, "no record");
        if let Some(record) = consumer.poll(Duration::from_millis(100)) {
            break record?.payload().map(<[u8]>::to_vec);
        }
    };
    assert_eq!(payload.as_deref(), Some(&b"order-1"[..]));
    mock.terminate()?;
    mock.wait(TIMEOUT)?.ok()?;
    Ok(())
}
