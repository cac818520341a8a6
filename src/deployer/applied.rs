//! What was last proved of each service, one file each: the entry of the manifest that its unit was made from
//! and the paths before it. It is what a failed version is put back to, also by another pass or after a
//! reboot. Written only after a service came up.

use super::files;
use super::plan::LastKnownGood;
use super::root::Root;
use crate::durable::{self, Batch};
use crate::error::{Error, Result};
use crate::manifest::Service;
use crate::names::{ServiceName, StorePath};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const VERSION: u64 = 1;

#[derive(Serialize)]
struct Written<'a> {
    version: u64,
    previous: &'a [StorePath],
    service: &'a Service,
}

#[derive(Deserialize)]
struct Read {
    version: u64,
    #[serde(default)]
    previous: Vec<StorePath>,
    service: Service,
}

#[derive(Deserialize)]
struct Head {
    version: u64,
}

/// Reads all of them. Files that cannot be read or understood are returned as complaints: their services are
/// not known to be ours, and nothing may be removed on such knowledge.
pub fn load(root: &Root) -> Result<(BTreeMap<ServiceName, LastKnownGood>, Vec<String>)> {
    let mut applied = BTreeMap::new();
    let mut complaints = Vec::new();
    let entries = match fs_err::read_dir(root.applied_dir()) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok((applied, complaints)),
        Err(e) => return Err(e.into()),
    };
    for entry in entries {
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
    let read = serde_json::from_slice(bytes).map_err(|e| e.to_string());
    let version = match &read {
        Ok(Read { version, .. }) => Ok(*version),
        Err(why) => serde_json::from_slice(bytes).map(|head: Head| head.version).map_err(|_| why.clone()),
    }?;
    if version > VERSION {
        return Err(format!("it has version {version}, this program reads up to {VERSION}"));
    }
    let Read { mut service, previous, .. } = read?;
    if let Some(mistake) = service.settle(None).first() {
        return Err(mistake.to_string());
    }
    let path = service.artifact.store_path.path().cloned().ok_or("it names no store path")?;
    Ok(LastKnownGood { service, path, previous })
}

/// Takes down what was proved, all of it together; why some of it was not.
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
    let written = Written { version: VERSION, previous: &applied.previous, service: &applied.service };
    let mut bytes = serde_json::to_vec_pretty(&written)
        .map_err(|e| Error::new(format!("cannot write the entry of {}: {e}", applied.service.name)))?;
    bytes.push(b'\n');
    Ok(bytes)
}
