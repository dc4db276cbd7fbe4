//! What is shown to the user. A reader who has left, such as `head`, is no error: a broker goes on, and an example ends
//! by itself.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// A line on standard output: what was asked for.
macro_rules! out {
    ($($text:tt)*) => { $crate::terminal::line(&mut std::io::stdout(), format_args!($($text)*)) };
}

/// A line on standard error: what is done at the moment, and what is wrong.
macro_rules! say {
    ($($text:tt)*) => { $crate::terminal::line(&mut std::io::stderr(), format_args!($($text)*)) };
}

pub(crate) use {out, say};

/// In one piece, so that neither the lines of two processes mix nor a line and a bar. Unlike `println!`, it does not
/// panic.
pub(crate) fn line(to: &mut impl Write, text: Arguments) {
    BARS.suspend(|| {
        let _ = to.write_all(format!("{text}\n").as_bytes());
    });
}

/// A whole page on standard output.
///
/// # Errors
/// It cannot be written, for another reason than that the reader has left.
pub(crate) fn page(text: &str) -> Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to standard output"),
    }
}

/// All bars of this process, so that two fetches at once do not write over each other.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// What is shown while something is fetched or built: a bar on a terminal, else a line at the start and one at the end.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    started: Instant,
}

impl Progress {
    /// `label` stands before the bar, `line` is what is said where there is no terminal.
    pub(crate) fn titled(label: &str, line: &str) -> Progress {
        let bar = if io::stderr().is_terminal() {
            let bar = BARS.add(ProgressBar::new_spinner());
            bar.set_style(spinner());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar.set_prefix(label.to_owned());
            bar
        } else {
            say!("{line}");
            ProgressBar::hidden()
        };
        Progress {
            bar,
            started: Instant::now(),
        }
    }

    /// What it does at the moment.
    pub(crate) fn show(&self, message: impl Into<String>) {
        self.bar.set_message(message.into());
    }

    /// From now on it is known how many steps there are.
    pub(crate) fn steps(&self, count: usize) {
        let style = "{spinner} {prefix} [{bar:24}] {pos}/{len} {wide_msg} {elapsed}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            self.bar.set_style(style);
        }
        self.bar.set_length(count as u64);
        self.bar.set_position(0);
    }

    pub(crate) fn step(&self) {
        self.bar.inc(1);
    }

    /// Back to work of unknown length.
    pub(crate) fn no_steps(&self) {
        self.bar.set_style(spinner());
    }

    pub(crate) fn done(self, line: &str) {
        let seconds = self.started.elapsed().as_secs_f64();
        self.bar.finish_and_clear();
        say!("{line} in {seconds:.0} s");
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn spinner() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {prefix}: {wide_msg} {elapsed}")
        .unwrap_or_else(|_| ProgressStyle::default_spinner())
}
