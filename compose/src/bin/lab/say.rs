//! What `lab` prints. A reader who has left, such as `head`, is no error: a broker goes on, and an example ends by itself.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};

use anyhow::{Context, Result};

/// A line on standard output: what was asked for.
macro_rules! out {
    ($($text:tt)*) => { $crate::say::line(&mut std::io::stdout(), format_args!($($text)*)) };
}

/// A line on standard error: what `lab` does at the moment, and what is wrong.
macro_rules! say {
    ($($text:tt)*) => { $crate::say::line(&mut std::io::stderr(), format_args!($($text)*)) };
}

pub(crate) use {out, say};

/// In one piece, so that the lines of two processes do not mix. Unlike `println!`, it does not panic.
pub fn line(to: &mut impl Write, text: Arguments) {
    let _ = to.write_all(format!("{text}\n").as_bytes());
}

/// A whole page on standard output.
///
/// # Errors
/// It cannot be written, for another reason than that the reader has left.
pub fn page(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to standard output"),
    }
}
