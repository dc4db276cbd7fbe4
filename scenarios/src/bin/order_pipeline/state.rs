//! Where the books are: one folder per Kafka cluster.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

pub struct State {
    base: PathBuf,
    given: bool,
}

impl State {
    pub fn new(given: Option<&Path>) -> Result<State> {
        let base = match given {
            Some(folder) => folder.to_owned(),
            None => dirs::data_local_dir()
                .context("this system names no folder for local data: give one with --state")?
                // Named like the prefix of the topics. Up to the first edition there was none, and the folder was
                // `order_pipeline`: those books must not meet topics that are new.
                .join("order-pipeline"),
        };
        Ok(State {
            base,
            given: given.is_some(),
        })
    }

    /// The folder for a cluster. Its id tells, not its address: a broker that was set up anew starts
    /// again at offset 0, and must not meet the books of the one before.
    pub fn folder(&self, brokers: &str, cluster: &str) -> Result<PathBuf> {
        // librdkafka's mock cluster is gone with its process, and so may its books be.
        let folder = match cluster.starts_with("mockCluster") && !self.given {
            true => std::env::temp_dir()
                .join("order_pipeline")
                .join(file_name(cluster)),
            false => self.base.join(file_name(cluster)),
        };
        let create = || {
            fs::create_dir_all(&folder)?;
            fs::create_dir_all(&self.base)?;
            fs::write(self.note(brokers), file_name(cluster))
        };
        create().with_context(|| format!("cannot write to the folder {}", self.base.display()))?;
        Ok(folder)
    }

    /// Whether somebody has worked here with the cluster at this address a moment ago. Then it is
    /// being restarted, rather than absent.
    pub fn used_lately(&self, brokers: &str) -> bool {
        let Ok(cluster) = fs::read_to_string(self.note(brokers)) else {
            return false;
        };
        let books = fs::read_dir(self.base.join(cluster))
            .into_iter()
            .flatten()
            .flatten();
        books
            .filter_map(|file| file.metadata().ok()?.modified().ok()?.elapsed().ok())
            .any(|age| age < Duration::from_secs(600))
    }

    fn note(&self, brokers: &str) -> PathBuf {
        self.base.join(format!("{}.cluster", file_name(brokers)))
    }
}

/// A cluster's id may hold any character, a file's name may not.
fn file_name(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '-' {
                c
            } else {
                '_'
            }
        })
        .collect()
}
