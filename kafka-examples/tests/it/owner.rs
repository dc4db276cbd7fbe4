//! Which examples must not meet on one Kafka, whether it is a test that runs them or a transcript.

/// Of examples that share a topic, the one that creates it.
pub fn owner(example: &str) -> &str {
    match example {
        "kafka_async_producer" => "kafka_consumer_group",
        "kafka_crash_safe_windows" | "kafka_page_views" => "kafka_window_aggregation",
        "kafka_dlq_replay" => "kafka_retry_dlq",
        "kafka_send" | "kafka_tail" => "",
        _ => example,
    }
}
