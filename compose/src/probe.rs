//! Is a broker listening there, and is it the right one?
//!
//! An open port says little: brokers accept connections seconds before they serve, and the port may belong to another
//! program altogether. Each service is asked for the first step of its own protocol's handshake.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

/// What was found at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing listens.
    Nothing,
    /// The service answered in its own protocol.
    Ready,
    /// Something listens, and either is another program or cannot serve yet.
    Other,
}

/// A question in a broker's protocol, and how its answer begins.
struct Handshake {
    ask: &'static [u8],
    answer: fn(&[u8]) -> bool,
}

/// ApiVersions request, version 0, correlation id 7, no client id.
const KAFKA: Handshake = Handshake {
    ask: &[0, 0, 0, 10, 0, 18, 0, 0, 0, 0, 0, 7, 0xff, 0xff],
    answer: |bytes| bytes.len() >= 10 && bytes[4..10] == [0, 0, 0, 7, 0, 0],
};

/// The protocol header of AMQP 0-9-1, answered by the method frame Connection.Start.
const AMQP: Handshake = Handshake {
    ask: b"AMQP\x00\x00\x09\x01",
    answer: |bytes| bytes.len() >= 11 && bytes[0] == 1 && bytes[7..11] == [0, 10, 0, 10],
};

/// The server speaks first.
const NATS: Handshake = Handshake {
    ask: b"",
    answer: |bytes| bytes.starts_with(b"INFO {"),
};

/// CONNECT with client version "lab" and protocol version 15, answered by CONNECTED (3).
const PULSAR: Handshake = Handshake {
    ask: &[
        0, 0, 0, 15, 0, 0, 0, 11, 0x08, 2, 0x12, 7, 0x0a, 3, b'l', b'a', b'b', 0x20, 15,
    ],
    answer: |bytes| bytes.len() >= 10 && bytes[8..10] == [0x08, 3],
};

/// Asks the service at `host:port`, the first of several with commas between, waiting at most `patience` for each step.
pub fn probe(service: crate::Service, address: &str, patience: Duration) -> Found {
    let address = address.split(',').next().unwrap_or(address);
    match service {
        crate::Service::Kafka => handshake(address, &KAFKA, patience),
        crate::Service::RabbitMq => handshake(address, &AMQP, patience),
        crate::Service::Nats => handshake(address, &NATS, patience),
        crate::Service::Pulsar => handshake(address, &PULSAR, patience),
        crate::Service::OpenSearch => {
            let body = http_get(&format!("http://{address}/"), patience);
            match body {
                Some((200, body)) if body.contains("\"cluster_name\"") => Found::Ready,
                _ if connect(address, patience).is_none() => Found::Nothing,
                _ => Found::Other,
            }
        }
    }
}

/// The status and the body of an HTTP GET; `None` if there was no answer.
pub fn http_get(url: &str, patience: Duration) -> Option<(u16, String)> {
    let agent = ureq::Agent::config_builder()
        .timeout_global(Some(patience))
        .http_status_as_error(false)
        // A proxy from the environment is for the world outside.
        .proxy(None)
        .build()
        .new_agent();
    let mut response = agent
        .get(url)
        .header("authorization", "Basic Z3Vlc3Q6Z3Vlc3Q=")
        .call()
        .ok()?;
    let body = response.body_mut().read_to_string().ok()?;
    Some((response.status().as_u16(), body))
}

fn connect(address: &str, patience: Duration) -> Option<TcpStream> {
    let mut addresses = address.to_socket_addrs().ok()?;
    addresses.find_map(|address| TcpStream::connect_timeout(&address, patience).ok())
}

fn handshake(address: &str, handshake: &Handshake, patience: Duration) -> Found {
    let Some(mut stream) = connect(address, patience) else {
        return Found::Nothing;
    };
    let timeouts = stream
        .set_read_timeout(Some(patience))
        .and(stream.set_write_timeout(Some(patience)));
    if timeouts.is_err() || stream.write_all(handshake.ask).is_err() {
        return Found::Other;
    }
    let mut answer = Vec::new();
    let mut part = [0; 512];
    while !(handshake.answer)(&answer) {
        match stream.read(&mut part) {
            Ok(0) => return Found::Other,
            Ok(length) if answer.len() < 4096 => answer.extend_from_slice(&part[..length]),
            Ok(_) => return Found::Other,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Found::Other,
        }
    }
    Found::Ready
}
