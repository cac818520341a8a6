//! The bucket of the manifest: S3 ([`s3`]) or a directory ([`dir`]) with the same guarantees. A key is a
//! relative path (`manifest.json`, `manifests/…`, `hosts/HOST.json`). Every write can be conditional; that is
//! all the coordination the product has.

mod beneath;
pub mod codes;
pub mod credentials;
pub mod dir;
pub mod objects;
pub mod probe;
pub mod s3;
#[cfg(test)]
pub mod tests;
pub mod url;
pub mod xml;

use crate::error::Error;
use crate::http::process_env;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

pub use objects::{Download, Opened, Upload};
pub use probe::{Probe, before_writing, probe};
pub use url::{CacheUrl, StoreUrl};

/// The current manifest.
pub const MANIFEST_KEY: &str = "manifest.json";
/// The folder of replaced versions.
pub const ARCHIVE_PREFIX: &str = "manifests/";
/// The folder of the hosts' reports.
pub const HOSTS_PREFIX: &str = "hosts/";

/// The largest object that a repair replaces, in bytes: it is read, archived and compared like any version.
pub const MAX_REPLACED: u64 = 1 << 30;

/// The version of an object, as the store names it; opaque, compared for equality only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Etag(pub String);

/// The answer to a conditional read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GetResult {
    /// There is no such object.
    Missing,
    /// It is still the version that was named.
    NotModified,
    /// Its bytes and its version.
    Found {
        /// The whole object.
        bytes: Vec<u8>,
        /// Its version.
        etag: Etag,
    },
}

/// When a write may take place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Whatever is there.
    Always,
    /// Only if there is no such object (`If-None-Match: *`).
    IfAbsent,
    /// Only if it is still this version (`If-Match`).
    IfMatch(Etag),
}

/// How a store wants a version written in the condition of a write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EtagForm {
    /// As it gave it, in quotes (RFC 9110, 8.8.3).
    #[default]
    Quoted,
    /// Without the quotes: Ceph before 20 takes them for a part of it, and never finds the two equal.
    Bare,
}

/// A part of a listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keys {
    /// In the order of their bytes.
    pub keys: Vec<String>,
    /// Whether there are more behind the last of them.
    pub more: bool,
}

impl Keys {
    /// The rest of a whole listing.
    fn behind(after: &str, mut keys: Vec<String>) -> Self {
        keys.retain(|key| key.as_str() > after);
        Keys { keys, more: false }
    }
}

/// Why the store did not do what it was asked. The text names the object, the cause and the next move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreError {
    /// The condition of a write did not hold: somebody else was first. Read again and retry.
    Changed(String),
    /// The object is larger than the limit that was given.
    TooLarge(String),
    /// The store cannot be reached or did not answer in time, also after the retries: worth trying later.
    Unreachable(String),
    /// The store knows these credentials, and they may not do it.
    Denied(String),
    /// The store answered and refused (bucket missing, wrong key, clock skewed, garbage): a person must act.
    Refused(String),
}

impl StoreError {
    fn changed(key: &str, store: &dyn Store) -> Self {
        let url = store.url();
        StoreError::Changed(format!(
            "cannot write {key} in {url}: somebody else wrote it first; read it again and retry"
        ))
    }

    fn too_large(object: &str, limit: u64) -> Self {
        StoreError::TooLarge(format!("{object} is larger than {limit} bytes; something else wrote it"))
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Changed(t)
            | StoreError::TooLarge(t)
            | StoreError::Unreachable(t)
            | StoreError::Denied(t)
            | StoreError::Refused(t) => f.write_str(t),
        }
    }
}

impl std::error::Error for StoreError {}

impl From<StoreError> for Error {
    fn from(e: StoreError) -> Self {
        Error::new(e.to_string())
    }
}

/// A bucket or a directory that behaves like one.
pub trait Store: Send + Sync {
    /// The store for people: its URL without anything secret.
    fn url(&self) -> String;

    /// What tells this store from every other, whoever looks at it: what manifests are signed for.
    fn identity(&self) -> String;

    /// Reads an object of at most `limit` bytes, unless it is still the version `unless`.
    fn get(&self, key: &str, unless: Option<&Etag>, limit: u64) -> Result<GetResult, StoreError>;

    /// Reads an object of at most `limit` bytes, whichever version it is; None when it is missing.
    fn read(&self, key: &str, limit: u64) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(match self.get(key, None, limit)? {
            GetResult::Found { bytes, .. } => Some(bytes),
            GetResult::Missing | GetResult::NotModified => None,
        })
    }

    /// The first `count` bytes of an object (all of a shorter one); None when it is missing.
    fn get_start(&self, key: &str, count: u64) -> Result<Option<Vec<u8>>, StoreError>;

    /// The size of an object in bytes; None when it is missing.
    fn size(&self, key: &str) -> Result<Option<u64>, StoreError>;

    /// Writes an object if the condition holds, else [`StoreError::Changed`]; returns the new version.
    fn put(&self, key: &str, bytes: &[u8], when: &Condition) -> Result<Etag, StoreError>;

    /// Removes an object; one that is missing is no error.
    fn delete(&self, key: &str) -> Result<(), StoreError>;

    /// All keys that begin with `prefix`, sorted; pages are followed to the end.
    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError>;

    /// The first keys that begin with `prefix` and sort after `after`: as many as the store gives at once, at least one
    /// if there is one.
    fn list_after(&self, prefix: &str, after: &str) -> Result<Keys, StoreError> {
        Ok(Keys::behind(after, self.list(prefix)?))
    }

    /// The sizes of objects whose keys begin with `prefix`, by their keys: as many as the store tells at once. What is not
    /// among them may be there all the same.
    fn sizes(&self, _prefix: &str) -> Result<BTreeMap<String, u64>, StoreError> {
        Ok(BTreeMap::new())
    }

    /// Reads an object from `offset` on; with `only`, only if it is still this version. An offset that is the object's
    /// size counts as [`Opened::Changed`], but for an empty object.
    fn read_from(&self, key: &str, offset: u64, only: Option<&Etag>) -> Result<Opened, StoreError>;

    /// Writes an object, whatever is there; readers see the old one or the new one. Tried again as long as trying can
    /// help.
    fn write_from(&self, key: &str, upload: &Upload<'_>) -> Result<(), StoreError>;

    /// Why there can be nothing in it to read, as far as that can be told without asking the network; with the remedy.
    fn absence(&self) -> Option<String> {
        None
    }
    /// From now on, versions are written like this in conditions; what matters only where [`Store::is_foreign`].
    fn send_etags(&self, _: EtagForm) {}

    /// Whether other people's software decides what becomes of the condition of a write, so that it is to be found
    /// out ([`probe::before_writing`]).
    fn is_foreign(&self) -> bool {
        false
    }
}

/// Opens the store a URL names, for as many threads as want it; nothing is asked of the network. Credentials are looked
/// up with the first request.
pub fn open(url: &StoreUrl) -> Result<Arc<dyn Store>, StoreError> {
    match url {
        StoreUrl::Dir(path) => Ok(Arc::new(dir::DirStore::new(path))),
        StoreUrl::S3(location) => Ok(Arc::new(s3::S3Store::open_in(location, Arc::new(process_env))?)),
    }
}
