//! The transcripts of a package's examples as tests: one for each example, on brokers that the package chooses.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use libtest_mimic::{Arguments, Failed, Trial};

use super::TIMEOUT;
use super::transcript::{Failure, Fault, Stage, Transcript};
use crate::workspace::{ExampleInfo, Workspace};
use crate::{Broker, Service, User};

/// How many transcripts run side by side, unless `--test-threads` says otherwise. Most of their time is a broker's start,
/// and waiting for what they show.
const AT_ONCE: usize = 4;

/// The `main` of a test target with `harness = false`: runs the transcripts in the headers of a package's examples, each
/// as a test with the name of its example.
///
/// It takes the arguments of other test programs, such as a part of a name. `binary` is the path of any binary of the
/// package; the others are beside it. `supply` gives the brokers for an example: [`private_brokers`], or those of a
/// [`Pool`](crate::harness::Pool).
///
/// ```ignore
/// fn main() -> std::process::ExitCode {
///     use compose::harness::{private_brokers, transcripts};
///     transcripts(env!("CARGO_PKG_NAME"), env!("CARGO_BIN_EXE_nats_publish"), private_brokers)
/// }
/// ```
pub fn transcripts(
    package: &str,
    binary: &str,
    supply: fn(&ExampleInfo) -> Result<Vec<Arc<Broker>>>,
) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_ONCE);
    match tests(package, binary, supply) {
        Ok(tests) => libtest_mimic::run(&arguments, tests).exit_code(),
        // Not as a failed test: that one could be filtered out.
        Err(error) => {
            eprintln!("Error: no transcript of {package} was run: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// New brokers for an example, one of each service that it needs, or a cluster if it needs several nodes.
///
/// # Errors
/// The manifest names a service that does not exist, or a broker does not start.
pub fn private_brokers(example: &ExampleInfo) -> Result<Vec<Arc<Broker>>> {
    let services = example.services.iter();
    services
        .map(|name| private_broker(name.parse()?, example))
        .collect()
}

pub(super) fn private_broker(service: Service, example: &ExampleInfo) -> Result<Arc<Broker>> {
    let broker = if example.needs_secured(service) {
        Broker::secure(service)
    } else {
        Broker::private_cluster(service, example.nodes)
    };
    broker.map(Arc::new)
}

fn tests(
    package: &str,
    binary: &str,
    supply: fn(&ExampleInfo) -> Result<Vec<Arc<Broker>>>,
) -> Result<Vec<Trial>> {
    let workspace = Workspace::load()?;
    let examples = workspace.examples().iter();
    let examples: Vec<&ExampleInfo> = examples.filter(|one| one.package == package).collect();
    ensure!(!examples.is_empty(), "the package has no examples");
    let programs = Path::new(binary)
        .parent()
        .context("the path of a binary has a folder")?;
    let package = Arc::new(Package {
        root: workspace.root().to_owned(),
        programs: programs.to_owned(),
        names: examples.iter().map(|one| one.name.clone()).collect(),
    });
    let test = |example: &ExampleInfo| {
        let (package, example) = (package.clone(), example.clone());
        Trial::test(example.name.clone(), move || {
            package.test(&example, supply).map_err(Failed::from)
        })
    };
    Ok(examples.into_iter().map(test).collect())
}

/// What the tests of a package have in common.
struct Package {
    /// The folder of the workspace: failures name files from there.
    root: PathBuf,
    /// The folder with the built programs.
    programs: PathBuf,
    /// The names of its examples.
    names: Vec<String>,
}

impl Package {
    /// The error is the failure with its file and line.
    fn test(
        &self,
        example: &ExampleInfo,
        supply: impl Fn(&ExampleInfo) -> Result<Vec<Arc<Broker>>>,
    ) -> Result<(), String> {
        self.run(example, supply).map_err(|failure| {
            let file = example.source.strip_prefix(&self.root);
            let file = file.unwrap_or(&example.source).display();
            format!("{file}:{failure}")
        })
    }

    fn run(
        &self,
        example: &ExampleInfo,
        supply: impl Fn(&ExampleInfo) -> Result<Vec<Arc<Broker>>>,
    ) -> Result<(), Failure> {
        let fail = |reason| Failure {
            line: example.header_line,
            reason,
        };
        let transcripts = Transcript::parse(&example.header, example.header_line)?;
        let mut programs = transcripts.iter().flat_map(Transcript::programs);
        if !programs.any(|program| program == example.name) {
            let name = &example.name;
            return Err(fail(anyhow!(
                "the header has no ```console block that runs {name}"
            )));
        }
        let brokers = supply(example)
            .context("no broker for the transcript")
            .map_err(fail)?;
        let env = brokers
            .iter()
            .map(|broker| match example.needs_secured(broker.service()) {
                true => broker.secured_env(User::Application),
                false => Ok(broker.env()),
            });
        let env = env.collect::<Result<Vec<_>>>().map_err(fail)?.concat();
        let folder = tempfile::tempdir()
            .context("cannot make a temporary folder")
            .map_err(fail)?;
        let stage = Stage {
            programs: &self.programs,
            allowed: &self.names,
            folder: folder.path(),
            env: &env,
            fault: &|fault, service, node| do_to_broker(&brokers, fault, service, node),
            limit: TIMEOUT,
        };
        // The blocks of one header follow one another on the same broker, as they would for a reader.
        transcripts.iter().try_for_each(|one| one.run(&stage))
    }
}

fn do_to_broker(brokers: &[Arc<Broker>], fault: Fault, service: &str, node: u16) -> Result<()> {
    let service: Service = service.parse()?;
    let mut brokers = brokers.iter();
    let broker = brokers.find(|broker| broker.service() == service).with_context(|| {
        format!("no {service} is under test; [package.metadata.lab] lists the services that an example needs")
    })?;
    match fault {
        Fault::Kill => broker.kill(node),
        Fault::Pause => broker.pause(node),
        Fault::Resume => broker.resume(node),
        Fault::Restart => broker.restart(node),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tests an example whose program is one of the system's.
    fn test(name: &str, header: &str, brokers: &[Arc<Broker>]) -> Result<(), String> {
        let example = ExampleInfo {
            name: name.to_owned(),
            package: "shell-examples".to_owned(),
            title: "Title".to_owned(),
            source: PathBuf::from(format!("/workspace/src/bin/{name}.rs")),
            services: Vec::new(),
            nodes: 1,
            secure: false,
            features: Vec::new(),
            header: header.to_owned(),
            header_line: 3,
        };
        let package = Package {
            root: "/workspace".into(),
            programs: "/bin".into(),
            names: vec![name.to_owned()],
        };
        package.test(&example, |_| Ok(brokers.to_vec()))
    }

    #[test]
    fn a_failure_shows_file_and_line() {
        for (name, header, failure) in [
            (
                "ls",
                "No transcript.\n",
                "src/bin/ls.rs:3: the header has no ```console block that runs ls",
            ),
            (
                "true",
                "Another's.\n```console\n$ cargo lab run sh\n```\n",
                "src/bin/true.rs:3: the header has no ```console block that runs true",
            ),
            (
                "echo",
                "A wrong line.\n```console\n$ cargo lab run echo hi\nho\n```\n",
                "src/bin/echo.rs:5: echo printed something else: \"hi\" does not fit",
            ),
            (
                "pwd",
                "No transcript can do this.\n```console\n$ cat\n```\n",
                "src/bin/pwd.rs:5: `cat`: a transcript can only run",
            ),
            (
                "true",
                "Not its broker.\n```console\n$ cargo lab run true\n$ cargo lab kill nats\n```\n",
                "src/bin/true.rs:6: no nats is under test",
            ),
        ] {
            let error = test(name, header, &[]).unwrap_err();
            assert!(error.starts_with(failure), "{failure:?} is not:\n{error}");
        }
    }

    #[test]
    fn the_blocks_of_a_header_follow_one_another_on_the_same_broker() {
        let brokers = [Arc::new(Broker::private(Service::Nats).unwrap())];
        let header = "A.\n```console\n$ cargo lab run sh -c 'echo $NATS_URL >url'\n$ cargo lab kill nats\n```\n\
                      B.\n```console\n$ cargo lab run sh -c 'test $(cat url) = $NATS_URL && echo same'\nsame\n```\n";
        test("sh", header, &brokers).unwrap();
        assert!(!brokers[0].is_running(1).unwrap());
    }
}
