//! Just enough HTTP to ask a store, and to stand between it and the program and break things.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};

pub struct Message {
    head: String,
    pub body: Vec<u8>,
    pub status: u16,
}

impl Message {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Reads a request or an answer with a length.
    fn read(stream: &mut impl BufRead) -> Result<Option<Message>> {
        let mut head = String::new();
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line)? == 0 {
                return Ok(None);
            }
            if line == "\r\n" {
                break;
            }
            head += &line;
        }
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            let length = name.eq_ignore_ascii_case("content-length");
            length.then(|| value.trim().parse::<usize>().ok())?
        });
        let mut body = vec![0; length.unwrap_or(0)];
        stream.read_exact(&mut body)?;
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        Ok(Some(Message {
            head,
            body,
            status: status.unwrap_or(0),
        }))
    }

    /// Writes it, as the last one of its connection.
    fn write(&self, stream: &mut impl Write) -> Result<()> {
        let kept: String = self
            .head
            .lines()
            .filter(|line| {
                let name = line.split(':').next().unwrap_or_default();
                !name.eq_ignore_ascii_case("connection")
                    && !name.eq_ignore_ascii_case("content-length")
            })
            .map(|line| format!("{line}\r\n"))
            .collect();
        let length = self.body.len();
        let head = format!("{kept}connection: close\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all(&[head.as_bytes(), &self.body].concat())?;
        Ok(())
    }
}

fn ask(address: &str, request: &Message) -> Result<Message> {
    let host = address.trim_start_matches("http://");
    let mut stream = TcpStream::connect(host)?;
    request.write(&mut stream)?;
    Message::read(&mut BufReader::new(stream))?.context("no answer")
}

pub fn get(address: &str, path: &str) -> Result<Message> {
    let host = address.trim_start_matches("http://");
    ask(
        address,
        &Message {
            head: format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n"),
            body: Vec::new(),
            status: 0,
        },
    )
}

/// What happens to a bulk request on its way.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// The store never sees it; this is the answer.
    Status(u16),
    /// The store takes it, and one item of its answer is changed to 429.
    OneItemLater,
    /// The store takes it, and one item of its answer says that there are too many shards for a new index.
    OneIndexLater,
    /// The store takes it, and the connection ends without an answer.
    Cut,
    /// The store takes it, and the answer never comes.
    Hold,
}

/// Passes requests on to the store, except for the bulk requests that meet the next fault.
pub struct Proxy {
    pub address: String,
    faults: Arc<Mutex<VecDeque<Fault>>>,
    /// Told of each fault that has happened.
    pub happened: Receiver<Fault>,
}

impl Proxy {
    pub fn start(store: &str, faults: &[Fault]) -> Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = format!("http://{}", listener.local_addr()?);
        let faults = Arc::new(Mutex::new(faults.iter().copied().collect::<VecDeque<_>>()));
        let (sender, happened) = channel();
        let (store, queue) = (store.to_owned(), Arc::clone(&faults));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (store, queue, sender) = (store.clone(), Arc::clone(&queue), sender.clone());
                thread::spawn(move || serve(&stream, &store, &queue, &sender));
            }
        });
        Ok(Proxy {
            address,
            faults,
            happened,
        })
    }

    pub fn left(&self) -> usize {
        self.faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }
}

fn serve(
    mut stream: &TcpStream,
    store: &str,
    faults: &Mutex<VecDeque<Fault>>,
    happened: &Sender<Fault>,
) -> Result<()> {
    let Some(request) = Message::read(&mut BufReader::new(stream))? else {
        return Ok(());
    };
    let bulk = request.head.starts_with("POST /_bulk");
    let fault = bulk.then(|| {
        faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    });
    let (fault, mut answer) = match fault.flatten() {
        None => {
            // A store that is down looks like one: no answer.
            return ask(store, &request)?.write(&mut stream);
        }
        Some(fault) => {
            let answer = match fault {
                Fault::Status(status) => Message {
                    head: format!("HTTP/1.1 {status} Broken on purpose\r\n"),
                    body: b"{}".to_vec(),
                    status,
                },
                _ => ask(store, &request)?,
            };
            happened.send(fault)?;
            match fault {
                Fault::Cut => {
                    stream.shutdown(Shutdown::Both)?;
                    return Ok(());
                }
                Fault::Hold => loop {
                    thread::park();
                },
                Fault::Status(_) => return answer.write(&mut stream),
                Fault::OneItemLater | Fault::OneIndexLater => (fault, answer),
            }
        }
    };
    let item = match fault {
        Fault::OneIndexLater => {
            r#""status":400,"error":{"type":"validation_exception","reason":"too many shards"}"#
        }
        _ => r#""status":429,"error":{"type":"es_rejected_execution_exception","reason":"busy"}"#,
    };
    let text = answer.text().replacen(r#""status":201"#, item, 1);
    answer.body = text.into_bytes();
    answer.write(&mut stream)
}
