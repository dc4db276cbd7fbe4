//! The bytes of the table are those that the broker has stored, and each topic holds all orders.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Result;
use compose::harness::{Example, TIMEOUT};
use rdkafka::Message;

use crate::reader::read;
use crate::shared;

/// The size of the log of partition 0 of each topic of the example, by the codec, level and batch of the table.
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
            && let Some(name) = name.strip_suffix("-0")
            && path.extension().is_some_and(|extension| extension == "log")
        {
            *sizes.entry(name.to_owned()).or_default() += path.metadata()?.len();
        }
    }
    Ok(())
}

#[test]
fn table_shows_the_stored_bytes_and_no_order_is_changed() -> Result<()> {
    let kafka = shared::kafka(&["kafka_compression"])?;
    let program = Example::new(env!("CARGO_BIN_EXE_kafka_compression"));
    let stdout = program.broker(&kafka).spawn()?.wait(TIMEOUT)?.ok()?.stdout;
    let mut sizes = HashMap::new();
    stored(kafka.folder(), &mut sizes)?;
    let mut bytes = HashMap::new();
    for line in stdout.lines().filter(|line| line.ends_with(" ms")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let name = words[..3].join("-");
        let sent: u64 = words[3].parse()?;
        let on_disk = sizes[&name];
        // On the way there are requests around the batches; on disk, the record that opened the connection.
        let (low, high) = if name == "zstd-3-1" {
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
    assert_eq!(bytes.len(), 8, "{stdout}");
    let bytes_of = |codec: &str| bytes[&format!("{codec}-10000")];
    for codec in ["lz4--1", "snappy--1", "gzip-6", "zstd-3"] {
        assert!(2 * bytes_of(codec) < bytes_of("none--1"), "{bytes:?}");
    }
    assert!(bytes_of("lz4-12") < bytes_of("lz4--1"), "{bytes:?}");
    assert!(bytes_of("zstd-12") < bytes_of("zstd-3"), "{bytes:?}");
    assert!(bytes["zstd-3-1"] > 4 * bytes_of("zstd-3"), "{bytes:?}");

    let payloads = |name: &String| -> Result<Vec<_>> {
        let topic = format!("compression-{name}");
        let records = read(&kafka, &topic, "read_committed")?;
        Ok(records
            .iter()
            .map(|record| record.payload().map(<[u8]>::to_vec))
            .collect())
    };
    let plain = payloads(&"none--1-10000".to_owned())?;
    assert_eq!(
        plain.len(),
        1 + 5000,
        "the record that connects, and the orders"
    );
    for name in bytes.keys() {
        assert!(payloads(name)? == plain, "{name}: the orders are changed");
    }
    Ok(())
}
