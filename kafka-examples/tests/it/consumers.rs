//! The programs that run until Ctrl-C or SIGTERM.

use std::path::Path;

use compose::harness::{Call, Example};
use compose::{Broker, call};

/// A program, the records or the other program that give it something to print, and a part of what it then prints. One
/// without a second call prints by itself.
pub type Fed<'a> = (Call<'a>, Option<Call<'a>>, &'a str);

macro_rules! fed {
    ($name:literal, [$($record:literal),+], $printed:literal) => {
        (call!($name), Some(call!("kafka_send", $($record),+)), $printed)
    };
}

/// A program of the list, or one that feeds it, with the settings that some of them need.
pub fn example((program, args): Call<'_>, kafka: &Broker, folder: &Path) -> Example {
    let example = Example::new(program).args(args).broker(kafka);
    with_settings(example.current_dir(folder))
}

/// Small and free, so that a test can run all of them at the same time.
pub fn with_settings(example: Example) -> Example {
    example.env("LAG_INTERVAL", "1").env("METRICS_PORT", "0")
}

/// One of each kind.
pub const CONSUMERS: [Fed<'_>; 18] = [
    fed!(
        "kafka_consumer_group",
        ["group-orders", "order-0", "order-1"],
        "processed: "
    ),
    fed!(
        "kafka_consumer_protocol",
        ["protocol-orders", "order-0", "order-1"],
        "offset 0"
    ),
    (
        call!("kafka_crash_safe_windows"),
        Some(call!("kafka_page_views", "2026-01-01T12:00:00Z")),
        "too late",
    ),
    fed!(
        "kafka_exactly_once",
        [
            "exactly-once.orders",
            "{\"order_id\":\"1\",\"cents\":5}",
            "x"
        ],
        "committed: "
    ),
    fed!(
        "kafka_graceful_shutdown",
        ["shutdown-tasks", "0", "0"],
        "offset 0: done"
    ),
    fed!(
        "kafka_idempotent_consumer",
        ["idempotent-payments", "x", "y"],
        "skipped"
    ),
    fed!("kafka_lag_monitor", ["group-orders", "order-0"], "lag "),
    fed!(
        "kafka_manual_commit",
        ["reliable-orders", "order-0", "order-1"],
        "processed"
    ),
    fed!("kafka_metrics", ["metered-orders", "1", "1"], "done"),
    fed!(
        "kafka_parallel_consumer",
        ["parallel-orders", "order-0", "order-1"],
        "done"
    ),
    fed!(
        "kafka_parallel_rebalance",
        ["handover-orders", "order-0", "order-1"],
        "done"
    ),
    fed!(
        "kafka_pattern_subscription",
        ["events.user", "a", "b"],
        "offset 0: "
    ),
    fed!(
        "kafka_production_worker",
        ["worker-orders", "x", "y"],
        "dead"
    ),
    fed!(
        "kafka_rebalance",
        ["rebalance-orders", "order-0", "order-1"],
        "done"
    ),
    (call!("kafka_reconnect"), None, "confirmed: tick"),
    fed!(
        "kafka_reconnect_consumer",
        ["reconnect-readings", "1", "2"],
        "offset 0: "
    ),
    fed!(
        "kafka_retry_dlq",
        ["retry-dlq.payments", "x", "y"],
        "moved to"
    ),
    fed!("kafka_tuned_consumer", ["tuned-jobs", "1", "1"], "done"),
];
