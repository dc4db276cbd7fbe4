//! Kafka's own command-line tools: a second opinion on a secured broker, and how a test acts as its administrator.

use std::collections::HashMap;
use std::process::Command;

use anyhow::Result;

use crate::home::Home;
use crate::{Broker, services};

/// One of Kafka's own tools, by the name of its class, such as `org.apache.kafka.tools.TopicCommand`, ready for its
/// further arguments. It connects with TLS as these variables say: those of [`Broker::secured_env`], or a test's own.
///
/// # Errors
/// Kafka cannot be fetched, or the broker's folder cannot be written.
pub fn kafka_tool(broker: &Broker, class: &str, env: &HashMap<String, String>) -> Result<Command> {
    // Tools that run at the same time do not share a folder.
    let folder = broker
        .folder()
        .join(format!("tool-{:08x}", fastrand::u32(..)));
    services::kafka_tool(&Home::from_env()?, &folder, class, env)
}
