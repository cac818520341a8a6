//! Which manifest this host obeys: the store's, if it is a good one that comes after what was obeyed before, else the
//! last good one, which is kept on disk. Never looks at the host's services.

use super::lines;
use super::outcome::{EndedBy, PassError};
use super::reading::{self, ReadingMark};
use super::root::Root;
use super::state::State;
use crate::config::{self, Settings};
use crate::durable;
use crate::error::{Error, Result};
use crate::hash::Sha256;
use crate::keys::PublicKey;
use crate::log;
use crate::manifest::current::COPY_BACK;
use crate::manifest::lineage::{self, Relation};
use crate::manifest::model::MAX_BYTES;
use crate::manifest::parse::{self, Mode};
use crate::manifest::signature::{self, ReadError};
use crate::manifest::types::Ancestor;
use crate::manifest::{Manifest, entry, versions};
use crate::names::{HostName, ServiceName, StorePath};
use crate::store::{self, Etag, GetResult, MANIFEST_KEY, Store, StoreError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The manifest a pass works from.
pub(super) struct SourceManifest {
    pub(super) manifest: Manifest,
    /// The hash of its text.
    pub(super) hash: String,
    /// The digest of each entry of this host's ([`entry`]).
    pub(super) entries: BTreeMap<ServiceName, String>,
    /// Why it is the last good one rather than the bucket's.
    pub(super) error: Option<String>,
}

/// What a manifest is read for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To be obeyed: a new one is kept on disk for the day the bucket cannot be reached.
    Pass,
    /// To be looked at: nothing is written, and nobody asks for the digests of its entries.
    Preview,
}

/// Which version of which store the last good manifest is.
#[derive(Serialize, Deserialize)]
struct ManifestOrigin {
    store: String,
    etag: String,
    sha256: String,
    /// The last version that this host refused because it was made without that one (`NUMBER:DIGEST`): what is made on
    /// it is refused too, also when its list does not reach so far any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
}

/// The last good manifest.
struct LastGood {
    bytes: Vec<u8>,
    /// The hash of its text.
    hash: String,
    /// Its version, if that is known.
    etag: Option<Etag>,
    /// What was refused since, as [`ManifestOrigin`] has it.
    refused: Option<Ancestor>,
}

impl LastGood {
    fn manifest(&self) -> Option<Manifest> {
        parse::manifest(&self.bytes, Mode::Tolerant).ok()
    }
}

/// The last good manifest of this store; None when there is none.
fn last_good(root: &Root, store: &dyn Store) -> Option<LastGood> {
    let bytes = fs_err::read(root.manifest()).ok()?;
    let origin: ManifestOrigin = serde_json::from_slice(&fs_err::read(root.manifest_origin()).ok()?).ok()?;
    if origin.store != store.url() {
        return None;
    }
    // The two files are written one after the other, the manifest first: the hash tells whether the version is
    // this manifest's. A pass that died between them leaves a good manifest without a version.
    let hash = Sha256::of(&bytes).base16();
    let known = origin.sha256 == hash;
    let refused = origin.refused.filter(|_| known).and_then(|text| Ancestor::parse(&text).ok());
    Some(LastGood { bytes, hash, etag: known.then_some(Etag(origin.etag)), refused })
}

fn keep_manifest(root: &Root, bytes: &[u8], origin: &ManifestOrigin) -> Result<()> {
    durable::write(&root.manifest(), bytes, 0o644)?;
    keep_origin(root, origin)
}

fn keep_origin(root: &Root, origin: &ManifestOrigin) -> Result<()> {
    durable::write(&root.manifest_origin(), &lines::to_bytes(origin)?, 0o644)?;
    Ok(())
}

/// Reads the manifest, from the bucket if it has a good one, else the last good one. `known`: the state that the pass
/// before left. `accept`: the serial of one that is lower than what was obeyed, and that a person asked for.
pub(super) fn current(
    settings: &Settings,
    root: &Root,
    store: &dyn Store,
    known: &State,
    accept: Option<u64>,
    purpose: Purpose,
) -> Result<SourceManifest, PassError> {
    // Another store counts its versions anew.
    let of_this = known.store.as_ref().is_none_or(|s| *s == store.identity());
    let policy = TrustPolicy {
        host: &settings.host,
        store,
        trusted: signature::trusted(settings)?,
        highest: known.serial.filter(|_| of_this).unwrap_or(0),
        accept,
    };
    obeyed(root, &policy, known, purpose)
}

fn obeyed(
    root: &Root,
    policy: &TrustPolicy,
    known: &State,
    purpose: Purpose,
) -> Result<SourceManifest, PassError> {
    let store = policy.store;
    let keep = purpose == Purpose::Pass;
    let obeyed = |manifest: Manifest, bytes: &[u8], hash: String, error: Option<String>| {
        let entries = if keep { entries(bytes, &hash, policy, known) } else { BTreeMap::new() };
        SourceManifest { manifest, hash, entries, error }
    };
    let mut by = EndedBy::Other;
    let cached = last_good(root, store);
    let url = store.url();
    let known_etag = cached.as_ref().and_then(|kept| kept.etag.as_ref());
    let fatal = reading::fatal(root, &url).filter(|etag| Some(etag) != known_etag);
    let error = match store.get(MANIFEST_KEY, fatal.as_ref().or(known_etag), MAX_BYTES) {
        Ok(GetResult::NotModified) => fatal.map(|_| reading::refusal(root, &url)),
        Ok(GetResult::Found { etag, .. }) if fatal.as_ref() == Some(&etag) => {
            Some(reading::refusal(root, &url))
        }
        Ok(GetResult::Found { bytes, etag }) => {
            match policy.read(&bytes, keep.then_some((root, &etag))) {
                Ok(manifest) => {
                    let hash = Sha256::of(&bytes).base16();
                    let origin = ManifestOrigin {
                        store: url.clone(),
                        etag: etag.0,
                        sha256: hash.clone(),
                        refused: None,
                    };
                    if let Some(why) = policy.reject_reason(&bytes, &manifest, cached.as_ref()) {
                        if let Some(kept) = cached.as_ref().filter(|_| keep) {
                            policy.keep_refused(root, kept, &bytes, &manifest);
                        }
                        Some(format!("the manifest in {url} is rejected: {why}"))
                    } else if let Err(e) = if keep { keep_manifest(root, &bytes, &origin) } else { Ok(()) } {
                        // What runs here must be known when the bucket is not, so it is not taken up.
                        Some(format!("the new manifest cannot be kept on this host: {e}"))
                    } else {
                        return Ok(obeyed(manifest, &bytes, hash, None));
                    }
                }
                Err(why) => Some(why),
            }
        }
        Ok(GetResult::Missing) => Some(no_manifest(&url, cached.as_ref(), policy)),
        Err(e) => {
            if let StoreError::Unreachable(_) = e {
                by = EndedBy::Store;
            }
            Some(e.to_string())
        }
    };
    let ended = |text: String| PassError { by, error: Error::new(text) };
    let Some(LastGood { bytes, hash, .. }) = cached else {
        return Err(ended(match error {
            Some(e) => {
                format!("{e}; there is no earlier manifest on this host to work from, nothing was changed")
            }
            None => format!("{url} says that its manifest is unchanged, but none is on this host; run again"),
        }));
    };
    let unusable = |why: &dyn std::fmt::Display| {
        let at = root.manifest();
        let before = error.as_ref().map(|e| format!("{e}; ")).unwrap_or_default();
        ended(format!("{before}{} cannot be used: {why}; remove it and run again", at.display()))
    };
    let manifest = parse::manifest(&bytes, Mode::Tolerant).map_err(|e| unusable(&e))?;
    // It may have been kept before this host was told whom to trust.
    if let Some(why) = policy.signature_error(&bytes, &manifest) {
        return Err(unusable(&why));
    }
    Ok(obeyed(manifest, &bytes, hash, error))
}

/// What the last good manifest names for a service.
pub(super) fn last_named(settings: &Settings, root: &Root, name: &ServiceName) -> Result<StorePath> {
    let store = store::open(&settings.store)?;
    let manifest = last_good(root, store.as_ref())
        .and_then(|kept| kept.manifest())
        .ok_or_else(|| Error::new("there is no good manifest on this host yet; run 'deployer' first"))?;
    manifest
        .service(name.as_str())
        .and_then(|s| s.artifact.store_path.path().cloned())
        .ok_or_else(|| Error::new(format!("the manifest has nothing to run for '{name}'")))
}

/// The digests of a manifest's entries. An idle pass has them from the pass before, of the same text.
fn entries(bytes: &[u8], hash: &str, policy: &TrustPolicy, known: &State) -> BTreeMap<ServiceName, String> {
    let known = Some(known).filter(|k| k.manifest_hash.as_deref() == Some(hash) && k.host == *policy.host);
    let kept = known.map(|k| {
        let placed = k.services.values().filter(|s| !s.removing);
        placed.map(|s| Some((s.name.clone(), s.entry.clone()?))).collect::<Option<BTreeMap<_, _>>>()
    });
    kept.flatten().unwrap_or_else(|| entry::digests(bytes))
}

/// Why there is none, and what brings one there: on a developer's machine, so that is where the commands are typed.
fn no_manifest(url: &str, kept: Option<&LastGood>, policy: &TrustPolicy) -> String {
    match kept.and_then(LastGood::manifest) {
        Some(kept) => format!(
            "there is no manifest in {url} any more; this host obeys its copy of version {}, which a developer puts \
             back with '{}'",
            kept.serial,
            COPY_BACK.replace("HOST", policy.host.as_str())
        ),
        None if config::is_unconfigured(url) => {
            "no store is configured on this host, and there is no manifest in its own folder; write the 'store' that \
             'omni-deploy init' printed into /etc/omni-deploy/config.json, or run 'deploy-manifest init' to deploy \
             on this host alone"
                .into()
        }
        None => format!(
            "there is no manifest in {url}; make one with 'deploy-manifest init' on a developer's machine, or correct \
             'store' in /etc/omni-deploy/config.json"
        ),
    }
}

/// What helps where a manifest lacks a signature.
const SIGN: &str = "if it is right, somebody with a trusted key runs 'deploy-manifest sign'";

/// What a manifest must show before this host obeys it.
struct TrustPolicy<'a> {
    /// Who this is.
    host: &'a HostName,
    /// Where it is from.
    store: &'a dyn Store,
    /// Whose signatures count; empty: everybody may write.
    trusted: Vec<PublicKey>,
    /// The highest serial that was obeyed, as far as the state knows.
    highest: u64,
    /// A lower one that a person asked for.
    accept: Option<u64>,
}

impl TrustPolicy<'_> {
    /// Reads what is in the store: first who signed it, and only then what it says. `noted`: where it is taken down
    /// that this version is being read.
    fn read(&self, bytes: &[u8], noted: Option<(&Root, &Etag)>) -> Result<Manifest, String> {
        let url = self.store.url();
        let _note = noted.map(|(root, etag)| ReadingMark::begin(root, &url, etag));
        signature::read(bytes, &self.store.identity(), &self.trusted).map_err(|e| match e {
            ReadError::Signature(why) => format!("the manifest in {url} is rejected: {why}; {SIGN}"),
            ReadError::Manifest(e) if e.is_newer_version() => {
                format!("the manifest in {url} cannot be used: {e}")
            }
            ReadError::Manifest(e) => format!(
                "the manifest in {url} cannot be used: {e}; publish a good one ('deploy-manifest rollback')"
            ),
        })
    }

    /// Why its signature does not do.
    fn signature_error(&self, bytes: &[u8], manifest: &Manifest) -> Option<String> {
        if self.trusted.is_empty() {
            return None;
        }
        let why = signature::check(bytes, manifest, &self.store.identity(), &self.trusted).err()?;
        Some(format!("{why}; {SIGN}"))
    }

    /// Why one that [`TrustPolicy::read`] read is not obeyed: it is an old one put back. `kept` is the last good one, which
    /// remembers the serial when the state is lost.
    fn reject_reason(&self, bytes: &[u8], manifest: &Manifest, kept: Option<&LastGood>) -> Option<String> {
        let serial = manifest.serial;
        if self.accept == Some(serial) {
            return None;
        }
        let kept = kept.and_then(|kept| Some((kept, kept.manifest()?)));
        let own = kept.as_ref().map_or(0, |(_, m)| m.serial);
        let highest = own.max(self.highest);
        // One that was kept before this host was told whom to trust, or that a key has signed which was taken out
        // since, says nothing of what comes after it.
        if let Some((kept, obeyed)) =
            kept.filter(|(k, m)| m.serial <= serial && self.signature_error(&k.bytes, m).is_none())
            && let Some(why) = self.fork(bytes, manifest, kept, &obeyed)
        {
            return Some(why);
        }
        if self.trusted.is_empty() || serial >= highest {
            return None;
        }
        // A store that was made anew has no history above what is in force; one that was put back into has.
        let newest = versions::archived(self.store).map(|archived| archived.into_iter().next());
        let below = format!("its version {serial} is below {highest}, which this host obeyed before");
        let accept = format!("'deployer run --accept-serial {serial}'");
        let copy = COPY_BACK.replace("HOST", self.host.as_str());
        Some(match newest {
            // What was in force is in no archive, and going back to less would undo it: this host has it.
            Ok(Some(newest)) if newest.serial >= serial && own == highest => format!(
                "{below}, and the store has the history of that: an old version was put back; put this host's copy of \
                 version {own} in its place with '{copy}', or, if the store was restored from a backup on purpose, run \
                 {accept}"
            ),
            Ok(Some(newest)) if newest.serial >= serial => format!(
                "{below}, and the store has the history of that: an old version was put back; a developer publishes the \
                 right one again with 'deploy-manifest rollback', or, if the store was restored from a backup on \
                 purpose, run {accept}"
            ),
            Ok(_) => format!(
                "{below}, and the store has no history of that: it was recreated or emptied; if that is intended, \
                 run {accept}; if not, put this host's copy back with '{copy}'"
            ),
            Err(_) => format!(
                "{below}: the store was recreated, or an old version was put back; in the first case run {accept}, \
                 in the second put this host's copy back with '{copy}'"
            ),
        })
    }

    /// Why a manifest of the same number as the last good one, or a higher one, does not come after it. Without
    /// trusted keys anybody may write any number: then only the same number with another content is refused.
    fn fork(&self, bytes: &[u8], manifest: &Manifest, kept: &LastGood, obeyed: &Manifest) -> Option<String> {
        let digest = |bytes: &[u8]| signature::digest(bytes).ok();
        let (new, seen) = (digest(bytes)?, digest(&kept.bytes)?);
        let refused = kept.refused.as_ref();
        match lineage::relation(manifest, &new, obeyed.serial, &seen) {
            Relation::Later
                if !self.trusted.is_empty()
                    && refused.is_some_and(|r| lineage::goes_on(manifest, &new, r, obeyed.serial, &seen)) => {
            }
            Relation::Same | Relation::Later | Relation::Older => return None,
            Relation::Fork if self.trusted.is_empty() && manifest.serial != obeyed.serial => return None,
            Relation::Fork => {}
        }
        let (serial, last) = (manifest.serial, obeyed.serial);
        let what = match serial == last {
            true => format!("it is a different version {serial} from the one that this host obeyed"),
            false => format!("version {serial} was made without version {last}, which this host obeyed"),
        };
        Some(format!(
            "{what}: somebody published on an older version, because that had been put back or the newer one was \
             lost or damaged, or the store was recreated or restored; a developer puts this host's copy back with \
             '{}' and makes the lost changes again; if the store's is right, run 'deployer run --accept-serial \
             {serial}'",
            COPY_BACK.replace("HOST", self.host.as_str())
        ))
    }

    /// Takes down that a version was refused because it was made without the one that this host obeys.
    fn keep_refused(&self, root: &Root, kept: &LastGood, bytes: &[u8], manifest: &Manifest) {
        let Some((obeyed, etag)) = kept.manifest().zip(kept.etag.clone()) else { return };
        let Ok(digest) = signature::digest(bytes) else { return };
        // Refused for something else (below what was obeyed once, say), it may be what an honest version comes after.
        let fork = !self.trusted.is_empty()
            && manifest.serial >= obeyed.serial
            && self.fork(bytes, manifest, kept, &obeyed).is_some();
        let refused = Some(Ancestor { serial: manifest.serial, digest: Some(digest) });
        if !fork || refused == kept.refused {
            return;
        }
        let origin = ManifestOrigin {
            store: self.store.url(),
            etag: etag.0,
            sha256: kept.hash.clone(),
            refused: refused.map(|a| a.to_string()),
        };
        if let Err(e) = keep_origin(root, &origin) {
            log::warning(format!("cannot record that this version was rejected: {e}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::keys::SecretKey;
    use crate::manifest::publish::{self, StartingPoint};
    use crate::manifest::seen::Seen;
    use crate::manifest::signature::Trust;
    use crate::manifest::trust::Author;
    use crate::store::{Condition, StoreUrl};
    use std::path::PathBuf;

    /// A store, and a developer whose machine remembers nothing of it.
    struct Bench {
        dir: tempfile::TempDir,
        store: std::sync::Arc<dyn Store>,
        key: PathBuf,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let store = store::open(&StoreUrl::Dir(dir.path().join("store"))).unwrap();
            let key = SecretKey::generate("ann-1").unwrap().write(dir.path()).unwrap();
            Bench { dir, store, key }
        }

        fn trust(&self) -> Trust {
            let key = SecretKey::read(&self.key).unwrap();
            Trust { trusted: vec![key.public()], signer: Some(key) }
        }

        fn publishes(&self, start: StartingPoint, change: impl Fn(&mut Manifest)) -> Vec<u8> {
            let now = || Timestamp(1_795_372_265);
            let author = Author { seen: Seen::default(), now, ..Author::with(self.trust(), &*self.store) };
            publish::publish(&author, start, |manifest| {
                change(manifest);
                Ok(Some("set".into()))
            })
            .unwrap();
            self.stored()
        }

        fn changes(&self, what: &str) -> Vec<u8> {
            self.publishes(StartingPoint::OrEmpty, |m| drop(m.extra.insert("what".into(), what.into())))
        }

        fn stored(&self) -> Vec<u8> {
            fs_err::read(self.dir.path().join("store/manifest.json")).unwrap()
        }

        /// The number and the content that a host of this name obeys after a pass, and why it is not the store's.
        fn obeyed(&self, host: &str) -> (u64, String, Option<String>) {
            let of = |what: &str| {
                let folder = self.dir.path().join(host).join(what);
                fs_err::create_dir_all(&folder).unwrap();
                folder
            };
            let (state_dir, run_dir) = (of("state"), of("run"));
            let root = Root { state_dir, run_dir, ..Root::system(self.dir.path()) };
            let host = HostName::parse(host).unwrap();
            let policy = TrustPolicy {
                host: &host,
                store: &*self.store,
                trusted: self.trust().trusted,
                highest: 0,
                accept: None,
            };
            let state = State::new(host.clone(), Timestamp(0));
            let found = obeyed(&root, &policy, &state, Purpose::Pass).unwrap();
            (found.manifest.serial, found.manifest.extra["what"].as_str().unwrap().to_string(), found.error)
        }
    }

    #[test]
    fn a_fork_that_was_refused_is_refused_however_long_it_gets_and_this_hosts_copy_mends_it() {
        let bench = Bench::new();
        let old = bench.changes("hole");
        let copy = bench.changes("mended");
        for host in ["biz", "away"] {
            assert_eq!(bench.obeyed(host), (2, "mended".into(), None));
        }
        // Somebody puts the old one back, and a machine that remembers nothing goes on from it.
        bench.store.put(MANIFEST_KEY, &old, &Condition::Always).unwrap();
        for serial in 2..40 {
            bench.changes(&format!("fork {serial}"));
            let (obeyed, what, error) = bench.obeyed("biz");
            assert_eq!((obeyed, what.as_str()), (2, "mended"), "{serial}");
            let error = error.unwrap();
            assert!(error.contains("deploy-manifest rollback -"), "{error}");
            assert_eq!(bench.obeyed("biz").2, Some(error), "{serial}");
        }
        // Whoever was shown none of them cannot tell.
        assert_eq!(bench.obeyed("away"), (39, "fork 39".into(), None));
        // As a rollback to the copy does it.
        let seen = parse::manifest(&copy, Mode::Tolerant).unwrap();
        let line = lineage::line(&seen, signature::digest(&copy).unwrap());
        bench.publishes(StartingPoint::Replace, |m| {
            m.previous = lineage::join(&line, &m.previous);
            m.extra = seen.extra.clone();
        });
        for serial in 41..60 {
            bench.changes(&format!("right {serial}"));
            // Not every version is seen by a pass.
            if serial % 6 == 0 {
                assert_eq!(bench.obeyed("biz"), (serial, format!("right {serial}"), None));
            }
        }
        assert_eq!(bench.obeyed("away"), (59, "right 59".into(), None));
    }

    #[test]
    fn what_was_published_in_place_of_a_version_that_others_lost_is_refused_by_who_obeyed_it() {
        let bench = Bench::new();
        bench.changes("hole");
        bench.changes("hole");
        let copy = bench.changes("mended");
        assert_eq!(bench.obeyed("biz"), (3, "mended".into(), None));
        bench.store.put(MANIFEST_KEY, &copy[..100], &Condition::Always).unwrap();
        bench.publishes(StartingPoint::Replace, |m| drop(m.extra.insert("what".into(), "hole".into())));
        let (serial, what, error) = bench.obeyed("biz");
        assert_eq!((serial, what.as_str()), (3, "mended"));
        assert!(error.unwrap().contains("version 4 was made without version 3"));
        // A host that has obeyed less takes it.
        assert_eq!(bench.obeyed("new"), (4, "hole".into(), None));
        let seen = parse::manifest(&copy, Mode::Tolerant).unwrap();
        let line = lineage::line(&seen, signature::digest(&copy).unwrap());
        bench.publishes(StartingPoint::Replace, |m| {
            m.previous = lineage::join(&line, &m.previous);
            m.extra = seen.extra.clone();
        });
        for host in ["biz", "new"] {
            assert_eq!(bench.obeyed(host), (5, "mended".into(), None));
        }
    }
}
