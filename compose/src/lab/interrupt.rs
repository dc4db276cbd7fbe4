//! Ctrl-C and SIGTERM. They end `lab` in every phase.
//!
//! Most phases cannot be broken off from inside: a build, a fetch, the start of a broker, an orderly stop. In those the
//! process ends at once. All that it has started has a watcher, which then ends that too.

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

/// What a shell reports for a program that Ctrl-C has ended.
pub(super) const EXIT_CODE: u8 = 130;

/// Whether interrupts are sent to the receiver, and do not end the process.
static AWAITED: AtomicBool = AtomicBool::new(false);

/// Files that go with this process.
static FILES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Catches interrupts, of which each ends the process until [`attend`] is called.
///
/// # Errors
/// The system refuses.
pub(super) fn catch() -> Result<Receiver<()>> {
    let (sender, receiver) = mpsc::channel();
    ctrlc::set_handler(move || {
        if AWAITED.load(Ordering::SeqCst) {
            let _ = sender.send(());
        } else {
            end_at_once();
        }
    })
    .context("cannot catch Ctrl-C")?;
    Ok(receiver)
}

/// From here on each interrupt is a message to the receiver.
pub(super) fn attend() {
    AWAITED.store(true, Ordering::SeqCst);
}

/// From here on each interrupt ends the process again.
pub(super) fn stop_attending() {
    AWAITED.store(false, Ordering::SeqCst);
}

/// Has the file removed when an interrupt ends the process.
pub(super) fn remove_at_end(file: PathBuf) {
    let mut files = FILES.lock().unwrap_or_else(PoisonError::into_inner);
    files.push(file);
}

fn end_at_once() -> ! {
    for file in FILES.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        let _ = fs::remove_file(file);
    }
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        // Not on the line of a progress bar.
        let _ = stderr.write_all(b"\n");
    }
    std::process::exit(EXIT_CODE.into())
}
