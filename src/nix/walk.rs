//! The walk through a cache: from the top of a closure down its narinfos, as far as this machine lacks paths. What a
//! narinfo refers to is asked for only when somebody vouches for that narinfo; bounded in paths, in bytes and in time.
//! Reads narinfos and nothing else, and changes nothing.

use super::narinfo::{MAX_BYTES, NarInfo, Warrant, references_first};
use crate::http::CONNECTIONS;
use crate::keys::PublicKey;
use crate::names::StorePath;
use crate::parallel;
use crate::store::{Store, StoreError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Requests at a time. Whoever walks has asked for something else before: that is one connection more.
const REQUESTS: usize = CONNECTIONS - 1;

/// How far a walk goes.
#[derive(Debug, Clone, Copy)]
pub struct WalkLimits {
    /// The most paths.
    pub paths: usize,
    /// The most bytes of narinfos.
    pub bytes: u64,
    /// Until when.
    pub until: Instant,
}

impl WalkLimits {
    /// Room for ten times the largest closures, and so long for it.
    pub fn within(time: Duration) -> Self {
        WalkLimits { paths: 50_000, bytes: 48 << 20, until: Instant::now() + time }
    }
}

/// What is wrong with one path in a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathFault {
    /// There is no narinfo.
    Absent,
    /// There is one, and it cannot be read: the reason.
    Unreadable(String),
    /// Nobody whom this machine trusts vouches for it.
    Unsigned,
    /// Its NAR's file is not there.
    Lost(String),
    /// Its NAR is not what was vouched for: the reason.
    Altered(String),
    /// Its NAR is compressed in a way that is not read here: the reason.
    Unknown(String),
    /// The cache answers, and does not give it out.
    Withheld(StoreError),
}

impl PathFault {
    /// The fault as a clause after the path's name.
    pub fn text(&self) -> String {
        match self {
            PathFault::Absent => "is not there".into(),
            PathFault::Unreadable(why) => format!("has a broken narinfo (it {why})"),
            PathFault::Unsigned => "has no signature by a key that is trusted here".into(),
            PathFault::Lost(url) => format!("has lost its file {url}"),
            PathFault::Altered(why) => format!("has a NAR that was altered or damaged (it {why})"),
            PathFault::Unknown(why) => format!("has a NAR that {why}"),
            PathFault::Withheld(e) => format!("is not given out ({e})"),
        }
    }
}

/// A narinfo that may be followed.
#[derive(Debug, Clone)]
pub struct VerifiedNarInfo {
    /// What it says, as far as somebody vouches for it; and where its NAR is.
    pub info: NarInfo,
    /// Who vouches for it; None where that is left to Nix's own settings.
    pub warrant: Option<Warrant>,
}

/// What was found below some top paths, as far as it is not here: the narinfos that may be followed, or what is wrong.
#[derive(Debug, Default)]
pub struct Walked(BTreeMap<StorePath, Result<Arc<VerifiedNarInfo>, PathFault>>);

/// Why a walk ended early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalkError {
    /// The cache did not answer or refused us.
    Cache(StoreError),
    /// It went on and on: the reason.
    Endless(String),
    /// Its time was over: where.
    Late(String),
    /// This machine's store did not say what it has: the reason.
    Here(String),
}

impl Walked {
    /// What of the closure of `top` is to be had: paths after what they refer to. The error is the first that is
    /// missing or wrong.
    pub fn closure(&self, top: &StorePath) -> Result<Vec<&Arc<VerifiedNarInfo>>, (StorePath, PathFault)> {
        let order = references_first([top], |path| match self.0.get(path) {
            Some(Ok(found)) => Ok(Some(&found.info.references)),
            Some(Err(fault)) => Err((path.clone(), fault.clone())),
            // What was not asked for is here.
            None => Ok(None),
        })?;
        Ok(order.into_iter().filter_map(|path| self.0.get(path)?.as_ref().ok()).collect())
    }
}

/// Says which of some paths this machine does not have; the error is the reason why it cannot.
pub type Lacking<'a> = dyn FnMut(&[StorePath]) -> Result<Vec<StorePath>, String> + 'a;

/// Walks the closures of `tops`, none of which is here. With `keys`, only narinfos that one of them signed, or that are
/// about a path named after its content, are followed; without, all.
pub fn walk(
    cache: &dyn Store,
    tops: &[StorePath],
    keys: &[PublicKey],
    lacking: &mut Lacking<'_>,
    limits: WalkLimits,
) -> Result<Walked, WalkError> {
    let mut walked = Walked::default();
    let mut seen: BTreeSet<StorePath> = tops.iter().cloned().collect();
    let mut next: Vec<StorePath> = seen.iter().cloned().collect();
    let bytes = AtomicU64::new(0);
    while !next.is_empty() {
        let mut references = BTreeSet::new();
        for (path, judged) in level(cache, &next, keys, limits, &bytes)? {
            if let Ok(found) = &judged {
                references.extend(found.info.references.iter().filter(|r| !seen.contains(r)).cloned());
                let paths = seen.len() + references.len();
                if paths > limits.paths {
                    return Err(WalkError::Endless(format!(
                        "at {path} the walk has come to {paths} paths, and no closure has more than {}",
                        limits.paths
                    )));
                }
            }
            walked.0.insert(path, judged.map(Arc::new));
        }
        let references: Vec<StorePath> = references.into_iter().collect();
        seen.extend(references.iter().cloned());
        next =
            if references.is_empty() { references } else { lacking(&references).map_err(WalkError::Here)? };
    }
    Ok(walked)
}

type Judged = (StorePath, Result<VerifiedNarInfo, PathFault>);

/// Asks for the narinfos of these paths, many at a time.
fn level(
    cache: &dyn Store,
    paths: &[StorePath],
    keys: &[PublicKey],
    limits: WalkLimits,
    bytes: &AtomicU64,
) -> Result<Vec<Judged>, WalkError> {
    parallel::try_map(paths, REQUESTS, |path| {
        if Instant::now() >= limits.until {
            return Err(WalkError::Late(format!("at {path} the time for the walk was over")));
        }
        let (judged, size) = ask(cache, path, keys).map_err(WalkError::Cache)?;
        if bytes.fetch_add(size, Ordering::Relaxed) + size > limits.bytes {
            let mib = limits.bytes >> 20;
            return Err(WalkError::Endless(format!(
                "at {path} the walk has read more than {mib} MiB of narinfos"
            )));
        }
        Ok((path.clone(), judged))
    })
}

/// Asks for one narinfo and judges it; with its size.
fn ask(
    cache: &dyn Store,
    path: &StorePath,
    keys: &[PublicKey],
) -> Result<(Result<VerifiedNarInfo, PathFault>, u64), StoreError> {
    let bytes = match cache.read(&NarInfo::key(path), MAX_BYTES) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Ok((Err(PathFault::Absent), 0)),
        Err(StoreError::TooLarge(_)) => {
            let why = format!("has more than {} MiB", MAX_BYTES >> 20);
            return Ok((Err(PathFault::Unreadable(why)), MAX_BYTES));
        }
        // Archived, say, or encrypted with another key: of one object that says nothing about the others.
        Err(e @ (StoreError::Denied(_) | StoreError::Refused(_))) => {
            return Ok((Err(PathFault::Withheld(e)), 0));
        }
        Err(e) => return Err(e),
    };
    Ok((judge(path, &bytes, keys), bytes.len() as u64))
}

/// What a narinfo that was asked for under the name of `path` is worth. Pure.
pub fn judge(path: &StorePath, bytes: &[u8], keys: &[PublicKey]) -> Result<VerifiedNarInfo, PathFault> {
    let info = NarInfo::parse(bytes).map_err(PathFault::Unreadable)?;
    if info.path != *path {
        return Err(PathFault::Unreadable(format!("is about {}", info.path)));
    }
    let warrant = info.warrant(keys);
    if warrant.is_none() && !keys.is_empty() {
        return Err(PathFault::Unsigned);
    }
    Ok(VerifiedNarInfo { info: info.vouched(keys), warrant })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::Sha256;
    use crate::keys::SecretKey;
    use crate::nix::local::tests::sign;
    use crate::nix::narinfo::Compression;
    use crate::store::Condition;
    use crate::store::dir::DirStore;
    use crate::store::tests::FaultyStore;

    fn path(n: usize) -> StorePath {
        StorePath::parse(&format!("/nix/store/{n:032}-p{n}")).unwrap()
    }

    fn put(cache: &dyn Store, n: usize, references: &[usize], key: Option<&SecretKey>) {
        let mut info = NarInfo {
            path: path(n),
            url: format!("nar/{n}.nar.zst"),
            compression: Compression::Zstd,
            file_hash: None,
            file_size: None,
            nar_hash: Sha256::of(b""),
            nar_size: 100,
            references: references.iter().map(|n| path(*n)).collect(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
        };
        if let Some(key) = key {
            sign(&mut info, key);
        }
        cache.put(&NarInfo::key(&path(n)), info.render().as_bytes(), &Condition::Always).unwrap();
    }

    fn limits() -> WalkLimits {
        WalkLimits::within(Duration::from_secs(600))
    }

    fn all(paths: &[StorePath]) -> Result<Vec<StorePath>, String> {
        Ok(paths.to_vec())
    }

    #[test]
    fn only_what_is_missing_here_is_asked_for_and_each_comes_after_what_it_refers_to() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DirStore::new(dir.path());
        put(&cache, 1, &[2, 3, 1], None);
        put(&cache, 2, &[3, 4], None);
        put(&cache, 3, &[5], None);
        // 4 is here, and what is below it is not looked at; 5 is a leaf.
        put(&cache, 5, &[], None);
        let mut asked = Vec::new();
        let walked = walk(
            &cache,
            &[path(1)],
            &[],
            &mut |paths| {
                asked.extend(paths.to_vec());
                Ok(paths.iter().filter(|p| **p != path(4)).cloned().collect())
            },
            limits(),
        )
        .unwrap();
        let order: Vec<_> = walked.closure(&path(1)).unwrap().iter().map(|f| f.info.path.clone()).collect();
        assert_eq!(order.len(), 4);
        let at = |n| order.iter().position(|p| *p == path(n)).unwrap();
        assert!(at(5) < at(3) && at(3) < at(2) && at(2) < at(1), "{order:?}");
        asked.sort();
        assert_eq!(asked, [path(2), path(3), path(4), path(5)]);
    }

    #[test]
    fn what_two_paths_refer_to_comes_before_both_whichever_is_met_first() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DirStore::new(dir.path());
        // One of the two refers to the other, once forwards and once backwards.
        for (top, first, second) in [(10, 11, 12), (20, 22, 21)] {
            put(&cache, top, &[first, second], None);
            put(&cache, first, &[second], None);
            put(&cache, second, &[], None);
            let walked = walk(&cache, &[path(top)], &[], &mut all, limits()).unwrap();
            let order: Vec<_> =
                walked.closure(&path(top)).unwrap().iter().map(|f| f.info.path.clone()).collect();
            assert_eq!(order, [path(second), path(first), path(top)]);
        }
    }

    #[test]
    fn nothing_below_a_narinfo_that_nobody_vouches_for_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DirStore::new(dir.path());
        let key = SecretKey::generate("here-1").unwrap();
        put(&cache, 1, &[2, 3], Some(&key));
        put(&cache, 2, &[4], None);
        put(&cache, 3, &[], Some(&key));
        let walked = walk(&cache, &[path(1)], &[key.public()], &mut all, limits()).unwrap();
        assert_eq!(walked.closure(&path(1)).unwrap_err(), (path(2), PathFault::Unsigned));
        assert_eq!(walked.closure(&path(3)).unwrap().len(), 1);
        assert!(!walked.0.contains_key(&path(4)));
        // The same cache for who has no keys: Nix's own settings decide later.
        let walked = walk(&cache, &[path(1)], &[], &mut all, limits()).unwrap();
        assert_eq!(walked.closure(&path(1)).unwrap_err(), (path(4), PathFault::Absent));
    }

    #[test]
    fn a_walk_without_end_ends_at_its_bounds_and_names_where() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DirStore::new(dir.path());
        for n in 0..50 {
            put(&cache, n, &[n + 1, n + 100], None);
        }
        let few = WalkLimits { paths: 20, ..limits() };
        let small = WalkLimits { bytes: 2000, ..limits() };
        let over = WalkLimits { until: Instant::now(), ..limits() };
        for limits in [few, small, over] {
            let ended = walk(&cache, &[path(0)], &[], &mut all, limits).unwrap_err();
            let late = limits.until == over.until;
            let (WalkError::Endless(why) | WalkError::Late(why)) = &ended else { panic!("{ended:?}") };
            assert!(why.contains("/nix/store/") && matches!(ended, WalkError::Late(_)) == late, "{ended:?}");
        }
        // Two that refer to each other are no walk without end.
        put(&cache, 200, &[201], None);
        put(&cache, 201, &[200], None);
        let walked = walk(&cache, &[path(200)], &[], &mut all, limits()).unwrap();
        assert_eq!(walked.closure(&path(200)).unwrap().len(), 2);
    }

    #[test]
    fn what_one_object_is_refused_for_is_a_fault_of_that_path_and_no_network_ends_the_walk() {
        let dir = tempfile::tempdir().unwrap();
        let cache = FaultyStore::new(dir.path());
        put(&cache, 1, &[2, 3], None);
        put(&cache, 2, &[], None);
        put(&cache, 3, &[], None);
        put(&cache, 4, &[3], None);
        let denied = StoreError::Denied("403 InvalidObjectState".into());
        cache.faults().refused.insert(NarInfo::key(&path(2)), denied.clone());
        let walked = walk(&cache, &[path(1), path(4)], &[], &mut all, limits()).unwrap();
        assert_eq!(walked.closure(&path(1)).unwrap_err(), (path(2), PathFault::Withheld(denied)));
        // What two closures have in common is held once.
        let (of_4, of_3) = (walked.closure(&path(4)).unwrap(), walked.closure(&path(3)).unwrap());
        assert!(of_4.len() == 2 && Arc::ptr_eq(of_4[0], of_3[0]));
        cache.faults().gone = true;
        let ended = walk(&cache, &[path(1)], &[], &mut all, limits()).unwrap_err();
        assert!(matches!(ended, WalkError::Cache(StoreError::Unreachable(_))), "{ended:?}");
    }

    #[test]
    fn a_narinfo_under_a_wrong_name_or_of_any_size_is_a_fault_of_that_path() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DirStore::new(dir.path());
        put(&cache, 1, &[2, 3], None);
        put(&cache, 3, &[], None);
        let other = fs_err::read(dir.path().join(NarInfo::key(&path(3)))).unwrap();
        cache.put(&NarInfo::key(&path(2)), &other, &Condition::Always).unwrap();
        let huge = vec![b'x'; MAX_BYTES as usize + 1];
        cache.put(&NarInfo::key(&path(3)), &huge, &Condition::Always).unwrap();
        let walked = walk(&cache, &[path(1)], &[], &mut all, limits()).unwrap();
        let texts: Vec<String> =
            walked.0.values().filter_map(|judged| judged.as_ref().err().map(PathFault::text)).collect();
        assert!(texts[0].contains("is about") && texts[1].contains("1 MiB"), "{texts:?}");
    }
}
