//! Real brokers under the examples, with no set-up.
//!
//! [`Broker`] is a running Kafka, RabbitMQ, NATS, Pulsar or OpenSearch that dies with the process that started it,
//! whatever way that process ends. Tests start private ones on free ports; `cargo lab` starts the learner's on the
//! default ports. [`workspace`] knows the examples and what each needs. With the feature `harness` there is also what
//! their tests are made of: running a header's transcript, and breaking things on purpose.

pub mod broker;
pub mod docker;
pub mod fetch;
#[cfg(feature = "harness")]
pub mod harness;
pub mod home;
pub mod ports;
pub mod probe;
pub mod process;
pub mod recipe;
pub mod registry;
pub mod service;
pub mod workspace;

pub use broker::Broker;
pub use service::Service;
