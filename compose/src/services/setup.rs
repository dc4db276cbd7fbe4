//! Nodes of a service that are ready to be started: their ports, folders and commands.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::{ClassArchive, Secured, names};
use crate::home::Home;
use crate::ports::{self, Claim, Ports};
use crate::probe::Page;
use crate::security::{self, Security};
use crate::{Service, docker};

/// One node of a service, ready to be started, and started again after a kill.
#[derive(Debug)]
pub(crate) struct Node {
    /// From 1.
    pub(crate) number: u16,
    /// To be run once before the first start, such as the formatting of the storage.
    pub(crate) first: Option<Command>,
    /// The broker itself.
    pub(crate) run: Command,
    /// `host:port` for clients.
    pub(crate) host: String,
    /// The address of the web console or the admin interface.
    pub(crate) web: Option<String>,
    /// `host:port` of the listener with TLS, if the service is secured.
    pub(crate) secured: Option<String>,
    /// The address of the web console with TLS, if there is one.
    pub(crate) secured_web: Option<String>,
}

/// A whole service: its nodes, and what they need beside them.
#[derive(Debug)]
pub(crate) struct Setup {
    /// In order of their numbers.
    pub(crate) nodes: Vec<Node>,
    /// What is started, if that is known: a program of the machine is not asked.
    pub(crate) version: Option<String>,
    /// A process that has to run before the nodes and for as long as they do.
    pub(crate) companion: Option<Command>,
    /// Where each node is reached through a proxy, if that was asked for.
    pub(crate) behind: Vec<Behind>,
    /// What the first node writes at an orderly end, if it is not there yet.
    pub(crate) archive: Option<ClassArchive>,
    /// What gives the users their rights, where only a broker that serves can be told.
    pub(crate) grants: Vec<Grant>,
    /// The certificates and users, if the service is secured.
    pub(crate) security: Option<Security>,
    /// Held for as long as the nodes may run.
    pub(crate) claims: Vec<Claim>,
    /// What the nodes are for the engine, if they run in Docker.
    pub(crate) project: Option<docker::Project>,
}

impl Setup {
    /// Nodes that need nothing beside them.
    pub(crate) fn of(nodes: Vec<Node>, version: Option<String>) -> Setup {
        Setup {
            nodes,
            version,
            companion: None,
            behind: Vec::new(),
            archive: None,
            grants: Vec::new(),
            security: None,
            claims: Vec::new(),
            project: None,
        }
    }
}

/// An order of the administrator's. To give it a second time changes nothing.
#[derive(Debug)]
pub(crate) enum Grant {
    /// Given by a program of the service's own.
    Run(Command),
    /// Given over HTTP, as JSON.
    Post(Page, String),
}

/// Where a service is set up.
pub(crate) struct Site<'a> {
    /// Where programs are.
    pub(crate) home: &'a Home,
    /// For configuration and storage.
    pub(crate) folder: &'a Path,
    /// Of each node, of which there is at least one.
    pub(crate) nodes: &'a [NodePorts],
    /// The certificates and users, if the service is to be secured.
    pub(crate) security: Option<&'a Security>,
}

/// The port numbers of one node.
pub(crate) struct NodePorts {
    /// The node's number, from 1.
    pub(crate) number: u16,
    /// For clients.
    pub(crate) client: u16,
    /// For the web console; 0 if the service has none.
    pub(crate) web: u16,
    /// As many as the service has asked for.
    pub(crate) others: Vec<u16>,
    /// Those with TLS, if the service is to be secured.
    pub(crate) secured: Option<SecuredPorts>,
    /// Of the proxy in front of it, if there is one.
    pub(crate) behind: Option<Behind>,
}

/// The port numbers of one node with TLS.
pub(crate) struct SecuredPorts {
    /// For clients.
    pub(crate) client: u16,
    /// For the web console; 0 if the service has none with TLS.
    pub(crate) web: u16,
    /// For the other nodes.
    pub(crate) internal: u16,
}

/// The ports of a node that is reached through a proxy too.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Behind {
    /// Where the node listens for those who come through the proxy. Its clients' port, unless it tells its clients where to
    /// connect: then it needs a second one, to tell these the proxy's port.
    pub(crate) listen: u16,
    /// The proxy's.
    pub(crate) proxy: u16,
}

impl NodePorts {
    /// The node that this command starts.
    pub(crate) fn node(&self, run: Command) -> Node {
        Node {
            number: self.number,
            first: None,
            run,
            host: format!("127.0.0.1:{}", self.client),
            web: (self.web != 0).then(|| format!("http://127.0.0.1:{}", self.web)),
            secured: self
                .secured
                .as_ref()
                .map(|ports| format!("localhost:{}", ports.client)),
            secured_web: self
                .secured
                .as_ref()
                .filter(|ports| ports.web != 0)
                .map(|ports| format!("https://localhost:{}", ports.web)),
        }
    }
}

impl Site<'_> {
    /// The folder of one node, made if need be.
    pub(crate) fn folder_of(&self, node: &NodePorts) -> Result<PathBuf> {
        let path = self.folder.join(format!("node-{}", node.number));
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(path)
    }
}

/// Writes the configuration of `count` nodes into `folder`, if they are `proxied` with ports for a proxy in front of each.
/// What has not been fetched is fetched.
///
/// # Errors
/// The program cannot be had, a default port is taken, or the folder cannot be written.
pub(crate) fn prepare(
    service: Service,
    home: &Home,
    folder: &Path,
    count: u16,
    ports: Ports,
    security: Option<Security>,
    proxied: bool,
) -> Result<Setup> {
    let spec = service.spec();
    check_count(service, count)?;
    let (mut nodes, mut claims) = choose_ports(service, count, ports)?;
    if proxied {
        for node in &mut nodes {
            node.behind = Some(Behind {
                listen: match spec.facts().advertises {
                    true => keep(&mut claims, ports::claim()?),
                    false => node.client,
                },
                proxy: keep(&mut claims, ports::claim_in(spec.facts().free_ports)?),
            });
        }
    }
    if security.is_some() {
        let secured = check_secure(service)?;
        let taken: Vec<u16> = nodes
            .iter()
            .flat_map(|node| [node.client, node.web])
            .collect();
        let usual = |node: &NodePorts, port: u16| {
            let is_free = !taken.contains(&port) && ports::is_free(port);
            node.number == 1 && ports != Ports::Free && is_free
        };
        for node in &mut nodes {
            // As with the console, a taken port is no reason to fail: it is said which one it is.
            let mut choose = |port| match usual(node, port) {
                true => Ok(port),
                false => ports::claim().map(|claim| keep(&mut claims, claim)),
            };
            node.secured = Some(SecuredPorts {
                client: secured.port.map_or(Ok(node.client), &mut choose)?,
                web: secured.web.map_or(Ok(0), &mut choose)?,
                internal: keep(&mut claims, ports::claim()?),
            });
        }
    }
    match security {
        // The users are stored there, too.
        Some(_) => security::create_private_folder(folder)?,
        None => fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?,
    }
    let mut setup = spec.set_up(&Site {
        home,
        folder,
        nodes: &nodes,
        security: security.as_ref(),
    })?;
    setup.behind = nodes.iter().filter_map(|node| node.behind).collect();
    setup.claims = claims;
    setup.security = security;
    Ok(setup)
}

/// Fails readably if the service cannot be secured.
pub(crate) fn check_secure(service: Service) -> Result<Secured> {
    service.spec().facts().secured.with_context(|| {
        format!(
            "{service} cannot be secured here; of these it can: {}",
            names(|spec| spec.facts().secured.is_some())
        )
    })
}

/// Fails readably if so many nodes cannot run.
pub(crate) fn check_count(service: Service, count: u16) -> Result<()> {
    let most = service.spec().facts().most_nodes;
    let nodes = if most == 1 {
        "1 node".to_owned()
    } else {
        format!("1 to {most} nodes")
    };
    ensure!(
        (1..=most).contains(&count),
        "{service} runs on {nodes} here, not on {count}; several nodes: {}",
        names(|spec| spec.facts().most_nodes > 1)
    );
    Ok(())
}

/// The ports of `count` nodes, and the claims to those that were free to choose.
///
/// # Errors
/// A default port is taken.
pub(crate) fn choose_ports(
    service: Service,
    count: u16,
    ports: Ports,
) -> Result<(Vec<NodePorts>, Vec<Claim>)> {
    let mut claims = Vec::new();
    let nodes = (0..count).map(|index| ports_of(service, index, ports, &mut claims));
    let nodes = nodes.collect::<Result<_>>()?;
    Ok((nodes, claims))
}

fn ports_of(
    service: Service,
    index: u16,
    ports: Ports,
    claims: &mut Vec<Claim>,
) -> Result<NodePorts> {
    let facts = service.spec().facts();
    let mut keep = |claim| keep(claims, claim);
    let client = match ports {
        Ports::From(first) => {
            let port = first + index;
            require_free(service, port)?;
            port
        }
        Ports::Free => keep(ports::claim_in(facts.free_ports)?),
    };
    // Nobody connects to the console by default, so a taken port is no reason to fail.
    let web = match facts.web.map(|web| web.port) {
        Some(port) if index == 0 && ports != Ports::Free && ports::is_free(port) => port,
        Some(_) => keep(ports::claim()?),
        None => 0,
    };
    let others = (0..facts.other_ports)
        .map(|_| Ok(keep(ports::claim()?)))
        .collect::<Result<_>>()?;
    Ok(NodePorts {
        number: index + 1,
        client,
        web,
        others,
        secured: None,
        behind: None,
    })
}

fn keep(claims: &mut Vec<Claim>, claim: Claim) -> u16 {
    let port = claim.port;
    claims.push(claim);
    port
}

/// Fails readably if the port is taken.
fn require_free(service: Service, port: u16) -> Result<()> {
    if !ports::is_free(port) {
        bail!(
            "port {port} is taken by a program that is not a {service} that `lab` started; \
             stop that program, choose another port with LAB_PORTS={service}=PORT, \
             or set {} to the address of a {service} of your own",
            service.variable()
        );
    }
    Ok(())
}

pub(super) fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// For [`Spec::secured_env`](super::Spec::secured_env).
pub(super) fn variables<const N: usize>(all: [(&str, String); N]) -> Vec<(String, String)> {
    all.map(|(name, value)| (name.to_owned(), value)).to_vec()
}

/// Replaces each `{name}`; a name without a value is a mistake in the template.
pub(super) fn fill(template: &str, values: &[(&str, String)]) -> Result<String> {
    let mut text = template.to_owned();
    for (name, value) in values {
        let mark = format!("{{{name}}}");
        if !text.contains(&mark) {
            bail!("the template has no {mark}");
        }
        text = text.replace(&mark, value);
    }
    Ok(text)
}

/// Puts folders before those that a variable of the environment has.
pub(super) fn put_first(command: &mut Command, variable: &str, folders: &[PathBuf]) {
    let old = std::env::var_os(variable).unwrap_or_default();
    let old = std::env::split_paths(&old).filter(|path| !path.as_os_str().is_empty());
    let all: Vec<PathBuf> = folders.iter().cloned().chain(old).collect();
    if !folders.is_empty()
        && let Ok(value) = std::env::join_paths(all)
    {
        command.env(variable, value);
    }
}
