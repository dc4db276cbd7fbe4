//! Every request gets an answer, and the requester can tell why it got none.

use std::time::Duration;

use anyhow::Result;
use async_nats::Request;
use futures::StreamExt;

use crate::nats::{TIMEOUT, round_trip, run, server, start, stop};

const RESPONDER: &str = env!("CARGO_BIN_EXE_nats_responder");
const REQUESTER: &str = env!("CARGO_BIN_EXE_nats_requester");
const GATHER: &str = env!("CARGO_BIN_EXE_nats_scatter_gather");
const SERVICE: &str = env!("CARGO_BIN_EXE_nats_service");

#[tokio::test]
async fn malformed_requests_get_an_error_and_the_responder_lives_on() -> Result<()> {
    let nats = server()?;
    let client = async_nats::connect(nats.address()).await?;
    let mut responder = start(RESPONDER, &[], &nats)?;
    responder.wait_for("answering", TIMEOUT)?;
    let large = vec![b'x'; 900_000];
    let cases: [(&[u8], Result<&str, &str>); 12] = [
        (b"10, 20, 30", Ok("60")),
        (b"-5", Ok("-5")),
        (b"9223372036854775807, 1", Err("422")),
        (b"-9223372036854775808, -1", Err("422")),
        (b"9223372036854775808", Err("400")),
        (b"ten", Err("400")),
        (b"", Err("400")),
        (b"1,,2", Err("400")),
        (b"\xff\xfe", Err("400")),
        (b"1,\r\nNats-Evil: 1\r\n\r\n", Err("400")),
        (&large, Err("400")),
        (b" 1 ,2 ", Ok("3")),
    ];
    // Nobody waits for an answer to this.
    client.publish("rpc.add", "1".into()).await?;
    for (request, expected) in cases {
        let reply = client.request("rpc.add", request.to_vec().into()).await?;
        let headers = reply.headers.unwrap_or_default();
        let code = headers
            .get("Nats-Service-Error-Code")
            .map(|code| code.as_str());
        let shown = String::from_utf8_lossy(&request[..request.len().min(30)]);
        match expected {
            Ok(sum) => assert_eq!(
                (code, &reply.payload[..]),
                (None, sum.as_bytes()),
                "{shown}"
            ),
            Err(expected) => {
                assert_eq!(code, Some(expected), "{shown}");
                assert!(headers.get("Nats-Service-Error").is_some(), "{shown}");
                assert!(headers.get("Nats-Evil").is_none(), "{shown}");
                assert!(
                    reply.payload.is_empty(),
                    "an error must not look like a sum"
                );
            }
        }
    }
    let ended = stop(responder)?;
    assert!(
        ended.stdout.ends_with("requests answered: 13\n"),
        "{}",
        ended.stdout
    );
    Ok(())
}

#[test]
fn no_responders_a_timeout_and_an_answer_are_three_things() -> Result<()> {
    let nats = server()?;
    let nobody = run(REQUESTER, &["1"], &nats)?;
    assert_eq!(nobody.code(), 1);
    assert!(nobody.stderr.contains("no responders"), "{}", nobody.stderr);

    let mut responder = start(RESPONDER, &[], &nats)?;
    responder.wait_for("answering", TIMEOUT)?;
    responder.pause()?;
    let silence = run(REQUESTER, &["1"], &nats)?;
    assert_eq!(silence.code(), 1);
    assert!(
        silence.stderr.contains("no answer to \"1\" within 2s"),
        "{}",
        silence.stderr
    );

    responder.resume()?;
    let answer = run(REQUESTER, &["1", "2"], &nats)?.ok()?;
    assert_eq!(answer.stdout, "1, 2 -> 3\n");
    stop(responder)?;
    Ok(())
}

#[tokio::test]
async fn several_responders_share_and_each_request_is_answered_once() -> Result<()> {
    const MANY: usize = 200;
    let nats = server()?;
    let client = async_nats::connect(nats.address()).await?;
    let mut responders = Vec::new();
    for _ in 0..2 {
        let mut responder = start(RESPONDER, &[], &nats)?;
        responder.wait_for("answering", TIMEOUT)?;
        responders.push(responder);
    }
    // Collected in an inbox: a request would hide a second answer.
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await?;
    for number in 0..MANY {
        client
            .publish_with_reply("rpc.add", inbox.clone(), number.to_string().into())
            .await?;
    }
    let mut seen = Vec::new();
    for _ in 0..MANY {
        let answer = tokio::time::timeout(TIMEOUT, answers.next())
            .await?
            .unwrap();
        seen.push(std::str::from_utf8(&answer.payload)?.parse::<usize>()?);
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..MANY).collect::<Vec<_>>());
    let mut total = 0;
    for responder in responders {
        let ended = stop(responder)?;
        let answered: usize = ended.stdout.rsplit_once(": ").unwrap().1.trim().parse()?;
        assert!(answered > 0, "one of them did nothing");
        total += answered;
    }
    assert_eq!(total, MANY);
    Ok(())
}

#[tokio::test]
async fn the_gatherer_takes_what_comes_in_time_and_what_makes_sense() -> Result<()> {
    let nats = server()?;
    let nobody = run(GATHER, &["ask", "all"], &nats)?;
    assert_eq!(nobody.code(), 1);
    assert!(nobody.stderr.contains("nobody offers"), "{}", nobody.stderr);

    let client = async_nats::connect(nats.address()).await?;
    let mut questions = client.subscribe("quotes.ask").await?;
    round_trip(&client).await;
    let nonsense = tokio::spawn(async move {
        while let Some(question) = questions.next().await {
            let reply = question.reply.unwrap();
            client
                .publish(reply.clone(), b"\xff\xff".to_vec().into())
                .await?;
            client.publish(reply.clone(), "".into()).await?;
            client
                .publish(reply, "cheapest: not a price".into())
                .await?;
        }
        anyhow::Ok(())
    });
    let mut shops = Vec::new();
    for (name, price) in [("a", "3"), ("b", "2"), ("frozen", "1")] {
        let mut shop = start(GATHER, &["offer", name, price], &nats)?;
        shop.wait_for("offers", TIMEOUT)?;
        shops.push(shop);
    }
    shops[2].pause()?;
    // The deadline of two seconds is the example's. On a busy machine an answer may come too late, but not ten times.
    let mut last = String::new();
    for _ in 0..10 {
        let asked = run(GATHER, &["ask", "all"], &nats)?;
        assert!(!asked.stdout.contains("frozen"), "{}", asked.stdout);
        last = asked.stdout;
        if last.ends_with("2 answers; the best: b at 2\n") {
            nonsense.abort();
            return Ok(());
        }
    }
    panic!("the answers of two shops never came in time: {last}");
}

#[tokio::test]
async fn a_service_is_found_counts_its_errors_and_survives_them() -> Result<()> {
    let nats = server()?;
    let client = async_nats::connect(nats.address()).await?;
    let mut services = Vec::new();
    for _ in 0..2 {
        let mut service = start(SERVICE, &[], &nats)?;
        service.wait_for("serves", TIMEOUT)?;
        services.push(service);
    }
    // No reply subject: nothing to answer.
    client.publish("text.upper", "x".into()).await?;
    for (request, refused) in [(&b"\xff"[..], true), (b"", true), (b"stra\xc3\x9fe", false)] {
        for _ in 0..10 {
            let request = Request::new()
                .payload(request.to_vec().into())
                .timeout(Some(TIMEOUT));
            let reply = client.send_request("text.upper", request).await?;
            let code = reply
                .headers
                .as_ref()
                .and_then(|all| all.get("Nats-Service-Error-Code"));
            assert_eq!(code.is_some(), refused);
            if !refused {
                assert_eq!(reply.payload, "STRASSE");
            }
        }
    }
    // What the services say about themselves, asked without the example. An answer is sent before it is counted.
    let deadline = std::time::Instant::now() + TIMEOUT;
    loop {
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await?;
        client
            .publish_with_reply("$SRV.STATS.text", inbox, "".into())
            .await?;
        let (mut requests, mut errors) = (0, 0);
        for _ in 0..2 {
            let answer = tokio::time::timeout(TIMEOUT, answers.next())
                .await?
                .unwrap();
            let stats: serde_json::Value = serde_json::from_slice(&answer.payload)?;
            for endpoint in stats["endpoints"].as_array().unwrap() {
                requests += endpoint["num_requests"].as_u64().unwrap();
                errors += endpoint["num_errors"].as_u64().unwrap();
            }
        }
        if (requests, errors) == (30, 20) {
            break;
        }
        anyhow::ensure!(
            std::time::Instant::now() < deadline,
            "{requests} requests, {errors} errors"
        );
    }
    stop(services.pop().unwrap())?;
    let mut found = 0;
    for _ in 0..10 {
        // Its deadline is one second, which a busy machine may miss.
        let discovered = run(SERVICE, &["discover"], &nats)?;
        found = discovered.stdout.matches("text 1.0.0 ").count();
        assert!(found <= 1, "{}", discovered.stdout);
        if found == 1 && discovered.stdout.contains("upper at text.upper") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(found, 1);
    stop(services.pop().unwrap())?;
    Ok(())
}
