//! A secured server lets in whom it should, and tells the others why not.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Result, bail};
use async_nats::jetstream;
use async_nats::{Client, ConnectErrorKind, ConnectOptions, Event};
use compose::harness::but;
use compose::{Broker, Service, User};
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::nats::{TIMEOUT, round_trip, run, start, stop};

const PUBLISH: &str = env!("CARGO_BIN_EXE_nats_publish");
const SUBSCRIBE: &str = env!("CARGO_BIN_EXE_nats_subscribe");

type Env = HashMap<String, String>;

/// A client that comes in by these variables, and what the server tells it.
async fn connect(
    env: &Env,
) -> Result<(Client, mpsc::UnboundedReceiver<String>), async_nats::ConnectError> {
    let (events, told) = mpsc::unbounded_channel();
    let mut options = ConnectOptions::new().event_callback(move |event| {
        let events = events.clone();
        async move {
            if let Event::ServerError(error) = event {
                let _ = events.send(error.to_string());
            }
        }
    });
    if let (Some(user), Some(password)) = (env.get("NATS_USER"), env.get("NATS_PASSWORD")) {
        options = options.user_and_password(user.clone(), password.clone());
    }
    if let Some(ca) = env.get("NATS_CA") {
        options = options.add_root_certificates(ca.into());
    }
    Ok((options.connect(&env["NATS_URL"]).await?, told))
}

async fn refusal(env: &Env) -> Result<(ConnectErrorKind, String)> {
    match connect(env).await {
        Err(error) => Ok((error.kind(), format!("{:#}", anyhow::Error::from(error)))),
        Ok(_) => bail!("it let us in"),
    }
}

async fn told(from: &mut mpsc::UnboundedReceiver<String>) -> Result<String> {
    Ok(timeout(TIMEOUT, from.recv()).await?.unwrap_or_default())
}

#[tokio::test]
async fn a_secured_server_lets_in_whom_it_should_and_tells_the_others_why_not() -> Result<()> {
    let nats = Broker::secure(Service::Nats)?;
    let env: Env = nats.secured_env(User::Application)?.into_iter().collect();
    let administrator: Env = nats.secured_env(User::Administrator)?.into_iter().collect();

    let (client, _) = connect(&administrator).await?;
    let stream = jetstream::stream::Config {
        name: "ORDERS".into(),
        subjects: vec!["orders.*".into()],
        ..Default::default()
    };
    let mut stream = jetstream::new(client).create_stream(stream).await?;

    let (client, mut events) = connect(&env).await?;
    let mut jetstream = jetstream::new(client.clone());
    jetstream
        .publish("orders.created", "order-1".into())
        .await?
        .await?;
    assert_eq!(stream.info().await?.state.messages, 1);

    // What a user is not allowed to do, the server refuses beside the answer that the client waits for.
    client.publish("other", "x".into()).await?;
    assert_eq!(
        told(&mut events).await?,
        "nats: Permissions Violation for Publish to \"other\""
    );
    let _unwanted = client.subscribe("other").await?;
    assert_eq!(
        told(&mut events).await?,
        "nats: Permissions Violation for Subscription to \"other\""
    );
    // No answer ever comes.
    jetstream.set_timeout(Duration::from_millis(200));
    assert!(jetstream.delete_stream("ORDERS").await.is_err());
    assert_eq!(
        told(&mut events).await?,
        "nats: Permissions Violation for Publish to \"$JS.API.STREAM.DELETE.ORDERS\""
    );
    assert_eq!(
        stream.info().await?.state.messages,
        1,
        "nothing else has come in"
    );

    let (kind, text) = refusal(&but(&env, "NATS_PASSWORD", Some("wrong"))).await?;
    assert_eq!(kind, ConnectErrorKind::AuthorizationViolation, "{text}");
    let (_, text) = refusal(&but(&env, "NATS_CA", None)).await?;
    assert!(text.contains("UnknownIssuer"), "{text}");
    Ok(())
}

/// No TLS, no password: the application's rights, and no more.
#[tokio::test]
async fn the_listener_without_tls_gives_the_rights_of_the_application_and_no_more() -> Result<()> {
    let nats = Broker::secure(Service::Nats)?;
    let mut subscriber = start(SUBSCRIBE, &["events.>"], &nats)?;
    subscriber.wait_for("listening on", TIMEOUT)?;
    run(PUBLISH, &[], &nats)?.ok()?;
    subscriber.wait_for("events.user.updated", TIMEOUT)?;
    stop(subscriber)?;

    let env: Env = nats.env().into_iter().collect();
    let (client, mut events) = connect(&env).await?;
    let mut spy = client.subscribe(">").await?;
    assert_eq!(
        told(&mut events).await?,
        "nats: Permissions Violation for Subscription to \">\""
    );
    client.publish("orders.created", "order-2".into()).await?;
    round_trip(&client).await;
    spy.unsubscribe().await?;
    assert!(spy.next().await.is_none(), "it hears nothing");
    Ok(())
}
