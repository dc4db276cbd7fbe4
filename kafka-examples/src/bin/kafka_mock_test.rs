//! Unit tests without Kafka: a worker is tested on librdkafka's mock cluster
//!
//! The worker copies greetings to another topic and commits a greeting when its copy is confirmed: at least once. Its tests
//! start a mock cluster in the test process, and let it answer with errors that a real broker gives rarely. The mock
//! guarantees nothing about a real broker: use it for the program's reactions, and a real broker for its guarantees.
//! (kafka_mock_cluster is the same mock as a program of its own, for examples that connect to a broker.)
//!
//! ```console
//! $ cargo lab run kafka_mock_test
//! the mock cluster refuses the first copy with NotEnoughReplicas
//! copied: HELLO
//! copied: GOOD BYE
//! ```
//!
//! Notice:
//! - `request_errors` gives the errors for the next requests of one kind. The client handles some of them by itself.
//! - `create_topic` creates a topic. A producer does so at its first record, the admin API cannot.
//! - Aborted transactions stay visible, and nothing is stored on disk.
//!
//! Try: `cargo test --bin kafka_mock_test`. Commit before the copy is confirmed, and see a test fail.
//!
//! Settings: RUST_LOG. See also: kafka_mock_cluster, kafka_manual_commit.

use std::time::Duration;

use anyhow::Context;
use rdkafka::ClientConfig;
use rdkafka::consumer::{CommitMode, Consumer, StreamConsumer};
use rdkafka::message::Message;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use tokio::time::timeout;

const INPUT: &str = "mock-greetings";
const OUTPUT: &str = "mock-greetings-loud";
const TIMEOUT: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let cluster = MockCluster::new(3)?;
    // Before the worker subscribes: a topic that does not exist is an error for a consumer.
    cluster.create_topic(INPUT, 1, 1)?;
    let worker = Worker::new(&cluster.bootstrap_servers())?;
    for greeting in ["hello", "good bye"] {
        worker.send(INPUT, greeting).await?;
    }
    println!("the mock cluster refuses the first copy with NotEnoughReplicas");
    let error = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS;
    cluster.request_errors(RDKafkaApiKey::Produce, &[error]);
    for _ in 0..2 {
        println!("copied: {}", worker.copy_one().await?);
    }
    Ok(())
}

struct Worker {
    consumer: StreamConsumer,
    producer: FutureProducer,
}

impl Worker {
    fn new(brokers: &str) -> anyhow::Result<Worker> {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", brokers);
        let producer = config.clone().set("enable.idempotence", "true").create()?;
        let consumer: StreamConsumer = config
            .set("group.id", "mock-greeter")
            .set("enable.auto.commit", "false")
            .set("auto.offset.reset", "earliest")
            .create()?;
        consumer.subscribe(&[INPUT])?;
        Ok(Worker { consumer, producer })
    }

    /// The work: copies the next greeting, and commits it when the copy is confirmed.
    async fn copy_one(&self) -> anyhow::Result<String> {
        let received = timeout(TIMEOUT, self.consumer.recv()).await;
        let greeting = received.context("no greeting has arrived")??;
        let text = String::from_utf8_lossy(greeting.payload().unwrap_or_default());
        let copy = text.to_uppercase();
        self.send(OUTPUT, &copy).await?;
        self.consumer.commit_message(&greeting, CommitMode::Sync)?;
        Ok(copy)
    }

    async fn send(&self, topic: &str, text: &str) -> anyhow::Result<()> {
        let record = FutureRecord::<(), str>::to(topic).payload(text);
        let sent = self.producer.send(record, TIMEOUT).await;
        sent.map_err(|(error, _)| error)
            .with_context(|| format!("{text} is not written to {topic}"))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::error::{KafkaError, RDKafkaErrorCode};
    use rdkafka::{ClientContext, Offset};

    use super::*;

    async fn worker_with_a_greeting<C: ClientContext>(cluster: &MockCluster<'_, C>) -> Worker {
        for topic in [INPUT, OUTPUT] {
            cluster.create_topic(topic, 1, 1).unwrap();
        }
        let worker = Worker::new(&cluster.bootstrap_servers()).unwrap();
        worker.send(INPUT, "hello").await.unwrap();
        worker
    }

    /// `None` when the group has committed nothing.
    fn committed(worker: &Worker) -> Option<Offset> {
        let offsets = worker.consumer.committed(TIMEOUT).unwrap();
        let mut offsets = offsets.elements().into_iter().map(|at| at.offset());
        offsets.find(|offset| *offset != Offset::Invalid)
    }

    fn copies(worker: &Worker) -> i64 {
        let (_, end) = worker
            .consumer
            .fetch_watermarks(OUTPUT, 0, TIMEOUT)
            .unwrap();
        end
    }

    #[tokio::test]
    async fn greeting_is_copied_and_committed() {
        let cluster = MockCluster::new(1).unwrap();
        let worker = worker_with_a_greeting(&cluster).await;
        assert_eq!(worker.copy_one().await.unwrap(), "HELLO");
        assert_eq!(copies(&worker), 1);
        assert_eq!(committed(&worker), Some(Offset::Offset(1)));
    }

    #[tokio::test]
    async fn temporary_error_is_retried_by_the_client() {
        let cluster = MockCluster::new(1).unwrap();
        let worker = worker_with_a_greeting(&cluster).await;
        let error = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS;
        cluster.request_errors(RDKafkaApiKey::Produce, &[error; 3]);
        assert_eq!(worker.copy_one().await.unwrap(), "HELLO");
        assert_eq!(copies(&worker), 1);
    }

    #[tokio::test]
    async fn refused_copy_is_not_committed() {
        let cluster = MockCluster::new(1).unwrap();
        let worker = worker_with_a_greeting(&cluster).await;
        let error = RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
        cluster.request_errors(RDKafkaApiKey::Produce, &[error]);
        let error = worker.copy_one().await.unwrap_err();
        let code = RDKafkaErrorCode::TopicAuthorizationFailed;
        let refused = KafkaError::MessageProduction(code);
        assert_eq!(error.downcast_ref(), Some(&refused));
        assert_eq!(committed(&worker), None);
    }
}
