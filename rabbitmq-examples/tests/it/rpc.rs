//! Every call ends within its time, with an answer or with the reason why there is none.

use anyhow::Result;
use compose::harness::Running;
use compose::{Broker, Service};
use lapin::BasicProperties;

use crate::shared::{Place, TIMEOUT, vhost};

const CLIENT: &str = env!("CARGO_BIN_EXE_rabbitmq_rpc_client");
const SERVER: &str = env!("CARGO_BIN_EXE_rabbitmq_rpc_server");
const QUEUE: &str = "rpc_queue";

fn server(place: &Place) -> Result<Running> {
    place.start(SERVER, &[], "waiting for requests")
}

#[tokio::test]
async fn many_calls_at_once_get_each_its_own_answer_or_error() -> Result<()> {
    let place = vhost().await?;
    let (mut first, mut second) = (server(&place)?, server(&place)?);
    let numbers: Vec<String> = (0..=94).map(|n| n.to_string()).collect();
    let mut args: Vec<&str> = numbers.iter().map(String::as_str).collect();
    args.push("");
    let ended = place
        .example(CLIENT)
        .env("RPC_TIMEOUT_MS", "60000")
        .args(&args)
        .spawn()?
        .wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    assert!(
        ended.stderr.contains("2 of 96 calls failed"),
        "{}",
        ended.stderr
    );
    let (mut this, mut next) = (0_u64, 1_u64);
    let lines: Vec<&str> = ended.stdout.lines().collect();
    for (n, line) in lines.iter().enumerate().take(94) {
        assert_eq!(*line, format!("fib({n}) = {this}"));
        (this, next) = (next, this.wrapping_add(next));
    }
    assert!(lines[94].contains("the server says: \"94\" is not a number from 0 to 93"));
    assert!(lines[95].contains("the server says"), "{}", lines[95]);
    let mut answered = 0;
    for server in [&mut first, &mut second] {
        server.interrupt()?;
        let ended = server.wait(TIMEOUT)?.ok()?;
        let count = ended
            .stdout
            .rsplit(' ')
            .next()
            .unwrap_or_default()
            .trim()
            .parse::<u32>()?;
        assert!(count > 0, "one server did all the work");
        answered += count;
    }
    assert_eq!(answered, 96);
    // The queue goes with the last server.
    let none = place.run(CLIENT, &["1"])?;
    assert!(
        none.stdout.contains("no server: NO_ROUTE"),
        "{}",
        none.stdout
    );
    Ok(())
}

#[tokio::test]
async fn a_silent_server_is_a_timeout_and_late_requests_are_not_carried_out() -> Result<()> {
    let place = vhost().await?;
    let mut stuck = server(&place)?;
    stuck.pause()?;
    let call = || {
        place
            .example(CLIENT)
            .env("RPC_TIMEOUT_MS", "500")
            .args(["10", "11", "12"])
            .spawn()
    };
    let ended = call()?.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    assert_eq!(
        ended.stdout.matches("no reply within 500 ms").count(),
        3,
        "{}",
        ended.stdout
    );
    // One is with the server; the two in the queue have expired.
    place.becomes(QUEUE, (0, 1)).await?;
    stuck.resume()?;
    stuck.wait_for("fib(10) = 55", TIMEOUT)?;
    let ended = place.run(CLIENT, &["20"])?.ok()?;
    assert_eq!(ended.stdout, "fib(20) = 6765\n");
    assert!(!stuck.lines().iter().any(|line| line.starts_with("fib(11)")));
    Ok(())
}

#[tokio::test]
async fn a_lost_connection_ends_the_calls_at_once_and_says_so() -> Result<()> {
    let rabbitmq = Broker::private(Service::RabbitMq)?;
    let place = Place::of(&rabbitmq).await?;
    let mut stuck = server(&place)?;
    stuck.pause()?;
    let call = place.example(CLIENT).env("RPC_TIMEOUT_MS", "600000");
    let mut client = call.args(["10", "11"]).spawn()?;
    place.becomes(QUEUE, (1, 1)).await?;
    rabbitmq.kill(1)?;
    let ended = client.wait(TIMEOUT)?;
    assert_eq!(ended.code(), 1);
    assert_eq!(
        ended.stdout.matches("lost the connection: ").count(),
        2,
        "{}",
        ended.stdout
    );
    Ok(())
}

#[tokio::test]
async fn another_server_takes_the_request_of_a_killed_one() -> Result<()> {
    let place = vhost().await?;
    let mut dying = server(&place)?;
    dying.pause()?;
    let call = place.example(CLIENT).env("RPC_TIMEOUT_MS", "60000");
    let mut client = call.args(["30", "31"]).spawn()?;
    // One is with the server that does nothing, and one waits.
    place.becomes(QUEUE, (1, 1)).await?;
    let mut other = server(&place)?;
    place.becomes(QUEUE, (0, 2)).await?;
    dying.kill()?;
    let ended = client.wait(TIMEOUT)?.ok()?;
    assert_eq!(ended.stdout, "fib(30) = 832040\nfib(31) = 1346269\n");
    other.interrupt()?;
    other.wait(TIMEOUT)?.ok()?;
    Ok(())
}

#[tokio::test]
async fn bad_requests_do_not_hurt_the_server() -> Result<()> {
    let place = vhost().await?;
    let mut server = server(&place)?;
    place.publish(QUEUE, b"30").await?; // without reply_to
    for body in [vec![0xff, 0x00], Vec::new(), vec![b'9'; 1 << 20]] {
        let nowhere = BasicProperties::default().with_reply_to("nobody".into());
        place.publish_with(QUEUE, &body, nowhere).await?;
    }
    server.wait_for("without reply_to, dropped", TIMEOUT)?;
    let ended = place.run(CLIENT, &["10"])?.ok()?;
    assert_eq!(ended.stdout, "fib(10) = 55\n");
    server.interrupt()?;
    server.wait(TIMEOUT)?.ok()?;
    Ok(())
}
