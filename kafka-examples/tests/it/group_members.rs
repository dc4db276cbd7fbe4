//! Members of groups, and what a broker refuses them.

use anyhow::Result;
use compose::harness::{Example, Running, TIMEOUT};
use compose::{Broker, Service};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminOptions, NewPartitions};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{FutureProducer, FutureRecord};

use crate::administrator::{admin, create_topic, tool};
use crate::shared;

/// Each example, its topic, which is its group, too, and what it prints when it has worked on a record.
const MEMBERS: [(&str, &str, &str); 4] = [
    (
        env!("CARGO_BIN_EXE_kafka_parallel_consumer"),
        "parallel-orders",
        " 10 done",
    ),
    (
        env!("CARGO_BIN_EXE_kafka_parallel_rebalance"),
        "handover-orders",
        " 10 done",
    ),
    (
        env!("CARGO_BIN_EXE_kafka_rebalance"),
        "rebalance-orders",
        "offset 0: done",
    ),
    (
        env!("CARGO_BIN_EXE_kafka_tuned_consumer"),
        "tuned-jobs",
        "offset 0: 10 ms of work done",
    ),
];

fn example(kafka: &Broker, program: &str) -> Result<Running> {
    Example::new(program).broker(kafka).spawn()
}

#[tokio::test]
async fn without_permission_to_create_a_member_works_and_without_the_group_it_ends() -> Result<()> {
    let kafka = Broker::secure(Service::Kafka)?;
    for (_, topic, _) in MEMBERS {
        let create = ["--create", "--topic", topic, "--partitions", "5"];
        tool(&kafka, "TopicCommand", &create)?;
    }
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    for (program, topic, line) in MEMBERS {
        // In the last partition, of more than the broker's default of three.
        let record = FutureRecord::to(topic)
            .partition(4)
            .key("job")
            .payload("10");
        let sent = producer.send(record, TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
        let mut member = example(&kafka, program)?;
        member.wait_for(line, TIMEOUT)?;
        member.terminate()?;
        member.wait(TIMEOUT)?.ok()?;
    }

    let refuse = [
        "--remove",
        "--force",
        "--allow-principal",
        "User:ANONYMOUS",
        "--operation",
        "Read",
        "--operation",
        "Describe",
        "--group",
        "*",
    ];
    let running: Vec<_> = MEMBERS
        .iter()
        .map(|(program, ..)| example(&kafka, program))
        .collect::<Result<_>>()?;
    tool(&kafka, "AclCommand", &refuse)?;
    for (mut member, (program, ..)) in running.into_iter().zip(MEMBERS) {
        // The ones that run learn of it from the next answer, the ones that start at once.
        ended_with(&mut member, "GroupAuthorizationFailed")?;
        ended_with(&mut example(&kafka, program)?, "GroupAuthorizationFailed")?;
    }
    Ok(())
}

/// The client asks for the partitions again only from time to time: by default, every five minutes.
#[tokio::test]
async fn a_partition_that_is_added_is_read_soon() -> Result<()> {
    let mut names = MEMBERS.map(|(program, ..)| program.rsplit('/').next().unwrap());
    names.sort_unstable();
    let kafka = shared::kafka(&names)?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .create()?;
    let admin = admin(&kafka)?;
    let options = AdminOptions::new().operation_timeout(Some(TIMEOUT));
    let mut members = Vec::new();
    for (program, topic, line) in MEMBERS {
        create_topic(&kafka, topic, 3, &[]).await?;
        let mut member = example(&kafka, program)?;
        let record = FutureRecord::to(topic).partition(0).key("job");
        let sent = producer.send(record.payload("10"), TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
        member.wait_for(line, TIMEOUT)?;
        members.push(member);
    }
    for (_, topic, _) in MEMBERS {
        let more = NewPartitions::new(topic, 4);
        let grown = admin.create_partitions([&more], &options).await?;
        assert!(grown.iter().all(Result::is_ok), "{grown:?}");
        // The broker may not know the partition yet.
        let producer: FutureProducer = ClientConfig::new()
            .set("bootstrap.servers", kafka.address())
            .create()?;
        let record = FutureRecord::to(topic).partition(3).key("job");
        let sent = producer.send(record.payload("10"), TIMEOUT).await;
        sent.map_err(|(error, _)| error)?;
    }
    for (mut member, (_, _, line)) in members.into_iter().zip(MEMBERS) {
        member.wait_for(line, TIMEOUT)?;
        member.terminate()?;
        member.wait(TIMEOUT)?.ok()?;
    }
    Ok(())
}

fn ended_with(member: &mut Running, reason: &str) -> Result<()> {
    let ended = member.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}{}", ended.stdout, ended.stderr);
    let last = ended.stderr.trim_end().lines().last().unwrap_or_default();
    assert!(last.contains(reason), "{}", ended.stderr);
    Ok(())
}

#[test]
fn a_member_ends_when_the_others_have_another_assignor() -> Result<()> {
    let kafka = shared::kafka(&["kafka_parallel_consumer", "kafka_parallel_rebalance"])?;
    for (program, topic, _) in &MEMBERS[..2] {
        let other: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", kafka.address())
            .set("group.id", *topic)
            .set("allow.auto.create.topics", "true")
            .set("partition.assignment.strategy", "cooperative-sticky")
            .create()?;
        // Creates the topic.
        other.fetch_metadata(Some(topic), TIMEOUT)?;
        other.subscribe(&[topic])?;
        let mut member = None;
        let started = std::time::Instant::now();
        while started.elapsed() < TIMEOUT {
            if let Some(Err(error)) = other.poll(std::time::Duration::from_millis(100)) {
                println!("the other member: {error}");
            }
            if member.is_none() && other.assignment()?.count() > 0 {
                member = Some(example(&kafka, program)?);
            }
            if let Some(member) = &mut member
                && member.try_wait()?.is_some()
            {
                break;
            }
        }
        let mut member = member.ok_or_else(|| anyhow::anyhow!("no partition"))?;
        ended_with(&mut member, "InconsistentGroupProtocol")?;
    }
    Ok(())
}
