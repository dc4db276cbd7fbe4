//! Programs that are published as jars: Maven works out which, fetches them and checks their sums.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt::{self, Packages};
use super::install::{self, Recipe, Work};
use super::{Advice, java, tool};
use crate::home::Home;

/// Pinned, because the version that Maven picks by itself depends on Maven's own version.
const PLUGIN: &str = "org.apache.maven.plugins:maven-dependency-plugin:3.9.0";

pub(crate) const ADVICE: Advice = Advice {
    program: "Maven",
    debian: "maven",
    fedora: "maven",
    brew: "maven",
};

/// A folder of jars.
pub(crate) struct Jars {
    name: &'static str,
    content: Content,
}

enum Content {
    /// A pom that has the version, and depends on all the jars.
    Pom(&'static str),
    /// `group:artifact:version:type:classifier` of an archive that has them all.
    Archive(&'static str),
}

impl Jars {
    pub(crate) const fn of_pom(name: &'static str, pom: &'static str) -> Jars {
        let content = Content::Pom(pom);
        Jars { name, content }
    }

    pub(crate) const fn of_archive(name: &'static str, coordinates: &'static str) -> Jars {
        let content = Content::Archive(coordinates);
        Jars { name, content }
    }

    pub(crate) fn version(&self) -> String {
        let version = match self.content {
            Content::Pom(pom) => {
                let after = pom.split_once("<version>").map_or("", |(_, after)| after);
                after.split('<').next()
            }
            Content::Archive(coordinates) => coordinates.split(':').nth(2),
        };
        version.unwrap_or_default().to_owned()
    }

    fn recipe(&self) -> Recipe {
        let (Content::Pom(content) | Content::Archive(content)) = self.content;
        Recipe {
            id: format!("{}-{}", self.name, self.version()),
            label: format!("{} {}", self.name, self.version()),
            by: "by Maven",
            inputs: format!("{PLUGIN}\n{content}"),
        }
    }

    pub(crate) fn installed(&self, home: &Home) -> Option<PathBuf> {
        install::installed(home, &self.recipe())
    }

    pub(crate) fn install(&self, home: &Home) -> Result<PathBuf> {
        if let Some(dir) = self.installed(home) {
            return Ok(dir);
        }
        let recipe = self.recipe();
        // Fetched under locks and progress lines of their own, hence before this one's.
        let java = java::find_or_fetch(home)
            .with_context(|| format!("{} runs on Java, which is not here", recipe.label))?;
        let maven = find_or_fetch(home)
            .with_context(|| format!("{} comes by Maven, which is not here", recipe.label))?;
        install::install(home, &recipe, |work| self.fetch(work, &java, &maven))
    }

    fn fetch(&self, work: &mut Work, java: &java::Java, maven: &Path) -> Result<()> {
        let option = |name: &str, value: &Path| {
            let mut option = OsString::from(format!("-D{name}="));
            option.push(value);
            option
        };
        let mut command = Command::new(maven);
        command
            .args(["-B", "--strict-checksums", "-Dstyle.color=never"])
            // A repository of its own, so that nothing half-fetched elsewhere gets in, and nothing is left behind.
            .arg(option("maven.repo.local", &work.partial.join("repository")))
            .arg(option("outputDirectory", &work.new))
            .current_dir(&work.partial)
            .env("JAVA_HOME", &java.home);
        match self.content {
            Content::Pom(pom) => {
                let path = work.partial.join("pom.xml");
                fs::write(&path, pom)
                    .with_context(|| format!("cannot write {}", path.display()))?;
                command.arg("-f").arg(&path);
                command.arg(format!("{PLUGIN}:copy-dependencies"));
            }
            Content::Archive(coordinates) => {
                command.arg(format!("-Dartifact={}", coordinates.trim()));
                command.arg(format!("{PLUGIN}:unpack"));
            }
        }
        work.progress.show("asking what it needs");
        let progress = work.progress;
        let (mut files, mut bytes) = (0_u32, 0.0);
        tool::run("Maven", &command, work.log, |line| {
            if let Some(size) = downloaded(line) {
                files += 1;
                bytes += size;
                progress.show(format!("{files} files, {:.1} MB", bytes / 1e6));
            } else if line.contains("Copying ") {
                progress.show("copying");
            }
        })?;
        Ok(())
    }
}

/// The size in a line like `Downloaded from central: … (54 kB at 1.2 MB/s)`.
fn downloaded(line: &str) -> Option<f64> {
    if !line.contains("Downloaded from ") {
        return None;
    }
    let (_, tail) = line.rsplit_once('(')?;
    let mut words = tail.split_whitespace();
    let number: f64 = words.next()?.parse().ok()?;
    let unit = match words.next()? {
        "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        _ => 1.0,
    };
    Some(number * unit)
}

/// Maven on PATH, else Debian's, unpacked into the cache.
fn find_or_fetch(home: &Home) -> Result<PathBuf> {
    if let Some(maven) = tool::which("mvn") {
        return Ok(maven);
    }
    if !apt::available() {
        bail!("{ADVICE}");
    }
    let root = package().install(home)?;
    Ok(root.join("usr/share/maven/bin/mvn"))
}

/// Maven is jars alone, so its packages need nothing of the system but Java.
pub(crate) fn package() -> Packages {
    Packages {
        name: "maven",
        label: "Maven",
        suite: None,
        candidates: &["maven"],
        keep: |package, _| {
            package == "maven" || (package.starts_with("lib") && package.ends_with("-java"))
        },
        finish: |_, _| Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::downloaded;

    #[test]
    fn sizes_are_read_from_mavens_lines() {
        let line = "[INFO] Downloaded from central: scheme:/x/a(b).jar (1.5 MB at 3.0 MB/s)";
        assert_eq!(downloaded(line), Some(1.5e6));
        assert_eq!(
            downloaded("Downloaded from m: x.pom (512 B at 1 B/s)"),
            Some(512.0)
        );
        assert_eq!(downloaded("Downloading from central: x.jar"), None);
    }
}
