//! Ports that nobody else takes.
//!
//! A port that was free a moment ago may be taken when the broker binds it, or between its kill and its restart: by
//! another test run, or by the kernel for an outgoing connection. So ports are claimed below the range that kernels
//! hand out (Linux from 32768, macOS from 49152), and a lock on a file keeps them claimed for as long as they are held.

use std::fs::{File, OpenOptions};
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

const RANGE: Range<u16> = 20_000..32_000;

/// A port that is this process's until dropped.
#[derive(Debug)]
pub struct Claim {
    /// The port's number.
    pub port: u16,
    _lock: File,
}

/// Claims a port that nothing listens on.
///
/// # Errors
/// The folder for the locks cannot be written, or no port is left.
pub fn claim() -> Result<Claim> {
    claim_in(RANGE)
}

/// Claims a port of this range that nothing listens on.
///
/// # Errors
/// The folder for the locks cannot be written, or no port is left.
pub fn claim_in(range: Range<u16>) -> Result<Claim> {
    let folder = folder()?;
    let count = u32::from(range.end - range.start);
    // Spread the starting points, so that processes side by side rarely try the same ports.
    let start = std::process::id().wrapping_mul(7919) % count;
    for step in 0..count {
        let port = range.start + u16::try_from((start + step) % count)?;
        let path = folder.join(port.to_string());
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        if lock.try_lock().is_ok() && is_free(port) {
            return Ok(Claim { port, _lock: lock });
        }
    }
    bail!("no port from {} to {} is free", range.start, range.end - 1)
}

/// Whether nothing on this machine listens on the port.
pub fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()
        && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

fn folder() -> Result<PathBuf> {
    let user = nix::unistd::getuid();
    let folder = std::env::temp_dir()
        .join(format!("messaging-lab-{user}"))
        .join("ports");
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}
