//! Key-value, objects, and the lease made of them.

use std::collections::BTreeMap;

use anyhow::Result;
use compose::Broker;
use compose::harness::{Example, Running};

use crate::nats::{TIMEOUT, jetstream, run, server, start, until};

const KV: &str = env!("CARGO_BIN_EXE_nats_kv");
const OBJECTS: &str = env!("CARGO_BIN_EXE_nats_object_store");
const LEADER: &str = env!("CARGO_BIN_EXE_nats_leader_election");

#[tokio::test]
async fn three_buyers_never_sell_more_than_there_is() -> Result<()> {
    let nats = server()?;
    run(KV, &["stock", "300"], &nats)?.ok()?;
    let mut buyers = Vec::new();
    for _ in 0..3 {
        buyers.push(start(KV, &["buy", "150"], &nats)?);
    }
    let (mut bought, mut conflicts) = (0, 0);
    for mut buyer in buyers {
        let said = buyer.wait(TIMEOUT)?.ok()?.stdout;
        let numbers: Vec<u32> = said
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|n| n.parse().ok())
            .collect();
        bought += numbers[0];
        conflicts += numbers[1];
    }
    assert_eq!(bought, 300, "with {conflicts} conflicts");
    let bucket = jetstream(&nats).await?.get_key_value("inventory").await?;
    assert_eq!(bucket.get("pears").await?.as_deref(), Some(&b"0"[..]));
    // Each sale is a revision of its own: one put, and one update for each pear.
    let entry = bucket.entry("pears").await?.unwrap();
    assert_eq!(entry.revision, 301);

    // A value that is no number is an error, and stays what it is.
    bucket.put("pears", "many".into()).await?;
    let ended = run(KV, &["buy", "1"], &nats)?;
    assert_eq!(ended.code(), 1);
    assert!(ended.stderr.contains("is no number"), "{}", ended.stderr);
    assert_eq!(bucket.get("pears").await?.as_deref(), Some(&b"many"[..]));
    Ok(())
}

#[tokio::test]
async fn a_damaged_object_leaves_no_file_and_a_broken_upload_no_object() -> Result<()> {
    let nats = server()?;
    let folder = tempfile::tempdir()?;
    let here = |args: &[&str]| -> Result<Running> {
        Example::new(OBJECTS)
            .args(args)
            .current_dir(folder.path())
            .broker(&nats)
            .spawn()
    };
    let original: Vec<u8> = (0..700_000_u32)
        .flat_map(|number| number.to_le_bytes())
        .collect();
    std::fs::write(folder.path().join("film.bin"), &original)?;
    here(&["put", "film.bin"])?.wait(TIMEOUT)?.ok()?;
    here(&["get", "film.bin", "copy.bin"])?
        .wait(TIMEOUT)?
        .ok()?;
    assert!(
        std::fs::read(folder.path().join("copy.bin"))? == original,
        "the copy differs"
    );
    std::fs::write(folder.path().join("empty.bin"), "")?;
    here(&["put", "empty.bin"])?.wait(TIMEOUT)?.ok()?;
    here(&["get", "empty.bin", "nothing.bin"])?
        .wait(TIMEOUT)?
        .ok()?;
    assert_eq!(std::fs::read(folder.path().join("nothing.bin"))?, b"");

    let stream = jetstream(&nats).await?.get_stream("OBJ_FILES").await?;
    assert!(stream.delete_message(3).await?);
    let damaged = here(&["get", "film.bin", "damaged.bin"])?.wait(TIMEOUT)?;
    assert_eq!(damaged.code(), 1);
    assert!(
        damaged.stderr.contains("nothing is kept"),
        "{}",
        damaged.stderr
    );
    for name in ["damaged.bin", "damaged.bin.part"] {
        assert!(!folder.path().join(name).exists(), "{name}");
    }
    let mut upload = here(&["put", "large.bin", "900000000"])?;
    upload.wait_for("large.bin: 1 MB", TIMEOUT)?;
    upload.kill()?;
    let list = here(&["list"])?.wait(TIMEOUT)?.ok()?;
    assert!(!list.stdout.contains("large.bin"), "{}", list.stdout);
    assert!(
        list.stdout.contains("film.bin: 2800000 bytes"),
        "{}",
        list.stdout
    );
    Ok(())
}

fn candidate(name: &str, nats: &Broker) -> Result<Running> {
    start(LEADER, &[name], nats)
}

/// The counts that each has written: count to token.
fn counts(candidate: &mut Running) -> Vec<(u64, u64)> {
    let written = |line: &String| {
        let (count, token) = line.split_once(": count ")?.1.split_once(", token ")?;
        Some((count.parse().ok()?, token.parse().ok()?))
    };
    candidate.lines().iter().filter_map(written).collect()
}

#[test]
fn one_leads_another_takes_over_and_a_frozen_one_is_fenced() -> Result<()> {
    let nats = server()?;
    let mut anna = candidate("anna", &nats)?;
    anna.wait_for("anna leads", TIMEOUT)?;
    let (mut ben, mut carl) = (candidate("ben", &nats)?, candidate("carl", &nats)?);
    ben.wait_for("ben waits: anna leads", TIMEOUT)?;
    carl.wait_for("carl waits: anna leads", TIMEOUT)?;
    anna.wait_for("count", TIMEOUT)?;

    // Killed: the lease runs out, and exactly one follows.
    anna.kill()?;
    anna.wait(TIMEOUT)?;
    until("another leads", || {
        Ok(!counts(&mut ben).is_empty() || !counts(&mut carl).is_empty())
    })?;
    let (mut leader, mut other) = if counts(&mut ben).is_empty() {
        (carl, ben)
    } else {
        (ben, carl)
    };

    // Frozen past its lease: another leads, and the old leader's next write is refused.
    leader.pause()?;
    other.wait_for(" leads with token", TIMEOUT)?;
    other.wait_for("count", TIMEOUT)?;
    leader.resume()?;
    leader.wait_for("steps down", TIMEOUT)?;
    leader.wait_for("waits: ", TIMEOUT)?;

    let (anna, mut leader, mut other) = (&mut anna, leader, other);
    other.interrupt()?;
    other.wait(TIMEOUT)?.ok()?;
    leader.wait_for(" leads with token", TIMEOUT)?;
    leader.wait_for("count", TIMEOUT)?;
    leader.interrupt()?;
    leader.wait(TIMEOUT)?.ok()?;

    // All that was ever counted: no number twice, and tokens that only rise. So none wrote after its successor.
    let mut all = BTreeMap::new();
    for (count, token) in [counts(anna), counts(&mut leader), counts(&mut other)].concat() {
        assert!(
            all.insert(count, token).is_none(),
            "{count} was counted twice"
        );
    }
    let tokens: Vec<u64> = all.values().copied().collect();
    assert!(tokens.is_sorted(), "{all:?}");
    let distinct: std::collections::BTreeSet<_> = tokens.iter().collect();
    assert!(distinct.len() >= 4, "four terms, or more: {all:?}");
    Ok(())
}
