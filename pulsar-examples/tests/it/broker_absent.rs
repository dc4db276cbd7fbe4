//! No broker: one error that names the address and the way out, and soon.

use anyhow::Result;
use compose::Service;
use compose::harness::broker_absent;

#[test]
fn without_a_broker_the_error_says_where_and_what_to_do() -> Result<()> {
    broker_absent(
        Service::Pulsar,
        &[
            env!("CARGO_BIN_EXE_pulsar_consumer"),
            env!("CARGO_BIN_EXE_pulsar_producer"),
        ],
    )
}
