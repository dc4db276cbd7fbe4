//! Files that grow, are rotated, and are cut short.

use std::fs::{self, OpenOptions};
use std::io::Write;

use anyhow::Result;
use compose::{Broker, Service};

use super::{ALONE, MINUTE, await_count, find, path, program, store};

#[test]
fn a_file_is_followed_over_rotation_truncation_and_a_kill() -> Result<()> {
    let _shared = ALONE.read();
    let kafka = Broker::private(Service::Kafka)?;
    let index = "files";
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("app.log");
    let append = |text: &str| -> Result<()> {
        let mut file = OpenOptions::new().create(true).append(true).open(&file)?;
        Ok(file.write_all(text.as_bytes())?)
    };
    let follow = || {
        program(
            &kafka,
            &store()?.address(),
            index,
            &["ingest", path(&file), "--follow", "--instance", "one"],
        )
        .spawn()
    };
    append("one\ntwo\nthr")?;
    let mut following = follow()?;
    await_count(index, 2)?;
    append("ee\n")?;
    await_count(index, 3)?;

    // Rotated: the old file is read to its end, and a line without end is one.
    append("four")?;
    fs::rename(&file, folder.path().join("app.log.1"))?;
    fs::write(&file, "five\n")?;
    await_count(index, 5)?;

    // Cut short in place, and grown again beyond where it was.
    fs::write(&file, "six is longer than five was\n")?;
    await_count(index, 6)?;

    // Rotated while nobody looks, after something was added.
    following.kill()?;
    append("seven\n")?;
    fs::rename(&file, folder.path().join("app.log.2"))?;
    fs::write(&file, "eight\n")?;
    let mut following = follow()?;
    await_count(index, 8)?;
    following.terminate()?;
    let report = following.wait(MINUTE)?.ok()?.stdout;
    assert!(report.contains(" 0 duplicate / 0 lost"), "{report}");

    // What is complete is not ingested again, unless that is asked for.
    let ingest = |more: &[&str]| {
        // Under the same name, or the group would wait for the one that has ended.
        let args = [&["ingest", path(&file), "--instance", "one"], more].concat();
        program(&kafka, &store()?.address(), index, &args)
            .spawn()?
            .wait(MINUTE)?
            .ok()
    };
    let nothing = ingest(&[])?.stdout;
    assert!(
        nothing.contains("0 lost") && nothing.contains("8 acked"),
        "{nothing}"
    );
    append("nine")?;
    ingest(&[])?;
    await_count(index, 9)?;
    ingest(&["--anew"])?;
    await_count(index, 11)?;

    let mut messages: Vec<String> = find(index, "level:UNPARSED")?
        .iter()
        .map(|hit| {
            hit["_source"]["message"]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        })
        .collect();
    messages.sort();
    let mut expected = vec![
        "one",
        "two",
        "three",
        "four",
        "five",
        "six is longer than five was",
        "seven",
        "eight",
        "eight",
        "nine",
        "nine",
    ];
    expected.sort_unstable();
    assert_eq!(messages, expected);
    Ok(())
}
