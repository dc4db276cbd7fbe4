//! What the headers of the RabbitMQ examples show and claim, tried on a real broker.

mod broker_absent;
mod send_receive;

#[test]
fn transcripts() {
    compose::harness::transcripts(env!("CARGO_PKG_NAME"), env!("CARGO_BIN_EXE_rabbitmq_send"));
}
