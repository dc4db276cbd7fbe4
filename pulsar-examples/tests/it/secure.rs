//! A secured broker lets in whom it should, and tells the others why not.

use std::collections::HashMap;
use std::fs;

use anyhow::{Result, bail};
use compose::harness::but;
use compose::{Broker, Service, User};

use pulsar::{Authentication, Pulsar, TokioExecutor};
use reqwest::Method;

use crate::support::{Client, send, topic};

type Env = HashMap<String, String>;

async fn connect(env: &Env) -> Result<Client> {
    let mut builder = Pulsar::builder(&env["PULSAR_ADDRESS"], TokioExecutor);
    if let Some(token) = env.get("PULSAR_TOKEN") {
        builder = builder.with_auth(Authentication {
            name: "token".to_owned(),
            data: token.clone().into_bytes(),
        });
    }
    if let Some(ca) = env.get("PULSAR_CA") {
        builder = builder.with_certificate_chain(fs::read(ca)?);
    }
    Ok(builder.build().await?)
}

async fn refusal(env: &Env, topic: &str) -> Result<String> {
    let sent = async { send(&connect(env).await?, topic, &["x"]).await };
    match sent.await {
        Err(error) => Ok(format!("{error:#}")),
        Ok(_) => bail!("it let us in"),
    }
}

/// The status with which the admin interface answers.
async fn admin(env: &Env, method: Method, path: &str) -> Result<u16> {
    let mut client = reqwest::Client::builder();
    if let Some(ca) = env.get("PULSAR_CA") {
        client = client.add_root_certificate(reqwest::Certificate::from_pem(&fs::read(ca)?)?);
    }
    let url = format!("{}/admin/v2/{path}", env["PULSAR_ADMIN_URL"]);
    let mut request = client.build()?.request(method, url);
    if let Some(token) = env.get("PULSAR_TOKEN") {
        // Without the second header a wrong token counts as none.
        request = request
            .bearer_auth(token)
            .header("X-Pulsar-Auth-Method-Name", "token");
    }
    Ok(request.send().await?.status().as_u16())
}

#[tokio::test]
async fn a_secured_broker_lets_in_whom_it_should_and_tells_the_others_why_not() -> Result<()> {
    let broker = tokio::task::spawn_blocking(|| Broker::secure(Service::Pulsar)).await??;
    let env: Env = broker.secured_env(User::Application)?.into_iter().collect();
    let administrator: Env = broker
        .secured_env(User::Administrator)?
        .into_iter()
        .collect();
    let plain: Env = broker.env().into_iter().collect();
    let topic = topic("secure");
    let made = admin(&administrator, Method::PUT, "namespaces/public/other").await?;
    assert_eq!(made, 204);
    // Without TLS: the rights of the application, and no more.
    for env in [&env, &plain] {
        send(&connect(env).await?, &topic, &["order-1"]).await?;
        let text = refusal(env, "persistent://public/other/x").await?;
        assert!(text.contains("AuthorizationError"), "{text}");
    }
    assert_eq!(admin(&administrator, Method::GET, "tenants").await?, 200);
    assert_eq!(admin(&env, Method::GET, "tenants").await?, 401);
    assert_eq!(admin(&plain, Method::GET, "tenants").await?, 401);

    // It says no more than that: the reason is in what it logs.
    const REFUSED: &str = "fatal error when connecting to the Pulsar server";
    let token = &env["PULSAR_TOKEN"];
    let (head, _) = token.rsplit_once('.').unwrap_or_default();
    let forged = format!("{head}.{}", "A".repeat(43));
    let wrong = but(&env, "PULSAR_TOKEN", Some(&forged));
    let text = refusal(&wrong, &topic).await?;
    assert!(text.contains(REFUSED), "{text}");
    assert_eq!(
        admin(&wrong, Method::GET, "persistent/public/default").await?,
        401
    );
    let text = refusal(&but(&env, "PULSAR_CA", None), &topic).await?;
    assert!(text.contains(REFUSED), "{text}");
    Ok(())
}
