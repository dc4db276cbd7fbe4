//! Core NATS: who gets a message, what is lost, and what is not.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use async_nats::Request;
use compose::harness::{Example, Running, http_get};
use futures::StreamExt;
use tokio::time::timeout;

use crate::nats::{TIMEOUT, handed_over, round_trip, run, server, start, stop, until};

const GROUP: &str = env!("CARGO_BIN_EXE_nats_queue_group");
const DRAIN: &str = env!("CARGO_BIN_EXE_nats_drain");
const RECONNECT: &str = env!("CARGO_BIN_EXE_nats_reconnect");
const HEADERS: &str = env!("CARGO_BIN_EXE_nats_headers");
const GATHER: &str = env!("CARGO_BIN_EXE_nats_scatter_gather");
const RESPONDER: &str = env!("CARGO_BIN_EXE_nats_responder");
const SERVICE: &str = env!("CARGO_BIN_EXE_nats_service");
const SLOW: &str = env!("CARGO_BIN_EXE_nats_slow_consumer");

fn member(name: &str, nats: &compose::Broker) -> Result<Running> {
    let mut member = start(GROUP, &["join", name], nats)?;
    member.wait_for("joined", TIMEOUT)?;
    Ok(member)
}

fn jobs(member: &mut Running) -> Vec<u32> {
    let number = |line: &String| line.split_once(": job-")?.1.parse().ok();
    member.lines().iter().filter_map(number).collect()
}

#[tokio::test]
async fn members_share_while_they_come_and_go_and_a_killed_one_loses() -> Result<()> {
    let nats = server()?;
    let client = async_nats::connect(nats.address()).await?;
    let send = async |numbers: std::ops::Range<u32>| {
        for number in numbers {
            client
                .publish("jobs.new", format!("job-{number}").into())
                .await?;
        }
        round_trip(&client).await;
        anyhow::Ok(())
    };
    let (mut anna, mut ben) = (member("anna", &nats)?, member("ben", &nats)?);
    send(0..200).await?;
    until("200 jobs are done", || {
        Ok(jobs(&mut anna).len() + jobs(&mut ben).len() >= 200)
    })?;
    let (of_anna, of_ben) = (jobs(&mut anna), jobs(&mut ben));
    assert!(
        !of_anna.is_empty() && !of_ben.is_empty(),
        "one of them did nothing"
    );
    let all: BTreeSet<u32> = of_anna.iter().chain(&of_ben).copied().collect();
    assert_eq!(
        (all.len(), of_anna.len() + of_ben.len()),
        (200, 200),
        "each of them once"
    );

    stop(anna)?;
    send(200..250).await?;
    until("the other does all", || {
        Ok(jobs(&mut ben).len() == of_ben.len() + 50)
    })?;

    // Frozen, so that it has not looked at them when it is killed.
    ben.pause()?;
    send(250..300).await?;
    ben.kill()?;
    let mut carl = member("carl", &nats)?;
    send(300..310).await?;
    until("the new one works", || Ok(jobs(&mut carl).len() >= 10))?;
    assert_eq!(
        jobs(&mut carl),
        (300..310).collect::<Vec<_>>(),
        "what ben had is nobody's"
    );
    stop(carl)?;
    Ok(())
}

/// Frozen while they come and told to stop before it can look at them: few enough to be in its socket then.
#[tokio::test]
async fn what_a_stopped_program_has_been_given_it_answers_all_of_it() -> Result<()> {
    const MANY: usize = 60;
    let nats = server()?;
    let client = async_nats::connect(nats.address()).await?;
    let cases: [(&str, &[&str], &str, bool); 5] = [
        (DRAIN, &[], "drain.work", true),
        (RESPONDER, &[], "rpc.add", true),
        (SERVICE, &[], "text.upper", true),
        (GATHER, &["offer", "north", "120"], "quotes.ask", true),
        // No requests: what it prints is the sign.
        (HEADERS, &[], "headers.orders", false),
    ];
    for (program, args, subject, answers) in cases {
        let mut program = start(program, args, &nats)?;
        let inbox = client.new_inbox();
        let mut answered = client.subscribe(inbox.clone()).await?;
        let send = async || {
            let sent = client.publish_with_reply(subject, inbox.clone(), r#"{"work_ms":1}"#.into());
            sent.await
        };
        // The first one is handled: so it is subscribed, and listens for signals.
        until("it subscribes", || {
            let page = format!("{}/subsz?subs=1", nats.web()[0]);
            Ok(http_get(&page, TIMEOUT).is_some_and(|(_, text)| text.contains(subject)))
        })?;
        send().await?;
        round_trip(&client).await;
        if answers {
            timeout(TIMEOUT, answered.next()).await?;
        } else {
            program.wait_for("process", TIMEOUT)?;
        }
        program.pause()?;
        for _ in 0..MANY {
            send().await?;
        }
        handed_over(&nats, &client).await?;
        program.interrupt()?;
        program.resume()?;
        let ended = program.wait(TIMEOUT)?.ok()?;
        if answers {
            for number in 0..MANY {
                let answer = timeout(TIMEOUT, answered.next()).await;
                answer.with_context(|| format!("{number} answers from {subject}"))?;
            }
        } else {
            let processed = ended.stdout.matches("process headers.orders").count();
            assert_eq!(processed, MANY + 1);
        }
    }
    Ok(())
}

#[tokio::test]
async fn an_answer_that_is_too_large_is_an_error_and_no_silence() -> Result<()> {
    let nats = server()?;
    let client = async_nats::connect(nats.address()).await?;
    let largest = client.max_payload();
    let cases = [
        // With one word more, it can't be sent.
        (DRAIN, "working", "drain.work", "x".repeat(largest)),
        // Two bytes here are three in capitals.
        (
            SERVICE,
            "serves",
            "text.upper",
            "\u{149}".repeat(largest / 2),
        ),
    ];
    for (program, ready, subject, payload) in cases {
        let mut program = start(program, &[], &nats)?;
        program.wait_for(ready, TIMEOUT)?;
        let request = Request::new()
            .payload(payload.into())
            .timeout(Some(TIMEOUT));
        let answer = client.send_request(subject, request).await?;
        let headers = answer.headers.unwrap_or_default();
        assert!(headers.get("Nats-Service-Error").is_some(), "{subject}");
        assert!(answer.payload.is_empty());
        stop(program)?;
    }
    Ok(())
}

#[test]
fn three_bursts_at_the_same_time_do_not_count_each_others_readings() -> Result<()> {
    let nats = server()?;
    let mut programs = Vec::new();
    for _ in 0..3 {
        programs.push(start(SLOW, &[], &nats)?);
    }
    for mut program in programs {
        let said = program.wait(TIMEOUT)?.ok()?.stdout;
        for line in [
            "a buffer of 100: sent 1000, received 100, lost 900\n",
            "a buffer of 2000: sent 1000, received 1000, lost 0\n",
            "JetStream: sent 1000, received 1000, lost 0\n",
        ] {
            assert!(said.contains(line), "no {line:?} in {said}");
        }
    }
    Ok(())
}

#[test]
fn a_worker_that_ends_answers_all_that_it_has_and_nothing_stays_unanswered() -> Result<()> {
    let nats = server()?;
    let worker = || -> Result<Running> {
        let program = Example::new(DRAIN).env("WORK_MS", "20").broker(&nats);
        let mut worker = program.spawn()?;
        worker.wait_for("working", TIMEOUT)?;
        Ok(worker)
    };
    let (mut leaving, staying) = (worker()?, worker()?);
    let mut asking = start(DRAIN, &["ask", "60"], &nats)?;
    leaving.wait_for("in hand", TIMEOUT)?;
    // As a service manager does.
    leaving.terminate()?;
    let ended = leaving.wait(TIMEOUT)?.ok()?;
    let said = ended
        .stdout
        .lines()
        .find(|line| line.starts_with("all answered"));
    let said = said.unwrap_or_default();
    let numbers: Vec<u32> = said
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|n| n.parse().ok())
        .collect();
    assert_eq!(numbers.len(), 2, "{said}");
    assert_eq!(numbers[0], numbers[1], "received and not answered");
    // More than the one that was in hand: the buffer was worked off.
    assert_eq!(numbers[0] as usize, ended.stdout.matches("in hand").count());
    assert!(ended.stdout.ends_with("closed\n"));
    let asked = asking.wait(TIMEOUT)?.ok()?;
    assert!(asked.stdout.ends_with("answered 60\n"), "{}", asked.stdout);
    stop(staying)?;
    Ok(())
}

#[test]
fn the_client_comes_back_subscribes_again_and_counts_what_is_lost() -> Result<()> {
    let nats = server()?;
    let mut ticks = start(RECONNECT, &[], &nats)?;
    // Another one beside it: its ticks are not to be counted.
    let mut other = start(RECONNECT, &[], &nats)?;
    other.wait_for("received: tick", TIMEOUT)?;
    for _ in 0..2 {
        ticks.wait_for("received: tick", TIMEOUT)?;
        nats.kill(1)?;
        ticks.wait_for("event: disconnected", TIMEOUT)?;
        ticks.wait_for("the buffer is full", TIMEOUT)?;
        nats.restart(1)?;
        ticks.wait_for("event: connected", TIMEOUT)?;
        ticks.wait_for("received: tick", TIMEOUT)?;
    }
    stop(other)?;
    let ended = stop(ticks)?;
    let last = ended.stdout.lines().last().unwrap_or_default();
    let numbers: Vec<usize> = last
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|n| n.parse().ok())
        .collect();
    let [published, not_sent, received, lost] = numbers[..] else {
        panic!("{last}");
    };
    let seen: Vec<usize> = ended
        .stdout
        .lines()
        .filter_map(|line| line.strip_prefix("received: tick ")?.parse().ok())
        .collect();
    assert_eq!(seen.len(), received);
    assert!(
        seen.windows(2).all(|pair| pair[0] < pair[1]),
        "in order, and none twice"
    );
    let missing = (1..=published).filter(|number| !seen.contains(number));
    assert_eq!(missing.count(), lost, "{last}");
    assert!(not_sent >= 2, "{last}");
    assert!(received > 20, "too few to say anything: {last}");
    Ok(())
}

#[test]
fn the_first_connection_is_tried_again_too() -> Result<()> {
    let nats = server()?;
    // The server takes a moment, and the five seconds are the example's: not each try need succeed on a busy machine.
    for _ in 0..5 {
        nats.kill(1)?;
        let mut ticks = start(RECONNECT, &[], &nats)?;
        nats.restart(1)?;
        if ticks.wait_for("received: tick", TIMEOUT).is_ok() {
            stop(ticks)?;
            return Ok(());
        }
    }
    panic!("it never connected");
}

#[tokio::test]
async fn a_trace_goes_on_in_the_subscriber_and_nothing_broken_stops_it() -> Result<()> {
    let nats = server()?;
    let client = async_nats::connect(nats.address()).await?;
    let mut subscriber = start(HEADERS, &[], &nats)?;
    subscriber.wait_for("waiting", TIMEOUT)?;
    // Without headers, with a broken context, without a payload and without text.
    client
        .publish("headers.orders", r#"{"work_ms":0}"#.into())
        .await?;
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("traceparent", "00-zz-zz-01");
    headers.insert("Order-Id", "broken");
    client
        .publish_with_headers("headers.orders", headers, r#"{"work_ms":0}"#.into())
        .await?;
    client.publish("headers.orders", "".into()).await?;
    // It would hold all others up for ever.
    let endless = format!(r#"{{"work_ms":{}}}"#, u64::MAX);
    client.publish("headers.orders", endless.into()).await?;
    client
        .publish("headers.orders", b"\xff".to_vec().into())
        .await?;
    round_trip(&client).await;
    let sent = run(HEADERS, &["send"], &nats)?.ok()?;
    subscriber.wait_for("order-3: not an order", TIMEOUT)?;
    subscriber.wait_for("process headers.orders", TIMEOUT)?;
    let received = stop(subscriber)?.stdout;
    assert!(received.contains("INFO broken: handled"), "{received}");
    assert!(
        received.contains("INFO order without id: handled"),
        "{received}"
    );
    assert!(
        received.contains("order-1: application/json, tags new, gift"),
        "{received}"
    );
    assert!(received.contains("WARN order-2: took"), "{received}");
    assert!(!received.contains("WARN order-1"), "{received}");

    // trace T span S parent P: ...
    let spans = |text: &str, what: &str| -> Vec<(String, String, String)> {
        let lines = text
            .lines()
            .filter(|line| line.starts_with("trace ") && line.contains(what));
        lines
            .map(|line| {
                let words: Vec<&str> = line.split([' ', ':']).collect();
                (words[1].into(), words[3].into(), words[5].into())
            })
            .collect()
    };
    let sends = spans(&sent.stdout, "send headers.orders");
    assert_eq!(sends.len(), 3, "{}", sent.stdout);
    let processed = spans(&received, "process headers.orders");
    assert_eq!(processed.len(), 8, "{received}");
    for (trace, span, _) in &sends {
        let caused = processed
            .iter()
            .filter(|(of, _, parent)| of == trace && parent == span);
        assert_eq!(caused.count(), 1, "{trace} {span} in {received}");
    }
    let roots = processed.iter().filter(|(_, _, parent)| parent == "none");
    assert_eq!(roots.count(), 5, "{received}");
    Ok(())
}
