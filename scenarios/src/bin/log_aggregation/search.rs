//! Searching the stored entries, and a small chart of what was found.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use chrono::{DateTime, Local, TimeDelta, Utc};
use serde_json::{Value, json};

use crate::store::Store;

/// The most columns that a chart has.
const COLUMNS: i64 = 60;

/// The spans of time that a column may stand for, in seconds.
const STEPS: [i64; 14] = [
    1, 5, 10, 15, 30, 60, 300, 600, 1800, 3600, 10_800, 43_200, 86_400, 604_800,
];

/// A level's counts in the columns of a chart.
type Series = BTreeMap<String, Vec<u64>>;

/// `15m`, `2h`, `7d`, `30s`.
pub fn span(text: &str) -> Result<TimeDelta> {
    let unit = text.chars().last().unwrap_or_default();
    let number = text.strip_suffix(unit).and_then(|n| n.parse::<u32>().ok());
    let number = i64::from(number.with_context(|| format!("{text} is not like 15m, 2h or 7d"))?);
    Ok(match unit {
        's' => TimeDelta::seconds(number),
        'm' => TimeDelta::minutes(number),
        'h' => TimeDelta::hours(number),
        'd' => TimeDelta::days(number),
        _ => bail!("{text} is not like 30s, 15m, 2h or 7d"),
    })
}

/// Counts per service and level of the documents that the query finds.
pub async fn table(store: &Store, query: &Value) -> Result<(u64, BTreeMap<String, Counts>)> {
    let found = store
        .search(json!({
            "size": 0,
            "track_total_hits": true,
            "query": query,
            "aggs": { "service": {
                "terms": { "field": "service", "size": 50 },
                "aggs": { "level": { "terms": { "field": "level", "size": 20 } } },
            } },
        }))
        .await?;
    let mut services = BTreeMap::new();
    for service in buckets(&found["aggregations"]["service"]) {
        let levels = buckets(&service["level"])
            .map(|level| (name(level), count(level)))
            .collect();
        services.insert(name(service), levels);
    }
    let total = found["hits"]["total"]["value"].as_u64().unwrap_or_default();
    Ok((total, services))
}

pub type Counts = BTreeMap<String, u64>;

/// Prints what `text`, in the store's query language, finds in the last `last`, or at any time.
pub async fn search(store: &Store, text: &str, last: Option<&str>, show: usize) -> Result<()> {
    store.refresh().await?;
    let mut filter = Vec::new();
    let now = Utc::now();
    let mut range = None;
    if let Some(last) = last {
        let from = now - span(last)?;
        filter.push(json!({ "range": { "timestamp": {
            "gte": from.to_rfc3339(), "lte": now.to_rfc3339(),
        } } }));
        range = Some((from, now));
    }
    let query = json!({ "bool": {
        "must": { "query_string": { "query": text, "default_field": "message" } },
        "filter": filter,
    } });
    let (total, services) = table(store, &query).await?;
    let within = last.map_or_else(String::new, |last| format!(" in the last {last}"));
    println!("{total} entries for {text}{within}");
    if total == 0 {
        return Ok(());
    }
    println!();
    print_table(&services);

    let range = match range {
        Some(range) => range,
        None => ends(store, &query).await?,
    };
    let (step, series) = over_time(store, &query, range).await?;
    println!();
    println!("level over time, {} in a column", seconds(step));
    for line in chart(&series) {
        println!("{line}");
    }
    let local = |time: DateTime<Utc>| time.with_timezone(&Local).format("%Y-%m-%d %H:%M:%S");
    println!("{:<10} {} to {}", "", local(range.0), local(range.1));

    if show > 0 {
        println!();
        let newest = store
            .search(json!({
                "size": show,
                "query": query,
                "sort": [{ "timestamp": "desc" }],
            }))
            .await?;
        for hit in newest["hits"]["hits"].as_array().into_iter().flatten() {
            let text = |field: &str| -> String {
                let text = hit["_source"][field].as_str().unwrap_or("-");
                let text: String = text.chars().take(200).collect();
                // A log can hold what a terminal obeys.
                text.replace(char::is_control, "\u{b7}")
            };
            println!(
                "{} {:<8} {:<12} {}",
                text("timestamp"),
                text("level"),
                text("service"),
                text("message")
            );
        }
    }
    Ok(())
}

/// When the first and the last of the documents were written.
async fn ends(store: &Store, query: &Value) -> Result<(DateTime<Utc>, DateTime<Utc>)> {
    let found = store
        .search(json!({ "size": 0, "query": query, "aggs": {
            "first": { "min": { "field": "timestamp" } },
            "last": { "max": { "field": "timestamp" } },
        } }))
        .await?;
    let time = |which: &str| {
        let millis = found["aggregations"][which]["value"].as_f64();
        millis.and_then(|millis| DateTime::from_timestamp_millis(millis as i64))
    };
    Ok((
        time("first").context("the entries have no times")?,
        time("last").context("the entries have no times")?,
    ))
}

async fn over_time(
    store: &Store,
    query: &Value,
    (from, to): (DateTime<Utc>, DateTime<Utc>),
) -> Result<(i64, Series)> {
    let seconds = (to - from).num_seconds().max(1);
    let step = STEPS.into_iter().find(|step| seconds / step < COLUMNS);
    let step = step.unwrap_or(seconds / COLUMNS + 1);
    let found = store
        .search(json!({ "size": 0, "query": query, "aggs": { "level": {
            "terms": { "field": "level", "size": 20 },
            "aggs": { "time": { "date_histogram": {
                "field": "timestamp", "fixed_interval": format!("{step}s"), "min_doc_count": 1,
            } } },
        } } }))
        .await?;
    let first = from.timestamp().div_euclid(step);
    let columns = (to.timestamp().div_euclid(step) - first + 1).max(1) as usize;
    let mut series = Series::new();
    for level in buckets(&found["aggregations"]["level"]) {
        let line = series
            .entry(name(level))
            .or_insert_with(|| vec![0; columns]);
        for time in buckets(&level["time"]) {
            let at = time["key"]
                .as_i64()
                .unwrap_or_default()
                .div_euclid(1000 * step)
                - first;
            if let Some(column) = usize::try_from(at).ok().and_then(|at| line.get_mut(at)) {
                *column += count(time);
            }
        }
    }
    Ok((step, series))
}

fn buckets(aggregation: &Value) -> impl Iterator<Item = &Value> {
    aggregation["buckets"].as_array().into_iter().flatten()
}

fn name(bucket: &Value) -> String {
    let key = bucket["key"].as_str().unwrap_or_default();
    key.replace(char::is_control, "\u{b7}")
}

fn count(bucket: &Value) -> u64 {
    bucket["doc_count"].as_u64().unwrap_or_default()
}

/// The worst first; levels that nobody knows last.
fn severity(level: &str) -> usize {
    let known = [
        "FATAL", "CRITICAL", "ERROR", "WARN", "INFO", "DEBUG", "TRACE",
    ];
    known
        .iter()
        .position(|known| *known == level)
        .unwrap_or(known.len())
}

pub fn print_table(services: &BTreeMap<String, Counts>) {
    let mut levels: Vec<&String> = services.values().flat_map(|levels| levels.keys()).collect();
    levels.sort_by_key(|level| (severity(level), *level));
    levels.dedup();
    let row = |name: &str, cells: Vec<String>| {
        let cells: String = cells.iter().map(|cell| format!(" {cell:>9}")).collect();
        println!("{name:<24}{cells}");
    };
    let mut head = vec!["total".to_owned()];
    head.extend(levels.iter().map(|level| (*level).clone()));
    row("service", head);
    for (service, counts) in services {
        let mut cells = vec![counts.values().sum::<u64>().to_string()];
        cells.extend(
            levels
                .iter()
                .map(|level| counts.get(*level).unwrap_or(&0).to_string()),
        );
        row(service, cells);
    }
}

/// One line for each level; the highest column of all is full.
fn chart(series: &Series) -> Vec<String> {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let top = series.values().flatten().copied().max().unwrap_or(1).max(1);
    let mut levels: Vec<&String> = series.keys().collect();
    levels.sort_by_key(|level| (severity(level), *level));
    let line = |level: &String| {
        let bars: String = series[level]
            .iter()
            .map(|count| match count {
                0 => ' ',
                count => BARS[((count * 8).div_ceil(top) as usize - 1).min(7)],
            })
            .collect();
        let total: u64 = series[level].iter().sum();
        format!("{level:<10} {bars} {total}")
    };
    levels.into_iter().map(line).collect()
}

fn seconds(step: i64) -> String {
    match step {
        step if step % 86_400 == 0 => format!("{} d", step / 86_400),
        step if step % 3600 == 0 => format!("{} h", step / 3600),
        step if step % 60 == 0 => format!("{} min", step / 60),
        step => format!("{step} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans() {
        assert_eq!(span("15m").unwrap(), TimeDelta::minutes(15));
        for bad in ["", "15", "m", "-1m", "1y", "99999999999d"] {
            assert!(span(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_chart_shows_the_smallest_count_and_puts_the_worst_first() {
        let series = Series::from([
            ("INFO".into(), vec![800, 0, 1]),
            ("ERROR".into(), vec![0, 100, 101]),
        ]);
        assert_eq!(chart(&series), ["ERROR       ▁▂ 201", "INFO       █ ▁ 801"]);
    }
}
