//! Reading takes nothing away, and starts where it is told to.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;

use crate::shared::{Place, TIMEOUT, vhost};

const PROGRAM: &str = env!("CARGO_BIN_EXE_rabbitmq_stream");

fn read(place: &Place, start: &str, until: &str) -> Result<Vec<String>> {
    let mut reader = place.start(PROGRAM, &[start], "reading from")?;
    reader.wait_for(until, TIMEOUT)?;
    reader.interrupt()?;
    let ended = reader.wait(TIMEOUT)?.ok()?;
    let lines = ended
        .stdout
        .lines()
        .filter(|line| line.starts_with("offset "));
    Ok(lines.map(String::from).collect())
}

#[tokio::test]
async fn each_start_reads_what_it_says_again_and_again() -> Result<()> {
    let place = vhost().await?;
    for event in ["a", "b", "c"] {
        place.run(PROGRAM, &["send", event])?.ok()?;
    }
    let all = ["offset 0: a", "offset 1: b", "offset 2: c"];
    for start in ["first", "0", "@0", "first"] {
        assert_eq!(read(&place, start, "offset 2")?, all, "{start}");
    }
    assert_eq!(read(&place, "1", "offset 2")?, all[1..]);
    // The last chunk: each was confirmed before the next one was sent, so each has a chunk of its own.
    assert_eq!(read(&place, "last", "offset 2")?, all[2..]);
    let mut next = place.start(PROGRAM, &["next"], "reading from")?;
    place.run(PROGRAM, &["send", "d"])?.ok()?;
    next.wait_for("offset 3: d", TIMEOUT)?;
    next.interrupt()?;
    let ended = next.wait(TIMEOUT)?.ok()?;
    assert!(!ended.stdout.contains("offset 2"), "{}", ended.stdout);
    assert!(ended.stdout.ends_with("stopped; go on from 4\n"));
    // A time is in whole seconds: one that begins behind those, and before the next.
    let now = || SystemTime::now().duration_since(UNIX_EPOCH);
    let start = now()?.as_secs() + 1;
    while now()?.as_secs() < start {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    place.run(PROGRAM, &["send", "e"])?.ok()?;
    let later = read(&place, &format!("@{start}"), "offset 4")?;
    assert_eq!(later, ["offset 4: e"]);
    Ok(())
}

#[tokio::test]
async fn a_reader_that_was_killed_goes_on_from_the_offset_that_it_knows() -> Result<()> {
    let place = vhost().await?;
    let events: Vec<String> = (0..500).map(|number| format!("event-{number}")).collect();
    let mut args = vec!["send"];
    args.extend(events.iter().map(String::as_str));
    place.run(PROGRAM, &args)?.ok()?;
    let mut killed = place.start(PROGRAM, &["first"], "reading from")?;
    killed.wait_for("offset 250: ", TIMEOUT)?;
    killed.kill()?;
    let rest = read(&place, "251", "offset 499")?;
    assert_eq!(rest.len(), 249);
    assert_eq!(rest[0], "offset 251: event-251");
    Ok(())
}

#[tokio::test]
async fn nonsense_is_refused() -> Result<()> {
    let place = vhost().await?;
    for args in [
        ["-1"].as_slice(),
        &["@x"],
        &["middle"],
        &["send"],
        &["1", "2"],
    ] {
        let refused = place.run(PROGRAM, args)?;
        assert_eq!(
            (refused.code(), refused.stdout.as_str()),
            (1, ""),
            "{args:?}"
        );
    }
    Ok(())
}
