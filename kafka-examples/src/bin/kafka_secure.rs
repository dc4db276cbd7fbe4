//! Connect with TLS and a password (SASL/SCRAM), and learn why a connection is refused
//!
//! The broker shows a certificate that the client checks with a CA. The client shows a name and proves that it knows
//! the password, without sending it. The broker's access control list (ACL) says what this user may do.
//!
//! ```console
//! $ cargo lab run kafka_secure secure-orders
//! connected as application
//! written to secure-orders, partition [..] offset 0
//! read back by the group secure-readers
//! $ cargo lab run kafka_secure orders
//! connected as application
//! [exit 1]
//! ```
//!
//! Notice:
//! - This user may create only topics whose names begin with `secure-`. In production, administrators create topics.
//! - The call that fails says little: "Broker transport failure". The reason goes to `ClientContext::error`.
//! - Do not write the password into the code, an argument or a log.
//!
//! Try: another KAFKA_SASL_PASSWORD, another KAFKA_SSL_CA_LOCATION. docs/kafka.md lists the setting for each reason.
//! Settings: KAFKA_BROKERS (localhost:9193), KAFKA_SECURITY_PROTOCOL (SASL_SSL), KAFKA_SASL_MECHANISM (SCRAM-SHA-512),
//! KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD, KAFKA_SSL_CA_LOCATION, as `cargo lab up kafka --secure` prints them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow};
use rdkafka::consumer::{Consumer, ConsumerContext, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, ClientContext, Message};
use tokio::time::timeout;

const GROUP: &str = "secure-readers";
const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init(); // the client logs why it reconnects
    let topic = std::env::args().nth(1).unwrap_or("secure-orders".into());
    let (config, reasons) = (config()?, Reasons::default());
    let tried = try_topic(&config, &topic, &reasons).await;
    let reason = reasons.0.lock().unwrap_or_else(PoisonError::into_inner);
    let tip = "docs/kafka.md lists the setting for each reason";
    tried.map_err(|error| anyhow!("{error:#}\nreason: {reason:?}\n{tip}"))
}

/// The pattern: TLS and a password need only these six lines. rdkafka needs its feature `ssl` for them.
fn config() -> anyhow::Result<ClientConfig> {
    let read = |name: &str| {
        let tip = format!("{name} is not set; `cargo lab up kafka --secure` prints its value");
        std::env::var(name).context(tip)
    };
    let or = |name: &str, default: &str| std::env::var(name).unwrap_or(default.to_owned());
    let protocol = or("KAFKA_SECURITY_PROTOCOL", "SASL_SSL");
    let mechanism = or("KAFKA_SASL_MECHANISM", "SCRAM-SHA-512");
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", or("KAFKA_BROKERS", "localhost:9193"))
        .set("security.protocol", protocol)
        .set("sasl.mechanism", mechanism)
        .set("sasl.username", read("KAFKA_SASL_USERNAME")?)
        .set("sasl.password", read("KAFKA_SASL_PASSWORD")?)
        // Without it, the client trusts the CAs of the system.
        .set("ssl.ca.location", read("KAFKA_SSL_CA_LOCATION")?)
        .set("message.timeout.ms", "10000");
    Ok(config)
}

/// Writes an order and reads it back.
async fn try_topic(config: &ClientConfig, topic: &str, reasons: &Reasons) -> anyhow::Result<()> {
    let producer: FutureProducer<_> = config.create_with_context(reasons.clone())?;
    let metadata = producer.client().fetch_metadata(None, TIMEOUT);
    metadata.context("cannot connect")?;
    let user = config.get("sasl.username").unwrap_or_default();
    println!("connected as {user}");
    let payload = format!("order-{}", fastrand::u32(..));
    let record = FutureRecord::<(), _>::to(topic).payload(&payload);
    let at = producer.send(record, TIMEOUT).await;
    let at = at.map_err(|(error, _)| error).context("cannot write")?;
    let (partition, offset) = (at.partition, at.offset);
    println!("written to {topic}, partition {partition} offset {offset}");

    let consumer: StreamConsumer<_> = config
        .clone()
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        .create_with_context(reasons.clone())?;
    consumer.subscribe(&[topic])?;
    let read = timeout(TIMEOUT, async {
        while consumer.recv().await?.payload() != Some(payload.as_bytes()) {}
        Ok::<_, KafkaError>(())
    });
    read.await
        .context("not read in time")?
        .context("cannot read")?;
    println!("read back by the group {GROUP}");
    Ok(())
}

/// Keeps the reason of the last error.
#[derive(Clone, Default)]
struct Reasons(Arc<Mutex<String>>);

impl ClientContext for Reasons {
    fn error(&self, error: KafkaError, reason: &str) {
        // `AllBrokersDown` follows each failed connection, and has no reason.
        if error.rdkafka_error_code() != Some(RDKafkaErrorCode::AllBrokersDown) {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = reason.to_owned();
        }
    }
}
impl ConsumerContext for Reasons {}
