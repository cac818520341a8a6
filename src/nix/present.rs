//! Which paths of a closure a cache has: every narinfo and every NAR's size is asked for, many at a time, and held against
//! what the local store says. A store that lists sizes is asked for a list of them beside the narinfos. A narinfo that says something else, that nobody trusted vouches for, or whose NAR is not
//! there is a fault, to be named and written over. Nothing in a cache is believed because it is there, and nothing is
//! written here.

use super::local::Closure;
use super::narinfo::{Compression, MAX_BYTES, MAX_SIGNATURES, NarInfo};
use crate::http::CONNECTIONS;
use crate::keys::PublicKey;
use crate::names::StorePath;
use crate::parallel;
use crate::store::{Store, StoreError};
use std::collections::BTreeMap;
use std::fmt;

/// The bytes of what a narinfo says beside the local store: signatures, a content address, where its file is.
const OTHER_FIELDS: u64 = 4096 + 256 * MAX_SIGNATURES as u64;

/// Why a path does not count as being in a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AbsenceReason {
    /// There is no narinfo.
    Absent,
    /// There is one that is none: the reason.
    Unreadable(String),
    /// It says something else than the local store.
    Differs {
        /// The field.
        field: &'static str,
        /// Who vouches for what it says.
        by: Voucher,
    },
    /// No key that is trusted here has signed it.
    Unsigned,
    /// A field that no signature covers is nothing for Nix: its name.
    Planted(&'static str),
    /// It names a compression that hosts do not unpack.
    Packed,
    /// Its NAR file is missing.
    NoNar(String),
    /// Its NAR file has another size than promised.
    NarSize {
        /// The file's key.
        url: String,
        /// Its size.
        found: u64,
        /// What the narinfo says.
        promised: u64,
    },
}

/// Who vouches for a narinfo that differs from the local store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Voucher {
    /// A key that is trusted here: it is another build of the same path.
    Trusted,
    /// Nobody whose key is trusted here.
    Nobody,
    /// Cannot be told, since there are no keys here.
    Unknown,
}

/// The fault as a clause after the path's name.
impl fmt::Display for AbsenceReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AbsenceReason::Absent => f.write_str("is not there"),
            AbsenceReason::Unreadable(why) => write!(f, "has a broken narinfo (it {why})"),
            AbsenceReason::Differs { field, by: Voucher::Trusted } => {
                write!(f, "has the narinfo of another build (its {field} is not that of this machine's)")
            }
            AbsenceReason::Differs { field, by: Voucher::Nobody } => write!(
                f,
                "has a narinfo that no trusted key has signed and whose {field} is not what this machine's store \
                 says: it is forged, or from a stranger's build"
            ),
            AbsenceReason::Differs { field, by: Voucher::Unknown } => {
                write!(f, "has a narinfo whose {field} is not what this machine's store says")
            }
            AbsenceReason::Unsigned => f.write_str("has no signature that verifies with a trusted key"),
            AbsenceReason::Planted(field) => {
                write!(
                    f,
                    "has a {field} in its narinfo that no signature covers and that is not one for this path"
                )
            }
            AbsenceReason::Packed => f.write_str("is compressed in a way that hosts do not unpack"),
            AbsenceReason::NoNar(url) => write!(f, "has lost its file {url}"),
            AbsenceReason::NarSize { url, found, promised } => {
                write!(f, "has the file {url} with {found} bytes instead of {promised}")
            }
        }
    }
}

/// What a cache has of a closure.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct CacheContents {
    /// What is there, with the sizes of the NAR files.
    pub present: BTreeMap<StorePath, u64>,
    /// What is not, and why.
    pub faults: BTreeMap<StorePath, AbsenceReason>,
}

/// Requests at a time: beside them it is asked whether that is a cache at all, and what it lists.
const REQUESTS: usize = CONNECTIONS - 2;

/// From so many paths on it is worth to ask for a list of NARs besides: a page of one, a thousand, is no longer than the
/// answers for these one by one.
const LISTED_FROM: usize = 250;

/// Where the NARs are that a push writes.
const NARS: &str = "nar/";

/// Asks for the whole closure, many requests at a time. `keys` are those that are trusted here and our own;
/// with none at all, agreement with the local store is all that can be asked. An error is the first that the cache
/// gave.
pub fn look(cache: &dyn Store, closure: &Closure, keys: &[PublicKey]) -> Result<CacheContents, StoreError> {
    let all: Vec<&NarInfo> = closure.values().collect();
    let (judged, listed) = std::thread::scope(|scope| {
        let listed = (all.len() >= LISTED_FROM).then(|| scope.spawn(|| cache.sizes(NARS)));
        let judged = parallel::try_map(&all, REQUESTS, |local| Ok((&local.path, read(cache, local, keys)?)));
        let listed = listed.map(parallel::joined);
        (judged, listed)
    });
    // Who may not list is told of each.
    let listed = listed.and_then(Result::ok).unwrap_or_default();
    let mut found = CacheContents::default();
    let mut named = Vec::new();
    for (path, judged) in judged? {
        match judged {
            Ok(info) => named.push((path, info)),
            Err(fault) => drop(found.faults.insert(path.clone(), fault)),
        }
    }
    let sizes = parallel::try_map(&named, REQUESTS, |(_, info)| match listed.get(&info.url) {
        Some(size) => Ok(Some(*size)),
        None => cache.size(&info.url),
    })?;
    for ((path, info), size) in named.into_iter().zip(sizes) {
        let fault = match (size, info.file_size) {
            (None, _) => AbsenceReason::NoNar(info.url),
            (Some(found), Some(promised)) if found != promised => {
                AbsenceReason::NarSize { url: info.url, found, promised }
            }
            (Some(size), _) => {
                found.present.insert(path.clone(), size);
                continue;
            }
        };
        found.faults.insert(path.clone(), fault);
    }
    Ok(found)
}

/// A path's narinfo, or what is wrong with it.
fn read(
    cache: &dyn Store,
    local: &NarInfo,
    keys: &[PublicKey],
) -> Result<Result<NarInfo, AbsenceReason>, StoreError> {
    // Where it is known what it must say, it is known how long that is: many are read at a time.
    let limit = (local.render().len() as u64).saturating_add(OTHER_FIELDS).min(MAX_BYTES);
    let bytes = match cache.read(&NarInfo::key(&local.path), limit) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Ok(Err(AbsenceReason::Absent)),
        Err(StoreError::TooLarge(_)) => {
            return Ok(Err(AbsenceReason::Unreadable(format!("has more than {limit} bytes"))));
        }
        Err(e) => return Err(e),
    };
    Ok(judge(&bytes, local, keys))
}

/// What a narinfo's bytes are worth beside the local store's word.
fn judge(bytes: &[u8], local: &NarInfo, keys: &[PublicKey]) -> Result<NarInfo, AbsenceReason> {
    let info = NarInfo::parse(bytes).map_err(AbsenceReason::Unreadable)?;
    if let Some(field) = info.differs_from(local) {
        // Also a signed narinfo of another path is not about this one.
        let by = match info.path == local.path && info.verified_by(keys) {
            true => Voucher::Trusted,
            false if keys.is_empty() => Voucher::Unknown,
            false => Voucher::Nobody,
        };
        return Err(AbsenceReason::Differs { field, by });
    }
    if !keys.is_empty() && info.warrant(keys).is_none() {
        return Err(AbsenceReason::Unsigned);
    }
    if let Some(field) = info.planted() {
        return Err(AbsenceReason::Planted(field));
    }
    match info.compression {
        Compression::Other => Err(AbsenceReason::Packed),
        Compression::None | Compression::Zstd | Compression::Xz => Ok(info),
    }
}

/// Whether what Nix has just written for a path is what the local store says, signed by `key` if there is one: it goes to
/// the cache as it is. The error is the reason alone.
pub fn agrees(bytes: &[u8], local: &NarInfo, key: Option<&PublicKey>) -> Result<NarInfo, String> {
    let info = NarInfo::parse(bytes)?;
    if let Some(field) = info.differs_from(local) {
        return Err(format!("has another {field} than this machine's store"));
    }
    match key {
        Some(key) if !info.verified_by(std::slice::from_ref(key)) => {
            Err(format!("is not signed by the key {}", key.name()))
        }
        _ => Ok(info),
    }
}

#[cfg(test)]
mod tests {
    use super::super::local::tests::{info, path, sign};
    use super::*;
    use crate::keys::SecretKey;
    use crate::store::Condition;
    use crate::store::dir::DirStore;
    use crate::store::tests::FaultyStore;

    /// What a push would write of a path: its narinfo in a cache, signed.
    fn cached(local: &NarInfo, key: &SecretKey) -> NarInfo {
        let mut info = local.clone();
        info.url = format!("nar/{}.nar.zst", local.path.hash());
        (info.compression, info.file_size) = (Compression::Zstd, Some(4));
        sign(&mut info, key);
        info
    }

    #[test]
    fn only_what_the_local_store_says_under_a_signature_that_verifies_is_there() {
        let (ours, stranger) = (SecretKey::generate("dev-1").unwrap(), SecretKey::generate("dev-1").unwrap());
        let keys = [SecretKey::generate("other-1").unwrap().public(), ours.public()];
        let (top, dependency) = (path('1', "top"), path('2', "dep"));
        let local = info(&top, &[&dependency]);
        let good = cached(&local, &ours);
        let signed_by = |key: &SecretKey, change: &dyn Fn(&mut NarInfo)| {
            let mut info = good.clone();
            change(&mut info);
            info.signatures.clear();
            sign(&mut info, key);
            info.render()
        };
        let changed = |change: &dyn Fn(&mut NarInfo)| {
            let mut info = good.clone();
            change(&mut info);
            info.render()
        };
        let differs = |field, by| Err(AbsenceReason::Differs { field, by });
        let rows = [
            ("as a push wrote it", good.render(), Ok(())),
            (
                "another build of a trusted colleague",
                signed_by(&ours, &|i| i.nar_size += 1),
                differs("NarSize", Voucher::Trusted),
            ),
            ("signed by a key of the same name", signed_by(&stranger, &|_| {}), Err(AbsenceReason::Unsigned)),
            (
                "a forged hash under the old signature",
                changed(&|i| i.nar_hash = crate::hash::Sha256::of(b"forged")),
                differs("NarHash", Voucher::Nobody),
            ),
            ("a reference less", changed(&|i| i.references.clear()), differs("References", Voucher::Nobody)),
            (
                "our name, no signature",
                changed(&|i| i.signatures = vec!["dev-1:AAAA".into()]),
                Err(AbsenceReason::Unsigned),
            ),
            ("no signature at all", changed(&|i| i.signatures.clear()), Err(AbsenceReason::Unsigned)),
            (
                "about another path",
                signed_by(&ours, &|i| i.path = dependency.clone()),
                differs("StorePath", Voucher::Nobody),
            ),
            (
                "a content address that is none",
                changed(&|i| i.ca = Some("garbage".into())),
                Err(AbsenceReason::Planted("CA")),
            ),
            (
                "a content address that is another's",
                changed(&|i| i.ca = Some(format!("fixed:r:{}", i.nar_hash))),
                Err(AbsenceReason::Planted("CA")),
            ),
            (
                "a deriver that is none",
                changed(&|i| i.deriver = Some(format!("{}-x", "3".repeat(32)))),
                Err(AbsenceReason::Planted("Deriver")),
            ),
            (
                "a signature that is none beside a good one",
                changed(&|i| i.signatures.push("nocolon".into())),
                Err(AbsenceReason::Planted("Sig")),
            ),
            (
                "another machine's deriver",
                changed(&|i| i.deriver = Some(format!("{}-x.drv", "3".repeat(32)))),
                Ok(()),
            ),
            (
                "packed so that no host can unpack it",
                changed(&|i| i.compression = Compression::Other),
                Err(AbsenceReason::Packed),
            ),
        ];
        for (what, text, want) in rows {
            assert_eq!(judge(text.as_bytes(), &local, &keys).map(drop), want, "{what}");
        }
        assert!(matches!(judge(b"garbage", &local, &keys), Err(AbsenceReason::Unreadable(_))));
        // Without any key agreement is all there is.
        let unsigned = changed(&|i| i.signatures.clear());
        assert!(judge(unsigned.as_bytes(), &local, &[]).is_ok());
        let other = changed(&|i| i.nar_size += 1);
        assert_eq!(judge(other.as_bytes(), &local, &[]).map(drop), differs("NarSize", Voucher::Unknown));
    }

    #[test]
    fn a_cache_is_asked_for_every_path_and_every_nar() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DirStore::new(dir.path());
        let key = SecretKey::generate("dev-1").unwrap();
        let paths: Vec<StorePath> = ['0', '1', '2', '3', '4'].map(|digit| path(digit, "x")).into();
        let closure: Closure = paths.iter().map(|p| (p.clone(), info(p, &[]))).collect();
        let put = |key: &str, bytes: &[u8]| cache.put(key, bytes, &Condition::Always).unwrap();
        for (n, path) in paths.iter().enumerate().skip(1) {
            let info = cached(&closure[path], &key);
            put(&NarInfo::key(path), info.render().as_bytes());
            match n {
                1 => {}
                2 => drop(put(&info.url, b"short?")),
                _ => drop(put(&info.url, b"good")),
            }
        }
        put(&NarInfo::key(&paths[4]), &vec![b'x'; OTHER_FIELDS as usize + 512]);
        let found = look(&cache, &closure, &[key.public()]).unwrap();
        assert_eq!(found.present, BTreeMap::from([(paths[3].clone(), 4)]));
        assert_eq!(found.faults[&paths[0]], AbsenceReason::Absent);
        assert!(matches!(&found.faults[&paths[1]], AbsenceReason::NoNar(url) if url.starts_with("nar/1111")));
        assert!(matches!(&found.faults[&paths[2]], AbsenceReason::NarSize { found: 6, promised: 4, .. }));
        assert!(matches!(&found.faults[&paths[4]], AbsenceReason::Unreadable(why) if why.contains("bytes")));
        assert_eq!(look(&cache, &Closure::new(), &[]), Ok(CacheContents::default()));
    }

    #[test]
    fn what_a_list_does_not_tell_of_a_large_closure_is_asked_one_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let key = SecretKey::generate("dev-1").unwrap();
        let path = |n| StorePath::parse(&format!("/nix/store/{n:032}-x")).unwrap();
        let paths: Vec<StorePath> = (0..LISTED_FROM).map(path).collect();
        let closure: Closure = paths.iter().map(|p| (p.clone(), info(p, &[]))).collect();
        let infos: Vec<NarInfo> = paths.iter().map(|p| cached(&closure[p], &key)).collect();
        let store = |lists| {
            let store = FaultyStore::new(dir.path());
            store.faults().lists.insert(NARS.into(), lists);
            store
        };
        let writer = store(Ok(BTreeMap::new()));
        for (n, info) in infos.iter().enumerate() {
            writer.put(&NarInfo::key(&info.path), info.render().as_bytes(), &Condition::Always).unwrap();
            if n > 0 {
                writer.put(&info.url, b"good", &Condition::Always).unwrap();
            }
        }
        let whole: BTreeMap<String, u64> = infos.iter().skip(1).map(|i| (i.url.clone(), 4)).collect();
        let first = infos[1].url.clone();
        let mut part = whole.clone();
        part.insert(first.clone(), 5);
        part.retain(|url, _| *url <= infos[99].url);
        let denied = Err(StoreError::Denied("no".into()));
        for (lists, asked) in
            [(Ok(whole), 1), (Ok(part.clone()), infos.len() - part.len()), (denied, infos.len())]
        {
            let wrong = lists.as_ref().is_ok_and(|l| l.get(&first) == Some(&5));
            let cache = store(lists);
            let found = look(&cache, &closure, &[key.public()]).unwrap();
            assert_eq!(cache.sized(), asked);
            assert_eq!(found.faults.len(), 1 + usize::from(wrong));
            assert!(matches!(found.faults[&paths[0]], AbsenceReason::NoNar(_)));
            assert_eq!(
                wrong,
                matches!(found.faults.get(&paths[1]), Some(AbsenceReason::NarSize { found: 5, .. }))
            );
            assert_eq!(found.present.len() + found.faults.len(), paths.len());
        }
        // A small one is not worth a list.
        let few: Closure = closure.into_iter().skip(1).take(LISTED_FROM - 1).collect();
        let cache = store(Ok(BTreeMap::new()));
        assert_eq!(look(&cache, &few, &[key.public()]).unwrap().present.len(), few.len());
        assert_eq!(cache.sized(), few.len());
    }

    #[test]
    fn what_nix_writes_is_looked_at_before_it_goes_up() {
        let key = SecretKey::generate("dev-1").unwrap();
        let local = info(&path('1', "top"), &[]);
        let good = cached(&local, &key);
        assert!(agrees(good.render().as_bytes(), &local, Some(&key.public())).is_ok());
        let stranger = SecretKey::generate("dev-1").unwrap().public();
        assert!(
            agrees(good.render().as_bytes(), &local, Some(&stranger)).unwrap_err().contains("not signed")
        );
        let mut other = good;
        other.nar_size += 1;
        assert!(agrees(other.render().as_bytes(), &local, None).unwrap_err().contains("NarSize"));
    }
}
