//! What each program does without its broker: at the start, and when it is silent meanwhile.

use std::time::Duration;

use anyhow::Result;
use compose::harness::{Example, TIMEOUT, broker_absent};
use compose::{Broker, Service};

/// All but rabbitmq_queue_monitor, which speaks HTTP; see there.
#[test]
fn without_a_broker_the_error_says_where_and_what_to_do() -> Result<()> {
    broker_absent(
        Service::RabbitMq,
        &[
            env!("CARGO_BIN_EXE_rabbitmq_dead_letter"),
            env!("CARGO_BIN_EXE_rabbitmq_emit_log"),
            env!("CARGO_BIN_EXE_rabbitmq_emit_log_direct"),
            env!("CARGO_BIN_EXE_rabbitmq_emit_log_headers"),
            env!("CARGO_BIN_EXE_rabbitmq_emit_log_topic"),
            env!("CARGO_BIN_EXE_rabbitmq_graceful_shutdown"),
            env!("CARGO_BIN_EXE_rabbitmq_idempotent_consumer"),
            env!("CARGO_BIN_EXE_rabbitmq_mandatory"),
            env!("CARGO_BIN_EXE_rabbitmq_new_task"),
            env!("CARGO_BIN_EXE_rabbitmq_pitfall_missing_ack"),
            env!("CARGO_BIN_EXE_rabbitmq_priority"),
            env!("CARGO_BIN_EXE_rabbitmq_publisher_confirms"),
            env!("CARGO_BIN_EXE_rabbitmq_quorum_queue"),
            env!("CARGO_BIN_EXE_rabbitmq_receive"),
            env!("CARGO_BIN_EXE_rabbitmq_receive_logs"),
            env!("CARGO_BIN_EXE_rabbitmq_receive_logs_direct"),
            env!("CARGO_BIN_EXE_rabbitmq_receive_logs_headers"),
            env!("CARGO_BIN_EXE_rabbitmq_receive_logs_topic"),
            env!("CARGO_BIN_EXE_rabbitmq_reconnect"),
            env!("CARGO_BIN_EXE_rabbitmq_retry_backoff"),
            env!("CARGO_BIN_EXE_rabbitmq_rpc_client"),
            env!("CARGO_BIN_EXE_rabbitmq_rpc_server"),
            env!("CARGO_BIN_EXE_rabbitmq_send"),
            env!("CARGO_BIN_EXE_rabbitmq_stream"),
            env!("CARGO_BIN_EXE_rabbitmq_tracing"),
            env!("CARGO_BIN_EXE_rabbitmq_ttl_overflow"),
            env!("CARGO_BIN_EXE_rabbitmq_worker"),
        ],
    )
}

/// Frozen, the broker answers neither the cancel nor the close, and its connections stay open.
#[test]
fn ctrl_c_ends_every_consumer_although_the_broker_is_silent() -> Result<()> {
    /// Much less than it takes to miss the heartbeats of a connection.
    const LIMIT: Duration = Duration::from_secs(40);
    let consumers: [(_, &[&str]); 13] = [
        (env!("CARGO_BIN_EXE_rabbitmq_graceful_shutdown"), &[]),
        (env!("CARGO_BIN_EXE_rabbitmq_idempotent_consumer"), &[]),
        (env!("CARGO_BIN_EXE_rabbitmq_quorum_queue"), &[]),
        (env!("CARGO_BIN_EXE_rabbitmq_receive"), &[]),
        (env!("CARGO_BIN_EXE_rabbitmq_receive_logs"), &[]),
        (
            env!("CARGO_BIN_EXE_rabbitmq_receive_logs_direct"),
            &["error"],
        ),
        (
            env!("CARGO_BIN_EXE_rabbitmq_receive_logs_headers"),
            &["all", "format=pdf"],
        ),
        (env!("CARGO_BIN_EXE_rabbitmq_receive_logs_topic"), &["#"]),
        (env!("CARGO_BIN_EXE_rabbitmq_retry_backoff"), &[]),
        (env!("CARGO_BIN_EXE_rabbitmq_rpc_server"), &[]),
        (env!("CARGO_BIN_EXE_rabbitmq_stream"), &["first"]),
        (env!("CARGO_BIN_EXE_rabbitmq_tracing"), &[]),
        (env!("CARGO_BIN_EXE_rabbitmq_worker"), &["3"]),
    ];
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    let folder = tempfile::tempdir()?;
    let mut running = Vec::new();
    for (program, args) in consumers {
        let example = Example::new(program).args(args).current_dir(folder.path());
        // As long as it may take for what a service manager stops.
        let example = example.env("GRACE_SECONDS", "5");
        running.push(example.broker(&rabbitmq).spawn()?);
    }
    for consumer in &mut running {
        consumer.wait_for("; Ctrl-C ", TIMEOUT)?;
    }
    rabbitmq.pause(1)?;
    for consumer in &mut running {
        consumer.interrupt()?;
    }
    for mut consumer in running {
        let ended = consumer.wait(LIMIT)?;
        assert_eq!(ended.code(), 1, "{}", ended.stdout);
        assert!(
            ended.stderr.contains("the broker does not answer the c"),
            "{}",
            ended.stderr
        );
        assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    }
    rabbitmq.resume(1)
}
