//! Brings programs onto this machine, for this user alone and without root.
//!
//! What the machine has is used. What it lacks is fetched by the package manager that publishes it (Maven, Go, apt), into
//! the cache, and only there. Which program needs what is known by the services.

pub(crate) mod apt;
pub(crate) mod go;
mod install;
pub(crate) mod java;
pub(crate) mod maven;
mod tool;
mod truststore;

#[cfg(test)]
mod tests;

use std::fmt;
use std::path::PathBuf;

pub(crate) use tool::{is_interrupt, is_program, says, which};

/// One of the programs that a service takes.
#[derive(Debug)]
pub(crate) struct Part {
    name: &'static str,
    source: Source,
}

/// Where a program comes from.
#[derive(Debug)]
pub(crate) enum Source {
    /// The machine has it.
    Machine(PathBuf),
    /// It was fetched before, and is whole.
    Cache(PathBuf),
    /// Will be fetched by Maven.
    Maven,
    /// Will be built by Go.
    Go,
    /// Will be unpacked from Debian packages.
    Debian,
    /// Cannot be had.
    Missing(Advice),
}

/// What to install where a program neither is nor can be fetched: the names of its packages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Advice {
    pub(crate) program: &'static str,
    pub(crate) debian: &'static str,
    pub(crate) fedora: &'static str,
    pub(crate) brew: &'static str,
}

impl Part {
    pub(crate) fn new(name: &'static str, source: Source) -> Part {
        Part { name, source }
    }

    /// The machine has it.
    pub(crate) fn is_of_machine(&self) -> bool {
        matches!(self.source, Source::Machine(_))
    }

    /// It need not be fetched.
    pub(crate) fn is_here(&self) -> bool {
        matches!(self.source, Source::Machine(_) | Source::Cache(_))
    }

    /// What to install, if it cannot be had.
    pub(crate) fn missing(&self) -> Option<Advice> {
        match self.source {
            Source::Missing(advice) => Some(advice),
            _ => None,
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.name)?;
        match &self.source {
            Source::Machine(path) => write!(f, "{}", path.display()),
            Source::Cache(path) => write!(f, "fetched ({})", path.display()),
            Source::Maven => f.write_str("to be fetched by Maven"),
            Source::Go => f.write_str("to be built by Go"),
            Source::Debian => f.write_str("to be unpacked from Debian packages"),
            Source::Missing(_) => f.write_str("missing"),
        }
    }
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Advice {
            program,
            debian,
            fedora,
            brew,
        } = self;
        write!(
            f,
            "{program} is not on PATH and cannot be fetched here; install it: \
             `sudo apt install {debian}` (Debian, Ubuntu), `sudo dnf install {fedora}` (Fedora), \
             `brew install {brew}` (macOS)"
        )
    }
}
