//! One broker for all tests that leave it alone, with a virtual host for each; and what they look at it with.

use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use compose::harness::{Example, Finished, Proxy, Running};
use compose::{Broker, Service};
use futures::StreamExt;
use lapin::message::{BasicGetMessage, Delivery};
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions,
    ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};

pub use compose::harness::TIMEOUT;

/// Where an example is to find RabbitMQ, and a test's own look at it.
pub struct Place {
    pub address: String,
    pub management: String,
    connection: Connection,
    pub channel: Channel,
}

/// The supervisor ends it with this process: nothing is dropped in a static.
fn broker() -> Result<&'static Broker> {
    static BROKER: OnceLock<Result<Broker, String>> = OnceLock::new();
    let broker = BROKER
        .get_or_init(|| Broker::private(Service::RabbitMq).map_err(|error| format!("{error:#}")));
    broker
        .as_ref()
        .map_err(|reason| anyhow::anyhow!("{reason}"))
}

fn management(broker: &Broker) -> Result<String> {
    broker
        .web()
        .into_iter()
        .next()
        .context("no management address")
}

/// Has the broker write down what it has declared so far.
///
/// It does so a moment late: a queue that is killed with its broker right after its declaration is gone, with all that was
/// confirmed in it. An orderly stop writes everything. That the queue's name is in a file of the broker is not enough.
pub fn settle(broker: &Broker) -> Result<()> {
    broker.restart(1)
}

/// An empty virtual host of the broker that all tests share.
pub async fn vhost() -> Result<Place> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!("test-{}", COUNT.fetch_add(1, Ordering::Relaxed));
    let broker = tokio::task::spawn_blocking(broker).await??;
    vhost_of(broker, &name).await
}

/// A new virtual host of a broker.
pub async fn vhost_of(broker: &Broker, name: &str) -> Result<Place> {
    let management = management(broker)?;
    let client = reqwest::Client::builder().timeout(TIMEOUT).build()?;
    let permissions = r#"{"configure":".*","write":".*","read":".*"}"#;
    for (path, body) in [
        (format!("/api/vhosts/{name}"), "{}"),
        (format!("/api/permissions/{name}/guest"), permissions),
    ] {
        let request = client.put(format!("{management}{path}"));
        let request = request
            .header("content-type", "application/json")
            .body(body);
        let answer = request.basic_auth("guest", Some("guest")).send().await?;
        ensure!(answer.status().is_success(), "{path}: {}", answer.status());
    }
    let address = broker.address();
    let address = address
        .strip_suffix("%2f")
        .context("no virtual host in the address")?;
    Place::at(format!("{address}{name}"), management).await
}

impl Place {
    async fn at(address: String, management: String) -> Result<Place> {
        let properties = ConnectionProperties::default();
        let connection = Connection::connect(&address, properties).await?;
        let channel = connection.create_channel().await?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        Ok(Place {
            address,
            management,
            connection,
            channel,
        })
    }

    /// The same with the address of a proxy for the examples. The place itself looks at the broker directly.
    pub async fn behind(broker: &Broker, proxy: &Proxy) -> Result<Place> {
        Ok(Place {
            address: proxy.address().to_owned(),
            ..Place::of(broker).await?
        })
    }

    /// A second connection to the same.
    pub async fn again(place: &Place) -> Result<Place> {
        Place::at(place.address.clone(), place.management.clone()).await
    }

    /// The default virtual host of a broker of the test's own.
    pub async fn of(broker: &Broker) -> Result<Place> {
        Place::at(broker.address(), management(broker)?).await
    }

    pub fn example(&self, program: &str) -> Example {
        self.told(Example::new(program))
    }

    /// A program that is told where this place is.
    pub fn told(&self, example: Example) -> Example {
        let example = example.env("AMQP_ADDR", &self.address);
        example.env("RABBITMQ_MANAGEMENT_URL", &self.management)
    }

    pub fn run(&self, program: &str, args: &[&str]) -> Result<Finished> {
        self.example(program).args(args).spawn()?.wait(TIMEOUT)
    }

    pub fn start(&self, program: &str, args: &[&str], ready: &str) -> Result<Running> {
        let mut running = self.example(program).args(args).spawn()?;
        running.wait_for(ready, TIMEOUT)?;
        Ok(running)
    }

    /// A durable queue without arguments.
    pub async fn declare(&self, queue: &str) -> Result<()> {
        let durable = QueueDeclareOptions::durable();
        self.channel
            .queue_declare(queue.into(), durable, FieldTable::default())
            .await?;
        Ok(())
    }

    /// Into the queue of that name, confirmed.
    pub async fn publish(&self, queue: &str, body: &[u8]) -> Result<()> {
        self.publish_with(queue, body, BasicProperties::default())
            .await
    }

    pub async fn publish_with(
        &self,
        queue: &str,
        body: &[u8],
        properties: BasicProperties,
    ) -> Result<()> {
        let options = BasicPublishOptions {
            mandatory: true,
            ..BasicPublishOptions::default()
        };
        let properties = properties.with_delivery_mode(2);
        let publish =
            self.channel
                .basic_publish("".into(), queue.into(), options, body, properties);
        match publish.await?.await? {
            Confirmation::Ack(None) => Ok(()),
            other => bail!("{queue}: {other:?}"),
        }
    }

    /// Messages that are ready, which excludes those that a consumer holds, and the number of consumers.
    pub async fn state(&self, queue: &str) -> Result<(u32, u32)> {
        let options = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let queue = self
            .channel
            .queue_declare(queue.into(), options, FieldTable::default())
            .await?;
        Ok((queue.message_count(), queue.consumer_count()))
    }

    /// The broker needs a moment to notice a dead connection and to write its counts: asks until it says `expected`.
    pub async fn becomes(&self, queue: &str, expected: (u32, u32)) -> Result<()> {
        self.becomes_such(queue, &format!("{expected:?}"), |state| state == expected)
            .await
    }

    /// Asks on channels of their own: the question for a queue that is not there closes the channel.
    pub async fn exists(&self, queue: &str) -> Result<()> {
        let options = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let asking = async {
            loop {
                let channel = self.connection.create_channel().await?;
                let answer = channel
                    .queue_declare(queue.into(), options, FieldTable::default())
                    .await;
                if answer.is_ok() {
                    return anyhow::Ok(());
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(TIMEOUT, asking)
            .await
            .with_context(|| format!("no queue {queue}"))?
    }

    pub async fn becomes_such(
        &self,
        queue: &str,
        what: &str,
        mut is: impl FnMut((u32, u32)) -> bool,
    ) -> Result<()> {
        let asking = async {
            while !is(self.state(queue).await?) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            anyhow::Ok(())
        };
        match tokio::time::timeout(TIMEOUT, asking).await {
            Ok(done) => done,
            Err(_) => bail!("{queue}: {:?}, not {what}", self.state(queue).await?),
        }
    }

    /// Takes the first message for good.
    pub async fn take(&self, queue: &str) -> Result<Option<BasicGetMessage>> {
        let message = self
            .channel
            .basic_get(queue.into(), BasicGetOptions::default())
            .await?;
        if let Some(message) = &message {
            message.ack(BasicAckOptions::default()).await?;
        }
        Ok(message)
    }

    /// Takes messages for good until all of `expected` have come: the bodies of all that came.
    pub async fn take_until(
        &self,
        queue: &str,
        expected: &BTreeSet<String>,
    ) -> Result<Vec<String>> {
        let options = BasicConsumeOptions {
            no_ack: true,
            ..BasicConsumeOptions::default()
        };
        let mut deliveries = self
            .channel
            .basic_consume(queue.into(), "".into(), options, FieldTable::default())
            .await?;
        let (mut missing, mut bodies) = (expected.clone(), Vec::new());
        while !missing.is_empty() {
            let next = tokio::time::timeout(TIMEOUT, deliveries.next()).await;
            let next = next.with_context(|| format!("{queue}: {missing:?} do not come"))?;
            let body = String::from_utf8_lossy(&next.context("cancelled")??.data).into_owned();
            missing.remove(&body);
            bodies.push(body);
        }
        Ok(bodies)
    }

    /// The bodies of all that is ready, taken for good.
    pub async fn drain(&self, queue: &str) -> Result<Vec<String>> {
        let messages = self.drain_messages(queue).await?.into_iter();
        Ok(messages
            .map(|message| String::from_utf8_lossy(&message.data).into_owned())
            .collect())
    }

    /// All that is ready, taken for good: as many as the broker counts, until it counts none.
    ///
    /// Not one by one, each with a question and an ack of its own: that takes a minute for what a test sends in ten seconds.
    pub async fn drain_messages(&self, queue: &str) -> Result<Vec<Delivery>> {
        let mut messages = Vec::new();
        loop {
            let (ready, _) = self.state(queue).await?;
            if ready == 0 {
                return Ok(messages);
            }
            let options = BasicConsumeOptions {
                no_ack: true,
                ..BasicConsumeOptions::default()
            };
            let mut deliveries = self
                .channel
                .basic_consume(queue.into(), "".into(), options, FieldTable::default())
                .await?;
            for _ in 0..ready {
                let next = tokio::time::timeout(TIMEOUT, deliveries.next()).await;
                let next = next.with_context(|| format!("{queue} had {ready} messages"))?;
                messages.push(next.context("cancelled")??);
            }
            let cancel = BasicCancelOptions::default();
            self.channel.basic_cancel(deliveries.tag(), cancel).await?;
            // What came between the count and the cancel is taken, too.
            while let Some(message) = deliveries.next().await {
                messages.push(message?);
            }
        }
    }
}
