//! Orders that arrive while a test does something else.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow};
use compose::Broker;
use rdkafka::ClientConfig;
use rdkafka::producer::{DeliveryFuture, FutureProducer, FutureRecord};

/// Runs this while about 200 orders a second arrive in the three partitions of the topic. Returns how many there are.
pub fn with_orders(kafka: &Broker, topic: &str, run: impl FnOnce() -> Result<()>) -> Result<usize> {
    while_fed(|stop| feed(kafka, topic, stop), run)
}

/// Runs this while the other sends records until it is told to stop. Returns how many it has sent.
pub fn while_fed(
    feed: impl FnOnce(&AtomicBool) -> Result<usize> + Send,
    run: impl FnOnce() -> Result<()>,
) -> Result<usize> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let feeder = scope.spawn(|| feed(&stop));
        let ran = run();
        stop.store(true, Ordering::Relaxed);
        let sent = feeder.join().map_err(|_| anyhow!("the feeder panicked"))?;
        ran.and(sent)
    })
}

fn feed(kafka: &Broker, topic: &str, stop: &AtomicBool) -> Result<usize> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.address())
        .set("enable.idempotence", "true")
        .create()?;
    let mut reports = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let partition = i32::try_from(reports.len() % 3)?;
        let record = FutureRecord::<str, str>::to(topic)
            .partition(partition)
            .payload("order");
        reports.push(producer.send_result(record).map_err(|(error, _)| error)?);
        std::thread::sleep(Duration::from_millis(5));
    }
    confirm(reports)
}

/// Waits for the delivery reports, and returns how many there are.
pub fn confirm(reports: Vec<DeliveryFuture>) -> Result<usize> {
    let sent = reports.len();
    for report in reports {
        futures::executor::block_on(report)?.map_err(|(error, _)| error)?;
    }
    Ok(sent)
}
