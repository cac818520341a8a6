//! How a directory store is reached: its folder once, as a descriptor, and everything in it from there, name by name. In
//! it no link is followed, nothing is waited for, and only regular files are objects: its folder may be somebody
//! else's, and root reads and writes it. On the way to it links may lie, of those who could put anything there anyway.

use crate::durable::opened::Folder;
use fs_err::File;
use rustix::fs::{self, FileType, Mode, OFlags, Stat};
use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// How many links are followed, as the kernel does (path_resolution(7)).
const MOST_LINKS: usize = 40;

/// Whether folders that are missing are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// It is an error, `NotFound`.
    Error,
    /// They are made.
    Made,
}

/// Opens the store's folder. A link on the way is followed if root made it, or this user, or whoever has the folder that
/// it leads to; anybody else's would lead us to what is not his to give.
pub fn root(path: &Path, missing: Missing) -> io::Result<Folder> {
    let top = || -> io::Result<Folder> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Folder::new(fs::openat(fs::CWD, "/", flags, Mode::empty())?, Path::new("/")))
    };
    let mut left: VecDeque<OsString> = steps(path);
    let mut at = top()?;
    let mut links: Vec<(PathBuf, u32)> = Vec::new();
    while let Some(step) = left.pop_front() {
        let name =
            step.to_str().ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "its path is not UTF-8"))?;
        let stat = at.look(name)?;
        let is = stat.map(|stat| FileType::from_raw_mode(stat.st_mode));
        at = match (is, missing) {
            (Some(FileType::Symlink), _) => {
                let (to, owner) = link(&at, name)?;
                links.push((at.shown().join(name), owner));
                if links.len() > MOST_LINKS {
                    return Err(not_ours(format!("{} is a link that leads in a circle", path.display())));
                }
                for step in steps(&to).into_iter().rev() {
                    left.push_front(step);
                }
                if to.is_absolute() { top()? } else { at }
            }
            (None, Missing::Made) => at.made_folder(name)?,
            (_, _) => at.folder(name)?,
        };
    }
    let owner = fs::fstat(&at)?.st_uid;
    let trusted = [0, rustix::process::geteuid().as_raw(), owner];
    match links.iter().find(|(_, maker)| !trusted.contains(maker)) {
        None => Ok(Folder::new(at.into_fd(), path)),
        Some((link, maker)) => Err(not_ours(format!(
            "{} is a link of user {maker} into a folder of user {owner}; name the folder itself in 'store', or have root \
             make the link",
            link.display()
        ))),
    }
}

fn steps(path: &Path) -> VecDeque<OsString> {
    let step = |part: Component<'_>| match part {
        Component::Normal(name) => Some(name.to_os_string()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().filter_map(step).collect()
}

/// Where a link leads and whose it is, of one and the same link.
fn link(at: &Folder, name: &str) -> io::Result<(PathBuf, u32)> {
    let fd = fs::openat(at, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let to = fs::readlinkat(&fd, "", Vec::new())?;
    Ok((PathBuf::from(OsString::from_vec(to.into_bytes())), fs::fstat(&fd)?.st_uid))
}

/// The folder of a key's last part, and that part.
pub fn place<'a>(root: &Folder, key: &'a str, missing: Missing) -> io::Result<(Folder, &'a str)> {
    let (folder, name) = key.rsplit_once('/').unwrap_or(("", key));
    Ok((folder_of(root, folder, missing)?, name))
}

/// A folder below the store's.
pub fn folder_of(root: &Folder, folder: &str, missing: Missing) -> io::Result<Folder> {
    let mut at = Folder::new(root.folder(".")?.into_fd(), root.shown());
    for name in folder.split('/').filter(|name| !name.is_empty()) {
        let next = if missing == Missing::Made { at.made_folder(name) } else { at.folder(name) };
        at = match next {
            Ok(next) => next,
            Err(e) => {
                return Err(at
                    .look(name)?
                    .and_then(|stat| no_folder(&at.shown().join(name), &stat))
                    .unwrap_or(e));
            }
        };
    }
    Ok(Folder::new(at.into_fd(), &root.shown().join(folder)))
}

/// An object's file; None where there is none, or a folder, which is what the objects below it make of a key.
pub fn object(folder: &Folder, name: &str) -> io::Result<Option<File>> {
    let Some(stat) = folder.look(name)? else { return Ok(None) };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => return Ok(None),
        FileType::RegularFile => {}
        other => return Err(no_object(&folder.shown().join(name), other)),
    }
    // Another may have taken its place since: one that is waited for, say.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match fs::openat(folder, name, flags, Mode::empty()) {
        Ok(fd) => File::from_parts(fd.into(), folder.shown().join(name)),
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    if !file.metadata()?.is_file() {
        return Err(no_object(&folder.shown().join(name), FileType::Unknown));
    }
    Ok(Some(file))
}

/// The file of a lock, made where there is none; and whether we may write to it. One that belongs to somebody else is locked
/// all the same: flock(2) needs no more than a reader.
pub fn lock(folder: &Folder, name: &str, mode: u32) -> io::Result<(File, bool)> {
    let both = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let writing = fs::openat(folder, name, both | OFlags::RDWR | OFlags::CREATE, Mode::from_raw_mode(mode));
    let named = |fd: OwnedFd| File::from_parts(fd.into(), folder.shown().join(name));
    let (file, ours) = match writing {
        Ok(fd) => (named(fd), true),
        Err(rustix::io::Errno::ACCESS) if folder.look(name)?.is_some() => {
            (named(fs::openat(folder, name, both | OFlags::RDONLY, Mode::empty())?), false)
        }
        Err(e) => {
            let stat = folder.look(name)?.map(|stat| FileType::from_raw_mode(stat.st_mode));
            let other = stat.filter(|is| *is != FileType::RegularFile);
            return Err(other.map_or(e.into(), |is| no_object(&folder.shown().join(name), is)));
        }
    };
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(no_object(&folder.shown().join(name), FileType::Unknown));
    }
    // Of a file that has another name as well nobody knows what it is.
    Ok((file, ours && meta.nlink() == 1))
}

/// Why something that is no regular file is no object.
fn no_object(path: &Path, is: FileType) -> io::Error {
    let what = match is {
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a pipe (FIFO)",
        FileType::Socket => "a socket",
        FileType::BlockDevice | FileType::CharacterDevice => "a device",
        FileType::Directory => "a folder",
        FileType::RegularFile | FileType::Unknown => "something else",
    };
    let at = path.display();
    not_ours(format!("{at} is {what}, where a regular file should be; remove it: rm {at}"))
}

/// Why a link is no folder.
fn no_folder(path: &Path, stat: &Stat) -> Option<io::Error> {
    let at = path.display();
    (FileType::from_raw_mode(stat.st_mode) == FileType::Symlink).then(|| {
        not_ours(format!(
            "{at} is a symbolic link, where a folder should be; put the folder itself there, or name in 'store' where it leads"
        ))
    })
}

/// That something is there which nobody here has made.
fn not_ours(text: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_way_to_a_store_may_have_links_of_those_who_own_what_they_lead_to() {
        let dir = tempfile::tempdir().unwrap();
        let (real, way) = (dir.path().join("real/store"), dir.path().join("way"));
        assert_eq!(root(&real, Missing::Error).unwrap_err().kind(), ErrorKind::NotFound);
        root(&real, Missing::Made).unwrap();
        symlink("real/../real", &way).unwrap();
        let found = root(&way.join("store"), Missing::Error).unwrap();
        assert_eq!(found.shown(), way.join("store"));
        symlink("way2", dir.path().join("way2")).unwrap();
        assert!(root(&dir.path().join("way2"), Missing::Made).unwrap_err().to_string().contains("circle"));
    }

    #[test]
    fn only_regular_files_are_objects_and_nothing_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let store = root(dir.path(), Missing::Error).unwrap();
        fs::mknodat(&store, "pipe", FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
        std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
        symlink("/etc/hostname", dir.path().join("link")).unwrap();
        for (name, word) in [("pipe", "FIFO"), ("socket", "socket"), ("link", "symbolic link")] {
            for error in [object(&store, name).unwrap_err(), lock(&store, name, 0o600).unwrap_err()] {
                let text = error.to_string();
                assert!(
                    text.contains(word) || name == "pipe" && text.contains("something else"),
                    "{name}: {text}"
                );
            }
        }
        symlink("/etc", dir.path().join("hosts")).unwrap();
        for missing in [Missing::Error, Missing::Made] {
            let text = place(&store, "hosts/biz.json", missing).unwrap_err().to_string();
            assert!(text.contains("hosts is a symbolic link"), "{text}");
        }
    }
}
