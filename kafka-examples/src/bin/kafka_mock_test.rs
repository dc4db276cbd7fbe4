//! Unit tests without Kafka: a worker is tested on librdkafka's mock cluster
//!
//! The worker copies greetings to another topic, and commits the offset when the copy is confirmed: at least once. The
//! tests start a mock cluster in the test process, and make it return errors that are rare on a real broker. Test the
//! program's reactions on the mock. Test guarantees on a real broker.
//!
//! ```console
//! $ cargo lab run kafka_mock_test
//! copied: HELLO
//! ```
//!
//! Notice:
//! - `request_errors` sets the errors that the next requests of one kind get. The client itself retries some of them.
//! - `create_topic` creates a topic. The admin API of the mock cannot.
//!
//! Try: `cargo test --bin kafka_mock_test`. Remove the line with `seek`, and see a test fail. Settings: none. See also:
//! kafka_manual_commit, kafka_mock_cluster (the same mock as a program).

use std::time::Duration;

use anyhow::{Context, Result};
use rdkafka::consumer::{CommitMode, Consumer, StreamConsumer};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message, Offset};
use tokio::time::timeout;

const INPUT: &str = "mock-greetings";
const OUTPUT: &str = "mock-greetings-loud";
const TIMEOUT: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> Result<()> {
    let cluster = MockCluster::new(3)?;
    // Create the topic before the worker subscribes. Otherwise the consumer returns an error.
    cluster.create_topic(INPUT, 1, 1)?;
    let worker = Worker::new(&cluster.bootstrap_servers())?;
    worker.send(INPUT, "hello").await?;
    println!("copied: {}", worker.copy_one().await?);
    Ok(())
}

struct Worker {
    consumer: StreamConsumer,
    producer: FutureProducer,
}

impl Worker {
    fn new(brokers: &str) -> Result<Worker> {
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

    /// The work: copies the next greeting, and commits its offset when the copy is confirmed. Do not cancel this future, and
    /// end the worker when `seek` fails: otherwise the next call commits a later offset.
    async fn copy_one(&self) -> Result<String> {
        let received = timeout(TIMEOUT, self.consumer.recv()).await;
        let greeting = received.context("no greeting has arrived")??;
        let text = String::from_utf8_lossy(greeting.payload().unwrap_or_default());
        let copy = text.to_uppercase();
        if let Err(error) = self.send(OUTPUT, &copy).await {
            // The next call must not commit a later greeting, so it gets this one again.
            let (partition, offset) = (greeting.partition(), Offset::Offset(greeting.offset()));
            self.consumer.seek(INPUT, partition, offset, TIMEOUT)?;
            return Err(error);
        }
        self.consumer.commit_message(&greeting, CommitMode::Sync)?;
        Ok(copy)
    }

    async fn send(&self, topic: &str, text: &str) -> Result<()> {
        let record = FutureRecord::<(), str>::to(topic).payload(text);
        let sent = self.producer.send(record, TIMEOUT).await;
        Ok(sent.map(drop).map_err(|(error, _)| error)?)
    }
}

/// The pattern: each test has its own cluster, chooses the errors that it returns, and checks what the worker does.
#[cfg(test)]
mod tests {
    use rdkafka::producer::DefaultProducerContext;
    use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};

    use super::*;

    type Cluster = MockCluster<'static, DefaultProducerContext>;
    const TEMPORARY: RDKafkaRespErr = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS;
    const REFUSAL: RDKafkaRespErr = RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;

    #[tokio::test]
    async fn client_retries_a_temporary_error_but_not_a_refusal() {
        let (_cluster, worker) = start(&[TEMPORARY, TEMPORARY, REFUSAL]).await;
        let error = worker.copy_one().await.unwrap_err().to_string();
        assert!(error.contains("TopicAuthorizationFailed"), "{error}");
    }

    #[tokio::test]
    async fn refused_greeting_is_copied_by_the_next_call() {
        let (_cluster, worker) = start(&[REFUSAL]).await;
        let committed = || worker.consumer.committed(TIMEOUT).unwrap().elements()[0].offset();
        worker.copy_one().await.unwrap_err();
        assert_eq!(committed(), Offset::Invalid);
        assert_eq!(worker.copy_one().await.unwrap(), "HELLO");
        assert_eq!(committed(), Offset::Offset(1));
    }

    /// A worker with two greetings. The requests that write the copies get these errors.
    async fn start(errors: &[RDKafkaRespErr]) -> (Cluster, Worker) {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic(INPUT, 1, 1).unwrap();
        let worker = Worker::new(&cluster.bootstrap_servers()).unwrap();
        for greeting in ["hello", "good bye"] {
            worker.send(INPUT, greeting).await.unwrap();
        }
        cluster.request_errors(RDKafkaApiKey::Produce, errors);
        (cluster, worker)
    }
}
