//! A mail server for the desk: it takes every mail, shows it, and keeps it once.
//!
//! `mailin` does the protocol. Like real mail stores it goes by the Message-ID: a mail that comes again is
//! accepted, since refusing it would only make the sender try again, and not kept a second time.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use mailin::{Action, Handler, Response, SessionBuilder, response};
use rusqlite::params;

use crate::books::Books;

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS mails (
        message_id TEXT PRIMARY KEY, recipient TEXT NOT NULL, subject TEXT NOT NULL,
        accepted INTEGER NOT NULL
    ) WITHOUT ROWID;
";
const MAX_MAIL: usize = 1 << 20;

#[derive(Clone)]
pub struct Mailbox {
    books: Books,
    quiet: bool,
}

impl Mailbox {
    pub fn open(folder: &Path, quiet: bool) -> Result<Mailbox> {
        Ok(Mailbox {
            books: Books::open(folder, "mailbox", TABLES)?,
            quiet,
        })
    }

    /// Listens in the background for as long as the process lives; returns where.
    pub fn listen(&self, address: &str) -> Result<SocketAddr> {
        let listener = TcpListener::bind(address)
            .with_context(|| format!("cannot listen for mail on {address}"))?;
        let bound = listener.local_addr()?;
        let mailbox = self.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mailbox = mailbox.clone();
                thread::spawn(move || {
                    if let Err(error) = mailbox.serve(&stream) {
                        tracing::debug!("mailbox: {error:#}");
                    }
                });
            }
        });
        Ok(bound)
    }

    fn serve(&self, mut stream: &TcpStream) -> Result<()> {
        stream.set_read_timeout(Some(Duration::from_secs(300)))?;
        stream.set_nodelay(true)?;
        let letter = Letter {
            mailbox: self,
            recipients: Vec::new(),
            text: Vec::new(),
        };
        let mut session = SessionBuilder::new("mailbox").build(stream.peer_addr()?.ip(), letter);
        let mut answer = session.greeting();
        let mut lines = BufReader::new(stream);
        loop {
            if answer.action != Action::NoReply {
                let mut bytes = Vec::new();
                answer.write_to(&mut bytes)?;
                stream.write_all(&bytes)?;
            }
            if answer.action == Action::Close {
                return Ok(());
            }
            let mut line = Vec::new();
            if lines.read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            answer = session.process(&line);
        }
    }

    fn keep(&self, recipient: &str, text: &str) -> Result<()> {
        let subject = header(text, "subject").unwrap_or_default();
        let id = header(text, "message-id").unwrap_or_else(|| {
            std::iter::repeat_with(fastrand::alphanumeric)
                .take(20)
                .collect()
        });
        // Each recipient has a copy of his own.
        let key = format!("{id} {recipient}");
        let accepted: u32 = self.books.lock().query_row(
            "INSERT INTO mails VALUES (?1, ?2, ?3, 1)
             ON CONFLICT DO UPDATE SET accepted = accepted + 1 RETURNING accepted",
            params![key, recipient, subject],
            |row| row.get(0),
        )?;
        let line = match accepted {
            1 if self.quiet => return Ok(()),
            1 => format!("mailbox: for {recipient} {subject:?}"),
            _ => format!("mailbox: for {recipient:?} {id:?} again, suppressed"),
        };
        // When nobody reads it, println! panics. Here that would end only this connection, and the mail would be sent
        // again, without an end.
        if writeln!(std::io::stdout(), "{line}").is_err() {
            std::process::exit(1);
        }
        Ok(())
    }

    /// The mails of a run: kept, accepted in all, and users who have one.
    pub fn counts(&self, run: &str) -> Result<(u64, u64, u64)> {
        Ok(self.books.lock().query_row(
            "SELECT count(*), ifnull(sum(accepted), 0), count(DISTINCT recipient) FROM mails WHERE message_id GLOB ?1",
            [format!("<created-{run}-*")],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        )?)
    }
}

/// A mail that is being received.
struct Letter<'a> {
    mailbox: &'a Mailbox,
    recipients: Vec<String>,
    text: Vec<u8>,
}

impl Handler for Letter<'_> {
    fn mail(&mut self, _ip: IpAddr, _domain: &str, _from: &str) -> Response {
        self.recipients.clear();
        self.text.clear();
        response::OK
    }

    fn rcpt(&mut self, to: &str) -> Response {
        self.recipients.push(to.to_owned());
        response::OK
    }

    fn data(&mut self, line: &[u8]) -> std::io::Result<()> {
        if self.text.len() <= MAX_MAIL {
            self.text.extend(line);
        }
        Ok(())
    }

    /// The answer is given when the mail is kept, not before: after it, the sender forgets the mail.
    fn data_end(&mut self) -> Response {
        if self.text.len() > MAX_MAIL {
            return response::NO_STORAGE;
        }
        let text = String::from_utf8_lossy(&self.text);
        for recipient in &self.recipients {
            if let Err(error) = self.mailbox.keep(recipient, &text) {
                tracing::warn!("mailbox: {error:#}");
                return response::INTERNAL_ERROR;
            }
        }
        response::OK
    }
}

/// A header of a mail, unfolded.
fn header(text: &str, name: &str) -> Option<String> {
    let mut found: Option<String> = None;
    for line in text.lines().take_while(|line| !line.is_empty()) {
        match (&mut found, line.starts_with([' ', '\t'])) {
            (Some(value), true) => {
                value.push(' ');
                value.push_str(line.trim());
            }
            (Some(_), false) => break,
            (None, _) => {
                found = line
                    .split_once(':')
                    .filter(|(field, _)| field.eq_ignore_ascii_case(name))
                    .map(|(_, value)| value.trim().to_owned());
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers() {
        let text =
            "From: a\r\nSubject: Hello\r\n  there\r\nMESSAGE-id: <1@x>\r\n\r\nSubject: no\r\n";
        assert_eq!(header(text, "subject").unwrap(), "Hello there");
        assert_eq!(header(text, "message-id").unwrap(), "<1@x>");
        assert_eq!(header(text, "date"), None);
    }
}
