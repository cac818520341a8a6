//! A service's secrets on its hosts: which files they are, and what is asked of a host about them. The host's side
//! runs there as root, is given paths as arguments and content on stdin alone, and answers in JSON on stdout; what
//! it prints elsewhere never has a part of the content in it.

pub mod environment;

use crate::deployer::observe;
use crate::durable;
use crate::error::{Error, Result};
use crate::manifest::Service;
use crate::names::ServiceName;
use crate::runner::Run;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use fs_err::os::unix::fs::OpenOptionsExt;
use serde::{Deserialize, Serialize};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

/// The largest file that is read, in bytes.
pub const MAX_FILE: u64 = 1 << 20;

/// How long another write to the same folder is waited for; it takes milliseconds.
const LOCK_WAIT: Duration = Duration::from_secs(10);

/// What a file must be to be of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `NAME=value` lines, for systemd's `EnvironmentFile=`.
    Environment,
    /// Whatever the service makes of it.
    Bytes,
}

impl Form {
    /// The word for it on a command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Form::Environment => "environment",
            Form::Bytes => "bytes",
        }
    }

    /// The form that a word of a command line means.
    pub fn parse(word: &str) -> Option<Self> {
        [Form::Environment, Form::Bytes].into_iter().find(|form| form.as_str() == word)
    }
}

/// A file of secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretFile {
    /// Where it is on every host that runs the service.
    pub path: String,
    /// What must be in it.
    pub form: Form,
}

/// The files of secrets that a service's entry names.
pub fn files(service: &Service) -> Vec<SecretFile> {
    let environment = |path: &String| SecretFile { path: path.clone(), form: Form::Environment };
    let bytes = |path: &String| SecretFile { path: path.clone(), form: Form::Bytes };
    service.env_file.iter().map(environment).chain(service.credentials.values().map(bytes)).collect()
}

/// What a host says of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
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
pub struct Wanted {
    /// The hash of the content that was read; None when there was no file.
    pub instead_of: Option<String>,
    /// The new content in base64.
    pub content: String,
}

/// What came of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Written {
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
    STANDARD.decode(text).map_err(|_| Error::new("what came over the wire is no base64; try again"))
}

/// The hash of a content, in hex.
pub fn hash(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

/// On the host: looks at a file, and reads it if `content` is wanted.
pub fn look(name: &ServiceName, path: &Path, form: Form, content: bool) -> Result<Found> {
    let bytes = read(path)?;
    let mut problems: Vec<String> = observe::secrets_file(name, path).err().into_iter().collect();
    problems.extend(path.parent().and_then(secret_dir));
    let (names, mistakes) = match (&bytes, form) {
        (Some((bytes, _)), Form::Environment) => environment::read(bytes),
        _ => Default::default(),
    };
    let running = Run::new("systemctl").args(["--quiet", "is-active", "--", &name.unit()]);
    let running = running.deadline(Duration::from_secs(20)).output().is_ok_and(|o| o.status.ok());
    Ok(Found {
        version: 1,
        problems,
        mistakes: mistakes.iter().map(ToString::to_string).collect(),
        names,
        running,
        newer: running && observe::changed_since_start(name, path),
        hash: bytes.as_ref().filter(|_| content).map(|(bytes, _)| hash(bytes)),
        content: bytes.filter(|_| content).map(|(bytes, _)| encode(&bytes)),
    })
}

/// What is wrong with a folder of secrets. One that others use as well (`/etc`) is judged by its files alone.
pub fn secret_dir(dir: &Path) -> Option<String> {
    let meta = fs_err::metadata(dir).ok()?;
    let ours = dir.file_name().is_some_and(|name| name.to_string_lossy().contains("secret"));
    let (mode, at) = (meta.mode() & 0o7777, dir.display());
    if meta.uid() != 0 {
        Some(format!("{at} belongs to user {}; chown root:root {at}", meta.uid()))
    } else if ours && mode & 0o077 != 0 {
        Some(format!("{at} has mode {mode:04o}; chmod 700 {at}"))
    } else if mode & 0o022 != 0 && mode & 0o1000 == 0 {
        Some(format!("{at} has mode {mode:04o}, others can put files there; chmod go-w {at}"))
    } else {
        None
    }
}

/// The first line of a file that keeps its service from being started, with the next move: systemd would refuse it, or
/// write it to the journal.
pub fn illegible(name: &ServiceName, file: &SecretFile) -> io::Result<Option<String>> {
    if file.form == Form::Bytes {
        return Ok(None);
    }
    let (_, mistakes) = environment::read(&fs_err::read(&file.path)?);
    let grave = mistakes.iter().find(|mistake| mistake.grave);
    Ok(grave.map(|why| format!("{}, {why}; mend it with 'omni-deploy secrets edit {name}'", file.path)))
}

/// The lines of a file that systemd reads otherwise than they are written, without what they say.
pub fn misread(file: &SecretFile) -> io::Result<Vec<environment::Mistake>> {
    if file.form == Form::Bytes {
        return Ok(vec![]);
    }
    let (_, mistakes) = environment::read(&fs_err::read(&file.path)?);
    Ok(mistakes.into_iter().filter(|mistake| !mistake.grave).collect())
}

/// On the host: puts a content in place, if what is there now is what it is meant to replace. The file keeps its
/// mode and owner; a new one is root's alone, and so is a folder that has to be made for it.
pub fn write(path: &Path, wanted: &Wanted) -> Result<Written> {
    let content = decode(&wanted.content)?;
    let (Some(folder), true) = (path.parent(), path.is_absolute()) else {
        return Err(Error::new(format!("{} is no file below a folder", path.display())));
    };
    guarded(folder)?;
    if !folder.exists() {
        durable::folder(folder, 0o700)?;
    }
    // Held against another write between the look and the rename; it ends with the process.
    let lock = fs_err::File::open(folder)?;
    let begun = Instant::now();
    while let Err(e) = lock.file().try_lock() {
        if begun.elapsed() > LOCK_WAIT {
            return Err(Error::new(format!(
                "cannot lock {}: {e}; 'fuser -v {0}' shows who has it",
                folder.display()
            )));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    if fs_err::metadata(folder)?.mode() & 0o077 == 0 {
        // Of a write that was cut short; nobody else writes in a folder like this.
        durable::sweep(folder)?;
    }
    let present = read(path)?;
    if present.as_ref().map(|(bytes, _)| hash(bytes)) != wanted.instead_of {
        return Ok(Written::Changed);
    }
    match present {
        Some((_, meta)) => {
            durable::write_owned(path, &content, meta.mode() & 0o7777, (meta.uid(), meta.gid()))?;
        }
        None => durable::write(path, &content, 0o600)?,
    }
    Ok(Written::Done)
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
    let file = match options.open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
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
    for folder in folder.ancestors().filter(|f| f.is_absolute()) {
        let at = folder.display();
        let meta = match fs_err::metadata(folder) {
            Ok(meta) => meta,
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(e.into()),
        };
        // In a sticky folder others can add files, not replace root's.
        if meta.uid() != 0 || meta.mode() & 0o022 != 0 && meta.mode() & 0o1000 == 0 {
            return Err(Error::new(format!(
                "others than root can change what is in {at}; run: chown root:root {at}; chmod go-w {at}"
            )));
        }
    }
    Ok(())
}

/// The path of a temporary folder that is in memory, if this machine has such a place for this user.
pub fn scratch_place() -> PathBuf {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|p| p.is_absolute());
    let usable = |dir: &PathBuf| tempfile::tempfile_in(dir).is_ok();
    let places = [Some(PathBuf::from("/dev/shm")), runtime];
    places.into_iter().flatten().find(usable).unwrap_or_else(std::env::temp_dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn wanted(instead_of: Option<&[u8]>, content: &[u8]) -> Wanted {
        Wanted { instead_of: instead_of.map(hash), content: encode(content) }
    }

    /// Needs root, as the whole of this machine's tests does: these files are root's.
    #[test]
    #[ignore = "needs root: cargo test -- --ignored"]
    fn a_write_keeps_mode_and_owner_and_replaces_only_what_was_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/ava.env");
        let mode = |p: &Path| fs_err::metadata(p).unwrap().mode() & 0o7777;
        assert_eq!(write(&path, &wanted(Some(b"x"), b"A=1")).unwrap(), Written::Changed);
        assert!(!path.exists());
        assert_eq!(write(&path, &wanted(None, b"A=1")).unwrap(), Written::Done);
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o440)).unwrap();
        std::os::unix::fs::chown(&path, Some(0), Some(7)).unwrap();
        assert_eq!(write(&path, &wanted(None, b"A=2")).unwrap(), Written::Changed);
        assert_eq!(write(&path, &wanted(Some(b"A=1"), b"A=2")).unwrap(), Written::Done);
        assert_eq!((mode(&path), fs_err::metadata(&path).unwrap().gid()), (0o440, 7));
        assert_eq!(fs_err::read(&path).unwrap(), b"A=2");
        assert_eq!(fs_err::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    #[ignore = "needs root: cargo test -- --ignored"]
    fn nothing_is_read_or_written_through_a_link_or_a_folder_of_somebody_else() {
        let dir = tempfile::tempdir().unwrap();
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
        refused(&theirs.join("ava.env"), "others than root");
        assert_eq!(fs_err::read(&secret).unwrap(), b"A=hunter2");
    }
}
