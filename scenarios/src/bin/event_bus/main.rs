//! Event bus: user, email and notification services on NATS, and one real mail for each user.
//!
//! ```text
//!                 event-bus.user.created ──▶ email ──▶ SMTP ──▶ mailbox (or your mail server)
//!  user (outbox) ─┤
//!                 event-bus.user.>       ──▶ notification      (and audit, which comes later)
//! ```
//!
//! `event_bus` uses core NATS: at most once, to whoever listens at that moment. `event_bus --durable` uses
//! JetStream: at least once, with each effect once. A service that was down gets what it missed, one that is
//! new gets all that is kept (a week), and SIGKILL of any service, or of NATS, loses and doubles nothing. How:
//!
//! - A user and his event are written in one transaction, and published from there until the stream's
//!   acknowledgement is back, under an id by which the stream drops a second copy.
//! - An event is acknowledged after its effect. It may come again; mark and effect are one transaction in
//!   the service's SQLite file, so the effect does not.
//! - A mail cannot be in that transaction. Killed between the mail server's answer and the mark, a service
//!   cannot know, and sends the mail again: under the same Message-ID, by which whoever keeps it sees that it
//!   is the same. The mailbox here does, as mail stores do. The report counts both, and every such doubt.
//! - What no service of this version can read, and what the mail server refuses for good, is a poison event. It
//!   goes to the stream `EVENT_BUS_DEAD` with the reason, once for each service, and is terminated. On core
//!   NATS it is reported and skipped. What may work later comes again, later and later, without an end.
//!
//! ```console
//! $ cargo lab run event_bus
//! mailbox: smtp://127.0.0.1:[..]
//! ...
//! users created                                           10
//! events published                                        12
//! mails sent                                              10
//! mails that the mailbox accepted                         10
//! of these repeats, suppressed by Message-ID               0
//! mails in the mailbox                                    10
//! users with a mail in the mailbox                        10
//! notifications                                           12
//! ...
//! 22 effects due / 22 done / 0 lost / 0 duplicate
//! 1$ cargo lab run event_bus user --durable --users 3
//! user: run [..]
//! user: 3 users created, 3 events published
//! 2$ cargo lab run event_bus email --durable
//! mailbox: smtp://127.0.0.1:[..]
//! email: working, Ctrl-C ends it
//! ...
//! email: mail to user-3@example.org
//! ...
//! 3$ cargo lab run event_bus audit --durable
//! audit: working, Ctrl-C ends it
//! ...
//! audit: event-bus.user.created [..]-000003
//! ...
//! 2^C
//! email: 3 events handled, 0 skipped
//! 3^C
//! audit: 3 events handled, 0 skipped
//! ```
//!
//! Notice: `email` and `audit` were not there when the events were published. Several instances of a service
//! share its work, by a queue group or by the durable consumer of its name. They share its books, too.
//!
//! Try: `cargo lab kill event_bus.2`, or another service, during
//! `event_bus user --durable --users 5000 --rate 100`, and start it again; then `event_bus report`.
//! `nats pub event-bus.user.created hello`: that is no event. The same without `--durable`: what was
//! published while a service was down is gone. SMTP_URL with nobody behind it, and then with.
//!
//! What is not promised: JetStream syncs to disk every two minutes by default, so this is survival of a process
//! crash, not of a power loss. A mail server that does not look at the Message-ID delivers a repeated mail
//! twice; repeats happen only when a service dies, or the connection does, between the server's answer and the
//! mark. Instances on several machines need books that they share, such as a database server.
//!
//! Settings: NATS_URL (nats://localhost:4222), SMTP_URL (a mailbox that is started here), MAIL_FROM, RUST_LOG
//! (info); `event_bus --help` for the rest. See also: docs/event-bus.md.

mod books;
mod bus;
mod event;
mod mail;
mod mailbox;
mod report;
mod service;
mod shutdown;
mod user;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use tracing_subscriber::EnvFilter;

use crate::books::Books;
use crate::bus::Bus;
use crate::mail::Postman;
use crate::mailbox::Mailbox;
use crate::report::Ledger;
use crate::service::{Service, Work};
use crate::shutdown::Stop;
use crate::user::{Users, What};

/// Tells services about users over NATS, and sends each user one mail.
///
/// Without a command it runs all services in this one process until everything is done, and reports.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    what: What,
    #[command(flatten)]
    common: Common,
    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
}

#[derive(Subcommand)]
enum Command {
    /// Creates users, publishes what happened to them, and ends
    User {
        #[command(flatten)]
        what: What,
        #[command(flatten)]
        common: Common,
    },
    /// Sends a mail to each new user
    Email(Common),
    /// Notes all that happens to users
    Notification(Common),
    /// The same again: a service that was added later
    Audit(Common),
    /// Takes mails, shows them, and keeps each once
    Mailbox {
        #[arg(long, default_value = "127.0.0.1:2525")]
        listen: String,
        #[command(flatten)]
        common: Common,
    },
    /// Waits until all is done that follows from a durable run, and adds up
    Report {
        /// The run, instead of the newest one
        #[arg(long)]
        run: Option<String>,
        /// How many seconds to wait
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        timeout: u64,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Args)]
struct Common {
    /// Use JetStream: events wait for services that are away
    #[arg(long)]
    durable: bool,
    /// How many seconds JetStream waits for an acknowledgement before it delivers an event again
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    ack_wait: u64,
    /// Folder of the services' books [default: the user's local data]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Do not tell of every single event
    #[arg(long, short)]
    quiet: bool,
    /// How many seconds a start waits for NATS
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    wait: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // The client says itself what our own lines say better.
    let filter = match "async_nats=error".parse() {
        Ok(directive) if std::env::var_os("RUST_LOG").is_none() => filter.add_directive(directive),
        _ => filter,
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match start(Cli::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// True if all went as it should.
async fn start(cli: Cli) -> Result<bool> {
    let stop = &Stop::on_signals()?;
    match cli.command {
        None => everything(&cli, stop).await,
        Some(Command::User { what, common }) => {
            let bus = common.bus(stop).await?;
            let users = Users::open(&common.folder()?)?;
            let run = users.begin(&what, &common.stream(&bus).await?)?;
            println!("user: run {run}");
            users.run(&run, &what, &bus, common.durable, stop).await?;
            let run = users.find(Some(&run))?.context("the run is gone")?;
            println!(
                "user: {} users created, {} events published{}",
                run.users,
                run.published,
                if run.done { "" } else { ", not complete" }
            );
            Ok(run.done)
        }
        Some(Command::Email(common)) => {
            let bus = common.bus(stop).await?;
            let service = common.email(&bus, stop)?;
            common.run(&service).await
        }
        Some(Command::Notification(common)) => {
            let bus = common.bus(stop).await?;
            common
                .run(&common.service(Work::Notification, &bus, stop)?)
                .await
        }
        Some(Command::Audit(common)) => {
            let bus = common.bus(stop).await?;
            common.run(&common.service(Work::Audit, &bus, stop)?).await
        }
        Some(Command::Mailbox { listen, common }) => {
            let mailbox = Mailbox::open(&common.folder()?, common.quiet)?;
            println!("mailbox: smtp://{}", mailbox.listen(&listen)?);
            stop.wait().await;
            Ok(true)
        }
        Some(Command::Report {
            run,
            timeout,
            common,
        }) => {
            let bus = common.bus(stop).await?;
            bus.streams().await?;
            let ledger = Ledger::open(&common.folder()?)?;
            let limit = Some(Duration::from_secs(timeout));
            let sums = ledger
                .wait(run.as_deref(), limit, None, stop, |_| {})
                .await?
                .context("there was no run yet")?;
            Ok(sums.print(Some(bus.dead_letters().await?), None))
        }
    }
}

impl Common {
    /// The connection, and on it the streams, if they are used.
    async fn bus(&self, stop: &Stop) -> Result<Bus> {
        let bus = Bus::connect(Duration::from_secs(self.wait), stop).await?;
        if self.durable {
            bus.streams().await?;
        }
        Ok(bus)
    }

    async fn stream(&self, bus: &Bus) -> Result<String> {
        match self.durable {
            true => bus.stream().await,
            false => Ok(String::new()),
        }
    }

    fn folder(&self) -> Result<PathBuf> {
        books::folder(self.state.as_deref())
    }

    fn service(&self, work: Work, bus: &Bus, stop: &Stop) -> Result<Service> {
        let folder = self.folder()?;
        let books = |name: &str| Books::of_service(&folder, name);
        let ack_wait = Duration::from_secs(self.ack_wait);
        Service::new(work, books, bus, ack_wait, self.quiet, stop)
    }

    fn email(&self, bus: &Bus, stop: &Stop) -> Result<Service> {
        let url = match std::env::var("SMTP_URL") {
            Ok(url) => url,
            Err(_) => self.mailbox(&self.folder()?)?,
        };
        let postman = Postman::new(&url, Duration::from_secs(self.ack_wait))?;
        self.service(Work::Email(Box::new(postman)), bus, stop)
    }

    /// Starts a mailbox in this process.
    fn mailbox(&self, folder: &Path) -> Result<String> {
        let mailbox = Mailbox::open(folder, self.quiet)?;
        let url = format!("smtp://{}", mailbox.listen("127.0.0.1:0")?);
        println!("mailbox: {url}");
        Ok(url)
    }

    async fn run(&self, service: &Service) -> Result<bool> {
        service::run(service, self.durable).await?;
        println!(
            "{}: {} events handled, {} skipped",
            service.name,
            service.meter.handled.load(Ordering::Relaxed),
            service.meter.skipped.load(Ordering::Relaxed)
        );
        Ok(true)
    }
}

/// All services in this one process, each a task.
async fn everything(cli: &Cli, stop: &Stop) -> Result<bool> {
    let common = Common {
        // A line for each event is for a few of them.
        quiet: cli.common.quiet || cli.what.users > 20,
        durable: cli.common.durable,
        ack_wait: cli.common.ack_wait,
        state: cli.common.state.clone(),
        wait: cli.common.wait,
    };
    let bus = common.bus(stop).await?;
    let folder = common.folder()?;
    let halt = Stop::new();
    let services = [
        common.email(&bus, &halt)?,
        common.service(Work::Notification, &bus, &halt)?,
    ];
    let mut tasks = tokio::task::JoinSet::new();
    for service in services.clone() {
        if common.durable {
            tasks.spawn(async move { service.consume().await.map(|()| service.name) });
        } else {
            // On core NATS, who is not there yet gets nothing: first everybody listens, then users are created.
            let subscriber = service.subscribe().await?;
            tasks.spawn(async move { service.listen(subscriber).await.map(|()| service.name) });
        }
    }
    let users = Users::open(&folder)?;
    let run = users.begin(&cli.what, &common.stream(&bus).await?)?;
    {
        let (run, what, bus, halt) = (run.clone(), cli.what.clone(), bus.clone(), halt.clone());
        let durable = common.durable;
        tasks.spawn(async move {
            let created = users.run(&run, &what, &bus, durable, &halt).await;
            created.map(|()| "user")
        });
    }

    let bar = std::io::stderr().is_terminal().then(|| {
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} done, {per_sec}") {
            bar.set_style(style);
        }
        bar
    });
    let mut said = tokio::time::Instant::now();
    let ledger = Ledger::open(&folder)?;
    // On core NATS what is lost does not come any more.
    let quiet_after = (!common.durable).then_some(Duration::from_secs(10));
    let limit = cli.timeout.map(Duration::from_secs);
    let waiting = ledger.wait(Some(&run), limit, quiet_after, stop, |sums| {
        let (done, due) = sums.progress();
        match &bar {
            Some(bar) if common.quiet => {
                bar.set_length(due);
                bar.set_position(done);
            }
            None if said.elapsed() > Duration::from_secs(2) => {
                said = tokio::time::Instant::now();
                eprintln!("{done} of {due} done");
            }
            _ => {}
        }
    });
    let failed = async {
        // By itself a service ends only with an error, except for the one that creates the users.
        loop {
            match tasks.join_next().await {
                Some(ended) => match ended?? {
                    "user" => {}
                    name => anyhow::bail!("{name} has ended"),
                },
                None => anyhow::bail!("all services have ended"),
            }
        }
    };
    let waited: Result<()> = tokio::select! {
        sums = waiting => sums.map(drop),
        failed = failed => failed,
    };
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    halt.set();
    let mut ended = waited;
    while let Some(task) = tasks.join_next().await {
        ended = ended.and(task?.map(drop));
    }
    ended?;
    let sums = ledger.sums(Some(&run))?.context("the run is gone")?;
    let dead = match common.durable {
        true => Some(bus.dead_letters().await?),
        false => None,
    };
    let skipped = services
        .iter()
        .map(|service| service.meter.skipped.load(Ordering::Relaxed))
        .sum();
    if stop.is_set() {
        println!("interrupted");
    }
    Ok(sums.print(dead, Some(skipped)))
}
