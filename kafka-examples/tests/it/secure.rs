//! A secured broker accepts the right clients and tells the others why not: Kafka's own tools, and `kafka_secure`.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use compose::harness::{Example, TIMEOUT, but, kafka_tool};
use compose::{Broker, Service, User};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::message::Message;
use rdkafka::producer::{FutureProducer, FutureRecord};

type Env = HashMap<String, String>;

const TOPICS: &str = "org.apache.kafka.tools.TopicCommand";

/// All that the tool says, and whether it did what it was to do.
fn tool(broker: &Broker, class: &str, env: &Env, args: &[&str]) -> Result<(bool, String)> {
    let output = kafka_tool(broker, class, env)?.args(args).output()?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    Ok((output.status.success(), said))
}

#[tokio::test]
async fn a_secured_broker_lets_in_whom_it_should_and_tells_the_others_why_not() -> Result<()> {
    let broker = Broker::secure(Service::Kafka)?;
    let application: Env = broker.secured_env(User::Application)?.into_iter().collect();
    let administrator: Env = broker
        .secured_env(User::Administrator)?
        .into_iter()
        .collect();
    let create = ["--create", "--topic", "orders", "--partitions", "1"];

    let (_, said) = tool(&broker, TOPICS, &application, &create)?;
    ensure!(said.contains("TopicAuthorizationException"), "{said}");
    let (done, said) = tool(&broker, TOPICS, &administrator, &create)?;
    ensure!(done && said.contains("Created topic orders"), "{said}");
    let (done, said) = tool(&broker, TOPICS, &application, &["--list"])?;
    ensure!(done && said.contains("orders"), "{said}");

    let wrong = but(&application, "KAFKA_SASL_PASSWORD", Some("wrong"));
    let (done, said) = tool(&broker, TOPICS, &wrong, &["--list"])?;
    let reason = "invalid credentials with SASL mechanism SCRAM-SHA-512";
    ensure!(!done && said.contains(reason), "{said}");
    // Of another authority.
    let other = Broker::secure(Service::Nats)?;
    let other: Env = other.secured_env(User::Application)?.into_iter().collect();
    let stranger = but(
        &application,
        "KAFKA_SSL_CA_LOCATION",
        Some(&other["NATS_CA"]),
    );
    let (done, said) = tool(&broker, TOPICS, &stranger, &["--list"])?;
    ensure!(!done && said.contains("SSL handshake failed"), "{said}");

    // Without TLS: the rights of the application, and no more.
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", broker.address())
        .set("group.id", "secure")
        .set("auto.offset.reset", "earliest");
    let admin: AdminClient<DefaultClientContext> = config.create()?;
    let topic = NewTopic::new("other", 1, TopicReplication::Fixed(1));
    let refused = admin.create_topics([&topic], &AdminOptions::new()).await?;
    let code = RDKafkaErrorCode::TopicAuthorizationFailed;
    ensure!(refused == [Err(("other".to_owned(), code))], "{refused:?}");

    let producer: FutureProducer = config.create()?;
    let record = FutureRecord::<(), _>::to("orders").payload("order-1");
    let sent = producer.send(record, TIMEOUT).await;
    ensure!(sent.is_ok(), "{sent:?}");
    let unknown = FutureRecord::<(), _>::to("other").payload("x");
    let refused = producer.send(unknown, TIMEOUT).await;
    let code = refused
        .err()
        .and_then(|(error, _)| error.rdkafka_error_code());
    ensure!(
        code == Some(RDKafkaErrorCode::TopicAuthorizationFailed),
        "{code:?}"
    );
    let consumer: BaseConsumer = config.create()?;
    consumer.subscribe(&["orders"])?;
    let deadline = Instant::now() + TIMEOUT;
    let payload = loop {
        ensure!(Instant::now() < deadline, "no record");
        if let Some(record) = consumer.poll(Duration::from_millis(100)) {
            break record?.payload().map(<[u8]>::to_vec);
        }
    };
    ensure!(payload.as_deref() == Some(b"order-1"), "{payload:?}");
    Ok(())
}

/// Each is wrong in one setting, and `kafka_secure` names it.
#[cfg(feature = "secure")]
#[test]
fn a_wrong_set_up_is_refused_with_its_reason() -> Result<()> {
    let broker = Broker::secure(Service::Kafka)?;
    let right: Env = broker.secured_env(User::Application)?.into_iter().collect();
    let spawn = |env: &Env, topic: &str| {
        let mut example = Example::new(env!("CARGO_BIN_EXE_kafka_secure")).args([topic]);
        for (name, value) in env {
            example = example.env(name, value);
        }
        example.spawn()
    };
    let ended = spawn(&right, "secure-orders")?.wait(TIMEOUT)?.ok()?;
    ensure!(
        ended.stdout.contains("read back by the group"),
        "{}",
        ended.stdout
    );

    // Of another authority.
    let nats = Broker::secure(Service::Nats)?;
    let other: Env = nats.secured_env(User::Application)?.into_iter().collect();
    let other_ca = other["NATS_CA"].as_str();
    let wrong = [
        (
            "KAFKA_SASL_PASSWORD",
            Some("wrong"),
            "SASL authentication error",
        ),
        (
            "KAFKA_SASL_USERNAME",
            Some("stranger"),
            "SASL authentication error",
        ),
        (
            "KAFKA_SASL_USERNAME",
            None,
            "KAFKA_SASL_USERNAME is not set",
        ),
        (
            "KAFKA_SASL_MECHANISM",
            Some("SCRAM-SHA-256"),
            "Unsupported SASL mechanism",
        ),
        (
            "KAFKA_SSL_CA_LOCATION",
            Some(other_ca),
            "certificate verify failed",
        ),
        (
            "KAFKA_SSL_CA_LOCATION",
            Some("/nothing"),
            "ssl.ca.location failed",
        ),
        ("KAFKA_BROKERS", Some("localhost:1"), "Connect to"),
        ("KAFKA_BROKERS", Some(&broker.address()), "PLAINTEXT broker"),
        (
            "KAFKA_SECURITY_PROTOCOL",
            Some("SASL_PLAINTEXT"),
            "BrokerTransportFailure (Local: Broker transport failure)\nreason: \"\"\n",
        ),
    ];
    let mut running = Vec::new();
    for (name, value, reason) in wrong {
        running.push((spawn(&but(&right, name, value), "secure-orders")?, reason));
    }
    running.push((spawn(&right, "other")?, "TopicAuthorizationFailed"));
    for (mut process, reason) in running {
        let ended = process.wait(TIMEOUT)?;
        // The log before it has the reason, too.
        let error = ended.stderr.split_once("Error: ").map(|(_, error)| error);
        ensure!(
            ended.code() == 1 && error.is_some_and(|error| error.contains(reason)),
            "{reason}: {}",
            ended.stderr
        );
        let password = &right["KAFKA_SASL_PASSWORD"];
        ensure!(!ended.stderr.contains(password), "the password is printed");
    }

    let administrator: Env = broker
        .secured_env(User::Administrator)?
        .into_iter()
        .collect();
    let deny = "--add --deny-principal User:application --operation Read --group secure-readers";
    let deny: Vec<&str> = deny.split(' ').collect();
    let acl = "org.apache.kafka.tools.AclCommand";
    let (done, said) = tool(&broker, acl, &administrator, &deny)?;
    ensure!(done, "{said}");
    let ended = spawn(&right, "secure-orders")?.wait(TIMEOUT)?;
    let reason = "GroupAuthorizationFailed";
    ensure!(
        ended.code() == 1 && ended.stderr.contains(reason),
        "{}",
        ended.stderr
    );
    Ok(())
}
