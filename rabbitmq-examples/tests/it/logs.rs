//! Who gets which line, and that nothing is left behind.

use anyhow::Result;
use compose::harness::Running;

use crate::shared::{Place, TIMEOUT, vhost};

fn subscriber(place: &Place, program: &str, args: &[&str]) -> Result<Running> {
    place.start(program, args, "waiting for ")
}

/// What it printed between its first and its last line, once it has got the `last` line.
fn lines(mut running: Running, last: &str) -> Result<Vec<String>> {
    running.wait_for(last, TIMEOUT)?;
    running.interrupt()?;
    let ended = running.wait(TIMEOUT)?.ok()?;
    let lines: Vec<String> = ended.stdout.lines().map(String::from).collect();
    Ok(lines[1..lines.len() - 1].to_vec())
}

#[tokio::test]
async fn every_subscriber_gets_every_line_in_order_from_when_it_is_bound() -> Result<()> {
    const EMIT: &str = env!("CARGO_BIN_EXE_rabbitmq_emit_log");
    const RECEIVE: &str = env!("CARGO_BIN_EXE_rabbitmq_receive_logs");
    let place = vhost().await?;
    let early = place.run(EMIT, &["too early"])?.ok()?;
    assert_eq!(early.stdout, "nobody listens: too early\n");
    let mut killed = subscriber(&place, RECEIVE, &[])?;
    let first = subscriber(&place, RECEIVE, &[])?;
    let second = subscriber(&place, RECEIVE, &[])?;
    let sent = place.run(EMIT, &[])?.ok()?;
    assert_eq!(sent.stdout.lines().count(), 3, "{}", sent.stdout);
    assert!(sent.stdout.lines().all(|line| line.starts_with("sent: ")));
    killed.wait_for("ERROR: Connection lost", TIMEOUT)?;
    killed.kill()?;
    let expected = [
        "INFO: Server started",
        "WARN: High memory",
        "ERROR: Connection lost",
    ];
    assert_eq!(lines(first, expected[2])?, expected);
    assert_eq!(lines(second, expected[2])?, expected);
    // The queues went with their connections, also with that of the killed one, though it takes a moment.
    let gone = async {
        while place.run(EMIT, &["late"])?.ok()?.stdout != "nobody listens: late\n" {}
        anyhow::Ok(())
    };
    tokio::time::timeout(TIMEOUT, gone).await?
}

#[tokio::test]
async fn a_stalled_subscriber_loses_the_oldest_lines_and_not_the_broker_its_memory() -> Result<()> {
    let place = vhost().await?;
    let mut stalled = subscriber(&place, env!("CARGO_BIN_EXE_rabbitmq_receive_logs"), &[])?;
    stalled.pause()?;
    let options = lapin::options::BasicPublishOptions::default();
    let mut confirms = Vec::new();
    for number in 0..12_000 {
        let body = format!("line {number}");
        let properties = lapin::BasicProperties::default();
        let publish = place.channel.basic_publish(
            "logs".into(),
            "".into(),
            options,
            body.as_bytes(),
            properties,
        );
        confirms.push(publish.await?);
    }
    for confirm in confirms {
        confirm.await?;
    }
    stalled.resume()?;
    stalled.wait_for("line 11999", TIMEOUT)?;
    let got = stalled.lines();
    // A hundred were on their way to it when it stalled.
    assert!(got.len() < 10_200, "{} lines", got.len());
    assert!(!got.iter().any(|line| line == "line 1500"));
    Ok(())
}

#[tokio::test]
async fn a_direct_exchange_compares_the_whole_key() -> Result<()> {
    const EMIT: &str = env!("CARGO_BIN_EXE_rabbitmq_emit_log_direct");
    const RECEIVE: &str = env!("CARGO_BIN_EXE_rabbitmq_receive_logs_direct");
    let place = vhost().await?;
    let some = subscriber(&place, RECEIVE, &["warning", "error"])?;
    let all = subscriber(&place, RECEIVE, &[])?;
    for severity in ["info", "warning", "error"] {
        place.run(EMIT, &[severity, "x"])?.ok()?;
    }
    assert_eq!(lines(some, "error: x")?, ["warning: x", "error: x"]);
    assert_eq!(
        lines(all, "error: x")?,
        ["info: x", "warning: x", "error: x"]
    );
    for (program, args) in [
        (EMIT, ["Error", "x"].as_slice()),
        (EMIT, &["info"]),
        (RECEIVE, &["errors"]),
    ] {
        let refused = place.run(program, args)?;
        assert_eq!(refused.code(), 1, "{}", refused.stdout);
    }
    Ok(())
}

#[tokio::test]
async fn topic_patterns_choose_by_words_and_bring_one_copy() -> Result<()> {
    const EMIT: &str = env!("CARGO_BIN_EXE_rabbitmq_emit_log_topic");
    const RECEIVE: &str = env!("CARGO_BIN_EXE_rabbitmq_receive_logs_topic");
    let place = vhost().await?;
    let star = subscriber(&place, RECEIVE, &["kern.*"])?;
    let both = subscriber(&place, RECEIVE, &["kern.#", "*.critical"])?;
    let all = subscriber(&place, RECEIVE, &[])?;
    let keys = [
        "kern",
        "kern.critical",
        "kern.disk.critical",
        "auth.critical",
        "auth.info",
        "kern.end",
    ];
    for key in keys {
        place.run(EMIT, &[key, "x"])?.ok()?;
    }
    let end = "kern.end: x";
    assert_eq!(lines(star, end)?, ["kern.critical: x", end]);
    let expected = [
        "kern: x",
        "kern.critical: x",
        "kern.disk.critical: x",
        "auth.critical: x",
        end,
    ];
    assert_eq!(lines(both, end)?, expected);
    assert_eq!(lines(all, end)?, keys.map(|key| format!("{key}: x")));
    let long = "k".repeat(256);
    assert_eq!(place.run(EMIT, &[&long, "x"])?.code(), 1);
    assert_eq!(place.run(RECEIVE, &[&long])?.code(), 1);
    Ok(())
}

#[tokio::test]
async fn headers_match_all_or_any() -> Result<()> {
    const EMIT: &str = env!("CARGO_BIN_EXE_rabbitmq_emit_log_headers");
    const RECEIVE: &str = env!("CARGO_BIN_EXE_rabbitmq_receive_logs_headers");
    let place = vhost().await?;
    let all = subscriber(&place, RECEIVE, &["all", "service=auth", "level=error"])?;
    let any = subscriber(&place, RECEIVE, &["any", "service=auth", "level=error"])?;
    for (service, level) in [
        ("auth", "info"),
        ("mail", "info"),
        ("mail", "error"),
        ("auth", "error"),
    ] {
        place
            .run(
                EMIT,
                &[
                    &format!("service={service}"),
                    &format!("level={level}"),
                    "x",
                ],
            )?
            .ok()?;
    }
    let end = "level=error service=auth: x";
    assert_eq!(lines(all, end)?, [end]);
    assert_eq!(
        lines(any, end)?,
        [
            "level=info service=auth: x",
            "level=error service=mail: x",
            end
        ]
    );
    let long = format!("{}=1", "k".repeat(256));
    for bad in [long.as_str(), "x-match=any", "=1", "level"] {
        assert_eq!(place.run(EMIT, &[bad, "x"])?.code(), 1, "{bad}");
        assert_eq!(place.run(RECEIVE, &["all", bad])?.code(), 1, "{bad}");
    }
    Ok(())
}
