//! What was last known to be good of each service, one file each: the entry of the manifest that its unit was made
//! from, the digest of that unit, and the paths before it. It is what a failed version is put back to, also by another
//! pass or after a reboot. Written only after a service came up.

use super::root::Root;
use super::{lines, unit};
use crate::durable::{self, Batch};
use crate::error::{Error, Result};
use crate::files::{self, if_there};
use crate::manifest::Service;
use crate::names::{ServiceName, StorePath};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How many closures of a service stay on the host, the current one included.
const KEEP_CLOSURES: usize = 3;

/// What last came up of a service: the entry of the manifest, and the path that ran.
#[derive(Debug, Clone, PartialEq)]
pub struct LastKnownGood {
    /// The entry.
    pub service: Service,
    /// Its store path.
    pub path: StorePath,
    /// The paths that came up before it and are still held, newest first.
    pub previous: Vec<StorePath>,
    /// The digest of its unit ([`unit::digest`]); None: written by a program that did not keep it.
    pub unit: Option<String>,
}

impl LastKnownGood {
    /// What came up now, as this unit, where `before` was the last known good.
    pub fn new(service: &Service, path: &StorePath, unit: &str, before: Option<&LastKnownGood>) -> Self {
        LastKnownGood {
            service: service.clone(),
            path: path.clone(),
            previous: previous_after(path, before),
            unit: Some(unit::digest(unit)),
        }
    }

    /// What it holds: its path, and those before it.
    pub fn paths(&self) -> impl Iterator<Item = &StorePath> {
        std::iter::once(&self.path).chain(&self.previous)
    }

    /// Whether this very unit came up.
    pub fn is_of_unit(&self, text: &str) -> bool {
        match &self.unit {
            Some(digest) => *digest == unit::digest(text),
            None => unit::render(&self.service, &self.path) == text,
        }
    }
}

/// The versions before the current one, after `current` came up where `replaced` was before.
fn previous_after(current: &StorePath, replaced: Option<&LastKnownGood>) -> Vec<StorePath> {
    let mut previous: Vec<StorePath> = Vec::new();
    for path in replaced.into_iter().flat_map(LastKnownGood::paths) {
        if path != current && !previous.contains(path) {
            previous.push(path.clone());
        }
    }
    previous.truncate(KEEP_CLOSURES - 1);
    previous
}

const VERSION: u64 = 1;

/// What is in a file.
#[derive(Serialize, Deserialize)]
struct Form {
    version: u64,
    #[serde(default)]
    previous: Vec<StorePath>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unit: Option<String>,
    service: Service,
}

/// Reads all of them. Files that cannot be read or understood are returned as complaints: their services are
/// not known to be ours, and nothing may be removed on such knowledge.
pub fn load(root: &Root) -> Result<(BTreeMap<ServiceName, LastKnownGood>, Vec<String>)> {
    let mut applied = BTreeMap::new();
    let mut complaints = Vec::new();
    for entry in if_there(fs_err::read_dir(root.applied_dir()))?.into_iter().flatten() {
        let path = entry?.path();
        if path.extension().is_none_or(|e| e != "json") {
            continue;
        }
        match files::read(&path).map_err(|e| e.to_string()).and_then(|(bytes, _)| read(&bytes)) {
            Ok(one) => {
                applied.insert(one.service.name.clone(), one);
            }
            Err(why) => complaints.push(format!("{} cannot be used: {why}", path.display())),
        }
    }
    Ok((applied, complaints))
}

fn read(bytes: &[u8]) -> Result<LastKnownGood, String> {
    let Form { version: _, previous, unit, mut service } =
        files::versioned(bytes, VERSION).map_err(|e| e.to_string())?;
    if let Some(mistake) = service.settle(None).first() {
        return Err(mistake.to_string());
    }
    let path = service.artifact.store_path.path().cloned().ok_or("it names no store path")?;
    Ok(LastKnownGood { service, path, previous, unit })
}

/// Takes down what came up, all of it together; why some of it was not.
pub fn record<'a>(root: &Root, all: impl IntoIterator<Item = &'a LastKnownGood>) -> Vec<Error> {
    let mut batch = Batch::default();
    let mut errors = Vec::new();
    let mut all = all.into_iter().peekable();
    if all.peek().is_none() {
        return errors;
    }
    if let Err(e) = durable::folder(&root.applied_dir(), 0o755) {
        return vec![e.into()];
    }
    for applied in all {
        match text(applied) {
            Ok(bytes) => batch.write(&root.applied(&applied.service.name), &bytes, 0o644),
            Err(e) => errors.push(e),
        }
    }
    errors.extend(batch.finish().into_values().map(Error::from));
    errors
}

fn text(applied: &LastKnownGood) -> Result<Vec<u8>> {
    let LastKnownGood { service, path: _, previous, unit } = applied.clone();
    lines::to_bytes(&Form { version: VERSION, previous, unit, service })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_older_program_took_down_is_read_and_its_unit_known_by_the_entry() {
        let path = "/nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava";
        let service = serde_json::json!({"name": "ava", "hosts": ["biz"], "artifact": {"storePath": path}});
        let old = serde_json::json!({"version": 1, "previous": [], "service": service});
        let old = read(old.to_string().as_bytes()).unwrap();
        let unit = unit::render(&old.service, &old.path);
        assert!(old.unit.is_none() && old.is_of_unit(&unit) && !old.is_of_unit("another"));
        let new = LastKnownGood::new(&old.service, &old.path, &unit, Some(&old));
        assert_eq!(read(&text(&new).unwrap()).unwrap(), new);
        assert!(new.is_of_unit(&unit) && !new.is_of_unit("another"));
        let newer = serde_json::json!({"version": 2, "service": new.service}).to_string();
        assert!(read(newer.as_bytes()).unwrap_err().contains("version 2"));
    }
}
