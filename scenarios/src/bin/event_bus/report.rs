//! What the user sees at the end, and whether the books balance.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use crate::books::Books;
use crate::mailbox::Mailbox;
use crate::shutdown::Stop;
use crate::user::{Run, Users};

pub struct Sums {
    pub run: Run,
    mails_sent: u64,
    mails_refused: u64,
    in_doubt: u64,
    notifications: u64,
    suppressed: u64,
    /// Kept, accepted and recipients, where the mail server is ours.
    mailbox: Option<(u64, u64, u64)>,
}

pub struct Ledger {
    users: Users,
    email: Books,
    notification: Books,
    mailbox: Option<Mailbox>,
}

impl Ledger {
    pub fn open(folder: &Path) -> Result<Ledger> {
        // Mails to another server are not in this mailbox, though it may be there from an earlier run.
        let own = std::env::var_os("SMTP_URL").is_none();
        Ok(Ledger {
            users: Users::open(folder)?,
            email: Books::of_service(folder, "email")?,
            notification: Books::of_service(folder, "notification")?,
            mailbox: own.then(|| Mailbox::open(folder, true)).transpose()?,
        })
    }

    /// The sums of the run, or of the newest one; None if there was none yet.
    pub fn sums(&self, run: Option<&str>) -> Result<Option<Sums>> {
        let Some(run) = self.users.find(run)? else {
            return Ok(None);
        };
        let (mails_sent, mails_refused) = self.email.handled(&run.name)?;
        // Nobody refuses a notification: what a run publishes can be read.
        let (notifications, _) = self.notification.handled(&run.name)?;
        Ok(Some(Sums {
            mails_sent,
            mails_refused,
            in_doubt: self.email.seen("in doubt")?,
            notifications,
            suppressed: self.email.seen("suppressed")? + self.notification.seen("suppressed")?,
            mailbox: match &self.mailbox {
                Some(mailbox) => Some(mailbox.counts(&run.name)?),
                None => None,
            },
            run,
        }))
    }

    /// Waits until the run is over and everything that follows from it is done; or, with `quiet_after`, until
    /// nothing was done for so long. Returns the last sums.
    pub async fn wait(
        &self,
        run: Option<&str>,
        limit: Option<Duration>,
        quiet_after: Option<Duration>,
        stop: &Stop,
        mut each: impl FnMut(&Sums),
    ) -> Result<Option<Sums>> {
        let begun = tokio::time::Instant::now();
        let mut last = (0, begun);
        loop {
            let sums = self.sums(run)?;
            if let Some(sums) = &sums {
                each(sums);
                let done = sums.progress().0 + sums.run.published;
                if done != last.0 || !sums.run.done {
                    last = (done, tokio::time::Instant::now());
                }
            }
            let over = sums.as_ref().is_some_and(Sums::are_complete)
                || limit.is_some_and(|limit| begun.elapsed() > limit)
                || quiet_after.is_some_and(|quiet| last.1.elapsed() > quiet);
            if over || stop.within(Duration::from_millis(50)).await {
                return Ok(sums);
            }
        }
    }
}

impl Sums {
    /// How much of the run's work is done, and how much there is in all.
    pub fn progress(&self) -> (u64, u64) {
        (
            self.mails_sent + self.mails_refused + self.notifications,
            self.run.users + self.run.published,
        )
    }

    /// Nothing more is to come, though some of it may be a dead letter.
    fn are_complete(&self) -> bool {
        self.run.done
            && self.mails_sent + self.mails_refused >= self.run.users
            && self.notifications >= self.run.published
    }

    /// Prints them. True if every user has one mail, and every event one notification.
    pub fn print(&self, dead_letters: Option<u64>, skipped: Option<u64>) -> bool {
        let run = &self.run;
        println!();
        println!("run {}", run.name);
        let line = |what: &str, n: u64| println!("{what:<48} {n:>9}");
        line("users created", run.users);
        line("events published", run.published);
        line("mails sent", self.mails_sent);
        if let Some((kept, accepted, recipients)) = self.mailbox {
            line("mails that the mailbox accepted", accepted);
            line(
                "of these repeats, suppressed by Message-ID",
                accepted - kept,
            );
            line("mails in the mailbox", kept);
            line("users with a mail in the mailbox", recipients);
        }
        line("notifications", self.notifications);
        line("mails refused for good", self.mails_refused);
        line(
            "all runs: mails in doubt that were sent again",
            self.in_doubt,
        );
        line(
            "all runs: deliveries suppressed as done before",
            self.suppressed,
        );
        if let Some(dead) = dead_letters {
            line("all runs: dead letters", dead);
        }
        if let Some(skipped) = skipped {
            line("events skipped", skipped);
        }
        println!();
        let (attempted, done) = (
            run.users + run.published,
            self.mails_sent + self.notifications,
        );
        let lost = attempted.saturating_sub(done + self.mails_refused);
        let unwanted = self
            .mailbox
            .map_or(0, |(kept, _, _)| kept.saturating_sub(run.users));
        println!("{attempted} effects due / {done} done / {lost} lost / {unwanted} duplicate",);
        let one_mail_each = self
            .mailbox
            .is_none_or(|(kept, _, recipients)| kept == run.users && recipients == run.users);
        self.are_complete() && self.mails_refused == 0 && lost == 0 && one_mail_each
    }
}
