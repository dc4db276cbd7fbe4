//! A TCP proxy between a program and its broker, which cuts, delays and swallows what goes through it.
//!
//! It is Toxiproxy, in a process of its own that is steered over HTTP. Whoever is not told of the proxy, such as a test's
//! own client, goes to the broker directly, and sees what has really happened there.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::json;

use super::TIMEOUT;
use crate::fetch::{self, Advice, go};
use crate::home::Home;
use crate::ports::{self, Claim};
use crate::probe::{Page, http_get};
use crate::process::Supervised;
use crate::{Broker, Service};

const MODULE: go::Module = go::Module {
    program: "toxiproxy",
    binary: "server",
    module: include_str!("../../toxiproxy/module"),
};

const ADVICE: Advice = Advice {
    program: "go",
    debian: "golang",
    fedora: "golang",
    brew: "go",
};

/// How long the proxy may take to obey an order.
const ORDER_LIMIT: Duration = Duration::from_secs(20);

/// Where it takes orders on what it does to connections.
const PROXY: &str = "/proxies/broker";

/// One of the two ways through the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What the program sends.
    ToBroker,
    /// What the broker sends.
    ToClient,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Direction::ToBroker => "to-broker",
            Direction::ToClient => "to-client",
        }
    }

    /// What Toxiproxy calls it.
    fn stream(self) -> &'static str {
        match self {
            Direction::ToBroker => "upstream",
            Direction::ToClient => "downstream",
        }
    }
}

/// A proxy in front of a broker. It lets all through until it is told otherwise, and ends when it is dropped.
///
/// A fault holds for connections that are there and for new ones, from the moment that its function returns until
/// [`Proxy::heal`]. Faults may be put one on top of the other.
#[derive(Debug)]
pub struct Proxy {
    process: Supervised,
    api: String,
    address: String,
    env: Vec<(String, String)>,
    /// Something may be missing in the middle of the connections that are there.
    swallows: AtomicBool,
    _claim: Claim,
}

impl Proxy {
    /// Starts a broker as [`Broker::private`] does, and a proxy in front of it. A broker that tells its clients where to
    /// connect tells those who come through the proxy to connect through the proxy.
    ///
    /// # Errors
    /// One of the two cannot be had or does not start.
    pub fn in_front_of(service: Service) -> Result<(Broker, Proxy)> {
        let program = program(&Home::from_env()?)?;
        let (broker, ports) = Broker::private_behind_proxy(service)?;
        let claim = ports::claim()?;
        let mut command = Command::new(program);
        command.args(["-host", "127.0.0.1", "-port", &claim.port.to_string()]);
        let process = Supervised::spawn(&command, Stdio::null(), Stdio::null(), None)?;
        let host = format!("127.0.0.1:{}", ports.proxy);
        let address = service.address(std::slice::from_ref(&host));
        let mut env = broker.env();
        env.retain(|(name, _)| name != service.variable());
        env.push((service.variable().to_owned(), address.clone()));
        let mut proxy = Proxy {
            process,
            api: format!("http://127.0.0.1:{}", claim.port),
            address,
            env,
            swallows: AtomicBool::new(false),
            _claim: claim,
        };
        proxy.await_ready()?;
        let upstream = format!("127.0.0.1:{}", ports.listen);
        proxy.order(
            "/proxies",
            &json!({"name": "broker", "listen": host, "upstream": upstream, "enabled": true}),
        )?;
        proxy.add_toxics()?;
        Ok((broker, proxy))
    }

    /// The broker's address through the proxy, in the form that the service's environment variable takes.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What to set in the environment of an example so that it finds the broker through the proxy. A web console or an
    /// admin interface is reached directly.
    pub fn env(&self) -> Vec<(String, String)> {
        self.env.clone()
    }

    /// Closes all connections, and refuses new ones.
    ///
    /// # Errors
    /// The proxy does not answer.
    pub fn cut(&self) -> Result<()> {
        self.order(PROXY, &json!({"enabled": false}))
    }

    /// From now on, all that goes in this direction arrives later by `delay`, counted in milliseconds. What is on its way
    /// when a [`Proxy::cut`] or a [`Proxy::swallow`] comes never arrives.
    ///
    /// # Errors
    /// The proxy does not answer.
    pub fn delay(&self, direction: Direction, delay: Duration) -> Result<()> {
        let milliseconds = u64::try_from(delay.as_millis())?;
        self.order(
            &format!("{PROXY}/toxics/delay-{}", direction.name()),
            &json!({"attributes": {"latency": milliseconds}}),
        )
    }

    /// From now on, all that goes in this direction is lost, while the connections stay and the other direction works. A
    /// connection that one side closes is closed on the other side too. Healing closes all connections: what is missing
    /// in the middle would make nonsense of the rest.
    ///
    /// # Errors
    /// The proxy does not answer.
    pub fn swallow(&self, direction: Direction) -> Result<()> {
        self.swallows.store(true, Ordering::Relaxed);
        self.set_swallowing(direction, true)
    }

    /// From now on, nothing goes through, and neither side hears of it: connections stay, even if the other side closes
    /// them, and new ones are accepted and get no answer. Healing lets through what was sent meanwhile, as the network does
    /// when it is back. Until then there can be no other fault.
    ///
    /// # Errors
    /// The system refuses.
    pub fn black_hole(&self) -> Result<()> {
        // Toxiproxy would pass on that one side has closed the connection. Who then notices at once has noticed nothing.
        self.process.pause()
    }

    /// Ends all faults.
    ///
    /// # Errors
    /// The proxy does not answer.
    pub fn heal(&self) -> Result<()> {
        self.process.signal(Signal::SIGCONT)?;
        if self.swallows.swap(false, Ordering::Relaxed) {
            self.cut()?;
        }
        for direction in [Direction::ToBroker, Direction::ToClient] {
            self.delay(direction, Duration::ZERO)?;
            self.set_swallowing(direction, false)?;
        }
        self.order(PROXY, &json!({"enabled": true}))
    }

    fn set_swallowing(&self, direction: Direction, swallows: bool) -> Result<()> {
        self.order(
            &format!("{PROXY}/toxics/swallow-{}", direction.name()),
            &json!({"toxicity": u8::from(swallows)}),
        )
    }

    /// What can be done to a connection later, in this order and without effect so far. Added only when it is wanted, the
    /// second would let through what the first one holds.
    fn add_toxics(&self) -> Result<()> {
        for direction in [Direction::ToBroker, Direction::ToClient] {
            let (name, stream) = (direction.name(), direction.stream());
            // A timeout of zero never comes: the connection stays.
            for toxic in [
                json!({"name": format!("delay-{name}"), "type": "latency", "stream": stream,
                    "attributes": {"latency": 0}}),
                json!({"name": format!("swallow-{name}"), "type": "timeout", "stream": stream,
                    "attributes": {"timeout": 0}, "toxicity": 0}),
            ] {
                self.order(&format!("{PROXY}/toxics"), &toxic)?;
            }
        }
        Ok(())
    }

    fn order(&self, path: &str, body: &serde_json::Value) -> Result<()> {
        let page = Page::of(format!("{}{path}", self.api));
        let (status, reason) = page
            .post(&body.to_string(), ORDER_LIMIT)
            .with_context(|| format!("the proxy does not obey {path} {body}"))?;
        ensure!(
            (200..300).contains(&status),
            "the proxy refuses {path} {body}: {status} {reason}"
        );
        Ok(())
    }

    fn await_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        let page = format!("{}/version", self.api);
        while http_get(&page, ORDER_LIMIT).is_none() {
            if let Some(status) = self.process.try_wait()? {
                bail!("the proxy ended at its start: {status}");
            }
            ensure!(Instant::now() < deadline, "the proxy does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

/// The one on PATH, else the one that Go builds.
pub(crate) fn program(home: &Home) -> Result<PathBuf> {
    let found = fetch::which("toxiproxy-server").or_else(|| MODULE.installed(home));
    match (found, fetch::which("go")) {
        (Some(program), _) => Ok(program),
        (None, Some(go)) => MODULE.install(home, &go),
        (None, None) => {
            bail!("this test needs Toxiproxy, which Go builds: {ADVICE}")
        }
    }
}
