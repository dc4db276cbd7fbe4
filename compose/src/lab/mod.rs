//! `cargo lab`: what its commands are called, and where each is carried out.

mod build;
mod doctor;
mod interrupt;
mod list;
mod orders;
mod origin;
mod owner;
mod run;
mod running;
mod status;
mod up;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

use self::orders::Target;
use self::running::Verb;
use crate::Service;
use crate::broker::Wish;
use crate::services::{check_count, check_secure, names};
use crate::terminal::{out, page, say};
use crate::workspace::Workspace;

/// Real brokers under the examples, with no set-up
#[derive(Parser)]
#[command(
    name = "cargo lab",
    bin_name = "cargo lab",
    arg_required_else_help = true
)]
#[command(after_help = after_help())]
struct Cli {
    #[command(subcommand)]
    command: Lab,
}

#[derive(Subcommand)]
enum Lab {
    /// List the examples
    List {
        /// Only those whose name or title contains this
        filter: Option<String>,
    },
    /// Show what an example says of itself: what it guarantees, how to run it, what to try
    Show {
        /// The example, as `cargo lab list` names it
        name: String,
    },
    /// Run an example; starts the brokers it needs, and stops what it started
    Run {
        /// With optimizations
        #[arg(long)]
        release: bool,
        /// The example, as `cargo lab list` names it, and what is passed on to it
        #[arg(required = true, num_args = 1.., value_names = ["NAME", "ARGS"], trailing_var_arg = true)]
        #[arg(allow_hyphen_values = true)]
        example: Vec<String>,
    },
    /// Start brokers and keep them until Ctrl-C
    Up {
        #[arg(required = true, help = names(|_| true))]
        services: Vec<Service>,
        /// Return as soon as they serve; `cargo lab down` stops them
        #[arg(long, short)]
        detach: bool,
        /// A cluster of so many nodes; of pulsar, so many clusters
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=5))]
        nodes: u16,
        /// Begin with empty storage
        #[arg(long)]
        fresh: bool,
        #[arg(long, help = secure_help())]
        secure: bool,
        /// The background process behind --detach
        #[arg(long, hide = true)]
        hold: bool,
    },
    /// Stop brokers that `lab` started; all of them if none is named
    Down {
        /// Which
        services: Vec<Service>,
    },
    /// Show which brokers run, where, and on what, and which examples run
    Status,
    /// Show a broker's log
    Logs {
        /// A service, or one node of it: kafka, kafka.2
        target: Target,
        /// How many of the last lines
        #[arg(long, short = 'n', default_value_t = 50)]
        lines: usize,
        /// Go on showing what is added
        #[arg(long, short)]
        follow: bool,
    },
    /// Kill a broker or a running example (SIGKILL): it gets no chance to say goodbye
    Kill {
        /// A service, one node of it, or an example: kafka, kafka.2, kafka_admin
        target: String,
    },
    /// Freeze a broker or a running example (SIGSTOP): its connections stay open and nothing answers
    Pause {
        /// A service, one node of it, or an example: kafka, kafka.2, kafka_admin
        target: String,
    },
    /// Let a frozen broker or example go on (SIGCONT)
    Resume {
        /// A service, one node of it, or an example: kafka, kafka.2, kafka_admin
        target: String,
    },
    /// Start a broker again on its storage, stopping it first if it runs
    Restart {
        /// A service, or one node of it: kafka, kafka.2
        target: Target,
    },
    /// Write an example as a project of its own
    New {
        /// The example, as `cargo lab list` names it
        name: String,
        /// A folder that is empty or does not exist
        path: PathBuf,
    },
    /// Say what this machine has, what each broker would run on, and what to install
    Doctor,
    /// Write the lists of examples in the READMEs anew from the examples' headers
    Index {
        /// Only say whether they are up to date
        #[arg(long)]
        check: bool,
    },
}

fn secure_help() -> String {
    let services = names(|spec| spec.facts().secured.is_some());
    format!("With TLS, authentication, an application's user and an administrator: {services}")
}

fn after_help() -> String {
    let variables: Vec<_> = Service::ALL
        .iter()
        .map(|service| service.variable())
        .collect();
    format!(
        "LAB_BACKEND=native|docker|mock forces what brokers run on. \
         LAB_HOME is where they are kept. \
         LAB_PORTS=free, or a list such as kafka=19092,nats=14222, has them listen on other ports than usual. \
         An address in one of {} is used instead of starting a broker.",
        variables.join(", ")
    )
}

/// The whole program.
pub fn main() -> ExitCode {
    Cli::parse().command.perform().unwrap_or_else(|error| {
        say!("error: {error:#}");
        ExitCode::FAILURE
    })
}

impl Lab {
    fn perform(self) -> Result<ExitCode> {
        match self {
            Lab::List { filter } => list::list(filter.as_deref())?,
            Lab::Show { name } => {
                let workspace = Workspace::load()?;
                page(&workspace.find(&name)?.description(workspace.root()))?;
            }
            Lab::Run { release, example } => {
                let (name, args) = example.split_first().context("which example?")?;
                return run::run(name, args, release);
            }
            Lab::Up {
                services,
                detach,
                nodes,
                fresh,
                secure,
                hold,
            } => {
                for service in &services {
                    check_count(*service, nodes)?;
                    if secure {
                        check_secure(*service)?;
                    }
                }
                let wish = Wish {
                    nodes,
                    fresh,
                    secure,
                };
                if detach {
                    return up::detach(&services, wish);
                }
                up::up(&services, wish, hold)?;
            }
            Lab::Down { services } => orders::down(&services)?,
            Lab::Status => status::status()?,
            Lab::Logs {
                target,
                lines,
                follow,
            } => status::logs(target, lines, follow)?,
            Lab::Kill { target } => orders::disturb(Verb::Kill, &target, "killed")?,
            Lab::Pause { target } => orders::disturb(Verb::Pause, &target, "paused")?,
            Lab::Resume { target } => orders::disturb(Verb::Resume, &target, "resumed")?,
            Lab::Restart { target } => {
                say!("restarting {}…", target.service);
                orders::order(Verb::Restart, target, "restarted")?;
            }
            Lab::New { name, path } => new(&name, &path)?,
            Lab::Doctor => return doctor::doctor(),
            Lab::Index { check } => index(check)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn new(name: &str, path: &Path) -> Result<()> {
    let workspace = Workspace::load()?;
    let example = workspace.find(name)?;
    workspace.new_project(name, path)?;
    let mut text = format!("{name} is a project of its own in {}\n", path.display());
    let names = example.names()?;
    if !names.is_empty() {
        writeln!(text, "change first:")?;
    }
    for constant in names {
        let file = Path::new("src").join(&constant.file);
        let place = format!("{}:{}", file.display(), constant.line);
        writeln!(text, "  {place}  {}", constant.text)?;
    }
    for companion in workspace.companions(example) {
        let name = &companion.name;
        writeln!(
            text,
            "`cargo run --bin {name}` there runs the {name} of its header"
        )?;
    }
    for service in &example.services {
        let variable = service.parse::<Service>()?.variable();
        writeln!(text, "the address of {service} is read from {variable}")?;
    }
    writeln!(text, "to run it:")?;
    if !example.services.is_empty() {
        let services = example.services.join(" ");
        writeln!(text, "  cargo lab up --detach {services}")?;
    }
    writeln!(text, "  cd '{}' && cargo run", path.display())?;
    page(&text)
}

fn index(check: bool) -> Result<()> {
    let stale = Workspace::load()?.write_indexes(check)?;
    for path in &stale {
        out!(
            "{} {}",
            if check { "stale:" } else { "written:" },
            path.display()
        );
    }
    if check && !stale.is_empty() {
        bail!("run `cargo lab index`");
    }
    Ok(())
}
