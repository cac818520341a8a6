//! Points in time as the formats write them: RFC 3339, UTC, whole seconds. Only [`Timestamp::now`] and
//! [`journal_now`] read the clock; everything that decides takes the time as an argument.

use chrono::{DateTime, Datelike, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::SystemTime;

/// Seconds since the Unix epoch, UTC. Written as `2026-11-22T18:31:05Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// The clock's time.
    pub fn now() -> Self {
        Timestamp(DateTime::<Utc>::from(SystemTime::now()).timestamp())
    }

    /// Reads RFC 3339; None when it is not, or not within the years 0 to 9999 in UTC, which alone it can write.
    pub fn parse(text: &str) -> Option<Self> {
        let time = DateTime::parse_from_rfc3339(text).ok()?.to_utc();
        (0..=9999).contains(&time.year()).then(|| Timestamp(time.timestamp()))
    }

    fn utc(self) -> DateTime<Utc> {
        DateTime::from_timestamp(self.0, 0).unwrap_or_default()
    }

    /// `20261122T183105Z`: the form in archived versions' names, which sorts by time.
    pub fn compact(self) -> String {
        self.utc().format("%Y%m%dT%H%M%SZ").to_string()
    }

    /// Reads the form of [`Timestamp::compact`].
    pub fn parse_compact(text: &str) -> Option<Self> {
        let time = chrono::NaiveDateTime::parse_from_str(text, "%Y%m%dT%H%M%SZ").ok()?.and_utc();
        Some(Timestamp(time.timestamp())).filter(|time| time.compact() == text)
    }

    /// How long before `now` this was, for people: `12s`, `5m`, `3h`, `2d`; `0s` when it lies ahead.
    pub fn age(self, now: Timestamp) -> String {
        human_seconds(now.0.saturating_sub(self.0).max(0))
    }
}

/// The clock in microseconds since the Unix epoch, as the journal counts: where to begin reading it.
pub fn journal_now() -> i64 {
    DateTime::<Utc>::from(SystemTime::now()).timestamp_micros()
}

/// A length of time for people, in its largest whole unit: `59s`, `5m`, `3h`, `2d`.
pub fn human_seconds(seconds: i64) -> String {
    match seconds {
        s if s < 60 => format!("{s}s"),
        s if s < 3600 => format!("{}m", s / 60),
        s if s < 86_400 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.utc().to_rfc3339_opts(SecondsFormat::Secs, true))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Timestamp::parse(&text).ok_or_else(|| {
            let start: String = text.chars().take(72).collect();
            let expected = "expected RFC 3339, such as 2026-11-22T18:31:05Z";
            serde::de::Error::custom(format!("{start:?} is not a time; {expected}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_survives_being_written_and_read() {
        let t = Timestamp(1_795_372_265);
        assert_eq!(t.to_string(), "2026-11-22T18:31:05Z");
        assert_eq!(Timestamp::parse(&t.to_string()), Some(t));
        assert_eq!(t.compact(), "20261122T183105Z");
        assert_eq!(Timestamp::parse_compact("20261122T183105Z"), Some(t));
        for odd in ["", "20261122T183105", "20261322T183105Z", "2026-11-22T18:31:05Z", "20261122T183105Z "] {
            assert_eq!(Timestamp::parse_compact(odd), None, "{odd:?}");
        }
        assert_eq!(Timestamp::parse("yesterday"), None);
        for edge in ["0000-01-01T00:00:00Z", "9999-12-31T23:59:59Z"] {
            assert_eq!(Timestamp::parse(edge).map(|t| t.to_string()).as_deref(), Some(edge));
        }
        for beyond in ["0000-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01"] {
            assert_eq!(Timestamp::parse(beyond), None, "{beyond}");
        }
    }

    #[test]
    fn ages_use_their_largest_whole_unit_and_never_go_negative() {
        let now = Timestamp(1_000_000);
        assert_eq!(Timestamp(999_941).age(now), "59s");
        assert_eq!(Timestamp(996_400).age(now), "1h");
        assert_eq!(Timestamp(1_000_010).age(now), "0s");
    }
}
