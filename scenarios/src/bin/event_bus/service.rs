//! The services: what they do with an event, and how they get it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::Subscriber;
use async_nats::jetstream::AckKind;
use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::message::PublishMessage;
use futures::{StreamExt, TryStreamExt};

use crate::books::{Books, Known};
use crate::bus::{Bus, DEAD};
use crate::event::{ALL, CREATED, Event};
use crate::mail::{Posted, Postman};
use crate::shutdown::Stop;

/// How many events an instance takes, and handles at the same time: most of a mail's time is waiting. It takes no more
/// than that, as the time until an event must be acknowledged begins when it is taken.
const AT_ONCE: usize = 8;
/// How long an end waits for a server that may be away.
const PATIENCE: Duration = Duration::from_secs(5);
/// What a dead letter's headers may take of the room that a message has.
const HEADERS: usize = 8 * 1024;
/// How often core NATS's services try, since nobody gives an event to them again.
const TRIES: u32 = 5;

pub enum Work {
    /// Sends a mail to each new user.
    Email(Box<Postman>),
    /// Notes whatever happens to users, where a real one would push it to phones.
    Notification,
    /// The same on JetStream, from the first event that is kept: a service that came later.
    Audit,
}

/// What became of an event.
enum Outcome {
    Done(String),
    /// It was done before.
    Repeated,
    /// It may work later.
    Later(String),
    /// It never will.
    Never(String),
}

/// What was done so far, for whoever watches.
#[derive(Default)]
pub struct Meter {
    pub handled: AtomicU64,
    pub skipped: AtomicU64,
}

#[derive(Clone)]
pub struct Service {
    pub name: &'static str,
    subject: &'static str,
    work: Arc<Work>,
    books: Books,
    bus: Bus,
    ack_wait: Duration,
    quiet: bool,
    pub meter: Arc<Meter>,
    stop: Stop,
}

impl Service {
    pub fn new(
        work: Work,
        books: impl FnOnce(&str) -> Result<Books>,
        bus: &Bus,
        ack_wait: Duration,
        quiet: bool,
        stop: &Stop,
    ) -> Result<Service> {
        let (name, subject) = match work {
            Work::Email(_) => ("email", CREATED),
            Work::Notification => ("notification", ALL),
            Work::Audit => ("audit", ALL),
        };
        Ok(Service {
            name,
            subject,
            work: Arc::new(work),
            books: books(name)?,
            bus: bus.clone(),
            ack_wait,
            quiet,
            meter: Arc::default(),
            stop: stop.clone(),
        })
    }

    async fn handle(&self, subject: &str, payload: &[u8]) -> Result<Outcome> {
        let event = match Event::read(subject, payload) {
            Ok(event) => event,
            Err(reason) => return Ok(Outcome::Never(reason)),
        };
        let Work::Email(postman) = &*self.work else {
            let told = format!("{} {}", event.subject(), event.user().user_id);
            return Ok(match self.books.once(&event)? {
                true => Outcome::Done(told),
                false => Outcome::Repeated,
            });
        };
        // A mail server cannot take part in a transaction of ours. A kill between its answer and our mark leaves
        // the event in doubt; the mail is sent again, under the same Message-ID. The other way round, the mark
        // first, some users would get no mail.
        let known = self.books.begin(&event)?;
        if known == Known::Done {
            return Ok(Outcome::Repeated);
        }
        if known == Known::InDoubt {
            tracing::info!("email: {} may have been sent before, again", event.id());
        }
        Ok(match postman.welcome(&event).await {
            Posted::Accepted => {
                self.books.done(&event)?;
                Outcome::Done(format!("mail to {}", event.user().email))
            }
            Posted::Unknown(reason) => Outcome::Later(reason),
            Posted::NotNow(reason) => {
                if known == Known::New {
                    self.books.undo(&event)?;
                }
                Outcome::Later(reason)
            }
            Posted::Refused(reason) => {
                if known == Known::New {
                    self.books.undo(&event)?;
                }
                Outcome::Never(reason)
            }
        })
    }

    fn tell(&self, text: &str) {
        self.meter.handled.fetch_add(1, Ordering::Relaxed);
        if !self.quiet {
            println!("{}: {text}", self.name);
        }
    }

    fn skip(&self, subject: &str, reason: &str) {
        self.meter.skipped.fetch_add(1, Ordering::Relaxed);
        eprintln!("{}: {subject:?} skipped: {reason}", self.name);
    }

    /// Joins the service's queue group on core NATS.
    pub async fn subscribe(&self) -> Result<Subscriber> {
        let group = self.name.to_owned();
        let subscriber = self.bus.client.queue_subscribe(self.subject, group).await?;
        // From here on the server knows it.
        self.bus.flush().await?;
        Ok(subscriber)
    }

    /// Core NATS: what arrives is handled, what fails is reported, and nothing comes twice.
    pub async fn listen(&self, mut subscriber: Subscriber) -> Result<()> {
        loop {
            let message = tokio::select! {
                message = subscriber.next() => message,
                () = self.stop.wait() => break,
            };
            let Some(message) = message else {
                return Ok(());
            };
            self.attempt(&message.subject, &message.payload).await?;
        }
        // The server sends nothing more; what it has sent is handled. That there is no more, it must say itself.
        subscriber.drain().await?;
        loop {
            let Ok(message) = tokio::time::timeout(PATIENCE, subscriber.next()).await else {
                let name = self.name;
                tracing::warn!("{name}: NATS does not answer; what it still had is lost");
                return Ok(());
            };
            let Some(message) = message else {
                return Ok(());
            };
            self.attempt(&message.subject, &message.payload).await?;
        }
    }

    async fn attempt(&self, subject: &str, payload: &[u8]) -> Result<()> {
        for attempt in 1.. {
            match self.handle(subject, payload).await? {
                Outcome::Done(text) => self.tell(&text),
                Outcome::Repeated => {}
                Outcome::Later(reason) if attempt < TRIES && !self.stop.is_set() => {
                    tracing::warn!("{}: {reason}, again", self.name);
                    self.stop.within(delay(attempt.into())).await;
                    continue;
                }
                Outcome::Later(reason) | Outcome::Never(reason) => {
                    self.skip(subject, &one_line(&reason));
                }
            }
            break;
        }
        Ok(())
    }

    /// JetStream: what is not acknowledged comes again, to this instance or to another one.
    pub async fn consume(&self) -> Result<()> {
        let mut lost = false;
        while !self.stop.is_set() {
            let ended = match self
                .bus
                .consumer(self.name, self.subject, self.ack_wait)
                .await
            {
                Ok(consumer) => {
                    if std::mem::take(&mut lost) {
                        tracing::info!("{}: going on", self.name);
                    }
                    self.batches(&consumer).await
                }
                Err(error) => Err(Failure::Bus(error)),
            };
            match ended {
                Ok(()) => break,
                Err(Failure::Own(error)) => return Err(error),
                Err(Failure::Bus(error)) => {
                    if !std::mem::replace(&mut lost, true) {
                        let name = self.name;
                        tracing::warn!("{name}: interrupted ({error:#}), trying until it works");
                    }
                    self.stop.within(Duration::from_millis(500)).await;
                }
            }
        }
        Ok(())
    }

    async fn batches(
        &self,
        consumer: &async_nats::jetstream::consumer::Consumer<pull::Config>,
    ) -> Result<(), Failure> {
        while !self.stop.is_set() {
            let batch = consumer.batch().max_messages(AT_ONCE);
            let batch = batch.expires(Duration::from_secs(1)).messages().await;
            let batch = batch.map_err(Failure::bus)?.map_err(Failure::boxed);
            // One failure does not end the others: they may be in the middle of a mail.
            batch
                .map(|message| async move {
                    let message = message?;
                    // What this instance does not do any more, another one gets at once.
                    let ack = match self.stop.is_set() {
                        true => AckKind::Nak(None),
                        false => self.settle(&message).await?,
                    };
                    // A lost acknowledgement would only mean that the event comes again; waiting for the
                    // answer means that after the end of this process there is none on its way.
                    message.double_ack_with(ack).await.map_err(Failure::boxed)
                })
                .buffer_unordered(AT_ONCE)
                .fold(Ok(()), |first, next| async { first.and(next) })
                .await?;
        }
        Ok(())
    }

    /// Handles an event, and says what to answer.
    async fn settle(&self, message: &async_nats::jetstream::Message) -> Result<AckKind, Failure> {
        let info = message.info().map_err(Failure::boxed)?;
        let outcome = self.handle(&message.subject, &message.payload).await;
        Ok(match outcome.map_err(Failure::Own)? {
            Outcome::Done(text) => {
                self.tell(&text);
                AckKind::Ack
            }
            Outcome::Repeated => AckKind::Ack,
            Outcome::Later(reason) => {
                tracing::warn!("{}: {reason}, later", self.name);
                AckKind::Nak(Some(delay(info.delivered)))
            }
            Outcome::Never(reason) => {
                let reason = one_line(&reason);
                let mut letter = PublishMessage::build()
                    .header("reason", reason.as_str())
                    .header("service", self.name)
                    .header("subject", one_line(&message.subject))
                    .header("sequence", info.stream_sequence.to_string())
                    // A kill between this and the answer: the same letter again, and stored once.
                    .message_id(format!("{}-{}", self.name, info.stream_sequence));
                // An event can be as large as the server allows; with the letter's headers it would be larger.
                let size = message.payload.len();
                let room = self.bus.client.max_payload().saturating_sub(HEADERS);
                if size > room {
                    letter = letter.header("truncated-from", size.to_string());
                }
                let letter = letter.payload(message.payload.slice(..size.min(room)));
                let sent = self
                    .bus
                    .jetstream
                    .send_publish(format!("{DEAD}.{}", self.name), letter)
                    .await
                    .map_err(Failure::bus)?;
                sent.await.map_err(Failure::bus)?;
                // For the report, which would wait for it without an end.
                if let Ok(event) = Event::read(&message.subject, &message.payload) {
                    self.books.refuse(&event).map_err(Failure::Own)?;
                }
                self.skip(
                    &message.subject,
                    &format!("{reason}; it is in {}", crate::bus::DEAD_STREAM),
                );
                AckKind::Term
            }
        })
    }
}

/// Why a service stops consuming.
enum Failure {
    /// The broker is away, or the consumer is gone: begin anew.
    Bus(anyhow::Error),
    /// Its own books do not work.
    Own(anyhow::Error),
}

impl Failure {
    fn bus(error: impl std::error::Error + Send + Sync + 'static) -> Failure {
        Failure::Bus(error.into())
    }

    fn boxed(error: Box<dyn std::error::Error + Send + Sync>) -> Failure {
        Failure::Bus(anyhow::Error::from_boxed(error))
    }
}

/// Half a second, doubled with each attempt, up to half a minute.
fn delay(attempt: i64) -> Duration {
    let doubled = 500u64 << attempt.clamp(1, 7).saturating_sub(1);
    Duration::from_millis(doubled.min(30_000))
}

/// A header has one line, and a reason may quote the event, which is of any size.
fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(500)
        .collect()
}

/// What a service needs to be told when it starts.
pub async fn run(service: &Service, durable: bool) -> Result<()> {
    if durable {
        // Made before anything is said, so that what fails here fails readably.
        service
            .bus
            .consumer(service.name, service.subject, service.ack_wait)
            .await
            .with_context(|| format!("{}: no durable consumer", service.name))?;
        println!("{}: working, Ctrl-C ends it", service.name);
        return service.consume().await;
    }
    let subscriber = service.subscribe().await?;
    println!("{}: listening, Ctrl-C ends it", service.name);
    service.listen(subscriber).await
}
