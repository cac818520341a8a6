//! What is in a binary cache, read without Nix: narinfos, the references between them, and whether the NAR
//! files they promise are there. It never changes the cache but for [`forget`], and never judges signatures;
//! that is Nix's affair.

use crate::names::{STORE_DIR, StorePath};
use crate::store::{Got, Store, StoreError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Condvar, Mutex, PoisonError};

/// The most bytes of a narinfo that are read; thousands of references fit.
const NARINFO_LIMIT: u64 = 1 << 20;
/// Requests at a time.
const THREADS: usize = 8;

/// What a narinfo says, as far as completeness goes. The form is Nix's (`HASH.narinfo`, lines of `Key: value`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NarInfo {
    /// The path it is about.
    pub path: StorePath,
    /// The NAR file's key.
    pub url: String,
    /// The NAR file's size in bytes, if it says so.
    pub file_size: Option<u64>,
    /// The path's size when it is unpacked, in bytes, if it says so.
    pub nar_size: Option<u64>,
    /// What the path refers to, itself left out.
    pub references: Vec<StorePath>,
    /// The names of the keys that signed it.
    pub signed_by: Vec<String>,
}

impl NarInfo {
    /// Reads a narinfo; the error is the reason alone.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut fields: BTreeMap<&str, &str> = BTreeMap::new();
        let mut signed_by = Vec::new();
        for line in text.lines().filter(|l| !l.is_empty()) {
            let (name, value) = line.split_once(':').ok_or_else(|| format!("has the line {line:?}"))?;
            let value = value.trim();
            if name == "Sig" {
                signed_by.extend(value.split_once(':').map(|(key, _)| key.to_string()));
            } else {
                fields.insert(name, value);
            }
        }
        let field = |name: &str| fields.get(name).copied().ok_or_else(|| format!("has no {name}"));
        let path = field("StorePath")?;
        let path =
            StorePath::parse(path).map_err(|why| format!("has the StorePath {path:?}, which {why}"))?;
        let mut references = Vec::new();
        for base in field("References")?.split_whitespace() {
            let reference = StorePath::parse(&format!("{STORE_DIR}/{base}"))
                .map_err(|why| format!("has the reference {base:?}, which {why}"))?;
            if reference != path {
                references.push(reference);
            }
        }
        let url = field("URL")?;
        if !url.starts_with("nar/") || !crate::bridge::is_cache_key(url) {
            return Err(format!("has the URL {url:?}, which is no file below nar/"));
        }
        let size = |name: &str| match fields.get(name) {
            None => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| format!("has the {name} {text:?}")),
        };
        let (file_size, nar_size) = (size("FileSize")?, size("NarSize")?);
        Ok(NarInfo { path, url: url.to_string(), file_size, nar_size, references, signed_by })
    }
}

/// What is wrong with one path in a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// There is no narinfo.
    Absent,
    /// There is one, and it cannot be believed: the reason.
    BadInfo(String),
    /// Its NAR file is missing, or has another size than promised (found, promised).
    BadNar {
        /// The NAR file's key.
        url: String,
        /// Its size and the promised one; None: there is no such file.
        sizes: Option<(u64, u64)>,
    },
}

impl Fault {
    /// The fault as a clause after the path's name.
    pub fn text(&self) -> String {
        match self {
            Fault::Absent => "is not there".into(),
            Fault::BadInfo(why) => format!("has a broken narinfo (it {why})"),
            Fault::BadNar { url, sizes: None } => format!("has lost its file {url}"),
            Fault::BadNar { url, sizes: Some((found, promised)) } => {
                format!("has the file {url} with {found} bytes instead of {promised}")
            }
        }
    }
}

/// What was found in a cache below some top paths.
#[derive(Debug, Default)]
pub struct Inspection {
    /// The narinfos that could be read.
    pub infos: BTreeMap<StorePath, NarInfo>,
    /// What is wrong.
    pub faults: BTreeMap<StorePath, Fault>,
}

impl Inspection {
    /// The size of all NAR files, in bytes.
    pub fn bytes(&self) -> u64 {
        self.infos.values().filter_map(|i| i.file_size).sum()
    }

    /// The paths without a signature by that key.
    pub fn unsigned_by(&self, key: &str) -> Vec<StorePath> {
        let unsigned = |i: &&NarInfo| !i.signed_by.iter().any(|k| k == key);
        self.infos.values().filter(unsigned).map(|i| i.path.clone()).collect()
    }

    /// The first fault in the closure of `top` that `counts`.
    pub fn fault_below(
        &self,
        top: &StorePath,
        counts: &dyn Fn(&StorePath) -> bool,
    ) -> Option<(&StorePath, &Fault)> {
        let mut seen = BTreeSet::from([top]);
        let mut next = vec![top];
        while let Some(path) = next.pop() {
            if let Some(found) = self.faults.get_key_value(path).filter(|_| counts(path)) {
                return Some(found);
            }
            let references = self.infos.get(path).map(|i| i.references.as_slice()).unwrap_or_default();
            next.extend(references.iter().filter(|r| seen.insert(r)));
        }
        None
    }
}

/// What a walk asks the cache.
enum Ask<'a> {
    /// Everything, NAR files included.
    Whole,
    /// The narinfos of what is not here already; what is here has all it refers to.
    Lacking(&'a (dyn Fn(&StorePath) -> bool + Sync)),
}

struct Walk {
    next: Vec<StorePath>,
    seen: BTreeSet<StorePath>,
    busy: usize,
    found: Inspection,
    failed: Option<StoreError>,
}

/// Walks the closures of `tops` in the cache itself, several requests at a time. An error is the first that
/// the cache gave; what is merely missing is in the result.
pub fn inspect(cache: &dyn Store, tops: &[StorePath]) -> Result<Inspection, StoreError> {
    walk(cache, tops, &Ask::Whole)
}

/// How many bytes the closures of `tops` will take here, unpacked, besides what `is_here`. What the cache does
/// not say counts nothing.
pub fn lacking(
    cache: &dyn Store,
    tops: &[StorePath],
    is_here: &(dyn Fn(&StorePath) -> bool + Sync),
) -> Result<u64, StoreError> {
    let found = walk(cache, tops, &Ask::Lacking(is_here))?;
    Ok(found.infos.values().filter_map(|i| i.nar_size).fold(0, u64::saturating_add))
}

fn walk(cache: &dyn Store, tops: &[StorePath], ask: &Ask) -> Result<Inspection, StoreError> {
    let seen: BTreeSet<StorePath> = tops.iter().cloned().collect();
    let walk = Mutex::new(Walk {
        next: seen.iter().cloned().collect(),
        seen,
        busy: 0,
        found: Inspection::default(),
        failed: None,
    });
    let changed = Condvar::new();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| walk_on(cache, &walk, &changed, ask));
        }
    });
    let walk = walk.into_inner().unwrap_or_else(PoisonError::into_inner);
    match walk.failed {
        Some(e) => Err(e),
        None => Ok(walk.found),
    }
}

fn walk_on(cache: &dyn Store, walk: &Mutex<Walk>, changed: &Condvar, ask: &Ask) {
    let mut state = walk.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if state.failed.is_some() {
            return;
        }
        let Some(path) = state.next.pop() else {
            if state.busy == 0 {
                return;
            }
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        state.busy += 1;
        drop(state);
        let info = read_info(cache, &path);
        if let Ok(Ok(info)) = &info {
            // Its references are there for the others while this thread asks for the NAR.
            let mut state = walk.lock().unwrap_or_else(PoisonError::into_inner);
            let wanted = |path: &StorePath| match ask {
                Ask::Whole => true,
                Ask::Lacking(is_here) => !is_here(path),
            };
            for reference in info.references.iter().filter(|r| wanted(r)) {
                if state.seen.insert(reference.clone()) {
                    state.next.push(reference.clone());
                }
            }
            changed.notify_all();
        }
        let judged = info.and_then(|info| match info {
            Ok(info) if matches!(ask, Ask::Lacking(_)) => Ok((Some(info), None)),
            Ok(info) => nar_fault(cache, &info).map(|fault| (Some(info), fault)),
            Err(fault) => Ok((None, Some(fault))),
        });
        state = walk.lock().unwrap_or_else(PoisonError::into_inner);
        state.busy -= 1;
        match judged {
            Err(e) => state.failed = Some(e),
            Ok((info, fault)) => {
                state.found.infos.extend(info.map(|i| (path.clone(), i)));
                state.found.faults.extend(fault.map(|f| (path, f)));
            }
        }
        changed.notify_all();
    }
}

fn info_key(path: &StorePath) -> String {
    format!("{}.narinfo", path.hash())
}

fn read_info(cache: &dyn Store, path: &StorePath) -> Result<Result<NarInfo, Fault>, StoreError> {
    let bytes = match cache.get(&info_key(path), None, NARINFO_LIMIT) {
        Ok(Got::Found { bytes, .. }) => bytes,
        Ok(Got::Missing | Got::NotModified) => return Ok(Err(Fault::Absent)),
        Err(StoreError::TooLarge(_)) => return Ok(Err(Fault::BadInfo("is larger than 1 MiB".into()))),
        Err(e) => return Err(e),
    };
    Ok(match NarInfo::parse(&String::from_utf8_lossy(&bytes)) {
        Ok(info) if info.path == *path => Ok(info),
        Ok(info) => Err(Fault::BadInfo(format!("is about {}", info.path))),
        Err(why) => Err(Fault::BadInfo(why)),
    })
}

fn nar_fault(cache: &dyn Store, info: &NarInfo) -> Result<Option<Fault>, StoreError> {
    let sizes = match (cache.size(&info.url)?, info.file_size) {
        (None, _) => None,
        (Some(found), Some(promised)) if found != promised => Some((found, promised)),
        (Some(_), _) => return Ok(None),
    };
    Ok(Some(Fault::BadNar { url: info.url.clone(), sizes }))
}

/// Takes broken entries out of the cache, so that the next copy, which believes every narinfo it finds, writes
/// them anew.
pub fn forget(cache: &dyn Store, faults: &BTreeMap<StorePath, Fault>) -> Result<(), StoreError> {
    for (path, fault) in faults {
        match fault {
            Fault::Absent => continue,
            Fault::BadInfo(_) | Fault::BadNar { sizes: None, .. } => {}
            Fault::BadNar { url, sizes: Some(_) } => cache.delete(url)?,
        }
        cache.delete(&info_key(path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "StorePath: /nix/store/3037rf1n52a6y74sx0qhg518wsyfsmny-b\n\
        URL: nar/05xj9al5a0xy58n93097hk5kg3gqrip8a9a1qapwzh46hvl9qh62.nar.zst\n\
        Compression: zstd\nFileHash: sha256:05xj9al5a0xy58n93097hk5kg3gqrip8a9a1qapwzh46hvl9qh62\n\
        FileSize: 124\nNarHash: sha256:156pfjrmv54vh5n3610byyx75nmv4dl63ylrs0mg36ysflwrgc4q\nNarSize: 160\n\
        References: wiklbi1mvf7va1azpbpfpy6bsfpffg2z-a 3037rf1n52a6y74sx0qhg518wsyfsmny-b\n\
        Deriver: 0zix1dpqqm54fl3j4qz1j7yfb2y6fwj7-b.drv\nSig: one-1:AAAA==\nSig: two-1:BBBB==\n";

    fn path(base: &str) -> StorePath {
        StorePath::parse(&format!("{STORE_DIR}/{base}")).unwrap()
    }

    #[test]
    fn a_narinfo_as_nix_writes_it_is_read() {
        let info = NarInfo::parse(INFO).unwrap();
        assert_eq!(info.path, path("3037rf1n52a6y74sx0qhg518wsyfsmny-b"));
        assert_eq!(info.references, [path("wiklbi1mvf7va1azpbpfpy6bsfpffg2z-a")]);
        assert_eq!((info.file_size, info.signed_by.join(" ").as_str()), (Some(124), "one-1 two-1"));
        let none = INFO.replace("wiklbi1mvf7va1azpbpfpy6bsfpffg2z-a 3037rf1n52a6y74sx0qhg518wsyfsmny-b", "");
        assert_eq!(NarInfo::parse(&none).unwrap().references, []);
    }

    #[test]
    fn a_narinfo_that_points_elsewhere_or_is_cut_is_refused() {
        for (from, to) in [
            ("URL: nar/", "URL: ../nar/"),
            ("URL: nar/", "URL: nar/../"),
            ("URL: nar/", "URL: https://example.org/"),
            ("StorePath: /nix/store/", "StorePath: /gnu/store/"),
            ("wiklbi1mvf7va1azpbpfpy6bsfpffg2z-a", "../../etc/passwd"),
            ("FileSize: 124", "FileSize: x"),
            ("References:", "Referenzen:"),
            ("Compression: zstd", "garbage"),
        ] {
            assert!(NarInfo::parse(&INFO.replace(from, to)).is_err(), "{to} passed");
        }
        assert!(NarInfo::parse("").is_err());
    }

    #[test]
    fn a_fault_deep_in_a_closure_is_found_from_its_top_and_from_no_other() {
        let (a, b, c) = (
            path("3037rf1n52a6y74sx0qhg518wsyfsmny-a"),
            path("wiklbi1mvf7va1azpbpfpy6bsfpffg2z-b"),
            path("0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-c"),
        );
        let info = |p: &StorePath, refs: &[&StorePath]| NarInfo {
            nar_size: None,
            path: p.clone(),
            url: "nar/x".into(),
            file_size: Some(1),
            references: refs.iter().map(|r| (*r).clone()).collect(),
            signed_by: Vec::new(),
        };
        let mut found = Inspection::default();
        // a and b refer to each other: a walk must end all the same.
        found.infos.extend([(a.clone(), info(&a, &[&b])), (b.clone(), info(&b, &[&a]))]);
        assert_eq!(found.fault_below(&a, &|_| true), None);
        found.infos.insert(b.clone(), info(&b, &[&a, &c]));
        found.faults.insert(c.clone(), Fault::Absent);
        assert_eq!(found.fault_below(&a, &|_| true), Some((&c, &Fault::Absent)));
        assert_eq!(found.fault_below(&a, &|p| *p != c), None);
        assert_eq!((found.bytes(), found.unsigned_by("k").len()), (2, 2));
    }

    #[test]
    fn what_a_fetch_will_take_counts_each_lacking_path_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = crate::store::dir::DirStore::new(dir.path());
        let path = |digit: char, name: &str| {
            StorePath::parse(&format!("/nix/store/{}-{name}", digit.to_string().repeat(32))).unwrap()
        };
        let (top, shared, here) = (path('1', "top"), path('2', "shared"), path('3', "here"));
        for (path, size, references) in [
            (&top, 1000, vec![&shared, &here]),
            (&shared, 200, vec![&shared]),
            (&here, 30_000, vec![&shared]),
        ] {
            let references: Vec<&str> = references.into_iter().map(StorePath::base).collect();
            let text = format!(
                "StorePath: {path}\nURL: nar/{}.nar.zst\nNarSize: {size}\nReferences: {}\n",
                path.hash(),
                references.join(" ")
            );
            cache.put(&info_key(path), text.as_bytes(), &crate::store::When::Always).unwrap();
        }
        assert_eq!(lacking(&cache, std::slice::from_ref(&top), &|p| *p == here), Ok(1200));
        assert_eq!(lacking(&cache, &[top], &|_| false), Ok(31_200));
    }
}
