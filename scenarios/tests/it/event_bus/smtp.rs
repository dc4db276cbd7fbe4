//! A mail server that notes everything it accepts, and misbehaves on demand.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::Result;

#[derive(Clone, Debug)]
pub struct Mail {
    pub recipient: String,
    pub id: String,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Not now.
    Busy,
    /// Not at this point of the dialogue.
    Sequence,
    /// Never.
    Refuse,
    /// The mail is accepted, and the sender never learns it.
    Hold,
}

pub struct MailServer {
    pub url: String,
    mails: Arc<Mutex<Vec<Mail>>>,
    /// Told of each fault that has happened.
    pub happened: Receiver<Fault>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MailServer {
    pub fn start(faults: &[Fault]) -> Result<MailServer> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let url = format!("smtp://{}", listener.local_addr()?);
        let mails = Arc::new(Mutex::new(Vec::new()));
        let faults = Arc::new(Mutex::new(faults.iter().copied().collect::<VecDeque<_>>()));
        let (sender, happened) = channel();
        let noted = Arc::clone(&mails);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (mails, faults, sender) =
                    (Arc::clone(&noted), Arc::clone(&faults), sender.clone());
                thread::spawn(move || serve(&stream, &mails, &faults, &sender));
            }
        });
        Ok(MailServer {
            url,
            mails,
            happened,
        })
    }

    /// All mails that were accepted, repeats too.
    pub fn mails(&self) -> Vec<Mail> {
        lock(&self.mails).clone()
    }
}

fn serve(
    mut stream: &TcpStream,
    mails: &Mutex<Vec<Mail>>,
    faults: &Mutex<VecDeque<Fault>>,
    happened: &Sender<Fault>,
) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.write_all(b"220 test\r\n")?;
    let mut recipient = String::new();
    let mut lines = BufReader::new(stream).lines();
    while let Some(line) = lines.next() {
        let line = line?;
        let answer = if line.starts_with("DATA") {
            stream.write_all(b"354 go on\r\n")?;
            let mut id = String::new();
            for line in lines.by_ref() {
                let line = line?;
                if let Some(found) = line.strip_prefix("Message-ID:") {
                    id = found.trim().to_owned();
                }
                if line == "." {
                    break;
                }
            }
            let fault = lock(faults).pop_front();
            if matches!(fault, None | Some(Fault::Hold)) {
                let recipient = recipient.clone();
                lock(mails).push(Mail { recipient, id });
            }
            if let Some(fault) = fault {
                happened.send(fault)?;
            }
            match fault {
                Some(Fault::Busy) => "451 busy",
                Some(Fault::Sequence) => "503 bad sequence of commands",
                Some(Fault::Refuse) => "550 not for this user",
                Some(Fault::Hold) => loop {
                    thread::park();
                },
                None => "250 taken",
            }
        } else if let Some(to) = line.strip_prefix("RCPT TO:<") {
            recipient = to.split('>').next().unwrap_or_default().to_owned();
            if recipient.starts_with("nobody@") {
                "550 no such user"
            } else {
                "250 fine"
            }
        } else if line.starts_with("QUIT") {
            stream.write_all(b"221 bye\r\n")?;
            return Ok(());
        } else {
            "250 fine"
        };
        stream.write_all(format!("{answer}\r\n").as_bytes())?;
    }
    Ok(())
}
