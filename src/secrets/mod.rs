//! A service's secrets on its hosts: which files they are, and what is asked of a host about them. The host's side
//! runs there as root, is given paths as arguments and content on stdin alone, and answers in JSON on stdout; what
//! it prints elsewhere never has a part of the content in it.

pub mod environment;
pub mod folders;
pub mod mask;

use crate::durable;
use crate::error::{Error, Result};
use crate::files::if_there;
use crate::hash::Sha256;
use crate::lock;
use crate::manifest::Service;
use crate::manifest::types::AbsolutePath;
use crate::names::ServiceName;
use crate::systemd;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use fs_err::os::unix::fs::OpenOptionsExt;
use serde::{Deserialize, Serialize};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// The largest file that is read, in bytes.
pub const MAX_FILE: u64 = 1 << 20;

/// How long another write to the same folder is waited for; it takes milliseconds.
const LOCK_WAIT: Duration = Duration::from_secs(10);

/// What a file must be to be of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileFormat {
    /// `NAME=value` lines, for systemd's `EnvironmentFile=`.
    Environment,
    /// Whatever the service makes of it.
    Bytes,
}

impl FileFormat {
    /// The word for it on a command line.
    pub fn as_str(self) -> &'static str {
        match self {
            FileFormat::Environment => "environment",
            FileFormat::Bytes => "bytes",
        }
    }

    /// The form that a word of a command line means.
    pub fn parse(word: &str) -> Result<Self, String> {
        let mut all = [FileFormat::Environment, FileFormat::Bytes].into_iter();
        all.find(|form| form.as_str() == word).ok_or_else(|| "no such form of a file".into())
    }
}

/// A file of secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretFile {
    /// Where it is on every host that runs the service.
    pub path: String,
    /// What must be in it.
    pub form: FileFormat,
}

/// The files of secrets that a service's entry names.
pub fn files(service: &Service) -> Vec<SecretFile> {
    let file = |path: &AbsolutePath, form| SecretFile { path: path.to_string(), form };
    let environment = service.env_file.iter().map(|path| file(path, FileFormat::Environment));
    let credentials = service.credentials.values().map(|path| file(path, FileFormat::Bytes));
    environment.chain(credentials).collect()
}

/// What a host says of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileState {
    /// The form of this answer.
    pub version: u32,
    /// Why the deployer would not start the service with it, each with what to type.
    pub problems: Vec<String>,
    /// What systemd would not take as it is meant, by line.
    pub mistakes: Vec<String>,
    /// The variables that it sets.
    pub names: Vec<String>,
    /// The service's unit is active.
    pub running: bool,
    /// It was changed after the service was started.
    pub newer: bool,
    /// Its content in base64, if that was asked for; None when there is no file.
    pub content: Option<String>,
    /// The hash of its content, if that was asked for: what a write must find again.
    pub hash: Option<String>,
}

/// What a host is told to write.
#[derive(Serialize, Deserialize)]
pub struct WriteRequest {
    /// The hash of the content that was read; None when there was no file.
    pub instead_of: Option<String>,
    /// The new content in base64.
    pub content: String,
}

/// What came of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WriteResult {
    /// It is on the disk.
    Done,
    /// Somebody else changed the file meanwhile; nothing was written.
    Changed,
}

/// Bytes as they travel.
pub fn encode(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// What was encoded; the error has nothing of it.
pub fn decode(text: &str) -> Result<Vec<u8>> {
    STANDARD.decode(text).map_err(|_| Error::new("what came over the wire is not base64; try again"))
}

/// Whether a secrets file may be used: there, a regular file, root's, readable by nobody else. The answer
/// identifies its present content without telling anything of it (times, size, inode), or is the reason with
/// the command that mends it.
pub fn usable(name: &ServiceName, path: &Path) -> Result<String, String> {
    let shown = path.display();
    let wrong = |why: &str| Err(format!("secrets file {shown} of {name}{why}"));
    if let Some(why) = path.parent().and_then(folders::insecure) {
        return wrong(&format!(": {why}"));
    }
    let meta = if_there(fs_err::symlink_metadata(path));
    let Some(meta) = meta.map_err(|e| format!("secrets file of {name}: {e}"))? else {
        return wrong(&format!(" is missing; make it: install -m 600 /dev/null {shown}"));
    };
    if meta.is_symlink() {
        return wrong(" is a symbolic link; put the file itself there");
    }
    if !meta.is_file() {
        return wrong(" is not a regular file; put a file there");
    }
    if meta.uid() != 0 {
        return wrong(&format!(" belongs to user {}; run: chown root:root {shown}", meta.uid()));
    }
    let mode = meta.mode() & 0o7777;
    if mode & !0o600 != 0 {
        return wrong(&format!(" has mode {mode:04o}, others could read it; run: chmod 600 {shown}"));
    }
    Ok(format!("{}.{}.{}.{}", meta.mtime(), meta.mtime_nsec(), meta.size(), meta.ino()))
}

/// Whether a file was changed after a service was last started.
pub fn changed_since_start(name: &ServiceName, file: &Path) -> bool {
    let changed = fs_err::metadata(file).ok().map(|m| (m.mtime(), m.mtime_nsec()));
    matches!((systemd::started(&name.unit()), changed), (Some(started), Some(changed)) if changed > started)
}

/// On the host: looks at a file, and reads it if `content` is wanted.
pub fn look(name: &ServiceName, path: &Path, form: FileFormat, content: bool) -> Result<FileState> {
    let mut problems: Vec<String> = usable(name, path).err().into_iter().collect();
    // Where others could lead us to another file nothing is read, and that is all there is to be said.
    let unsafe_folder = !content && path.parent().is_some_and(|folder| folders::insecure(folder).is_some());
    let bytes = if unsafe_folder { None } else { read(path)? };
    problems.extend(path.parent().and_then(secret_dir));
    let (names, mistakes) = match (&bytes, form) {
        (Some((bytes, _)), FileFormat::Environment) => environment::read(bytes),
        _ => Default::default(),
    };
    let running = systemd::is_active(&name.unit());
    Ok(FileState {
        version: 1,
        problems,
        mistakes: mistakes.iter().map(ToString::to_string).collect(),
        names,
        running,
        newer: running && changed_since_start(name, path),
        hash: bytes.as_ref().filter(|_| content).map(|(bytes, _)| Sha256::of(bytes).base16()),
        content: bytes.filter(|_| content).map(|(bytes, _)| encode(&bytes)),
    })
}

/// What is wrong with a folder that is for secrets alone, besides what keeps a service from being started
/// ([`folders::insecure`]). One that others use as well (`/etc`) is judged by its files.
pub fn secret_dir(dir: &Path) -> Option<String> {
    let meta = fs_err::metadata(dir).ok()?;
    let ours = dir.file_name().is_some_and(|name| name.to_string_lossy().contains("secret"));
    let (mode, at) = (meta.mode() & 0o7777, dir.display());
    (ours && mode & 0o077 != 0).then(|| format!("{at} has mode {mode:04o}; chmod 700 {at}"))
}

/// The first line of a file that keeps its service from being started, with the next move: systemd would refuse it, or
/// write it to the journal.
pub fn illegible(name: &ServiceName, file: &SecretFile) -> io::Result<Option<String>> {
    let grave = mistakes(file)?.into_iter().find(|mistake| mistake.grave);
    Ok(grave.map(|why| format!("{}, {why}; fix it with 'omni-deploy secrets edit {name}'", file.path)))
}

/// The lines of a file that systemd reads otherwise than they are written, without what they say.
pub fn misread(file: &SecretFile) -> io::Result<Vec<environment::Mistake>> {
    Ok(mistakes(file)?.into_iter().filter(|mistake| !mistake.grave).collect())
}

fn mistakes(file: &SecretFile) -> io::Result<Vec<environment::Mistake>> {
    Ok(match file.form {
        FileFormat::Environment => environment::read(&fs_err::read(&file.path)?).1,
        FileFormat::Bytes => Vec::new(),
    })
}

/// On the host: puts a content in place, if what is there now is what it is meant to replace. The file keeps its
/// mode and owner; a new one is root's alone, and so is a folder that has to be made for it.
pub fn write(path: &Path, wanted: &WriteRequest) -> Result<WriteResult> {
    let content = decode(&wanted.content)?;
    let (Some(folder), true) = (path.parent(), path.is_absolute()) else {
        return Err(Error::new(format!("{} is not a file below a folder", path.display())));
    };
    guarded(folder)?;
    if !folder.exists() {
        durable::folder(folder, 0o700)?;
    }
    // Held against another write between the look and the rename; it ends with the process.
    let _lock = lock::of_folder(folder, LOCK_WAIT)?;
    if fs_err::metadata(folder)?.mode() & 0o077 == 0 {
        // Of a write that was cut short; nobody else writes in a folder like this.
        durable::sweep(folder)?;
    }
    let present = read(path)?;
    if present.as_ref().map(|(bytes, _)| Sha256::of(bytes).base16()) != wanted.instead_of {
        return Ok(WriteResult::Changed);
    }
    match present {
        Some((_, meta)) => {
            durable::write_owned(path, &content, meta.mode() & 0o7777, (meta.uid(), meta.gid()))?;
        }
        None => durable::write(path, &content, 0o600)?,
    }
    Ok(WriteResult::Done)
}

/// A file's content; None when there is none. Links are not followed, also not to a file that may be read.
fn read(path: &Path) -> Result<Option<(Vec<u8>, std::fs::Metadata)>> {
    let shown = path.display();
    if !path.is_absolute() || path.components().any(|c| c == Component::ParentDir) {
        return Err(Error::new(format!("{shown} is not absolute, or has '..'")));
    }
    path.parent().map_or(Ok(()), guarded)?;
    let mut options = fs_err::OpenOptions::new();
    // Nor is a pipe waited for.
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    options.read(true).custom_flags(flags.bits() as i32);
    let file = match if_there(options.open(path)) {
        Ok(Some(file)) => file,
        Ok(None) => return Ok(None),
        Err(_) if fs_err::symlink_metadata(path).is_ok_and(|m| m.is_symlink()) => {
            return Err(Error::new(format!("{shown} is a symbolic link; put the file itself there")));
        }
        Err(e) => return Err(e.into()),
    };
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(Error::new(format!("{shown} is not a regular file; put a file there")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::new(format!("{shown} has more than {MAX_FILE} bytes; edit it on the host")));
    }
    Ok(Some((bytes, meta)))
}

/// Refuses a folder through which somebody else than root could lead us to another file.
fn guarded(folder: &Path) -> Result<()> {
    folders::insecure(folder).map_or(Ok(()), |why| Err(Error::new(why)))
}

/// The kernel's number for tmpfs (statfs(2)); ramfs is for root alone.
const TMPFS: i128 = 0x0102_1994;

/// A temporary folder that is in memory, if this machine has such a place for this user: what is in it never reaches a
/// disk, but for swap.
pub fn folder_in_memory() -> Option<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|p| p.is_absolute());
    let in_memory = |dir: &PathBuf| {
        rustix::fs::statfs(dir).is_ok_and(|of| i128::from(of.f_type) == TMPFS)
            && tempfile::tempfile_in(dir).is_ok()
    };
    let places = [Some(PathBuf::from("/dev/shm")), runtime, Some(std::env::temp_dir())];
    places.into_iter().flatten().find(in_memory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn wanted(instead_of: Option<&[u8]>, content: &[u8]) -> WriteRequest {
        WriteRequest {
            instead_of: instead_of.map(|bytes| Sha256::of(bytes).base16()),
            content: encode(content),
        }
    }

    /// Needs root, as the whole of this machine's tests does: these files are root's.
    #[test]
    #[ignore = "needs root: cargo test -- --ignored"]
    fn a_write_keeps_mode_and_owner_and_replaces_only_what_was_read() {
        let dir = tempfile::tempdir_in("/root").unwrap();
        let path = dir.path().join("new/ava.env");
        let mode = |p: &Path| fs_err::metadata(p).unwrap().mode() & 0o7777;
        assert_eq!(write(&path, &wanted(Some(b"x"), b"A=1")).unwrap(), WriteResult::Changed);
        assert!(!path.exists());
        assert_eq!(write(&path, &wanted(None, b"A=1")).unwrap(), WriteResult::Done);
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o440)).unwrap();
        std::os::unix::fs::chown(&path, Some(0), Some(7)).unwrap();
        assert_eq!(write(&path, &wanted(None, b"A=2")).unwrap(), WriteResult::Changed);
        assert_eq!(write(&path, &wanted(Some(b"A=1"), b"A=2")).unwrap(), WriteResult::Done);
        assert_eq!((mode(&path), fs_err::metadata(&path).unwrap().gid()), (0o440, 7));
        assert_eq!(fs_err::read(&path).unwrap(), b"A=2");
        assert_eq!(fs_err::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    #[ignore = "needs root: cargo test -- --ignored"]
    fn nothing_is_read_or_written_through_a_link_or_a_folder_of_somebody_else() {
        let dir = tempfile::tempdir_in("/root").unwrap();
        let (secret, link) = (dir.path().join("s"), dir.path().join("link"));
        fs_err::write(&secret, "A=hunter2").unwrap();
        fs_err::os::unix::fs::symlink(&secret, &link).unwrap();
        let refused = |path: &Path, word: &str| {
            let e = read(path).unwrap_err().to_string();
            assert!(e.contains(word) && !e.contains("hunter2"), "{e}");
            assert!(write(path, &wanted(None, b"B=1")).is_err());
        };
        refused(&link, "symbolic link");
        refused(dir.path(), "regular file");
        refused(Path::new("ava.env"), "absolute");
        refused(&dir.path().join("../x"), "'..'");
        let theirs = dir.path().join("theirs");
        fs_err::create_dir(&theirs).unwrap();
        std::os::unix::fs::chown(&theirs, Some(65534), None).unwrap();
        refused(&theirs.join("ava.env"), "belongs to user 65534");
        assert_eq!(fs_err::read(&secret).unwrap(), b"A=hunter2");
    }

    #[test]
    #[ignore = "needs root: cargo test -- --ignored"]
    fn secrets_that_others_could_read_are_refused_with_the_line_to_type() {
        let dir = tempfile::tempdir_in("/root").unwrap();
        let name = ServiceName::parse("ava").unwrap();
        let file = dir.path().join("ava.env");
        assert!(usable(&name, &file).unwrap_err().contains("install -m 600"));
        fs_err::write(&file, "A=1").unwrap();
        for (mode, good) in
            [(0o644, false), (0o640, false), (0o601, false), (0o4600, false), (0o600, true), (0o400, true)]
        {
            fs_err::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            let answer = usable(&name, &file);
            assert_eq!(answer.is_ok(), good, "{mode:o}: {answer:?}");
            if let Err(why) = answer {
                assert!(why.contains(&format!("chmod 600 {}", file.display())), "{why}");
            }
        }
        let link = dir.path().join("link.env");
        fs_err::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(usable(&name, &link).unwrap_err().contains("symbolic link"));
        assert!(usable(&name, dir.path()).unwrap_err().contains("regular"));
    }
}
