//! One log entry, and how a line of a log file becomes one. No line is refused: what cannot be parsed is
//! kept whole, as level `UNPARSED`.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use chrono::{DateTime, Datelike, FixedOffset, NaiveDateTime, SecondsFormat, Utc};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;

pub const UNPARSED: &str = "UNPARSED";

/// Longer lines become several entries, so that none is too large for Kafka or the store.
pub const MAX_LINE: usize = 1 << 20;

/// What is written to Kafka, and from there to the store as it is.
#[derive(Clone, Debug)]
pub struct Entry {
    pub service: String,
    /// The document, one JSON object on one line.
    pub json: String,
    pub parsed: bool,
    pub time: DateTime<FixedOffset>,
}

/// Where an entry comes from, for the document's own record of it.
#[derive(Clone, Copy)]
pub struct Origin<'a> {
    pub run: &'a str,
    pub source: &'a str,
    pub line: u64,
    /// Counts from 1 where a line was too long to be one entry.
    pub part: Option<u32>,
    /// The service, where the line does not name one.
    pub service: &'a str,
    /// The time, where the line does not name one: that of the line before it.
    pub time: DateTime<FixedOffset>,
}

/// What a parser has found in a line.
struct Found {
    time: DateTime<FixedOffset>,
    service: Option<String>,
    level: String,
    message: String,
    /// A further field of the document, with its value as JSON.
    more: Option<(&'static str, String)>,
    format: &'static str,
}

impl Entry {
    /// Reads a line, without its end. Invalid UTF-8 becomes U+FFFD in the fields, since JSON cannot carry
    /// it, and the very bytes are kept beside them in Base64.
    pub fn from_line(line: &[u8], origin: Origin<'_>) -> Entry {
        let text = String::from_utf8_lossy(line);
        let found = if origin.part.is_some() {
            Err(format!("a part of a line longer than {MAX_LINE} bytes"))
        } else if text.trim_start().starts_with('{') {
            from_json(&text)
        } else {
            from_access_log(&text).ok_or_else(|| "neither JSON nor an access log".to_owned())
        };
        let parsed = found.is_ok();
        let (found, reason) = match found {
            Ok(found) => (found, None),
            Err(reason) => (
                Found {
                    time: origin.time,
                    service: None,
                    level: UNPARSED.to_owned(),
                    message: text.clone().into_owned(),
                    more: None,
                    format: "unparsed",
                },
                Some(reason),
            ),
        };
        let mut ingested = Object::default();
        ingested.text("run", origin.run);
        ingested.text("source", origin.source);
        ingested.raw("line", &origin.line.to_string());
        if let Some(part) = origin.part {
            ingested.raw("part", &part.to_string());
        }
        ingested.text("format", found.format);
        if let Some(reason) = &reason {
            ingested.text("reason", reason);
        }
        if std::str::from_utf8(line).is_err() {
            ingested.text("raw_base64", &BASE64.encode(line));
        }
        found.into_entry(origin.service, ingested, parsed)
    }

    /// An entry of the generator.
    pub fn made_up(
        time: DateTime<Utc>,
        service: &str,
        level: &str,
        message: String,
        run: &str,
    ) -> Entry {
        let mut ingested = Object::default();
        ingested.text("run", run);
        ingested.text("source", "generator");
        let found = Found {
            time: time.fixed_offset(),
            service: Some(service.to_owned()),
            level: level.to_owned(),
            message,
            more: None,
            format: "generated",
        };
        found.into_entry(service, ingested, true)
    }
}

impl Found {
    fn into_entry(self, service: &str, ingested: Object, parsed: bool) -> Entry {
        let service = self.service.unwrap_or_else(|| service.to_owned());
        let mut document = Object::default();
        document.text(
            "timestamp",
            &self.time.to_rfc3339_opts(SecondsFormat::AutoSi, true),
        );
        document.text("service", &service);
        document.text("level", &self.level);
        document.text("message", &self.message);
        if let Some((name, value)) = &self.more {
            document.raw(name, value);
        }
        document.raw("ingested", &ingested.close());
        Entry {
            service,
            json: document.close(),
            parsed,
            time: self.time,
        }
    }
}

/// A JSON object in the making.
#[derive(Default)]
struct Object(String);

impl Object {
    fn raw(&mut self, name: &str, value: &str) {
        self.0.push(if self.0.is_empty() { '{' } else { ',' });
        self.0.push_str(&quote(name));
        self.0.push(':');
        self.0.push_str(value);
    }

    fn text(&mut self, name: &str, value: &str) {
        self.raw(name, &quote(value));
    }

    fn close(mut self) -> String {
        self.0.push('}');
        self.0
    }
}

fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The names under which loggers write the four fields, the first one that is there counts. What is left over goes to
/// the object `fields`: beside these, a name such as `service.version` would be a field below `service`, which is a
/// text, and the store would refuse the document.
const TIME: &[&str] = &["timestamp", "@timestamp", "time", "ts"];
const SERVICE: &[&str] = &["service", "service.name", "app", "logger"];
const LEVEL: &[&str] = &["level", "log.level", "severity", "lvl"];
const MESSAGE: &[&str] = &["message", "msg"];

fn from_json(text: &str) -> Result<Found, String> {
    let Fields(mut fields) =
        serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))?;
    for (name, value) in &fields {
        check(name, value, 0)?;
    }
    let mut take = |names: &[&str]| {
        let at = names
            .iter()
            .find_map(|name| fields.iter().position(|(field, _)| field == name))?;
        Some(fields.remove(at))
    };
    let scalar = |field: Option<(String, Box<RawValue>)>| match field {
        None => Ok(None),
        Some((name, value)) => match serde_json::from_str(value.get()) {
            Ok(serde_json::Value::String(text)) => Ok(Some(text)),
            Ok(serde_json::Value::Number(number)) => Ok(Some(number.to_string())),
            _ => Err(format!("{name} is neither text nor a number")),
        },
    };
    let time = scalar(take(TIME))?.ok_or("it has no timestamp")?;
    let time = read_time(&time).ok_or_else(|| format!("not a time: {time}"))?;
    let found = Found {
        time,
        service: scalar(take(SERVICE))?.filter(|service| !service.is_empty()),
        level: scalar(take(LEVEL))?.map_or_else(|| "UNKNOWN".to_owned(), |level| tidy(&level)),
        message: scalar(take(MESSAGE))?.unwrap_or_default(),
        format: "json",
        more: None,
    };
    if fields.is_empty() {
        return Ok(found);
    }
    let mut rest = Object::default();
    for (name, value) in fields {
        rest.raw(&name, value.get());
    }
    Ok(Found {
        more: Some(("fields", rest.close())),
        ..found
    })
}

/// Is JSON, and yet something that the store, or who reads from it, does not take.
fn check(name: &str, value: &RawValue, depth: u32) -> Result<(), String> {
    let json = value.get();
    if depth > 50 {
        return Err("it is nested too deeply".to_owned());
    }
    if name.len() > 1000 {
        return Err("the name of a field is too long".to_owned());
    }
    match json.as_bytes().first() {
        Some(b'{') => {
            let Fields(fields) = serde_json::from_str(json).map_err(|error| error.to_string())?;
            fields
                .iter()
                .try_for_each(|(name, value)| check(name, value, depth + 1))
        }
        Some(b'[') => {
            let items: Vec<Box<RawValue>> =
                serde_json::from_str(json).map_err(|error| error.to_string())?;
            items
                .iter()
                .try_for_each(|value| check("", value, depth + 1))
        }
        Some(b'"') => match serde_json::from_str::<String>(json) {
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        },
        Some(b'-' | b'0'..=b'9') => match json.parse::<f64>() {
            Ok(number) if number.is_finite() && json.len() < 500 => Ok(()),
            _ => Err("a number is too large".to_owned()),
        },
        _ => Ok(()),
    }
}

/// The fields of an object in their order, as they are written. One that is there twice is an error, as it
/// is to the store.
struct Fields(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Fields, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields: Vec<(String, Box<RawValue>)> = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Box<RawValue>>()? {
                    if fields.iter().any(|(other, _)| *other == name) {
                        return Err(A::Error::custom(format!("{name} is there twice")));
                    }
                    fields.push((name, value));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// The spellings of one level become one; pino and bunyan write numbers.
fn tidy(level: &str) -> String {
    let level = level.trim().to_uppercase();
    match level.as_str() {
        "WARNING" | "40" => "WARN".into(),
        "ERR" | "50" => "ERROR".into(),
        "INFORMATION" | "30" => "INFO".into(),
        "20" => "DEBUG".into(),
        "10" => "TRACE".into(),
        "60" => "FATAL".into(),
        _ => level,
    }
}

/// RFC 3339, the same with a space and without a zone (then it is UTC), or seconds or milliseconds since
/// 1970.
fn read_time(text: &str) -> Option<DateTime<FixedOffset>> {
    let text = text.trim();
    let zoned = || DateTime::parse_from_rfc3339(text).ok();
    let naive = || {
        let text = text.replacen(' ', "T", 1).replacen(',', ".", 1);
        let naive = NaiveDateTime::parse_from_str(&text, "%Y-%m-%dT%H:%M:%S%.f").ok()?;
        Some(naive.and_utc().fixed_offset())
    };
    let number = || {
        let number: f64 = text.parse().ok()?;
        let seconds = if number.abs() >= 1e11 {
            number / 1000.0
        } else {
            number
        };
        let micros = (seconds * 1e6).round();
        (micros.abs() < 1e18)
            .then(|| DateTime::from_timestamp_micros(micros as i64))?
            .map(|time| time.fixed_offset())
    };
    let time = zoned().or_else(naive).or_else(number)?;
    is_sane(&time).then_some(time)
}

/// Whether an index can be named after it.
pub fn is_sane(time: &DateTime<FixedOffset>) -> bool {
    (1970..=2999).contains(&time.year())
}

/// `host ident user [time] "request" status bytes "referrer" "user agent"`, as Apache and nginx write it, also
/// without the last two, and with what a site has added behind them.
fn from_access_log(line: &str) -> Option<Found> {
    let (client, rest) = line.split_once(' ')?;
    let (ident, rest) = rest.split_once(' ')?;
    let (user, rest) = rest.split_once(" [")?;
    let (time, rest) = rest.split_once("] ")?;
    let time = DateTime::parse_from_str(time, "%d/%b/%Y:%H:%M:%S %z").ok()?;
    let (request, rest) = quoted(rest)?;
    let mut words = rest.strip_prefix(' ')?.splitn(3, ' ');
    let status: u16 = words.next()?.parse().ok()?;
    let bytes = words.next()?;
    if client.is_empty()
        || !is_sane(&time)
        || !(100..1000).contains(&status)
        || (bytes != "-" && bytes.parse::<u64>().is_err())
    {
        return None;
    }
    let mut http = Object::default();
    http.text("client", client);
    http.text("ident", ident);
    http.text("user", user);
    http.text("request", request);
    http.raw("status", &status.to_string());
    http.text("bytes", bytes);
    if let Some(rest) = words.next() {
        let named = quoted(rest)
            .and_then(|(referrer, rest)| Some((referrer, quoted(rest.strip_prefix(' ')?)?)));
        match named {
            Some((referrer, (agent, more))) => {
                http.text("referrer", referrer);
                http.text("user_agent", agent);
                if !more.is_empty() {
                    http.text("more", more);
                }
            }
            None => http.text("more", rest),
        }
    }
    let level = match status {
        500.. => "ERROR",
        400.. => "WARN",
        _ => "INFO",
    };
    Some(Found {
        time,
        service: None,
        level: level.to_owned(),
        message: format!("{request} {status} {bytes}"),
        more: Some(("http", http.close())),
        format: "combined",
    })
}

/// What stands between quotes at the beginning of `text`, escapes as they are, and what follows.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let text = text.strip_prefix('"')?;
    let mut escaped = false;
    let end = text.bytes().position(|byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    })?;
    Some((&text[..end], &text[end + 1..]))
}

/// The time of a document, if it is an object with one that an index can be named after.
pub fn time_of(document: &[u8]) -> Result<DateTime<FixedOffset>, String> {
    #[derive(Deserialize)]
    struct Head {
        timestamp: Box<RawValue>,
    }
    let text = std::str::from_utf8(document).map_err(|error| error.to_string())?;
    if !text.trim_start().starts_with('{') {
        return Err("not a JSON object".to_owned());
    }
    let head: Head = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let time = match serde_json::from_str(head.timestamp.get()) {
        Ok(serde_json::Value::String(text)) => DateTime::parse_from_rfc3339(&text).ok(),
        Ok(serde_json::Value::Number(number)) => number
            .as_i64()
            .and_then(DateTime::from_timestamp_millis)
            .map(|time| time.fixed_offset()),
        _ => None,
    };
    time.filter(is_sane)
        .ok_or_else(|| format!("not a timestamp: {}", head.timestamp))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(line: &[u8]) -> Value {
        let origin = Origin {
            run: "r",
            source: "s.log",
            line: 7,
            part: None,
            service: "s",
            time: DateTime::parse_from_rfc3339("2020-01-01T00:00:00Z").unwrap(),
        };
        serde_json::from_str(&Entry::from_line(line, origin).json).unwrap()
    }

    #[test]
    fn json_keeps_every_field_and_digit() {
        let line = br#"{"ts":"2026-01-02 03:04:05,678","lvl":"warning","msg":"m","app":"a","n":0.10,"big":12345678901234567890123,"deep":{"x":[1]}}"#;
        let document = Entry::from_line(
            line,
            Origin {
                run: "r",
                source: "s",
                line: 1,
                part: None,
                service: "s",
                time: DateTime::default(),
            },
        );
        assert!(
            document.json.starts_with(
                r#"{"timestamp":"2026-01-02T03:04:05.678Z","service":"a","level":"WARN","message":"m","fields":{"n":0.10,"big":12345678901234567890123,"deep":{"x":[1]}},"ingested":{"#
            ),
            "{}",
            document.json
        );
    }

    #[test]
    fn elastic_common_schema() {
        let document = read(br#"{"@timestamp":"2026-01-02T03:04:05Z","log.level":"warn","message":"m","service.name":"pay","service.version":"1.2","ingested":1}"#);
        assert_eq!(document["service"], "pay");
        assert_eq!(document["level"], "WARN");
        let rest = json!({ "service.version": "1.2", "ingested": 1 });
        assert_eq!(document["fields"], rest);
    }

    #[test]
    fn access_logs_with_quotes_and_additions() {
        let plain =
            r#"127.0.0.1 - frank [10/Oct/2000:13:55:36 -0700] "GET /a\"b HTTP/1.0" 500 2326"#;
        let document = read(plain.as_bytes());
        assert_eq!(document["timestamp"], "2000-10-10T13:55:36-07:00");
        assert_eq!(document["level"], "ERROR");
        assert_eq!(document["http"]["request"], r#"GET /a\"b HTTP/1.0"#);
        let combined = format!(r#"{plain} "http://x/" "Mozilla (a; b)" 0.003"#);
        let document = read(combined.as_bytes());
        assert_eq!(document["http"]["user_agent"], "Mozilla (a; b)");
        assert_eq!(document["http"]["more"], " 0.003");
    }

    #[test]
    fn what_cannot_be_parsed_is_kept_whole() {
        for line in [
            "",
            "   at com.example.Main(Main.java:3)",
            "{",
            r#"{"a":1,"a":2}"#,
            r#"{"timestamp":"yesterday"}"#,
            r#"{"timestamp":"2026-01-01T00:00:00Z","level":{}}"#,
            r#"{"timestamp":"2026-01-01T00:00:00Z","x":[{"a":1,"\u0061":2}]}"#,
            r#"{"timestamp":"2026-01-01T00:00:00Z","x":"\ud800"}"#,
            r#"{"timestamp":"2026-01-01T00:00:00Z","x":1e999}"#,
            &format!(
                r#"{{"timestamp":"2026-01-01T00:00:00Z","x":{}{}}}"#,
                "[".repeat(60),
                "]".repeat(60)
            ),
            &format!(
                r#"{{"timestamp":"2026-01-01T00:00:00Z","x":1{}}}"#,
                "0".repeat(1000)
            ),
            "\u{0}\u{1b}[31m\u{7f}",
            r#"1.1.1.1 - - [99/Oct/2000:13:55:36 -0700] "GET / HTTP/1.0" 200 1"#,
        ] {
            let document = read(line.as_bytes());
            assert_eq!(document["level"], UNPARSED, "{line}");
            assert_eq!(document["message"], line);
            assert_eq!(document["timestamp"], "2020-01-01T00:00:00Z");
            assert!(document["ingested"]["reason"].is_string());
        }
    }

    #[test]
    fn invalid_utf8_can_be_restored() {
        let line = b"{\"timestamp\":1700000000,\"msg\":\"caf\xe9\"}";
        let document = read(line);
        assert_eq!(document["message"], "caf\u{fffd}");
        assert_eq!(document["timestamp"], "2023-11-14T22:13:20Z");
        let raw = document["ingested"]["raw_base64"].as_str().unwrap();
        assert_eq!(BASE64.decode(raw).unwrap(), line);
    }

    #[test]
    fn documents_of_others_need_a_time() {
        let time = |document: Value| time_of(document.to_string().as_bytes());
        assert!(time(json!({"timestamp": "2026-01-01T00:00:00Z", "x": 1})).is_ok());
        assert!(time(json!({"timestamp": 1_700_000_000_000_i64})).is_ok());
        for bad in [json!({}), json!([]), json!({"timestamp": {}}), json!(1)] {
            assert!(time(bad).is_err());
        }
        assert!(time_of(b"\xff").is_err());
    }
}
