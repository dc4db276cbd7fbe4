//! The bytes of the table are those that the broker has stored.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result};
use compose::harness::{Example, TIMEOUT};

use crate::shared;

/// What lies in the log of partition 0 of each topic of the example, by the name in the table.
fn stored(folder: &Path, sizes: &mut HashMap<String, u64>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            stored(&path, sizes)?;
            continue;
        }
        let partition = path.parent().and_then(Path::file_name);
        let partition = partition.unwrap_or_default().to_string_lossy();
        if let Some(name) = partition.strip_prefix("compression-")
            && path.extension().is_some_and(|extension| extension == "log")
        {
            let name = name.trim_end_matches("-0").replace('-', " ");
            *sizes.entry(name).or_default() += path.metadata()?.len();
        }
    }
    Ok(())
}

#[test]
fn the_table_tells_what_is_stored() -> Result<()> {
    let kafka = shared::kafka(&["kafka_compression"])?;
    let run = || {
        Example::new(env!("CARGO_BIN_EXE_kafka_compression"))
            .broker(&kafka)
            .spawn()?
            .wait(TIMEOUT)?
            .ok()
    };
    let stdout = run()?.stdout;
    let mut sizes = HashMap::new();
    stored(kafka.folder(), &mut sizes)?;
    let mut bytes = HashMap::new();
    for line in stdout.lines().filter(|line| line.ends_with(" ms")) {
        let name = line[..12].trim().replace(", ", " ");
        let sent: u64 = line[12..]
            .split_whitespace()
            .next()
            .context("no bytes")?
            .parse()?;
        let on_disk = sizes[&name];
        // On the way there are requests around the batches; on disk, the record that opened the connection.
        let (low, high) = if name == "zstd alone" {
            (60, 101)
        } else {
            (97, 101)
        };
        let per_cent = on_disk * 100 / sent;
        assert!(
            (low..=high).contains(&per_cent),
            "{name}: sent {sent}, stored {on_disk}"
        );
        bytes.insert(name, on_disk);
    }
    assert_eq!(bytes.len(), 11, "{stdout}");
    for codec in ["lz4", "snappy", "gzip 1", "zstd 1"] {
        assert!(2 * bytes[codec] < bytes["none"], "{codec}: {bytes:?}");
    }
    assert!(
        bytes["lz4 12"] < bytes["lz4"] && bytes["gzip 9"] < bytes["gzip 1"],
        "{bytes:?}"
    );
    assert!(bytes["zstd alone"] > 4 * bytes["zstd 3"], "{bytes:?}");
    Ok(())
}
