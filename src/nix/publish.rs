//! A closure's way out: what the cache lacks, or has wrong, goes from the local store through Nix into a spool, and from
//! there up. Nothing that is signed or written comes from the cache; what the cache has is only measured
//! ([`super::present`]). Never deletes anything in a cache: what is wrong there is written over.

use super::local::{self, Closure};
use super::narinfo::{NarInfo, references_first};
use super::present::{self, AbsenceReason, Voucher};
use super::spool::{self, Spool};
use super::upload::Uploads;
use super::{cause, groups, nix, packing, with_news, with_params, with_room};
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::keys::{PublicKey, SecretKey};
use crate::log;
use crate::manifest::signature;
use crate::names::StorePath;
use crate::parallel::{joined, locked};
use crate::store::{self, CacheUrl, Condition, Store, StoreError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// So many bytes of NARs Nix is given to pack at a time; a single larger path is a batch of its own.
const BATCH: u64 = 256 << 20;
/// So many bytes of NARs may lie in the spool before Nix is given more.
const SPOOL_LIMIT: u64 = 512 << 20;
/// How often at least the spool is looked at while Nix writes there.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// The name of our spools.
const WORK: &str = "push";
/// How many faults are told one by one.
const TOLD: usize = 8;
/// What a cache says of itself: the key, and what must be there.
const CACHE_INFO: (&str, &str) = ("nix-cache-info", "StoreDir: /nix/store");

/// What of a closure is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// What the cache does not have as this machine has it.
    Missing,
    /// Everything, whatever is there: also a NAR that has the right size and another content.
    Everything,
}

/// What [`publish`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// How many paths the whole closure has, which is in the cache now.
    pub paths: usize,
    /// Its files together, compressed; None where only Nix can look.
    pub bytes: Option<u64>,
    /// How many of its paths were written; None where only Nix knows.
    pub written: Option<usize>,
}

/// Brings the closures of `tops` into the configured cache, signed if there is a key. `shared` is the store of the
/// manifest, whose connections are used where it is the cache too. `on_line` gets Nix's lines as they come.
pub fn publish(
    settings: &Settings,
    tops: &[StorePath],
    scope: Scope,
    shared: Option<&Arc<dyn Store>>,
    on_line: &mut dyn FnMut(&str),
) -> Result<Published> {
    let url = match &settings.cache {
        CacheUrl::Nix(url) => return super::publish_through_nix(url, settings, tops, on_line),
        CacheUrl::Store(url) => url,
    };
    let cache = match shared.filter(|_| *url == settings.store) {
        Some(shared) => Arc::clone(shared),
        None => store::open(url)?,
    };
    let key = settings.secret_key_file.as_deref().map(SecretKey::read).transpose()?.map(|key| key.public());
    // Those whose signatures count: those that are trusted, and our own.
    let keys: Vec<PublicKey> = signature::trusted(settings)?.into_iter().chain(key.clone()).collect();
    let closure = local::read(tops)?;
    let shown = settings.cache.to_string();
    let found = look(cache.as_ref(), &closure, scope, &keys)?;
    tell(&found.faults, &shown);
    let published = |more: u64, written: usize| Published {
        paths: closure.len(),
        bytes: Some(found.present.values().fold(more, |sum, size| sum.saturating_add(*size))),
        written: Some(written),
    };
    // Also where nothing is to be written now: the push that was killed may have come to that. What cannot be removed
    // hinders none.
    spool::clear_idle(&spool::home(spool::Of::User), WORK);
    if found.faults.is_empty() {
        return Ok(published(0, 0));
    }
    let mut missing = references_first(closure.keys(), |path| {
        Ok::<_, Error>(closure.get(path).map(|info| &info.references))
    })?;
    missing.retain(|path| found.faults.contains_key(*path));
    let copy = Copy {
        settings,
        closure: &closure,
        missing: &missing,
        key: key.as_ref(),
        keys: &keys,
        shown: &shown,
    };
    let bytes = copy.run(cache.as_ref(), on_line)?;
    Ok(published(bytes, missing.len()))
}

/// What the cache has, and that it says what it is for.
fn look(
    cache: &dyn Store,
    closure: &Closure,
    scope: Scope,
    keys: &[PublicKey],
) -> Result<present::CacheContents, StoreError> {
    std::thread::scope(|scope_of_threads| {
        let named = scope_of_threads.spawn(|| name(cache));
        let found = match scope {
            Scope::Missing => present::look(cache, closure, keys),
            Scope::Everything => Ok(present::CacheContents {
                faults: closure.keys().map(|path| (path.clone(), AbsenceReason::Absent)).collect(),
                ..present::CacheContents::default()
            }),
        };
        joined(named)?;
        found
    })
}

/// Makes a folder or a bucket a binary cache, as Nix does.
fn name(cache: &dyn Store) -> Result<(), StoreError> {
    let (key, line) = CACHE_INFO;
    let there = match cache.read(key, 64 << 10) {
        Ok(Some(bytes)) => String::from_utf8_lossy(&bytes).lines().any(|l| l.trim() == line),
        Ok(None) | Err(StoreError::TooLarge(_)) => false,
        Err(e) => return Err(e),
    };
    if !there {
        cache.put(key, format!("{line}\n").as_bytes(), &Condition::Always)?;
    }
    Ok(())
}

/// Names what is wrong in the cache.
fn tell(faults: &BTreeMap<StorePath, AbsenceReason>, shown: &str) {
    let wrong: Vec<_> = faults.iter().filter(|(_, fault)| **fault != AbsenceReason::Absent).collect();
    for (path, fault) in wrong.iter().take(TOLD) {
        log::warning(format!("in {shown} {path} {fault}; writing it anew"));
    }
    if wrong.len() > TOLD {
        log::warning(format!("the same or the like of {} more paths", wrong.len() - TOLD));
    }
    let forged = |fault: &AbsenceReason| matches!(fault, AbsenceReason::Differs { by: Voucher::Nobody, .. });
    if wrong.iter().any(|(_, fault)| forged(fault)) {
        log::warning(format!(
            "check who can write to {shown}: hosts reject what no trusted key has signed, and no push of yours \
             writes that"
        ));
    }
}

/// One copy of paths from the local store into a cache.
struct Copy<'a> {
    settings: &'a Settings,
    closure: &'a Closure,
    /// In an order in which references come first.
    missing: &'a [&'a StorePath],
    key: Option<&'a PublicKey>,
    keys: &'a [PublicKey],
    shown: &'a str,
}

/// The paths that Nix has not written into the spool yet, and what it wrote.
struct Awaited<'a> {
    paths: BTreeMap<String, &'a NarInfo>,
    bytes: u64,
    /// How many carry no signature that counts here.
    unsigned: usize,
}

impl Copy<'_> {
    /// Copies; the sizes of the NAR files together.
    fn run(&self, cache: &dyn Store, on_line: &mut dyn FnMut(&str)) -> Result<u64> {
        let spool = Spool::open(&spool::home(spool::Of::User), WORK)?;
        // What an earlier push left was made for it, and is made again.
        spool.clear(|_| false)?;
        self.name_references(&spool)?;
        let stop = Arc::new(AtomicBool::new(false));
        let uploads = Uploads::new(cache, self.closure, self.missing, Arc::clone(&stop));
        let paths = self.missing.iter().filter_map(|path| self.closure.get(*path));
        let awaited = Mutex::new(Awaited {
            paths: paths.map(|info| (NarInfo::key(&info.path), info)).collect(),
            bytes: 0,
            unsigned: 0,
        });
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..uploads.threads() {
                scope.spawn(|| uploads.work());
            }
            scope.spawn(|| {
                // Hands over what Nix writes, while it writes.
                while !ended.load(Ordering::SeqCst) && !stop.load(Ordering::SeqCst) {
                    let since = Instant::now();
                    if let Err(e) = self.collect(&spool, &uploads, &awaited) {
                        uploads.fail(StoreError::Refused(e.to_string()));
                    }
                    // A large spool takes its time to list: not more of ours than a tenth.
                    std::thread::sleep(LOOK_EVERY.max(since.elapsed() * 10));
                }
            });
            match self.pack(&spool, &uploads, &awaited, &stop, on_line) {
                Ok(()) => uploads.close(),
                // Where an upload has failed, Nix was stopped for it: the first failure is what counts.
                Err(e) => uploads.fail(StoreError::Refused(e.to_string())),
            }
            ended.store(true, Ordering::SeqCst);
        });
        uploads.outcome()?;
        // What cannot be removed goes with the next push.
        drop(spool.clear(|_| false));
        let awaited = locked(&awaited);
        if awaited.unsigned > 0 {
            log::warning(format!(
                "{} of the paths in {} carry no signature by a key that is trusted here, and hosts with these keys \
                 reject them; set 'secretKeyFile' and push again",
                awaited.unsigned, self.shown
            ));
        }
        Ok(awaited.bytes)
    }

    /// Puts narinfos of what is in the cache already into the spool, made from the local store: Nix writes no path whose
    /// references its cache does not know.
    fn name_references(&self, spool: &Spool) -> Result<()> {
        let missing: BTreeSet<&StorePath> = self.missing.iter().copied().collect();
        let references =
            self.missing.iter().filter_map(|path| self.closure.get(*path)).flat_map(|i| &i.references);
        for path in references.collect::<BTreeSet<_>>().difference(&missing) {
            if let Some(info) = self.closure.get(*path) {
                fs_err::write(spool.file(&NarInfo::key(path)), info.render())?;
            }
        }
        Ok(())
    }

    /// Has Nix pack and sign the missing paths into the spool, a batch at a time, so that the spool does not grow beyond
    /// its limit.
    fn pack(
        &self,
        spool: &Spool,
        uploads: &Uploads<'_>,
        awaited: &Mutex<Awaited<'_>>,
        stop: &Arc<AtomicBool>,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<()> {
        let url = with_params(&spool.url(), &packing(self.settings));
        let clean = |text: &str| text.replace(&url, self.shown).replace(&spool.url(), self.shown);
        let size = |path: &&StorePath| self.closure.get(*path).map_or(0, |info| info.nar_size);
        for batch in groups(self.missing, BATCH, size) {
            let bytes = batch.iter().map(size).fold(0, u64::saturating_add);
            if !uploads.wait_for_room(bytes, SPOOL_LIMIT) {
                return Ok(());
            }
            let (run, _scratch) = nix(&["nix-command"], spool.dir())?;
            let run = run.args(["copy", "--no-recursive", "--to", &url]).args(batch).stop(stop);
            let _effect = failpoint::mark("nix copy", self.shown);
            with_news(run, clean, on_line).map_err(|e| {
                let room = format!(
                    "make room where {} is, or set XDG_CACHE_HOME to a folder on another disk",
                    spool.dir().display()
                );
                Error::new(format!("nix could not pack it: {}", with_room(cause(&e, clean), &room)))
            })?;
            self.collect(spool, uploads, awaited)?;
            let awaited = locked(awaited);
            if let Some(path) = batch.iter().find(|path| awaited.paths.contains_key(&NarInfo::key(path))) {
                return Err(Error::new(format!(
                    "nix copy succeeded but did not write {path} to {}; check what else writes there",
                    spool.dir().display()
                )));
            }
        }
        Ok(())
    }

    /// Looks what is new in the spool, checks it and hands it over.
    fn collect(&self, spool: &Spool, uploads: &Uploads<'_>, awaited: &Mutex<Awaited<'_>>) -> Result<()> {
        // One at a time: each path is handed over once.
        let mut awaited = locked(awaited);
        if awaited.paths.is_empty() {
            return Ok(());
        }
        for entry in fs_err::read_dir(spool.dir())? {
            let Ok(name) = entry?.file_name().into_string() else { continue };
            let Some(local) = awaited.paths.remove(&name) else { continue };
            let text = fs_err::read(spool.file(&name))?;
            // Nix writes the NAR before its narinfo, and each under another name first.
            let info = present::agrees(&text, local, self.key).map_err(|why| {
                Error::new(format!(
                    "the narinfo that nix wrote of {} {why}; it was not uploaded: 'nix-store --verify-path {}' tells \
                     whether the path is damaged",
                    local.path, local.path
                ))
            })?;
            let file = spool.file(&info.url);
            let size = match info.file_size {
                Some(size) => size,
                None => fs_err::metadata(&file)?.len(),
            };
            awaited.bytes = awaited.bytes.saturating_add(size);
            awaited.unsigned += usize::from(!self.keys.is_empty() && info.warrant(self.keys).is_none());
            // What a store once took in with a path from a cache is not handed on.
            let text = match info.planted() {
                None => text,
                Some(_) => info.clone().without_planted().render().into_bytes(),
            };
            uploads.offer(&info, text, file, size);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::local::tests::{info, path};
    use super::*;

    #[test]
    fn nix_packs_no_more_at_a_time_than_the_spool_may_hold() {
        let paths: Vec<StorePath> = ['0', '1', '2', '3', '4', '5'].map(|digit| path(digit, "x")).into();
        let sizes = [BATCH / 2, BATCH / 2, 1, BATCH * 9, 1, u64::MAX];
        let closure: Closure = paths
            .iter()
            .zip(sizes)
            .map(|(path, size)| (path.clone(), NarInfo { nar_size: size, ..info(path, &[]) }))
            .collect();
        let paths: Vec<&StorePath> = paths.iter().collect();
        let counts = |paths: &[&StorePath]| -> Vec<usize> {
            groups(paths, BATCH, |path| closure[*path].nar_size).map(<[_]>::len).collect()
        };
        assert_eq!(counts(&paths), [2, 1, 1, 1, 1]);
        assert_eq!(counts(&[]), [0; 0]);
    }
}
