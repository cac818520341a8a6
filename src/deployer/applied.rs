//! What was last proved of each service, one file each: the entry of the manifest that its unit was made from
//! and the paths before it. It is what a failed version is put back to, also by another pass or after a
//! reboot. Written only after a service came up.

use super::plan::LastKnownGood;
use super::root::Root;
use crate::durable::{self, Batch};
use crate::error::{Error, Result};
use crate::files::{self, if_there};
use crate::manifest::parse::{self, Mode};
use crate::names::{ServiceName, StorePath};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

const VERSION: u64 = 1;

#[derive(Serialize)]
struct Written<'a> {
    version: u64,
    previous: &'a [StorePath],
    service: &'a crate::manifest::Service,
}

#[derive(Deserialize)]
struct Read {
    #[serde(default)]
    previous: Vec<StorePath>,
    service: Value,
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
    let read: Read = files::versioned(bytes, VERSION).map_err(|e| e.to_string())?;
    let service = parse::service(read.service, Mode::Tolerant, None).map_err(|e| e.to_string())?;
    let path = service.artifact.store_path.path().cloned().ok_or("it names no store path")?;
    Ok(LastKnownGood { service, path, previous: read.previous })
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
