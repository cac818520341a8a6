//! The manifest in force, as it is in the store: read, and what is said where there is none or it cannot be used. Whether
//! it is to be trusted is for [`super::trust`] to say.

use super::error::{FieldError, ManifestError};
use super::model::{MAX_BYTES, Manifest};
use super::parse::{self, Mode};
use super::versions::{self, Version};
use crate::config;
use crate::error::{Error, Result};
use crate::names::HostName;
use crate::store::{Etag, GetResult, HOSTS_PREFIX, MANIFEST_KEY, Store, StoreError};
use std::cell::OnceCell;

/// The manifest in the store.
#[derive(Debug, Clone)]
pub struct CurrentManifest {
    /// As it is stored.
    pub bytes: Vec<u8>,
    /// Its version for the store.
    pub etag: Etag,
    manifest: OnceCell<Result<Manifest, ManifestError>>,
}

impl CurrentManifest {
    /// What it says, or why it cannot be used. Read when it is asked for: of what nobody trusted has signed, most
    /// have no use, and it may be made to cost much.
    pub fn manifest(&self) -> &Result<Manifest, ManifestError> {
        self.manifest.get_or_init(|| read_bytes(&self.bytes))
    }

    /// Its bytes, and what it says.
    pub fn into_parts(self) -> (Vec<u8>, Result<Manifest, ManifestError>) {
        let manifest = self.manifest.into_inner().unwrap_or_else(|| read_bytes(&self.bytes));
        (self.bytes, manifest)
    }
}

fn read_bytes(bytes: &[u8]) -> Result<Manifest, ManifestError> {
    match bytes.len() as u64 > MAX_BYTES {
        true => {
            let reason = format!("it has {} bytes, at most {MAX_BYTES} are read", bytes.len());
            Err(FieldError::new("", reason).into())
        }
        false => parse::manifest(bytes, Mode::Tolerant),
    }
}

/// Reads what is there; None when there is none.
pub fn load(store: &dyn Store) -> Result<Option<CurrentManifest>> {
    load_within(store, MAX_BYTES)
}

/// As [`load`], of at most so many bytes: what is replaced may be too large to be read.
pub fn load_within(store: &dyn Store, limit: u64) -> Result<Option<CurrentManifest>> {
    match store.get(MANIFEST_KEY, None, limit) {
        Ok(GetResult::Found { bytes, etag }) => {
            Ok(Some(CurrentManifest { bytes, etag, manifest: OnceCell::new() }))
        }
        Ok(GetResult::Missing | GetResult::NotModified) => Ok(None),
        Err(e @ StoreError::TooLarge(_)) if limit == MAX_BYTES => {
            Err(Error::new(format!("{e}; go back with 'deploy-manifest rollback'")))
        }
        Err(e) => Err(e.into()),
    }
}

/// Reads the manifest; that there is none, or that it cannot be used, is an error.
pub fn read(store: &dyn Store) -> Result<Manifest> {
    load(store)?.ok_or_else(|| missing(store))?.into_parts().1.map_err(|e| unusable(store, &e))
}

/// There is no manifest: nothing is configured, it was lost, or there never was one.
pub fn missing(store: &dyn Store) -> Error {
    let url = store.url();
    if config::is_unconfigured(&url) {
        return Error::new(
            "nothing is configured here, and there is no manifest in this machine's own folder; run 'omni-deploy init \
             s3://BUCKET?region=…' (on a host: write the 'store' that it prints into /etc/omni-deploy/config.json), \
             or 'deploy-manifest init' to deploy on this machine alone",
        );
    }
    let newest = versions::archived(store).ok().and_then(|archived| archived.into_iter().next());
    if let Some(Version { name, serial, .. }) = newest {
        return Error::new(format!(
            "no manifest in {url} any more, only older ones up to version {serial}; put a host's copy back \
             ('{COPY_BACK}') or go back with 'deploy-manifest rollback {name}'"
        ));
    }
    if let Ok(Some(host)) = obedient(store) {
        return Error::new(format!(
            "no manifest in {url} any more, and the host {host} reports there that it has obeyed one; put its copy \
             back: '{}'",
            COPY_BACK.replace("HOST", &host)
        ));
    }
    Error::new(format!("no manifest in {url} yet; run 'deploy-manifest init'"))
}

/// How many hosts' reports are read to know whether there ever was a manifest.
const REPORTS: usize = 8;

/// A host which reports that it has obeyed a manifest. One that was set up before there was any reports, too.
pub(super) fn obedient(store: &dyn Store) -> Result<Option<String>> {
    #[derive(serde::Deserialize)]
    struct Report {
        #[serde(default)]
        serial: Option<u64>,
    }
    for key in store.list(HOSTS_PREFIX)?.iter().take(REPORTS) {
        let host = key.strip_prefix(HOSTS_PREFIX).and_then(|name| name.strip_suffix(".json"));
        let Some(host) = host.filter(|host| HostName::parse(host).is_ok()) else { continue };
        if let Some(bytes) = store.read(key, MAX_REPORT)?
            && let Ok(Report { serial: Some(_) }) = serde_json::from_slice(&bytes)
        {
            return Ok(Some(host.to_string()));
        }
    }
    Ok(None)
}

/// The most of a report that is read here, in bytes.
const MAX_REPORT: u64 = 4 << 20;

/// How the copy that a host keeps is published again.
pub const COPY_BACK: &str = "ssh HOST cat /var/lib/deployer/manifest.json | deploy-manifest rollback -";

/// There is one that cannot be used.
pub fn unusable(store: &dyn Store, why: &ManifestError) -> Error {
    let next = match why.is_newer_version() {
        true => "",
        false => "; fix it with 'deploy-manifest edit' or go back with 'deploy-manifest rollback'",
    };
    Error::new(format!("the manifest in {} cannot be used: {why}{next}", store.url()))
}
