//! A secured broker lets in whom it should, and tells the others why not.

use std::collections::HashMap;
use std::fs;

use anyhow::{Result, bail};
use compose::harness::but;
use compose::{Broker, Service, User};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};

type Env = HashMap<String, String>;

async fn connect(env: &Env) -> Result<Connection> {
    let read = |name| env.get(name).map(fs::read).transpose();
    let identity = match (read("AMQP_CERT")?, read("AMQP_KEY")?) {
        (Some(pem), Some(key)) => Some(OwnedIdentity::PKCS8 { pem, key }),
        _ => None,
    };
    let config = OwnedTLSConfig {
        identity,
        cert_chain: read("AMQP_CA")?.map(String::from_utf8).transpose()?,
    };
    let runtime = lapin::runtime::default_runtime()?;
    let options = ConnectionProperties::default();
    Ok(Connection::connect_with_config(&env["AMQP_ADDR"], options, config, runtime).await?)
}

async fn channel(env: &Env) -> Result<Channel> {
    Ok(connect(env).await?.create_channel().await?)
}

async fn refusal(env: &Env) -> Result<String> {
    match channel(env).await {
        Err(error) => Ok(format!("{error:#}")),
        Ok(_) => bail!("it let us in"),
    }
}

async fn declare(channel: &Channel, queue: &str, passive: bool) -> lapin::Result<lapin::Queue> {
    let options = QueueDeclareOptions {
        durable: true,
        passive,
        ..Default::default()
    };
    channel
        .queue_declare(queue.into(), options, FieldTable::default())
        .await
}

#[tokio::test]
async fn a_secured_broker_lets_in_whom_it_should_and_tells_the_others_why_not() -> Result<()> {
    let broker = tokio::task::spawn_blocking(|| Broker::secure(Service::RabbitMq)).await??;
    let env: Env = broker.secured_env(User::Application)?.into_iter().collect();
    let administrator: Env = broker
        .secured_env(User::Administrator)?
        .into_iter()
        .collect();
    declare(&channel(&administrator).await?, "orders", false).await?;

    let application = channel(&env).await?;
    application
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let confirm = application
        .basic_publish(
            "".into(),
            "orders".into(),
            BasicPublishOptions {
                mandatory: true,
                ..Default::default()
            },
            b"order-1",
            BasicProperties::default(),
        )
        .await?
        .await?;
    assert!(confirm.is_ack());
    assert_eq!(
        declare(&application, "orders", true).await?.message_count(),
        1
    );
    let text = match declare(&application, "other", false).await {
        Err(error) => error.to_string(),
        Ok(_) => bail!("the application can declare a queue"),
    };
    assert!(text.contains("configure access to queue 'other'"), "{text}");

    let wrong = env["AMQP_ADDR"].replacen("application:", "application:x", 1);
    let text = refusal(&but(&env, "AMQP_ADDR", Some(&wrong))).await?;
    assert!(text.contains("ACCESS_REFUSED"), "{text}");
    let text = refusal(&but(&env, "AMQP_CA", None)).await?;
    assert!(text.contains("UnknownIssuer"), "{text}");
    let text = refusal(&but(&env, "AMQP_CERT", None)).await?;
    // Its reason may come after the broker has closed the connection.
    assert!(text.contains("IO error"), "{text}");

    // Without TLS: the same rights. The user that is known to everybody is gone.
    let plain: Env = broker.env().into_iter().collect();
    let text = match declare(&channel(&plain).await?, "other", false).await {
        Err(error) => error.to_string(),
        Ok(_) => bail!("the application can declare a queue"),
    };
    assert!(text.contains("configure access to queue 'other'"), "{text}");
    let host = plain["AMQP_ADDR"]
        .rsplit_once('@')
        .map_or("", |(_, host)| host);
    let guest = Env::from([("AMQP_ADDR".to_owned(), format!("amqp://guest:guest@{host}"))]);
    let text = refusal(&guest).await?;
    assert!(text.contains("ACCESS_REFUSED"), "{text}");
    Ok(())
}
