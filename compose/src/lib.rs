//! Real brokers under the examples, with no set-up.
//!
//! [`Broker`] is a running [`Service`], such as Kafka, that dies with the process that started it, whatever way that
//! process ends. Tests start private ones on free ports; `cargo lab` starts the learner's
//! on the default ports. With the feature `harness` there is also what the tests of the examples are made of: running a
//! header's transcript, and breaking things on purpose.

mod broker;
mod docker;
mod fetch;
mod files;
#[cfg(feature = "harness")]
pub mod harness;
mod home;
// These panic when the reader of a pipe has left.
#[deny(clippy::print_stdout, clippy::print_stderr)]
mod lab;
mod ports;
mod probe;
mod process;
mod security;
mod services;
mod terminal;
mod workspace;

pub use broker::Broker;
#[doc(hidden)]
pub use lab::main as lab;
pub use security::User;
pub use services::Service;
