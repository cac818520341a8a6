//! How files are read: what may be missing, what a pass has one of for each service (with few calls of the kernel: what
//! they cost is most of what an idle pass costs), and what a newer program may have written.

use fs_err::File;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::fs::Metadata;
use std::io::{ErrorKind, Read, Result};
use std::path::Path;

/// What a reader of std's wants free before it reads into a buffer of the caller's own.
const SPARE: usize = 64;

/// What was found, or None where there is nothing of that name.
pub fn if_there<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        found => found.map(Some),
    }
}

/// The same, where a file may also stand in the place of a folder above it.
pub fn if_reached<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Err(e) if e.kind() == ErrorKind::NotADirectory => Ok(None),
        found => if_there(found),
    }
}

/// Why a form of ours cannot be read.
#[derive(Debug)]
pub enum FormatError {
    /// A newer program has written it: its version, and the last one that is known.
    Newer(u64, u64),
    /// It is not what it should be.
    Broken(serde_json::Error),
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FormatError::Newer(version, known) => {
                write!(f, "it has version {version}, this program reads up to {known}")
            }
            FormatError::Broken(e) => e.fmt(f),
        }
    }
}

/// Reads one of our forms in JSON, whose `version` is `known` at most.
pub fn versioned<T: DeserializeOwned>(bytes: &[u8], known: u64) -> std::result::Result<T, FormatError> {
    #[derive(Deserialize)]
    struct Head {
        version: u64,
    }
    let read = serde_json::from_slice(bytes).map_err(FormatError::Broken);
    match serde_json::from_slice(bytes) {
        // What is wrong with a newer one by today's form may be right by its own.
        Ok(Head { version }) if version > known => Err(FormatError::Newer(version, known)),
        _ => read,
    }
}

/// Reads a file of a disk, up to the size that it had when it was opened, and what it was then: files of ours are never
/// written in place. Not for the kernel's own, whose size is not known.
pub fn read(path: &Path) -> Result<(Vec<u8>, Metadata)> {
    let file = File::open(path)?;
    let meta = file.metadata()?;
    let mut bytes = Vec::with_capacity(usize::try_from(meta.len()).unwrap_or(0).saturating_add(SPARE));
    file.take(meta.len()).read_to_end(&mut bytes)?;
    Ok((bytes, meta))
}

/// Reads a text of the kernel's own, to its end.
pub fn read_virtual(path: &Path) -> Result<String> {
    let mut file = File::open(path)?;
    let mut text = [0; 4096];
    let mut all = Vec::new();
    loop {
        match file.read(&mut text)? {
            0 => return Ok(String::from_utf8_lossy(&all).into_owned()),
            count => all.extend_from_slice(&text[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_whole_whatever_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        for size in [0, 1, 31, 32, 64, 4096, 8191, 8192, 100_000] {
            let bytes: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
            fs_err::write(&path, &bytes).unwrap();
            let (read, meta) = read(&path).unwrap();
            assert!(read == bytes, "{size}: {}", read.len());
            assert_eq!(meta.len(), size as u64);
        }
        let missing = read(&dir.path().join("none")).unwrap_err();
        assert!(missing.kind() == std::io::ErrorKind::NotFound && missing.to_string().contains("none"));
    }

    #[test]
    fn a_text_of_the_kernels_is_read_to_its_end() {
        // More than one buffer of it, and no size.
        let maps = read_virtual(Path::new("/proc/self/smaps")).unwrap();
        assert!(maps.len() > 4096 && maps.ends_with('\n') && maps.contains("[stack]"), "{maps}");
        assert_eq!(fs_err::metadata("/proc/self/smaps").unwrap().len(), 0);
    }
}
