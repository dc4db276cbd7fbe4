//! Steps that can be repeated, and a group in use that is not deleted.

use std::time::Duration;

use anyhow::Result;
use compose::harness::{Example, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};

#[tokio::test]
async fn runs_again_from_any_state_and_respects_a_group_in_use() -> Result<()> {
    let kafka = Broker::private(Service::Kafka)?;
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka.address());
    let admin: AdminClient<DefaultClientContext> = config.create()?;
    let run = || {
        Example::new(env!("CARGO_BIN_EXE_kafka_admin"))
            .broker(&kafka)
            .spawn()?
            .wait(TIMEOUT)
    };
    let topics = || -> Result<Vec<String>> {
        let metadata = admin.inner().fetch_metadata(None, TIMEOUT)?;
        let names = metadata.topics().iter().map(|topic| topic.name());
        Ok(names
            .filter(|name| !name.starts_with("__"))
            .map(str::to_owned)
            .collect())
    };
    let first = run()?.ok()?.stdout;
    assert_eq!(topics()?, Vec::<String>::new(), "nothing is left behind");
    assert_eq!(run()?.ok()?.stdout, first);

    // An earlier run that broke off has left a topic that has grown already.
    let topic = NewTopic::new("admin-demo", 3, TopicReplication::Fixed(1));
    let created = admin.create_topics([&topic], &AdminOptions::new()).await?;
    assert!(created[0].is_ok(), "{created:?}");
    let member: BaseConsumer = config
        .clone()
        .set("group.id", "admin-demo-group")
        .create()?;
    member.subscribe(&["admin-demo"])?;
    let mut polls = 0;
    while member.assignment()?.count() == 0 {
        assert!(polls < 60, "the member was never assigned a partition");
        let _ = member.poll(Duration::from_millis(500));
        polls += 1;
    }
    let refused = run()?;
    assert_eq!(refused.code(), 1, "{}", refused.stdout);
    assert!(
        refused.stdout.contains("create topic: there already\n"),
        "{}",
        refused.stdout
    );
    // Its positions, which are the group's, are not taken from under it.
    assert!(
        refused.stderr.contains("admin-demo-group"),
        "{}",
        refused.stderr
    );
    assert_eq!(topics()?, ["admin-demo"]);

    // What it altered, asked of the broker.
    let about = [ResourceSpecifier::Topic("admin-demo")];
    let described = admin.describe_configs(&about, &AdminOptions::new()).await?;
    let described = described.into_iter().next().unwrap().unwrap();
    let value = described.get("max.message.bytes").unwrap().value.as_deref();
    assert_eq!(value, Some("2000000"));
    drop(member);
    assert!(run()?.ok()?.stdout.ends_with("delete topic: not there\n"));
    assert_eq!(topics()?, Vec::<String>::new());
    Ok(())
}
