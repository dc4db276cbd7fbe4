//! `cargo lab`: starts real brokers and runs the examples on them.

use std::process::ExitCode;

fn main() -> ExitCode {
    compose::lab()
}
