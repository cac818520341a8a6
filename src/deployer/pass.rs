//! One pass: lock, load, fetch the manifest, observe, plan, apply, report. Data flows one way; a pass that dies
//! anywhere is finished by the next, because each starts from what is.

use super::admin::Endpoint;
use super::apply::{Host, would_empty};
use super::caddy::{self, RoutePlan};
use super::lock::{self, LockResult};
use super::overrides::{Pause, Pin};
use super::plan::{self, Attempts, Observed, Options, PersistedState, Plan, ServicePlan, UnitFile};
use super::reading::{self, ReadingMark};
use super::root::Root;
use super::state::{
    FailureRecord, LastError, OtherMachine, REPORT_EVERY_SEC, RouteState, RouteStatus, SILENT_SEC,
    STATE_VERSION, ServicePhase, ServiceState, State,
};
use super::{applied, intent, lines, machine, observe, overrides, systemd};
use crate::clock::Timestamp;
use crate::config::{self, Settings};
use crate::durable;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::keys::PublicKey;
use crate::log;
use crate::manifest::lineage::{self, Ancestor, Relation};
use crate::manifest::model::MAX_BYTES;
use crate::manifest::parse::{self, Mode};
use crate::manifest::publish::COPY_BACK;
use crate::manifest::{Manifest, Service, entry, signature, versions};
use crate::names::{HostName, ServiceName, StorePath};
use crate::secrets;
use crate::secrets::mask::Mask;
use crate::see::reports;
use crate::store::{self, Condition, Etag, GetResult, HOSTS_PREFIX, MANIFEST_KEY, Store, StoreError};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// How often a round of effects may be followed by another: fetch and check, deploy, put back, and one more
/// for what putting back taught.
const MAX_ROUNDS: usize = 6;

/// What a pass was asked for.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// Started by the timer: a lock that is held is then nobody's fault.
    pub timer: bool,
    /// Rejected services to try again.
    pub retry: Vec<String>,
    /// Remove everything if the manifest says so.
    pub allow_empty: bool,
    /// Take a manifest of this serial although a later one was taken before.
    pub accept_serial: Option<u64>,
}

/// The manifest a pass works from.
struct SourceManifest {
    manifest: Manifest,
    /// The hash of its text.
    hash: String,
    /// The digest of each entry of this host's ([`entry`]).
    entries: BTreeMap<ServiceName, String>,
    /// Why it is the last good one rather than the bucket's.
    error: Option<String>,
}

/// Why a pass ended without having done its work.
struct PassError {
    error: Error,
    /// Somebody typed what cannot be: nothing is wrong with the host.
    mistyped: bool,
    /// The store was asked and did not answer.
    unreachable: bool,
    /// It is the manifest that cannot be obeyed.
    manifest: bool,
}

impl From<Error> for PassError {
    fn from(error: Error) -> Self {
        PassError { error, mistyped: false, unreachable: false, manifest: false }
    }
}

impl From<StoreError> for PassError {
    fn from(error: StoreError) -> Self {
        Error::from(error).into()
    }
}

impl From<std::io::Error> for PassError {
    fn from(error: std::io::Error) -> Self {
        Error::from(error).into()
    }
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

fn sha256(bytes: &[u8]) -> String {
    ring::digest::digest(&ring::digest::SHA256, bytes).as_ref().iter().map(|b| format!("{b:02x}")).collect()
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

/// The last good manifest of this store; None when there is none.
fn last_good(root: &Root, store: &dyn Store) -> Option<LastGood> {
    let bytes = fs_err::read(root.manifest()).ok()?;
    let origin: ManifestOrigin = serde_json::from_slice(&fs_err::read(root.manifest_origin()).ok()?).ok()?;
    if origin.store != store.url() {
        return None;
    }
    // The two files are written one after the other, the manifest first: the hash tells whether the version is
    // this manifest's. A pass that died between them leaves a good manifest without a version.
    let hash = sha256(&bytes);
    let known = origin.sha256 == hash;
    let refused = origin.refused.filter(|_| known).and_then(|text| Ancestor::parse(&text).ok());
    Some(LastGood { bytes, hash, etag: known.then_some(Etag(origin.etag)), refused })
}

fn keep_manifest(root: &Root, bytes: &[u8], origin: &ManifestOrigin) -> Result<()> {
    durable::write(&root.manifest(), bytes, 0o644)?;
    keep_origin(root, origin)
}

fn keep_origin(root: &Root, origin: &ManifestOrigin) -> Result<()> {
    let origin = serde_json::to_vec(origin)
        .map_err(|e| Error::new(format!("cannot write the manifest's origin: {e}")))?;
    durable::write(&root.manifest_origin(), &origin, 0o644)?;
    Ok(())
}

/// Reads the manifest, from the bucket if it has a good one, else the last good one. `keep`: a new one is kept
/// on disk for the day the bucket cannot be reached.
/// `known`: the state that the pass before left.
fn current(
    root: &Root,
    store: &dyn Store,
    belief: &TrustPolicy,
    known: &State,
    keep: bool,
) -> Result<SourceManifest, PassError> {
    let mut unreachable = false;
    let cached = last_good(root, store);
    let url = store.url();
    let known_etag = cached.as_ref().and_then(|kept| kept.etag.as_ref());
    let deadly = reading::deadly(root, &url).filter(|etag| Some(etag) != known_etag);
    let error = match store.get(MANIFEST_KEY, deadly.as_ref().or(known_etag), MAX_BYTES) {
        Ok(GetResult::NotModified) => deadly.map(|_| reading::refusal(root, &url)),
        Ok(GetResult::Found { etag, .. }) if deadly.as_ref() == Some(&etag) => {
            Some(reading::refusal(root, &url))
        }
        Ok(GetResult::Found { bytes, etag }) => {
            match belief.read(&bytes, store, keep.then_some((root, &etag))) {
                Ok(manifest) => {
                    let hash = sha256(&bytes);
                    let origin = ManifestOrigin {
                        store: url.clone(),
                        etag: etag.0,
                        sha256: hash.clone(),
                        refused: None,
                    };
                    if let Some(why) = belief.objection(&bytes, &manifest, store, cached.as_ref()) {
                        if let Some(kept) = cached.as_ref().filter(|_| keep) {
                            keep_refused(root, &url, kept, belief, &bytes, &manifest);
                        }
                        Some(format!("the manifest in {url} is refused: {why}"))
                    } else if let Err(e) = if keep { keep_manifest(root, &bytes, &origin) } else { Ok(()) } {
                        // What runs here must be known when the bucket is not, so it is not taken up.
                        Some(format!("the new manifest cannot be kept on this host: {e}"))
                    } else {
                        let entries = entries(&bytes, &hash, belief, known);
                        return Ok(SourceManifest { manifest, hash, entries, error: None });
                    }
                }
                Err(why) => Some(why),
            }
        }
        Ok(GetResult::Missing) => {
            Some(no_manifest(&url, cached.as_ref().map(|kept| kept.bytes.as_slice()), belief))
        }
        Err(e) => {
            unreachable = matches!(e, StoreError::Unreachable(_));
            Some(e.to_string())
        }
    };
    let Some(LastGood { bytes, hash, .. }) = cached else {
        let error = Error::new(match error {
            Some(e) => {
                format!("{e}; there is no earlier manifest on this host to work from, nothing was changed")
            }
            None => format!("{url} says that its manifest is unchanged, but none is on this host; run again"),
        });
        return Err(PassError { unreachable, ..error.into() });
    };
    let unusable = |why: &dyn std::fmt::Display| {
        let at = root.manifest();
        let before = error.as_ref().map(|e| format!("{e}; ")).unwrap_or_default();
        Error::new(format!("{before}{} cannot be used: {why}; remove it and run again", at.display()))
    };
    let manifest = parse::manifest(&bytes, Mode::Tolerant)
        .map_err(|e| PassError { unreachable, ..unusable(&e).into() })?;
    // It may have been kept before this host was told whom to trust.
    match belief.doubt(&bytes, &manifest, store) {
        Some(why) => Err(PassError { unreachable, ..unusable(&why).into() }),
        None => {
            let entries = entries(&bytes, &hash, belief, known);
            Ok(SourceManifest { manifest, hash, entries, error })
        }
    }
}

/// Takes down that a version was refused because it was made without the one that this host obeys.
fn keep_refused(
    root: &Root,
    url: &str,
    kept: &LastGood,
    belief: &TrustPolicy,
    bytes: &[u8],
    manifest: &Manifest,
) {
    let Some((obeyed, etag)) = parse::manifest(&kept.bytes, Mode::Tolerant).ok().zip(kept.etag.clone())
    else {
        return;
    };
    let Ok(digest) = signature::digest(bytes) else { return };
    // Refused for something else (below what was obeyed once, say), it may be what an honest version comes after.
    let fork = !belief.trusted.is_empty()
        && manifest.serial >= obeyed.serial
        && belief.fork(bytes, manifest, &kept.bytes, &obeyed, kept.refused.as_ref()).is_some();
    let refused = Some(Ancestor { serial: manifest.serial, digest: Some(digest) });
    if !fork || refused == kept.refused {
        return;
    }
    let origin = ManifestOrigin {
        store: url.into(),
        etag: etag.0,
        sha256: kept.hash.clone(),
        refused: refused.map(|a| a.to_string()),
    };
    if let Err(e) = keep_origin(root, &origin) {
        log::warning(format!("that this version was refused is not kept: {e}"));
    }
}

/// The digests of a manifest's entries. An idle pass has them from the pass before, of the same text.
fn entries(bytes: &[u8], hash: &str, belief: &TrustPolicy, known: &State) -> BTreeMap<ServiceName, String> {
    let known = Some(known).filter(|k| k.manifest_hash.as_deref() == Some(hash) && k.host == belief.host);
    let kept = known.map(|k| {
        let placed = k.services.values().filter(|s| !s.removing);
        placed.map(|s| Some((s.name.clone(), s.entry.clone()?))).collect::<Option<BTreeMap<_, _>>>()
    });
    kept.flatten().unwrap_or_else(|| entry::digests(bytes))
}

/// Why there is none, and what brings one there: on a developer's machine, so that is where the commands are typed.
fn no_manifest(url: &str, kept: Option<&[u8]>, belief: &TrustPolicy) -> String {
    let kept = kept.and_then(|bytes| parse::manifest(bytes, Mode::Tolerant).ok());
    match kept {
        Some(kept) => format!(
            "there is no manifest in {url} any more; this host obeys its copy of serial {}, which a developer \
             puts back with '{}'",
            kept.serial,
            COPY_BACK.replace("HOST", belief.host.as_str())
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
const SIGN: &str = "if it is right, whoever has a trusted key runs 'deploy-manifest sign'";

/// What a manifest must show before this host obeys it.
struct TrustPolicy {
    /// Who this is.
    host: HostName,
    /// Whose signatures count; empty: everybody may write.
    trusted: Vec<PublicKey>,
    /// The highest serial that was obeyed, as far as the state knows.
    highest: u64,
    /// A lower one that a person asked for.
    accept: Option<u64>,
}

impl TrustPolicy {
    fn new(
        settings: &Settings,
        store: &dyn Store,
        persisted: &PersistedState,
        asks: &RunOptions,
    ) -> Result<Self> {
        // Another store counts its versions anew.
        let of_this = persisted.state.store.as_ref().is_none_or(|s| *s == store.identity());
        let highest = persisted.state.serial.filter(|_| of_this).unwrap_or(0);
        Ok(TrustPolicy {
            host: settings.host.clone(),
            trusted: signature::trusted(settings)?,
            highest,
            accept: asks.accept_serial,
        })
    }

    /// Reads what is in the store: first who signed it, and only then what it says. `noted`: where it is taken down
    /// that this version is being read.
    fn read(
        &self,
        bytes: &[u8],
        store: &dyn Store,
        noted: Option<(&Root, &Etag)>,
    ) -> Result<Manifest, String> {
        let url = store.url();
        let _note = noted.map(|(root, etag)| ReadingMark::begin(root, &url, etag));
        let refused = |why: &str| format!("the manifest in {url} is refused: {why}; {SIGN}");
        let signed = match self.trusted.is_empty() {
            true => None,
            false => Some(signature::verify(bytes, &store.identity(), &self.trusted)),
        };
        if let Some(Some(Err(why))) = &signed {
            return Err(refused(why));
        }
        let read = parse::manifest(bytes, Mode::Tolerant);
        if let (Some(None), Ok(_)) = (&signed, &read) {
            return Err(refused("it cannot be told who signed it"));
        }
        read.map_err(|e| match e.is_newer_version() {
            true => format!("the manifest in {url} cannot be used: {e}"),
            false => format!(
                "the manifest in {url} cannot be used: {e}; publish a good one ('deploy-manifest rollback')"
            ),
        })
    }

    /// Why its signature does not do.
    fn doubt(&self, bytes: &[u8], manifest: &Manifest, store: &dyn Store) -> Option<String> {
        if self.trusted.is_empty() {
            return None;
        }
        let why = signature::check(bytes, manifest, &store.identity(), &self.trusted).err()?;
        Some(format!("{why}; {SIGN}"))
    }

    /// Why one that [`TrustPolicy::read`] read is not obeyed: it is an old one put back. `kept` is the last good one, which
    /// remembers the serial when the state is lost.
    fn objection(
        &self,
        bytes: &[u8],
        manifest: &Manifest,
        store: &dyn Store,
        kept: Option<&LastGood>,
    ) -> Option<String> {
        let serial = manifest.serial;
        if self.accept == Some(serial) {
            return None;
        }
        let refused = kept.and_then(|kept| kept.refused.as_ref());
        let kept = kept.map(|kept| kept.bytes.as_slice());
        let kept = kept.and_then(|bytes| Some((bytes, parse::manifest(bytes, Mode::Tolerant).ok()?)));
        let own = kept.as_ref().map_or(0, |(_, m)| m.serial);
        let highest = own.max(self.highest);
        // One that was kept before this host was told whom to trust, or that a key has signed which was taken out
        // since, says nothing of what comes after it.
        if let Some((kept, obeyed)) =
            kept.filter(|(b, m)| m.serial <= serial && self.doubt(b, m, store).is_none())
            && let Some(why) = self.fork(bytes, manifest, kept, &obeyed, refused)
        {
            return Some(why);
        }
        if self.trusted.is_empty() || serial >= highest {
            return None;
        }
        // A store that was made anew has no history above what is in force; one that was put back into has.
        let newest = versions::archived(store).map(|archived| archived.into_iter().next());
        let below = format!("its serial {serial} is below {highest}, which this host obeyed before");
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
                "{below}, and the store has no history of that: it was made anew, or emptied; if it should be, run \
                 {accept}; if not, put this host's copy back with '{copy}'"
            ),
            Err(_) => format!(
                "{below}: the store was made anew, or an old version was put back; in the first case run {accept}, in \
                 the second put this host's copy back with '{copy}'"
            ),
        })
    }
}

impl TrustPolicy {
    /// Why a manifest of the same number as the last good one, or a higher one, does not come after it. Without
    /// trusted keys anybody may write any number: then only the same number with another content is refused.
    fn fork(
        &self,
        bytes: &[u8],
        manifest: &Manifest,
        kept: &[u8],
        obeyed: &Manifest,
        refused: Option<&Ancestor>,
    ) -> Option<String> {
        let digest = |bytes: &[u8]| signature::digest(bytes).ok();
        let (new, seen) = (digest(bytes)?, digest(kept)?);
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
            true => format!("it is another version {serial} than the one that this host obeyed"),
            false => format!("version {serial} was made without the version {last} that this host obeyed"),
        };
        Some(format!(
            "{what}: somebody published on an older version, because that had been put back or the newer one was lost \
             or damaged, or the store was made anew or restored; a developer puts this host's copy back with '{}' and \
             makes the lost changes again; if the store's is right, run 'deployer run --accept-serial {serial}'",
            COPY_BACK.replace("HOST", self.host.as_str())
        ))
    }
}

/// What is remembered. Also whether the state, as an older program left it, has lines of the journal in it that everybody
/// can read.
fn load_memory(settings: &Settings, root: &Root, now: Timestamp) -> Result<(PersistedState, bool)> {
    let mut readable = true;
    let mut complain = |text: String| {
        log::warning(format!("{text}; nothing is removed in this pass"));
        readable = false;
    };
    let mut state = match fs_err::read(root.state_file()) {
        Ok(bytes) => State::parse(&bytes).unwrap_or_else(|e| {
            complain(format!("{} cannot be used: {e}", root.state_file().display()));
            State::new(settings.host.clone(), now)
        }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => State::new(settings.host.clone(), now),
        Err(e) => return Err(e.into()),
    };
    let exposed = lines::any(&state);
    lines::load(root).put_back(&mut state);
    let (applied, complaints) = applied::load(root)?;
    complaints.into_iter().for_each(&mut complain);
    let interrupted = intent::load(root)?;
    let overrides = overrides::load(root)?;
    let verified =
        state.services.iter().filter_map(|(name, s)| Some((name.clone(), s.invocation.clone()?))).collect();
    Ok((PersistedState { state, applied, readable, interrupted, overrides, verified }, exposed))
}

/// What a pass would do, from the same values that [`run`] performs; touches nothing.
#[derive(Debug)]
pub struct Preview {
    /// The serial of the manifest.
    pub serial: u64,
    /// When it was written.
    pub generation: Timestamp,
    /// Why it is not the bucket's.
    pub manifest_error: Option<String>,
    /// What would be done.
    pub plan: Plan,
}

/// The services of this host, with the pins that a person on it made.
fn services_for_host(
    manifest: &Manifest,
    settings: &Settings,
    persisted: &mut PersistedState,
    now: Timestamp,
) -> (Vec<Service>, bool) {
    let services: Vec<&Service> =
        manifest.services.iter().filter(|s| s.hosts.contains(&settings.host)).collect();
    let expired = persisted.overrides.expire(&services, now);
    (services.into_iter().map(|s| persisted.overrides.apply(s)).collect(), expired)
}

fn options(settings: &Settings, asks: &RunOptions, desired: &[&Service]) -> Result<Options> {
    let mut retry = std::collections::BTreeSet::new();
    for name in &asks.retry {
        let Some(service) = desired.iter().find(|s| s.name.as_str() == name) else {
            let near = crate::error::did_you_mean(name, desired.iter().map(|s| s.name.as_str()));
            return Err(Error::new(format!("no service '{name}' on host '{}'{near}", settings.host)));
        };
        retry.insert(service.name.clone());
    }
    // systemd tells a service that a timer started it (systemd.exec(5), since 252).
    let timer = asks.timer && std::env::var_os("TRIGGER_UNIT").is_some();
    let caddy_socket = match settings.caddy_admin.now() {
        Endpoint::Unix(path) => Some(path),
        Endpoint::Tcp(..) => None,
    };
    let caddy_server = settings.caddy_server.clone();
    Ok(Options { retry, allow_empty: asks.allow_empty, timer, caddy_server, caddy_socket })
}

/// Plans one pass without doing it.
pub fn preview(settings: &Settings, asks: &RunOptions) -> Result<Preview> {
    let now = Timestamp::now();
    let root = Root::system(&settings.unit_dir);
    let store = store::open(&settings.store)?;
    let (mut persisted, _) = load_memory(settings, &root, now)?;
    let belief = TrustPolicy::new(settings, store.as_ref(), &persisted, asks)?;
    let current =
        current(&root, store.as_ref(), &belief, &persisted.state, false).map_err(|ended| ended.error)?;
    let (desired, _) = services_for_host(&current.manifest, settings, &mut persisted, now);
    let desired: Vec<&Service> = desired.iter().collect();
    let options = options(settings, asks, &desired)?;
    let observed = observe::observe(&root, &settings.caddy_admin, &desired, &persisted)?;
    let plan = plan::plan(&desired, &observed, &persisted, &Attempts::default(), &options, now)
        .map_err(|e| would_empty(settings.host.as_str(), &e.0))?;
    Ok(Preview {
        serial: current.manifest.serial,
        generation: current.manifest.generation,
        manifest_error: current.error,
        plan,
    })
}

/// What a person on the host decides against the manifest, or takes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Stop it, for so many seconds or until it is resumed.
    Pause(Option<i64>),
    /// End that.
    Resume,
    /// Hold it at the closure that ran before.
    Rollback,
    /// End that.
    Unpin,
}

/// Takes a decision down and makes a pass, which carries it out; returns the pass's exit code.
pub fn apply_override(settings: &Settings, name: &str, decision: Decision) -> Result<u8> {
    let root = Root::system(&settings.unit_dir);
    let lock = patient(&root)?;
    let now = Timestamp::now();
    let (persisted, _) = load_memory(settings, &root, now)?;
    let Some(applied) = persisted.applied.values().find(|a| a.service.name.as_str() == name) else {
        let near = crate::error::did_you_mean(name, persisted.applied.keys().map(|n| n.as_str()));
        return Err(Error::new(format!("no service '{name}' was ever up on host '{}'{near}", settings.host)));
    };
    let name = applied.service.name.clone();
    let mut overrides = persisted.overrides.clone();
    match decision {
        Decision::Pause(length) => {
            let pause =
                Pause { since: now, until: length.map(|seconds| Timestamp(now.0.saturating_add(seconds))) };
            overrides.paused.insert(name, pause);
        }
        Decision::Resume => {
            if overrides.paused.remove(&name).is_none() {
                return Err(Error::new(format!(
                    "{name} is not paused; 'deployer state' shows how it stands"
                )));
            }
        }
        Decision::Rollback => {
            let named = last_named(settings, &root, &name)?;
            // Not what the manifest names: a second step back is not a step forward.
            let earlier = |p: &&StorePath| **p != named && fs_err::symlink_metadata(p).is_ok();
            let Some(path) = applied.previous.iter().find(earlier) else {
                return Err(Error::new(format!(
                    "{name} has no earlier closure on this host; go back with 'deploy-manifest rollback --service {name}'"
                )));
            };
            overrides.pinned.insert(name, Pin { path: path.clone(), instead: named, since: now });
        }
        Decision::Unpin => {
            if overrides.pinned.remove(&name).is_none() {
                return Err(Error::new(format!(
                    "{name} is not pinned; 'deployer state' shows how it stands"
                )));
            }
        }
    }
    overrides::save(&root, &overrides)?;
    pass(settings, &RunOptions::default(), &root, lock, now)
}

/// What the last good manifest names for a service.
fn last_named(settings: &Settings, root: &Root, name: &ServiceName) -> Result<StorePath> {
    let store = store::open(&settings.store)?;
    let manifest = last_good(root, store.as_ref())
        .and_then(|kept| parse::manifest(&kept.bytes, Mode::Tolerant).ok())
        .ok_or_else(|| Error::new("there is no good manifest on this host yet; run 'deployer' first"))?;
    manifest
        .service(name.as_str())
        .and_then(|s| s.artifact.store_path.path().cloned())
        .ok_or_else(|| Error::new(format!("the manifest has nothing to run for '{name}'")))
}

/// The lock, for a person, who wants it done rather than to be sent away.
fn patient(root: &Root) -> Result<lock::Lock> {
    lock::wait(root, |who| {
        log::notice(format!(
            "waiting for the pass under way on this host ({who}); Ctrl-C ends the wait, and nothing is done"
        ));
    })
}

/// Makes one pass; returns the exit code.
pub fn run(settings: &Settings, asks: &RunOptions) -> Result<u8> {
    let root = Root::system(&settings.unit_dir);
    let lock = match asks.timer {
        false => patient(&root)?,
        true => match lock::take(&root, Timestamp::now())? {
            LockResult::Taken(lock) => lock,
            LockResult::Held(who) => {
                log::info(format!(
                    "a pass is under way on this host ({who}); this one leaves the work to it"
                ));
                return Ok(0);
            }
        },
    };
    pass(settings, asks, &root, lock, Timestamp::now())
}

fn pass(
    settings: &Settings,
    asks: &RunOptions,
    root: &Root,
    _lock: lock::Lock,
    now: Timestamp,
) -> Result<u8> {
    work(settings, asks, root, now).map_err(|ended| {
        if !ended.mistyped
            && let Err(e) = leave_reason(settings, root, &ended, now)
        {
            log::error(format!("why this pass failed could not be recorded: {e}"));
        }
        ended.error
    })
}

/// Leaves the reason of a pass that did not do its work in the state, and reports it where the store takes it:
/// what ran before may look well for long. An idle pass that fails as the one before writes nothing.
fn leave_reason(settings: &Settings, root: &Root, ended: &PassError, now: Timestamp) -> Result<()> {
    let Some(before) = last_state(root, &settings.host, now)? else { return Ok(()) };
    let mut state = failed_state(&before, ended.error.to_string(), now);
    state.host = settings.host.clone();
    if ended.manifest {
        state.manifest_error = Some(ended.error.to_string());
    }
    state.machine = machine::this();
    let store = store::open(&settings.store).ok();
    if let Some(store) = &store {
        state.store = Some(store.identity());
    }
    // What the store did not take once is not pressed upon it by every pass.
    let known = before.last_error == state.last_error;
    state.reported = if known { before.reported } else { true };
    match store {
        Some(store) if !ended.unreachable => {
            publish(root, store.as_ref(), &before, &mut state, lines::without)
        }
        _ => {
            state.reported = false;
            if should_publish(root, &before, &state) {
                write_state(root, &state)?;
            }
            Ok(())
        }
    }
}

/// The state with the reason why passes end, and since when.
fn failed_state(before: &State, reason: String, now: Timestamp) -> State {
    let since = before.last_error.as_ref().filter(|e| e.reason == reason).map_or(now, |e| e.since);
    let deployer = env!("CARGO_PKG_VERSION").into();
    State { checked_at: now, deployer, last_error: Some(LastError { reason, since }), ..before.clone() }
}

/// The state that the pass before left; None where it cannot be read, which the next good pass must still see.
fn last_state(root: &Root, host: &HostName, now: Timestamp) -> Result<Option<State>> {
    match fs_err::read(root.state_file()) {
        Ok(bytes) => Ok(State::parse(&bytes).ok().map(|mut state| {
            lines::load(root).put_back(&mut state);
            state
        })),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Some(State::new(host.clone(), now))),
        Err(e) => Err(e.into()),
    }
}

/// A pass that could not begin, because the configuration cannot be used: the state says so, as far as anybody
/// without that configuration can.
pub fn could_not_begin(why: &Error) {
    let now = Timestamp::now();
    // Its unit folder is not known, and not needed.
    let root = Root::system(Path::new("/etc/systemd/system"));
    let note = || -> Result<()> {
        let LockResult::Taken(_lock) = lock::take(&root, now)? else { return Ok(()) };
        let Some(host) = HostName::of_this_machine() else { return Ok(()) };
        let Some(before) = last_state(&root, &host, now)? else { return Ok(()) };
        let state = State { reported: false, ..failed_state(&before, why.to_string(), now) };
        if should_publish(&root, &before, &state) {
            durable::folder(&root.state_dir, 0o755)?;
            write_state(&root, &state)?;
        }
        Ok(())
    };
    if let Err(e) = note() {
        log::error(format!("why this pass failed could not be recorded: {e}"));
    }
}

fn work(settings: &Settings, asks: &RunOptions, root: &Root, now: Timestamp) -> Result<u8, PassError> {
    // Its unit has it made; a pass started by hand on a fresh host has not.
    durable::folder(&root.state_dir, 0o755)?;
    let store = store::open(&settings.store)?;
    let (mut persisted, exposed) = load_memory(settings, root, now)?;
    if exposed {
        // In the bucket, too.
        persisted.state.reported = false;
        lines::keep(root, &persisted.state)?;
    }
    let before = persisted.state.clone();
    let belief = TrustPolicy::new(settings, store.as_ref(), &persisted, asks)?;
    let current = current(root, store.as_ref(), &belief, &before, true)?;
    if let Some(error) = &current.error {
        log::warning(format!(
            "{error}; working from the last good manifest, serial {}",
            current.manifest.serial
        ));
    }
    let manifest = &current.manifest;
    let (desired, expired) = services_for_host(manifest, settings, &mut persisted, now);
    if expired {
        overrides::save(root, &persisted.overrides)?;
    }
    let desired: Vec<&Service> = desired.iter().collect();
    let options = options(settings, asks, &desired)
        .map_err(|error| PassError { mistyped: !asks.retry.is_empty(), ..error.into() })?;
    if persisted.state.serial != Some(manifest.serial) {
        log::info(format!(
            "manifest serial {} ({}, by {}): {} service(s) for host '{}'",
            manifest.serial,
            manifest.change.action,
            manifest.change.by,
            desired.len(),
            settings.host
        ));
    }
    durable::sweep(&root.state_dir)?;
    if !persisted.interrupted.is_empty() {
        // A pass that died after a write or a removal leaves systemd with what it had read before.
        stop_rewritten(root, &persisted.interrupted)?;
        systemd::daemon_reload()?;
        let both = persisted.interrupted.iter().flat_map(|n| [n.unit(), n.next_unit()]);
        systemd::reset_failed(&both.filter(|u| !root.unit_dir.join(u).exists()).collect::<Vec<_>>())?;
    }
    if let Err(e) = crate::nix::recover() {
        log::error(e.to_string());
    }
    let mut observed = observe::observe(root, &settings.caddy_admin, &desired, &persisted)?;
    let mut attempts = Attempts::default();
    let host = Host { settings, root };
    let mut changed = false;
    let decide = |observed: &Observed, persisted: &PersistedState, attempts: &Attempts| {
        plan::plan(&desired, observed, persisted, attempts, &options, now)
            .map_err(|e| would_empty(settings.host.as_str(), &e.0))
    };

    let abandoned: Vec<ServiceName> = plan::abandoned(&observed, &persisted).into_iter().cloned().collect();
    if !abandoned.is_empty() {
        host.undo_abandoned(&abandoned, &desired, &persisted, &mut observed)?;
        changed = true;
    }
    let mut plan = match decide(&observed, &persisted, &attempts) {
        Ok(plan) => plan,
        Err(refused) => {
            // Whoever looks from afar shall see why nothing happens.
            return Err(PassError { manifest: true, ..refused.into() });
        }
    };
    if !plan.is_empty() || !persisted.interrupted.is_empty() {
        let links = root.unit_dir.join("multi-user.target.wants");
        for dir in [&root.unit_dir, &root.applied_dir(), &root.run_dir, &links] {
            durable::sweep(dir)?;
        }
        for (name, held) in &observed.roots {
            durable::sweep(&root.roots(name))?;
            if held.is_empty() {
                durable::remove_folder(&root.roots(name))?;
            }
        }
    }
    let mut rounds = 0;
    while rounds < MAX_ROUNDS {
        if plan.services.iter().any(|s| !s.steps.is_empty()) {
            rounds += 1;
            match host.round(&plan, &desired, &mut observed, &mut persisted, &mut attempts) {
                Ok(any) => changed |= any,
                Err(e) => {
                    changed = true;
                    host.hinder_all(&plan, &e, &mut attempts);
                }
            }
        } else if attempts.pending.values().any(|p| p.awaited) {
            // Everybody else has what is due to him, requests included, before a slow one is waited for.
            if let RoutePlan::Write(_) = &plan.route {
                changed = true;
                write_route(settings, &plan, &desired);
                observed.caddy = caddy::observe(&settings.caddy_admin);
            }
            if !host.wait(&mut attempts)? {
                break;
            }
        } else {
            break;
        }
        let remembered = remember(root, &mut persisted, &attempts);
        attempts.disk(remembered);
        (observed.units, _) = observe::units(root, &desired, &persisted)?;
        observed.ports = observe::ports(&desired, &persisted.applied);
        plan = decide(&observed, &persisted, &attempts)?;
    }

    // The route before what is gone: no request is led to a service that is being stopped.
    let waited_for = changed || !plan.candidates.is_empty();
    if waited_for && matches!(observed.caddy, caddy::CaddyState::Unavailable(_)) {
        // It may answer by now: it opens its endpoint anew at every change, and may have been restarted meanwhile.
        observed.caddy = caddy::observe(&settings.caddy_admin);
        plan = decide(&observed, &persisted, &attempts)?;
    }
    changed |= matches!(plan.route, RoutePlan::Write(_));
    let route = write_route(settings, &plan, &desired);
    let mut leaving = plan.candidates.clone();
    if route.status == RouteStatus::Pending && !leaving.is_empty() {
        observed.caddy = caddy::observe(&settings.caddy_admin);
        // One of a service that is stopped on purpose, or gone, has no visitors to wait for.
        let serves = |name: &ServiceName| {
            plan.services.iter().any(|p| p.name == *name && !p.paused && p.goal.is_some())
        };
        let (serving, idle): (Vec<_>, Vec<_>) = leaving.into_iter().partition(serves);
        leaving = host.led_past(&serving, &observed)?;
        leaving.extend(idle);
    }
    changed |= !leaving.is_empty();
    let mut not_gone = None;
    if !plan.gone.is_empty() {
        let gone = intent::record(root, plan.gone.iter().map(|s| s.name.clone()).collect())
            .and_then(|()| host.remove(&plan.gone, &mut persisted, &observed, &mut attempts))
            .and_then(|removed| {
                host.unroot(&plan.gone, &mut observed, &attempts).map(|()| changed |= removed)
            });
        not_gone = gone.as_ref().err().map(Error::to_string);
        attempts.disk(gone);
    }
    if changed || not_gone.is_some() {
        (observed.units, observed.active) = observe::units(root, &desired, &persisted)?;
        // An attempt starts what it requires: what this changed is no reason to try again.
        plan::settle_inputs(&mut plan, &desired, &observed, &attempts);
    }

    let mut services = plan
        .services
        .iter()
        .map(|p| {
            let entry = current.entries.get(&p.name).cloned();
            (
                p.name.clone(),
                ServiceState { entry, ..service_state(p, &observed, &persisted, &attempts, now) },
            )
        })
        .collect::<BTreeMap<_, _>>();
    let going =
        plan.gone.iter().filter_map(|p| going(&p.name, &observed, &persisted, not_gone.as_deref(), now));
    services.extend(going.map(|service| (service.name.clone(), service)));
    let mut state = State {
        version: STATE_VERSION,
        host: settings.host.clone(),
        deployer: env!("CARGO_PKG_VERSION").into(),
        serial: Some(manifest.serial),
        generation: Some(manifest.generation),
        checked_at: now,
        changed_at: if changed { Some(Timestamp::now()) } else { persisted.state.changed_at },
        manifest_error: current.error,
        route,
        reported: true,
        store: Some(store.identity()),
        manifest_hash: Some(current.hash),
        machine: machine::this(),
        other_machine: before.other_machine.clone(),
        manager_environment: manager_environment(&before, &observed, &attempts),
        last_error: None,
        draining: leaving.iter().cloned().collect(),
        services,
    };
    if should_publish(root, &before, &state) {
        fill_exposure(&mut state, &attempts);
    }
    log_changes(&before, &state, &attempts);
    let code = state.exit_code();
    // Before the last connections of the candidates end: whoever waits for the release need not wait for those.
    let open = |state: &State| reported_lines(settings, state, &desired);
    let mut unwritten = attempts.disk(publish(root, store.as_ref(), &before, &mut state, open));
    if !leaving.is_empty() {
        host.drain_candidates(&leaving, &persisted, &observed)?;
        host.remove_candidates(&leaving, &mut observed)?;
        state.draining.clear();
        unwritten |= attempts.disk(write_state(root, &state));
    }
    if !unwritten && attempts.unwritten.is_empty() && root.intent().exists() {
        intent::clear(root)?;
    }
    // The intent stays with what is not on the disk: the next pass looks at it all again.
    Ok(if attempts.unwritten.is_empty() { code } else { code.max(crate::error::EXIT_FAILED) })
}

/// Stops those of an interrupted pass's services that would be started twice ([`systemd::stop_waiting`]), by another unit
/// than systemd has read before.
fn stop_rewritten(root: &Root, interrupted: &BTreeSet<ServiceName>) -> Result<()> {
    let ours = observe::ours(root)?;
    let units: Vec<String> =
        interrupted.iter().filter(|name| ours.contains(*name)).map(ServiceName::unit).collect();
    let shown = systemd::show(&units)?;
    let waits = |unit: &systemd::Shown| unit.needs_reload && systemd::is_between_starts(&unit.sub);
    let units = units.into_iter().filter(|unit| shown.get(unit).is_some_and(waits));
    systemd::stop_waiting(&units.collect::<Vec<_>>())
}

/// What somebody has systemd give every service. It reaches what is started after that, so it is asked for when
/// something was started since an earlier pass looked, and while it was there when last asked.
fn manager_environment(before: &State, observed: &Observed, attempts: &Attempts) -> Vec<String> {
    let started = observed.units.values().any(|u| u.invocation.is_some() && !u.verified);
    if !started && attempts.started.is_empty() && before.manager_environment.is_empty() {
        return Vec::new();
    }
    match systemd::given_to_all() {
        Ok(names) => {
            if !names.is_empty() && (names != before.manager_environment || !attempts.started.is_empty()) {
                log::warning(systemd::given_text(&names));
            }
            names
        }
        Err(e) => {
            log::info(format!("what systemd gives every service is not known: {e}"));
            before.manager_environment.clone()
        }
    }
}

/// Gives Caddy the route of a plan; how it stands then.
fn write_route(settings: &Settings, plan: &Plan, desired: &[&Service]) -> RouteState {
    let requests = match &plan.route {
        RoutePlan::None => return RouteState::default(),
        RoutePlan::Current => return RouteState { status: RouteStatus::Current, reason: None },
        RoutePlan::Pending(reason) => {
            log::warning(format!("route: {reason}"));
            return RouteState { status: RouteStatus::Pending, reason: Some(reason.clone()) };
        }
        RoutePlan::Write(requests) => requests,
    };
    for request in requests {
        match caddy::perform(&settings.caddy_admin, request) {
            Ok(()) => log::notice(format!("route: {}", request.what)),
            // No visitor misses it.
            Err(why) if request.is_view() => log::warning(why),
            Err(why) => {
                log::error(format!("route: {why}; the next pass tries again"));
                return RouteState { status: RouteStatus::Pending, reason: Some(why) };
            }
        }
    }
    match plan::routed(desired, &plan.services).is_empty() {
        true => RouteState::default(),
        false => RouteState { status: RouteStatus::Current, reason: None },
    }
}

/// Takes refusals down at once: should this pass die on the way back, the next one goes back as well and does
/// not try the bad version again.
fn remember(root: &Root, persisted: &mut PersistedState, attempts: &Attempts) -> Result<()> {
    let mut new = false;
    for ((name, _), trouble) in attempts.failures.iter().filter(|(_, t)| t.rejected) {
        let before = persisted.state.services.get(name);
        if before.and_then(|b| b.failure.as_ref()) == Some(&trouble.failure) {
            continue;
        }
        let entry = ServiceState {
            name: name.clone(),
            store_path: before.and_then(|b| b.store_path.clone()),
            status: ServicePhase::Rejected,
            since: trouble.failure.at,
            previous: before.map(|b| b.previous.clone()).unwrap_or_default(),
            failure: Some(trouble.failure.clone()),
            secrets_changed: false,
            exposure: before.and_then(|b| b.exposure),
            drop_ins: before.map(|b| b.drop_ins.clone()).unwrap_or_default(),
            invocation: before.and_then(|b| b.invocation.clone()),
            pinned_since: None,
            paused_until: None,
            entry: before.and_then(|b| b.entry.clone()),
            removing: false,
        };
        persisted.state.services.insert(name.clone(), entry);
        new = true;
    }
    if new {
        // Not what the bucket has: the pass that finishes reports it.
        persisted.state.reported = false;
        write_state(root, &persisted.state)?;
    }
    Ok(())
}

/// How a service stands after the pass, from what was seen last.
fn service_state(
    plan: &ServicePlan,
    observed: &Observed,
    persisted: &PersistedState,
    attempts: &Attempts,
    now: Timestamp,
) -> ServiceState {
    let seen = observed.units.get(&plan.name);
    let running = seen.is_some_and(|u| u.listed.running());
    let runs = match &plan.instead {
        Some(other) => other.clone(),
        None => plan.goal.as_ref().map(|g| g.path.clone()),
    };
    let runs = runs.filter(|_| running);
    // One that drop-ins were seen of is not known to be without them by what is loaded now.
    let invocation = seen.filter(|u| running && (u.verified || u.clean && plan.drop_ins.is_empty()));
    let status = match (&plan.target, &plan.trouble, &runs) {
        _ if plan.paused => ServicePhase::Stopped,
        (None, None, _) => ServicePhase::Waiting,
        (_, Some(trouble), _) if trouble.rejected => ServicePhase::Rejected,
        (_, None, Some(_)) => ServicePhase::Running,
        (_, Some(_), _) | (_, None, None) => ServicePhase::Failed,
    };
    let failure = plan.trouble.as_ref().map(|t| t.failure.clone()).or_else(|| {
        (status == ServicePhase::Failed && !plan.paused).then(|| FailureRecord {
            reason: format!("it was up and is not any more; see 'journalctl -u {}'", plan.name),
            attempted: plan.target.clone(),
            at: now,
            journal: Vec::new(),
            attempts: 0,
            inputs: None,
            kept_out: false,
        })
    });
    let before = persisted.state.services.get(&plan.name);
    let since = before.filter(|b| b.status == status && b.store_path == runs).map_or(now, |b| b.since);
    let previous = persisted.applied.get(&plan.name).into_iter().flat_map(|a| &a.previous);
    let previous = previous.filter(|p| observed.present.contains(*p)).cloned().collect();
    let exposure = match attempts.started.contains(&plan.name) {
        true => attempts.exposures.get(&plan.name.unit()).copied(),
        // It may have been started by the pass that was interrupted.
        false if persisted.interrupted.contains(&plan.name) => None,
        false => before.and_then(|b| b.exposure),
    };
    let overrides = &persisted.overrides;
    ServiceState {
        name: plan.name.clone(),
        exposure: exposure.filter(|_| runs.is_some()),
        store_path: runs,
        status,
        since,
        previous,
        failure,
        secrets_changed: seen.is_some_and(|u| u.secrets_changed),
        drop_ins: plan.drop_ins.clone(),
        invocation: invocation.and_then(|u| u.invocation.clone()),
        pinned_since: overrides.pinned.get(&plan.name).map(|p| p.since),
        paused_until: overrides.paused.get(&plan.name).and_then(|p| p.until),
        entry: None,
        removing: false,
    }
}

/// A service that is not in the manifest any more and not gone yet, with what it is doing.
fn going(
    name: &ServiceName,
    observed: &Observed,
    persisted: &PersistedState,
    why: Option<&str>,
    now: Timestamp,
) -> Option<ServiceState> {
    let seen = observed.units.get(name);
    let applied = persisted.applied.get(name);
    // What was proved is forgotten last.
    if applied.is_none() && !seen.is_some_and(|s| matches!(s.file, UnitFile::Ours(_))) {
        return None;
    }
    let listed = seen.map(|s| &s.listed).filter(|l| !l.active.is_empty());
    let does = listed.map_or("not loaded".to_string(), |l| format!("{}/{}", l.active, l.sub));
    let why = why.map(|why| format!(": {why}")).unwrap_or_default();
    let reason = format!(
        "it is not in the manifest any more, and not gone yet ({does}){why}; the next pass goes on with it, see \
         'journalctl -u {name}'"
    );
    let before = persisted.state.services.get(name);
    let up = listed.is_some_and(|l| matches!(l.active.as_str(), "active" | "deactivating"));
    let failure = FailureRecord {
        reason,
        attempted: None,
        at: now,
        journal: Vec::new(),
        attempts: 0,
        inputs: None,
        kept_out: false,
    };
    Some(ServiceState {
        store_path: applied.filter(|_| up).map(|a| a.path.clone()),
        failure: Some(failure),
        removing: true,
        ..ServiceState::new(
            name.clone(),
            ServicePhase::Failed,
            before.filter(|b| b.removing).map_or(now, |b| b.since),
        )
    })
}

/// The story's last lines: everything that is off, with its reason unless this pass has just said it, so that an
/// exit code of 3 or 4 never stands alone; and what is well again.
fn log_changes(before: &State, after: &State, attempts: &Attempts) {
    for (name, service) in &after.services {
        let status = service.status.as_str();
        if let Some(failure) = &service.failure {
            let runs = service.store_path.as_ref().map_or("nothing runs".into(), |p| format!("{p} runs on"));
            let said = attempts.failures.values().any(|t| t.failure == *failure)
                || attempts.unfetchable.values().any(|reason| *reason == failure.reason);
            let reason = if said { String::new() } else { format!(": {}", failure.reason) };
            log::error(format!("{name}: {status}, {runs}{reason}"));
        }
        if let Some(attention) = service.attention() {
            log::warning(format!("{name}: {attention}"));
        }
        if service.failure.is_some() {
            continue;
        }
        let old = before.services.get(name);
        if old.is_some_and(|o| o.status == service.status && o.failure.is_none()) {
            continue;
        }
        match (service.status, &service.store_path) {
            (ServicePhase::Running, Some(path)) => log::info(format!("{name}: running {path}")),
            _ => log::info(format!("{name}: {status}")),
        }
    }
}

/// Finds out how exposed those services are of which it is not known: one that a person started, or that ran
/// before this program could tell. Only where something is written anyway, so that an idle pass asks nobody.
fn fill_exposure(state: &mut State, attempts: &Attempts) {
    let unrated = |s: &&mut ServiceState| {
        s.store_path.is_some() && s.exposure.is_none() && !attempts.started.contains(&s.name)
    };
    let mut unrated: Vec<&mut ServiceState> = state.services.values_mut().filter(unrated).collect();
    if unrated.is_empty() {
        return;
    }
    match systemd::exposures() {
        Ok(exposures) => {
            unrated.iter_mut().for_each(|s| s.exposure = exposures.get(&s.name.unit()).copied());
        }
        Err(e) => log::info(format!("how exposed the services are is not known: {e}")),
    }
}

/// Whether there is anything to write: something new, or the last report is old.
fn should_publish(root: &Root, before: &State, state: &State) -> bool {
    let same = state.says_the_same(before);
    let fresh = state.checked_at.0.saturating_sub(before.checked_at.0).abs() < REPORT_EVERY_SEC;
    !(same && fresh && root.state_file().exists())
}

/// The state as the bucket gets it: without the lines of the journal, or, where that was asked for, without what in them
/// is in the services' secrets files. Lines that this cannot be said of stay here.
fn reported_lines(settings: &Settings, state: &State, desired: &[&Service]) -> State {
    let mut open = lines::without(state);
    if !settings.report_lines {
        return open;
    }
    for service in desired {
        let lines_of = |state: &State| Some(state.services.get(&service.name)?.failure.clone()?.journal);
        let Some(lines) = lines_of(state).filter(|lines| !lines.is_empty()) else { continue };
        let mask = match Mask::of(&secrets::files(service)) {
            Ok(mask) => mask,
            Err(e) => {
                log::info(format!(
                    "{}: its last lines are not reported: {}",
                    service.name,
                    crate::error::io_text(&e)
                ));
                continue;
            }
        };
        if let Some(failure) = open.services.get_mut(&service.name).and_then(|s| s.failure.as_mut()) {
            failure.journal = lines.iter().map(|line| mask.hide(line)).collect();
        }
    }
    open
}

/// Writes the state and puts the report, if there is anything new in them or the last ones are old. `open` is what of it
/// is for the bucket.
fn publish(
    root: &Root,
    store: &dyn Store,
    before: &State,
    state: &mut State,
    open: impl Fn(&State) -> State,
) -> Result<()> {
    if !should_publish(root, before, state) {
        return Ok(());
    }
    let key = format!("{HOSTS_PREFIX}{}.json", state.host);
    state.other_machine = other_machine(store, &key, before, state);
    // The report first: a pass that dies between the two finds its old state, and reports again.
    let reported = {
        let _effect = failpoint::mark("put", &key);
        // What drains is of this moment, and a report stands for long.
        let report = lines::to_bytes(&State { draining: BTreeSet::new(), ..open(state) })?;
        store.put(&key, &report, &Condition::Always)
    };
    state.reported = reported.is_ok();
    if let Err(e) = reported {
        log::warning(format!("the report was not written: {e}; the next pass tries again"));
    }
    // A store that goes on refusing is asked again by every pass, and the disk is spared.
    if should_publish(root, before, state) { write_state(root, state) } else { Ok(()) }
}

/// The lines of the journal go where root alone reads them.
fn write_state(root: &Root, state: &State) -> Result<()> {
    lines::keep(root, state)
}

/// Whether the report that is about to be replaced is another machine's: asked only where one is written, so that
/// an idle pass asks the store for nothing but the manifest. Credentials that may not read it tell nothing.
fn other_machine(store: &dyn Store, key: &str, before: &State, state: &State) -> Option<OtherMachine> {
    let this = state.machine.as_ref()?;
    let found = match store.get(key, None, reports::MAX_REPORT) {
        Ok(GetResult::Found { bytes, .. }) => reports::parsed(&bytes).ok(),
        Ok(GetResult::Missing | GetResult::NotModified) | Err(_) => None,
    };
    // Two that are at work find each other at every report: one that is not found any more has given up.
    let lasts = |other: &OtherMachine| {
        other.came_back && state.checked_at.0.saturating_sub(other.reported_at.0) <= SILENT_SEC
    };
    let earlier = before.other_machine.clone().filter(lasts);
    let Some((theirs, reported_at)) = found.and_then(|f| Some((f.machine?, f.checked_at))) else {
        return earlier;
    };
    if theirs.id == this.id {
        return earlier;
    }
    if state.checked_at.0.saturating_sub(reported_at.0) > SILENT_SEC {
        log::info(format!(
            "this machine takes the place of {theirs}, which reported as '{}' before",
            state.host
        ));
        return earlier;
    }
    let came_back =
        before.reported && before.machine.as_ref() == Some(this) && reported_at > before.checked_at;
    let other = OtherMachine { machine: theirs, reported_at, came_back };
    log::warning(other.text(&state.host, this));
    Some(other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::SecretKey;
    use crate::manifest::publish::{self, Author, StartingPoint};
    use crate::manifest::signature::Trust;
    use crate::store::StoreUrl;

    /// A store, and a developer whose machine remembers nothing of it.
    struct Bench {
        dir: tempfile::TempDir,
        store: Box<dyn Store>,
        author: Author,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let store = store::open(&StoreUrl::Dir(dir.path().join("store"))).unwrap();
            let key = SecretKey::generate("ann-1").unwrap();
            let trust = Trust { trusted: vec![key.public()], signer: Some(key) };
            Bench { dir, store, author: Author { by: "ann@laptop".into(), trust, ..Author::default() } }
        }

        fn publishes(&self, start: StartingPoint, change: impl Fn(&mut Manifest)) -> Vec<u8> {
            let now = || Timestamp(1_795_372_265);
            publish::publish(&*self.store, &now, &self.author, start, |manifest| {
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
            let belief = TrustPolicy {
                host: host.clone(),
                trusted: self.author.trust.trusted.clone(),
                highest: 0,
                accept: None,
            };
            let state = State::new(host, Timestamp(0));
            let found = current(&root, &*self.store, &belief, &state, true).map_err(|e| e.error).unwrap();
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
        assert!(error.unwrap().contains("version 4 was made without the version 3"));
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
