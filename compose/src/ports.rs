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

use crate::Service;

pub(crate) const RANGE: Range<u16> = 20_000..32_000;

/// Which ports a broker listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ports {
    /// This one for clients, the next numbers for those of further nodes, and the customary one for the first's console.
    From(u16),
    /// Ones that nobody else has or will have.
    Free,
}

impl Ports {
    /// What `LAB_PORTS` says of this service: `free`, or a list such as `kafka=19092,nats=14222`. Without it, the ports
    /// that clients expect.
    ///
    /// # Errors
    /// The variable is not understood.
    pub(crate) fn from_env(service: Service) -> Result<Ports> {
        let text = std::env::var("LAB_PORTS").unwrap_or_default();
        if text == "free" {
            return Ok(Ports::Free);
        }
        for item in text.split(',').filter(|item| !item.is_empty()) {
            let parsed = item.split_once('=').and_then(|(name, port)| {
                Some((
                    name.trim().parse::<Service>().ok()?,
                    port.trim().parse::<u16>().ok()?,
                ))
            });
            match parsed {
                Some((named, port)) if named == service => return Ok(Ports::From(port)),
                Some(_) => {}
                None => bail!(
                    "LAB_PORTS has '{item}'; it is 'free', or a list such as 'kafka=19092,nats=14222'"
                ),
            }
        }
        Ok(Ports::From(service.spec().facts().port))
    }
}

/// A port that is this process's until dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    /// The port's number.
    pub(crate) port: u16,
    _lock: File,
}

/// Claims a port that nothing listens on.
///
/// # Errors
/// The folder for the locks cannot be written, or no port is left.
pub(crate) fn claim() -> Result<Claim> {
    claim_in(RANGE)
}

/// Claims a port of this range that nothing listens on.
///
/// # Errors
/// The folder for the locks cannot be written, or no port is left.
pub(crate) fn claim_in(range: Range<u16>) -> Result<Claim> {
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
pub(crate) fn is_free(port: u16) -> bool {
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
