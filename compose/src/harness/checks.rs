//! What each example must do where no broker is, and where nobody reads what it prints.

use std::fmt::Display;
use std::time::{Duration, Instant};
use std::{iter, thread};

use anyhow::{Result, ensure};

use super::{Example, TIMEOUT};
use crate::Service;

/// As [`without_broker`], for programs that take no arguments.
///
/// # Errors
/// As there.
///
/// # Panics
/// As there.
pub fn broker_absent(service: Service, programs: &[&str]) -> Result<()> {
    let examples = programs.iter().map(|path| (*path, Example::new(path)));
    without_broker(service, examples.collect())
}

/// Starts each program where no broker listens, and requires that it ends with status 1 and one error, which names the
/// address and the command that starts the service, with nothing printed before, except for the client's own log, and
/// without hanging. The text names the program when it fails.
///
/// # Errors
/// A program cannot be started, or does not end in time.
///
/// # Panics
/// A program ends in another way.
pub fn without_broker(service: Service, examples: Vec<(impl Display, Example)>) -> Result<()> {
    // For all together: each takes a few seconds, but there may be thirty, and other tests beside them.
    const LIMIT: Duration = Duration::from_secs(60);
    // Claimed, so that nobody listens there while the programs try.
    let claim = crate::ports::claim()?;
    let address = service.address(&[format!("127.0.0.1:{}", claim.port)]);
    let started = Instant::now();
    let mut running = Vec::new();
    // All at once: most of their time is waiting.
    for (program, example) in examples {
        let example = example.env(service.variable(), &address);
        running.push((program, example.spawn()?));
    }
    for (program, mut process) in running {
        let ended = process.wait(LIMIT.saturating_sub(started.elapsed()))?;
        let stderr = &ended.stderr;
        assert_eq!(ended.code(), 1, "{program}: {stderr}");
        // No example prints a password.
        let place = match address.rsplit_once('@') {
            Some((login, place)) => {
                assert!(!stderr.contains(login), "{program}: {stderr}");
                place
            }
            None => &address,
        };
        assert!(stderr.contains(place), "{program}: {stderr}");
        let advice = format!("cargo lab up {service}");
        assert!(stderr.contains(&advice), "{program}: {stderr}");
        let mut before = stderr
            .lines()
            .take_while(|line| !line.starts_with("Error: "));
        assert!(
            before.all(is_log) && stderr.contains("Error: "),
            "{program} wrote before: {stderr}"
        );
        assert_eq!(ended.stdout, "", "{program}");
    }
    Ok(())
}

/// A line of `tracing_subscriber`: `2026-01-31T12:00:00.000000Z ERROR rdkafka::client: …`
fn is_log(line: &str) -> bool {
    let mut words = line.split_whitespace();
    words.next().is_some_and(|time| time.ends_with('Z')) && words.next() == Some("ERROR")
}

/// A program with its arguments, see [`call!`](crate::call).
pub type Call<'a> = (&'a str, &'a [&'a str]);

/// A [`Call`](crate::harness::Call) of a binary of the package under test, by its name.
#[macro_export]
macro_rules! call {
    ($name:literal $(, $arg:literal)*) => {
        (env!(concat!("CARGO_BIN_EXE_", $name)), &[$($arg),*])
    };
}

/// The names of all these programs, also of those that only give another something to print: what a
/// [`Pool`](super::Pool) must know, so that no other test runs them on the same broker.
pub fn names<'a>(programs: &[(Call<'a>, Option<Call<'a>>)]) -> Vec<&'a str> {
    let calls = programs.iter();
    let calls = calls.flat_map(|(call, feeder)| iter::once(call).chain(feeder));
    calls
        .map(|(path, _)| path.rsplit('/').next().unwrap_or(path))
        .collect()
}

/// Starts each program as `program | head -1`, and requires that it ends with its next line. The second call gives it
/// something to print; a program without one prints by itself. `prepare` adds the brokers and other settings.
///
/// # Errors
/// A program cannot be started, ends for another reason, or goes on although nobody reads what it prints.
pub fn closed_pipe(
    programs: &[(Call<'_>, Option<Call<'_>>)],
    prepare: impl Fn(Example) -> Example,
) -> Result<()> {
    let mut running = Vec::new();
    for ((program, args), feeder) in programs {
        let script = r#""$0" "$@" | head -1"#;
        let pipe = Example::new("/bin/sh").args(["-c", script, program]);
        running.push((program, prepare(pipe.args(*args)).spawn()?, feeder));
    }
    let deadline = Instant::now() + TIMEOUT;
    while !running.is_empty() {
        let mut left = Vec::new();
        for (program, mut pipe, feeder) in running {
            if pipe.try_wait()?.is_none() {
                // Again and again: a line that is printed before `head` has ended is lost, and hurts nobody.
                if let Some((feeder, args)) = feeder {
                    // Without its consumer it may fail.
                    prepare(Example::new(feeder).args(*args))
                        .spawn()?
                        .wait(TIMEOUT)?;
                }
                left.push((program, pipe, feeder));
                continue;
            }
            let ended = pipe.wait(TIMEOUT)?;
            ensure!(
                ended.stdout.lines().count() == 1 && ended.stderr.contains("Broken pipe"),
                "{program} ended for another reason: {}{}",
                ended.stdout,
                ended.stderr
            );
        }
        running = left;
        let names: Vec<_> = running.iter().map(|(name, ..)| name).collect();
        ensure!(Instant::now() < deadline, "still running: {names:?}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
