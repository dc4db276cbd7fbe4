//! What is read of files and folders in several places.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Everything in the folder and in those below it, except for the folders. Links are not followed.
pub(crate) fn all_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in walkdir::WalkDir::new(folder).sort_by_file_name() {
        let entry = entry.with_context(|| format!("cannot read {}", folder.display()))?;
        if !entry.file_type().is_dir() {
            files.push(entry.into_path());
        }
    }
    Ok(files)
}

/// The last lines of a log, indented, long ones cut: the reason for a failure is there.
pub(crate) fn tail(path: &Path, count: usize) -> String {
    const WIDTH: usize = 300;
    let Ok(text) = end_of(path) else {
        return format!("    (no log at {})", path.display());
    };
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let shown = lines.iter().skip(lines.len().saturating_sub(count));
    let shown: Vec<String> = shown
        .map(|line| format!("    {line:.WIDTH$}").trim_end().to_owned())
        .collect();
    if shown.is_empty() {
        return "    (it wrote nothing)".to_owned();
    }
    shown.join("\n")
}

/// Of a log that has grown for days only the end is read.
fn end_of(path: &Path) -> io::Result<String> {
    const MOST: u64 = 64 * 1024;
    let mut file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(MOST);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
