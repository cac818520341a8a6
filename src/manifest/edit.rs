//! The changes that people make to a manifest, each a pure function on it: what was there before decides,
//! nothing is read or written. The caller publishes the result ([`super::publish`]).

use super::diff::tree;
use super::error::FieldError;
use super::json::shown;
use super::model::{ArtifactPath, Manifest, Service};
use super::parse::{self, Mode};
use super::schema::{self, FieldKind};
use crate::error::{Error, Result, did_you_mean};
use crate::names::StorePath;
use serde_json::{Map, Value};
use std::collections::{HashMap, HashSet};

/// There is no such service: with the nearest names, or where those are that there are.
pub fn unknown_service(name: &str, manifest: &Manifest) -> Error {
    let near = near(name, manifest);
    let next = if near.is_empty() { "; 'deploy-manifest show' prints those there are" } else { &near };
    Error::new(format!("no service '{}' in the manifest{next}", crate::log::printable(name)))
}

fn near(name: &str, manifest: &Manifest) -> String {
    did_you_mean(name, manifest.services.iter().map(|s| s.name.as_str()))
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
    let at = index(manifest, name).map_err(|e| {
        let joint = if near(name, manifest).is_empty() { "; add it" } else { " a new one is added" };
        Error::new(format!("{e}{joint} with 'deploy-manifest add-service'"))
    })?;
    let service = &mut manifest.services[at];
    let target = ArtifactPath::Path(path.clone());
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
pub fn set(manifest: &mut Manifest, name: &str, assignments: &[(&str, &str)]) -> Result<bool> {
    let at = index(manifest, name)?;
    let before = &manifest.services[at];
    let mut value = tree(before);
    for (field, text) in assignments {
        assign(&mut value, field, text)?;
    }
    follow_profile(&mut value, before, assignments);
    let service = parse::service(value, Mode::Tolerant, None)?;
    parse::check_additions_to_service(&service, before)?;
    if service == *before {
        return Ok(false);
    }
    manifest.services[at] = service;
    Ok(true)
}

/// What came with a profile goes with it: where another one is set, the fields that were as the old one has them
/// are left to the new one, unless they are set as well. Only one of them depends on the profile.
fn follow_profile(service: &mut Value, before: &Service, assignments: &[(&str, &str)]) {
    let set = |name: &str| assignments.iter().any(|(field, _)| *field == name);
    let mut old = before.clone();
    old.hardening.dynamic_user = None;
    if let (true, Some(fields)) = (set("hardening.profile"), service["hardening"].as_object_mut())
        && fields.get("profile") != tree(before)["hardening"].get("profile")
        && !set("hardening.dynamicUser")
        && fields.get("dynamicUser") == Some(&old.dynamic_user().into())
    {
        fields.remove("dynamicUser");
    }
}

fn assign(service: &mut Value, field: &str, text: &str) -> Result<(), FieldError> {
    let error = |reason: String| FieldError::new(field, reason);
    let path: Vec<&str> = match field.split_once('.') {
        // Its name may have points.
        Some(("credentials", name)) => vec!["credentials", name],
        _ => field.split('.').collect(),
    };
    let there = service.pointer(&format!("/{}", field.replace('.', "/"))).is_some();
    let wants = match schema::wants(&path) {
        Ok(wants) => wants,
        // A newer version's field, which only it understands.
        Err(_) if there => FieldKind::Json,
        Err((index, known)) => {
            let word = path.get(index).copied().unwrap_or_default();
            let near = match known.is_empty() {
                true => "there is no such field".into(),
                false if index == 0 => parse::unknown_in_service("", word).reason,
                false => format!("unknown field{}", did_you_mean(word, known)),
            };
            return Err(error(near));
        }
    };
    let json = || serde_json::from_str::<Value>(text).ok();
    let value = match wants {
        FieldKind::Text => Value::from(text),
        FieldKind::TextOrNull | FieldKind::Variable if text == "null" => Value::Null,
        FieldKind::TextOrNull | FieldKind::Variable => Value::from(text),
        FieldKind::List => match json() {
            Some(list @ Value::Array(_)) => list,
            _ => text.split(',').map(str::trim).filter(|w| !w.is_empty()).collect(),
        },
        FieldKind::Json => json().unwrap_or_else(|| Value::from(text)),
    };
    let (last, above) = path.split_last().expect("a split text has at least one part");
    let mut map = object(service).map_err(error)?;
    for name in above {
        map = object(map.entry(*name).or_insert(Value::Null)).map_err(error)?;
    }
    if wants == FieldKind::Variable && value.is_null() {
        map.remove(*last);
    } else {
        map.insert((*last).into(), value);
    }
    Ok(())
}

/// The fields of an object, which null becomes.
fn object(node: &mut Value) -> Result<&mut Map<String, Value>, String> {
    if node.is_null() {
        *node = Value::Object(Map::new());
    }
    match node {
        Value::Object(map) => Ok(map),
        other => Err(format!("{} has no fields", shown(other))),
    }
}

/// Brings what a person made of `base` into `current`, which others may have changed meanwhile: service by
/// service, and never over somebody else's change. Returns whether anything changed.
pub fn merge(current: &mut Manifest, base: &Manifest, edited: &Manifest) -> Result<bool> {
    if current.services == base.services && current.extra == base.extra {
        return Ok(restore(current, edited));
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
            "service '{name}' was changed meanwhile (version {}: {} by {})",
            current.serial, current.change.action, current.change.by
        )));
    }
    if edited.extra != base.extra && current.extra != base.extra && edited.extra != current.extra {
        return Err(Error::new(format!("the manifest was changed meanwhile (version {})", current.serial)));
    }
    let mut changed = false;
    if edited.extra != base.extra {
        changed |= current.extra != edited.extra;
        current.extra.clone_from(&edited.extra);
    }
    for name in names {
        changed = true;
        match mine.get(&name) {
            Some(service) => put(current, service),
            None => current.services.retain(|s| s.name.as_str() != name),
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
    let there = current.service(name);
    let Some(service) = old.service(name) else {
        return Err(match there {
            None => unknown_service(name, current),
            Some(_) => Error::new(format!(
                "version {} has no service '{name}'; take it out with 'deploy-manifest remove-service {name}'",
                old.serial
            )),
        });
    };
    let changed = there != Some(service);
    put(current, service);
    Ok(changed)
}

/// Writes a service over the one of its name, or behind the last.
fn put(manifest: &mut Manifest, service: &Service) {
    match manifest.services.iter_mut().find(|s| s.name == service.name) {
        Some(there) => there.clone_from(service),
        None => manifest.services.push(service.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn base() -> Manifest {
        let document = json!({"version": 1, "serial": 3, "generation": "2026-11-22T18:31:05Z", "services": [
            {"name": "ava", "artifact": {"storePath": "/nix/store/placeholder"}, "hosts": ["biz"], "env": {"A": "1"},
             "http": {"domain": "a.org", "internalPort": 80}, "revision": "abc", "later": 1},
            {"name": "web", "artifact": {"storePath": "/nix/store/placeholder"}, "hosts": ["biz"]}]});
        parse::manifest(document.to_string().as_bytes(), Mode::Tolerant).unwrap()
    }

    fn assignments<'a>(list: &[&'a str]) -> Vec<(&'a str, &'a str)> {
        list.iter().map(|a| a.split_once('=').unwrap()).collect()
    }

    #[test]
    fn values_are_read_as_their_fields_want_them() {
        for (assignment, pointer, expected) in [
            ("http.internalPort=8081", "/http/internalPort", json!(8081)),
            ("env.PORT=8081", "/env/PORT", json!("8081")),
            ("env.A=", "/env/A", json!("")),
            ("env.A=x=y", "/env/A", json!("x=y")),
            ("env.A=null", "/env", json!({})),
            ("revision=null", "/revision", json!(null)),
            ("revision=123", "/revision", json!("123")),
            ("health.path=/health", "/health", json!({"path": "/health", "timeoutSec": 30})),
            ("hosts=biz, web1", "/hosts", json!(["biz", "web1"])),
            ("hosts=[\"x\"]", "/hosts", json!(["x"])),
            ("systemd.after=", "/systemd/after", json!([])),
            ("systemd.memoryMax=1G", "/systemd/memoryMax", json!("1G")),
            ("hardening.protectSystem=true", "/hardening/protectSystem", json!("yes")),
            ("hardening.protectSystem=full", "/hardening/protectSystem", json!("full")),
            ("hardening.privateTmp=false", "/hardening/privateTmp", json!(false)),
            ("hardening.profile=strict", "/hardening/profile", json!("strict")),
            ("hardening.profile=strict", "/hardening/dynamicUser", json!(true)),
            ("hardening={\"profile\": \"strict\"}", "/hardening/dynamicUser", json!(true)),
            ("credentials.token=/s/token", "/credentials", json!({"token": "/s/token"})),
            ("credentials.tls.key=/s/key", "/credentials", json!({"tls.key": "/s/key"})),
            ("http=null", "/http", json!(null)),
            ("http={\"domain\": \"b.org\", \"internalPort\": 1}", "/http/domain", json!("b.org")),
            ("exec.command=bin/x -v", "/exec/command", json!("bin/x -v")),
            ("later=2", "/later", json!(2)),
        ] {
            let mut manifest = base();
            assert!(set(&mut manifest, "ava", &assignments(&[assignment])).unwrap(), "{assignment}");
            assert_eq!(tree(&manifest.services[0]).pointer(pointer), Some(&expected), "{assignment}");
            assert_eq!(manifest.services[0].extra.len(), 1, "a newer version's field is lost");
        }
        assert!(!set(&mut base(), "ava", &assignments(&["env.A=1", "http.path=/"])).unwrap());
    }

    #[test]
    fn another_profile_brings_its_own_values_for_what_nobody_set() {
        let hardening = |steps: &[&[&str]]| {
            let mut manifest = base();
            for step in steps {
                set(&mut manifest, "ava", &assignments(step)).unwrap();
            }
            (manifest.services[0].dynamic_user(), manifest.services[0].hardening.private_tmp)
        };
        assert_eq!(hardening(&[&["hardening.profile=strict"]]), (true, true));
        assert_eq!(
            hardening(&[&["hardening.profile=strict"], &["hardening.profile=default"]]),
            (false, true)
        );
        assert_eq!(hardening(&[&["hardening.profile=strict", "hardening.dynamicUser=false"]]), (false, true));
        assert_eq!(
            hardening(&[&["hardening.privateTmp=false"], &["hardening.profile=strict"]]),
            (true, false)
        );
        assert_eq!(hardening(&[&["exec.user=www-data"], &["hardening.profile=strict"]]), (false, true));
        assert_eq!(hardening(&[&["hardening.profile=strict", "exec.user=www-data"]]), (false, true));
        // The same again is no other profile.
        let kept =
            [&["hardening.profile=strict", "hardening.dynamicUser=false"][..], &["hardening.profile=strict"]];
        assert_eq!(hardening(&kept), (false, true));
    }

    #[test]
    fn what_cannot_be_set_is_refused_and_changes_nothing() {
        for (assignment, message) in [
            ("port=1", "port: unknown field; did you mean 'http.internalPort' or 'http.portEnv'?"),
            ("http.port=1", "http.port: unknown field; did you mean 'internalPort' or 'portEnv'?"),
            ("http.internalPort=99999", "http.internalPort: invalid value: integer `99999`, expected a port"),
            ("http.internalPort=x", "http.internalPort: invalid type: string \"x\", expected a port"),
            ("http={\"port\": 1}", "http.domain: missing; it is required"),
            ("http={\"domain\": \"b.org\", \"internalPort\": 1, \"x\": 2}", "http.x: unknown field"),
            ("name.x=1", "name.x: there is no such field"),
            ("env.A.B=1", "env.A.B: there is no such field"),
            ("env.A-B=1", "env[\"A-B\"]: \"A-B\" is not a valid name of a variable"),
            ("systemd.restart=null", "systemd.restart: \"null\" is not known"),
            (
                "hardening.profile=loose",
                "hardening.profile: \"loose\" is not known; expected one of default, strict",
            ),
            ("credentials.token=token", "credentials.token: \"token\" is not absolute"),
            ("credentials.a/b=/s", "credentials[\"a/b\"]: \"a/b\" is not a valid name of a credential"),
            ("credentials=null", "credentials: invalid type: null"),
            ("hosts=", "hosts: [] names no host"),
            (".=1", ".: unknown field"),
        ] {
            let mut manifest = base();
            let error = set(&mut manifest, "ava", &assignments(&[assignment])).unwrap_err().to_string();
            assert!(error.starts_with(message), "{assignment}: {error}");
            assert_eq!(manifest, base());
        }
        assert!(set(&mut base(), "avaa", &[]).unwrap_err().to_string().contains("did you mean 'ava'"));
        let path = StorePath::parse("/nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava").unwrap();
        let error = update(&mut base(), "zzz", &path, None).unwrap_err().to_string();
        assert!(error.ends_with("add it with 'deploy-manifest add-service'"), "{error}");
    }

    #[test]
    fn an_edit_is_merged_service_by_service_and_never_over_anothers_change() {
        let mut edited = base();
        set(&mut edited, "ava", &assignments(&["env.A=2"])).unwrap();
        let mut theirs = base();
        set(&mut theirs, "web", &assignments(&["env.B=1"])).unwrap();
        let mut both = theirs.clone();
        assert!(merge(&mut both, &base(), &edited).unwrap());
        assert_eq!((&both.services[0], &both.services[1]), (&edited.services[0], &theirs.services[1]));

        let mut conflict = base();
        set(&mut conflict, "ava", &assignments(&["env.A=3"])).unwrap();
        let before = conflict.clone();
        let error = merge(&mut conflict, &base(), &edited).unwrap_err().to_string();
        assert!(error.contains("service 'ava' was changed meanwhile") && conflict == before, "{error}");

        let mut removed = base();
        removed.services.remove(0);
        let mut current = theirs.clone();
        assert!(merge(&mut current, &base(), &removed).unwrap());
        assert_eq!(current.services, theirs.services[1..]);

        let mut same = edited.clone();
        assert!(!merge(&mut same, &base(), &edited).unwrap(), "somebody else made the same change");
        assert!(!merge(&mut base(), &base(), &base()).unwrap());
    }

    #[test]
    fn a_restore_brings_back_what_was_and_says_whether_it_differed() {
        let mut now = base();
        set(&mut now, "ava", &assignments(&["env.A=2"])).unwrap();
        remove(&mut now, "web").unwrap();
        let mut one = now.clone();
        assert!(restore_service(&mut one, &base(), "ava").unwrap());
        assert_eq!(one.services, base().services[..1]);
        assert!(restore_service(&mut one, &base(), "web").unwrap());
        assert_eq!(one.services, base().services);
        assert!(restore(&mut now, &base()) && !restore(&mut now, &base()));
        let error = restore_service(&mut base(), &one, "wbe").unwrap_err().to_string();
        assert!(error.contains("did you mean 'web'"), "{error}");
    }
}
