//! The one writer: every file, link and removal that must survive a power cut goes through here. A reader sees
//! the old content or the new, never a part. Temporary files are named `.omni-deploy-*` so that leftovers of
//! a killed process are known as ours; [`sweep`] removes them.

pub mod opened;

use crate::failpoint::{self, Effect};
use crate::files::if_there;
use crate::parallel;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// How the names of temporary files begin.
pub const TEMP_PREFIX: &str = ".omni-deploy-";

fn parent(path: &Path) -> io::Result<&Path> {
    path.parent().filter(|p| !p.as_os_str().is_empty()).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("{} has no folder above it", path.display()))
    })
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    fs_err::File::open(dir)?.sync_all()
}

fn named(error: io::Error, what: &str, path: &Path) -> io::Error {
    // The temporary file's own name, which tempfile adds, tells nobody anything.
    let text = error.to_string();
    let cause = text.split(" at path ").next().unwrap_or(&text);
    io::Error::new(error.kind(), format!("cannot {what} {}: {cause}", path.display()))
}

fn temp_with(path: &Path, mut bytes: &[u8], mode: u32) -> io::Result<tempfile::NamedTempFile> {
    let temp = unsynced(path, &mut bytes, mode)?;
    temp.as_file().sync_all().map_err(|e| named(e, "sync", path))?;
    failpoint::point("within write", path.display());
    Ok(temp)
}

fn unsynced(path: &Path, source: &mut dyn Read, mode: u32) -> io::Result<tempfile::NamedTempFile> {
    let mut temp = tempfile::Builder::new()
        .prefix(TEMP_PREFIX)
        .permissions(std::fs::Permissions::from_mode(0o600))
        .tempfile_in(parent(path)?)
        .map_err(|e| named(e, "write", path))?;
    io::copy(source, &mut temp).map_err(|e| named(e, "write", path))?;
    temp.as_file()
        .set_permissions(std::fs::Permissions::from_mode(mode))
        .map_err(|e| named(e, "set the mode of", path))?;
    Ok(temp)
}

/// Replaces `path` with `bytes` and `mode`, whole or not at all, and returns when it is on the disk.
/// The folder must exist. Errors name the path.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let _effect = failpoint::begin("write", path.display()).map_err(|e| named(e, "write", path))?;
    temp_with(path, bytes, mode)?.persist(path).map_err(|e| named(e.error, "write", path))?;
    sync_dir(parent(path)?)
}

/// The same, for a file that belongs to this user and group.
pub fn write_owned(path: &Path, bytes: &[u8], mode: u32, (user, group): (u32, u32)) -> io::Result<()> {
    let _effect = failpoint::begin("write", path.display()).map_err(|e| named(e, "write", path))?;
    let temp = temp_with(path, bytes, 0o600)?;
    // The owner first: a change of owner takes bits of the mode away.
    std::os::unix::fs::fchown(temp.as_file(), Some(user), Some(group))
        .and_then(|()| temp.as_file().set_permissions(std::fs::Permissions::from_mode(mode)))
        .and_then(|()| temp.as_file().sync_all())
        .map_err(|e| named(e, "set the owner of", path))?;
    temp.persist(path).map_err(|e| named(e.error, "write", path))?;
    sync_dir(parent(path)?)
}

/// Creates `path`; false, with nothing changed, when something of that name is there already.
pub fn create_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<bool> {
    let _effect = failpoint::begin("create", path.display()).map_err(|e| named(e, "create", path))?;
    match temp_with(path, bytes, mode)?.persist_noclobber(path) {
        Ok(_) => sync_dir(parent(path)?).map(|()| true),
        Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(named(e.error, "create", path)),
    }
}

/// Makes a link that is not on the disk yet.
fn linked(target: &Path, link: &Path) -> io::Result<Effect> {
    let dir = parent(link)?;
    let name = link.file_name().unwrap_or_default().to_string_lossy();
    let temp: PathBuf = dir.join(format!("{TEMP_PREFIX}{}-{name}", std::process::id()));
    let effect = failpoint::begin("link", link.display()).map_err(|e| named(e, "link", link))?;
    // Where nothing is in the way, there is nothing to leave behind either.
    match std::os::unix::fs::symlink(target, link) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            remove(&temp)?;
            fs_err::os::unix::fs::symlink(target, &temp)?;
            failpoint::point("within link", link.display());
            fs_err::rename(&temp, link)?;
        }
        made => made.map_err(|e| named(e, "link", link))?,
    }
    Ok(effect)
}

/// Removes a file or link; one that is not there is no error. Returns whether there was one.
pub fn remove(path: &Path) -> io::Result<bool> {
    let _effect = failpoint::begin("remove", path.display()).map_err(|e| named(e, "remove", path))?;
    let removed = if_there(fs_err::remove_file(path))?.is_some();
    if removed {
        sync_dir(parent(path)?)?;
    }
    Ok(removed)
}

/// How many files of a batch are open, and how many are flushed side by side: the disk takes flushes that come together
/// as one.
const OPEN: usize = 256;
const SIDE_BY_SIDE: usize = 16;

/// What one phase writes, links and removes, for many services, flushed together: every file before the first of them is
/// put in place, and then every folder once. Nothing of it is on the disk for certain before [`Batch::finish`] returns,
/// so what must be there before something else belongs into a batch before that.
#[derive(Debug, Default)]
pub struct Batch {
    open: Vec<(PathBuf, tempfile::NamedTempFile, Effect)>,
    synced: Vec<(PathBuf, tempfile::TempPath, Effect)>,
    done: Vec<(PathBuf, Effect)>,
    failed: BTreeMap<PathBuf, io::Error>,
}

impl Batch {
    /// As [`write`](write()) does.
    pub fn write(&mut self, path: &Path, mut bytes: &[u8], mode: u32) {
        let begun = failpoint::begin("write", path.display()).map_err(|e| named(e, "write", path));
        match begun.and_then(|effect| Ok((unsynced(path, &mut bytes, mode)?, effect))) {
            Ok((temp, effect)) => self.open.push((path.to_path_buf(), temp, effect)),
            Err(e) => drop(self.failed.insert(path.to_path_buf(), e)),
        }
        if self.open.len() >= OPEN {
            self.sync_files(&sync_file);
        }
    }

    /// Makes `link` a symbolic link to `target`, replacing what is there (a file or a link, not a folder).
    pub fn symlink(&mut self, target: &Path, link: &Path) {
        match linked(target, link) {
            Ok(effect) => self.done.push((link.to_path_buf(), effect)),
            Err(e) => drop(self.failed.insert(link.to_path_buf(), e)),
        }
    }

    /// As [`remove`] does; what is not there is no error, nor is a folder that is not there.
    pub fn remove(&mut self, path: &Path) {
        let begun = failpoint::begin("remove", path.display()).map_err(|e| named(e, "remove", path));
        match if_there(begun.and_then(|effect| fs_err::remove_file(path).map(|()| effect))) {
            Ok(removed) => self.done.extend(removed.map(|effect| (path.to_path_buf(), effect))),
            Err(e) => drop(self.failed.insert(path.to_path_buf(), e)),
        }
    }

    /// Puts all of it in place and returns when it is on the disk; what failed, by path. What did not fail is there.
    pub fn finish(self) -> BTreeMap<PathBuf, io::Error> {
        self.finish_by(&sync_file, &sync_dir)
    }

    fn finish_by(
        mut self,
        sync_file: &(impl Fn(&tempfile::NamedTempFile) -> io::Result<()> + Sync),
        sync_dir: &(impl Fn(&Path) -> io::Result<()> + Sync),
    ) -> BTreeMap<PathBuf, io::Error> {
        self.sync_files(sync_file);
        for (path, temp, effect) in std::mem::take(&mut self.synced) {
            match temp.persist(&path) {
                Ok(()) => self.done.push((path, effect)),
                Err(e) => drop(self.failed.insert(path.clone(), named(e.error, "write", &path))),
            }
        }
        let folders: BTreeSet<&Path> = self.done.iter().filter_map(|(path, _)| path.parent()).collect();
        let folders: Vec<&Path> = folders.into_iter().collect();
        let ended = parallel::map(&folders, SIDE_BY_SIDE, |folder| sync_dir(folder));
        for (folder, e) in
            folders.iter().zip(ended).filter_map(|(folder, ended)| Some((folder, ended.err()?)))
        {
            for (path, _) in self.done.iter().filter(|(path, _)| path.parent() == Some(folder)) {
                // One for each: an error of the kernel's cannot be copied.
                let e = io::Error::new(e.kind(), e.to_string());
                self.failed.insert(path.clone(), named(e, "sync the folder of", path));
            }
        }
        self.failed
    }

    fn sync_files(&mut self, sync: &(impl Fn(&tempfile::NamedTempFile) -> io::Result<()> + Sync)) {
        let ended = parallel::map(&self.open, SIDE_BY_SIDE, |(_, temp, _)| sync(temp));
        for ((path, temp, effect), ended) in std::mem::take(&mut self.open).into_iter().zip(ended) {
            match ended {
                Ok(()) => {
                    failpoint::point("within write", path.display());
                    self.synced.push((path, temp.into_temp_path(), effect));
                }
                Err(e) => drop(self.failed.insert(path.clone(), named(e, "sync", &path))),
            }
        }
    }
}

fn sync_file(file: &tempfile::NamedTempFile) -> io::Result<()> {
    file.as_file().sync_all()
}

/// Removes a folder that is empty; one that is not, or is not there, is no error. Returns whether it was removed.
pub fn remove_folder(path: &Path) -> io::Result<bool> {
    let _effect = failpoint::begin("remove folder", path.display()).map_err(|e| named(e, "remove", path))?;
    match fs_err::remove_dir(path) {
        Ok(()) => sync_dir(parent(path)?).map(|()| true),
        Err(e) if matches!(e.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Makes a folder and those above it; `mode` is given to the last, also when it was there.
pub fn folder(path: &Path, mode: u32) -> io::Result<()> {
    if let Ok(meta) = fs_err::metadata(path)
        && meta.is_dir()
        && meta.permissions().mode() & 0o7777 == mode
    {
        return Ok(());
    }
    let _effect = failpoint::begin("make folder", path.display()).map_err(|e| named(e, "make", path))?;
    fs_err::create_dir_all(path)?;
    fs_err::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

/// Returns when all that was written so far to the file system of this folder is on the disk, by whomever it was.
pub fn flush(dir: &Path) -> io::Result<()> {
    let _effect = failpoint::mark("flush", dir.display());
    let flushed = rustix::fs::syncfs(fs_err::File::open(dir)?).map_err(io::Error::from);
    flushed.map_err(|e| named(e, "flush the file system of", dir))
}

/// A folder in `dir` for as long as the value lives, for nobody else to look into.
pub fn scratch(dir: &Path) -> io::Result<tempfile::TempDir> {
    let alone = std::fs::Permissions::from_mode(0o700);
    tempfile::Builder::new().prefix(TEMP_PREFIX).permissions(alone).tempdir_in(dir)
}

/// Removes temporary files and folders that a killed process left in `dir`. Only for a folder whose lock is
/// held: another process could be about to rename its own.
pub fn sweep(dir: &Path) -> io::Result<()> {
    for entry in if_there(fs_err::read_dir(dir))?.into_iter().flatten() {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(TEMP_PREFIX) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs_err::remove_dir_all(entry.path())?;
        } else {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_replaces_whole_files_and_leaves_nothing_beside_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write(&path, b"one", 0o644).unwrap();
        write(&path, b"two", 0o600).unwrap();
        assert_eq!(fs_err::read(&path).unwrap(), b"two");
        assert_eq!(fs_err::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_batch_is_flushed_before_any_of_it_is_in_place_and_each_folder_once() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        for folder in [&a, &b] {
            fs_err::create_dir(folder).unwrap();
            fs_err::write(folder.join("old"), "").unwrap();
        }
        let paths: Vec<PathBuf> = (0..100).map(|n| a.join(format!("f{n}"))).collect();
        let mut batch = Batch::default();
        paths.iter().for_each(|path| batch.write(path, b"new", 0o640));
        batch.symlink(Path::new("/target"), &b.join("link"));
        batch.remove(&b.join("old"));
        batch.remove(&b.join("never there"));
        batch.write(&dir.path().join("missing/f"), b"", 0o644);
        let (files, folders) = (std::sync::Mutex::new(0), std::sync::Mutex::new(Vec::new()));
        let in_place = || paths.iter().filter(|p| p.exists()).count();
        let failed = batch.finish_by(
            &|file| {
                assert_eq!(in_place(), 0);
                *files.lock().unwrap() += 1;
                file.as_file().sync_all()
            },
            &|folder| {
                assert_eq!(in_place(), 100);
                folders.lock().unwrap().push(folder.to_path_buf());
                if folder == b { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
            },
        );
        assert_eq!(*files.lock().unwrap(), 100);
        let mut folders = folders.into_inner().unwrap();
        folders.sort();
        assert_eq!(folders, [a.clone(), b.clone()]);
        let failed: Vec<PathBuf> = failed.into_keys().collect();
        assert_eq!(failed, [b.join("link"), b.join("old"), dir.path().join("missing/f")]);
        assert_eq!(fs_err::read(&paths[99]).unwrap(), b"new");
        assert_eq!(fs_err::metadata(&paths[0]).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(fs_err::read_dir(&a).unwrap().count(), 101);
    }

    #[test]
    fn a_batch_of_more_files_than_may_be_open_is_written_whole() {
        let dir = tempfile::tempdir().unwrap();
        let mut batch = Batch::default();
        for n in 0..2 * OPEN + 1 {
            batch.write(&dir.path().join(n.to_string()), b"x", 0o644);
            assert!(batch.open.len() < OPEN);
        }
        assert!(batch.finish().is_empty());
        assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 2 * OPEN + 1);
    }

    #[test]
    fn nobody_else_looks_into_a_scratch_folder() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = scratch(dir.path()).unwrap();
        assert_eq!(fs_err::metadata(scratch.path()).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn create_new_never_overwrites() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        assert!(create_new(&path, b"one", 0o644).unwrap());
        assert!(!create_new(&path, b"two", 0o644).unwrap());
        assert_eq!(fs_err::read(&path).unwrap(), b"one");
        assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_link_is_replaced_and_removal_says_whether_there_was_one() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("l");
        let _effect = linked(Path::new("/a"), &link).unwrap();
        let _effect = linked(Path::new("/b"), &link).unwrap();
        assert_eq!(fs_err::read_link(&link).unwrap(), Path::new("/b"));
        assert!(remove(&link).unwrap());
        assert!(!remove(&link).unwrap());
    }

    #[test]
    fn sweeping_takes_our_leftovers_only() {
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join(".omni-deploy-abc"), "").unwrap();
        fs_err::write(scratch(dir.path()).unwrap().keep().join("f"), "").unwrap();
        fs_err::write(dir.path().join("keep"), "").unwrap();
        sweep(dir.path()).unwrap();
        let left: Vec<_> = fs_err::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["keep"]);
    }

    #[test]
    fn a_folder_that_is_missing_is_named() {
        let error = write(Path::new("/nonexistent-folder/f"), b"", 0o644).unwrap_err().to_string();
        assert!(error.contains("/nonexistent-folder/f"), "{error}");
    }
}
