//! Sending mail by SMTP.

use std::time::Duration;

use anyhow::{Context, Result};
use lettre::message::Mailbox;
use lettre::{Address, AsyncSmtpTransport, AsyncTransport, Message, Tokio1Executor};

use crate::event::Event;

const FROM: &str = "Event bus <welcome@event-bus.example>";
const LIMIT: Duration = Duration::from_secs(10);

/// Each mail has a connection of its own. `lettre`'s pool (a feature, which is off here) would also take one back from
/// a mail that was given up in the middle, and the next mail would go on with the old one's dialogue.
pub struct Postman {
    transport: AsyncSmtpTransport<Tokio1Executor>,
    from: Mailbox,
    limit: Duration,
}

/// What became of a mail.
pub enum Posted {
    /// The server has taken it.
    Accepted,
    /// It has certainly not: it answered so, or there was no connection.
    NotNow(String),
    /// Something broke in the middle, and it may have.
    Unknown(String),
    /// It will never.
    Refused(String),
}

impl Postman {
    /// `smtp://host:port`, `smtps://user:password@host`, `smtp://user:password@host:587?tls=required`.
    pub fn new(url: &str, ack_wait: Duration) -> Result<Postman> {
        // Shorter than JetStream waits for an acknowledgement, or another instance would get the event meanwhile.
        let limit = LIMIT.min(ack_wait / 2);
        // Without the URL in the error: it may hold a password.
        let transport = AsyncSmtpTransport::<Tokio1Executor>::from_url(url)
            .context("SMTP_URL is not the address of a mail server")?
            .timeout(Some(limit))
            .build();
        let from = std::env::var("MAIL_FROM").unwrap_or_else(|_| FROM.to_owned());
        let from = from.parse().context("MAIL_FROM is not an address")?;
        Ok(Postman {
            transport,
            from,
            limit,
        })
    }

    /// Sends the mail that follows from an event. It always has the same Message-ID, by which whoever
    /// receives it twice can tell.
    pub async fn welcome(&self, event: &Event) -> Posted {
        let user = event.user();
        let address: Address = match user.email.parse() {
            Ok(address) => address,
            Err(error) => return Posted::Refused(format!("not an address: {error}")),
        };
        let message = Message::builder()
            .from(self.from.clone())
            .to(Mailbox::new(None, address))
            .message_id(Some(format!("<{}@event-bus.example>", tame(&event.id()))))
            .subject("Welcome")
            .body(format!(
                "Hello {},\r\n\r\nyour account is ready.\r\n",
                user.email
            ));
        let message = match message {
            Ok(message) => message,
            Err(error) => return Posted::Refused(format!("cannot be a mail: {error}")),
        };
        // The transport's own time limit is for the connection only. A server that stops later would be waited for
        // without an end.
        match tokio::time::timeout(self.limit, self.transport.send(message)).await {
            Err(_) => {
                let limit = self.limit.as_secs_f64();
                Posted::Unknown(format!("the mail server says nothing for {limit} s"))
            }
            Ok(Ok(_)) => Posted::Accepted,
            Ok(Err(error)) => {
                let status = error.status().map(u16::from);
                match status {
                    // Our own credentials are wrong, not the mail.
                    Some(530 | 534 | 535 | 538) => Posted::NotNow(explain(&error)),
                    // It is the dialogue that the server did not understand, not the mail.
                    Some(500 | 502..=504) => Posted::NotNow(explain(&error)),
                    Some(500..) => Posted::Refused(explain(&error)),
                    Some(_) => Posted::NotNow(explain(&error)),
                    None if explain(&error).starts_with("Connection error") => {
                        Posted::NotNow(explain(&error))
                    }
                    None => Posted::Unknown(explain(&error)),
                }
            }
        }
    }
}

fn explain(error: &lettre::transport::smtp::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        let next_text = next.to_string();
        if !text.contains(&next_text) {
            text = format!("{text}: {next_text}");
        }
        cause = next.source();
    }
    text
}

/// Ids come from events that anybody may have published; not every character may be in a header.
fn tame(id: &str) -> String {
    let mut tame = String::new();
    for byte in id.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => tame.push(byte.into()),
            byte => tame += &format!("={byte:02x}"),
        }
    }
    tame
}
