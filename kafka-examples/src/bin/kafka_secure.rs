//! Connect with TLS and a password (SASL/SCRAM), and learn which line cures which error
//!
//! The broker shows a certificate that the client checks with a CA. The client shows a name and proves that it knows the
//! password, without sending it. What this user may do stands in the broker's access control list (ACL).
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
//! - The second topic does not exist, and this user may create only topics whose names begin with `secure-`. In
//!   production an administrator creates the topics.
//! - The call that fails says little: "Broker transport failure". The reason goes to `ClientContext::error`.
//! - The password comes from the environment. It does not belong into the code, into an argument or into a log.
//!
//! Try: another `KAFKA_SASL_PASSWORD`, another `KAFKA_SSL_CA_LOCATION`, the address of the plain port.
//!
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
    // The client logs why it reconnects. RUST_LOG chooses how much is shown.
    let filter = std::env::var("RUST_LOG").unwrap_or("error,rdkafka::client=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    log.with_writer(std::io::stderr).init();
    let topic = std::env::args().nth(1).unwrap_or("secure-orders".into());
    let config = config()?;
    let reasons = Reasons::default();
    let producer: FutureProducer<_> = config
        .create_with_context(reasons.clone())
        .map_err(explain("cannot make a client", &reasons))?;
    producer
        .client()
        .fetch_metadata(None, TIMEOUT)
        .map_err(explain("cannot connect", &reasons))?;
    println!(
        "connected as {}",
        config.get("sasl.username").unwrap_or_default()
    );

    let payload = format!("order-{}", fastrand::u32(..));
    let record = FutureRecord::<(), _>::to(&topic).payload(&payload);
    let at = producer.send(record, TIMEOUT).await;
    let at = at.map_err(|(error, _)| explain("cannot write", &reasons)(error))?;
    println!(
        "written to {topic}, partition {} offset {}",
        at.partition, at.offset
    );
    read_back(&config, &reasons, &topic, &payload).await?;
    println!("read back by the group {GROUP}");
    Ok(())
}

/// The pattern: these six lines are all that TLS and a password take. rdkafka needs its feature `ssl` for them.
fn config() -> anyhow::Result<ClientConfig> {
    let read = |name: &str| {
        let hint = || {
            format!(
                "{name} is not set; `cargo lab up kafka --secure` prints the command that sets it"
            )
        };
        std::env::var(name).with_context(hint)
    };
    let or = |name: &str, default: &str| std::env::var(name).unwrap_or(default.to_owned());
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", or("KAFKA_BROKERS", "localhost:9193"))
        .set(
            "security.protocol",
            or("KAFKA_SECURITY_PROTOCOL", "SASL_SSL"),
        )
        .set(
            "sasl.mechanism",
            or("KAFKA_SASL_MECHANISM", "SCRAM-SHA-512"),
        )
        .set("sasl.username", read("KAFKA_SASL_USERNAME")?)
        .set("sasl.password", read("KAFKA_SASL_PASSWORD")?)
        // Without it, the CAs that the system trusts are asked.
        .set("ssl.ca.location", read("KAFKA_SSL_CA_LOCATION")?)
        .set("message.timeout.ms", "10000");
    Ok(config)
}

/// Part of an error or of its reason, and the setting to look at.
const CURES: [(&str, &str); 12] = [
    (
        "at build time",
        "rdkafka was built without its feature `ssl` or `ssl-vendored`",
    ),
    (
        "No provider",
        "rdkafka was built without its feature `ssl` or `ssl-vendored`",
    ),
    (
        "certificate verify failed",
        "ssl.ca.location, or the host name in bootstrap.servers: the certificate has another",
    ),
    (
        "ssl.ca.location",
        "ssl.ca.location: no file with certificates",
    ),
    (
        "PLAINTEXT broker",
        "bootstrap.servers: this port is without TLS",
    ),
    (
        "security.protocol",
        "security.protocol: this port is with TLS",
    ),
    ("Unsupported SASL mechanism", "sasl.mechanism"),
    ("SASL authentication error", "sasl.username, sasl.password"),
    (
        "TopicAuthorizationFailed",
        "the ACL: this user may not write, or not create the topic",
    ),
    (
        "GroupAuthorizationFailed",
        "the ACL: this user may not READ in this group",
    ),
    ("Connect to", "bootstrap.servers: nothing listens there"),
    // A port with TLS closes a connection without it, and gives no reason.
    ("", "security.protocol: this port may be with TLS"),
];

/// The call, its error, the reason that the client has told, and the cure.
fn explain(call: &str, reasons: &Reasons) -> impl FnOnce(KafkaError) -> anyhow::Error {
    move |error| {
        let reason = reasons.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = format!("{error} {reason}");
        let cure = CURES.iter().find(|(part, _)| text.contains(part));
        let cure = cure.map_or("", |(_, setting)| setting);
        anyhow!("{call}: {error}\nreason: {reason}\nlook at: {cure}")
    }
}

/// Keeps the reason of the last error.
#[derive(Clone, Default)]
struct Reasons(Arc<Mutex<String>>);

impl ClientContext for Reasons {
    fn error(&self, error: KafkaError, reason: &str) {
        // Follows each failed connection, and says nothing about it.
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            return;
        }
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = reason.to_owned();
    }
}
impl ConsumerContext for Reasons {}

async fn read_back(
    config: &ClientConfig,
    reasons: &Reasons,
    topic: &str,
    payload: &str,
) -> anyhow::Result<()> {
    let consumer: StreamConsumer<_> = config
        .clone()
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        .create_with_context(reasons.clone())?;
    consumer.subscribe(&[topic])?;
    timeout(TIMEOUT, async {
        loop {
            let record = consumer.recv().await?;
            if record.payload() == Some(payload.as_bytes()) {
                return Ok(());
            }
        }
    })
    .await
    .context("not read back in time")?
    .map_err(|error: KafkaError| explain("cannot read", reasons)(error))
}
