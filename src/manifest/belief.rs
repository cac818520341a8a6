//! What a person's machine believes of a store: the newest version that a trusted key has signed and that comes
//! after what this machine has seen. Everything that publishes starts from that, and what else is in the store is
//! shown, never built upon. Without trusted keys there is nothing to tell by, and what is in force is believed.

use super::edit::{Author, Current};
use super::lineage::{self, Ancestor, Digest, Relation};
use super::model::{Change, MAX_BYTES, Manifest};
use super::parse::{self, Mode};
use super::signature;
use super::versions::{self, Version, archive_key, archive_name};
use crate::error::{Error, Result};
use crate::say::printable;
use crate::store::Store;
use std::path::PathBuf;

/// How many archived versions are read at most in search of one that somebody trusted has signed.
const SEARCHED: usize = 200;

/// A version that is believed.
#[derive(Debug, Clone)]
pub struct Believed {
    /// What it says.
    pub manifest: Manifest,
    /// Of its content.
    pub digest: Digest,
    /// As it was read.
    pub bytes: Vec<u8>,
    /// Where this machine keeps it; None: it is in the store.
    pub kept: Option<PathBuf>,
}

impl Believed {
    /// It, and those before it, as a version after it names them.
    pub fn line(&self) -> Vec<Ancestor> {
        lineage::line(&self.manifest, self.digest.clone())
    }

    /// The name it has, or would have, in the archive.
    pub fn name(&self) -> String {
        archive_name(self.manifest.serial, self.manifest.generation)
    }

    /// For a message: `version 9 (set web env.A by ann@laptop, 2026-11-22T18:31:05Z)`.
    pub fn words(&self) -> String {
        words(&self.manifest)
    }
}

/// As [`Believed::words`], of any manifest.
pub fn words(manifest: &Manifest) -> String {
    let Manifest { serial, generation, change: Change { action, by, .. }, .. } = manifest;
    format!("version {serial} ({} by {}, {generation})", printable(action), printable(by))
}

/// Why nothing is built on what is in force.
#[derive(Debug, Clone)]
pub enum Objection {
    /// Nobody trusted has signed it for this store.
    Unsigned(String),
    /// It is older than what this machine has seen.
    PutBack(Box<Believed>),
    /// It does not come after what this machine has seen.
    Fork(Box<Believed>),
}

impl Objection {
    /// What happened, and the ways on.
    pub fn error(&self, store: &dyn Store, there: &Manifest) -> Error {
        let url = store.url();
        let serial = there.serial;
        let restore = |seen: &Believed| {
            let file = seen.kept.as_ref().map(|k| k.display().to_string()).unwrap_or_default();
            format!("'deploy-manifest rollback @{file}'")
        };
        Error::new(match self {
            Objection::Unsigned(why) => format!(
                "the manifest in {url} is not to be trusted: {why}; go back with 'deploy-manifest rollback', or look \
                 at it ('deploy-manifest show'), and if it is right, 'deploy-manifest sign'"
            ),
            Objection::PutBack(seen) => format!(
                "the manifest in {url} is version {serial}, and this machine has seen {}: an older version was put \
                 back, by somebody who can write the store or out of a backup; ask who did. Publish the newer one \
                 again with {}; or, if version {serial} should be in force, 'deploy-manifest rollback {serial}' makes \
                 it a new version; if the store was made anew, 'deploy-manifest verify --accept-version {serial}' \
                 forgets what was seen",
                seen.words(),
                restore(seen)
            ),
            Objection::Fork(seen) => format!(
                "the manifest in {url}, {}, does not come after {}, which this machine has seen: somebody published \
                 on an older version that had been put back; ask who did. Publish what was seen again with {}, then \
                 make the lost changes again; or, if the store's is right, 'deploy-manifest verify --accept-version \
                 {serial}'",
                words(there),
                seen.words(),
                restore(seen)
            ),
        })
    }
}

impl Author {
    /// What this machine remembers of the store, while a trusted key's signature on it holds.
    pub fn remembered(&self, store: &dyn Store) -> Result<Option<Believed>> {
        if self.trust.trusted.is_empty() {
            return Ok(None);
        }
        let identity = store.identity();
        let Some(bytes) = self.seen.read(&identity)? else { return Ok(None) };
        // Signed by a key that has been taken out, or damaged: it says nothing any more.
        let Ok(manifest) = parse::manifest(&bytes, Mode::Tolerant) else { return Ok(None) };
        if signature::check(&bytes, &manifest, &identity, &self.trust.trusted).is_err() {
            return Ok(None);
        }
        let Ok(digest) = signature::digest(&bytes) else { return Ok(None) };
        Ok(Some(Believed { manifest, digest, bytes, kept: self.seen.file(&identity) }))
    }

    /// Whether what is in force may be built on; None: it may. What cannot be read is not judged here.
    pub fn objection(&self, store: &dyn Store, current: &Current) -> Result<Option<Objection>> {
        let Ok(manifest) = &current.manifest else { return Ok(None) };
        let trusted = &self.trust.trusted;
        if trusted.is_empty() {
            return Ok(None);
        }
        if let Err(why) = signature::check(&current.bytes, manifest, &store.identity(), trusted) {
            return Ok(Some(Objection::Unsigned(why)));
        }
        self.contradiction(store, current)
    }

    /// Whether what is in force, whoever signed it, goes against what this machine has seen.
    pub fn contradiction(&self, store: &dyn Store, current: &Current) -> Result<Option<Objection>> {
        let Ok(manifest) = &current.manifest else { return Ok(None) };
        if self.seen.read(&store.identity())?.is_some_and(|kept| kept == current.bytes) {
            return Ok(None);
        }
        let Some(seen) = self.remembered(store)? else { return Ok(None) };
        let Ok(digest) = signature::digest(&current.bytes) else { return Ok(None) };
        Ok(match lineage::relation(manifest, &digest, seen.manifest.serial, &seen.digest) {
            Relation::Same | Relation::Later => None,
            Relation::Older => Some(Objection::PutBack(Box::new(seen))),
            Relation::Fork => Some(Objection::Fork(Box::new(seen))),
        })
    }

    /// Remembers a version that was found right, or published.
    pub fn remember(&self, store: &dyn Store, bytes: &[u8]) {
        let identity = store.identity();
        if self.trust.trusted.is_empty()
            || self.seen.read(&identity).is_ok_and(|k| k.as_deref() == Some(bytes))
        {
            return;
        }
        self.seen.keep(&identity, bytes);
    }

    /// The newest version before the one in force that is believed: of the archive or of what this machine
    /// remembers. None without trusted keys, and where there is none.
    pub fn newest_believed(&self, store: &dyn Store) -> Result<Option<Believed>> {
        if self.trust.trusted.is_empty() {
            return Ok(None);
        }
        Ok(newer(self.remembered(store)?, newest_archived(store, self)?))
    }
}

/// The newer of what a machine remembers and what the store has.
pub fn newer(remembered: Option<Believed>, archived: Option<Believed>) -> Option<Believed> {
    match (remembered, archived) {
        (Some(seen), Some(found)) if found.manifest.serial > seen.manifest.serial => Some(found),
        (Some(seen), _) => Some(seen),
        (None, found) => found,
    }
}

/// The newest archived version that one of the trusted keys has signed and whose name is its own. Names of objects
/// are what anybody who can write the store makes of them.
pub fn newest_archived(store: &dyn Store, author: &Author) -> Result<Option<Believed>> {
    let archived = versions::archived(store)?;
    for version in archived.iter().take(SEARCHED) {
        if let Some(found) = read(store, version, author)? {
            return Ok(Some(found));
        }
    }
    match archived.first().filter(|_| archived.len() > SEARCHED) {
        Some(newest) => Err(Error::new(format!(
            "the {SEARCHED} newest versions in {}, from {} on, are signed by nobody in 'trustedPublicKeys': \
             remove what nobody published, and run it again",
            store.url(),
            archive_key(&newest.name)
        ))),
        None => Ok(None),
    }
}

/// An archived version, if it is believed.
fn read(store: &dyn Store, version: &Version, author: &Author) -> Result<Option<Believed>> {
    use crate::store::{Got, StoreError};
    let bytes = match store.get(&archive_key(&version.name), None, MAX_BYTES) {
        Ok(Got::Found { bytes, .. }) => bytes,
        Ok(Got::Missing | Got::NotModified) | Err(StoreError::TooLarge(_)) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let Ok(manifest) = parse::manifest(&bytes, Mode::Tolerant) else { return Ok(None) };
    let named = archive_name(manifest.serial, manifest.generation) == version.name;
    let trusted = &author.trust.trusted;
    if !named || signature::check(&bytes, &manifest, &store.identity(), trusted).is_err() {
        return Ok(None);
    }
    let Ok(digest) = signature::digest(&bytes) else { return Ok(None) };
    Ok(Some(Believed { manifest, digest, bytes, kept: None }))
}
