//! The event bus: one mail for each user under SIGKILL, late services, poison events.

mod smtp;

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream;
use compose::harness::{Example, Running, TIMEOUT, chance};
use compose::{Broker, Service};
use futures::StreamExt;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use smtp::{Fault, MailServer};

struct World {
    nats: Broker,
    state: TempDir,
    mail: MailServer,
}

impl World {
    fn new(faults: &[Fault]) -> Result<World> {
        Ok(World {
            nats: Broker::private(Service::Nats)?,
            state: tempfile::tempdir()?,
            mail: MailServer::start(faults)?,
        })
    }

    /// With the mailbox that the program brings.
    fn example(&self, args: &[&str]) -> Example {
        Example::new(env!("CARGO_BIN_EXE_event_bus"))
            .args(args)
            .args(["--wait", "60", "--state"])
            .args([self.state.path()])
            .broker(&self.nats)
    }

    fn start(&self, args: &[&str]) -> Result<Running> {
        self.example(args).env("SMTP_URL", &self.mail.url).spawn()
    }

    /// The same on JetStream, which gives an event to another one two seconds after a kill.
    fn durable(&self, args: &[&str]) -> Result<Running> {
        self.start(&[args, &["--durable", "--ack-wait", "2"]].concat())
    }

    /// What each user has got, and how many mails came twice.
    fn mails(&self) -> (BTreeMap<String, BTreeSet<String>>, usize) {
        let mut mails = BTreeMap::<String, BTreeSet<String>>::new();
        let mut repeats = 0;
        for mail in self.mail.mails() {
            let new = mails.entry(mail.recipient).or_default().insert(mail.id);
            repeats += usize::from(!new);
        }
        (mails, repeats)
    }

    fn await_mails(&self, users: usize) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        while self.mails().0.len() < users {
            ensure!(Instant::now() < deadline, "{:?}", self.mail.mails());
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// What the servers says of a durable consumer: not yet delivered, and not yet acknowledged.
    fn open(&self, service: &str) -> Result<(u64, usize)> {
        let url = self.nats.address();
        Runtime::new()?.block_on(async {
            let jetstream = jetstream::new(async_nats::connect(url).await?);
            let consumer: jetstream::consumer::PullConsumer = jetstream
                .get_consumer_from_stream(service, "EVENT_BUS")
                .await?;
            let info = consumer.cached_info();
            Ok((info.num_pending, info.num_ack_pending))
        })
    }

    /// The reasons of the dead letters by service and payload.
    fn dead_letters(&self) -> Result<BTreeMap<(String, Vec<u8>), String>> {
        let url = self.nats.address();
        Runtime::new()?.block_on(async {
            let jetstream = jetstream::new(async_nats::connect(url).await?);
            let mut stream = jetstream.get_stream("EVENT_BUS_DEAD").await?;
            let count = stream.info().await?.state.messages as usize;
            let consumer = stream
                .create_consumer(jetstream::consumer::pull::Config::default())
                .await?;
            let mut letters = BTreeMap::new();
            let mut batch = consumer.fetch().max_messages(1000).messages().await?;
            while let Some(letter) = batch.next().await {
                let letter = letter.map_err(anyhow::Error::from_boxed)?;
                let headers = letter.headers.as_ref().context("no headers")?;
                let header = |name: &str| headers.get(name).map(ToString::to_string);
                let key = (
                    header("service").context("service")?,
                    letter.payload.to_vec(),
                );
                let twice = letters.insert(key, header("reason").context("reason")?);
                ensure!(twice.is_none(), "a dead letter twice");
            }
            ensure!(letters.len() == count, "{count} dead letters");
            Ok(letters)
        })
    }

    fn publish(&self, subject: &'static str, payloads: &[&[u8]]) -> Result<()> {
        let url = self.nats.address();
        Runtime::new()?.block_on(async {
            let client = async_nats::connect(url).await?;
            for payload in payloads {
                client.publish(subject, payload.to_vec().into()).await?;
            }
            Ok(client.flush().await?)
        })
    }
}

/// The number that the report gives for `what`.
fn reported(stdout: &str, what: &str) -> Option<u64> {
    let line = stdout.lines().find(|line| line.starts_with(what))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[test]
fn every_user_gets_one_mail_though_everything_is_killed() -> Result<()> {
    const USERS: usize = 400;
    let world = World::new(&[Fault::Busy, Fault::Sequence])?;
    let mut random = chance()?;
    let user = ["user", "--users", "400", "--rate", "60"];
    let start = |part: &str| match part {
        "user" => world.durable(&user),
        part => world.durable(&[part]),
    };
    let mut running = BTreeMap::new();
    // Two instances of the email service share its work.
    for (name, part) in [
        ("email", "email"),
        ("email again", "email"),
        ("notification", "notification"),
        ("user", "user"),
    ] {
        running.insert(name, (part, start(part)?));
    }
    // The moments are random, so this waits for time, for once.
    let mut kills = 0;
    for round in 0..3 {
        for (part, process) in running.values_mut() {
            thread::sleep(Duration::from_millis(random.u64(100..500)));
            // The users may all be there by now.
            if process.try_wait()?.is_some() && *part == "user" {
                continue;
            }
            ensure!(
                process.try_wait()?.is_none(),
                "{part} ended: {:?}",
                process.lines()
            );
            process.kill()?;
            kills += 1;
            *process = start(part)?;
        }
        if round == 1 {
            world.nats.kill(1)?;
            thread::sleep(Duration::from_millis(random.u64(0..1000)));
            world.nats.restart(1)?;
        }
    }
    assert!(kills >= 9, "{kills}");
    let (_, mut user) = running.remove("user").context("user")?;
    user.wait(TIMEOUT)?.ok()?;
    let report = world
        .durable(&["report", "--timeout", "100"])?
        .wait(TIMEOUT)?
        .ok()?
        .stdout;
    let (mails, repeats) = world.mails();
    assert_eq!(mails.len(), USERS, "{report}");
    assert!(mails.values().all(|ids| ids.len() == 1), "{mails:?}");
    // Each repeat is one that the service knows it could not tell.
    let in_doubt = reported(&report, "all runs: mails in doubt").context("no line")?;
    assert!(repeats as u64 <= in_doubt, "{repeats} repeats, {report}");
    assert_eq!(reported(&report, "users created"), Some(USERS as u64));
    assert_eq!(
        reported(&report, "notifications"),
        Some(USERS as u64 * 6 / 5)
    );
    assert_eq!(world.dead_letters()?, BTreeMap::new());
    // The books are complete before the last acks are.
    let deadline = Instant::now() + TIMEOUT;
    for service in ["email", "notification"] {
        while world.open(service)? != (0, 0) {
            ensure!(Instant::now() < deadline, "{service} leaves events open");
            thread::sleep(Duration::from_millis(50));
        }
    }
    for (_, mut process) in running.into_values() {
        process.terminate()?;
        process.wait(TIMEOUT)?.ok()?;
    }
    assert_eq!(world.open("email")?, (0, 0));
    assert_eq!(world.open("notification")?, (0, 0));
    Ok(())
}

/// The one moment that no transaction covers.
#[test]
fn a_kill_between_the_servers_answer_and_the_mark_repeats_the_same_mail() -> Result<()> {
    let world = World::new(&[Fault::Hold])?;
    world
        .durable(&["user", "--users", "1"])?
        .wait(TIMEOUT)?
        .ok()?;
    let mut email = world.durable(&["email"])?;
    world.mail.happened.recv_timeout(TIMEOUT)?;
    email.kill()?;
    let mut email = world.durable(&["email"])?;
    email.wait_for("mail to user-1@example.org", TIMEOUT)?;
    email.interrupt()?;
    email.wait(TIMEOUT)?.ok()?;
    let (mails, repeats) = world.mails();
    assert_eq!((mails.len(), repeats), (1, 1));
    assert_eq!(mails["user-1@example.org"].len(), 1, "{mails:?}");

    // The books know of it, and the program's own mailbox keeps such a mail once.
    let mut notification = world.durable(&["notification"])?;
    notification.wait_for("event-bus.user.created", TIMEOUT)?;
    let report = world.durable(&["report"])?.wait(TIMEOUT)?.ok()?.stdout;
    assert_eq!(
        reported(&report, "all runs: mails in doubt"),
        Some(1),
        "{report}"
    );
    Ok(())
}

#[test]
fn a_mail_server_that_stops_is_given_up() -> Result<()> {
    let world = World::new(&[Fault::Hold, Fault::Hold])?;
    world
        .durable(&["user", "--users", "1"])?
        .wait(TIMEOUT)?
        .ok()?;
    let mut email = world.durable(&["email"])?;
    world.mail.happened.recv_timeout(TIMEOUT)?;
    email.interrupt()?;
    email.wait(TIMEOUT)?.ok()?;

    let mut email = world.durable(&["email"])?;
    world.mail.happened.recv_timeout(TIMEOUT)?;
    email.wait_for("mail to user-1@example.org", TIMEOUT)?;
    email.interrupt()?;
    email.wait(TIMEOUT)?.ok()?;
    // The server had it each time, and nobody can have known.
    let (mails, repeats) = world.mails();
    assert_eq!((mails.len(), repeats), (1, 2));
    assert_eq!(mails["user-1@example.org"].len(), 1, "{mails:?}");
    Ok(())
}

#[test]
fn a_run_ends_though_a_mail_is_refused_for_good() -> Result<()> {
    let world = World::new(&[Fault::Refuse])?;
    let ended = world.durable(&["--users", "3"])?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    let number = |what: &str| reported(&ended.stdout, what);
    assert_eq!(number("mails sent"), Some(2), "{}", ended.stdout);
    assert_eq!(number("mails refused for good"), Some(1));
    assert_eq!(number("all runs: dead letters"), Some(1));
    assert!(ended.stdout.contains("6 effects due / 5 done / 0 lost"));
    assert_eq!(world.dead_letters()?.len(), 1);
    Ok(())
}

#[test]
fn a_run_goes_on_with_a_new_stream_when_the_old_one_was_deleted() -> Result<()> {
    let world = World::new(&[])?;
    let run = ["user", "--users", "40", "--rate", "20"];
    let mut user = world.durable(&run)?;
    let url = world.nats.address();
    Runtime::new()?.block_on(async {
        let jetstream = jetstream::new(async_nats::connect(url).await?);
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Ok(stream) = jetstream.get_stream("EVENT_BUS").await
                && stream.cached_info().state.messages >= 5
            {
                break;
            }
            ensure!(Instant::now() < deadline, "no events");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        user.kill()?;
        jetstream.delete_stream("EVENT_BUS").await?;
        Ok(())
    })?;
    world.durable(&run)?.wait(TIMEOUT)?.ok()?;
    let mut email = world.durable(&["email"])?;
    world.await_mails(40)?;
    email.interrupt()?;
    email.wait(TIMEOUT)?.ok()?;
    Ok(())
}

#[test]
fn what_the_mailbox_holds_is_not_asked_when_another_server_has_the_mails() -> Result<()> {
    let world = World::new(&[])?;
    let own = world.example(&["--users", "2"]).spawn()?;
    let stdout = { own }.wait(TIMEOUT)?.ok()?.stdout;
    assert_eq!(reported(&stdout, "mails in the mailbox"), Some(2));
    let stdout = world.start(&["--users", "3"])?.wait(TIMEOUT)?.ok()?.stdout;
    assert_eq!(reported(&stdout, "mails in the mailbox"), None, "{stdout}");
    Ok(())
}

#[test]
fn without_jetstream_an_outage_ends_the_run_and_ctrl_c_is_heard() -> Result<()> {
    let world = World::new(&[])?;
    let mut email = world.start(&["email"])?;
    email.wait_for("listening", TIMEOUT)?;
    let mut all = world.start(&["--users", "20", "--rate", "2"])?;
    all.wait_for("notification: event-bus.user.created", TIMEOUT)?;
    world.nats.kill(1)?;
    let ended = all.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1, "{}", ended.stdout);
    assert!(
        ended.stderr.contains("the connection to NATS is lost"),
        "{}",
        ended.stderr
    );
    email.interrupt()?;
    email.wait(TIMEOUT)?.ok()?;
    Ok(())
}

#[test]
fn the_mailbox_keeps_a_repeated_mail_once() -> Result<()> {
    let world = World::new(&[])?;
    let mut mailbox = world.start(&["mailbox", "--listen", "127.0.0.1:0"])?;
    let line = mailbox.wait_for("smtp://", TIMEOUT)?;
    for _ in 0..2 {
        send_mail(&line)?;
    }
    mailbox.wait_for("for b@example.org \"Hello\"", TIMEOUT)?;
    mailbox.wait_for("again, suppressed", TIMEOUT)?;
    mailbox.terminate()?;
    mailbox.wait(TIMEOUT)?.ok()?;
    Ok(())
}

/// Sends the same mail to the mailbox that has printed where it is.
fn send_mail(line: &str) -> Result<()> {
    let text = "Subject: Hello\r\nMessage-ID: <created-r-1@x>\r\n\r\nText";
    let port = line.rsplit(':').next().context("port")?.parse()?;
    let sender = lettre::SmtpTransport::builder_dangerous("127.0.0.1")
        .port(port)
        .build();
    let envelope = lettre::address::Envelope::new(
        Some("a@example.org".parse()?),
        vec!["b@example.org".parse()?],
    )?;
    lettre::Transport::send_raw(&sender, &envelope, text.as_bytes())?;
    Ok(())
}

/// `event_bus … | head -1`: at the latest with its next line. Those that print on a thread of their own, too.
#[test]
fn every_part_ends_when_nobody_reads_what_it_prints() -> Result<()> {
    let world = World::new(&[])?;
    let pipe = |args: &[&str]| {
        let program = r#""$0" "$@" --wait 60 --state "$STATE" | head -1"#;
        Example::new("/bin/sh")
            .args(["-c", program, env!("CARGO_BIN_EXE_event_bus")])
            .args(args)
            .env("STATE", world.state.path())
            .env("SMTP_URL", &world.mail.url)
            .broker(&world.nats)
            .spawn()
    };
    let mut mailbox = pipe(&["mailbox", "--listen", "127.0.0.1:0"])?;
    let line = mailbox.wait_for("smtp://", TIMEOUT)?;
    let mut running = vec![("mailbox", mailbox)];
    for part in ["email", "notification", "audit"] {
        running.push((part, pipe(&[part, "--durable"])?));
    }
    let deadline = Instant::now() + TIMEOUT;
    while !running.is_empty() {
        // Refused as soon as the mailbox has ended.
        let _ = send_mail(&line);
        world.durable(&["user", "--users", "1"])?.wait(TIMEOUT)?;
        let mut left = Vec::new();
        for (part, mut pipe) in running {
            if pipe.try_wait()?.is_none() {
                left.push((part, pipe));
                continue;
            }
            let ended = pipe.wait(TIMEOUT)?;
            assert_eq!(ended.stdout.lines().count(), 1, "{part}: {ended:?}");
        }
        running = left;
        let names: Vec<_> = running.iter().map(|(part, _)| *part).collect();
        ensure!(Instant::now() < deadline, "still running: {names:?}");
    }
    Ok(())
}

#[test]
fn who_was_away_or_is_new_gets_what_it_missed() -> Result<()> {
    let world = World::new(&[])?;
    // Nobody is there: with JetStream the events wait, without they are gone.
    world
        .start(&["user", "--users", "20"])?
        .wait(TIMEOUT)?
        .ok()?;
    world
        .durable(&["user", "--users", "40"])?
        .wait(TIMEOUT)?
        .ok()?;
    let mut first = world.durable(&["email"])?;
    let mut second = world.durable(&["email"])?;
    world.await_mails(40)?;
    // Nobody has told the user service of this one.
    let mut audit = world.durable(&["audit"])?;
    // The user is created and updated.
    for _ in 0..2 {
        audit.wait_for("-000040", TIMEOUT)?;
    }
    let mut handled = 0;
    for process in [&mut first, &mut second, &mut audit] {
        process.terminate()?;
        let stdout = process.wait(TIMEOUT)?.ok()?.stdout;
        let line = stdout.lines().last().context("nothing said")?.to_owned();
        let events: u64 = line.split(' ').nth(1).context("no count")?.parse()?;
        if line.starts_with("email") {
            handled += events;
        } else {
            assert_eq!(events, 48, "{line}");
        }
    }
    assert_eq!(handled, 40);
    assert_eq!(world.mail.mails().len(), 40);

    // Core NATS: only those who listen, and of a queue group only one.
    let mut first = world.start(&["email"])?;
    let mut second = world.start(&["email"])?;
    for process in [&mut first, &mut second] {
        process.wait_for("listening", TIMEOUT)?;
    }
    world
        .start(&["user", "--users", "30"])?
        .wait(TIMEOUT)?
        .ok()?;
    let deadline = Instant::now() + TIMEOUT;
    while world.mail.mails().len() < 70 {
        ensure!(Instant::now() < deadline, "{}", world.mail.mails().len());
        thread::sleep(Duration::from_millis(20));
    }
    for process in [&mut first, &mut second] {
        process.interrupt()?;
        process.wait(TIMEOUT)?.ok()?;
    }
    assert_eq!(world.mail.mails().len(), 70);
    Ok(())
}

#[test]
fn poison_events_end_elsewhere_and_the_services_live_on() -> Result<()> {
    let world = World::new(&[])?;
    let event = |id: &str, email: &str| {
        format!(
            r#"{{"version":1,"user_id":"{id}","email":"{email}","timestamp":"2026-01-01T00:00:00Z"}}"#
        )
    };
    let (nobody, strange, good) = (
        event("n", "nobody@example.org"),
        event("s", "not an address"),
        event("g\\r\\nBcc: all", "good@example.org"),
    );
    let unreadable: [&[u8]; 5] = [
        b"User ID: 123",
        b"\xff\xfe\x00",
        b"",
        br#"{"version":2,"id":1}"#,
        br#"{"version":1,"user_id":7}"#,
    ];
    // Core NATS: reported and skipped.
    let mut email = world.start(&["email"])?;
    email.wait_for("listening", TIMEOUT)?;
    world.publish("event-bus.user.created", &unreadable)?;
    world.publish(
        "event-bus.user.created",
        &[nobody.as_bytes(), strange.as_bytes(), good.as_bytes()],
    )?;
    email.wait_for("version 2 is not known here", TIMEOUT)?;
    email.wait_for("mail to good@example.org", TIMEOUT)?;
    email.interrupt()?;
    let ended = email.wait(TIMEOUT)?.ok()?;
    assert!(
        ended.stdout.contains("1 events handled, 7 skipped"),
        "{}",
        ended.stdout
    );

    // JetStream: to the dead letters, once for each service that cannot use it, and never again.
    let world = World::new(&[])?;
    let mut notification = world.durable(&["notification"])?;
    notification.wait_for("working", TIMEOUT)?;
    world.publish("event-bus.user.created", &unreadable)?;
    world.publish(
        "event-bus.user.created",
        &[nobody.as_bytes(), strange.as_bytes(), good.as_bytes()],
    )?;
    world.publish("event-bus.user.deleted", &[good.as_bytes()])?;
    // As large as the server allows: a dead letter cannot hold all of it.
    let large = vec![b'x'; 1 << 20];
    world.publish("event-bus.user.created", &[&large])?;
    let mut email = world.durable(&["email"])?;
    email.wait_for("mail to good@example.org", TIMEOUT)?;
    // Handled side by side: those before it may be unfinished.
    for service in ["email", "notification"] {
        let deadline = Instant::now() + TIMEOUT;
        while world.open(service)? != (0, 0) {
            ensure!(Instant::now() < deadline, "{service} is not done");
            thread::sleep(Duration::from_millis(50));
        }
    }
    let letters = world.dead_letters()?;
    let reason = |service: &str, payload: &[u8]| {
        let letter = letters.get(&(service.to_owned(), payload.to_vec()));
        letter.with_context(|| format!("{service}: {payload:?} in {letters:?}"))
    };
    for payload in unreadable {
        reason("email", payload)?;
        reason("notification", payload)?;
    }
    assert!(
        reason("email", nobody.as_bytes())?.contains("550"),
        "{letters:?}"
    );
    assert!(
        reason("email", strange.as_bytes())?.contains("address"),
        "{letters:?}"
    );
    assert!(reason("notification", good.as_bytes())?.contains("event-bus.user.deleted"));
    let trimmed =
        |(_, payload): &&(String, Vec<u8>)| payload.len() > 1_000_000 && large.starts_with(payload);
    assert_eq!(letters.keys().filter(trimmed).count(), 2);
    assert_eq!(letters.len(), 5 + 5 + 2 + 1 + 2);
    let mails = world.mail.mails();
    assert_eq!(mails.len(), 1, "{mails:?}");
    for mut process in [email, notification] {
        process.terminate()?;
        process.wait(TIMEOUT)?.ok()?;
    }
    Ok(())
}

#[test]
fn without_nats_there_is_one_readable_error() -> Result<()> {
    compose::harness::broker_absent(Service::Nats, &[env!("CARGO_BIN_EXE_event_bus")])
}
