//! A directory as a bucket. Writes take a lock file, which gives compare-and-swap between processes, and go
//! through [`crate::durable`], so that readers, who take no lock, see an object whole or not at all. A version
//! is a hash of the content. It never touches a file outside its directory, whoever else may write there
//! ([`beneath`]), and its own files (the lock, temporary ones) are never keys.

use super::beneath::{self, Missing};
use super::objects::{Download, Exact, Opened, Upload};
use super::{ARCHIVE_PREFIX, Condition, Etag, GetResult, HOSTS_PREFIX, MAX_REPLACED, Store, StoreError};
use crate::durable::opened::Folder;
use crate::error::io_text;
use crate::files::{if_reached, if_there};
use crate::hash::Sha256;
use crate::log::printable;
use crate::parallel::locked;
use fs_err::File;
use rustix::fs::FileType;
use std::collections::BTreeSet;
use std::fs::TryLockError;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

/// What our own files begin with: the lock, and the temporary files of [`crate::durable`].
const OWN_PREFIX: &str = ".omni-deploy";
const LOCK: &str = ".omni-deploy.lock";

/// A write holds the lock for milliseconds: who waits longer waits for something that hangs.
const LOCK_WAIT: Duration = Duration::from_secs(30);

/// The lock, with a note in it of who has it: a hint for the person who waits.
struct StoreLock {
    file: File,
    ours: bool,
}

impl Drop for StoreLock {
    fn drop(&mut self) {
        if self.ours {
            // What stays costs the next writer a look at the folders, no more.
            drop(self.file.file().set_len(0));
        }
    }
}

/// The store in a directory.
#[derive(Debug)]
pub struct DirStore {
    root: PathBuf,
    lock_wait: Duration,
    /// The folders that this process has looked through for what writers left that were cut off; one name for all that
    /// are written under the lock.
    tidied: Mutex<BTreeSet<String>>,
}

impl DirStore {
    /// Names the directory; it is made with the first write.
    pub fn new(root: &Path) -> Self {
        DirStore { root: root.to_path_buf(), lock_wait: LOCK_WAIT, tidied: Mutex::default() }
    }

    /// Refuses what cannot be a key.
    fn checked(&self, key: &str) -> Result<(), StoreError> {
        let odd = |part: &str| part.is_empty() || part == "." || part == ".." || part.starts_with(OWN_PREFIX);
        if key.split('/').any(odd) || key.chars().any(char::is_control) {
            return Err(StoreError::Refused(format!(
                "{key:?} cannot be a key of {}: a key is a relative path without '.', '..' and control characters",
                self.url()
            )));
        }
        Ok(())
    }

    /// The store's folder; None when it is not there.
    fn folder(&self) -> io::Result<Option<Folder>> {
        if_there(beneath::root(&self.root, Missing::Error))
    }

    fn failed(&self, verb: &str, key: &str, e: &io::Error) -> StoreError {
        let what = format!("cannot {verb} {key} in {}", self.url());
        match e.kind() {
            ErrorKind::PermissionDenied => {
                let rights = if verb == "read" || verb == "list" { "read" } else { "write to" };
                let path = self.root.join(key);
                let folder = path.ancestors().skip(1).find(|p| p.is_dir()).unwrap_or(&self.root);
                StoreError::Refused(format!(
                    "{what}: permission denied; run this as a user who may {rights} {0} ('ls -ld {0}' says who)",
                    folder.display()
                ))
            }
            // Something stands there that is none of ours.
            ErrorKind::InvalidData => StoreError::Refused(format!("{what}: {}", printable(&e.to_string()))),
            ErrorKind::StorageFull | ErrorKind::ReadOnlyFilesystem | ErrorKind::QuotaExceeded => {
                StoreError::Refused(format!("{what}: {}", io_text(e)))
            }
            ErrorKind::NotADirectory | ErrorKind::IsADirectory => StoreError::Refused(format!(
                "{what}: a file is where a folder should be, or the other way round; look at {}",
                self.root.display()
            )),
            _ => StoreError::Unreachable(format!("{what}: {}", io_text(e))),
        }
    }

    /// The object's file with its size; None when there is none.
    fn open(&self, key: &str) -> Result<Option<(File, u64)>, StoreError> {
        self.checked(key)?;
        let open = || -> io::Result<Option<(File, u64)>> {
            let Some(root) = self.folder()? else { return Ok(None) };
            let Some((folder, name)) = if_reached(beneath::place(&root, key, Missing::Error))? else {
                return Ok(None);
            };
            let Some(file) = beneath::object(&folder, name)? else { return Ok(None) };
            let size = file.metadata()?.len();
            Ok(Some((file, size)))
        };
        open().map_err(|e| self.failed("read", key, &e))
    }

    /// Whether this version is there now. What else writes here may have put anything there: what is too large to have
    /// been read is another version.
    fn holds(&self, key: &str, version: &Etag) -> Result<bool, StoreError> {
        let Some(bytes) = self.get_start(key, MAX_REPLACED + 1)? else { return Ok(false) };
        Ok(bytes.len() as u64 <= MAX_REPLACED && etag(&bytes) == *version)
    }

    fn is_first_in(&self, folder: &str) -> bool {
        locked(&self.tidied).insert(folder.into())
    }

    /// Takes the lock of all writers; dropping it gives it back.
    fn lock(&self, root: &Folder) -> io::Result<StoreLock> {
        let (file, ours) = beneath::lock(root, LOCK, 0o664)?;
        if ours {
            // What cannot be changed stays as it was, and locks all the same.
            drop(close_to_strangers(root, &file));
        }
        // The kernel serves those who wait in their order, which asking again and again does not; the wait is
        // a thread's, so that it can be given up.
        let file = match file.file().try_lock() {
            Ok(()) => file,
            Err(TryLockError::Error(e)) => return Err(e),
            Err(TryLockError::WouldBlock) => {
                let (sender, waited) = std::sync::mpsc::channel();
                // When nobody waits any more, the file goes down with the answer, and the lock with the file.
                std::thread::spawn(move || drop(sender.send(file.file().lock().map(|()| file))));
                match waited.recv_timeout(self.lock_wait) {
                    Ok(locked) => locked?,
                    Err(_) => {
                        return Err(io::Error::other(format!(
                            "{0} was held for {1} s by {2}; if that process hangs, end it ('fuser -v {0}' shows it)",
                            self.root.join(LOCK).display(),
                            self.lock_wait.as_secs(),
                            holder(root).as_deref().unwrap_or("another process"),
                        )));
                    }
                }
            }
        };
        if ours {
            // A note that is still there is of one who died with the lock, and maybe with half a write. After a power cut
            // it is not, since nobody flushes it: the first write of a process looks in any case.
            if self.is_first_in("") || file.metadata().is_ok_and(|m| m.len() > 0) {
                for folder in ["", HOSTS_PREFIX, ARCHIVE_PREFIX] {
                    let folder = beneath::folder_of(root, folder, Missing::Error);
                    if_reached(folder.and_then(|folder| folder.sweep()))?;
                }
            }
            let program = std::env::args().next().unwrap_or_default();
            let note = format!("process {} ({program})\n", std::process::id());
            file.file().set_len(0)?;
            (&mut file.file()).write_all(note.as_bytes())?;
        }
        Ok(StoreLock { file, ours })
    }
}

/// Whoever may open the lock may hold it: nobody opens it who does not write to the folder. One that a group writes to is
/// that group's to share, and one that everybody writes to is everybody's.
fn close_to_strangers(root: &Folder, lock: &File) -> io::Result<()> {
    let (folder, meta) = (rustix::fs::fstat(root)?, lock.metadata()?);
    let mode = match folder.st_mode & 0o022 {
        0 => 0o600,
        0o020 => 0o660,
        _ => 0o666,
    };
    if meta.uid() != folder.st_uid && rustix::process::geteuid().is_root() {
        std::os::unix::fs::fchown(lock.file(), Some(folder.st_uid), None)?;
    }
    if mode == 0o660 && meta.gid() != folder.st_gid {
        std::os::unix::fs::fchown(lock.file(), None, Some(folder.st_gid))?;
    }
    if meta.mode() & 0o777 != mode {
        lock.set_permissions(std::fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Who noted itself in a lock file, if it still runs: a process that is not ours may hold it without a note.
fn holder(root: &Folder) -> Option<String> {
    const LONGEST_NOTE: u64 = 1000;
    let mut note = String::new();
    beneath::object(root, LOCK).ok()??.take(LONGEST_NOTE).read_to_string(&mut note).ok()?;
    let pid: u32 = note.strip_prefix("process ")?.split(' ').next()?.parse().ok()?;
    let runs = Path::new("/proc").join(pid.to_string()).exists();
    runs.then(|| printable(note.trim()).into_owned())
}

fn etag(bytes: &[u8]) -> Etag {
    Etag(format!("\"{}\"", Sha256::of(bytes).short(16)))
}

impl Store for DirStore {
    fn url(&self) -> String {
        format!("file://{}", self.root.display())
    }

    fn identity(&self) -> String {
        self.url()
    }

    fn absence(&self) -> Option<String> {
        let remedy = "mount it, or push something there first";
        (!self.root.is_dir()).then(|| format!("no folder {}; {remedy}", self.root.display()))
    }

    fn get(&self, key: &str, unless: Option<&Etag>, limit: u64) -> Result<GetResult, StoreError> {
        let Some(bytes) = self.get_start(key, limit.saturating_add(1))? else {
            return Ok(GetResult::Missing);
        };
        if bytes.len() as u64 > limit {
            return Err(StoreError::too_large(&format!("{key} in {}", self.url()), limit));
        }
        let etag = etag(&bytes);
        Ok(if unless == Some(&etag) { GetResult::NotModified } else { GetResult::Found { bytes, etag } })
    }

    fn get_start(&self, key: &str, count: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let Some((file, size)) = self.open(key)? else { return Ok(None) };
        let mut bytes = Vec::with_capacity(size.min(count) as usize);
        file.take(count).read_to_end(&mut bytes).map_err(|e| self.failed("read", key, &e))?;
        Ok(Some(bytes))
    }

    fn size(&self, key: &str) -> Result<Option<u64>, StoreError> {
        Ok(self.open(key)?.map(|(_, size)| size))
    }

    fn put(&self, key: &str, bytes: &[u8], when: &Condition) -> Result<Etag, StoreError> {
        self.checked(key)?;
        let failed = |e: io::Error| self.failed("write", key, &e);
        let root = beneath::root(&self.root, Missing::Made).map_err(failed)?;
        let _lock = self.lock(&root).map_err(failed)?;
        let holds = match when {
            // Nothing is made for a write that will not take place.
            Condition::IfMatch(etag) => self.holds(key, etag)?,
            Condition::IfAbsent => {
                match if_there(beneath::place(&root, key, Missing::Error)).map_err(failed)? {
                    Some((folder, name)) => folder.look(name).map_err(failed)?.is_none(),
                    None => true,
                }
            }
            Condition::Always => true,
        };
        if !holds {
            return Err(StoreError::changed(key, self));
        }
        let (folder, name) = beneath::place(&root, key, Missing::Made).map_err(failed)?;
        if *when == Condition::IfAbsent {
            // Exact also where something writes here without the lock.
            let made = folder.create_new(name, bytes, 0o644).map_err(failed)?;
            return if made { Ok(etag(bytes)) } else { Err(StoreError::changed(key, self)) };
        }
        folder.write(name, &mut &*bytes, 0o644).map_err(failed)?;
        Ok(etag(bytes))
    }

    fn delete(&self, key: &str) -> Result<(), StoreError> {
        // No folder, no lock, no object.
        if self.open(key)?.is_none() {
            return Ok(());
        }
        let failed = |e: io::Error| self.failed("delete", key, &e);
        let Some(root) = self.folder().map_err(failed)? else { return Ok(()) };
        let _lock = self.lock(&root).map_err(failed)?;
        let Some((folder, name)) = if_there(beneath::place(&root, key, Missing::Error)).map_err(failed)?
        else {
            return Ok(());
        };
        folder.remove(name).map_err(failed)?;
        // A folder is there for what is in it; writers make theirs under the lock, too.
        let mut above = key;
        while let Some((folder, _)) = above.rsplit_once('/') {
            let (parent, name) = beneath::place(&root, folder, Missing::Error).map_err(failed)?;
            if !parent.remove_folder(name).map_err(failed)? {
                break;
            }
            above = folder;
        }
        Ok(())
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let failed = |e: io::Error| self.failed("list", prefix, &e);
        // Only the folder that the prefix names is walked.
        let folder = prefix.rsplit_once('/').map_or("", |(folder, _)| folder);
        if !folder.is_empty() {
            self.checked(folder)?;
        }
        let mut folders = vec![folder.to_string()];
        let mut keys = Vec::new();
        let Some(root) = self.folder().map_err(failed)? else { return Ok(keys) };
        while let Some(folder) = folders.pop() {
            let opened = beneath::folder_of(&root, &folder, Missing::Error);
            let found = opened.and_then(|opened| Ok((opened.names()?, opened)));
            // Also one that went away while we walked.
            let Some((names, opened)) = if_reached(found).map_err(failed)? else { continue };
            for name in names {
                if name.starts_with(OWN_PREFIX) {
                    continue;
                }
                let Some(stat) = opened.look(&name).map_err(failed)? else { continue };
                let key = if folder.is_empty() { name } else { format!("{folder}/{name}") };
                match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Directory => folders.push(key),
                    FileType::RegularFile if key.starts_with(prefix) => keys.push(key),
                    // What is neither is no object.
                    _ => {}
                }
            }
        }
        keys.sort();
        Ok(keys)
    }

    fn read_from(&self, key: &str, offset: u64, only: Option<&Etag>) -> Result<Opened, StoreError> {
        let failed = |e: io::Error| self.failed("read", key, &e);
        let Some((mut file, size)) = self.open(key)? else { return Ok(Opened::Missing) };
        let meta = file.metadata().map_err(failed)?;
        // A write puts another file in the place of this one.
        let etag = Etag(format!("\"{:x}-{size:x}-{:x}.{:x}\"", meta.ino(), meta.mtime(), meta.mtime_nsec()));
        if only.is_some_and(|only| *only != etag) || offset > 0 && offset >= size {
            return Ok(Opened::Changed);
        }
        file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        let length = size - offset;
        let body = Box::new(Exact::new(file, length).map_err(failed)?);
        Ok(Opened::Found(Download { length, etag, body }))
    }

    /// Among the small objects the lock is held while it is written, as by every other write. Elsewhere it is not: large
    /// files come many at a time, and a rename needs no lock.
    fn write_from(&self, key: &str, upload: &Upload<'_>) -> Result<(), StoreError> {
        self.checked(key)?;
        let failed = |e: io::Error| self.failed("write", key, &e);
        let mut source = upload.content().map_err(failed)?;
        let root = beneath::root(&self.root, Missing::Made).map_err(failed)?;
        let below = key.rsplit_once('/').map_or("", |(folder, _)| folder);
        let swept = ["", HOSTS_PREFIX, ARCHIVE_PREFIX].iter().any(|f| f.trim_end_matches('/') == below);
        let _lock = if swept { Some(self.lock(&root).map_err(failed)?) } else { None };
        let (folder, name) = beneath::place(&root, key, Missing::Made).map_err(failed)?;
        if !swept && self.is_first_in(below) {
            folder.sweep_abandoned().map_err(failed)?;
        }
        folder.write(name, &mut source, 0o644).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, DirStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = DirStore::new(&dir.path().join("a/b"));
        (dir, store)
    }

    #[test]
    fn a_missing_directory_is_empty_until_the_first_write_makes_it() {
        let (_dir, store) = store();
        assert_eq!(store.get("manifest.json", None, 10), Ok(GetResult::Missing));
        assert_eq!(store.get_start("manifest.json", 10), Ok(None));
        assert_eq!(store.size("manifest.json"), Ok(None));
        assert_eq!(store.list(""), Ok(vec![]));
        assert_eq!(store.delete("manifest.json"), Ok(()));
        assert!(!store.root.exists());
        let etag = store.put("manifest.json", b"one", &Condition::IfAbsent).unwrap();
        let bytes = b"one".to_vec();
        assert_eq!(store.get("manifest.json", None, 3), Ok(GetResult::Found { bytes, etag: etag.clone() }));
        assert_eq!(store.get("manifest.json", Some(&etag), 3), Ok(GetResult::NotModified));
        let mode = fs_err::metadata(store.root.join("manifest.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644);
    }

    #[test]
    fn a_write_whose_condition_does_not_hold_changes_nothing() {
        let (_dir, store) = store();
        let changed = |when: &Condition| matches!(store.put("k", b"no", when), Err(StoreError::Changed(_)));
        assert!(changed(&Condition::IfMatch(etag(b"one"))), "missing");
        let one = store.put("k", b"one", &Condition::IfAbsent).unwrap();
        assert!(changed(&Condition::IfAbsent));
        let two = store.put("k", b"two", &Condition::IfMatch(one.clone())).unwrap();
        assert!(changed(&Condition::IfMatch(one)));
        assert_eq!(store.get("k", None, 9), Ok(GetResult::Found { bytes: b"two".to_vec(), etag: two }));
        store.put("k", b"three", &Condition::Always).unwrap();
        assert_eq!(store.size("k"), Ok(Some(5)));
        store.delete("k").unwrap();
        assert_eq!(store.get("k", None, 9), Ok(GetResult::Missing));
        assert!(changed(&Condition::IfMatch(etag(b"three"))));
        let endless = fs_err::File::create(store.root.join("k")).unwrap();
        endless.set_len(1 << 42).unwrap();
        assert!(changed(&Condition::IfMatch(etag(b"three"))), "terabytes of nothing");
        store.delete("k").unwrap();
        store.put("a/b/c", b"x", &Condition::Always).unwrap();
        store.put("a/d", b"x", &Condition::Always).unwrap();
        store.delete("a/b/c").unwrap();
        assert!(!store.root.join("a/b").exists() && store.root.join("a/d").exists());
    }

    #[test]
    fn an_object_of_any_size_is_compared_in_bounded_memory() {
        let (_dir, store) = store();
        let one = store.put("k", b"one", &Condition::IfAbsent).unwrap();
        // As large as somebody else cares to make it, and it takes no room.
        fs_err::OpenOptions::new().write(true).open(store.root.join("k")).unwrap().set_len(1 << 40).unwrap();
        assert!(matches!(store.put("k", b"two", &Condition::IfMatch(one)), Err(StoreError::Changed(_))));
        store.put("k", b"two", &Condition::Always).unwrap();
    }

    #[test]
    fn keys_cannot_leave_the_directory_or_name_our_own_files() {
        let (_dir, store) = store();
        for bad in ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\nb", "a\0b", LOCK] {
            assert!(
                matches!(store.put(bad, b"", &Condition::Always), Err(StoreError::Refused(_))),
                "{bad:?}"
            );
            assert!(matches!(store.get(bad, None, 1), Err(StoreError::Refused(_))), "{bad:?}");
            assert!(matches!(store.delete(bad), Err(StoreError::Refused(_))), "{bad:?}");
        }
        assert!(matches!(store.list("../"), Err(StoreError::Refused(_))));
        assert!(!store.root.exists());
    }

    #[test]
    fn a_listing_is_recursive_sorted_and_without_our_own_files() {
        let (_dir, store) = store();
        for key in ["manifests/b", "manifests/a", "manifest.json", "hosts/biz.json", "nar/x/y"] {
            store.put(key, b"x", &Condition::Always).unwrap();
        }
        fs_err::write(store.root.join(".omni-deploy-tmp"), "").unwrap();
        fs_err::write(store.root.join("manifests/.omni-deploy-tmp"), "").unwrap();
        let all = ["hosts/biz.json", "manifest.json", "manifests/a", "manifests/b", "nar/x/y"];
        assert_eq!(store.list("").unwrap(), all);
        assert_eq!(store.list("manifests/").unwrap(), &all[2..4]);
        assert_eq!(store.list("manifest").unwrap(), &all[1..4]);
        assert_eq!(store.list("nar/x").unwrap(), ["nar/x/y"]);
        assert_eq!(store.list("nothing/here/").unwrap(), Vec::<String>::new());
    }

    #[test]
    fn what_is_larger_than_its_limit_is_not_read_and_a_start_is_cut() {
        let (_dir, store) = store();
        store.put("k", b"0123456789", &Condition::Always).unwrap();
        assert!(matches!(store.get("k", None, 9), Err(StoreError::TooLarge(_))));
        assert!(matches!(store.get("k", None, 10), Ok(GetResult::Found { .. })));
        assert_eq!(store.get_start("k", 4).unwrap().unwrap(), b"0123");
        assert_eq!(store.get_start("k", 40).unwrap().unwrap(), b"0123456789");
    }

    #[test]
    fn a_lock_that_is_never_given_back_is_reported_with_its_holder() {
        let (_dir, mut store) = store();
        store.put("k", b"one", &Condition::Always).unwrap();
        store.lock_wait = Duration::from_millis(30);
        let held = store.lock(&store.folder().unwrap().unwrap()).unwrap();
        let error = store.put("k", b"two", &Condition::Always).unwrap_err();
        assert!(matches!(error, StoreError::Unreachable(_)));
        let (text, pid) = (error.to_string(), format!("process {} ", std::process::id()));
        assert!(text.contains(&pid) && text.contains(LOCK) && text.contains("fuser"), "{text}");
        assert!(matches!(store.get("k", None, 9), Ok(GetResult::Found { .. })), "reading takes no lock");
        fs_err::write(store.root.join(LOCK), "process 4194305 (gone)\n").unwrap();
        let text = store.put("k", b"two", &Condition::Always).unwrap_err().to_string();
        assert!(text.contains("by another process") && !text.contains("4194305"), "{text}");
        drop(held);
        // Those who gave up stand in the queue before it.
        store.lock_wait = LOCK_WAIT;
        store.put("k", b"two", &Condition::Always).unwrap();
    }

    #[test]
    fn the_lock_is_for_those_alone_who_may_write() {
        let (_dir, store) = store();
        let mode = |path: &Path| fs_err::metadata(path).unwrap().permissions().mode() & 0o777;
        let folder = |m| fs_err::set_permissions(&store.root, std::fs::Permissions::from_mode(m)).unwrap();
        store.put("k", b"one", &Condition::Always).unwrap();
        let lock = store.root.join(LOCK);
        assert_eq!(mode(&lock), 0o600);
        fs_err::set_permissions(&lock, std::fs::Permissions::from_mode(0o644)).unwrap();
        store.put("k", b"two", &Condition::Always).unwrap();
        assert_eq!(mode(&lock), 0o600, "one of an older version");
        fs_err::remove_file(&lock).unwrap();
        folder(0o775);
        store.put("k", b"three", &Condition::Always).unwrap();
        assert_eq!(mode(&lock), 0o660, "others who write here must be able to take it, and nobody else");
        folder(0o777);
        store.put("k", b"three", &Condition::Always).unwrap();
        assert_eq!(mode(&lock), 0o666);
        // Its owner may put anything into a folder: a link leads nowhere.
        let victim = store.root.join("victim");
        fs_err::write(&victim, "precious").unwrap();
        fs_err::remove_file(&lock).unwrap();
        fs_err::os::unix::fs::symlink(&victim, &lock).unwrap();
        assert!(store.put("k", b"four", &Condition::Always).is_err());
        assert_eq!(fs_err::read_to_string(&victim).unwrap(), "precious");
    }

    #[test]
    fn a_file_in_the_place_of_a_folder_is_said() {
        let (_dir, store) = store();
        store.put("hosts", b"x", &Condition::Always).unwrap();
        assert_eq!(store.get("hosts/biz.json", None, 9), Ok(GetResult::Missing));
        let error = store.put("hosts/biz.json", b"x", &Condition::Always).unwrap_err().to_string();
        assert!(error.contains("hosts/biz.json"), "{error}");
        let error = DirStore::new(&store.root.join("hosts")).get("manifest.json", None, 9).unwrap_err();
        assert!(error.to_string().contains("a file is where a folder should be"), "{error}");
    }
}
