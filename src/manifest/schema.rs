//! The form of the manifest as a JSON Schema (draft 2020-12), for editors and other programs, and for knowing
//! which type a field wants. The parser decides; a test holds the two together.

use serde_json::Value;
use std::sync::LazyLock;

/// The schema, as it is printed.
pub const TEXT: &str = include_str!("schema.json");

static SCHEMA: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(TEXT).expect("the schema in the program is JSON"));

/// What a field of a service wants, for values that come as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldKind {
    /// A string, as it stands.
    Text,
    /// A string, or null.
    TextOrNull,
    /// A variable of the environment: a string, or null to unset it.
    Variable,
    /// An array of strings.
    List,
    /// Something else: numbers, true and false, objects.
    Json,
}

/// What the field at `path` of a service wants; for a path that leads nowhere, the index of the first word that
/// is unknown and the names that are known there.
pub fn wants(path: &[&str]) -> Result<FieldKind, (usize, Vec<&'static str>)> {
    let mut node = &SCHEMA["$defs"]["service"];
    for (index, name) in path.iter().enumerate() {
        if node["propertyNames"].is_object() {
            return if path.len() == index + 1 {
                Ok(FieldKind::Variable)
            } else {
                Err((index + 1, Vec::new()))
            };
        }
        node = match node["properties"].get(*name) {
            Some(node) => node,
            None => {
                let known = node["properties"].as_object();
                return Err((index, known.into_iter().flat_map(|k| k.keys()).map(String::as_str).collect()));
            }
        };
    }
    let allows = |kind: &str| match &node["type"] {
        Value::Array(kinds) => kinds.iter().any(|k| k == kind),
        one => one == kind,
    };
    Ok(match () {
        () if allows("string") && allows("null") => FieldKind::TextOrNull,
        () if allows("string") && !allows("boolean") => FieldKind::Text,
        () if allows("array") => FieldKind::List,
        () => FieldKind::Json,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::model;
    use crate::manifest::parse::{self, Mode};
    use serde_json::json;
    use std::collections::BTreeSet;

    /// Enough of JSON Schema for ours, but for patterns: the first thing that does not hold.
    fn fault(schema: &Value, value: &Value, at: &str) -> Option<String> {
        if let Some(name) = schema["$ref"].as_str() {
            return fault(SCHEMA.pointer(name.strip_prefix('#').unwrap()).unwrap(), value, at);
        }
        let is = |kind: &Value| match kind.as_str().unwrap() {
            "object" => value.is_object(),
            "array" => value.is_array(),
            "string" => value.is_string(),
            "boolean" => value.is_boolean(),
            "integer" => value.is_u64(),
            "null" => value.is_null(),
            other => panic!("no such type: {other}"),
        };
        let typed = match &schema["type"] {
            Value::Array(kinds) => kinds.iter().any(is),
            kind => is(kind),
        };
        let limit = |name: &str| schema[name].as_u64();
        let number = value.as_u64();
        let length = value.as_str().map(|s| s.chars().count() as u64);
        if !typed
            || schema.get("const").is_some_and(|c| c != value)
            || schema["enum"].as_array().is_some_and(|e| !e.contains(value))
            || number.is_some_and(|n| {
                limit("minimum").is_some_and(|m| n < m) || limit("maximum").is_some_and(|m| n > m)
            })
            || length.is_some_and(|n| {
                limit("minLength").is_some_and(|m| n < m) || limit("maxLength").is_some_and(|m| n > m)
            })
            || value.as_array().is_some_and(|a| limit("minItems").is_some_and(|m| (a.len() as u64) < m))
        {
            return Some(format!("{at}: {value}"));
        }
        let items = value.as_array().into_iter().flatten();
        if let Some(found) =
            items.enumerate().find_map(|(i, v)| fault(&schema["items"], v, &format!("{at}[{i}]")))
        {
            return Some(found);
        }
        let fields = value.as_object()?;
        let required = schema["required"].as_array().into_iter().flatten();
        if let Some(name) = required.map(|r| r.as_str().unwrap()).find(|r| !fields.contains_key(*r)) {
            return Some(format!("{at}.{name} missing"));
        }
        fields.iter().find_map(|(name, value)| {
            match (schema["properties"].get(name), &schema["additionalProperties"]) {
                (Some(schema), _) => fault(schema, value, &format!("{at}.{name}")),
                (None, Value::Bool(false)) => Some(format!("{at}.{name} unknown")),
                (None, schema) => fault(schema, value, &format!("{at}.{name}")),
            }
        })
    }

    fn document(service: Value) -> Value {
        json!({"version": 1, "serial": 1, "generation": "2026-11-22T18:31:05Z", "services": [service]})
    }

    fn service() -> Value {
        json!({"name": "ava", "artifact": {"storePath": "/nix/store/placeholder"}, "hosts": ["biz"]})
    }

    #[test]
    fn schema_and_parser_know_the_same_fields() {
        let at = |pointer: &str| -> BTreeSet<String> {
            let node = SCHEMA.pointer(pointer).unwrap();
            assert_eq!(node["additionalProperties"], false, "{pointer}");
            node["properties"].as_object().unwrap().keys().cloned().collect()
        };
        for (pointer, fields) in [
            ("", model::Manifest::FIELDS),
            ("/properties/change", model::Change::FIELDS),
            ("/$defs/service", model::Service::FIELDS),
            ("/$defs/service/properties/artifact", model::Artifact::FIELDS),
            ("/$defs/service/properties/exec", model::Exec::FIELDS),
            ("/$defs/service/properties/http", model::Http::FIELDS),
            ("/$defs/service/properties/health", model::Health::FIELDS),
            ("/$defs/service/properties/systemd", model::Systemd::FIELDS),
            ("/$defs/service/properties/hardening", model::Hardening::FIELDS),
        ] {
            assert_eq!(at(pointer), fields.iter().map(|f| f.to_string()).collect(), "{pointer}");
        }
    }

    #[test]
    fn what_the_parser_writes_fits_the_schema() {
        let whole = include_bytes!("../../tests/fixtures/manifest-v1.json");
        let mut strict = service();
        strict["hardening"] = json!({"profile": "strict"});
        strict["credentials"] = json!({"tls.key": "/s/key", "token": "/s/token"});
        for bytes in
            [whole.to_vec(), document(service()).to_string().into(), document(strict).to_string().into()]
        {
            let written = parse::manifest(&bytes, Mode::Strict).unwrap().to_bytes();
            let value: Value = serde_json::from_slice(&written).unwrap();
            assert_eq!(fault(&SCHEMA, &value, ""), None);
        }
    }

    #[test]
    fn schema_and_parser_refuse_the_same() {
        for (pointer, value) in [
            ("/version", json!(2)),
            ("/version", json!("1")),
            ("/serial", json!(-1)),
            ("/services", json!({})),
            ("/services/0/hosts", json!([])),
            ("/services/0/hosts", json!("biz")),
            ("/services/0/hosts", Value::Null),
            ("/services/0/artifact", json!({"storePath": "/nix/store/placeholder", "type": "docker"})),
            ("/services/0/artifact", json!({})),
            ("/services/0/exec", json!({"command": 1})),
            ("/services/0/exec", json!({"command": ""})),
            ("/services/0/exec", Value::Null),
            ("/services/0/env", json!({"A": 1})),
            ("/services/0/env", Value::Null),
            ("/services/0/credentials", Value::Null),
            ("/services/0/credentials", json!({"token": null})),
            ("/services/0/credentials", json!(["token:/s/token"])),
            ("/services/0/http", json!({"domain": "a.b"})),
            ("/services/0/http", json!({"domain": "a.b", "internalPort": 0})),
            ("/services/0/http", json!({"domain": "a.b", "internalPort": 65536})),
            ("/services/0/http", json!({"domain": "a.b", "internalPort": "80"})),
            ("/services/0/http", json!({"domain": "a.b", "internalPort": 80, "port": 80})),
            ("/services/0/health", json!({"path": "/", "host": 80})),
            ("/services/0/health", json!({"timeoutSec": 0})),
            ("/services/0/health", json!({"timeoutSec": 3601})),
            ("/services/0/rollout", json!("replace")),
            ("/services/0/rollout", Value::Null),
            ("/services/0/systemd", json!({"restart": "sometimes"})),
            ("/services/0/systemd", json!({"restartSec": 86401})),
            ("/services/0/systemd", json!({"stopTimeoutSec": 0})),
            ("/services/0/systemd", json!({"memoryMax": 512})),
            ("/services/0/hardening", json!({"protectSystem": "true"})),
            ("/services/0/hardening", json!({"privateTmp": "yes"})),
            ("/services/0/hardening", json!({"profile": "loose"})),
            ("/services/0/hardening", json!({"profile": null})),
            ("/services/0/revision", json!("")),
            ("/services/0/port", json!(80)),
        ] {
            let mut document = document(service());
            let (above, name) = pointer.rsplit_once('/').unwrap();
            document.pointer_mut(above).unwrap()[name] = value.clone();
            assert!(fault(&SCHEMA, &document, "").is_some(), "the schema passes {pointer} {value}");
            let parsed = parse::manifest(document.to_string().as_bytes(), Mode::Strict);
            assert!(parsed.is_err(), "the parser passes {pointer} {value}");
        }
        assert_eq!(fault(&SCHEMA, &document(service()), ""), None);
    }

    #[test]
    fn a_field_says_which_type_it_wants() {
        for (path, expected) in [
            ("name", FieldKind::Text),
            ("revision", FieldKind::TextOrNull),
            ("exec.command", FieldKind::TextOrNull),
            ("http.internalPort", FieldKind::Json),
            ("http", FieldKind::Json),
            ("hosts", FieldKind::List),
            ("systemd.after", FieldKind::List),
            ("hardening.protectSystem", FieldKind::Json),
            ("env.PORT", FieldKind::Variable),
            ("credentials.token", FieldKind::Variable),
            ("hardening.profile", FieldKind::Text),
        ] {
            assert_eq!(wants(&path.split('.').collect::<Vec<_>>()), Ok(expected), "{path}");
        }
        assert_eq!(wants(&["http", "port"]).unwrap_err().0, 1);
        assert!(wants(&["port"]).unwrap_err().1.contains(&"http"));
    }
}
