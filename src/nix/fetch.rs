//! Closures from the cache into this machine's store: the walk ([`super::walk`]), the transfer into a spool
//! ([`super::download`]), and one `nix copy` of what was missing, out of the spool. Nix is given nothing but NARs whose
//! hash was compared, and checks signatures again by its own settings. Other caches than buckets and folders go to Nix
//! as they are. One closure that cannot be had keeps no other from coming.

use super::announced;
use super::download::{self, DownloadError, download};
use super::held::{self, TemporaryRoots};
use super::spool::{self, Spool};
use super::walk::{PathFault, VerifiedNarInfo, WalkError, WalkLimits, Walked, walk};
use super::{
    Cache, FetchError, GCROOTS, PER_CALL, Side, cause, groups, missing, nix, store_trouble, trusting,
    with_room,
};
use crate::config::Settings;
use crate::durable;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::keys::PublicKey;
use crate::manifest::signature;
use crate::names::{STORE_DIR, StorePath};
use crate::runner::RunError;
use crate::store::{self, CacheUrl, Store};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long all of one fetch may take.
const FETCH_WITHIN: Duration = Duration::from_secs(15 * 60);
/// How long the walks of one fetch may take.
const WALK_WITHIN: Duration = Duration::from_secs(60);
/// What must stay free in the store's file system after a fetch, in bytes: Nix's database needs some.
const SPARE_BYTES: u64 = 16 << 20;
/// So many bytes of NARs are in the spool at a time, or one path that is larger.
const GROUP: u64 = 256 << 20;

/// The name of our spools.
const WORK: &str = "fetch";

/// The reason for each closure that could not be had.
pub type Reasons = BTreeMap<StorePath, FetchError>;

/// What is to come for each closure, in order of references. What several need is there once.
type Closures = BTreeMap<StorePath, Vec<Arc<VerifiedNarInfo>>>;

/// Has Nix forget what the end of the machine left damaged of an earlier fetch ([`super::announced`]): before anything
/// is believed to be in the store.
pub fn recover() -> Result<()> {
    announced::recover(&spool::home(spool::Of::Machine), WORK)
}

/// Copies closures from the cache into this machine's store, with Nix's private cache below `scratch`. Returns the reason
/// for each path that could not be had; an error means that nothing could be tried.
pub fn fetch(settings: &Settings, paths: &[StorePath], scratch: &Path) -> Result<Reasons> {
    recover()?;
    let left = missing(paths)?;
    if left.is_empty() {
        return Ok(Reasons::new());
    }
    let until = Instant::now() + FETCH_WITHIN;
    let url = match &settings.cache {
        CacheUrl::Nix(url) => {
            let reasons = through_nix(url, settings, left, scratch, until)?;
            durable::flush(Path::new(STORE_DIR))?;
            return Ok(reasons);
        }
        CacheUrl::Store(url) => url,
    };
    let shown = settings.cache.to_string();
    let unreachable = |why: String| {
        let e = FetchError::Unreachable(format!("cache {shown}: {why}"));
        Ok(left.iter().map(|path| (path.clone(), e.clone())).collect())
    };
    let cache = match store::open(url) {
        Ok(cache) => cache,
        Err(e) => return unreachable(e.to_string()),
    };
    if let Some(why) = cache.absence() {
        return unreachable(why);
    }
    let keys = signature::trusted(settings)?;
    let spool = Spool::open(&spool::home(spool::Of::Machine), WORK)?;
    let mut fetch = Fetch { settings, cache, keys, spool, scratch, until, shown, reasons: Reasons::new() };
    fetch.run(left)?;
    Ok(fetch.reasons)
}

/// Removes what fetches that died have left, for when nothing is wanted any more.
pub fn forget_transfers() {
    spool::clear_idle(&spool::home(spool::Of::Machine), WORK);
    held::release_left(Path::new(GCROOTS));
}

/// One fetch under way.
struct Fetch<'a> {
    settings: &'a Settings,
    cache: Arc<dyn Store>,
    keys: Vec<PublicKey>,
    spool: Spool,
    scratch: &'a Path,
    until: Instant,
    /// The cache's URL for people.
    shown: String,
    reasons: Reasons,
}

impl Fetch<'_> {
    fn run(&mut self, tops: Vec<StorePath>) -> Result<()> {
        let mut closures = self.closures(tops);
        self.keep_what_fits(&mut closures);
        // Each path once, after what it refers to.
        let mut seen = BTreeSet::new();
        let mut wanted: Vec<Arc<VerifiedNarInfo>> = closures.values().flatten().cloned().collect();
        wanted.retain(|found| seen.insert(found.info.path.clone()));
        // What lies there of fetches that nobody wants any more, so that the spool does not grow for ever; but not while
        // the cache does not say what is wanted.
        if !self.reasons.values().any(|reason| matches!(reason, FetchError::Unreachable(_))) {
            let hashes: BTreeSet<&str> = seen.iter().map(StorePath::hash).collect();
            self.spool.clear(|key| hashes.contains(download::hash_of(key)))?;
        }
        // What they refer to as well: some of it may be here for no other reason than that nobody has collected it.
        let paths = wanted.iter().flat_map(|found| found.info.references.iter().chain([&found.info.path]));
        let _held = TemporaryRoots::new(Path::new(GCROOTS), paths);
        for group in groups(&wanted, GROUP, |found| found.info.nar_size) {
            let copied = self.bring(group, &mut closures)?;
            let copied: BTreeSet<&str> = copied.iter().map(StorePath::hash).collect();
            self.spool.clear(|key| !copied.contains(download::hash_of(key)))?;
        }
        Ok(())
    }

    /// What must come for each closure that can be had, in order of references.
    fn closures(&mut self, tops: Vec<StorePath>) -> Closures {
        let mut closures = BTreeMap::new();
        match self.walk(&tops, WALK_WITHIN) {
            Ok(walked) => tops.iter().for_each(|top| self.take(&walked, top, &mut closures)),
            // One closure without end keeps no other from coming.
            Err(WalkError::Endless(_) | WalkError::Late(_)) if tops.len() > 1 => {
                let share = WALK_WITHIN / u32::try_from(tops.len()).unwrap_or(u32::MAX);
                for top in &tops {
                    match self.walk(std::slice::from_ref(top), share.max(Duration::from_secs(2))) {
                        Ok(walked) => self.take(&walked, top, &mut closures),
                        Err(ended) => self.ended(top, &ended),
                    }
                }
            }
            Err(ended) => tops.iter().for_each(|top| self.ended(top, &ended)),
        }
        closures
    }

    fn walk(&self, tops: &[StorePath], within: Duration) -> Result<Walked, WalkError> {
        let mut lacking = |paths: &[StorePath]| {
            // What is not even on the disk is not valid: mostly nobody needs to be asked.
            let (there, mut lacking): (Vec<_>, Vec<_>) =
                paths.iter().cloned().partition(|path| fs_err::symlink_metadata(path).is_ok());
            if !there.is_empty() {
                lacking.extend(missing(&there).map_err(|e| e.to_string())?);
            }
            Ok(lacking)
        };
        let within = within.min(self.until.saturating_duration_since(Instant::now()));
        walk(self.cache.as_ref(), tops, &self.keys, &mut lacking, WalkLimits::within(within))
    }

    fn take(&mut self, walked: &Walked, top: &StorePath, closures: &mut Closures) {
        match walked.closure(top) {
            Ok(found) => drop(closures.insert(top.clone(), found.into_iter().cloned().collect())),
            Err((path, fault)) => drop(self.reasons.insert(top.clone(), self.faulty(top, &path, &fault))),
        }
    }

    fn ended(&mut self, top: &StorePath, ended: &WalkError) {
        let reason = match ended {
            WalkError::Cache(e) => FetchError::Unreachable(e.to_string()),
            WalkError::Endless(why) => FetchError::Refused(format!(
                "the closure of {top} has no end in the cache {}: {why}; push it again with 'omni-deploy push', which \
                 writes anew what differs from the pushing machine's store",
                self.shown
            )),
            WalkError::Late(why) => FetchError::Unreachable(format!(
                "cache {}: its narinfos of the closure of {top} did not arrive in time: {why}; check this machine's \
                 network and the store, and if both are well, push it again with 'omni-deploy push'",
                self.shown
            )),
            WalkError::Here(why) => FetchError::Failed(format!("cannot copy {top}: {why}")),
        };
        self.reasons.insert(top.clone(), reason);
    }

    /// Leaves out the closures that the disk has no room for, in order: a small one that fits is not held up by a large
    /// one after it. Sizes are those that were vouched for.
    fn keep_what_fits(&mut self, closures: &mut Closures) {
        let Some(free) = super::free_bytes(Path::new(STORE_DIR)) else { return };
        let device = |path: &Path| {
            use std::os::unix::fs::MetadataExt;
            fs_err::metadata(path).ok().map(|meta| meta.dev())
        };
        let shared = device(Path::new(STORE_DIR)) == device(self.spool.dir());
        // What an earlier fetch has left of them has its room already; the rest of the spool makes way.
        let left = self.spool.files().map_or(0, |files| files.iter().map(|(_, size)| size).sum::<u64>());
        let free = if shared { free.saturating_add(left) } else { free };
        let spool_free = if shared { None } else { super::free_bytes(self.spool.dir()) };
        let spool_free = spool_free.map(|free| free.saturating_add(left));
        let mut counted = BTreeSet::new();
        let (mut used, mut largest) = (0u64, 0u64);
        let reasons = &mut self.reasons;
        let spool = self.spool.dir();
        closures.retain(|top, found| {
            let new = found.iter().filter(|found| !counted.contains(&found.info.path));
            let sizes: Vec<u64> = new.map(|found| found.info.nar_size).collect();
            let bytes = sizes.iter().fold(0u64, |sum, size| sum.saturating_add(*size));
            let total = used.saturating_add(bytes);
            let one = sizes.iter().copied().fold(largest, u64::max);
            // On the way there is a group of NARs in the spool, of each first the packed file beside the NAR and then
            // the NAR beside the path.
            let group = total.min(GROUP.max(one));
            let here = if shared { total.saturating_add(group) } else { total }.saturating_add(SPARE_BYTES);
            let there = group.saturating_mul(2);
            let mib = |bytes: u64| format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20));
            let (place, takes, has) = if here > free {
                (STORE_DIR.to_string(), here - used.min(here), free - used.min(free))
            } else if let Some(has) = spool_free.filter(|has| there > *has) {
                (spool.display().to_string(), there, has)
            } else {
                counted.extend(found.iter().map(|found| found.info.path.clone()));
                (used, largest) = (total, one);
                return true;
            };
            let reason = format!(
                "{top} takes {} in {place}, which has {} free; 'nix-collect-garbage -d' frees what no root holds, or \
                 give it more disk",
                mib(takes),
                mib(has)
            );
            reasons.insert(top.clone(), FetchError::Failed(reason));
            false
        });
    }

    /// Brings one group of paths into the store; those that are there now.
    fn bring(&mut self, group: &[Arc<VerifiedNarInfo>], closures: &mut Closures) -> Result<Vec<StorePath>> {
        let wanted = needed(group, closures);
        let failures = download(self.cache.as_ref(), &self.spool, &wanted, self.until);
        closures.retain(|top, found| {
            let failed = found.iter().find_map(|found| failures.get_key_value(&found.info.path));
            let Some((path, failure)) = failed else { return true };
            let reason = self.failed(top, path, failure);
            self.reasons.insert(top.clone(), reason);
            false
        });
        let ready: Vec<StorePath> =
            needed(group, closures).into_iter().map(|found| found.info.path.clone()).collect();
        let failed = match self.copy(&ready)? {
            Ok(()) => return Ok(ready),
            Err(RunError::NotFound { program }) => return Err(RunError::NotFound { program }.into()),
            Err(e) => e,
        };
        // Which of them it is that Nix does not take.
        let tops: Vec<StorePath> = closures.keys().cloned().collect();
        for top in tops {
            let own: BTreeSet<&StorePath> = closures[&top].iter().map(|found| &found.info.path).collect();
            let own: Vec<StorePath> = ready.iter().filter(|path| own.contains(path)).cloned().collect();
            // In order of references, which the answer is not.
            let lacking: BTreeSet<StorePath> = missing(&own)?.into_iter().collect();
            let own: Vec<StorePath> = own.into_iter().filter(|path| lacking.contains(path)).collect();
            let copied = match &failed {
                // Nobody has time for them one by one.
                RunError::Deadline { .. } if !own.is_empty() => Err(failed.clone()),
                _ => self.copy(&own)?,
            };
            if let Err(e) = copied {
                let reason = self.why_not(&top, &e);
                self.reasons.insert(top.clone(), reason);
                closures.remove(&top);
            }
        }
        let lacking: BTreeSet<StorePath> = missing(&ready)?.into_iter().collect();
        Ok(ready.into_iter().filter(|path| !lacking.contains(path)).collect())
    }

    /// Lets Nix copy these paths, which are in the spool, and nothing else. The inner error is Nix's; the outer one is of
    /// our own files, and of no closure.
    fn copy(&self, paths: &[StorePath]) -> Result<Result<(), RunError>> {
        if paths.is_empty() {
            return Ok(Ok(()));
        }
        let (run, _scratch) = nix(&["nix-command"], self.scratch)?;
        let run = run.args(["copy", "--no-recursive", "--from"]).arg(self.spool.url());
        announced::copying(&self.spool, paths, || {
            let _effect = failpoint::mark("nix copy", &self.shown);
            trusting(run, self.settings).args(paths).deadline(time_left(self.until)).success().map(drop)
        })
    }

    /// The reason when a part of a closure is missing or wrong in the cache. What it advises is safe to follow: a push
    /// believes nothing that the cache says.
    fn faulty(&self, top: &StorePath, path: &StorePath, fault: &PathFault) -> FetchError {
        let (shown, text) = (&self.shown, fault.text());
        let what = if top == path {
            format!("{path} in the cache {shown}")
        } else {
            format!("the closure of {top} in the cache {shown} cannot be used: {path}")
        };
        match fault {
            // Its own words have what to do.
            PathFault::Withheld(e) => FetchError::Unreachable(e.to_string()),
            PathFault::Absent if top == path => FetchError::NotInCache(format!(
                "{top} is not in the cache {shown}; push it with 'omni-deploy push'"
            )),
            PathFault::Absent | PathFault::Lost(_) => FetchError::NotInCache(format!(
                "the closure of {top} is not whole in the cache {shown}: {path} {text}; push it again with \
                 'omni-deploy push'"
            )),
            PathFault::Unsigned => FetchError::Refused(format!(
                "{what} {text}; push it again from a machine whose key is among 'trustedPublicKeys' here"
            )),
            PathFault::Unreadable(_) => FetchError::Refused(format!(
                "{what} {text}; push it again with 'omni-deploy push', which writes it anew"
            )),
            PathFault::Altered(_) | PathFault::Unknown(_) => FetchError::Refused(format!(
                "{what} {text}; 'omni-deploy push --rewrite' writes it anew from the pushing machine's store"
            )),
        }
    }

    fn failed(&self, top: &StorePath, path: &StorePath, failure: &DownloadError) -> FetchError {
        match failure {
            DownloadError::Fault(fault) => self.faulty(top, path, fault),
            DownloadError::Cache(e) => FetchError::Unreachable(e.to_string()),
            DownloadError::Late => FetchError::Unreachable(format!(
                "cache {}: {path} had not arrived after {} min; what arrived is kept, and the next pass goes on \
                 there",
                self.shown,
                FETCH_WITHIN.as_secs() / 60
            )),
            DownloadError::Here(why) => FetchError::Failed(format!("cannot copy {path}: {why}")),
        }
    }

    fn why_not(&self, top: &StorePath, e: &RunError) -> FetchError {
        let stderr = match e {
            RunError::Failed { stderr, .. } => stderr,
            RunError::Deadline { .. } => {
                return FetchError::Failed(format!(
                    "nix did not get {top} into the store within the {} min of a fetch; what arrived is kept, and \
                     the next pass goes on there; check what else this machine is doing ('systemd-cgtop')",
                    FETCH_WITHIN.as_secs() / 60
                ));
            }
            e => return FetchError::Failed(format!("cannot copy {top}: {e}")),
        };
        let cause = cause(e, str::to_string);
        if store_trouble(stderr).is_none() && stderr.contains("signature") {
            return FetchError::Refused(format!(
                "nix rejects what {} has of the closure of {top}: {cause}; push it again from a machine whose key \
                 this host trusts ('trustedPublicKeys', or Nix's trusted-public-keys)",
                self.shown
            ));
        }
        let here = store_trouble(stderr).is_some() || cause.contains("No space left on device");
        let cause =
            with_room(cause, "'nix-collect-garbage -d' frees what no root holds, or give it more disk");
        let next = match here {
            true => "",
            false => {
                "; the next pass tries again; if it says the same, 'omni-deploy push --rewrite' writes the closure anew \
                 from the pushing machine's store"
            }
        };
        FetchError::Failed(format!("cannot copy {top}: {cause}{next}"))
    }
}

/// What of a group is still needed by a closure.
fn needed<'g>(group: &'g [Arc<VerifiedNarInfo>], closures: &Closures) -> Vec<&'g VerifiedNarInfo> {
    let needed: BTreeSet<&StorePath> = closures.values().flatten().map(|found| &found.info.path).collect();
    group.iter().map(Arc::as_ref).filter(|found| needed.contains(&found.info.path)).collect()
}

/// How long a call of Nix may still take.
fn time_left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now()).max(Duration::from_secs(1))
}

/// Closures of a cache that Nix itself speaks with: all in one `nix copy`, and if that fails, one by one.
fn through_nix(
    url: &str,
    settings: &Settings,
    mut left: Vec<StorePath>,
    scratch: &Path,
    until: Instant,
) -> Result<Reasons> {
    let cache = Cache { scratch: scratch.to_path_buf(), ..Cache::new(url, settings, Side::From) };
    match copy_through_nix(settings, &cache, &left, until) {
        Ok(()) => return Ok(Reasons::new()),
        Err(RunError::NotFound { program }) => return Err(RunError::NotFound { program }.into()),
        Err(_) => left = missing(&left)?,
    }
    let mut reasons = Reasons::new();
    for path in left {
        if let Err(e) = copy_through_nix(settings, &cache, std::slice::from_ref(&path), until) {
            let reason = why_not_through_nix(&cache, &path, &e);
            reasons.insert(path, reason);
        }
    }
    Ok(reasons)
}

fn copy_through_nix(
    settings: &Settings,
    cache: &Cache,
    paths: &[StorePath],
    until: Instant,
) -> Result<(), RunError> {
    let spawn = |e: Error| RunError::Spawn { program: "nix".into(), cause: e.to_string() };
    for some in paths.chunks(PER_CALL) {
        let (run, _scratch) = cache.nix(settings, Side::From, &["copy"]).map_err(spawn)?;
        let _effect = failpoint::mark("nix copy", &cache.shown);
        run.args(some).deadline(time_left(until)).success()?;
    }
    Ok(())
}

fn why_not_through_nix(cache: &Cache, path: &StorePath, e: &RunError) -> FetchError {
    let RunError::Failed { stderr, .. } = e else {
        return match e {
            RunError::Deadline { .. } => {
                FetchError::Unreachable(format!("cache {}: {}", cache.shown, cache.cause(e)))
            }
            e => FetchError::Failed(format!("cannot copy {path}: {}", cache.cause(e))),
        };
    };
    let cause = cache.cause(e);
    let has = |words: &[&str]| words.iter().any(|w| stderr.contains(w));
    if store_trouble(stderr).is_some() {
        FetchError::Failed(format!("cannot copy {path}: {cause}"))
    } else if has(&["signature"]) {
        FetchError::Refused(format!(
            "nix rejects what {} has of {path}: {cause}; push it again from a machine whose key is trusted here \
             ('trustedPublicKeys')",
            cache.shown
        ))
    } else if has(&["hash mismatch", "NAR", "compress", "archive", "unexpected end"]) {
        FetchError::Refused(format!(
            "what {} has of {path} is damaged: {cause}; take that path's narinfo and NAR out of the cache and push \
             it again",
            cache.shown
        ))
    } else if has(&["does not exist in", "is not valid", "don't know how to build"]) {
        FetchError::NotInCache(format!(
            "{path} is not in the cache {}; push it with 'omni-deploy push'",
            cache.shown
        ))
    } else if has(&["unable to download", "HTTP error", "cannot connect", "failed to start SSH"]) {
        FetchError::Unreachable(format!("cache {}: {cause}", cache.shown))
    } else {
        FetchError::Failed(format!("cannot copy {path}: {cause}"))
    }
}
