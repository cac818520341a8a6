//! The digest of a service's entry: what a host says it worked from is compared with what the manifest says now, so
//! that an entry which no host has yet is seen, whatever of it was changed.
//!
//! It is made from the text of the manifest, not from the types: host and laptop read the same bytes, so programs
//! of different versions, with other fields and other defaults, come to the same digest. Fields that this version
//! does not know count like all others. What cannot matter is left out: the order of fields, white space, and
//! members that are null, which is how a newer program writes a field of its own that nobody set.

use super::limits::{self, Level};
use crate::hash::Sha256;
use crate::names::ServiceName;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::collections::BTreeMap;

/// How many bytes of the hash are kept: it tells versions of one entry apart, and nobody has to trust it.
const BYTES: usize = 12;

/// The digest of every entry of a stored manifest, by service. Empty where the bytes are no manifest.
pub fn digests(bytes: &[u8]) -> BTreeMap<ServiceName, String> {
    #[derive(Deserialize)]
    struct Document {
        services: Vec<Entry>,
    }
    let read =
        limits::document(bytes, Level::Manifest).ok().and_then(|()| serde_json::from_slice(bytes).ok());
    let services = read.map(|Document { services }| services).unwrap_or_default();
    services.into_iter().filter_map(|Entry { name, digest }| Some((name?, digest))).collect()
}

struct Entry {
    name: Option<ServiceName>,
    digest: String,
}

impl<'de> Deserialize<'de> for Entry {
    /// One after the other: a large manifest is never held as a tree.
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let mut entry = Value::deserialize(d)?;
        let name = entry.get("name").and_then(Value::as_str).and_then(|name| ServiceName::parse(name).ok());
        without_nulls(&mut entry);
        // serde_json keeps members sorted by the bytes of their names.
        let digest = Sha256::of(entry.to_string().as_bytes()).short(BYTES);
        Ok(Entry { name, digest })
    }
}

fn without_nulls(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|_, value| !value.is_null());
            members.values_mut().for_each(without_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(without_nulls),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(entry: &str) -> String {
        let all = digests(format!("{{\"version\": 1, \"services\": [{entry}]}}").as_bytes());
        all.into_values().next().unwrap()
    }

    #[test]
    fn whatever_changes_an_entry_changes_its_digest_and_layout_does_not() {
        let entry =
            r#"{"name": "ava", "env": {"A": "1", "B": "2"}, "hosts": ["biz"], "future": {"x": [1, 2.5]}}"#;
        for same in [
            r#"{"future":{"x":[1,2.5]},"hosts":["biz"],"name":"ava","env":{"B":"2","A":"1"}}"#,
            r#"{"name": "ava", "env": {"A": "1", "B": "2"}, "hosts": ["biz"], "future": {"x": [1, 2.5], "y": null}, "new": null}"#,
        ] {
            assert_eq!(of(same), of(entry), "{same}");
        }
        for (from, to) in [
            ("\"1\"", "\"3\""),
            ("biz", "two"),
            ("[1, 2.5]", "[2.5, 1]"),
            ("\"A\"", "\"a\""),
            ("future", "past"),
            ("\"2\"}", "\"2\", \"C\": \"\"}"),
        ] {
            assert_ne!(of(&entry.replacen(from, to, 1)), of(entry), "{from} to {to}");
        }
    }

    #[test]
    fn the_digest_of_a_frozen_manifest_stays_what_it_was() {
        let all = digests(include_bytes!("../../tests/fixtures/manifest-v1.json"));
        let ava = all.iter().find(|(name, _)| name.as_str() == "ava").unwrap();
        assert_eq!(ava.1, "d3f1db3e06bb5337a84e71ee");
        assert!(
            digests(b"").is_empty() && digests(b"[]").is_empty() && digests(b"{\"services\": 1}").is_empty()
        );
    }
}
