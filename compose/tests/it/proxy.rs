//! Each fault of the proxy, on a bare connection to a broker.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use compose::Service;
use compose::harness::{Direction, Proxy, TIMEOUT};

/// Long enough for what is on its way to arrive, on a loopback. Too short on a busy machine would hide a fault, and make
/// no test fail.
const SILENCE: Duration = Duration::from_millis(500);

/// A connection to NATS, whose protocol is text.
struct Line(BufReader<TcpStream>);

impl Line {
    fn open(address: &str) -> Result<Line> {
        let host = address.strip_prefix("nats://").context("not NATS")?;
        let stream = TcpStream::connect(host)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        Ok(Line(BufReader::new(stream)))
    }

    /// One that the server has greeted, and that has subscribed to `word`.
    fn greeted(address: &str) -> Result<Line> {
        let mut line = Line::open(address)?;
        ensure!(line.read()?.starts_with("INFO "), "no greeting");
        line.write("CONNECT {\"verbose\":false}\r\nSUB word 1\r\nPING\r\n")?;
        ensure!(line.read()? == "PONG\r\n", "no answer");
        Ok(line)
    }

    fn write(&mut self, text: &str) -> Result<()> {
        Ok(self.0.get_mut().write_all(text.as_bytes())?)
    }

    /// Empty at the end of the connection.
    fn read(&mut self) -> Result<String> {
        Ok(self.next()?)
    }

    /// The server asks on each connection, now and then, whether its client is there: that is no message.
    fn next(&mut self) -> std::io::Result<String> {
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line)?;
            if line != "PING\r\n" {
                return Ok(line);
            }
        }
    }

    fn is_open_and_silent(&mut self) -> Result<bool> {
        self.0.get_mut().set_read_timeout(Some(SILENCE))?;
        let silent = match self.next() {
            Ok(_) => false,
            Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
        };
        self.0.get_mut().set_read_timeout(Some(TIMEOUT))?;
        Ok(silent)
    }

    fn is_closed(&mut self) -> bool {
        match self.next() {
            Ok(line) => line.is_empty(),
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }
}

fn publish(line: &mut Line, word: &str) -> Result<()> {
    line.write(&format!("PUB word {}\r\n{word}\r\n", word.len()))
}

fn received(line: &mut Line) -> Result<String> {
    let head = line.read()?;
    ensure!(head.starts_with("MSG word"), "not a message: {head:?}");
    Ok(line.read()?.trim_end().to_owned())
}

#[test]
fn a_healthy_proxy_changes_nothing_and_a_cut_ends_all_until_it_is_healed() -> Result<()> {
    let (nats, proxy) = Proxy::in_front_of(Service::Nats)?;
    assert_ne!(nats.address(), proxy.address());
    let mut direct = Line::greeted(&nats.address())?;
    let mut through = Line::greeted(proxy.address())?;
    publish(&mut through, "before")?;
    assert_eq!(received(&mut direct)?, "before");
    assert_eq!(received(&mut through)?, "before");
    proxy.cut()?;
    assert!(through.is_closed());
    assert!(Line::greeted(proxy.address()).is_err());
    publish(&mut direct, "meanwhile")?;
    assert_eq!(received(&mut direct)?, "meanwhile");
    proxy.heal()?;
    publish(&mut Line::greeted(proxy.address())?, "after")?;
    assert_eq!(received(&mut direct)?, "after");
    Ok(())
}

#[test]
fn a_delay_holds_in_its_direction_and_what_a_cut_finds_on_its_way_never_arrives() -> Result<()> {
    const DELAY: Duration = Duration::from_secs(1);
    let (nats, proxy) = Proxy::in_front_of(Service::Nats)?;
    let mut direct = Line::greeted(&nats.address())?;
    for direction in [Direction::ToBroker, Direction::ToClient] {
        let mut through = Line::greeted(proxy.address())?;
        proxy.delay(direction, DELAY)?;
        let begun = Instant::now();
        through.write("PING\r\n")?;
        assert_eq!(through.read()?, "PONG\r\n");
        assert!(begun.elapsed() >= DELAY);
        // The connection outlives the fault.
        proxy.heal()?;
        publish(&mut through, "healed")?;
        assert_eq!(received(&mut through)?, "healed");
        assert_eq!(received(&mut direct)?, "healed");
    }
    proxy.delay(Direction::ToBroker, 60 * DELAY)?;
    let mut late = Line::open(proxy.address())?;
    ensure!(late.read()?.starts_with("INFO "), "no greeting");
    late.write("CONNECT {\"verbose\":false}\r\n")?;
    publish(&mut late, "cut off")?;
    proxy.cut()?;
    proxy.heal()?;
    assert!(direct.is_open_and_silent()?);
    Ok(())
}

#[test]
fn what_is_swallowed_in_one_direction_arrives_in_the_other() -> Result<()> {
    let (nats, proxy) = Proxy::in_front_of(Service::Nats)?;
    let mut direct = Line::greeted(&nats.address())?;

    let mut through = Line::greeted(proxy.address())?;
    proxy.swallow(Direction::ToClient)?;
    publish(&mut through, "stored without an answer")?;
    assert_eq!(received(&mut direct)?, "stored without an answer");
    assert!(through.is_open_and_silent()?);
    proxy.heal()?;
    assert!(through.is_closed());

    let mut through = Line::greeted(proxy.address())?;
    proxy.swallow(Direction::ToBroker)?;
    publish(&mut through, "swallowed")?;
    publish(&mut direct, "seen")?;
    assert_eq!(received(&mut direct)?, "seen");
    assert_eq!(received(&mut through)?, "seen");
    proxy.heal()?;
    assert!(through.is_closed());
    // Nor does it arrive by the healing.
    assert!(direct.is_open_and_silent()?);
    Ok(())
}

/// On its way when the fault begins, and held there by the one before it.
#[test]
fn what_is_delayed_is_swallowed_too() -> Result<()> {
    let (nats, proxy) = Proxy::in_front_of(Service::Nats)?;
    let mut direct = Line::greeted(&nats.address())?;
    let mut through = Line::greeted(proxy.address())?;
    proxy.delay(Direction::ToClient, SILENCE / 2)?;
    publish(&mut through, "delayed")?;
    assert_eq!(received(&mut direct)?, "delayed");
    proxy.swallow(Direction::ToClient)?;
    assert!(through.is_open_and_silent()?);
    Ok(())
}

#[test]
fn nobody_hears_of_a_black_hole() -> Result<()> {
    let (nats, proxy) = Proxy::in_front_of(Service::Nats)?;
    let mut direct = Line::greeted(&nats.address())?;
    let mut through = Line::greeted(proxy.address())?;
    proxy.black_hole()?;
    publish(&mut through, "late")?;
    assert!(direct.is_open_and_silent()?);
    publish(&mut direct, "early")?;
    assert_eq!(received(&mut direct)?, "early");
    assert!(through.is_open_and_silent()?);
    // A new connection gets no answer, and no refusal.
    assert!(Line::open(proxy.address())?.is_open_and_silent()?);
    proxy.heal()?;
    assert_eq!(received(&mut through)?, "early");
    assert_eq!(received(&mut direct)?, "late");

    let mut through = Line::greeted(proxy.address())?;
    proxy.black_hole()?;
    nats.kill(1)?;
    assert!(through.is_open_and_silent()?);
    proxy.heal()?;
    assert!(through.is_closed());
    Ok(())
}
