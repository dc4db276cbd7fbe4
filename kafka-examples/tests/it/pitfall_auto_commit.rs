//! The wrong way loses and the broker does not know it; the right way does not lose.

use std::time::Duration;

use anyhow::{Context, Result};
use compose::harness::Example;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::shared;

#[test]
fn auto_commit_loses_silently_and_stored_offsets_do_not() -> Result<()> {
    let kafka = shared::kafka(&["kafka_pitfall_auto_commit"])?;
    // The second time, the topics hold what the first has left.
    for run in 1..=2 {
        let ended = Example::new(env!("CARGO_BIN_EXE_kafka_pitfall_auto_commit"))
            .broker(&kafka)
            .spawn()?
            .wait(Duration::from_secs(90))?
            .ok()?;
        let number = |way: &str, name: &str| -> Result<u32> {
            let mut lines = ended.stdout.lines();
            let line = lines.find(|line| line.starts_with(&format!("{way}: sent 100, ")));
            let mut words = line.context("no result")?.split([' ', ',']);
            words.find(|word| *word == name).context("no number")?;
            Ok(words.next().context("no number")?.parse()?)
        };
        assert!(number("wrong", "lost")? > 0, "{}", ended.stdout);
        assert_eq!(number("wrong", "handled")? + number("wrong", "lost")?, 100);
        assert_eq!(number("right", "lost")?, 0, "{}", ended.stdout);
        assert!(
            number("right", "duplicated")? > 0,
            "the kill hit nothing: {}",
            ended.stdout
        );

        // The broker's view is the same for both: all is done.
        for group in ["pitfall-auto-commit-wrong", "pitfall-auto-commit-right"] {
            let observer: BaseConsumer = ClientConfig::new()
                .set("bootstrap.servers", kafka.address())
                .set("group.id", group)
                .create()?;
            let mut list = TopicPartitionList::new();
            list.add_partition(group, 0);
            let list = observer.committed_offsets(list, Duration::from_secs(30))?;
            assert_eq!(
                list.elements()[0].offset(),
                Offset::Offset(run * 100),
                "{group}"
            );
        }
    }
    Ok(())
}
