//! `lab kill`, `pause`, `resume`, `restart` and `down`: orders to whoever owns a broker or an example.

use anyhow::{Context, Result, anyhow, bail};

use super::running::{self, Entry, Order, Run, Verb};
use crate::Service;
use crate::home::Home;
use crate::terminal::{out, say};
use crate::workspace::nearest;

/// `kafka` or `kafka.2`.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) service: Service,
    pub(super) node: u16,
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

fn entry(home: &Home, service: Service) -> Result<Entry> {
    running::find(home, service)?.with_context(|| {
        format!("no {service} runs here that `lab` started; `cargo lab up {service}` starts one")
    })
}

pub(super) fn order(verb: Verb, target: Target, done: &str) -> Result<()> {
    let home = Home::from_env()?;
    let Target { service, node } = target;
    let entry = entry(&home, service)?;
    running::send(
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
pub(super) fn disturb(verb: Verb, target: &str, done: &str) -> Result<()> {
    let home = Home::from_env()?;
    let runs = running::runs(&home)?;
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
    running::send(
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

pub(super) fn numbered(run: &Run) -> String {
    format!("{}.{}", run.name, run.number)
}

/// Neither a service nor an example that runs.
fn unknown(name: &str, runs: &[Run]) -> anyhow::Error {
    let names = Service::ALL.iter().map(|service| service.name());
    let names = names.chain(runs.iter().map(|run| run.name.as_str()));
    let hint = match nearest(name, names).first() {
        Some(near) => format!("did you mean '{near}'?"),
        None => "`cargo lab status` shows what runs".to_owned(),
    };
    anyhow!("no service and no example that `cargo lab run` has started is called '{name}'; {hint}")
}

pub(super) fn down(services: &[Service]) -> Result<()> {
    let home = Home::from_env()?;
    let mut stopped = 0;
    for service in Service::ALL {
        if !services.is_empty() && !services.contains(&service) {
            continue;
        }
        match running::find(&home, service)? {
            Some(entry) => {
                let order = Order {
                    verb: Verb::Down,
                    service: service.to_string(),
                    node: 1,
                };
                say!("stopping {service}…");
                running::send(entry.owner, &entry.socket, &order)?;
                out!("{service}: stopped");
                stopped += 1;
            }
            None if running::is_owned(&home, service)? => {
                let state = "is being started or stopped by another `lab`";
                if !services.is_empty() {
                    bail!("{service} {state}; wait for it or end that process");
                }
                say!("{service} {state}");
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
