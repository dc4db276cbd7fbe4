//! Programs that are published as jars: Maven works out which, fetches them and checks their sums.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::install::{self, Recipe, Work};
use super::{debian, java, missing, tool};
use crate::home::Home;

/// Pinned, because the version that Maven picks by itself depends on Maven's own version.
const PLUGIN: &str = "org.apache.maven.plugins:maven-dependency-plugin:3.9.0:copy-dependencies";

pub(super) struct Jars<'a> {
    pub(super) id: String,
    pub(super) label: String,
    inputs: String,
    pom: &'a str,
}

impl<'a> Jars<'a> {
    pub(super) fn new(name: &str, version: &str, pom: &'a str) -> Jars<'a> {
        Jars {
            id: format!("{name}-{version}"),
            label: format!("{name} {version}"),
            inputs: format!("{PLUGIN}\n{pom}"),
            pom,
        }
    }

    fn recipe(&self) -> Recipe<'_> {
        Recipe {
            id: &self.id,
            label: &self.label,
            by: "Maven",
            inputs: &self.inputs,
        }
    }

    pub(super) fn installed(&self, home: &Home) -> Option<PathBuf> {
        install::installed(home, &self.recipe())
    }

    pub(super) fn install(&self, home: &Home) -> Result<PathBuf> {
        if let Some(dir) = self.installed(home) {
            return Ok(dir);
        }
        // Fetched under locks and progress lines of their own, hence before this one's.
        let java = java::find_or_fetch(home)
            .with_context(|| format!("{} runs on Java, which is not here", self.label))?;
        let maven = find_or_fetch(home)
            .with_context(|| format!("{} comes by Maven, which is not here", self.label))?;
        install::install(home, &self.recipe(), |work| {
            copy_dependencies(work, &java, &maven, self.pom)
        })
    }
}

fn copy_dependencies(
    work: &mut Work,
    java: &java::Java,
    maven: &std::path::Path,
    pom: &str,
) -> Result<()> {
    let pom_path = work.partial.join("pom.xml");
    fs::write(&pom_path, pom).with_context(|| format!("cannot write {}", pom_path.display()))?;
    let option = |name: &str, value: &std::path::Path| {
        let mut option = std::ffi::OsString::from(format!("-D{name}="));
        option.push(value);
        option
    };
    let mut command = Command::new(maven);
    command
        .args(["-B", "--strict-checksums", "-Dstyle.color=never", "-f"])
        .arg(&pom_path)
        // A repository of its own, so that nothing half-fetched elsewhere gets in, and nothing is left behind.
        .arg(option("maven.repo.local", &work.partial.join("repository")))
        .arg(option("outputDirectory", &work.new))
        .arg(PLUGIN)
        .current_dir(&work.partial)
        .env("JAVA_HOME", &java.home);

    work.progress.show("asking what it needs");
    let progress = work.progress;
    let (mut files, mut bytes) = (0_u32, 0.0);
    tool::run("Maven", &mut command, work.log, |line| {
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
pub(super) fn find_or_fetch(home: &Home) -> Result<PathBuf> {
    if let Some(maven) = tool::which("mvn") {
        return Ok(maven);
    }
    if !debian::available() {
        bail!("{}", missing("Maven"));
    }
    let root = package().install(home)?;
    Ok(root.join("usr/share/maven/bin/mvn"))
}

/// Maven is jars alone, so its packages need nothing of the system but Java.
pub(super) fn package() -> debian::Packages {
    debian::Packages {
        name: "maven",
        label: "Maven",
        candidates: &["maven"],
        keep: |package, _| {
            package == "maven" || (package.starts_with("lib") && package.ends_with("-java"))
        },
        finish: |_| Ok(()),
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
