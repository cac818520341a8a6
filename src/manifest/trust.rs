//! What of a store a person's machine trusts: the newest version that a trusted key has signed and that comes
//! after what this machine has seen. Everything that publishes starts from that, and what else is in the store is
//! shown, never built upon. Without trusted keys there is nothing to tell by, and what is in force is trusted.

use super::current::{self, COPY_BACK, CurrentManifest};
use super::lineage::{self, Relation};
use super::model::{Change, MAX_BYTES, Manifest};
use super::seen::Seen;
use super::signature::{self, ReadError, Trust, UNKNOWN_SIGNER};
use super::types::{Ancestor, Digest};
use super::versions::{self, Version, archive_key, archive_name};
use crate::clock::Timestamp;
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::keys::SecretKey;
use crate::log::{self, printable};
use crate::names::HostName;
use crate::parallel;
use crate::store::{Store, StoreError};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

/// How many archived versions are read at most in search of one that is trusted, or that says something else.
pub const SEARCHED: usize = 200;

/// How many of them at once, after the first: whole manifests.
const READ_AT_ONCE: usize = 16;

/// A version that is trusted.
#[derive(Debug, Clone)]
pub struct TrustedVersion {
    /// What it says.
    pub manifest: Manifest,
    /// Of its content.
    pub digest: Digest,
    /// As it was read.
    pub bytes: Vec<u8>,
    /// Where this machine keeps it; None: it is in the store.
    pub kept: Option<PathBuf>,
}

impl TrustedVersion {
    /// It, and those before it, as a version after it names them.
    pub fn line(&self) -> Vec<Ancestor> {
        lineage::line(&self.manifest, self.digest)
    }

    /// The name it has, or would have, in the archive.
    pub fn name(&self) -> String {
        archive_name(self.manifest.serial, self.manifest.generation)
    }

    /// Whether it was made after this one, as far as it says.
    pub fn comes_after(&self, other: &TrustedVersion) -> bool {
        lineage::relation(&self.manifest, &self.digest, other.manifest.serial, &other.digest)
            == Relation::Later
    }

    /// For a message: `version 9 (set web env.A by ann@laptop, 2026-11-22T18:31:05Z)`.
    pub fn describe(&self) -> String {
        describe(&self.manifest)
    }
}

/// As [`TrustedVersion::describe`], of any manifest.
pub fn describe(manifest: &Manifest) -> String {
    let Manifest { serial, generation, change: Change { action, by, .. }, .. } = manifest;
    format!("version {serial} ({} by {}, {generation})", printable(action), printable(by))
}

/// Why nothing is built on what is in force.
#[derive(Debug, Clone)]
pub enum RejectReason {
    /// Nobody trusted has signed it for this store.
    Unsigned(String),
    /// It is older than what this machine has seen.
    PutBack(Box<TrustedVersion>),
    /// It does not come after what this machine has seen.
    Fork(Box<TrustedVersion>),
}

/// Who reads and writes the manifest of a store, and with what keys.
pub struct Author<'a> {
    /// The store.
    pub store: &'a dyn Store,
    /// `user@host`.
    pub by: String,
    /// The key that signs, and those that are trusted.
    pub trust: Trust,
    /// What this machine remembers of the store.
    pub seen: Seen,
    /// The number of a copy that was given to be published, if it is trusted; else 0.
    pub at_hand: u64,
    /// Its clock.
    pub now: fn() -> Timestamp,
}

impl<'a> Author<'a> {
    /// The one who runs this, with the keys of the configuration.
    pub fn of(settings: &Settings, store: &'a dyn Store) -> Result<Self> {
        Ok(Author::with(Trust::of(settings)?, store))
    }

    /// The same for who only reads: no key that signs is looked for.
    pub fn reader(settings: &Settings, store: &'a dyn Store) -> Result<Self> {
        Ok(Author::with(Trust { signer: None, trusted: signature::trusted(settings)? }, store))
    }

    /// The one who runs this, with these keys.
    pub fn with(trust: Trust, store: &'a dyn Store) -> Self {
        Author {
            store,
            by: whoami(),
            trust,
            seen: Seen::of_user(&store.identity()),
            at_hand: 0,
            now: Timestamp::now,
        }
    }

    /// Reads a version that may be anybody's; see [`signature::read`].
    pub fn read(&self, bytes: Vec<u8>) -> Result<TrustedVersion, ReadError> {
        let manifest = signature::read(&bytes, &self.store.identity(), &self.trust.trusted)?;
        let digest = signature::digest(&bytes).map_err(ReadError::Signature)?;
        Ok(TrustedVersion { manifest, digest, bytes, kept: None })
    }

    /// Refuses to build upon what is not trusted: a signature on it would be given by the way.
    pub fn check_trusted(&self, current: &CurrentManifest) -> Result<()> {
        match self.reject_reason(current)? {
            Some(reason) => Err(self.rejection(current, &reason)),
            None => Ok(()),
        }
    }

    /// The key that signs.
    pub fn signer(&self) -> Result<&SecretKey> {
        self.trust.signer.as_ref().ok_or_else(|| {
            Error::new("there is no key to sign with; set 'secretKeyFile' ('omni-deploy keygen' makes one)")
        })
    }

    /// Signs what is about to be published. Without a key, nothing is published where signatures are expected.
    pub(super) fn sign(&self, manifest: &mut Manifest) -> Result<()> {
        let signed = !manifest.signatures.is_empty();
        manifest.signatures.clear();
        match &self.trust.signer {
            Some(key) => signature::sign(manifest, &self.store.identity(), key),
            None if signed || !self.trust.trusted.is_empty() => Err(Error::new(format!(
                "the manifest in {} is signed, and this machine has no key: hosts would reject what it publishes; set \
                 'secretKeyFile' ('omni-deploy init' or 'omni-deploy keygen' make one)",
                self.store.url()
            ))),
            None => Ok(()),
        }
    }
}

/// `user@host`, from `USER` or `LOGNAME`, else the user's number; only plain characters.
pub fn whoami() -> String {
    let named = ["USER", "LOGNAME"].iter().find_map(|n| std::env::var(n).ok().filter(|v| !v.is_empty()));
    let user = named.unwrap_or_else(|| rustix::process::geteuid().as_raw().to_string());
    let host = HostName::of_this_machine().map_or_else(|| "unknown".into(), |h| h.to_string());
    let clean = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let user: String = user.chars().take(64).map(clean).collect();
    format!("{user}@{host}")
}

/// How a version that is trusted is published again.
pub fn publish_again(newest: &TrustedVersion) -> String {
    match &newest.kept {
        Some(kept) => format!("'deploy-manifest rollback @{}'", kept.display()),
        None => format!("'deploy-manifest rollback {}'", newest.name()),
    }
}

impl Author<'_> {
    /// What this machine remembers of the store, while a trusted key's signature on it holds.
    pub fn remembered(&self) -> Result<Option<TrustedVersion>> {
        if self.trust.trusted.is_empty() {
            return Ok(None);
        }
        let Some(bytes) = self.seen.read()? else { return Ok(None) };
        // Signed by a key that has been taken out, or damaged: it says nothing any more.
        let read = self.read(bytes).ok();
        Ok(read.map(|version| TrustedVersion { kept: self.seen.file.clone(), ..version }))
    }

    /// Whether what is in force may be built on; None: it may. What cannot be read is not judged here. Who signed it
    /// is asked before anything is built of what it says.
    pub fn reject_reason(&self, current: &CurrentManifest) -> Result<Option<RejectReason>> {
        let trusted = &self.trust.trusted;
        if trusted.is_empty() || current.bytes.len() as u64 > MAX_BYTES {
            return Ok(None);
        }
        match signature::verify(&current.bytes, &self.store.identity(), trusted) {
            Some(Ok(_)) => self.contradicts_seen(current),
            Some(Err(why)) => Ok(Some(RejectReason::Unsigned(why))),
            None if current.manifest().is_ok() => Ok(Some(RejectReason::Unsigned(UNKNOWN_SIGNER.into()))),
            None => Ok(None),
        }
    }

    /// Why nothing is built on what is in force: what happened, and the ways on.
    pub fn rejection(&self, current: &CurrentManifest, reason: &RejectReason) -> Error {
        let url = self.store.url();
        let seen = match reason {
            RejectReason::Unsigned(why) => {
                return Error::new(format!(
                    "the manifest in {url} is not to be trusted: {why}; go back with 'deploy-manifest rollback', or \
                     look at it ('deploy-manifest show'), and if it is right, 'deploy-manifest sign'"
                ));
            }
            RejectReason::PutBack(seen) | RejectReason::Fork(seen) => seen,
        };
        let there = match current.manifest() {
            Ok(there) => there,
            Err(e) => return current::unusable(self.store, e),
        };
        let serial = there.serial;
        if let RejectReason::Fork(_) = reason {
            return Error::new(format!(
                "the manifest in {url}, {}, does not come after {}, which this machine has seen: somebody published \
                 on an older version, because that had been put back or the newer one was lost or damaged; ask who did. Publish what was seen again with {}, which \
                 shows what that undoes, then make those changes again; or, if the store's is right, 'deploy-manifest \
                 verify --accept-version {serial}'",
                describe(there),
                seen.describe(),
                publish_again(seen)
            ));
        }
        // The store may have later ones than this machine has seen.
        let newest = match self.newest_archived() {
            Ok(Some(found)) if found.comes_after(seen) => found,
            Ok(_) => seen.as_ref().clone(),
            Err(e) => return e,
        };
        let whose = match newest.kept {
            Some(_) => "this machine has seen",
            None => "the store has among the replaced ones",
        };
        Error::new(format!(
            "the manifest in {url} is version {serial}, and {whose} {}: an older version was put back, by somebody \
             who can write the store or out of a backup; ask who did. Publish the newer one again with {}; or, if \
             version {serial} should be in force, 'deploy-manifest rollback {serial}' makes it a new version; if the \
             store was recreated, 'deploy-manifest verify --accept-version {serial}' forgets what was seen",
            newest.describe(),
            publish_again(&newest)
        ))
    }

    /// Whether what is in force, whoever signed it, goes against what this machine has seen.
    pub fn contradicts_seen(&self, current: &CurrentManifest) -> Result<Option<RejectReason>> {
        let Ok(manifest) = current.manifest() else { return Ok(None) };
        if self.seen.read()?.is_some_and(|kept| kept == current.bytes) {
            return Ok(None);
        }
        let Some(seen) = self.remembered()? else { return Ok(None) };
        let Ok(digest) = signature::digest(&current.bytes) else { return Ok(None) };
        Ok(match lineage::relation(manifest, &digest, seen.manifest.serial, &seen.digest) {
            Relation::Same | Relation::Later => None,
            Relation::Older => Some(RejectReason::PutBack(Box::new(seen))),
            Relation::Fork => Some(RejectReason::Fork(Box::new(seen))),
        })
    }

    /// Remembers a version that was found right, or published; not one that is older than what another call of this
    /// user has meanwhile seen.
    pub fn remember(&self, bytes: &[u8]) {
        let kept = self.seen.read().ok().flatten();
        let serial = |bytes: &[u8]| versions::head_of(bytes).map(|head| head.serial);
        if let Some(kept) = kept
            && serial(&kept) > serial(bytes)
            && let Ok(Some(_)) = self.remembered()
        {
            return;
        }
        self.accept(bytes);
    }

    /// Remembers a version in the place of whatever was seen before.
    pub fn accept(&self, bytes: &[u8]) {
        if self.trust.trusted.is_empty() || self.seen.read().is_ok_and(|k| k.as_deref() == Some(bytes)) {
            return;
        }
        self.seen.keep(bytes);
    }

    /// The newest version before the one in force that is trusted: of the archive or of what this machine
    /// remembers. None without trusted keys, and where there is none.
    pub fn newest_trusted(&self) -> Result<Option<TrustedVersion>> {
        if self.trust.trusted.is_empty() {
            return Ok(None);
        }
        Ok(newer(self.remembered()?, self.newest_archived()?))
    }
    /// The newest archived version that one of the trusted keys has signed and whose name is its own; not one that is
    /// older than what this machine remembers, which decides nothing. Names of objects are what anybody who can write the
    /// store makes of them.
    pub fn newest_archived(&self) -> Result<Option<TrustedVersion>> {
        let known = self.remembered()?.map_or(0, |seen| seen.manifest.serial).max(self.at_hand);
        let archived = versions::archived(self.store)?;
        let newer = || archived.iter().take_while(|v| v.serial >= known);
        for version in newer().take(SEARCHED) {
            if let Ok(found) = self.examine(version)? {
                return Ok(Some(found));
            }
        }
        let Some(newest) = archived.first().filter(|_| newer().nth(SEARCHED).is_some()) else {
            return Ok(None);
        };
        let what = format!(
            "the {SEARCHED} newest versions in {}, from {} on, are not signed by any key in 'trustedPublicKeys'",
            self.store.url(),
            archive_key(&newest.name)
        );
        if known == 0 {
            return Err(Error::new(format!(
                "{what}: put back the copy that a host has kept ('{COPY_BACK}'), or remove what nobody published, with \
                 credentials that may delete, and run it again"
            )));
        }
        // Once: several parts of a call look here.
        static SAID: AtomicBool = AtomicBool::new(false);
        if !SAID.swap(true, Ordering::Relaxed) {
            log::warning(format!(
                "warning: {what}, and no more were looked at: if there is one behind them that is newer than version \
                 {known}, it is not known here; whoever may delete in the store should remove what nobody published"
            ));
        }
        Ok(None)
    }

    /// An archived version, or why it is not trusted.
    pub fn examine(&self, version: &Version) -> Result<Result<TrustedVersion, String>> {
        let bytes = match self.store.read(&archive_key(&version.name), MAX_BYTES) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(Err("it is gone".into())),
            Err(StoreError::TooLarge(why)) => return Ok(Err(why)),
            Err(e) => return Err(e.into()),
        };
        Ok(match self.read(bytes) {
            Ok(found) if found.name() == version.name => Ok(found),
            Ok(TrustedVersion { manifest: Manifest { serial, generation, .. }, .. }) => {
                Err(format!("it holds version {serial} of {generation}"))
            }
            Err(e) => Err(e.to_string()),
        })
    }

    /// The newest of these versions that came before `there`, of the digest `digest` (None: which ones did is not known),
    /// that is trusted and `wanted`. What is not trusted is passed over: whoever can write the store can put anything
    /// among the old versions.
    pub fn before(
        &self,
        versions: &[Version],
        there: &Manifest,
        digest: Option<&Digest>,
        wanted: impl Fn(&Manifest) -> bool,
    ) -> Result<Search> {
        let older: Vec<&Version> =
            versions.iter().filter(|v| !v.current && v.serial < there.serial).take(SEARCHED).collect();
        let digest = digest.filter(|_| !self.trust.trusted.is_empty());
        let (mut met, mut passed_over, mut after) = (Vec::new(), Vec::new(), None);
        let (first, rest) = older.split_at(older.len().min(1));
        for some in std::iter::once(first).chain(rest.chunks(READ_AT_ONCE)) {
            let read = parallel::map(some, READ_AT_ONCE, |version| self.examine(version));
            for (version, found) in some.iter().zip(read) {
                let found = found?.and_then(|found| {
                    let comes_after = |digest: &Digest| {
                        lineage::relation(there, digest, found.manifest.serial, &found.digest)
                            == Relation::Later
                    };
                    match digest.is_none_or(comes_after) {
                        true => Ok(found),
                        false => Err("the version in force does not come after it".into()),
                    }
                });
                match found {
                    Ok(found) => {
                        met.push(found.manifest.serial);
                        if wanted(&found.manifest) {
                            return Ok(Search { found: Some(found), met, after, passed_over });
                        }
                        after = Some(found.describe());
                    }
                    Err(why) => passed_over.push((version.name.clone(), why)),
                }
            }
        }
        Ok(Search { found: None, met, after, passed_over })
    }
}

/// The newer of what a machine remembers and what the store has.
pub fn newer(remembered: Option<TrustedVersion>, archived: Option<TrustedVersion>) -> Option<TrustedVersion> {
    match (remembered, archived) {
        (Some(seen), Some(found)) if found.manifest.serial > seen.manifest.serial => Some(found),
        (seen, found) => seen.or(found),
    }
}

/// What came of the search for a version before the one in force.
#[derive(Debug)]
pub struct Search {
    /// The newest that is trusted and wanted.
    pub found: Option<TrustedVersion>,
    /// The numbers of all that were met and are trusted.
    pub met: Vec<u64>,
    /// The last one of them that was not wanted: it came right after what was found.
    pub after: Option<String>,
    /// What was met on the way and is not trusted: its name, and why.
    pub passed_over: Vec<(String, String)>,
}

impl Search {
    /// What was found, with a warning of what was passed over; where nothing was, `none` and that.
    pub fn found_or(self, none: Error) -> Result<TrustedVersion> {
        let count = self.passed_over.len();
        let more = if count > 1 { format!(", and {} more", count - 1) } else { String::new() };
        let passed_over =
            self.passed_over.first().map(|(name, why)| format!("passed over {name}: {why}{more}"));
        match (self.found, passed_over) {
            (Some(found), passed_over) => {
                passed_over.into_iter().for_each(|said| log::warning(format!("warning: {said}")));
                Ok(found)
            }
            (None, None) => Err(none),
            (None, Some(passed_over)) => Err(Error::new(format!("{none}; {passed_over}"))),
        }
    }
}
