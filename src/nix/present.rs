//! Which paths of a closure a cache has: every narinfo and every NAR's size is asked for, all at once, and held against
//! what the local store says. A narinfo that says something else, that nobody trusted vouches for, or whose NAR is not
//! there is a fault, to be named and written over. Nothing in a cache is believed because it is there, and nothing is
//! written here.

use super::local::Closure;
use super::narinfo::{Compression, MAX_BYTES, MAX_SIGNATURES, NarInfo};
use crate::http::CONNECTIONS;
use crate::keys::PublicKey;
use crate::names::StorePath;
use crate::store::{Got, Store, StoreError};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// The bytes of what a narinfo says beside the local store: signatures, a content address, where its file is.
const OTHER_FIELDS: u64 = 4096 + 256 * MAX_SIGNATURES as u64;

/// Why a path does not count as being in a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
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
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Absent => f.write_str("is not there"),
            Fault::Unreadable(why) => write!(f, "has a broken narinfo (it {why})"),
            Fault::Differs { field, by: Voucher::Trusted } => {
                write!(f, "has the narinfo of another build (its {field} is not that of this machine's)")
            }
            Fault::Differs { field, by: Voucher::Nobody } => write!(
                f,
                "has a narinfo that no trusted key has signed and whose {field} is not what this machine's store says: \
                 it is forged, or of a stranger's build"
            ),
            Fault::Differs { field, by: Voucher::Unknown } => {
                write!(f, "has a narinfo whose {field} is not what this machine's store says")
            }
            Fault::Unsigned => f.write_str("has no signature that verifies with a trusted key"),
            Fault::Packed => f.write_str("is compressed in a way that hosts do not unpack"),
            Fault::NoNar(url) => write!(f, "has lost its file {url}"),
            Fault::NarSize { url, found, promised } => {
                write!(f, "has the file {url} with {found} bytes instead of {promised}")
            }
        }
    }
}

/// What a cache has of a closure.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// What is there, with the sizes of the NAR files.
    pub present: BTreeMap<StorePath, u64>,
    /// What is not, and why.
    pub faults: BTreeMap<StorePath, Fault>,
}

/// Requests at a time: beside them somebody looks whether it is a cache at all.
const REQUESTS: usize = CONNECTIONS - 1;

/// Asks for the whole closure, many requests at a time. `keys` are those that are trusted here and our own;
/// with none at all, agreement with the local store is all that can be asked. An error is the first that the cache
/// gave.
pub fn look(cache: &dyn Store, closure: &Closure, keys: &[PublicKey]) -> Result<Found, StoreError> {
    let all: Vec<&NarInfo> = closure.values().collect();
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Ok(Found::default()));
    std::thread::scope(|scope| {
        for _ in 0..all.len().min(REQUESTS) {
            scope.spawn(|| {
                while let Some(local) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let judged = look_at(cache, local, keys);
                    let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                    let Ok(so_far) = &mut *found else { return };
                    match judged {
                        Ok(Ok(size)) => drop(so_far.present.insert(local.path.clone(), size)),
                        Ok(Err(fault)) => drop(so_far.faults.insert(local.path.clone(), fault)),
                        Err(e) => *found = Err(e),
                    }
                }
            });
        }
    });
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// The size of the path's NAR file, or what is wrong with it. Both are asked in turn, so that the second request finds
/// the connection of the first.
fn look_at(cache: &dyn Store, local: &NarInfo, keys: &[PublicKey]) -> Result<Result<u64, Fault>, StoreError> {
    // Where it is known what it must say, it is known how long that is: many are read at a time.
    let limit = (local.render().len() as u64).saturating_add(OTHER_FIELDS).min(MAX_BYTES);
    let bytes = match cache.get(&NarInfo::key(&local.path), None, limit) {
        Ok(Got::Found { bytes, .. }) => bytes,
        Ok(Got::Missing | Got::NotModified) => return Ok(Err(Fault::Absent)),
        Err(StoreError::TooLarge(_)) => {
            return Ok(Err(Fault::Unreadable(format!("has more than {limit} bytes"))));
        }
        Err(e) => return Err(e),
    };
    let info = match judge(&bytes, local, keys) {
        Ok(info) => info,
        Err(fault) => return Ok(Err(fault)),
    };
    Ok(match (cache.size(&info.url)?, info.file_size) {
        (None, _) => Err(Fault::NoNar(info.url)),
        (Some(found), Some(promised)) if found != promised => {
            Err(Fault::NarSize { url: info.url, found, promised })
        }
        (Some(found), _) => Ok(found),
    })
}

/// What a narinfo's bytes are worth beside the local store's word.
fn judge(bytes: &[u8], local: &NarInfo, keys: &[PublicKey]) -> Result<NarInfo, Fault> {
    let info = NarInfo::parse(bytes).map_err(Fault::Unreadable)?;
    if let Some(field) = info.differs_from(local) {
        // Also a signed narinfo of another path is not about this one.
        let by = match info.path == local.path && info.verified_by(keys) {
            true => Voucher::Trusted,
            false if keys.is_empty() => Voucher::Unknown,
            false => Voucher::Nobody,
        };
        return Err(Fault::Differs { field, by });
    }
    if !keys.is_empty() && info.warrant(keys).is_none() {
        return Err(Fault::Unsigned);
    }
    match info.compression {
        Compression::Other => Err(Fault::Packed),
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
    use super::super::local::tests::{info, path};
    use super::*;
    use crate::keys::SecretKey;
    use crate::store::When;
    use crate::store::dir::DirStore;

    /// What a push would write of a path: its narinfo in a cache, signed.
    fn cached(local: &NarInfo, key: &SecretKey) -> NarInfo {
        let mut info = local.clone();
        info.url = format!("nar/{}.nar.zst", local.path.hash());
        (info.compression, info.file_size) = (Compression::Zstd, Some(4));
        info.sign(key).unwrap();
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
            info.sign(key).unwrap();
            info.render()
        };
        let changed = |change: &dyn Fn(&mut NarInfo)| {
            let mut info = good.clone();
            change(&mut info);
            info.render()
        };
        let differs = |field, by| Err(Fault::Differs { field, by });
        let rows = [
            ("as a push wrote it", good.render(), Ok(())),
            (
                "another build of a trusted colleague",
                signed_by(&ours, &|i| i.nar_size += 1),
                differs("NarSize", Voucher::Trusted),
            ),
            ("signed by a key of the same name", signed_by(&stranger, &|_| {}), Err(Fault::Unsigned)),
            (
                "a forged hash under the old signature",
                changed(&|i| i.nar_hash = crate::nix::hash::Sha256::of(b"forged")),
                differs("NarHash", Voucher::Nobody),
            ),
            ("a reference less", changed(&|i| i.references.clear()), differs("References", Voucher::Nobody)),
            (
                "our name, no signature",
                changed(&|i| i.signatures = vec!["dev-1:AAAA".into()]),
                Err(Fault::Unsigned),
            ),
            ("no signature at all", changed(&|i| i.signatures.clear()), Err(Fault::Unsigned)),
            (
                "about another path",
                signed_by(&ours, &|i| i.path = dependency.clone()),
                differs("StorePath", Voucher::Nobody),
            ),
            (
                "packed so that no host can unpack it",
                changed(&|i| i.compression = Compression::Other),
                Err(Fault::Packed),
            ),
        ];
        for (what, text, want) in rows {
            assert_eq!(judge(text.as_bytes(), &local, &keys).map(drop), want, "{what}");
        }
        assert!(matches!(judge(b"garbage", &local, &keys), Err(Fault::Unreadable(_))));
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
        let put = |key: &str, bytes: &[u8]| cache.put(key, bytes, &When::Always).unwrap();
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
        assert_eq!(found.faults[&paths[0]], Fault::Absent);
        assert!(matches!(&found.faults[&paths[1]], Fault::NoNar(url) if url.starts_with("nar/1111")));
        assert!(matches!(&found.faults[&paths[2]], Fault::NarSize { found: 6, promised: 4, .. }));
        assert!(matches!(&found.faults[&paths[4]], Fault::Unreadable(why) if why.contains("bytes")));
        assert_eq!(look(&cache, &Closure::new(), &[]), Ok(Found::default()));
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
