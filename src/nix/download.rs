//! Brings NARs from a cache into a spool: many at a time, the largest first, each unpacked and compared with what was
//! vouched for before it counts. What was transferred survives a process that dies: the next one goes on where it was
//! cut, and checks the whole again. Believes nothing that lies in the spool, and gives nothing to Nix.

use super::narinfo::{Compression, NarInfo, Warrant};
use super::spool::{NARS, Spool};
use super::unpack::{self, Expected, unpack};
use super::walk::{PathFault, VerifiedNarInfo};
use crate::error::io_text;
use crate::failpoint;
use crate::files::if_there;
use crate::hash::Sha256;
use crate::names::StorePath;
use crate::parallel::{self, locked};
use crate::store::{Etag, Opened, Store, StoreError};
use std::collections::BTreeMap;
use std::io::{self, BufReader, Read, Seek, Write};
use std::path::PathBuf;
use std::sync::{Mutex, mpsc};
use std::time::Instant;

/// Transfers at a time, each on a connection of its own.
const TRANSFERS: usize = 32;
/// NARs that are unpacked at a time: each takes a window of memory and most of a core.
const UNPACKERS: usize = 4;
/// How often a transfer is taken up again without a byte having come.
const TRIES: u32 = 4;
const BUFFER: usize = 64 << 10;

/// Why a NAR did not come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DownloadError {
    /// What the cache has of it is missing or wrong.
    Fault(PathFault),
    /// The cache did not answer or refused us.
    Cache(StoreError),
    /// The time for it was over.
    Late,
    /// This machine could not take it.
    Here(String),
}

/// The files of one path in the spool.
struct Files {
    /// As the cache has it, still growing.
    part: PathBuf,
    /// Which version of the cache's file that is.
    etag: PathBuf,
    /// As the cache has it, whole.
    packed: PathBuf,
    /// Unpacked, still growing.
    growing: PathBuf,
    /// Unpacked and compared.
    nar: PathBuf,
}

/// The key of a path's NAR in the spool.
pub fn nar_key(path: &StorePath) -> String {
    format!("{NARS}/{}.nar", path.hash())
}

/// Whose file of the spool a key is: the 32 digits of a store path.
pub fn hash_of(key: &str) -> &str {
    key.strip_prefix("nar/").unwrap_or(key).split('.').next().unwrap_or_default()
}

impl Files {
    fn of(spool: &Spool, path: &StorePath) -> Self {
        let file = |ending: &str| spool.file(&format!("{NARS}/{}.{ending}", path.hash()));
        Files {
            part: file("part"),
            etag: file("etag"),
            packed: file("packed"),
            growing: file("growing"),
            nar: file("nar"),
        }
    }

    fn forget(&self) -> io::Result<()> {
        [&self.part, &self.etag, &self.packed, &self.growing, &self.nar].into_iter().try_for_each(remove)
    }
}

fn remove(path: &PathBuf) -> io::Result<()> {
    if_there(fs_err::remove_file(path)).map(drop)
}

fn here(e: io::Error) -> DownloadError {
    DownloadError::Here(io_text(&e))
}

/// What lies in the spool of a path, before or after a transfer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum SpoolEntry {
    /// All of it came now.
    Fresh,
    /// Some of it was left by an earlier run, and may be damaged.
    Left,
}

/// Brings the NARs of these paths into the spool, with a narinfo for each, made from what was vouched for. Returns why
/// for each that did not come.
pub fn download<'a>(
    cache: &dyn Store,
    spool: &Spool,
    wanted: &[&'a VerifiedNarInfo],
    until: Instant,
) -> BTreeMap<StorePath, DownloadError> {
    let mut queue: Vec<&'a VerifiedNarInfo> = wanted.to_vec();
    queue.sort_by_key(|found| std::cmp::Reverse(found.info.file_size.unwrap_or(found.info.nar_size)));
    let failures = Mutex::new(BTreeMap::new());
    let stopped = &Mutex::<Option<DownloadError>>::new(None);
    let (sender, receiver) = mpsc::channel::<(&'a VerifiedNarInfo, SpoolEntry)>();
    let received = Mutex::new(receiver);
    let fail = &|found: &VerifiedNarInfo, failure: DownloadError| {
        // A cache that does not answer for one will not for the others; each waiting for itself, they would take
        // as long as there are paths. One that refuses does so at once, and maybe for one alone.
        if matches!(failure, DownloadError::Cache(StoreError::Unreachable(_)) | DownloadError::Late) {
            *locked(stopped) = Some(failure.clone());
        }
        locked(&failures).insert(found.info.path.clone(), failure);
    };
    let transfer = move |found: &&'a VerifiedNarInfo| {
        let stop = locked(stopped).clone();
        match stop.map_or_else(|| bring(cache, spool, &found.info, until), Err) {
            Ok(origin) => drop(sender.send((*found, origin))),
            Err(failure) => {
                // On a full disk, what cannot be finished makes way.
                if matches!(failure, DownloadError::Here(_)) {
                    drop(Files::of(spool, &found.info.path).forget());
                }
                fail(found, failure);
            }
        }
    };
    let finish = || {
        loop {
            let next = locked(&received).recv();
            let Ok((found, origin)) = next else { return };
            let mut done = settle(spool, found, origin);
            if let (Err(DownloadError::Fault(_)), SpoolEntry::Left) = (&done, origin) {
                // What an earlier run left may be what is wrong: once more, from nothing.
                let again = Files::of(spool, &found.info.path).forget().map_err(here);
                let brought = again.and_then(|()| bring(cache, spool, &found.info, until));
                done = brought.and_then(|origin| settle(spool, found, origin));
            }
            if let Err(failure) = done {
                drop(Files::of(spool, &found.info.path).forget());
                fail(found, failure);
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..wanted.len().min(UNPACKERS).min(cores) {
            scope.spawn(finish);
        }
        // The end of it drops the sender: who unpacks ends with what is there.
        parallel::map(&queue, TRANSFERS, transfer);
    });
    std::mem::take(&mut locked(&failures))
}

/// The most bytes that a file of such a NAR can have: no compression makes anything much larger than it was. What the
/// narinfo says of the file's size nobody vouches for.
fn most(info: &NarInfo) -> u64 {
    info.nar_size.saturating_add(info.nar_size / 16).saturating_add(1 << 20)
}

/// Transfers the file of a NAR, or what is missing of it.
fn bring(
    cache: &dyn Store,
    spool: &Spool,
    info: &NarInfo,
    until: Instant,
) -> Result<SpoolEntry, DownloadError> {
    let files = Files::of(spool, &info.path);
    if files.nar.exists() || files.packed.exists() {
        return Ok(SpoolEntry::Left);
    }
    let _effect = failpoint::mark("fetch", &info.url);
    let mut origin = SpoolEntry::Fresh;
    let (mut tries, mut anew) = (0, 0);
    let mut part = fs_err::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&files.part)
        .map_err(here)?;
    loop {
        let mut offset = part.seek(io::SeekFrom::End(0)).map_err(here)?;
        let known = if offset > 0 { fs_err::read_to_string(&files.etag).ok().map(Etag) } else { None };
        if offset > 0 && (known.is_none() || offset > most(info)) {
            begin_anew(&mut part).map_err(here)?;
            continue;
        }
        if offset > 0 && tries == 0 {
            origin = SpoolEntry::Left;
        }
        let mut download =
            match cache.read_from(&info.url, offset, known.as_ref()).map_err(DownloadError::Cache)? {
                Opened::Missing => {
                    files.forget().map_err(here)?;
                    return Err(DownloadError::Fault(PathFault::Lost(info.url.clone())));
                }
                Opened::Changed if offset == 0 => {
                    return Err(DownloadError::Fault(PathFault::Lost(info.url.clone())));
                }
                Opened::Changed => {
                    anew += 1;
                    if anew > TRIES {
                        let why = format!(
                            "{} in {} is a different file each time it is read; find out what writes it",
                            info.url,
                            cache.url()
                        );
                        return Err(DownloadError::Cache(StoreError::Refused(why)));
                    }
                    begin_anew(&mut part).map_err(here)?;
                    origin = SpoolEntry::Fresh;
                    continue;
                }
                Opened::Found(download) => download,
            };
        let size = offset.saturating_add(download.length);
        if size > most(info) {
            files.forget().map_err(here)?;
            let why = format!("comes in a file of {size} bytes, and unpacked has {}", info.nar_size);
            return Err(DownloadError::Fault(PathFault::Altered(why)));
        }
        if offset == 0 {
            let mut etag = fs_err::File::create(&files.etag).map_err(here)?;
            etag.write_all(download.etag.0.as_bytes()).map_err(here)?;
        }
        let began = offset;
        let cut = loop {
            let mut buffer = [0; BUFFER];
            match download.body.read(&mut buffer) {
                Ok(0) => break None,
                Ok(count) => {
                    part.write_all(&buffer[..count]).map_err(here)?;
                    failpoint::point("within fetch", &info.url);
                    offset += count as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => break Some(e),
            }
            if Instant::now() >= until {
                return Err(DownloadError::Late);
            }
        };
        let Some(e) = cut else { break };
        tries = if offset > began { 1 } else { tries + 1 };
        if tries > TRIES {
            let why = format!("cannot read {} in {}: {}", info.url, cache.url(), io_text(&e));
            return Err(DownloadError::Cache(StoreError::Unreachable(why)));
        }
    }
    drop(part);
    fs_err::rename(&files.part, &files.packed).map_err(here)?;
    remove(&files.etag).map_err(here)?;
    Ok(origin)
}

fn begin_anew(part: &mut fs_err::File) -> io::Result<()> {
    part.set_len(0)?;
    part.rewind()
}

/// Unpacks what was transferred, compares it, and writes the narinfo that Nix reads: made from what was vouched for.
fn settle(spool: &Spool, found: &VerifiedNarInfo, origin: SpoolEntry) -> Result<(), DownloadError> {
    let VerifiedNarInfo { info, warrant } = found;
    let files = Files::of(spool, &info.path);
    let expected = Expected { size: info.nar_size, hash: info.nar_hash };
    let _effect = failpoint::mark("unpack", &info.url);
    let left = origin == SpoolEntry::Left && files.nar.exists();
    let compared = if left {
        let nar = fs_err::File::open(&files.nar).map_err(here)?;
        unpack(nar, Compression::None, expected, &mut io::sink())
    } else {
        let packed = fs_err::File::open(&files.packed).map_err(here)?;
        let mut growing = fs_err::File::create(&files.growing).map_err(here)?;
        unpack(BufReader::with_capacity(BUFFER, packed), info.compression, expected, &mut growing)
    };
    compared.map_err(|fault| match fault {
        unpack::UnpackError::Altered(why) => DownloadError::Fault(PathFault::Altered(why)),
        unpack::UnpackError::Unknown(why) => DownloadError::Fault(PathFault::Unknown(why)),
        unpack::UnpackError::Here(e) => here(e),
    })?;
    let nar = if left { &files.nar } else { &files.growing };
    if let Some(Warrant::File(hash)) = warrant {
        is_file(nar, *hash)?;
    }
    if !left {
        failpoint::point("within unpack", &info.url);
        fs_err::rename(&files.growing, &files.nar).map_err(here)?;
        remove(&files.packed).map_err(here)?;
    }
    let plain = NarInfo {
        url: nar_key(&info.path),
        compression: Compression::None,
        file_hash: Some(info.nar_hash),
        file_size: Some(info.nar_size),
        ..info.clone()
    };
    let mut file = fs_err::File::create(spool.file(&NarInfo::key(&info.path))).map_err(here)?;
    file.write_all(plain.render().as_bytes()).map_err(here)
}

/// Of a path named after a file's content, the NAR must hold that file: its hash nobody vouched for.
fn is_file(nar: &PathBuf, hash: Sha256) -> Result<(), DownloadError> {
    let nar = fs_err::File::open(nar).map_err(here)?;
    match unpack::plain_file(BufReader::with_capacity(BUFFER, nar)).map_err(here)? {
        Some(found) if found == hash => Ok(()),
        Some(found) => {
            let why = format!("holds a file of the hash {found} instead of {hash}");
            Err(DownloadError::Fault(PathFault::Altered(why)))
        }
        None => Err(DownloadError::Fault(PathFault::Altered("does not hold a plain file".into()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::{Faults, FaultyStore};
    use crate::store::{Condition, Store};
    use std::time::Duration;

    struct Scene {
        dir: tempfile::TempDir,
        cache: FaultyStore,
        nar: Vec<u8>,
        found: VerifiedNarInfo,
    }

    impl Scene {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let nar: Vec<u8> = (0..100_000u32).flat_map(|n| n.to_le_bytes()).collect();
            let info = NarInfo {
                path: StorePath::parse("/nix/store/3037rf1n52a6y74sx0qhg518wsyfsmny-b").unwrap(),
                url: "nar/b.nar".into(),
                compression: Compression::None,
                file_hash: None,
                file_size: None,
                nar_hash: Sha256::of(&nar),
                nar_size: nar.len() as u64,
                references: Default::default(),
                deriver: None,
                signatures: Vec::new(),
                ca: None,
            };
            let cache = FaultyStore::new(&dir.path().join("cache"));
            cache.put("nar/b.nar", &nar, &Condition::Always).unwrap();
            Scene { cache, nar, found: VerifiedNarInfo { info, warrant: Some(Warrant::Signature) }, dir }
        }

        fn spool(&self) -> Spool {
            Spool::open(&self.dir.path().join("spool"), "fetch").unwrap()
        }

        fn fetch(&self) -> Option<DownloadError> {
            let until = Instant::now() + Duration::from_secs(600);
            download(&self.cache, &self.spool(), &[&self.found], until).into_values().next()
        }

        fn arrived(&self) {
            let spool = self.spool();
            let key = nar_key(&self.found.info.path);
            assert_eq!(fs_err::read(spool.file(&key)).unwrap(), self.nar);
            let keys: Vec<String> = spool.files().unwrap().into_iter().map(|(key, _)| key).collect();
            assert_eq!(keys, [NarInfo::key(&self.found.info.path), key.clone()]);
            let info = NarInfo::parse(&fs_err::read(spool.file(&keys[0])).unwrap()).unwrap();
            assert_eq!((info.url, info.compression), (key, Compression::None));
        }

        fn asked(&self) -> Vec<u64> {
            self.cache.asked().into_iter().map(|(_, offset)| offset).collect()
        }
    }

    #[test]
    fn a_transfer_that_breaks_goes_on_where_it_was() {
        let scene = Scene::new();
        scene.cache.faults().breaks_after = Some(150_000);
        assert_eq!(scene.fetch(), None);
        scene.arrived();
        assert_eq!(scene.asked(), [0, 150_000, 300_000]);
        // Once there, it is compared again and not asked for.
        assert_eq!(scene.fetch(), None);
        assert!(scene.asked().is_empty());
    }

    #[test]
    fn a_cache_that_gives_nothing_any_more_is_given_up_and_what_came_is_kept() {
        let scene = Scene::new();
        let files = Files::of(&scene.spool(), &scene.found.info.path);
        fs_err::write(&files.part, &scene.nar[..1000]).unwrap();
        let Ok(Opened::Found(whole)) = scene.cache.inner.read_from("nar/b.nar", 0, None) else { panic!() };
        fs_err::write(&files.etag, &whole.etag.0).unwrap();
        scene.cache.faults().breaks_after = Some(0);
        assert!(
            matches!(scene.fetch(), Some(DownloadError::Cache(StoreError::Unreachable(why))) if why.contains("nar/b.nar"))
        );
        assert_eq!(scene.asked(), [1000; TRIES as usize + 1]);
        scene.cache.faults().gone = true;
        assert!(matches!(scene.fetch(), Some(DownloadError::Cache(_))));
        assert_eq!(fs_err::metadata(&files.part).unwrap().len(), 1000);
        *scene.cache.faults() = Default::default();
        assert_eq!(scene.fetch(), None);
        scene.arrived();
        assert_eq!(scene.asked(), [1000]);
    }

    #[test]
    fn what_an_earlier_run_left_damaged_comes_anew_before_the_cache_is_blamed() {
        for left in ["part", "packed", "nar"] {
            let scene = Scene::new();
            let files = Files::of(&scene.spool(), &scene.found.info.path);
            let Ok(Opened::Found(whole)) = scene.cache.inner.read_from("nar/b.nar", 0, None) else {
                panic!()
            };
            let mut damaged = scene.nar.clone();
            damaged[5] ^= 1;
            match left {
                "part" => {
                    fs_err::write(&files.part, &damaged[..1000]).unwrap();
                    fs_err::write(&files.etag, &whole.etag.0).unwrap();
                }
                "packed" => fs_err::write(&files.packed, &damaged).unwrap(),
                _ => fs_err::write(&files.nar, &damaged[..77]).unwrap(),
            }
            assert_eq!(scene.fetch(), None, "{left}");
            scene.arrived();
            assert_eq!(scene.asked().last(), Some(&0), "{left}");
        }
    }

    #[test]
    fn another_object_under_the_same_name_is_not_joined_to_what_came_before() {
        let scene = Scene::new();
        let files = Files::of(&scene.spool(), &scene.found.info.path);
        fs_err::write(&files.part, &scene.nar[..1000]).unwrap();
        fs_err::write(&files.etag, "of another").unwrap();
        assert_eq!(scene.fetch(), None);
        scene.arrived();
        assert_eq!(scene.asked(), [1000, 0]);
    }

    #[test]
    fn what_is_not_what_was_vouched_for_is_named_and_nothing_of_it_is_left() {
        let mut other = Scene::new().nar;
        other[5] ^= 1;
        for (object, word) in [
            (Some(other), "hash"),
            (Some(vec![0; 100]), "fewer"),
            (Some(vec![0; 3 << 20]), "comes in a file of 3145728 bytes"),
            (None, "nar/b.nar"),
        ] {
            let scene = Scene::new();
            match &object {
                Some(bytes) => drop(scene.cache.put("nar/b.nar", bytes, &Condition::Always).unwrap()),
                None => scene.cache.delete("nar/b.nar").unwrap(),
            }
            let Some(DownloadError::Fault(fault)) = scene.fetch() else { panic!("{word}") };
            assert!(fault.text().contains(word), "{}", fault.text());
            assert_eq!(matches!(fault, PathFault::Lost(_)), object.is_none());
            assert_eq!(scene.spool().files().unwrap(), []);
        }
    }

    #[test]
    fn a_file_that_is_another_one_each_time_is_given_up() {
        let scene = Scene::new();
        *scene.cache.faults() = Faults { breaks_after: Some(1000), restless: true, ..Faults::default() };
        assert!(
            matches!(scene.fetch(), Some(DownloadError::Cache(StoreError::Refused(why))) if why.contains("a different file each"))
        );
        assert!(scene.asked().len() <= 2 * (TRIES as usize + 1));
    }

    #[test]
    fn one_file_that_is_refused_keeps_no_other_from_coming_and_a_network_that_is_gone_all() {
        let scene = Scene::new();
        // Asked for after many others, which were refused by then.
        let of = |n: u32, url: &str| {
            let mut found = scene.found.clone();
            found.info.path = StorePath::parse(&format!("/nix/store/{n:032}-x")).unwrap();
            (found.info.url, found.info.file_size) = (url.to_string(), Some(1000 - u64::from(n)));
            found
        };
        let mut all: Vec<VerifiedNarInfo> = (0..100).map(|n| of(n, "nar/refused.nar")).collect();
        all.push(of(100, "nar/b.nar"));
        let all: Vec<&VerifiedNarInfo> = all.iter().collect();
        let fetch = |spool: &Spool| {
            download(&scene.cache, spool, &all, Instant::now() + Duration::from_secs(600)).into_keys().count()
        };
        let denied = StoreError::Denied("403 InvalidObjectState".into());
        scene.cache.faults().refused.insert("nar/refused.nar".into(), denied);
        assert_eq!(fetch(&scene.spool()), 100);
        scene.cache.faults().gone = true;
        let fresh = Spool::open(&scene.dir.path().join("fresh"), "fetch").unwrap();
        assert_eq!(fetch(&fresh), 101);
    }

    #[test]
    fn a_path_named_after_a_file_must_hold_that_file() {
        let mut scene = Scene::new();
        scene.found.warrant = Some(Warrant::File(Sha256::of(b"hello\n")));
        let Some(DownloadError::Fault(PathFault::Altered(why))) = scene.fetch() else { panic!() };
        assert!(why.contains("plain file"), "{why}");
        assert_eq!(scene.spool().files().unwrap(), []);
    }
}
