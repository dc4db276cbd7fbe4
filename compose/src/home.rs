//! The folder in which everything lives that the brokers need: programs, data, logs.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::Service;

/// A per-user folder. Nothing is ever installed outside it.
///
/// It is `LAB_HOME` if that is set, else `messaging-lab` in the platform's cache folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Home {
    root: PathBuf,
}

impl Home {
    /// The folder that the environment names; fails readably if it cannot be written to.
    pub(crate) fn from_env() -> Result<Home> {
        let home = match env::var_os("LAB_HOME").filter(|value| !value.is_empty()) {
            Some(path) => Home::at(path),
            None => match dirs::cache_dir() {
                Some(cache) => Home::at(cache.join("messaging-lab")),
                None => bail!(
                    "this user has no home folder to keep the brokers in: set LAB_HOME to a folder"
                ),
            },
        };
        home.check()?;
        Ok(home)
    }

    /// A home at a given path. A relative path is taken from the current folder, now and not later.
    pub(crate) fn at(path: impl Into<PathBuf>) -> Home {
        let path = path.into();
        Home {
            root: std::path::absolute(&path).unwrap_or(path),
        }
    }

    /// Creates the folder with its sub-folders and tries to write there.
    pub(crate) fn check(&self) -> Result<()> {
        let advice = || {
            format!(
                "cannot write to {}, where the brokers are kept: set LAB_HOME to a folder that you may write to",
                self.root.display()
            )
        };
        for name in ["programs", "data", "run", "logs"] {
            fs::create_dir_all(self.root.join(name)).with_context(advice)?;
        }
        tempfile::tempfile_in(&self.root).with_context(advice)?;
        Ok(())
    }

    /// The folder itself.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Fetched programs, one folder each. May be deleted at any time; it is fetched again.
    ///
    /// Links are resolved: some programs have their own path written into them, and one folder of programs may serve
    /// several homes.
    pub(crate) fn programs(&self) -> PathBuf {
        let folder = self.folder("programs");
        fs::canonicalize(&folder).unwrap_or(folder)
    }

    /// What the brokers store.
    pub(crate) fn data(&self) -> PathBuf {
        self.folder("data")
    }

    /// What is known about the brokers that run now.
    pub(crate) fn run(&self) -> PathBuf {
        self.folder("run")
    }

    /// The output of the brokers and of the tools that fetch them.
    pub(crate) fn logs(&self) -> PathBuf {
        self.folder("logs")
    }

    /// Certificates, keys and passwords of a secured broker.
    pub(crate) fn secure(&self, service: Service) -> PathBuf {
        self.root.join("secure").join(service.name())
    }

    fn folder(&self, name: &str) -> PathBuf {
        let path = self.root.join(name);
        // A failure shows, with this path, at the first file that is written there.
        let _ = fs::create_dir_all(&path);
        path
    }
}
