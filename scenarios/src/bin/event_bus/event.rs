//! The events: typed, with a version that is looked at before anything else.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// Not `events.user.…`: that is what the first lesson, nats_publish, publishes.
pub const CREATED: &str = "event-bus.user.created";
pub const UPDATED: &str = "event-bus.user.updated";
pub const ALL: &str = "event-bus.user.>";

/// The version that this program writes, and the only one that it reads.
pub const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct User {
    pub version: u32,
    pub user_id: String,
    pub email: String,
    pub timestamp: DateTime<Utc>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Created(User),
    Updated(User),
}

impl Event {
    /// What a message is, or why it is nothing that this program knows.
    pub fn read(subject: &str, payload: &[u8]) -> Result<Event, String> {
        #[derive(Deserialize)]
        struct Envelope {
            version: u32,
        }
        // A newer version may have other fields: its version tells, not the first field that is missing.
        let Envelope { version } =
            serde_json::from_slice(payload).map_err(|error| format!("malformed: {error}"))?;
        if version != VERSION {
            return Err(format!("version {version} is not known here"));
        }
        let user: User =
            serde_json::from_slice(payload).map_err(|error| format!("malformed: {error}"))?;
        if user.user_id.is_empty() || user.user_id.len() > 200 {
            return Err("malformed: user_id is empty or too long".to_owned());
        }
        match subject {
            CREATED => Ok(Event::Created(user)),
            UPDATED => Ok(Event::Updated(user)),
            _ => Err(format!("no event is called {subject}")),
        }
    }

    pub fn subject(&self) -> &'static str {
        match self {
            Event::Created(_) => CREATED,
            Event::Updated(_) => UPDATED,
        }
    }

    pub fn user(&self) -> &User {
        match self {
            Event::Created(user) | Event::Updated(user) => user,
        }
    }

    /// The same for every delivery of the same event, and for no other: what deduplication goes by.
    pub fn id(&self) -> String {
        match self {
            Event::Created(user) => format!("created-{}", user.user_id),
            Event::Updated(user) => {
                let time = user.timestamp.timestamp_micros();
                format!("updated-{}-{time}", user.user_id)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_read_as_it_was_written() {
        let user = User {
            version: VERSION,
            user_id: "u1".into(),
            email: "u1@example.org".into(),
            timestamp: DateTime::from_timestamp_micros(1_700_000_000_123_456).unwrap(),
        };
        let json = serde_json::to_vec(&user).unwrap();
        assert_eq!(
            Event::read(CREATED, &json),
            Ok(Event::Created(user.clone()))
        );
        assert_eq!(Event::read(UPDATED, &json), Ok(Event::Updated(user)));
        assert!(Event::read("event-bus.user.deleted", &json).is_err());
    }

    #[test]
    fn the_version_comes_first() {
        let newer = br#"{"version":2,"id":7,"mail":["a@b"]}"#;
        let reason = Event::read(CREATED, newer).unwrap_err();
        assert_eq!(reason, "version 2 is not known here");
        for bad in [
            "",
            "{}",
            "User ID: 123",
            r#"{"version":1}"#,
            "\u{0}",
            "[]",
            r#"{"version":-1}"#,
        ] {
            assert!(Event::read(CREATED, bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
