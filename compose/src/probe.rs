//! Is a broker listening there, and is it the right one?
//!
//! An open port says little: brokers accept connections seconds before they serve, and the port may belong to another
//! program altogether. Each service is asked for the first step of its own protocol's handshake.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

/// What was found at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nothing listens.
    Nothing,
    /// The service answered in its own protocol.
    Ready,
    /// Something listens, and either is another program or cannot serve yet.
    Other,
}

/// How a service is known from others.
pub(crate) enum Greeting {
    /// A question in its protocol, and how its answer begins.
    Handshake {
        ask: &'static [u8],
        answer: fn(&[u8]) -> bool,
    },
    /// A page that has this text.
    Page {
        path: &'static str,
        has: &'static str,
    },
}

/// Greets whoever listens at `host:port`, waiting at most `patience` for each step.
pub(crate) fn greet(greeting: &Greeting, host: &str, patience: Duration) -> Found {
    let Some(stream) = connect(host, patience) else {
        return Found::Nothing;
    };
    let is_right = match greeting {
        Greeting::Handshake { ask, answer } => shake_hands(stream, ask, *answer, patience),
        Greeting::Page { path, has } => {
            let page = http_get(&format!("http://{host}{path}"), patience);
            page.is_some_and(|(status, body)| status == 200 && body.contains(has))
        }
    };
    if is_right { Found::Ready } else { Found::Other }
}

fn shake_hands(
    mut stream: TcpStream,
    ask: &[u8],
    is_answer: fn(&[u8]) -> bool,
    patience: Duration,
) -> bool {
    let timeouts = stream
        .set_read_timeout(Some(patience))
        .and(stream.set_write_timeout(Some(patience)));
    if timeouts.is_err() || stream.write_all(ask).is_err() {
        return false;
    }
    let mut answer = Vec::new();
    let mut part = [0; 512];
    while !is_answer(&answer) {
        match stream.read(&mut part) {
            Ok(length @ 1..) if answer.len() < 4096 => answer.extend_from_slice(&part[..length]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Ok(_) | Err(_) => return false,
        }
    }
    true
}

/// A page of a web interface, and who asks for it.
#[derive(Clone, Debug)]
pub(crate) struct Page {
    pub(crate) url: String,
    /// The value of HTTP's header `Authorization`.
    pub(crate) authorization: Option<String>,
}

impl Page {
    pub(crate) fn of(url: String) -> Page {
        Page {
            url,
            authorization: None,
        }
    }

    pub(crate) fn basic(url: String, user: impl fmt::Display, password: &str) -> Page {
        let login = BASE64_STANDARD.encode(format!("{user}:{password}"));
        Page {
            url,
            authorization: Some(format!("Basic {login}")),
        }
    }

    pub(crate) fn bearer(url: String, token: &str) -> Page {
        Page {
            url,
            authorization: Some(format!("Bearer {token}")),
        }
    }

    /// The status and the body of a GET; `None` if there was no answer within `patience`.
    pub(crate) fn get(&self, patience: Duration) -> Option<(u16, String)> {
        let mut request = agent(patience).get(&self.url);
        if let Some(authorization) = &self.authorization {
            request = request.header("authorization", authorization);
        }
        answer(request.call())
    }

    /// The same of a POST of JSON.
    pub(crate) fn post(&self, json: &str, patience: Duration) -> Option<(u16, String)> {
        let mut request = agent(patience)
            .post(&self.url)
            .header("content-type", "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header("authorization", authorization);
        }
        answer(request.send(json))
    }
}

fn agent(patience: Duration) -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_global(Some(patience))
        .http_status_as_error(false)
        // A proxy from the environment is for the world outside.
        .proxy(None)
        .build()
        .new_agent()
}

fn answer(
    response: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
) -> Option<(u16, String)> {
    let mut response = response.ok()?;
    let body = response.body_mut().read_to_string().ok()?;
    Some((response.status().as_u16(), body))
}

/// The status and the body of an HTTP GET, as RabbitMQ's user `guest` where that matters; `None` if there was no answer
/// within `patience`.
pub fn http_get(url: &str, patience: Duration) -> Option<(u16, String)> {
    Page::basic(url.to_owned(), "guest", "guest").get(patience)
}

fn connect(address: &str, patience: Duration) -> Option<TcpStream> {
    let mut addresses = address.to_socket_addrs().ok()?;
    addresses.find_map(|address| TcpStream::connect_timeout(&address, patience).ok())
}
