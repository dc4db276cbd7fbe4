//! The store, OpenSearch or Elasticsearch, by plain HTTP.
//!
//! Each product has a client crate, and neither serves both: Elasticsearch's clients check that they talk to
//! Elasticsearch, and both crates follow one product's API. What is needed here are five requests that both
//! products answer alike.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use reqwest::{Client, Method, RequestBuilder, StatusCode, Url};
use serde::Deserialize;
use serde_json::{Value, json};

/// Longer than a store needs for a hundred entries, even a busy one.
const REQUEST: Duration = Duration::from_secs(30);

/// What a store says of a document when its index cannot be made or written to: a disk that is full, too many shards, a
/// right that is missing. No document is to blame, and none may be buried for it.
const OF_THE_INDEX: [&str; 7] = [
    "cluster_block_exception",
    "index_closed_exception",
    "index_create_block_exception",
    "index_not_found_exception",
    "resource_already_exists_exception",
    "security_exception",
    "validation_exception",
];

#[derive(Clone)]
pub struct Store {
    http: Client,
    url: Url,
    /// Indices are named after it and a day: `logs-2026.11.24`.
    pub index: String,
}

/// What the store said about one document.
#[derive(Debug)]
pub enum Verdict {
    /// It is stored. `replaced`: it had been before.
    Stored { replaced: bool },
    /// Not now: the store is busy, or a part of it is away.
    Later(String),
    /// Never: it does not fit.
    Refused(String),
}

/// What the store said about a whole request.
pub enum Answer {
    Verdicts(Vec<Verdict>),
    /// The store is away or busy.
    Later(String),
    /// It does not take the request as it is: too large, or a document breaks it.
    Refused(String),
}

impl Store {
    /// Credentials may be in the URL: `https://user:password@host:9200`.
    pub fn new(index: &str) -> Result<Store> {
        let url =
            std::env::var("ELASTICSEARCH_URL").unwrap_or_else(|_| "http://localhost:9200".into());
        let mut url = Url::parse(&url).context("ELASTICSEARCH_URL is not a URL")?;
        if !url.path().ends_with('/') {
            url.set_path(&format!("{}/", url.path()));
        }
        let bad = |c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_');
        if index.is_empty() || index.contains(bad) || index.starts_with(['-', '_']) {
            bail!("{index:?} cannot be an index: use a-z, 0-9, - and _");
        }
        // `logs-2` would share its indices' names with the days of `logs`.
        if index.contains("-1") || index.contains("-2") {
            bail!("{index:?} cannot be an index: after a - it looks like a day of another one");
        }
        let http = Client::builder()
            .connect_timeout(Duration::from_secs(5))
            .timeout(REQUEST)
            .build()?;
        Ok(Store {
            http,
            url,
            index: index.to_owned(),
        })
    }

    /// Matches the indices of all days, and not those of `logs-app` when this is `logs`.
    fn days(&self) -> String {
        format!("{0}-1*.*.*,{0}-2*.*.*", self.index)
    }

    /// The address without the password.
    pub fn address(&self) -> String {
        let mut url = self.url.clone();
        let _ = url.set_password(None);
        let _ = url.set_username("");
        url.as_str().trim_end_matches('/').to_owned()
    }

    fn request(&self, method: Method, path: &str) -> Result<RequestBuilder> {
        // reqwest makes an Authorization header of the user and password in the URL.
        Ok(self.http.request(method, self.url.join(path)?))
    }

    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value> {
        let request = self.request(method, path)?;
        let request = match body {
            Some(body) => request.json(&body),
            None => request,
        };
        let response = request.send().await.map_err(plain)?;
        let status = response.status();
        let text = response.text().await.map_err(plain)?;
        if !status.is_success() {
            bail!("{status}: {}", reason(&text));
        }
        serde_json::from_str(&text).context("the store does not speak JSON")
    }

    /// What it calls itself, once it is there.
    pub async fn hello(&self) -> Result<String> {
        let hello = self.ask(Method::GET, "", None).await?;
        let version = &hello["version"];
        let product = version["distribution"].as_str().unwrap_or("elasticsearch");
        Ok(format!(
            "{product} {}",
            version["number"].as_str().unwrap_or("of unknown version")
        ))
    }

    /// Sees to it that each day's index gets an explicit mapping.
    ///
    /// A document's id is its place on the topic. Another cluster has the same places for other entries, which
    /// would replace these: so the template remembers whose they are.
    pub async fn prepare(&self, cluster: &str) -> Result<()> {
        let path = format!("_index_template/{}-daily", self.index);
        let known = match self.ask(Method::GET, &path, None).await {
            Ok(known) => {
                known["index_templates"][0]["index_template"]["_meta"]["kafka_cluster"].clone()
            }
            Err(error) if error.to_string().starts_with("404") => Value::Null,
            Err(error) => return Err(error),
        };
        if known.as_str().is_some_and(|known| known != cluster) && self.count(None).await? > 0 {
            bail!(
                "the indices {}-* at {} hold entries of another Kafka cluster, whose offsets begin at 0 too: \
                 entries of this one would replace them. Name others with --index",
                self.index,
                self.address()
            );
        }
        let template = json!({
            "index_patterns": self.days().split(',').collect::<Vec<_>>(),
            // Above the templates that Elasticsearch brings for its own `logs-*-*`.
            "priority": 120,
            "_meta": { "kafka_cluster": cluster },
            "template": {
                "settings": { "number_of_shards": 1, "auto_expand_replicas": "0-1" },
                "mappings": mapping(),
            },
        });
        self.ask(Method::PUT, &path, Some(template)).await?;
        Ok(())
    }

    /// One `_bulk` request. `body` has two lines for each document.
    pub async fn bulk(&self, body: Vec<u8>) -> Result<Answer> {
        #[derive(Deserialize)]
        struct Response {
            items: Vec<Action>,
        }
        #[derive(Deserialize)]
        struct Action {
            index: Item,
        }
        #[derive(Deserialize)]
        struct Item {
            status: u16,
            result: Option<String>,
            error: Option<Value>,
        }
        let request = self
            .request(
                Method::POST,
                "_bulk?filter_path=items.*.status,items.*.result,items.*.error",
            )?
            .header("content-type", "application/x-ndjson")
            .body(body);
        let response = match request.send().await {
            Ok(response) => response,
            Err(error) => return Ok(Answer::Later(plain(error).to_string())),
        };
        let status = response.status();
        let text = match response.text().await {
            Ok(text) => text,
            Err(error) => return Ok(Answer::Later(plain(error).to_string())),
        };
        match status {
            StatusCode::TOO_MANY_REQUESTS => {
                return Ok(Answer::Later(format!("{status}: {}", reason(&text))));
            }
            StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE => {
                return Ok(Answer::Refused(format!("{status}: {}", reason(&text))));
            }
            _ if status.is_server_error() => {
                return Ok(Answer::Later(format!("{status}: {}", reason(&text))));
            }
            _ if !status.is_success() => bail!("{status}: {}", reason(&text)),
            _ => {}
        }
        let Ok(response) = serde_json::from_str::<Response>(&text) else {
            return Ok(Answer::Later("an answer that is no bulk answer".to_owned()));
        };
        let verdict = |Action { index: item }| match (item.status, item.error) {
            (200..300, _) => Verdict::Stored {
                replaced: item.result.as_deref() != Some("created"),
            },
            (status, error) => {
                let error = error.unwrap_or_default();
                let why = format!("{status} {}", explain(&error));
                let of_the_index = error["type"]
                    .as_str()
                    .is_some_and(|kind| OF_THE_INDEX.contains(&kind));
                if status == 429 || status >= 500 || of_the_index {
                    Verdict::Later(why)
                } else {
                    Verdict::Refused(why)
                }
            }
        };
        Ok(Answer::Verdicts(
            response.items.into_iter().map(verdict).collect(),
        ))
    }

    /// How many documents there are, of one run or in all, with everything that was stored so far.
    pub async fn count(&self, run: Option<&str>) -> Result<u64> {
        self.refresh().await?;
        let query = match run {
            Some(run) => json!({ "query": { "term": { "ingested.run": run } } }),
            None => json!({ "query": { "match_all": {} } }),
        };
        let path = format!("{}/_count?ignore_unavailable=true", self.days());
        let found = self.ask(Method::POST, &path, Some(query)).await?;
        found["count"].as_u64().context("no count in the answer")
    }

    /// Makes all that was stored visible to searches, which would take a second by itself.
    pub async fn refresh(&self) -> Result<()> {
        let path = format!("{}/_refresh?ignore_unavailable=true", self.days());
        self.ask(Method::POST, &path, None).await?;
        Ok(())
    }

    pub async fn search(&self, body: Value) -> Result<Value> {
        let path = format!("{}/_search?ignore_unavailable=true", self.days());
        self.ask(Method::POST, &path, Some(body)).await
    }

    /// Deletes the indices and the template.
    pub async fn clear(&self) -> Result<()> {
        let found = self
            .ask(Method::GET, &format!("{}/_settings", self.days()), None)
            .await?;
        for index in found.as_object().into_iter().flat_map(|all| all.keys()) {
            self.ask(Method::DELETE, index, None).await?;
        }
        let template = format!("_index_template/{}-daily", self.index);
        self.ask(Method::DELETE, &template, None).await?;
        Ok(())
    }
}

/// Fields that are not named are kept in the document and not indexed: a log with a thousand different
/// fields must not become a mapping of a thousand fields. What is below `fields` is not even looked at.
fn mapping() -> Value {
    let keyword = json!({ "type": "keyword", "ignore_above": 256 });
    let kept = json!({ "type": "keyword", "index": false, "doc_values": false });
    json!({
        "dynamic": false,
        "properties": {
            "timestamp": { "type": "date" },
            "service": keyword,
            "level": keyword,
            "message": { "type": "text" },
            "fields": { "type": "object", "enabled": false },
            "http": {
                "dynamic": false,
                "properties": { "client": keyword, "status": { "type": "integer" } },
            },
            "ingested": {
                "dynamic": false,
                "properties": {
                    "run": keyword,
                    "source": keyword,
                    "line": { "type": "long" },
                    "format": keyword,
                    "reason": keyword,
                    "raw_base64": kept,
                },
            },
        },
    })
}

/// An error without the URL, which may hold a password, and with its causes.
fn plain(error: reqwest::Error) -> anyhow::Error {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    anyhow::Error::msg(text)
}

/// The reason in an error that the store has written, or the beginning of what it wrote.
fn reason(text: &str) -> String {
    match serde_json::from_str::<Value>(text) {
        Ok(answer) if answer["error"].is_object() => explain(&answer["error"]),
        _ => text.chars().take(200).collect(),
    }
}

fn explain(error: &Value) -> String {
    let mut parts = Vec::new();
    let mut next = match &error["root_cause"][0] {
        Value::Null => error,
        root => root,
    };
    while next.is_object() {
        parts.push(format!(
            "{}: {}",
            next["type"].as_str().unwrap_or("error"),
            next["reason"].as_str().unwrap_or("no reason given")
        ));
        next = &next["caused_by"];
    }
    if parts.is_empty() {
        return error.to_string();
    }
    // It may quote the document.
    parts.join(" <- ").chars().take(1000).collect()
}
