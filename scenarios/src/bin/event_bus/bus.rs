//! The NATS side: how events travel on core NATS, and on JetStream.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use async_nats::jetstream;
use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy};
use async_nats::jetstream::context::CreateStreamErrorKind;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::{self, Stream};
use async_nats::{Client, ConnectOptions, Event as Connection};

use crate::event::{ALL, Event};
use crate::shutdown::Stop;

/// Everything that was published, for a week: a service that is new, or was away, reads it from here.
pub const STREAM: &str = "EVENT_BUS";
const WEEK: Duration = Duration::from_secs(7 * 24 * 3600);

/// What a service could not handle, with the reason.
pub const DEAD_STREAM: &str = "EVENT_BUS_DEAD";
pub const DEAD: &str = "event-bus.dead-letters";

/// Within this time the stream drops a second copy of an event that its publisher has sent again. After it, the
/// marks of the services still do.
const DUPLICATES: Duration = Duration::from_secs(120);

#[derive(Clone)]
pub struct Bus {
    pub client: Client,
    pub jetstream: jetstream::Context,
}

impl Bus {
    pub async fn connect(wait: Duration, stop: &Stop) -> Result<Bus> {
        let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
        let deadline = tokio::time::Instant::now() + wait;
        let client = loop {
            let options = ConnectOptions::new()
                .name("event_bus")
                .connection_timeout(Duration::from_secs(3))
                .event_callback(|event| async move {
                    match event {
                        Connection::SlowConsumer(_) => tracing::warn!(
                            "NATS: events come faster than they are handled, and some were dropped"
                        ),
                        Connection::Disconnected => {
                            tracing::warn!("NATS: connection lost, trying until it is back");
                        }
                        Connection::Connected => tracing::debug!("NATS: connected"),
                        other => tracing::debug!("NATS: {other}"),
                    }
                });
            match options.connect(&url).await {
                Ok(client) => break client,
                Err(error) => {
                    if tokio::time::Instant::now() >= deadline
                        || stop.within(Duration::from_millis(200)).await
                    {
                        return Err(error).with_context(|| {
                            format!(
                                "cannot connect to NATS at {url}. Start one with `cargo lab up nats`, or set NATS_URL"
                            )
                        });
                    }
                }
            }
        };
        let mut jetstream = jetstream::new(client.clone());
        jetstream.set_timeout(Duration::from_secs(5));
        Ok(Bus { client, jetstream })
    }

    /// The streams, made unless they are there.
    pub async fn streams(&self) -> Result<Stream> {
        for config in [
            stream::Config {
                name: STREAM.to_owned(),
                subjects: vec![ALL.to_owned()],
                max_age: WEEK,
                duplicate_window: DUPLICATES,
                ..Default::default()
            },
            stream::Config {
                name: DEAD_STREAM.to_owned(),
                subjects: vec![format!("{DEAD}.>")],
                // A service may be killed between the dead letter and the end of the event, and start much later.
                duplicate_window: WEEK,
                ..Default::default()
            },
        ] {
            let name = config.name.clone();
            if let Err(error) = self.jetstream.get_or_create_stream(config).await {
                if let CreateStreamErrorKind::JetStream(reason) = error.kind() {
                    bail!("cannot make the stream {name}: {reason}");
                }
                return Err(error).with_context(|| format!("cannot make the stream {name}"));
            }
        }
        Ok(self.jetstream.get_stream(STREAM).await?)
    }

    /// Which stream of this name it is: one that was deleted and made again is another one.
    pub async fn stream(&self) -> Result<String> {
        let created = self.streams().await?.cached_info().created;
        Ok(created.unix_timestamp_nanos().to_string())
    }

    /// The durable consumer of a service. All instances of the service use the same one, and share its events.
    pub async fn consumer(
        &self,
        service: &str,
        subject: &str,
        ack_wait: Duration,
    ) -> Result<jetstream::consumer::Consumer<pull::Config>> {
        let stream = self.streams().await?;
        let config = pull::Config {
            durable_name: Some(service.to_owned()),
            filter_subject: subject.to_owned(),
            // A service that is new begins with the oldest event that is kept.
            deliver_policy: DeliverPolicy::All,
            ack_policy: AckPolicy::Explicit,
            ack_wait,
            // Without limit. The server would drop the event after the last try; a service dead-letters it.
            max_deliver: -1,
            ..Default::default()
        };
        Ok(stream.create_consumer(config).await?)
    }

    /// Publishes until the stream has it: sent again under the same id, it is stored once.
    pub async fn publish_durably(&self, event: &Event, stop: &Stop) -> Result<bool> {
        let payload = serde_json::to_vec(event.user())?;
        loop {
            let message = PublishMessage::build()
                .payload(payload.clone().into())
                .message_id(event.id());
            let subject = event.subject();
            let sent = self.jetstream.send_publish(subject, message).await;
            // The first await has handed it to the client; only the second one says that the stream has it.
            let stored = match sent {
                Ok(sent) => sent.await.map(drop),
                Err(error) => Err(error),
            };
            match stored {
                Ok(()) => return Ok(true),
                Err(error) => tracing::debug!("publish: {error}, again"),
            }
            if stop.within(Duration::from_millis(500)).await {
                return Ok(false);
            }
        }
    }

    /// Hands it to the server, which hands it to whoever listens at this moment.
    pub async fn publish(&self, event: &Event) -> Result<()> {
        let payload = serde_json::to_vec(event.user())?;
        self.client.publish(event.subject(), payload.into()).await?;
        Ok(())
    }

    /// What was published is in the client's buffer until this returns, and would be lost with the process.
    pub async fn flush(&self) -> Result<()> {
        let flushed = tokio::time::timeout(Duration::from_secs(5), self.client.flush());
        flushed.await.context("the connection to NATS is lost")??;
        Ok(())
    }

    /// How many dead letters there are.
    pub async fn dead_letters(&self) -> Result<u64> {
        let stream = self.jetstream.get_stream(DEAD_STREAM).await?;
        Ok(stream.cached_info().state.messages)
    }
}
