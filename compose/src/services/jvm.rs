//! What the services that run on the JVM have in common.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::setup::write;
use super::{Node, NodePorts, Program, Setup};
use crate::fetch::maven::{self, Jars};
use crate::fetch::{self, Part, Source, java};
use crate::home::Home;

/// A Java, and the folder with the jars that it runs.
pub(super) struct Jvm {
    java: PathBuf,
    jars: PathBuf,
    version: String,
    archive: Option<ClassArchive>,
}

impl Jvm {
    pub(super) fn fetch(home: &Home, jars: &Jars) -> Result<Jvm> {
        Ok(Jvm {
            java: java::find_or_fetch(home)?.program,
            jars: jars.install(home)?,
            version: jars.version(),
            archive: None,
        })
    }

    /// Has the first node write a [`ClassArchive`], first into this folder, if there is none yet.
    pub(super) fn archiving(mut self, folder: &Path) -> Jvm {
        let kept = self.archive_path();
        let written = folder.join("classes.jsa");
        self.archive = (!kept.exists()).then_some(ClassArchive { written, kept });
        self
    }

    /// A command that goes on with the name of a class. The class path is a list of what is in the folder of the jars.
    ///
    /// It starts fast and stays small, rather than being at its best after minutes.
    pub(super) fn command(
        &self,
        folder: &Path,
        class_path: &[&str],
        options: &[&str],
    ) -> Result<Command> {
        let logging = folder.join("log4j2.properties");
        write(&logging, include_str!("../../log4j2.properties"))?;
        // The native libraries of the jars are unpacked there, 10 MB at each start, and a JVM that is killed leaves them.
        let scratch = folder.join("tmp");
        if scratch.exists() {
            fs::remove_dir_all(&scratch)
                .with_context(|| format!("cannot empty {}", scratch.display()))?;
        }
        fs::create_dir(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
        let mut command = Command::new(&self.java);
        command
            .args(["-XX:TieredStopAtLevel=1", "-XX:+ExitOnOutOfMemoryError"])
            // Its figures would be files as well, outside of that folder.
            .arg("-XX:-UsePerfData")
            .arg(format!("-Djava.io.tmpdir={}", scratch.display()))
            .args(options);
        let archive = self.archive_path();
        if archive.exists() {
            command.arg(format!("-XX:SharedArchiveFile={}", archive.display()));
        }
        // An archive that this JVM cannot use is passed over.
        command.args(["-Xlog:cds=off", "-Xlog:cds+dynamic=off"]);
        command.arg(format!("-Dlog4j2.configurationFile={}", logging.display()));
        // Pulsar and OpenSearch reach into the JDK.
        for package in [
            "java.lang",
            "java.nio",
            "jdk.internal.misc",
            "jdk.internal.platform",
            "sun.net",
            "java.util.zip",
        ] {
            command
                .arg("--add-opens")
                .arg(format!("java.base/{package}=ALL-UNNAMED"));
        }
        let class_path: Vec<OsString> = class_path
            .iter()
            .map(|entry| self.jars.join(entry).into_os_string())
            .collect();
        command.arg("-cp").arg(class_path.join(":".as_ref()));
        Ok(command)
    }

    /// To go before the name of the class that is the broker.
    pub(super) fn archive_option(&self, node: &NodePorts) -> Option<String> {
        let archive = self.archive.as_ref().filter(|_| node.number == 1)?;
        let written = archive.written.display();
        Some(format!("-XX:ArchiveClassesAtExit={written}"))
    }

    /// These nodes, which run on it.
    pub(super) fn set_up(self, nodes: Vec<Node>) -> Setup {
        Setup {
            archive: self.archive,
            ..Setup::of(nodes, Some(self.version))
        }
    }

    /// Beside the folder of the jars, one for each Java.
    fn archive_path(&self) -> PathBuf {
        // The end of a path tells more than its start, and a name may not be as long as a path.
        let java = self.java.to_string_lossy();
        let java: Vec<char> = java.chars().rev().take(100).collect();
        let java: String = java.into_iter().rev().collect();
        let java = java.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let mut path = self.jars.as_os_str().to_owned();
        path.push(format!("-java{java}.jsa"));
        path.into()
    }
}

/// Jars, and the Java that runs them.
impl Program for Jars {
    fn version(&self) -> String {
        Jars::version(self)
    }

    fn parts(&self, home: &Home) -> Vec<Part> {
        let java = match java::find() {
            Ok(java) => Source::Machine(java.program),
            Err(_) => java::package().source(home, java::ADVICE),
        };
        let mut parts = vec![Part::new("Java", java)];
        match self.installed(home) {
            Some(dir) => parts.push(Part::new("jars", Source::Cache(dir))),
            None => {
                let maven = match fetch::which("mvn") {
                    Some(maven) => Source::Machine(maven),
                    None => maven::package().source(home, maven::ADVICE),
                };
                parts.push(Part::new("Maven", maven));
                parts.push(Part::new("jars", Source::Maven));
            }
        }
        parts
    }

    fn fetch(&self, home: &Home) -> Result<()> {
        Jvm::fetch(home, self).map(drop)
    }
}

/// The classes of a broker as its JVM has them in memory once they are read and checked (class data sharing). Half of
/// the time that a broker takes to start is spent on that.
///
/// A JVM writes it at an orderly end. It knows for which JVM and which jars it was made, and is not used with others.
#[derive(Debug)]
pub(crate) struct ClassArchive {
    written: PathBuf,
    kept: PathBuf,
}

impl ClassArchive {
    /// Puts what was written into its place, all at once: others may be starting with it. Without it they start slowly,
    /// so a failure is none.
    pub(crate) fn keep(&self) {
        if let Some(folder) = self.kept.parent()
            && let Ok(new) = tempfile::NamedTempFile::new_in(folder)
            && fs::copy(&self.written, new.path()).is_ok()
        {
            let _ = new.persist(&self.kept);
        }
        let _ = fs::remove_file(&self.written);
    }
}
