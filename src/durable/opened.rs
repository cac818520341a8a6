//! The same in a folder that was opened: whatever becomes of its path meanwhile, what is done reaches that folder and
//! nothing else. No link is followed, and nothing but a regular file is swept.

use super::{TEMP_PREFIX, named};
use crate::files::if_there;
use crate::hash::hex;
use crate::{failpoint, random};
use fs_err::File;
use rustix::fs::{self, AtFlags, FileType, FlockOperation, Mode, OFlags};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// A folder that was opened, with its path for people.
#[derive(Debug)]
pub struct Folder {
    fd: OwnedFd,
    shown: PathBuf,
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The longest name after [`TEMP_PREFIX`] that a temporary file of ours has.
const LONGEST_RANDOM: usize = 16;

impl Folder {
    /// Of a descriptor, which may be one that only names the folder (`O_PATH`).
    pub fn new(fd: OwnedFd, shown: &Path) -> Self {
        Folder { fd, shown: shown.to_path_buf() }
    }

    /// The descriptor.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Its path, for people.
    pub fn shown(&self) -> &Path {
        &self.shown
    }

    /// What stands under a name in it, links not followed; None where there is nothing.
    pub fn look(&self, name: &str) -> io::Result<Option<fs::Stat>> {
        if_there(fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW).map_err(io::Error::from))
    }

    /// A folder in it; one that is a link, or no folder, is an error (`ENOTDIR`, `ELOOP`).
    pub fn folder(&self, name: &str) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Folder::new(fs::openat(&self.fd, name, flags, Mode::empty())?, &self.shown.join(name)))
    }

    /// The same; made where there is none, for everybody to look into, as hosts read as users of their own whatever the umask
    /// here is.
    pub fn made_folder(&self, name: &str) -> io::Result<Self> {
        match self.folder(name) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        match fs::mkdirat(&self.fd, name, Mode::from_raw_mode(0o777)) {
            Err(rustix::io::Errno::EXIST) => return self.folder(name),
            other => other?,
        }
        let made = self.folder(name)?;
        failpoint::point("made folder", made.shown.display());
        let open = made.reading()?;
        let stat = fs::fstat(&open)?;
        // Whoever else can write here may have put another in its place: one with something in it is not the one.
        let ours = stat.st_uid == rustix::process::geteuid().as_raw() && made.names()?.is_empty();
        if ours && stat.st_mode & 0o755 != 0o755 {
            fs::fchmod(&open, Mode::from_raw_mode(stat.st_mode & 0o7777 | 0o755))?;
        }
        self.sync()?;
        Ok(made)
    }

    /// The names in it.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::Dir::new(self.reading()?)? {
            // What is not UTF-8 was not written here.
            if let Ok(name) = entry?.file_name().to_str() {
                names.push(name.to_string());
            }
        }
        names.retain(|name| name != "." && name != "..");
        Ok(names)
    }

    fn reading(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(fs::openat(&self.fd, ".", flags, Mode::empty())?)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(fs::fsync(self.reading()?)?)
    }

    /// [`super::write`] of what a reader gives, which may be more than fits into memory.
    pub fn write(&self, name: &str, source: &mut dyn Read, mode: u32) -> io::Result<()> {
        let path = self.shown.join(name);
        let _effect = failpoint::begin("write", path.display()).map_err(|e| named(e, "write", &path))?;
        let (temp, _held) = self.temp(&path, source, mode)?;
        self.placed(&temp, fs::renameat(&self.fd, &temp, &self.fd, name))
            .map_err(|e| named(e, "write", &path))?;
        self.sync()
    }

    /// [`super::create_new`].
    pub fn create_new(&self, name: &str, mut bytes: &[u8], mode: u32) -> io::Result<bool> {
        let path = self.shown.join(name);
        let _effect = failpoint::begin("create", path.display()).map_err(|e| named(e, "create", &path))?;
        let (temp, _held) = self.temp(&path, &mut bytes, mode)?;
        let linked = fs::linkat(&self.fd, &temp, &self.fd, name, AtFlags::empty());
        fs::unlinkat(&self.fd, &temp, AtFlags::empty())?;
        match linked {
            Ok(()) => self.sync().map(|()| true),
            Err(rustix::io::Errno::EXIST) => Ok(false),
            Err(e) => Err(named(e.into(), "create", &path)),
        }
    }

    /// [`super::remove`].
    pub fn remove(&self, name: &str) -> io::Result<bool> {
        let path = self.shown.join(name);
        let _effect = failpoint::begin("remove", path.display()).map_err(|e| named(e, "remove", &path))?;
        match fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) => self.sync().map(|()| true),
            Err(rustix::io::Errno::NOENT) => Ok(false),
            Err(e) => Err(named(e.into(), "remove", &path)),
        }
    }

    /// Removes a folder in it that is empty; whether it was.
    pub fn remove_folder(&self, name: &str) -> io::Result<bool> {
        match fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::NOTEMPTY | rustix::io::Errno::NOENT) => Ok(false),
            Err(e) => Err(named(e.into(), "remove", &self.shown.join(name))),
        }
    }

    /// Removes temporary files that a killed process left: regular files with a name that we give. Only under the lock
    /// of those who write here.
    pub fn sweep(&self) -> io::Result<()> {
        self.temporary()?.iter().try_for_each(|name| self.remove(name).map(drop))
    }

    /// The same where others may be writing, whom no lock keeps out: each holds its own file for as long as it needs it.
    pub fn sweep_abandoned(&self) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        for name in self.temporary()? {
            // One that we may not open is somebody else's to take away.
            let Ok(file) = fs::openat(&self.fd, &name, flags, Mode::empty()) else { continue };
            if fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                self.remove(&name)?;
            }
        }
        Ok(())
    }

    /// The regular files in it with a name that we give to temporary ones.
    fn temporary(&self) -> io::Result<Vec<String>> {
        let is_file = |stat: fs::Stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let mut found = Vec::new();
        for name in self.names()?.into_iter().filter(|name| is_temporary(name)) {
            if self.look(&name)?.is_some_and(is_file) {
                found.push(name);
            }
        }
        Ok(found)
    }

    /// A temporary file with its content on the disk: its name, and the file, which is held while it is open.
    fn temp(&self, path: &Path, source: &mut dyn Read, mode: u32) -> io::Result<(String, File)> {
        let (temp, fd) = self.new_temp().map_err(|e| named(e, "write", path))?;
        let file = File::from_parts(fd.into(), path);
        let filled = io::copy(source, &mut file.file())
            .and_then(|_| Ok(fs::fchmod(file.file(), Mode::from_raw_mode(mode))?))
            .and_then(|()| file.file().sync_all());
        self.placed(&temp, filled).map_err(|e| named(e, "write", path))?;
        failpoint::point("within write", path.display());
        Ok((temp, file))
    }

    fn new_temp(&self) -> io::Result<(String, OwnedFd)> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        loop {
            let temp = format!("{TEMP_PREFIX}{}", hex(&random::bytes::<{ LONGEST_RANDOM / 2 }>()));
            match fs::openat(&self.fd, &temp, flags, Mode::from_raw_mode(0o600)) {
                Ok(fd) => {
                    fs::flock(&fd, FlockOperation::LockExclusive)?;
                    // Who sweeps may have had it first.
                    if fs::fstat(&fd)?.st_nlink > 0 {
                        return Ok((temp, fd));
                    }
                }
                Err(rustix::io::Errno::EXIST) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Takes a temporary file away that did not get where it should.
    fn placed<E: Into<io::Error>>(&self, temp: &str, done: Result<(), E>) -> io::Result<()> {
        done.map_err(|e| {
            // What stays is swept by the next one; why it is there is what counts.
            let _cleared = fs::unlinkat(&self.fd, temp, AtFlags::empty());
            e.into()
        })
    }
}

/// Whether a name is one that we give to a temporary file; older programs gave it six letters and digits.
fn is_temporary(name: &str) -> bool {
    name.strip_prefix(TEMP_PREFIX).is_some_and(|random| {
        (6..=LONGEST_RANDOM).contains(&random.len()) && random.chars().all(|c| c.is_ascii_alphanumeric())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn opened(dir: &Path) -> Folder {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        Folder::new(fs::openat(fs::CWD, dir, flags, Mode::empty()).unwrap(), dir)
    }

    #[test]
    fn what_a_killed_writer_left_is_taken_away_and_what_is_being_written_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let folder = opened(dir.path());
        fs_err::write(dir.path().join(".omni-deploy-0123456789abcdef"), "half").unwrap();
        fs_err::write(dir.path().join("nar"), "whole").unwrap();
        let (under_way, held) = folder.temp(&dir.path().join("f"), &mut &b"half"[..], 0o644).unwrap();
        folder.sweep_abandoned().unwrap();
        let mut names = folder.names().unwrap();
        names.sort();
        assert_eq!(names, [under_way.as_str(), "nar"]);
        drop(held);
        folder.sweep_abandoned().unwrap();
        assert_eq!(folder.names().unwrap(), ["nar"]);
    }

    #[test]
    fn what_is_written_is_whole_and_reaches_the_folder_that_was_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (was, is) = (dir.path().join("was"), dir.path().join("is"));
        fs_err::create_dir(&was).unwrap();
        let folder = opened(&was);
        fs_err::rename(&was, &is).unwrap();
        fs_err::os::unix::fs::symlink("/nonexistent", &was).unwrap();
        folder.write("f", &mut &b"one"[..], 0o644).unwrap();
        folder.write("f", &mut &b"two"[..], 0o600).unwrap();
        assert!(!folder.create_new("f", b"three", 0o644).unwrap());
        assert!(folder.create_new("g", b"three", 0o644).unwrap());
        assert_eq!(fs_err::read(is.join("f")).unwrap(), b"two");
        assert_eq!(fs_err::metadata(is.join("f")).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs_err::read(is.join("g")).unwrap(), b"three");
        assert_eq!(fs_err::read_dir(&is).unwrap().count(), 2);
        assert!(folder.remove("g").unwrap() && !folder.remove("g").unwrap());
    }

    #[test]
    fn a_link_is_no_folder_and_is_replaced_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (inner, outer) = (dir.path().join("in"), dir.path().join("out"));
        fs_err::create_dir(&inner).unwrap();
        fs_err::create_dir(&outer).unwrap();
        fs_err::write(outer.join("f"), "precious").unwrap();
        fs_err::os::unix::fs::symlink(&outer, inner.join("d")).unwrap();
        fs_err::os::unix::fs::symlink(outer.join("f"), inner.join("f")).unwrap();
        let folder = opened(&inner);
        assert!(folder.folder("d").is_err() && folder.made_folder("d").is_err());
        folder.write("f", &mut &b"ours"[..], 0o644).unwrap();
        assert_eq!(fs_err::read(outer.join("f")).unwrap(), b"precious");
        assert_eq!(fs_err::read(inner.join("f")).unwrap(), b"ours");
    }

    #[test]
    fn only_files_with_our_names_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in [".omni-deploy-a1B2c3", ".omni-deploy-0123456789abcdef", ".omni-deploy-my-notes", "keep"]
        {
            fs_err::write(at(name), "").unwrap();
        }
        fs_err::create_dir(at(".omni-deploy-folder")).unwrap();
        fs_err::os::unix::fs::symlink(at("keep"), at(".omni-deploy-linked")).unwrap();
        opened(dir.path()).sweep().unwrap();
        let mut left = opened(dir.path()).names().unwrap();
        left.sort();
        assert_eq!(left, [".omni-deploy-folder", ".omni-deploy-linked", ".omni-deploy-my-notes", "keep"]);
    }
}
