//! Leader election: a lease in a key-value bucket, and a token that fences the one who lost it
//!
//! Whoever creates the key leads, and renews it; the bucket removes a key that nobody renews for three seconds. A lease
//! alone never guarantees a single leader: one that was frozen believes in its lease for a moment after it woke up. So
//! its work carries a token, the revision with which it was elected, and what it works on refuses an older one.
//!
//! ```console
//! 1$ cargo lab run nats_leader_election anna
//! anna leads with token [..]
//! anna: count 1, token [..]
//! ...
//! 2$ cargo lab run nats_leader_election ben
//! ben waits: anna leads
//! 1^C
//! ...
//! anna has given it up
//! 2:
//! ben leads with token [..]
//! ben: count [..], token [..]
//! ...
//! 2^C
//! ...
//! ben has given it up
//! ```
//!
//! Notice: a leader that ends deletes the key, and another takes over at once; one that was killed is followed after
//! the lease. The time of a lease is counted from before its renewal was sent: the server may have had it at once. The
//! new leader writes its token before anything else, which shuts out the old one. A resource that can't check a token,
//! such as most web services, can't be protected in this way, and then what two leaders do at once must not harm.
//!
//! Try: start three; the first one leads: `cargo lab kill nats_leader_election.1`. Freeze the next leader with
//! `cargo lab pause nats_leader_election.2`, or `.3`, and after ten seconds `cargo lab resume nats_leader_election.2`:
//! it wakes up, is refused, and waits like the others.
//!
//! Settings: NATS_URL (nats://localhost:4222); the argument is a name. See also: nats_kv.

use std::pin::{Pin, pin};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use async_nats::jetstream::kv::{self, CreateErrorKind, Operation, Store, UpdateErrorKind};
use async_nats::jetstream::{self, Context, stream};
use tokio::time::sleep;

const LEASE: Duration = Duration::from_secs(3);
const RENEW: Duration = Duration::from_secs(1);
const STEP: Duration = Duration::from_millis(200);
const LEADER: &str = "leader";
const COUNTER: &str = "counter";

#[tokio::main]
async fn main() -> Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let name = std::env::args().nth(1);
    let name = name.unwrap_or_else(|| format!("candidate-{}", std::process::id()));
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    let mut jetstream = jetstream::new(client);
    // An answer that takes longer is of no use to a leader.
    jetstream.set_timeout(RENEW);
    let lease = declare(&jetstream, "election", LEASE).await?;
    // For ever.
    let work = declare(&jetstream, "election-work", Duration::ZERO).await?;

    let mut stop = pin!(tokio::signal::ctrl_c());
    let mut known = String::new();
    loop {
        let asked = Instant::now();
        match lease.create(LEADER, name.clone().into()).await {
            Ok(revision) => {
                println!("{name} leads with token {revision}");
                known.clear();
                let mut term = Term {
                    name: &name,
                    lease: &lease,
                    work: &work,
                    token: revision,
                    revision,
                    until: asked + LEASE,
                };
                match term.lead(stop.as_mut()).await {
                    Ok(()) => {
                        term.give_up().await;
                        return Ok(());
                    }
                    Err(reason) => println!("{name} steps down: {reason:#}"),
                }
            }
            Err(error) if error.kind() == CreateErrorKind::AlreadyExists => {
                if let Ok(Some(leader)) = lease.get(LEADER).await {
                    let leader = String::from_utf8_lossy(&leader).into_owned();
                    if leader != known {
                        println!("{name} waits: {leader} leads");
                        known = leader;
                    }
                }
            }
            // Without an ack it is not ours. If the server has it all the same, it expires.
            Err(error) => eprintln!("{name}: cannot ask for the lease: {error}"),
        }
        // A key that expires is announced only from server 2.11 on, so this asks.
        tokio::select! {
            // Polled first: only then is Ctrl-C ours, also during the first piece of work.
            biased;
            signal = &mut stop => {
                signal?;
                println!("{name} waits no more");
                return Ok(());
            }
            () = sleep(STEP) => {}
        }
    }
}

async fn declare(jetstream: &Context, bucket: &str, max_age: Duration) -> Result<Store> {
    if jetstream.client().is_server_compatible(2, 10, 0) {
        let config = kv::Config {
            bucket: bucket.into(),
            max_age,
            ..Default::default()
        };
        return Ok(jetstream.create_or_update_key_value(config).await?);
    }
    // This client can't read what an older server says of the account, which it asks first. A bucket is such a stream:
    let stream = stream::Config {
        name: format!("KV_{bucket}"),
        subjects: vec![format!("$KV.{bucket}.>")],
        max_messages_per_subject: 1,
        max_age,
        allow_rollup: true,
        deny_delete: true,
        allow_direct: true,
        discard: stream::DiscardPolicy::New,
        ..Default::default()
    };
    jetstream.create_or_update_stream(stream).await?;
    Ok(jetstream.get_key_value(bucket).await?)
}

struct Term<'a> {
    name: &'a str,
    lease: &'a Store,
    work: &'a Store,
    /// The revision of the election. It rises from leader to leader.
    token: u64,
    /// The revision of the last renewal.
    revision: u64,
    until: Instant,
}

impl Term<'_> {
    /// Until Ctrl-C. An error is the end of the term.
    async fn lead<F: Future<Output = std::io::Result<()>>>(
        &mut self,
        mut stop: Pin<&mut F>,
    ) -> Result<()> {
        let mut renewed = Instant::now();
        loop {
            self.step().await?;
            if renewed.elapsed() >= RENEW && self.renew().await? {
                renewed = Instant::now();
            }
            anyhow::ensure!(Instant::now() < self.until, "the lease is over");
            tokio::select! {
                signal = &mut stop => return Ok(signal?),
                () = sleep(STEP) => {}
            }
        }
    }

    /// Whether it is renewed. An error is a certain loss; no answer is not, as long as the lease lasts.
    async fn renew(&mut self) -> Result<bool> {
        let asked = Instant::now();
        let value = self.name.to_owned().into();
        match self.lease.update(LEADER, value, self.revision).await {
            Ok(revision) => {
                self.revision = revision;
                self.until = asked + LEASE;
                Ok(true)
            }
            Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => {
                Err(error).context("another leads, or the answer to a renewal was lost")
            }
            Err(error) => {
                eprintln!("{}: not renewed: {error}", self.name);
                Ok(false)
            }
        }
    }

    /// The work: count. What is stored is the token of the last writer, and the count.
    async fn step(&self) -> Result<()> {
        let stored = self
            .work
            .entry(COUNTER)
            .await
            .context("cannot read the counter")?;
        let stored = stored.filter(|entry| entry.operation == Operation::Put);
        let (token, count, revision) = match &stored {
            Some(entry) => {
                let text = String::from_utf8_lossy(&entry.value);
                let (token, count) = text.split_once(' ').context("no counter")?;
                (token.parse()?, count.parse::<u64>()?, entry.revision)
            }
            None => (0, 0, 0),
        };
        // The check and the write are one: the write is refused if anybody wrote after we have read.
        anyhow::ensure!(
            token <= self.token,
            "fenced, token {token} is newer than {}",
            self.token
        );
        let next = format!("{} {}", self.token, count + 1);
        self.work
            .update(COUNTER, next.into(), revision)
            .await
            .context("the counter has changed, or there is no answer")?;
        println!("{}: count {}, token {}", self.name, count + 1, self.token);
        Ok(())
    }

    /// Only if it is still ours.
    async fn give_up(&self) {
        let deleted = self
            .lease
            .delete_expect_revision(LEADER, Some(self.revision))
            .await;
        match deleted {
            Ok(()) => println!("{} has given it up", self.name),
            Err(error) => eprintln!("{}: not given up, it will expire: {error}", self.name),
        }
    }
}
