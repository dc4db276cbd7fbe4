//! Files that grow, are rotated, and are cut short.

use std::fs::{self, OpenOptions};
use std::io::Write;

use crate::shared::kafka;
use anyhow::Result;

use super::{ALONE, TIMEOUT, await_count, count, find, path, program, store};

#[test]
fn a_file_is_followed_over_rotation_truncation_and_a_kill() -> Result<()> {
    let _shared = ALONE.read();
    let index = "files";
    let kafka = kafka(&[index])?;
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
    let report = following.wait(TIMEOUT)?.ok()?.stdout;
    assert!(report.contains(" 0 duplicate / 0 lost"), "{report}");

    // What is complete is not ingested again, unless that is asked for.
    let ingest = |more: &[&str]| {
        // Under the same name, or the group would wait for the one that has ended.
        let args = [&["ingest", path(&file), "--instance", "one"], more].concat();
        program(&kafka, &store()?.address(), index, &args)
            .spawn()?
            .wait(TIMEOUT)?
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

/// Fields whose names lie below others, or are none: the line is a document all the same.
#[test]
fn whatever_fields_a_json_line_has_it_is_a_document() -> Result<()> {
    let _shared = ALONE.read();
    let index = "fields";
    let kafka = kafka(&[index])?;
    let time = r#""@timestamp":"2026-01-02T03:04:05Z""#;
    let lines = [
        format!(
            r#"{{{time},"log.level":"info","message":"m","service.name":"pay","service.version":"1.2"}}"#
        ),
        format!(
            r#"{{{time},"level":"info","level.code":6,"message.id":1,"http.method":"GET","timestamp.ns":1}}"#
        ),
        format!(
            r#"{{{time},"http":"text","ingested":{{"line":"none"}},"fields":[1,{{"a":"b"}}]}}"#
        ),
        format!(r#"{{{time},"":1,".":2,"a..b":3,"a":{{".":{{}}}}}}"#),
        format!(r#"{{{time},"a":{{"b":1,"b":2}}}}"#),
        format!(r#"{{{time},"service":"\u001b[2J","level":"\u0007info"}}"#),
    ];
    let run = |args: &[&str]| {
        program(&kafka, &store()?.address(), index, args)
            .stdin(lines.join("\n"))
            .spawn()?
            .wait(TIMEOUT)?
            .ok()
    };
    let report = run(&["ingest", "-"])?.stdout;
    let balance = format!("{} stored / 0 dead letters", lines.len());
    assert!(report.contains(&balance), "{report}");
    assert_eq!(count(index)?, lines.len() as u64);
    // The one that has a field twice.
    assert_eq!(find(index, "level:UNPARSED")?.len(), 1);
    let found = find(index, "service:pay AND level:INFO")?;
    assert_eq!(found[0]["_source"]["fields"]["service.version"], "1.2");

    let shown = run(&["search", "*"])?.stdout;
    let obeyed = |c: char| c.is_control() && c != '\n';
    assert!(
        shown.contains("\u{b7}[2J") && !shown.contains(obeyed),
        "{shown:?}"
    );
    Ok(())
}
