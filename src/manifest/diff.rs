//! What differs between two versions of the manifest, by service and field. Pure; knows every field there is,
//! also those this version does not, because it compares what would be written.

use super::json::shown;
use super::model::{Manifest, Service};
use crate::names::ServiceName;
use serde_json::Value;
use std::collections::HashMap;
use std::fmt;

/// One difference.
#[derive(Debug, Clone, PartialEq)]
pub enum Difference {
    /// The newer one has a service more.
    Added(ServiceName),
    /// The newer one has a service less.
    Removed(ServiceName),
    /// A field of a service differs.
    Changed {
        /// The service; None: a field of the manifest itself.
        service: Option<ServiceName>,
        /// `http.internalPort`.
        field: String,
        /// What it was; None: it was not there.
        old: Option<Value>,
        /// What it is; None: it is gone.
        new: Option<Value>,
    },
}

impl Difference {
    /// The service it is about, if it is about one.
    pub fn service(&self) -> Option<&ServiceName> {
        match self {
            Difference::Added(name) | Difference::Removed(name) => Some(name),
            Difference::Changed { service, .. } => service.as_ref(),
        }
    }
}

/// With `#` all of a value that is no text is written, however long: for who shall vouch for it.
impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = f.alternate();
        let side = |value: &Option<Value>| match value {
            None => "(none)".to_string(),
            Some(Value::String(text)) if !text.is_empty() => crate::log::printable(text).into_owned(),
            Some(value) if whole => crate::log::printable(&value.to_string()).into_owned(),
            Some(value) => shown(value),
        };
        match self {
            Difference::Added(name) => write!(f, "+ service {name}"),
            Difference::Removed(name) => write!(f, "- service {name}"),
            Difference::Changed { service, field, old, new } => {
                if let Some(name) = service {
                    write!(f, "{name}: ")?;
                }
                write!(f, "{field} {} → {}", side(old), side(new))
            }
        }
    }
}

/// What makes `new` out of `old`, in the order of `new`, removals last. Who wrote a version, when, and its
/// serial are no differences, nor is the order of services.
pub fn diff(old: &Manifest, new: &Manifest) -> Vec<Difference> {
    let mut found = Vec::new();
    let top = |m: &Manifest| Value::Object(m.extra.clone());
    compare(None, "", Some(&top(old)), Some(&top(new)), &mut found);
    let before: HashMap<&ServiceName, &Service> = old.services.iter().map(|s| (&s.name, s)).collect();
    for service in &new.services {
        match before.get(&service.name) {
            None => found.push(Difference::Added(service.name.clone())),
            Some(old) if *old == service => {}
            Some(old) => {
                compare(Some(&service.name), "", Some(&tree(old)), Some(&tree(service)), &mut found);
            }
        }
    }
    let after: HashMap<&ServiceName, &Service> = new.services.iter().map(|s| (&s.name, s)).collect();
    let gone = old.services.iter().filter(|s| !after.contains_key(&s.name));
    found.extend(gone.map(|s| Difference::Removed(s.name.clone())));
    found
}

/// A service as JSON.
pub fn tree(service: &Service) -> Value {
    // Plain data with text keys serializes.
    serde_json::to_value(service).expect("plain data with text keys serializes")
}

fn compare(
    service: Option<&ServiceName>,
    field: &str,
    old: Option<&Value>,
    new: Option<&Value>,
    found: &mut Vec<Difference>,
) {
    if old == new {
        return;
    }
    if let (Some(Value::Object(a)), Some(Value::Object(b))) = (old, new) {
        let names = a.keys().chain(b.keys().filter(|name| !a.contains_key(*name)));
        for name in names {
            let path = if field.is_empty() { name.clone() } else { format!("{field}.{name}") };
            compare(service, &path, a.get(name), b.get(name), found);
        }
        return;
    }
    found.push(Difference::Changed {
        service: service.cloned(),
        field: field.into(),
        old: old.cloned(),
        new: new.cloned(),
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::parse::{Mode, manifest};
    use serde_json::json;

    fn base() -> Value {
        json!({"version": 1, "serial": 3, "generation": "2026-11-22T18:31:05Z", "services": [
            {"name": "ava", "artifact": {"storePath": "/nix/store/placeholder"}, "hosts": ["biz"],
             "env": {"A": "1", "B": "2"},
             "http": {"domain": "a.org", "internalPort": 80}, "later": {"x": [1]}},
            {"name": "web", "artifact": {"storePath": "/nix/store/placeholder"}, "hosts": ["biz"]}]})
    }

    fn read(value: &Value) -> Manifest {
        manifest(value.to_string().as_bytes(), Mode::Tolerant).unwrap()
    }

    #[test]
    fn equal_manifests_do_not_differ_and_order_and_author_do_not_count() {
        let mut other = base();
        other["serial"] = 9.into();
        other["generation"] = "2027-01-01T00:00:00Z".into();
        other["change"] = json!({"action": "x", "by": "y"});
        other["services"].as_array_mut().unwrap().reverse();
        assert_eq!(diff(&read(&base()), &read(&other)), []);
    }

    #[test]
    fn exactly_the_changed_fields_are_named() {
        for (pointer, value, line) in [
            ("/services/0/http/internalPort", json!(81), "ava: http.internalPort 80 → 81"),
            ("/services/0/env", json!({"A": "1", "C": "3"}), "ava: env.B 2 → (none)\nava: env.C (none) → 3"),
            ("/services/0/later/x", json!([1, 2]), "ava: later.x [1] → [1,2]"),
            ("/services/1/hosts", json!(["biz", "b"]), "web: hosts [\"biz\"] → [\"biz\",\"b\"]"),
            ("/services/1/name", json!("x"), "+ service x\n- service web"),
            (
                "/services/0/artifact/storePath",
                json!("/nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava"),
                "ava: artifact.storePath /nix/store/placeholder → /nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava",
            ),
            (
                "/services/0/http",
                json!(null),
                "ava: http {\"domain\":\"a.org\",\"internalPort\":80,\"path\":\"/\"} → null",
            ),
        ] {
            let mut other = base();
            *other.pointer_mut(pointer).unwrap() = value;
            let lines: Vec<String> =
                diff(&read(&base()), &read(&other)).iter().map(Difference::to_string).collect();
            assert_eq!(lines.join("\n"), line);
        }
    }
}
