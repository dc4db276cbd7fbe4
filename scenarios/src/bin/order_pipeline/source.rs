//! Where orders come from: a generator, or lines of JSON.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;

use crate::event::MAX_EVENT;
use crate::inventory::STOCK;
use crate::payment::LIMIT;

const USERS: u64 = 100;

/// One order as text, or what should have been one.
pub struct Line {
    /// Counts from 1.
    pub number: u64,
    pub bytes: Vec<u8>,
    /// The line's length, where more of it came than is kept.
    pub cut_from: Option<usize>,
}

pub enum Source {
    Generated {
        run: String,
        seed: u64,
        next: u64,
        orders: u64,
    },
    Lines {
        name: String,
        lines: Receiver<io::Result<Line>>,
    },
}

impl Source {
    /// `orders` made-up orders. Each depends on the seed and its number alone, so a run that was
    /// interrupted goes on at any number with the very orders that it would have placed.
    pub fn generated(run: &str, seed: u64, orders: u64, done: u64) -> Source {
        Source::Generated {
            run: run.to_owned(),
            seed,
            next: done,
            orders,
        }
    }

    /// The lines of a file, or of standard input for `-`, after the first `done` ones.
    pub fn lines(path: &PathBuf, done: u64) -> Result<Source> {
        let name = path.display().to_string();
        let mut input: Box<dyn BufRead + Send> = if name == "-" {
            Box::new(BufReader::new(io::stdin()))
        } else {
            let file = File::open(path).with_context(|| format!("cannot open {name}"))?;
            Box::new(BufReader::new(file))
        };
        // A thread, because reading blocks: what has been read is placed while the rest is awaited.
        let (sender, lines) = sync_channel(1024);
        thread::spawn(move || {
            for number in 1.. {
                let line = read_line(&mut input, number);
                let last = line.is_err();
                let Some(line) = line.transpose() else { return };
                let skip = number <= done || matches!(&line, Ok(line) if line.bytes.is_empty());
                if (!skip && sender.send(line).is_err()) || last {
                    return;
                }
            }
        });
        Ok(Source::Lines { name, lines })
    }

    pub fn name(&self) -> &str {
        match self {
            Source::Generated { .. } => "generator",
            Source::Lines { name, .. } => name,
        }
    }

    /// At most `most` lines, as many as there are within `linger`; whether these were the last ones.
    pub fn next_batch(&mut self, most: usize, linger: Duration) -> Result<(Vec<Line>, bool)> {
        match self {
            Source::Generated {
                run,
                seed,
                next,
                orders,
            } => {
                let end = orders.min(&mut (*next + most as u64)).to_owned();
                let batch = (*next..end)
                    .map(|index| Line {
                        number: index + 1,
                        bytes: generate(run, *seed, index, *orders),
                        cut_from: None,
                    })
                    .collect();
                *next = end;
                Ok((batch, end == *orders))
            }
            Source::Lines { name, lines } => {
                let deadline = Instant::now() + linger;
                let mut batch = Vec::new();
                while batch.len() < most {
                    let left = deadline.saturating_duration_since(Instant::now());
                    match lines.recv_timeout(left) {
                        Ok(line) => {
                            batch.push(line.with_context(|| format!("cannot read {name}"))?)
                        }
                        Err(RecvTimeoutError::Timeout) => break,
                        Err(RecvTimeoutError::Disconnected) => return Ok((batch, true)),
                    }
                }
                Ok((batch, false))
            }
        }
    }
}

/// A line without its end; empty where there is nothing on it, None at the end of the input. Of a line
/// that is far too long only the beginning is kept in memory.
fn read_line(input: &mut impl BufRead, number: u64) -> io::Result<Option<Line>> {
    let keep = MAX_EVENT + 1;
    let mut bytes = Vec::new();
    let mut size = input
        .by_ref()
        .take(keep as u64)
        .read_until(b'\n', &mut bytes)?;
    if size == 0 {
        return Ok(None);
    }
    let mut cut_from = None;
    if size == keep && bytes.last() != Some(&b'\n') {
        let mut rest = Vec::new();
        loop {
            rest.clear();
            let more = input
                .by_ref()
                .take(keep as u64)
                .read_until(b'\n', &mut rest)?;
            size += more;
            if more == 0 || rest.last() == Some(&b'\n') {
                break;
            }
        }
        cut_from = Some(size);
    }
    // Editors on Windows put a byte-order mark before the first line.
    if number == 1 && bytes.starts_with("\u{feff}".as_bytes()) {
        bytes.drain(.."\u{feff}".len());
    }
    let end = bytes.trim_ascii_end().len();
    bytes.truncate(end);
    Ok(Some(Line {
        number,
        bytes,
        cut_from,
    }))
}

/// An order that looks real: a hundred users, one to three pieces of an item, one in twenty-five dearer
/// than payment allows, and one in twenty that asks for what is sold out by then.
fn generate(run: &str, seed: u64, index: u64, orders: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    random = fastrand::Rng::with_seed(random.u64(..));
    let quantity = random.u64(1..=3);
    // Two pieces on average: this many items are not quite enough for all orders.
    let items = (orders * 2 * 95 / 100 / STOCK as u64).max(1);
    let amount = match random.u32(0..25) {
        0 => random.i64(LIMIT + 1..=2 * LIMIT),
        _ => random.i64(100..=LIMIT / 2),
    };
    let order = json!({
        "order_id": format!("{run}-{:06}", index + 1),
        "user_id": format!("user-{:03}", random.u64(0..USERS)),
        "amount": amount,
        "status": "created",
        "item": format!("{run}-item-{:04}", index % items),
        "quantity": quantity,
    });
    order.to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endless_line_is_cut_and_the_next_one_is_whole() {
        let long = 5 * MAX_EVENT + 3;
        let text = format!("a\r\n\n{}\nb", "x".repeat(long));
        let mut input = text.as_bytes();
        let mut next = |number| read_line(&mut input, number).unwrap();
        assert_eq!(next(1).unwrap().bytes, b"a");
        assert_eq!(next(2).unwrap().bytes, b"");
        assert_eq!(next(3).unwrap().cut_from, Some(long + 1));
        assert_eq!(next(4).unwrap().bytes, b"b");
        assert!(next(5).is_none());
    }

    #[test]
    fn a_generated_run_goes_on_where_it_stopped() {
        let all = |source: &mut Source| source.next_batch(100, Duration::ZERO).unwrap().0;
        let whole = all(&mut Source::generated("r", 7, 50, 0));
        let rest = all(&mut Source::generated("r", 7, 50, 30));
        assert_eq!((whole.len(), rest.len()), (50, 20));
        for (a, b) in whole[30..].iter().zip(&rest) {
            assert_eq!((a.number, &a.bytes), (b.number, &b.bytes));
        }
    }
}
