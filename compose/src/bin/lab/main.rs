//! `lab`: starts real brokers and runs the examples on them.

// These panic when the reader of a pipe has left.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod build;
mod doctor;
mod interrupt;
mod ladder;
mod list;
mod owner;
mod run;
mod say;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use clap::{Parser, Subcommand};
use compose::Service;
use compose::home::Home;
use compose::registry::{self, Entry, Order, Run, Verb};
use compose::workspace::{self, Workspace};

use crate::say::{out, page, say};

/// Real brokers under the examples, with no set-up
#[derive(Parser)]
#[command(
    name = "cargo lab",
    bin_name = "cargo lab",
    arg_required_else_help = true
)]
#[command(
    after_help = "LAB_BACKEND=native|docker|mock forces what brokers run on. \
    LAB_HOME is where they are kept. \
    LAB_PORTS=free, or a list such as kafka=19092,nats=14222, has them listen on other ports than usual. An address in KAFKA_BROKERS, AMQP_ADDR, NATS_URL, PULSAR_ADDRESS or \
    ELASTICSEARCH_URL is used instead of starting a broker."
)]
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
        /// kafka, rabbitmq, nats, pulsar, opensearch
        #[arg(required = true)]
        services: Vec<Service>,
        /// Return as soon as they serve; `cargo lab down` stops them
        #[arg(long, short)]
        detach: bool,
        /// A cluster of so many nodes (kafka, rabbitmq, nats); of pulsar, so many clusters
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=5))]
        nodes: u16,
        /// Begin with empty storage
        #[arg(long)]
        fresh: bool,
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

/// `kafka` or `kafka.2`.
#[derive(Clone, Copy)]
struct Target {
    service: Service,
    node: u16,
}

impl std::str::FromStr for Target {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Target> {
        let (service, node) = text.split_once('.').unwrap_or((text, "1"));
        let node = node
            .parse()
            .with_context(|| format!("'{node}' is not the number of a node"))?;
        Ok(Target {
            service: service.parse()?,
            node,
        })
    }
}

fn main() -> ExitCode {
    match Cli::parse().command.perform() {
        Ok(code) => code,
        Err(error) => {
            say!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
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
                detach: true,
                nodes,
                fresh,
                ..
            } => return owner::detach(&services, nodes, fresh),
            Lab::Up {
                services,
                nodes,
                fresh,
                hold,
                ..
            } => owner::up(&services, nodes, fresh, hold)?,
            Lab::Down { services } => down(&services)?,
            Lab::Status => status()?,
            Lab::Logs {
                target,
                lines,
                follow,
            } => logs(target, lines, follow)?,
            Lab::Kill { target } => disturb(Verb::Kill, &target, "killed")?,
            Lab::Pause { target } => disturb(Verb::Pause, &target, "paused")?,
            Lab::Resume { target } => disturb(Verb::Resume, &target, "resumed")?,
            Lab::Restart { target } => {
                say!("restarting {}…", target.service);
                order(Verb::Restart, target, "restarted")?;
            }
            Lab::New { name, path } => new(&name, &path)?,
            Lab::Doctor => return doctor::doctor(),
            Lab::Index { check } => index(check)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn entry(home: &Home, service: Service) -> Result<Entry> {
    registry::find(home, service)?.with_context(|| {
        format!("no {service} runs here that `lab` started; `cargo lab up {service}` starts one")
    })
}

fn order(verb: Verb, target: Target, done: &str) -> Result<()> {
    let home = Home::from_env()?;
    let Target { service, node } = target;
    let entry = entry(&home, service)?;
    registry::send(
        entry.owner,
        &entry.socket,
        &Order {
            verb,
            service: service.to_string(),
            node,
        },
    )?;
    let name = if entry.nodes.len() > 1 {
        format!("{service}.{node}")
    } else {
        service.to_string()
    };
    out!("{name}: {done}");
    Ok(())
}

/// Does something to a broker, or to a running example.
fn disturb(verb: Verb, target: &str, done: &str) -> Result<()> {
    let home = Home::from_env()?;
    let runs = registry::runs(&home)?;
    let (name, number) = target.rsplit_once('.').unwrap_or((target, ""));
    if Service::ALL.iter().any(|service| service.name() == name) {
        return order(verb, target.parse()?, done);
    }
    let named: Vec<_> = runs.iter().filter(|run| run.name == name).collect();
    let wanted = match named.as_slice() {
        [] => return Err(unknown(name, &runs)),
        [one] if number.is_empty() => one,
        several if number.is_empty() => {
            let all: Vec<_> = several.iter().map(|run| numbered(run)).collect();
            bail!("several {name} are running; name one of {}", all.join(", "))
        }
        several => several
            .iter()
            .find(|run| run.number.to_string() == number)
            .with_context(|| {
                let all: Vec<_> = several.iter().map(|run| numbered(run)).collect();
                format!("no {target} is running, only {}", all.join(", "))
            })?,
    };
    registry::send(
        wanted.owner,
        &wanted.socket,
        &Order {
            verb,
            service: wanted.name.clone(),
            node: wanted.number,
        },
    )?;
    out!("{target}: {done}");
    Ok(())
}

fn numbered(run: &Run) -> String {
    format!("{}.{}", run.name, run.number)
}

/// Neither a service nor an example that runs.
fn unknown(name: &str, runs: &[Run]) -> anyhow::Error {
    let names = Service::ALL.iter().map(|service| service.name());
    let names = names.chain(runs.iter().map(|run| run.name.as_str()));
    let hint = match workspace::nearest(name, names).first() {
        Some(near) => format!("did you mean '{near}'?"),
        None => "`cargo lab status` shows what runs".to_owned(),
    };
    anyhow!("no service and no example that `cargo lab run` has started is called '{name}'; {hint}")
}

fn down(services: &[Service]) -> Result<()> {
    let home = Home::from_env()?;
    let mut stopped = 0;
    for service in Service::ALL {
        if !services.is_empty() && !services.contains(&service) {
            continue;
        }
        match registry::find(&home, service)? {
            Some(entry) => {
                let order = Order {
                    verb: Verb::Down,
                    service: service.to_string(),
                    node: 1,
                };
                say!("stopping {service}…");
                registry::send(entry.owner, &entry.socket, &order)?;
                out!("{service}: stopped");
                stopped += 1;
            }
            None if registry::is_owned(&home, service)? => {
                bail!(
                    "{service} is being started by another `lab`; wait for it or end that process"
                )
            }
            None if !services.is_empty() => bail!("no {service} runs here that `lab` started"),
            None => {}
        }
    }
    if stopped == 0 {
        out!("nothing to stop");
    }
    Ok(())
}

fn status() -> Result<()> {
    let home = Home::from_env()?;
    let mut text = String::new();
    for service in Service::ALL {
        if let Some(entry) = registry::find(&home, service)? {
            let mode = if entry.detached { "detached, " } else { "" };
            writeln!(
                text,
                "{service:10}  {} ({mode}process {})",
                entry.backend, entry.owner
            )?;
            for (name, value) in &entry.env {
                writeln!(text, "            {name}={value}")?;
            }
            for node in &entry.nodes {
                let pid = node
                    .pid
                    .map_or(String::new(), |pid| format!(", process {pid}"));
                let log = node.log.display();
                writeln!(
                    text,
                    "            node {}: {}{pid}, log {log}",
                    node.number, node.state
                )?;
            }
        } else if let Some(address) = ladder::find_running(service)? {
            writeln!(text, "{service:10}  {address} (not started by `lab`)")?;
        } else if registry::is_owned(&home, service)? {
            writeln!(text, "{service:10}  starting")?;
        } else {
            writeln!(text, "{service:10}  -")?;
        }
    }
    let runs = registry::runs(&home)?;
    if !runs.is_empty() {
        writeln!(text, "\nexamples")?;
    }
    for run in runs {
        let Run { state, pid, .. } = &run;
        write!(text, "  {}: {state}, process {pid}", numbered(&run))?;
        // They tell the stages of a scenario apart.
        if !run.args.is_empty() {
            write!(text, ", arguments: {}", run.args.join(" "))?;
        }
        text.push('\n');
    }
    page(&text)
}

fn logs(target: Target, lines: usize, follow: bool) -> Result<()> {
    let home = Home::from_env()?;
    let path = match registry::find(&home, target.service)? {
        Some(entry) => {
            let node = entry
                .nodes
                .into_iter()
                .find(|node| node.number == target.node);
            node.with_context(|| format!("{} has no node {}", target.service, target.node))?
                .log
        }
        // What a broker said last is wanted most when it has gone.
        None => compose::broker::log_path(&home.logs(), target.service, target.node),
    };
    if !path.exists() {
        bail!(
            "{} has not run yet: there is no {}",
            target.service,
            path.display()
        );
    }
    let mut tail = std::process::Command::new("tail");
    tail.args(["-n", &lines.to_string()]);
    if follow {
        tail.arg("-f");
    }
    let status = tail.arg(&path).status().context("cannot run `tail`")?;
    // `tail` is ended by a signal when the reader of a pipe has left.
    if status.code().is_some_and(|code| code != 0) && !follow {
        bail!("`tail {}` failed", path.display());
    }
    Ok(())
}

fn new(name: &str, path: &std::path::Path) -> Result<()> {
    let workspace = Workspace::load()?;
    let example = workspace.find(name)?;
    workspace.new_project(name, path)?;
    let mut text = format!("{name} is a project of its own in {}\n", path.display());
    let names = example.names()?;
    if !names.is_empty() {
        writeln!(text, "change first:")?;
    }
    for constant in names {
        let file = std::path::Path::new("src").join(&constant.file);
        let place = format!("{}:{}", file.display(), constant.line);
        writeln!(text, "  {place}  {}", constant.text)?;
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
