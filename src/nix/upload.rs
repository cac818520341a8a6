//! From the spool to the cache, many at a time: the NARs first, a path's narinfo when its NAR and the narinfos of all
//! that it refers to are acknowledged, and so the top's last. Whoever finds a narinfo in the cache finds all that it
//! leads to, whenever this ends. Holds no file in memory, removes each NAR from the spool once the cache has it, and
//! gives up altogether at the first refusal.

use super::local::Closure;
use super::narinfo::NarInfo;
use crate::failpoint;
use crate::http::CONNECTIONS;
use crate::names::StorePath;
use crate::parallel::locked;
use crate::store::{Store, StoreError, Upload, objects};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// From this size on a NAR counts as large: a few of them fill any line, and more would only share it.
const LARGE: u64 = 4 << 20;
/// How many large ones go up at a time.
const LARGE_AT_A_TIME: usize = 16;

/// The uploads of one push. Shared by those who upload ([`Uploads::work`]) and who brings them work
/// ([`Uploads::offer`]).
pub struct Uploads<'a> {
    cache: &'a dyn Store,
    stop: Arc<AtomicBool>,
    state: Mutex<UploadState>,
    /// There is something to do, or nothing any more.
    work: Condvar,
    /// There is more room in the spool.
    room: Condvar,
}

/// A path whose narinfo is to be written.
#[derive(Debug)]
struct Entry {
    /// The narinfo, once Nix has written it.
    text: Vec<u8>,
    /// How many acknowledgements it waits for: of its NAR, and of the narinfos that it refers to.
    blockers: usize,
    /// Whose narinfos refer to it.
    dependents: Vec<StorePath>,
}

/// A NAR's file. Two paths of the same content share one.
#[derive(Debug)]
struct Nar {
    file: PathBuf,
    size: u64,
    /// The paths that wait for it; None once the cache has it.
    waiting: Option<Vec<StorePath>>,
}

#[derive(Debug, Default)]
struct UploadState {
    entries: BTreeMap<StorePath, Entry>,
    nars: BTreeMap<String, Nar>,
    /// Narinfos that may be written.
    ready: VecDeque<StorePath>,
    /// Keys of NARs that nobody has begun yet.
    queued: VecDeque<String>,
    busy: usize,
    busy_large: usize,
    /// The bytes of the NARs in the spool.
    spooled: u64,
    /// Nothing more will be offered.
    closed: bool,
    failed: Option<StoreError>,
}

enum Job {
    Nar { key: String, file: PathBuf, size: u64 },
    Info { path: StorePath, text: Vec<u8> },
}

impl UploadState {
    fn next(&mut self) -> Option<Job> {
        // A narinfo lets others follow.
        if let Some(path) = self.ready.pop_front() {
            let text = self.entries.get_mut(&path).map(|e| std::mem::take(&mut e.text)).unwrap_or_default();
            return Some(Job::Info { path, text });
        }
        let may = |key: &String| {
            let large = self.nars.get(key).is_some_and(|nar| nar.size >= LARGE);
            !large || self.busy_large < LARGE_AT_A_TIME
        };
        let at = self.queued.iter().position(may)?;
        let key = self.queued.remove(at)?;
        let nar = self.nars.get(&key)?;
        self.busy_large += usize::from(nar.size >= LARGE);
        Some(Job::Nar { file: nar.file.clone(), size: nar.size, key })
    }

    /// One acknowledgement less to wait for.
    fn unblock(&mut self, path: &StorePath) {
        if let Some(entry) = self.entries.get_mut(path) {
            entry.blockers -= 1;
            if entry.blockers == 0 {
                self.ready.push_back(path.clone());
            }
        }
    }

    fn acknowledged(&mut self, job: Job) {
        let waiting = match job {
            Job::Nar { key, size, .. } => {
                self.busy_large -= usize::from(size >= LARGE);
                self.spooled -= size;
                self.nars.get_mut(&key).and_then(|nar| nar.waiting.take()).unwrap_or_default()
            }
            Job::Info { path, .. } => self.entries.remove(&path).map(|e| e.dependents).unwrap_or_default(),
        };
        waiting.iter().for_each(|path| self.unblock(path));
    }

    /// Whether nothing is left and nothing will come.
    fn is_done(&self) -> bool {
        self.closed && self.busy == 0 && self.ready.is_empty() && self.queued.is_empty()
    }
}

impl<'a> Uploads<'a> {
    /// For the paths `missing` of a closure. `stop` is set at the first failure, for who makes more meanwhile.
    pub fn new(
        cache: &'a dyn Store,
        closure: &Closure,
        missing: &[&StorePath],
        stop: Arc<AtomicBool>,
    ) -> Self {
        let entry = || Entry { text: Vec::new(), blockers: 1, dependents: Vec::new() };
        let mut entries: BTreeMap<StorePath, Entry> =
            missing.iter().map(|path| ((*path).clone(), entry())).collect();
        for path in missing {
            let references = closure.get(*path).map(|info| &info.references);
            for reference in references.into_iter().flatten().filter(|r| r != path) {
                if let Some(below) = entries.get_mut(reference) {
                    below.dependents.push((*path).clone());
                    if let Some(above) = entries.get_mut(*path) {
                        above.blockers += 1;
                    }
                }
            }
        }
        Uploads {
            cache,
            stop,
            state: Mutex::new(UploadState { entries, ..UploadState::default() }),
            work: Condvar::new(),
            room: Condvar::new(),
        }
    }

    /// How many threads have something to do.
    pub fn threads(&self) -> usize {
        self.lock().entries.len().saturating_mul(2).min(CONNECTIONS)
    }

    fn lock(&self) -> MutexGuard<'_, UploadState> {
        locked(&self.state)
    }

    /// Takes on a path that is whole in the spool: its narinfo's text, and the file with its NAR.
    pub fn offer(&self, info: &NarInfo, text: Vec<u8>, file: PathBuf, size: u64) {
        let mut state = self.lock();
        let Some(entry) = state.entries.get_mut(&info.path) else { return };
        entry.text = text;
        match state.nars.get_mut(&info.url).map(|nar| &mut nar.waiting) {
            None => {
                let waiting = Some(vec![info.path.clone()]);
                state.nars.insert(info.url.clone(), Nar { file, size, waiting });
                state.queued.push_back(info.url.clone());
                state.spooled += size;
            }
            Some(Some(paths)) => paths.push(info.path.clone()),
            // Nix may have written it again, since we had removed it.
            Some(None) => {
                drop(fs_err::remove_file(&file));
                state.unblock(&info.path);
            }
        }
        drop(state);
        self.work.notify_one();
    }

    /// Waits until the spool holds nothing, or so little that `more` bytes do not bring it above `limit`. False: there
    /// is no need for more, since the push has failed.
    pub fn wait_for_room(&self, more: u64, limit: u64) -> bool {
        let full = |state: &mut UploadState| {
            state.failed.is_none() && state.spooled > 0 && state.spooled.saturating_add(more) > limit
        };
        let state = self.room.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner);
        state.failed.is_none()
    }

    /// Says that nothing more will be offered.
    pub fn close(&self) {
        self.lock().closed = true;
        self.work.notify_all();
    }

    /// Gives up: `why` is what the push ends with, unless something failed before.
    pub fn fail(&self, why: StoreError) {
        self.lock().failed.get_or_insert(why);
        self.stop.store(true, Ordering::SeqCst);
        self.work.notify_all();
        self.room.notify_all();
    }

    /// Uploads until there is nothing left and nothing will come, or until something failed. For several threads.
    pub fn work(&self) {
        let mut state = self.lock();
        loop {
            if state.failed.is_some() || state.is_done() {
                return;
            }
            let Some(job) = state.next() else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.busy += 1;
            drop(state);
            let done = self.perform(&job);
            if let Err(e) = done {
                self.fail(e);
                return;
            }
            state = self.lock();
            let before = state.ready.len();
            state.acknowledged(job);
            state.busy -= 1;
            self.room.notify_all();
            // One of them is this thread's.
            for _ in 1..state.ready.len().saturating_sub(before) {
                self.work.notify_one();
            }
            if state.is_done() {
                self.work.notify_all();
            }
        }
    }

    fn perform(&self, job: &Job) -> Result<(), StoreError> {
        match job {
            Job::Nar { key, file, size } => {
                let open = objects::file(file);
                let upload = Upload { length: *size, content_type: "application/x-nix-nar", open: &open };
                let _effect = failpoint::mark("upload", key);
                self.cache.write_from(key, &upload)?;
                // What cannot be removed goes with the spool.
                drop(fs_err::remove_file(file));
                Ok(())
            }
            Job::Info { path, text } => {
                let open =
                    || -> io::Result<Box<dyn Read + Send>> { Ok(Box::new(io::Cursor::new(text.clone()))) };
                let content_type = "text/x-nix-narinfo";
                let upload = Upload { length: text.len() as u64, content_type, open: &open };
                let key = NarInfo::key(path);
                let _effect = failpoint::mark("upload", &key);
                self.cache.write_from(&key, &upload)
            }
        }
    }

    /// What came of it when all threads have ended.
    pub fn outcome(&self) -> Result<(), StoreError> {
        let mut state = self.lock();
        match (state.failed.take(), state.entries.keys().next()) {
            (Some(e), _) => Err(e),
            // Never said to be there because nothing failed.
            (None, Some(path)) => Err(StoreError::Refused(format!("{path} was not written; run it again"))),
            (None, None) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::local::tests::{info, path};
    use super::*;
    use crate::store::dir::DirStore;
    use crate::store::tests::FaultyStore;
    use std::collections::BTreeSet;

    /// A few levels of paths, each with a file of its own, but for the last two, whose content is the same.
    struct Levels {
        dir: tempfile::TempDir,
        closure: Closure,
        order: Vec<StorePath>,
    }

    impl Levels {
        fn new() -> Self {
            let paths: Vec<StorePath> = "0123456789".chars().map(|digit| path(digit, "x")).collect();
            let mut closure = Closure::new();
            for (n, path) in paths.iter().enumerate() {
                // Each refers to itself, to the one before and to the one at half its number.
                let references = [n, n.saturating_sub(1), n / 2].map(|n| &paths[n]);
                closure.insert(path.clone(), info(path, &references));
            }
            Levels { dir: tempfile::tempdir().unwrap(), closure, order: paths }
        }

        fn nar(&self, n: usize) -> String {
            format!("nar/{}.nar.zst", n.min(8))
        }

        /// Uploads all but the first path, which is there already.
        fn upload(&self, refused: &str, threads: usize) -> (Result<(), StoreError>, Vec<String>, bool) {
            let cache = FaultyStore::new(&self.dir.path().join("cache"));
            let why = StoreError::Denied(format!("cannot write {refused}"));
            cache.faults().refused.insert(refused.to_string(), why);
            let stop = Arc::new(AtomicBool::new(false));
            let missing: Vec<&StorePath> = self.order.iter().skip(1).collect();
            let uploads = Uploads::new(&cache, &self.closure, &missing, Arc::clone(&stop));
            std::thread::scope(|scope| {
                (0..threads).for_each(|_| drop(scope.spawn(|| uploads.work())));
                // The last first: nobody promises an order.
                for (n, path) in self.order.iter().enumerate().skip(1).rev() {
                    let file = self.dir.path().join(format!("{}", n.min(8)));
                    // Whole under another name first, as Nix does it.
                    let new = self.dir.path().join("new");
                    fs_err::write(&new, "content").unwrap();
                    fs_err::rename(&new, &file).unwrap();
                    let mut info = self.closure[path].clone();
                    info.url = self.nar(n);
                    uploads.offer(&info, info.render().into_bytes(), file, 7);
                }
                uploads.close();
            });
            (uploads.outcome(), cache.acknowledged(), stop.load(Ordering::SeqCst))
        }

        /// Whether nothing was acknowledged before what it leads to.
        fn is_in_order(&self, acknowledged: &[String]) -> bool {
            let mut there = BTreeSet::from([NarInfo::key(&self.order[0])]);
            acknowledged.iter().all(|key| {
                let of = self.order.iter().position(|path| NarInfo::key(path) == *key);
                let led_to = of.is_none_or(|n| {
                    let references = self.closure[&self.order[n]].references.iter();
                    there.contains(&self.nar(n))
                        && references
                            .filter(|r| **r != self.order[n])
                            .all(|r| there.contains(&NarInfo::key(r)))
                });
                there.insert(key.clone());
                led_to
            })
        }
    }

    #[test]
    fn a_narinfo_is_written_when_all_that_it_leads_to_is_acknowledged() {
        for threads in [1, 8, 64] {
            let levels = Levels::new();
            let (written, acknowledged, stopped) = levels.upload("", threads);
            // Two paths share a NAR, which may be written once more where Nix has written it again.
            assert!(written.is_ok() && !stopped);
            assert!(acknowledged.len() == 17, "{acknowledged:?}");
            assert!(levels.is_in_order(&acknowledged), "{acknowledged:?}");
            assert_eq!(acknowledged.last(), Some(&NarInfo::key(&levels.order[9])));
        }
    }

    #[test]
    fn what_is_refused_stops_the_rest_and_nothing_leads_to_it() {
        let levels = Levels::new();
        for (n, refused) in [(4, levels.nar(4)), (8, levels.nar(8)), (6, NarInfo::key(&levels.order[6]))] {
            let (written, acknowledged, stopped) = levels.upload(&refused, 8);
            assert!(
                matches!(&written, Err(StoreError::Denied(why)) if why.contains(&refused)),
                "{written:?}"
            );
            assert!(stopped && levels.is_in_order(&acknowledged));
            let above = levels.order.iter().skip(n).map(NarInfo::key);
            assert!(above.into_iter().all(|key| !acknowledged.contains(&key)), "{refused}: {acknowledged:?}");
        }
    }

    #[test]
    fn what_was_never_offered_is_never_said_to_be_written() {
        let levels = Levels::new();
        let cache = DirStore::new(levels.dir.path());
        let missing: Vec<&StorePath> = levels.order.iter().collect();
        let stop = Arc::new(AtomicBool::new(false));
        let uploads = Uploads::new(&cache, &levels.closure, &missing, stop);
        uploads.close();
        uploads.work();
        assert!(uploads.outcome().unwrap_err().to_string().contains("was not written"));
    }

    #[test]
    fn who_packs_waits_while_the_spool_is_full() {
        let levels = Levels::new();
        let cache = DirStore::new(&levels.dir.path().join("cache"));
        let missing = [&levels.order[0]];
        let uploads = Uploads::new(&cache, &levels.closure, &missing, Arc::new(AtomicBool::new(false)));
        // An empty spool takes what is larger than it: it could never be written otherwise.
        assert!(uploads.wait_for_room(100, 10));
        let file = levels.dir.path().join("0");
        fs_err::write(&file, "content").unwrap();
        let mut info = levels.closure[&levels.order[0]].clone();
        info.url = levels.nar(0);
        uploads.offer(&info, Vec::new(), file.clone(), 7);
        assert!(uploads.wait_for_room(3, 10));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| uploads.wait_for_room(4, 10));
            uploads.close();
            uploads.work();
            assert!(waiting.join().unwrap());
        });
        assert!(!file.exists());
        assert_eq!(uploads.outcome(), Ok(()));
    }
}
