//! The changes that people make to a manifest, each a pure function on it: what was there before decides,
//! nothing is read or written. The caller publishes the result ([`super::edit`]).

use super::diff::tree;
use super::json::{At, shown};
use super::model::{Manifest, Service, Target};
use super::parse::{self, FieldError, Mode};
use super::schema::{self, Wants};
use crate::error::{Error, Result, did_you_mean};
use crate::names::StorePath;
use serde_json::{Map, Value};
use std::collections::{HashMap, HashSet};

/// There is no such service: with the nearest names, or how one is added.
pub fn unknown_service(name: &str, manifest: &Manifest) -> Error {
    let near = did_you_mean(name, manifest.services.iter().map(|s| s.name.as_str()));
    let next = if near.is_empty() { "; add it with 'deploy-manifest add-service'" } else { near.as_str() };
    Error::new(format!("no service '{}' in the manifest{next}", crate::say::printable(name)))
}

fn index(manifest: &Manifest, name: &str) -> Result<usize> {
    manifest
        .services
        .iter()
        .position(|s| s.name.as_str() == name)
        .ok_or_else(|| unknown_service(name, manifest))
}

/// Gives a service its closure, and the commit it was built from. Returns whether anything changed: the same
/// path again, without a commit or with the same, changes nothing.
pub fn update(manifest: &mut Manifest, name: &str, path: &StorePath, revision: Option<&str>) -> Result<bool> {
    let at = index(manifest, name)?;
    let service = &mut manifest.services[at];
    let target = Target::Path(path.clone());
    let same_path = service.artifact.store_path == target;
    if same_path && revision.is_none_or(|r| service.revision.as_deref() == Some(r)) {
        return Ok(false);
    }
    service.artifact.store_path = target;
    service.revision = revision.map(String::from);
    Ok(true)
}

/// Adds a service at the end.
pub fn add(manifest: &mut Manifest, service: Service) -> Result<()> {
    if manifest.service(service.name.as_str()).is_some() {
        let name = &service.name;
        return Err(Error::new(format!(
            "service '{name}' is in the manifest already; change it with 'deploy-manifest set {name} …' or \
             'deploy-manifest edit'"
        )));
    }
    manifest.services.push(service);
    Ok(())
}

/// Takes a service out.
pub fn remove(manifest: &mut Manifest, name: &str) -> Result<()> {
    let at = index(manifest, name)?;
    manifest.services.remove(at);
    Ok(())
}

/// Sets fields of a service: dotted paths with their values as a person types them. Returns whether anything
/// changed. The result is checked as strictly as a new service; fields of a newer version stay.
pub fn set(manifest: &mut Manifest, name: &str, assignments: &[(String, String)]) -> Result<bool> {
    let at = index(manifest, name)?;
    let before = &manifest.services[at];
    let mut value = tree(before);
    for (field, text) in assignments {
        assign(&mut value, field, text)?;
    }
    let service = parse::service(value, Mode::Tolerant, None)?;
    if let Some(unknown) = parse::new_unknown_in_service(&service, Some(before)) {
        return Err(unknown.into());
    }
    if service == *before {
        return Ok(false);
    }
    manifest.services[at] = service;
    Ok(true)
}

fn assign(service: &mut Value, field: &str, text: &str) -> Result<(), FieldError> {
    let error = |reason: String| FieldError { path: field.to_string(), reason };
    let path: Vec<&str> = field.split('.').collect();
    let there = service.pointer(&format!("/{}", field.replace('.', "/"))).is_some();
    let wants = match schema::wants(&path) {
        Ok(wants) => wants,
        // A newer version's field, which only it understands.
        Err(_) if there => Wants::Json,
        Err((index, known)) => {
            let word = path.get(index).copied().unwrap_or_default();
            let near = match known.is_empty() {
                true => "; nothing has a name below this".into(),
                false if index == 0 => parse::unknown_in_service(&At::Root, word).reason,
                false => format!("unknown field{}", did_you_mean(word, known)),
            };
            return Err(error(near));
        }
    };
    let json = || serde_json::from_str::<Value>(text).ok();
    let value = match wants {
        Wants::Text => Value::from(text),
        Wants::TextOrNull | Wants::Variable if text == "null" => Value::Null,
        Wants::TextOrNull | Wants::Variable => Value::from(text),
        Wants::List => match json() {
            Some(list @ Value::Array(_)) => list,
            _ => text.split(',').map(str::trim).filter(|w| !w.is_empty()).collect(),
        },
        Wants::Json => json().unwrap_or_else(|| Value::from(text)),
    };
    let mut node = service;
    let (last, above) = path.split_last().expect("a split text has at least one part");
    for name in above {
        let map = match node {
            Value::Object(map) => map,
            other => return Err(error(format!("{} has no fields", shown(other)))),
        };
        let below = map.entry(*name).or_insert(Value::Null);
        if below.is_null() {
            *below = Value::Object(Map::new());
        }
        node = below;
    }
    let Value::Object(map) = node else {
        return Err(error(format!("{} has no fields", shown(node))));
    };
    if wants == Wants::Variable && value.is_null() {
        map.remove(*last);
    } else {
        map.insert((*last).into(), value);
    }
    Ok(())
}

/// Brings what a person made of `base` into `current`, which others may have changed meanwhile: service by
/// service, and never over somebody else's change. Returns whether anything changed.
pub fn merge(current: &mut Manifest, base: &Manifest, edited: &Manifest) -> Result<bool> {
    if current.services == base.services && current.extra == base.extra {
        let changed = current.services != edited.services || current.extra != edited.extra;
        current.services.clone_from(&edited.services);
        current.extra.clone_from(&edited.extra);
        return Ok(changed);
    }
    let by_name = |m: &Manifest| -> HashMap<String, Service> {
        m.services.iter().map(|s| (s.name.to_string(), s.clone())).collect()
    };
    let (before, mine, theirs) = (by_name(base), by_name(edited), by_name(current));
    let touched = |name: &String| before.get(name) != mine.get(name) && theirs.get(name) != mine.get(name);
    let names = base.services.iter().chain(&edited.services).map(|s| s.name.to_string());
    let mut seen = HashSet::new();
    let names: Vec<String> = names.filter(|n| seen.insert(n.clone())).filter(touched).collect();
    if let Some(name) = names.iter().find(|name| theirs.get(*name) != before.get(*name)) {
        return Err(Error::new(format!(
            "service '{name}' was changed meanwhile (serial {}: {} by {})",
            current.serial, current.change.action, current.change.by
        )));
    }
    if edited.extra != base.extra && current.extra != base.extra && edited.extra != current.extra {
        return Err(Error::new(format!("the manifest was changed meanwhile (serial {})", current.serial)));
    }
    let mut changed = false;
    if edited.extra != base.extra {
        changed |= current.extra != edited.extra;
        current.extra.clone_from(&edited.extra);
    }
    for name in names {
        changed = true;
        let at = current.services.iter().position(|s| s.name.as_str() == name);
        match (at, mine.get(&name)) {
            (Some(at), Some(service)) => current.services[at] = service.clone(),
            (Some(at), None) => {
                current.services.remove(at);
            }
            (None, Some(service)) => current.services.push(service.clone()),
            (None, None) => {}
        }
    }
    Ok(changed)
}

/// Puts back what an older version said. Returns whether anything changed.
pub fn restore(current: &mut Manifest, old: &Manifest) -> bool {
    let changed = current.services != old.services || current.extra != old.extra;
    current.services.clone_from(&old.services);
    current.extra.clone_from(&old.extra);
    changed
}

/// Puts back what an older version said of one service. Returns whether anything changed.
pub fn restore_service(current: &mut Manifest, old: &Manifest, name: &str) -> Result<bool> {
    let at = current.services.iter().position(|s| s.name.as_str() == name);
    match (at, old.service(name)) {
        (None, None) => Err(unknown_service(name, current)),
        (Some(_), None) => Err(Error::new(format!(
            "serial {} has no service '{name}'; take it out with 'deploy-manifest remove-service {name}'",
            old.serial
        ))),
        (Some(at), Some(service)) => {
            let changed = current.services[at] != *service;
            current.services[at] = service.clone();
            Ok(changed)
        }
        (None, Some(service)) => {
            current.services.push(service.clone());
            Ok(true)
        }
    }
}
